"""A user's own grader, "package.module:function", in a process that can be ended: one that loops for ever, or ends its
process, is an error of the run and not its end.

One process stays for all of a run's calls, so that a grader may keep what it likes in its module: a model, a cache, a
connection. It sees nothing that this process puts there.
"""

from __future__ import annotations

import pickle
import traceback
from typing import Any

from understudy.errors import RunError
from understudy.tasks import bounded
from understudy.tasks.grade import Grade, Grader, as_grade
from understudy.tasks.imports import imported
from understudy.types import FinishReason, Prompt

_process = bounded.Helper(limit_bytes=None)


def problem_with(name: str) -> str | None:
    """What keeps ``name`` from being a grader; None where nothing does. Imports its module, in the other process."""
    _process.refresh()
    try:
        return _process.call(f"{__name__}:_problem", name, seconds=bounded.IMPORT_SECONDS)
    except bounded.GaveUpError as error:
        return f"it cannot be imported: {str(error).rpartition(': ')[2]}"


def own_grader(name: str, seconds: float) -> Grader:
    """The function that ``name`` names, with a limit for each completion.

    The grader raises RunError for a function that takes longer than ``seconds``, ends its process, raises, or returns
    neither a number nor a ``Grade``.
    """

    def grade(prompt: Prompt, completion: str, finish_reason: FinishReason) -> Grade:
        where = f"the grader {name}, a completion of prompt {prompt.index}"
        try:
            reply = _process.call(f"{__name__}:_graded", name, prompt, completion, finish_reason, seconds=seconds)
        except bounded.GaveUpError as error:
            reason = str(error).rpartition(": ")[2]
            raise RunError(
                f"{where}: {reason}; expected a number or a Grade within grader_timeout_seconds = {seconds:g}. Mend "
                "the grader or raise the limit; --resume takes either"
            ) from None
        except (pickle.PicklingError, TypeError, AttributeError) as error:  # what pickle says of a row's values
            raise RunError(
                f"{where}: its row cannot be sent to another process ({error}); leave that column out, or set "
                "grader_timeout_seconds = 0 to grade in this process"
            ) from None
        if "raised" in reply:
            raise RunError(
                f"{where}: it raised {reply['raised']}; expected a number or a Grade. Mend it; --resume goes on"
            )
        return Grade(**reply)

    grade.__name__ = name
    return grade


def _problem(name: str) -> str | None:
    try:
        imported(name)
    except Exception as error:
        return _said(error)
    return None


def _graded(name: str, prompt: Prompt, completion: str, finish_reason: FinishReason) -> dict[str, Any]:
    try:
        grade = as_grade(imported(name)(prompt, completion, finish_reason))
        details = {str(detail): float(value) for detail, value in grade.details.items()}
        return {"reward": float(grade.reward), "has_answer": bool(grade.has_answer), "details": details}
    except Exception as error:
        return {"raised": _said(error)}


def _said(error: Exception) -> str:
    """An error and the innermost place it comes from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    place = f" ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"[:2000]

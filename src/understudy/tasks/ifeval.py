"""IFEval's grader: how many of a prompt's checkable instructions a response follows, strictly and loosely.

A row carries ``instruction_id_list`` and ``kwargs`` (one mapping for each instruction), as the published data does;
docs/ifeval.md describes rules, numbers and differences from the reference implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from understudy.errors import ConfigError
from understudy.tasks.grade import Grade
from understudy.tasks.ifeval_checks import INSTRUCTIONS
from understudy.types import FinishReason, Prompt


def ifeval(prompt: Prompt, completion: str, finish_reason: FinishReason) -> Grade:
    """Reward 1 when every instruction is followed strictly. A completion cut at the cap is graded as it stands; an
    empty one follows nothing.

    Details, each for ``strict`` and ``loose``: ``prompt_strict``, whether all instructions are followed;
    ``instruction_strict``, how many are, and ``instruction_strict_count``, how many there are, so that an evaluation
    divides sum by sum, as the reference does. Raises as ``check_row`` does.
    """
    rules = _rules(prompt.metadata, f"prompt {prompt.index}")
    variants = loose_variants(completion)
    strict = [_follows(rule, [completion]) for rule in rules]
    loose = [followed or _follows(rule, variants) for followed, rule in zip(strict, rules, strict=True)]
    details: dict[str, float] = {}
    for name, followed in (("strict", strict), ("loose", loose)):
        details[f"prompt_{name}"] = float(all(followed))
        details[f"instruction_{name}"] = float(sum(followed))
        details[f"instruction_{name}_count"] = float(len(rules))
    return Grade(float(all(strict)), has_answer=bool(completion.strip()), details=details)


def check_row(metadata: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError naming ``where`` for a row that cannot be graded: no instructions, unknown ones, arguments that
    do not fit them, or a rule whose package is not installed."""
    _rules(metadata, where)


def loose_variants(response: str) -> list[str]:
    """The response; without its first, its last, both lines; and these four without asterisks. Duplicates left out.

    A preamble, a farewell or Markdown emphasis shall not hide an instruction that is followed.
    """
    lines = response.split("\n")
    cut = [response, *("\n".join(rest).strip() for rest in (lines[1:], lines[:-1], lines[1:-1]))]
    return list(dict.fromkeys([*cut, *(text.replace("*", "") for text in cut)]))


def _follows(rule: Callable[[str], bool], variants: Sequence[str]) -> bool:
    return any(variant.strip() and rule(variant) for variant in variants)


def _rules(metadata: Mapping[str, Any], where: str) -> list[Callable[[str], bool]]:
    ids, kwargs = metadata.get("instruction_id_list"), metadata.get("kwargs")
    if not _is_list(ids) or not ids or not _is_list(kwargs) or len(ids) != len(kwargs):
        raise ConfigError(
            where,
            got=f"instruction_id_list = {ids!r}, kwargs = {kwargs!r}"[:300],
            expected="two lists of the same length, at least one instruction",
            remedy="use rows in IFEval's format; columns = {...} renames columns",
        )
    return [_rule(name, arguments, where) for name, arguments in zip(ids, kwargs, strict=True)]


def _rule(name: Any, arguments: Any, where: str) -> Callable[[str], bool]:
    if not isinstance(name, str) or name not in INSTRUCTIONS:
        raise ConfigError(
            where,
            got=f"the instruction {name!r}",
            expected=f"one of {', '.join(INSTRUCTIONS)}",
            remedy="correct the name, or leave the row out",
        )
    try:
        return INSTRUCTIONS[name].bind(arguments)
    except ConfigError:
        raise  # a missing package is not the row's fault
    except ValueError as error:
        raise ConfigError(
            where,
            got=f"{name} with {error}",
            expected=f"kwargs {{{', '.join(INSTRUCTIONS[name].arguments)}}}",
            remedy="correct the row's kwargs, or leave the row out",
        ) from None


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str)

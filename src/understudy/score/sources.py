"""Where rollouts to look at come from: a run's step, or a file of any known form. Every error names the place."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AllowInfNan, BaseModel, ConfigDict, JsonValue, ValidationError

from understudy.errors import ConfigError, first_line
from understudy.rollout_store import read_rollouts, rollouts_path
from understudy.score.dumps import read_object

Record = dict[str, Any]
Step = int | Literal["all"]

# Lists with one entry per completion token.
PER_TOKEN = (
    "completion_tokens",
    "sampler_logprobs",
    "trainer_logprobs",
    "teacher_logprobs",
    "advantages",
    "loss_mask",
    "student_entropy",
    "teacher_entropy",
)
_ALTERNATIVES = ("teacher_topk", "student_topk")
# What rounding leaves of a log-probability of 0 may lie above it by this much.
_ROUNDING = 1e-3
# JSON as Python writes it has infinities where a token is impossible, and NaN where nothing was computed.
_Number = Annotated[float, AllowInfNan()]
_Numbers = list[_Number | None] | None
# A number by the documentation; some write a name.
_Place = int | str | None


class _Alternatives(BaseModel):
    model_config = ConfigDict(strict=True)
    ids: list[list[int | None]] | None = None
    tokens: list[list[str]] | None = None
    logprobs: list[list[float | None]]


class _Plain(BaseModel):
    """The types of docs/credit.md's plain form, where a wrong one would end in a traceback later. What a page exports
    as it is has to be JSON, which knows no NaN."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    step: _Place = None
    prompt_index: _Place = None
    sample_index: _Place = None
    task: str | None = None
    answer: JsonValue = None
    completion_ids: list[int] | None = None
    completion_tokens: list[str] | None = None
    completion_text: str | None = None
    prompt_ids: list[int] | None = None
    teacher_prompt_ids: list[int] | None = None
    prompt_text: str | None = None
    messages: list[dict[str, JsonValue]] | None = None
    sampler_logprobs: _Numbers = None
    teacher_logprobs: _Numbers = None
    trainer_logprobs: _Numbers = None
    advantages: _Numbers = None
    student_entropy: _Numbers = None
    teacher_entropy: _Numbers = None
    loss_mask: list[bool | int] | None = None
    teacher_topk: _Alternatives | None = None
    student_topk: _Alternatives | None = None
    reward: _Number | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Source:
    """Records, and words for where they are from. ``is_run``: they have the marks of their run."""

    name: str
    records: Sequence[Record]
    is_run: bool = False


def read_source(place: str, *, step: Step | None = None, form: str | None = None) -> Source:
    """``runs/x`` (its last stored step, or ``step``, or all), ``runs/x@40``, or a file.

    Raises:
        ConfigError: no such run, step or file, or what a file holds cannot be read.
    """
    folder, _, asked = place.rpartition("@")
    if folder and asked.isdigit() and not Path(place).exists():
        if step is not None:
            raise ConfigError(
                f"--step {step}",
                got=f"a step beside {place}, which names one",
                expected="one of the two",
                remedy=f"understudy score {folder} --step {asked}",
            )
        return _of_run(Path(folder), int(asked))
    path = Path(place)
    if path.is_dir():
        return _of_run(path, step)
    if step is not None:
        raise ConfigError(
            f"--step {step}", got=f"{place}, a file", expected="a run's folder", remedy="drop --step, or name a run"
        )
    return Source(path.name, read_file(path, form=form))


def stored_steps(run: Path) -> list[int]:
    """The steps whose rollouts a run keeps, ascending."""
    names = (re.fullmatch(r"step_(\d+)\.jsonl", path.name) for path in (run / "rollouts").glob("*.jsonl"))
    return sorted(int(match[1]) for match in names if match)


def _of_run(run: Path, step: Step | None) -> Source:
    steps = stored_steps(run)
    if not steps or (step not in (None, "all") and step not in steps):
        raise ConfigError(
            f"run {run}" if not steps else f"run {run}, step {step}",
            got="no such folder" if not run.is_dir() else "no rollouts/" if not steps else "no rollouts of that step",
            expected=f"one of the steps {', '.join(map(str, steps))}" if steps else "a run with stored rollouts",
            remedy="set rollouts.every and rollouts.per_step in the run's file" if not steps else f"--step {steps[-1]}",
        )
    name = run.resolve().name
    if step == "all":
        records = [record for own in steps for record in _stored(run, own)]
        return Source(f"{name}, steps {steps[0]} to {steps[-1]}", records, is_run=True)
    chosen = steps[-1] if step is None else step
    return Source(f"{name}, step {chosen}", _stored(run, chosen), is_run=True)


def _stored(run: Path, step: int) -> list[Record]:
    try:
        return read_rollouts(rollouts_path(run / "rollouts", step))
    except ValueError as error:  # a broken line, or another version of the schema
        raise ConfigError(
            f"run {run}, step {step}",
            got=str(error),
            expected="rollouts that this version of understudy has written",
            remedy="choose another step, or make the run again",
        ) from None


def read_file(path: Path, *, form: str | None = None) -> list[Record]:
    """The records of a file: .jsonl, .json (an object or a list of them), or .pt (slime and miles).

    Raises:
        ConfigError: no file, nothing in it, or something that cannot be read, with its line.
    """
    records = [
        _checked(record, where)
        for where, values in _objects(path)
        for record in read_object(values, form=form, where=where)
    ]
    if not records:
        raise ConfigError(f"{path}", got="no rollouts", expected="at least one", remedy="check how it was written")
    for number, record in enumerate(records):
        record.setdefault("prompt_index", number)
    return records


def _objects(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not path.is_file():
        raise ConfigError(
            f"{path}",
            got="no such file or folder",
            expected="a run's output_dir, or a file of rollouts",
            remedy=f"check the path (working folder: {Path.cwd()})",
        )
    if path.suffix in (".pt", ".pth"):
        yield str(path), _tensors(path)
        return
    if path.suffix == ".json":
        whole = _json(_text(path), str(path))
        several = whole if isinstance(whole, list) else [whole]
        yield from ((f"{path}[{number}]", _object(own, f"{path}[{number}]")) for number, own in enumerate(several))
        return
    # Not splitlines, which also splits at the line separators of Unicode that texts may hold.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _object(_json(line, where), where)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin files with a byte order mark
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}", got=str(error), expected="text in UTF-8", remedy="write it anew in UTF-8"
        ) from None


def _json(text: str, where: str) -> Any:
    """Not as strict as rows are: a log-probability may be -Infinity, which Python writes."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(
            where, got=first_line(error), expected="JSON: an object per line, or one file", remedy="fix or delete it"
        ) from None


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(where, got=f"a {type(value).__name__}", expected="a JSON object", remedy="fix or delete it")
    return value


def _tensors(path: Path) -> Mapping[str, Any]:
    """A file of torch.save with nothing in it but tensors, numbers and texts: a pickle of more could run code."""
    import torch

    try:
        return _plain(torch.load(path, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(
            f"{path}",
            got=str(error).strip().splitlines()[0],
            expected="tensors, numbers, texts, lists and dicts only: more could run code while it is read",
            remedy="write it anew with its arrays as lists, or as JSON",
        ) from None


def _plain(value: Any) -> Any:
    """Tensors as lists, at any depth."""
    if isinstance(value, Mapping):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _checked(record: Record, where: str) -> Record:
    """Raise ConfigError for a record with values of wrong types, whose lists do not fit its tokens, or that has neither
    tokens nor text."""
    try:
        _Plain.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(
            where,
            got=f"{'.'.join(map(str, first['loc']))} = {first['input']!r}"[:200],
            expected=first["msg"].removeprefix("Input should be "),
            remedy="docs/credit.md describes the plain form and what is read of others",
        ) from None
    tokens = (
        record.get("completion_ids") if record.get("completion_ids") is not None else record.get("completion_tokens")
    )
    if tokens is None and record.get("completion_text") is None:
        raise ConfigError(
            where,
            got=f"a record with {', '.join(sorted(record)) or 'nothing'}",
            expected='"completion_ids", "completion_tokens" or "completion_text"',
            remedy="docs/credit.md describes the plain form",
        )
    columns = {name: record.get(name) for name in PER_TOKEN}
    for name in _ALTERNATIVES:
        columns |= {f"{name}.logprobs": (record.get(name) or {}).get("logprobs")}
    for name, values in columns.items():
        if values is not None and tokens is not None and len(values) != len(tokens):
            raise ConfigError(
                where,
                got=f"{len(values)} {name} for {len(tokens)} tokens",
                expected="one per completion token",
                remedy="leave the prompt's and the padding's out",
            )
        if name.endswith(".logprobs"):
            _check_alternatives(record.get(name.removesuffix(".logprobs")), f"{where}, {name}")
    _check_signs(record, where)
    return record


def _check_signs(record: Record, where: str) -> None:
    """Raise ConfigError for log-probabilities of probabilities above 1."""
    columns = {name: record.get(name) or [] for name in PER_TOKEN if name.endswith("_logprobs")}
    for name in _ALTERNATIVES:
        columns[f"{name}.logprobs"] = [own for row in (record.get(name) or {}).get("logprobs") or [] for own in row]
    for name, values in columns.items():
        above = next((value for value in values if value is not None and value > _ROUNDING), None)
        if above is not None:
            raise ConfigError(
                where,
                got=f"{above:g} among its {name}",
                expected="log-probabilities, which end at 0; these look like negative log-likelihoods",
                remedy="turn their sign",
            )


def _check_alternatives(topk: Mapping[str, Any] | None, where: str) -> None:
    """Raise ConfigError for alternatives without names, or with more log-probabilities than names."""
    if topk is None:
        return
    lists = {name: topk.get(name) for name in ("logprobs", "tokens", "ids")}
    shapes = {name: [len(row) for row in rows] for name, rows in lists.items() if rows is not None}
    if len(shapes) < 2 or any(shape != shapes["logprobs"] for shape in shapes.values()):
        raise ConfigError(
            where,
            got=", ".join(f"{sum(shape)} {name}" for name, shape in shapes.items()),
            expected='"logprobs", and "tokens" or "ids": a list per token, each as long as the other\'s',
            remedy="docs/credit.md describes the plain form",
        )

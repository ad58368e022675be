"""Reading a run directory. What is missing or broken is named, never fatal: crashed runs have reports too."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, InstanceOf

Row = Mapping[str, Any]

_ROLLOUT_FILE = re.compile(r"step_(\d+)\.jsonl$")
_SECRET = re.compile(
    r"(api_?key|secret|password|(auth|access|api|hf|bearer)_?token$|^token$|authorization)", re.IGNORECASE
)


# Files of rollouts that are looked at for the middle of a run, and that alarms may name.
MIDDLES, NAMED = 5, 6

_Text = InstanceOf[str]  # pydantic's own str has no room for half of a surrogate pair, which pages can show


_Id = Annotated[int, Field(ge=0, lt=2**32)]
_Numbers = list[float | None] | None


class _Form(BaseModel):
    model_config = ConfigDict(strict=True)


class _Topk(_Form):
    ids: list[list[_Id]]
    tokens: list[list[_Text]]
    logprobs: list[list[float]]


class _Rollout(_Form):
    """What pages compute with; a stored rollout whose values are of another kind is left out."""

    step: int | None = None
    prompt_index: int | None = None
    task: _Text | None = None
    reward: float | None = None
    completion_ids: list[_Id] | None = None
    completion_tokens: list[_Text] | None = None
    sampler_logprobs: _Numbers = None
    teacher_logprobs: _Numbers = None
    trainer_logprobs: _Numbers = None
    student_entropy: _Numbers = None
    teacher_entropy: _Numbers = None
    advantages: _Numbers = None
    loss_mask: list[bool] | None = None
    teacher_topk: _Topk | None = None
    student_topk: _Topk | None = None


class _Place(_Form):
    file: _Text | None = None
    index: int | None = None


class _Start(_Form):
    """A row of what was seen when the run was begun or gone on with."""

    step: int


class _Alarm(_Form):
    step: int
    rollouts: list[_Place] | None = None


_OPTIONAL: Mapping[str, type[BaseModel]] = {"guards": _Alarm, "doctor": _Start, "environment": _Start}


@dataclass(frozen=True)
class RunData:
    """One run as stored. ``metrics``: one row per step, sorted. ``rollouts``: of the steps that ``over_time`` names,
    first, middle and last, and of those that alarms lead to. ``alarms``: what the guards found; a healthy run has none.
    ``doctor``: what was found at each start; ``environments``: where each start ran."""

    path: Path
    metrics: tuple[Row, ...]
    config: Mapping[str, Any]
    costs: Mapping[str, Row]
    rollouts: Mapping[int, tuple[Row, ...]]
    over_time: tuple[int, ...]
    missing: tuple[str, ...]
    alarms: tuple[Row, ...] = ()
    doctor: tuple[Row, ...] = ()
    environments: tuple[Row, ...] = ()

    @property
    def name(self) -> str:
        """The folder's."""
        return self.path.resolve().name


def load_run(run_dir: Path) -> RunData:
    """Read everything a report shows from ``run_dir``."""
    if not run_dir.is_dir():
        raise ValueError(f"run_dir: got {run_dir}, which is not a directory; expected the output_dir of a run")
    missing: list[str] = []
    rows, problem = read_jsonl(run_dir / "metrics.jsonl")
    missing += [problem] if problem else []
    config = _read_config(run_dir / "config.toml", missing)
    costs = read_costs(run_dir / "costs.json", missing)
    optional = {name: _read_optional(run_dir / f"{name}.jsonl", form, missing) for name, form in _OPTIONAL.items()}
    rollouts, over_time = _read_rollouts(run_dir / "rollouts", optional["guards"], missing)
    return RunData(
        path=run_dir,
        metrics=merge_by_step(rows),
        config=config,
        costs=costs,
        rollouts=rollouts,
        over_time=over_time,
        missing=tuple(missing),
        alarms=optional["guards"],
        doctor=optional["doctor"],
        environments=optional["environment"],
    )


def _read_optional(path: Path, form: type[BaseModel], missing: list[str]) -> tuple[Row, ...]:
    """Rows of a file that not every run has."""
    rows, problem = read_jsonl(path, form) if path.is_file() else ([], "")
    missing += [problem] if "unreadable" in problem else []
    return tuple(rows)


def read_jsonl(path: Path, form: type[BaseModel] | None = None) -> tuple[list[Row], str]:
    """The rows of a JSON Lines file, those of another ``form`` left out, and, in words, what is wrong with it (empty:
    nothing).

    A run that was killed leaves half a line at the end; the other lines still count.
    """
    if not path.is_file():
        return [], f"{path.name}: no such file"
    rows, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if form is not None:  # raises a ValueError
                form.model_validate(row)
        except (ValueError, RecursionError):
            broken += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken += 1
    if not rows and not broken:
        return [], f"{path.name}: the file is empty"
    return rows, f"{path.name}: {broken} unreadable lines left out" if broken else ""


def merge_by_step(rows: Iterable[Row]) -> tuple[Row, ...]:
    """One row per step, ascending, those without a finite one left out. A resumed run writes a step again: the later
    value wins."""
    merged: dict[float, dict[str, Any]] = {}
    for row in rows:
        step = row.get("step")
        if isinstance(step, int | float) and not isinstance(step, bool) and abs(step) <= sys.float_info.max:
            merged.setdefault(step, {}).update(row)
    return tuple(merged[step] for step in sorted(merged))


def flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys and values in file order; values of keys that name a secret are hidden.

    >>> flatten({"optim": {"learning_rate": 0.1}, "teacher": {"api_key": "x"}})
    [('optim.learning_rate', '0.1'), ('teacher.api_key', '(hidden)')]
    """
    items: list[tuple[str, str]] = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        if _SECRET.search(key):
            items.append((name, "(hidden)"))
        elif isinstance(value, Mapping):
            items += flatten(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            items += [
                pair
                for index, item in enumerate(value)
                for pair in flatten(item if isinstance(item, Mapping) else {"value": item}, f"{name}[{index}].")
            ]
        else:
            items.append((name, value if isinstance(value, str) else json.dumps(value, default=str)))
    return items


def _read_config(path: Path, missing: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        missing.append("config.toml: no such file")
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        missing.append(f"config.toml: not readable ({error})")
        return {}


def read_costs(path: Path, missing: list[str]) -> Mapping[str, Row]:
    """Costs by role; what is wrong with the file is added to ``missing``."""
    if not path.is_file():
        missing.append("costs.json: no such file")
        return {}
    try:
        roles = json.loads(path.read_text(encoding="utf-8"))["roles"]
        return {str(role): cost for role, cost in roles.items() if isinstance(cost, dict)}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        missing.append('costs.json: not readable; expected {"roles": {...}}')
        return {}


def rollouts_step(file: object) -> int | None:
    """The step of a rollouts file; None for any other name."""
    match = _ROLLOUT_FILE.search(str(file))
    return int(match[1]) if match else None


def _read_rollouts(
    folder: Path, alarms: Sequence[Row], missing: list[str]
) -> tuple[dict[int, tuple[Row, ...]], tuple[int, ...]]:
    """Rollouts by step, and the steps that stand for the run's course."""
    files = {step: path for path in folder.glob("*.jsonl") if (step := rollouts_step(path.name)) is not None}
    if not files:
        missing.append("rollouts/: no stored rollouts (normal for a phase in which the student does not write)")
        return {}, ()
    stored: dict[int, tuple[Row, ...]] = {}

    def read(step: int) -> None:
        rows, problem = ([], "") if step in stored else read_jsonl(files[step], _Rollout)
        missing.extend([f"rollouts/{problem}"] if problem else [])
        stored.update({step: tuple(rows)} if rows else {})

    first, last = min(files), max(files)
    for step in (first, last):
        read(step)
    centre = (first + last) / 2
    between = sorted((step for step in files if first < step < last), key=lambda step: abs(step - centre))[:MIDDLES]
    for step in between:
        read(step)
    # Of steps near the middle the one that answers most of the first one's prompts, else the nearest.
    prompts = {prompt_key(row) for row in stored.get(first, ())}
    middle = max(
        (step for step in between if step in stored),
        key=lambda step: (len(prompts & {prompt_key(row) for row in stored[step]}), -abs(step - centre)),
        default=None,
    )
    over_time = tuple(step for step in (first, middle, last) if step is not None and step in stored)
    wanted = list(dict.fromkeys(step for alarm in alarms for step in _steps_of(alarm, files)))[:NAMED]
    for step in wanted:
        read(step)
    kept = {step: stored[step] for step in sorted({*over_time, *wanted}) if step in stored}
    return kept, tuple(dict.fromkeys(over_time))


def _steps_of(alarm: Row, files: Collection[int]) -> list[int]:
    """The stored steps whose rollouts an alarm names; without one, the nearest to what its update learnt from."""
    places = [place for place in alarm.get("rollouts") or () if isinstance(place, Mapping)]
    named = {step for place in places if (step := rollouts_step(place.get("file"))) is not None}
    at = alarm.get("step")
    written = at - 1 if isinstance(at, int) else 0
    return sorted(named & set(files)) or [min(files, key=lambda stored: abs(stored - written))]


def prompt_key(rollout: Row) -> tuple[Any, Any]:
    """What tells prompts apart."""
    return rollout.get("task"), rollout.get("prompt_index")

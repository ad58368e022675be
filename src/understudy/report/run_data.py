"""Reading a run directory. What is missing or broken is named, never fatal: crashed runs have reports too."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, InstanceOf

Row = Mapping[str, Any]

_ROLLOUT_FILE = re.compile(r"step_(\d+)\.jsonl$")
_SECRET = re.compile(
    r"(api_?key|secret|password|(auth|access|api|hf|bearer)_?token$|^token$|authorization)", re.IGNORECASE
)


_Text = InstanceOf[str]  # pydantic's own str has no room for half of a surrogate pair, which pages can show


class _Form(BaseModel):
    model_config = ConfigDict(strict=True)


class _Topk(_Form):
    ids: list[list[int]]
    tokens: list[list[_Text]]
    logprobs: list[list[float]]


class _Rollout(_Form):
    """What pages compute with; a stored rollout whose values are of another kind is left out."""

    step: int | None = None
    prompt_index: int | None = None
    task: _Text | None = None
    reward: float | None = None
    completion_ids: list[int] | None = None
    completion_tokens: list[_Text] | None = None
    sampler_logprobs: list[float | None] | None = None
    teacher_logprobs: list[float | None] | None = None
    loss_mask: list[bool] | None = None
    teacher_topk: _Topk | None = None


class _Place(_Form):
    file: _Text | None = None


class _Alarm(_Form):
    step: int
    rollouts: list[_Place] | None = None


@dataclass(frozen=True)
class RunData:
    """One run as stored. ``metrics``: one row per step, sorted. ``rollouts``: first and last stored step. ``alarms``:
    what the guards found; a healthy run has none."""

    name: str
    metrics: tuple[Row, ...]
    config: Mapping[str, Any]
    costs: Mapping[str, Row]
    rollouts: Mapping[int, tuple[Row, ...]]
    missing: tuple[str, ...]
    alarms: tuple[Row, ...] = ()


def load_run(run_dir: Path) -> RunData:
    """Read everything a report shows from ``run_dir``."""
    if not run_dir.is_dir():
        raise ValueError(f"run_dir: got {run_dir}, which is not a directory; expected the output_dir of a run")
    missing: list[str] = []
    rows, problem = read_jsonl(run_dir / "metrics.jsonl")
    missing += [problem] if problem else []
    config = _read_config(run_dir / "config.toml", missing)
    costs = read_costs(run_dir / "costs.json", missing)
    rollouts = _read_rollouts(run_dir / "rollouts", missing)
    alarms, problem = read_jsonl(run_dir / "guards.jsonl", _Alarm) if (run_dir / "guards.jsonl").is_file() else ([], "")
    missing += [problem] if "unreadable" in problem else []
    name, metrics = run_dir.resolve().name, merge_by_step(rows)
    return RunData(name, metrics, config, costs, rollouts, tuple(missing), tuple(alarms))


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
    """One row per step, ascending. A resumed run writes a step again: the later value wins."""
    merged: dict[float, dict[str, Any]] = {}
    for row in rows:
        step = row.get("step")
        if isinstance(step, int | float) and not isinstance(step, bool):
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


def _read_rollouts(folder: Path, missing: list[str]) -> Mapping[int, tuple[Row, ...]]:
    files = {int(m.group(1)): path for path in folder.glob("*.jsonl") if (m := _ROLLOUT_FILE.search(path.name))}
    if not files:
        missing.append("rollouts/: no stored rollouts (normal for a phase in which the student does not write)")
        return {}
    stored: dict[int, tuple[Row, ...]] = {}
    for step in sorted({min(files), max(files)}):
        rows, problem = read_jsonl(files[step], _Rollout)
        missing += [f"rollouts/{problem}"] if problem else []
        if rows:
            stored[step] = tuple(rows)
    return stored

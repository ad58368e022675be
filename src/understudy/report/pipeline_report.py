"""A pipeline as one HTML page: its phases, what the gates said, every evaluation from phase to phase, the costs."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from understudy.config_pipeline import TRAINING
from understudy.report import formatting, page
from understudy.report.charts import Series, line_chart
from understudy.report.page import Headline, Row
from understudy.report.run_data import read_costs
from understudy.report.run_report import cost_rows

log = logging.getLogger("understudy")

_OUTCOMES = {"kept": "", "rolled_back": "rolled back", "stopped": "stopped the pipeline"}
# Means as an evaluation names them, without their standard errors and the shares beside them.
_METRIC = re.compile(r"eval/[^/]+/(greedy|t[\d.]+(e[+-]?\d+)?)")


@dataclass(frozen=True)
class PhaseRow:
    """One line of the table of phases; ``link`` leads to the phase's own page, where it has one."""

    name: str
    link: str
    cells: tuple[str, ...]
    gates: tuple[str, ...]


def write_pipeline_report(folder: Path, out: Path | None = None, *, state: Mapping[str, Any] | None = None) -> Path:
    """Write the page of the pipeline in ``folder`` to ``out`` (default: ``folder/report.html``) and return its path.

    Links are relative: the page works wherever the folder is moved to. ``state``: what pipeline.json holds, where it
    has been read and checked.
    """
    folder = Path(folder)
    content = state or json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
    phases = content["phases"]
    metrics = _metrics(phases)
    courses = {metric: _course(content["plan"]["start"], phases, metric) for metric in metrics}
    roles = summed_costs([_roles(folder / phase["folder"] / "costs.json") for phase in phases])
    context = {
        "title": folder.resolve().name,
        "intro": _intro(content),
        "headlines": _headlines(phases, courses),
        "columns": ("Cycle", "Method", "Steps", "Time", "Compute", *(_words(metric) for metric in metrics), "Outcome"),
        "phases": [_phase_row(folder, phase, metrics) for phase in phases],
        "charts": [_chart(phases, metric, course) for metric, course in courses.items() if course],
        "costs": page.grid(cost_rows(roles)),
    }
    return page.write_page("pipeline_report.html", Path(out) if out is not None else folder / "report.html", context)


def _roles(path: Path) -> Mapping[str, Row]:
    """Costs by role; an evaluation has none."""
    missing: list[str] = []
    roles = read_costs(path, missing) if path.exists() else {}
    for problem in missing:
        log.warning("%s: left out of the pipeline's costs: %s", path.parent, problem)
    return roles


def summed_costs(costs: Sequence[Mapping[str, Row]]) -> dict[str, dict[str, float]]:
    """Every amount by role, over all phases."""
    total: dict[str, dict[str, float]] = {}
    for roles in costs:
        for role, entry in roles.items():
            own = total.setdefault(role, {})
            for name, amount in entry.items():
                own[name] = own.get(name, 0.0) + (page.finite_number(amount) or 0.0)
    return total


def _metrics(phases: Sequence[Row]) -> list[str]:
    """The evaluations' means, and what gates watch beside them, in order of appearance."""
    names = [name for phase in phases for name in (*phase["start"], *phase["final"]) if _METRIC.fullmatch(name)]
    return list(dict.fromkeys(names + [one["gate"]["metric"] for phase in phases for one in phase["gates"]]))


def _words(metric: str) -> str:
    """``eval/facts/t1`` -> ``facts, T = 1``."""
    task, _, decoding = metric.removeprefix("eval/").partition("/")
    return f"{task}, {re.sub(r'^t(?=[0-9])', 'T = ', decoding)}"


def _intro(state: Mapping[str, Any]) -> str:
    plan, phases = state["plan"], state["phases"]
    names = ", ".join(phase["name"] for phase in plan["phases"])
    cycles = f", {plan['cycles']} cycles" if plan["cycles"] > 1 else ""
    return f"From {plan['start']}: {names}{cycles}. Finished: {len(phases)} runs."


def _course(start: str, phases: Sequence[Row], metric: str) -> list[tuple[int, Row]]:
    """(phases done, evaluations) wherever ``metric`` was measured on the newest student that was kept, the first one
    included. Evaluations of any other model are no part of it."""
    newest = start
    course: list[tuple[int, Row]] = []
    for number, phase in enumerate(phases, 1):
        trains = phase["method"] in TRAINING
        if not course and trains and metric in phase["start"]:
            course.append((number - 1, phase["start"]))
        if trains and phase["outcome"] != "rolled_back":
            newest = phase["output"]
        if metric in phase["final"] and newest == (phase["output"] if trains else phase["began_with"]):
            course.append((number, phase["final"]))
    return course


def _headlines(phases: Sequence[Row], courses: Mapping[str, Sequence[tuple[int, Row]]]) -> list[Headline]:
    """Every evaluation from the start to the newest student that was kept, and the total price."""
    items = [
        Headline(_words(metric), f"{_value(course[0][1], metric)} → {_value(course[-1][1], metric)}")
        for metric, course in courses.items()
        if course
    ]
    seconds, flops = (sum(phase[name] for phase in phases) for name in ("seconds", "flops"))
    return [
        *items,
        Headline("Compute without evaluation", formatting.flops(flops)),
        Headline("Time without evaluation", formatting.duration(seconds)),
    ]


def _value(row: Row, metric: str) -> str:
    return formatting.percent(page.finite_number(row.get(metric)), page.finite_number(row.get(f"{metric}_se")))


def _phase_row(folder: Path, phase: Row, metrics: Sequence[str]) -> PhaseRow:
    cells = [str(phase["cycle"]), phase["method"], str(phase["steps"]) if phase["steps"] else "–"]
    cells += [formatting.duration(phase["seconds"]), formatting.flops(phase["flops"])] if phase["flops"] else ["–", "–"]
    for metric in metrics:
        before, after = (_value(phase[end], metric) if metric in phase[end] else "–" for end in ("start", "final"))
        cells.append(after if phase["method"] == "eval" or before == after == "–" else f"{before} → {after}")
    cells.append(_OUTCOMES[phase["outcome"]])
    report = f"{phase['folder']}/report.html"
    return PhaseRow(
        f"{phase['folder'].partition('-')[0]} {phase['name']}",
        quote(report) if (folder / report).exists() else "",  # a relative address, whatever a phase is called
        tuple(cells),
        tuple(_gate(one) for one in phase["gates"]),
    )


def _gate(outcome: Mapping[str, Any]) -> str:
    gate, number = outcome["gate"], formatting.number
    found = f"{number(outcome['value'])}, from {number(outcome['reference'])} ({gate['against']})"
    said = "passed" if outcome["passed"] else "failed"
    return f"{_words(gate['metric'])}: {found}, at most {number(gate['max_drop'])} less: {said}"


def _chart(phases: Sequence[Row], metric: str, course: Sequence[tuple[int, Row]]) -> Markup:
    """The metric after each phase that was kept, from the start; what was rolled back stands beside the line."""
    rolled_back = [(number, phase) for number, phase in enumerate(phases, 1) if phase["outcome"] == "rolled_back"]
    left = [(number, phase["final"]) for number, phase in rolled_back if metric in phase["final"]]
    lines = [_series(name, rows, metric) for name, rows in (("kept", course), ("rolled back", left)) if rows]
    values = [row[metric] for _, row in (*course, *left)]
    percent = all(0 <= value <= 1 for value in values)
    unit = "share of answers that are right" if percent and _METRIC.fullmatch(metric) else ""
    svg = line_chart(lines, title=_words(metric), x_label="phases done", y_label=unit, percent=percent)
    return Markup(svg)


def _series(name: str, rows: Sequence[tuple[int, Row]], metric: str) -> Series:
    errors = [page.finite_number(row.get(f"{metric}_se")) for _, row in rows]
    return Series(name, [(float(x), float(row[metric])) for x, row in rows], errors)

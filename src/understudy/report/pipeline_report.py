"""A pipeline as one HTML page: its phases, what the gates said, every evaluation from phase to phase, the costs."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from understudy.report import formatting, page
from understudy.report.cost_panel import bars_svg, cost_bars, cost_rows
from understudy.report.curves import Curve
from understudy.report.page import Headline, Row
from understudy.report.run_data import read_costs
from understudy.report.timeline import Point, Timeline, timeline_curves, timeline_of

log = logging.getLogger("understudy")

_OUTCOMES = {"kept": "", "rolled_back": "rolled back", "stopped": "stopped the pipeline"}
# A fall or a rise beyond so many standard errors of both ends is called one.
_CLEAR = 2.0


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
    content = state or read_state(folder)
    phases = content["phases"]
    metrics = metrics_of(phases)
    timeline = timeline_of(folder, content, metrics)
    roles = summed_costs([_roles(folder / phase["folder"] / "costs.json") for phase in phases])
    curves = timeline_curves(timeline)
    context = {
        "title": folder.resolve().name,
        "intro": _intro(content),
        "headlines": _headlines(phases, timeline),
        "columns": (
            *("Cycle", "Method", "Steps", "Time", "Compute"),
            *(page.metric_words(metric) for metric in metrics),
            "Outcome",
        ),
        "phases": [_phase_row(folder, phase, metrics, timeline.shares) for phase in phases],
        "wide_charts": [curve.svg() for curve in curves if curve.wide],
        "charts": [curve.svg() for curve in curves if not curve.wide],
        "costs": page.grid(cost_rows(roles)),
        "cost_charts": [bars_svg(bars) for bars in cost_bars({"all phases": roles})],
    }
    return page.write_page("pipeline_report.html", Path(out) if out is not None else folder / "report.html", context)


def pipeline_curves(folder: Path, *, state: Mapping[str, Any] | None = None) -> list[Curve]:
    """Every curve of the page."""
    content = state or read_state(folder)
    return timeline_curves(timeline_of(folder, content, metrics_of(content["phases"])))


def read_state(folder: Path) -> dict[str, Any]:
    """The content of pipeline.json."""
    return json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))


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


def metrics_of(phases: Sequence[Row]) -> list[str]:
    """The evaluations' means, and what gates watch beside them, in order of appearance."""
    names = page.evaluation_metrics(row for phase in phases for row in (phase["start"], phase["final"]))
    return list(dict.fromkeys(names + [one["gate"]["metric"] for phase in phases for one in phase["gates"]]))


def _intro(state: Mapping[str, Any]) -> str:
    plan, phases = state["plan"], state["phases"]
    names = ", ".join(phase["name"] for phase in plan["phases"])
    cycles = f", {plan['cycles']} cycles" if plan["cycles"] > 1 else ""
    return f"From {plan['start']}: {names}{cycles}. Finished: {len(phases)} runs."


def _headlines(phases: Sequence[Row], timeline: Timeline) -> list[Headline]:
    """Every evaluation from the start to the newest student that was kept, what was forgotten between, the total
    price."""
    items = [
        Headline(
            page.metric_words(metric),
            " → ".join(_value(point.row, metric, metric in timeline.shares) for point in (course[0], course[-1])),
            _deepest_fall(course, metric, metric in timeline.shares),
        )
        for metric, course in timeline.courses.items()
    ]
    seconds, flops = (sum(phase[name] for phase in phases) for name in ("seconds", "flops"))
    return [
        *items,
        Headline("Compute without evaluation", formatting.flops(flops)),
        Headline("Time without evaluation", formatting.duration(seconds)),
    ]


def _deepest_fall(course: Sequence[Point], metric: str, share: bool) -> str:
    """The largest clear fall from an evaluation to a later one, and how far what came then made up for it."""
    falls = [
        (high.row[metric] - low.row[metric], index, high, low)
        for index, low in enumerate(course)
        for high in course[:index]
        if _is_below(low.row, high.row, metric)
    ]
    if not falls:
        return ""
    _, index, high, low = max(falls, key=lambda fall: fall[0])
    high_words, low_words = (formatting.mean(point.row[metric], share=share) for point in (high, low))
    words = f"forgotten: {high_words} → {low_words} {low.words}"
    after = [point.row for point in course[index + 1 :] if _is_below(low.row, point.row, metric)]
    if not after:
        return words
    best = max(after, key=lambda row: row[metric])
    partly = "partly " if _is_below(best, high.row, metric) else ""
    return f"{words}; {partly}recovered: {formatting.mean(best[metric], share=share)}"


def _is_below(low: Row, high: Row, metric: str) -> bool:
    """Clearly: by more than a few standard errors of the difference."""
    errors = [page.finite_number(row.get(f"{metric}_se")) or 0.0 for row in (low, high)]
    return high[metric] - low[metric] > max(_CLEAR * math.hypot(*errors), 1e-9)


def _value(row: Row, metric: str, share: bool) -> str:
    value, error = (page.finite_number(row.get(key)) for key in (metric, f"{metric}_se"))
    return formatting.mean(value, error, share=share)


def _phase_row(folder: Path, phase: Row, metrics: Sequence[str], shares: frozenset[str]) -> PhaseRow:
    cells = [str(phase["cycle"]), phase["method"], str(phase["steps"]) if phase["steps"] else "–"]
    cells += [formatting.duration(phase["seconds"]), formatting.flops(phase["flops"])] if phase["flops"] else ["–", "–"]
    for metric in metrics:
        ends = (phase["start"], phase["final"])
        before, after = (_value(row, metric, metric in shares) if metric in row else "–" for row in ends)
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
    return f"{page.metric_words(gate['metric'])}: {found}, at most {number(gate['max_drop'])} less: {said}"

"""A pipeline's phases on one axis, with every evaluation: what was forgotten, and what was recovered.

Each phase is as wide as any other, whatever its number of steps, and its steps run from its left edge to its right one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.config_pipeline import TRAINING
from understudy.report import page
from understudy.report.charts import Region, Series
from understudy.report.curves import ERROR, MOST_LINES, RIGHT, Curve
from understudy.report.page import Row
from understudy.report.run_data import merge_by_step, read_jsonl


@dataclass(frozen=True)
class Point:
    """One evaluation: its place on the axis, where that is in words, and its row of metrics."""

    x: float
    words: str
    row: Row


@dataclass(frozen=True)
class Timeline:
    """``courses``: by metric, the evaluations of the newest student that was kept, in order; ``aside``: by metric and
    phase, those of phases that were rolled back, from the evaluation that they began with; ``shares``: metrics whose
    every value is a share of right answers."""

    regions: tuple[Region, ...]
    courses: Mapping[str, tuple[Point, ...]]
    aside: Mapping[str, tuple[tuple[Point, ...], ...]]
    shares: frozenset[str] = frozenset()


def timeline_of(folder: Path, state: Mapping[str, Any], metrics: Sequence[str]) -> Timeline:
    """From pipeline.json and the phases' own metrics, as far as they are there; metrics without an evaluation of the
    newest student have no course."""
    phases = state["phases"]
    regions = tuple(Region(i, i + 1, phase["name"]) for i, phase in enumerate(phases))
    points = [_points(folder / phase["folder"] / "metrics.jsonl", i, phase) for i, phase in enumerate(phases)]
    courses, aside = {}, {}
    for metric in metrics:
        course, left = _course(state["plan"]["start"], phases, points, metric)
        if course:
            courses[metric], aside[metric] = tuple(course), tuple(map(tuple, left))
    rows = [point.row for own in points for point in own]
    return Timeline(regions, courses, aside, frozenset(metric for metric in metrics if _is_share(metric, rows)))


def _points(path: Path, index: int, phase: Row) -> list[Point]:
    """A phase's evaluations: where it began, every one on the way, where it ended."""
    rows = merge_by_step(read_jsonl(path)[0]) if path.is_file() else ()
    steps = phase["steps"]
    inside = [row for row in rows if steps and 0 < row["step"] < steps]
    name = f"phase {index + 1}, {phase['name']}"
    if phase["method"] not in TRAINING:
        return [Point(index + 0.5, f"in {name}", phase["final"])]
    return [
        Point(index, f"before {name}", phase["start"]),
        *(Point(index + row["step"] / steps, f"in {name}, step {row['step']:g}", row) for row in inside),
        Point(index + 1, f"after {name}", phase["final"]),
    ]


def _course(
    start: str, phases: Sequence[Row], points: Sequence[Sequence[Point]], metric: str
) -> tuple[list[Point], list[list[Point]]]:
    """The course of a metric, and what phases that were rolled back made of it. Evaluations of any model but the newest
    student that was kept are no part of either."""
    newest = start
    course: list[Point] = []
    left: list[list[Point]] = []
    for phase, own in zip(phases, points, strict=True):
        measured = [point for point in own if metric in point.row]
        trains, kept = phase["method"] in TRAINING, phase["outcome"] != "rolled_back"
        if not trains:
            course += measured if newest == phase["began_with"] else []
        elif kept:
            # Where a phase begins the one before it ended, with the same weights and random numbers.
            course += [point for point in measured if not course or point.x > course[-1].x]
            newest = phase["output"]
        elif measured:
            first = [point for point in measured[:1] if not course and point.x == own[0].x]
            course += first
            left.append(measured)
    return course, left


def timeline_curves(timeline: Timeline) -> list[Curve]:
    """All shares on one wide chart; then each task alone, and each other number, with what was rolled back."""
    shares = [metric for metric in timeline.courses if metric in timeline.shares]
    curves = []
    if shares:
        together = shares[:MOST_LINES]
        lines = [_line(page.metric_words(metric), timeline.courses[metric], metric) for metric in together]
        curves.append(_curve("All evaluations", lines, timeline, percent=True, wide=True))
    by_task: dict[str, list[str]] = {}
    for metric in timeline.courses:
        by_task.setdefault(metric.rpartition("/")[0] if metric in shares else metric, []).append(metric)
    for task, metrics in by_task.items():
        lines = [_line(_ending(metric), timeline.courses[metric], metric) for metric in metrics]
        lines += [line for metric in metrics for line in _left(timeline, metric)]
        if len(by_task) > 1 or len(lines) > len(shares):
            title = page.metric_words(task).removeprefix("eval/")
            curves.append(_curve(title, lines, timeline, percent=metrics[0] in shares))
    return curves


def _ending(metric: str) -> str:
    return page.decoding_words(metric.rpartition("/")[2])


def _is_share(metric: str, rows: Sequence[Row]) -> bool:
    values = [value for row in rows if (value := page.finite_number(row.get(metric))) is not None]
    return bool(page.evaluation_metrics([{metric: 0}])) and all(0 <= value <= 1 for value in values)


def _left(timeline: Timeline, metric: str) -> list[Series]:
    names = [timeline.regions[int(course[0].x)].name for course in timeline.aside[metric]]
    pairs = zip(names, timeline.aside[metric], strict=True)
    return [_line(f"{_ending(metric)}, rolled back: {name}", course, metric) for name, course in pairs]


def _line(name: str, course: Sequence[Point], metric: str) -> Series:
    errors = [page.finite_number(point.row.get(f"{metric}_se")) for point in course]
    return Series(name, [(point.x, float(point.row[metric])) for point in course], errors)


def _curve(title: str, lines: Sequence[Series], timeline: Timeline, *, percent: bool, wide: bool = False) -> Curve:
    points = [p for metric in timeline.courses for c in (timeline.courses[metric], *timeline.aside[metric]) for p in c]
    # Of two names of one place the later phase's is "before", the earlier one's "after": what was done says more.
    words = {point.x: point.words for point in sorted(points, key=lambda point: not point.words.startswith("before"))}
    band = ERROR if any(error for line in lines for error in line.errors or ()) else ""
    unit = RIGHT if percent else ""
    label = "phases, each from its first step to its last"
    return Curve(
        title,
        unit,
        tuple(lines),
        x_label=label,
        band=band,
        percent=percent,
        regions=timeline.regions,
        x_words=words,
        wide=wide,
    )

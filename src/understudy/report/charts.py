"""Line charts as inline SVG text: no dependency, readable in print, by keyboard and without colour.

Series differ in colour, dash and marker. Colours are CSS variables with a fallback, so that a page can
restyle them for dark mode and a chart still works alone. Beside its picture a chart carries its numbers as
text (``data-chart``), which the pages' script reads out step by step under the pointer and the arrow keys.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from typing import Literal

from understudy.report import chart_shapes as draw
from understudy.report import formatting
from understudy.report.chart_shapes import LEGEND_ROW, NORMAL, Frame, pixels
from understudy.report.scales import Axis, linear_x_axis, log_x_axis, y_axis

# Beyond this many points a series is thinned; beyond MARKED it goes without markers.
MAX_POINTS, MARKED = 160, 40
# Places that the script can step through; more would only make the page heavy.
MAX_READINGS = 320
# Rows that labels of marks spread over where they are close to each other.
MARK_ROWS = 4
# A phase's name is written, cut if need be, where it has so much room.
LEAST_ROOM = 48


@dataclass(frozen=True)
class Series:
    """A named line: points (x, y) and, if given, a standard error per point (``None``: unknown there), or a ``band``
    (low, high) per point for what is no error."""

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float | None] | None = None
    band: Sequence[tuple[float, float] | None] | None = None


@dataclass(frozen=True)
class Mark:
    """Something that happened at ``x``: a line across the chart with a short ``label``, in ``words`` on request."""

    x: float
    label: str
    words: str
    source: Literal["doctor", "guard"] = "guard"


@dataclass(frozen=True)
class Region:
    """A named stretch of the x axis."""

    start: float
    end: float
    name: str


@dataclass(frozen=True)
class _Point:
    x: float
    y: float
    low: float
    high: float
    error: float | None
    has_band: bool


@dataclass(frozen=True)
class _Plot:
    """Where values lie."""

    frame: Frame
    x: Axis
    y: Axis
    percent: bool

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels, inside the plot."""
        return self.x.place(x), min(max(self.y.place(y), self.frame.top), self.frame.bottom)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    percent: bool = False,
    references: Sequence[tuple[str, float]] = (),
    marks: Sequence[Mark] = (),
    regions: Sequence[Region] = (),
    x_words: Mapping[float, str] = {},
    frame: Frame = NORMAL,
) -> str:
    """An ``<svg>`` with one line per series.

    Errors are drawn as a band of one standard error. ``references`` are named horizontal lines, ``marks`` vertical
    ones. ``regions`` divide the x axis and take the place of its ticks; ``x_words`` names places on it when they are
    read out. ``percent`` labels shares in 0..1 as percentages. Values that are not finite are left out and counted in a
    line under the title.

    >>> "<svg" in line_chart([Series("a", [(0, 1), (1, 2)])], title="t", x_label="step", y_label="nats")
    True
    """
    cleaned = [_finite(one) for one in series]
    dropped = sum(len(one.points) - len(points) for points, one in zip(cleaned, series, strict=True))
    points = [point for kept in cleaned for point in kept]
    if not points:
        return _empty(title, dropped, frame)
    # What was found before the first step, or after the last that was written, has its place too.
    places = [p.x for p in points] + [mark.x for mark in marks]
    places += [x for region in regions for x in (region.start, region.end)]
    x_axis = (log_x_axis if log_x else linear_x_axis)(places, frame.left, frame.right)
    x_axis = replace(x_axis, ticks=()) if regions else x_axis
    plot = _Plot(frame, x_axis, _vertical(points, [value for _, value in references], percent, frame), percent)
    names = [one.name for one in series] + [name for name, _ in references]
    legend, rows = draw.legend(names, len(series), frame)
    parts = [
        draw.axes(frame, x_axis, plot.y, percent),
        _regions(regions, plot),
        _labels(title, x_label, y_label, dropped, frame),
        *(_reference(index, value, plot) for index, (_, value) in enumerate(references, len(series))),
        *(_band(i, _thin(kept), plot) for i, kept in enumerate(cleaned)),
        *(_line(i, _thin(kept), plot) for i, kept in enumerate(cleaned)),
        *(_markers(i, _thin(kept), plot) for i, kept in enumerate(cleaned)),
        _marks(marks, plot),
        legend,
    ]
    words = "; ".join(f"{mark.label} {mark.words}" for mark in marks)
    summary = f"{title}. {_summary(series, percent)}{f' Marked: {words}.' if words else ''}"
    readings = _readings(series, cleaned, marks, plot, x_words) | {
        "title": title,
        "label": "" if x_words else x_label,
        "references": [f"{name}: {formatting.mean(value, share=percent)}" for name, value in references],
    }
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {frame.width} {frame.legend_top + rows * LEGEND_ROW}" '
        f'aria-label="{escape(summary)}" data-chart="{escape(json.dumps(readings, ensure_ascii=False))}">'
        f"{''.join(parts)}</svg>"
    )


def picture(svg: str) -> str:
    """The chart alone, without what a page's script reads out: for a file of its own."""
    return re.sub(r' data-chart="[^"]*"', "", svg)


def _finite(series: Series) -> list[_Point]:
    count = len(series.points)
    errors = series.errors if series.errors is not None else [None] * count
    bands = series.band if series.band is not None else [None] * count
    points = []
    for (x, y), error, band in zip(series.points, errors, bands, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            low, high = band or (y - (error or 0.0), y + (error or 0.0))
            points.append(_Point(float(x), float(y), low, high, error, band is not None or error is not None))
    return points


def _thin(points: Sequence[_Point]) -> list[_Point]:
    """At most ``MAX_POINTS`` points: the lowest and the highest of each bucket, so that spikes survive."""
    if len(points) <= MAX_POINTS:
        return list(points)
    kept = {0, len(points) - 1}
    # Two points per bucket plus the two ends stay within the budget.
    buckets = MAX_POINTS // 2 - 1
    for bucket in range(buckets):
        indices = range(bucket * len(points) // buckets, (bucket + 1) * len(points) // buckets)
        kept |= {min(indices, key=lambda i: points[i].y), max(indices, key=lambda i: points[i].y)}
    return [points[index] for index in sorted(kept)]


def _vertical(points: Sequence[_Point], references: Sequence[float], percent: bool, frame: Frame) -> Axis:
    low = min([min(p.low, p.y) for p in points] + list(references))
    high = max([max(p.high, p.y) for p in points] + list(references))
    if percent:  # a share cannot leave 0..1, even where its error band would
        low, high = 0.0, min(high, 1.0) or 1.0
    return y_axis(low, high, frame.bottom, frame.top)


def _labels(title: str, x_label: str, y_label: str, dropped: int, frame: Frame) -> str:
    note = f" ({dropped} values not finite, not drawn)" if dropped else ""
    return (
        draw.text(4, 15, title, draw.TITLE_STYLE)
        + draw.text(4, 32, y_label + note)
        + draw.text((frame.left + frame.right) / 2, frame.bottom + 34, x_label, anchor="middle")
    )


def _line(index: int, points: Sequence[_Point], plot: _Plot) -> str:
    if len(points) < 2:
        return ""
    return f'<path d="{draw.path(plot.at(p.x, p.y) for p in points)}" {draw.stroke(index, 2)}/>'


def _band(index: int, points: Sequence[_Point], plot: _Plot) -> str:
    """An area for each stretch of points whose uncertainty is known; nothing where it is none everywhere."""
    if not any(point.high > point.low for point in points):
        return ""
    stretches = [list(own) for known, own in groupby(points, key=lambda point: point.has_band) if known]
    return "".join(_area(index, stretch, plot) for stretch in stretches)


def _area(index: int, points: Sequence[_Point], plot: _Plot) -> str:
    upper = [plot.at(p.x, p.high) for p in points]
    lower = [plot.at(p.x, p.low) for p in points]
    if len(points) == 1:
        style = f"stroke:{draw.colour(index)};stroke-width:2;opacity:.5"
        return f'<path class="band" d="{draw.path([upper[0], lower[0]])}" style="{style}"/>'
    outline = draw.path(upper + lower[::-1])
    return f'<path class="band" d="{outline}Z" style="fill:{draw.colour(index)};opacity:.16"/>'


def _markers(index: int, points: Sequence[_Point], plot: _Plot) -> str:
    if len(points) > MARKED:
        return ""
    outline = "".join(draw.shape(index, *plot.at(p.x, p.y)) for p in points)
    return f'<path d="{outline}" style="fill:{draw.colour(index)}"/>'


def _reference(index: int, value: float, plot: _Plot) -> str:
    y = pixels(plot.y.place(value))
    return f'<path d="M{plot.frame.left} {y}H{plot.frame.right}" {draw.stroke(index, 1.6)}/>'


def _marks(marks: Sequence[Mark], plot: _Plot) -> str:
    """A line for each place, with the labels of all that happened there inside the plot: ▲ guard, ◇ doctor."""
    at: dict[float, list[Mark]] = {}
    for mark in sorted(marks, key=lambda mark: mark.x):
        at.setdefault(mark.x, []).append(mark)
    top, parts = plot.frame.top, []
    ends = [-math.inf] * MARK_ROWS  # where the last label of each row ends
    for x, here in at.items():
        place = plot.x.place(x)
        kinds = {mark.source for mark in here}
        glyphs = ("◇" if "doctor" in kinds else "") + ("▲" if "guard" in kinds else "")
        name = f"{glyphs}{','.join(mark.label for mark in here)}"
        style = "stroke:var(--alarm,#b3261e);stroke-width:1;stroke-dasharray:2 2"
        parts.append(f'<path d="M{pixels(place)} {top}V{plot.frame.bottom}" style="{style}"/>')
        width = draw.CHARACTER * len(name) + 6
        start = place + 3 if place + width < plot.frame.right else place - width
        row = next((row for row, end in enumerate(ends) if end < start), ends.index(min(ends)))
        ends[row] = start + width
        parts.append(draw.text(start, top + 10 + 12 * row, name, "fill:var(--alarm,#b3261e);font-size:11px"))
    return "".join(parts)


def _regions(regions: Sequence[Region], plot: _Plot) -> str:
    """Every second one shaded, each with its number, and with its name where there is room."""
    parts = []
    top, bottom = plot.frame.top, plot.frame.bottom
    for number, region in enumerate(regions, 1):
        start, end = plot.x.place(region.start), plot.x.place(region.end)
        if number % 2 == 0:
            outline = f"M{pixels(start)} {top}H{pixels(end)}V{bottom}H{pixels(start)}Z"
            parts.append(f'<path d="{outline}" style="fill:var(--muted,#555);opacity:.08"/>')
        parts.append(f'<path d="M{pixels(end)} {top}V{bottom}" style="{draw.GRID_STYLE}"/>')
        room = int((end - start - 14) / draw.CHARACTER)
        full = f"{number} {region.name}"
        label = full if len(full) <= room else f"{full[: room - 1]}…" if end - start > LEAST_ROOM else str(number)
        parts.append(draw.text((start + end) / 2, bottom + 17, label, anchor="middle"))
    return "".join(parts)


def _readings(
    series: Sequence[Series],
    cleaned: Sequence[Sequence[_Point]],
    marks: Sequence[Mark],
    plot: _Plot,
    x_words: Mapping[float, str],
) -> dict[str, object]:
    """What the script says at each place: the x values, where they lie, and every series' value there."""
    xs = sorted({point.x for points in cleaned for point in _thin(points)} | {mark.x for mark in marks})
    if len(xs) > MAX_READINGS:
        xs = [xs[i * (len(xs) - 1) // (MAX_READINGS - 1)] for i in range(MAX_READINGS)]
    at = [{point.x: point for point in points} for points in cleaned]
    rows = [
        {
            "name": one.name,
            "values": [formatting.mean(own[x].y, own[x].error, share=plot.percent) if x in own else None for x in xs],
            "y": [round(plot.at(x, own[x].y)[1]) if x in own else None for x in xs],
        }
        for one, own in zip(series, at, strict=True)
        if own
    ]
    return {
        "x": [x_words.get(x) or formatting.number(x) for x in xs],
        "at": [round(plot.x.place(x), 1) for x in xs],
        "rows": rows,
        "marks": [[xs.index(mark.x), f"{mark.label} {mark.words}"] for mark in marks if mark.x in xs],
        "top": plot.frame.top,
        "bottom": plot.frame.bottom,
    }


def _summary(series: Sequence[Series], percent: bool) -> str:
    """What the picture shows, for people who do not see it."""
    sentences = []
    for one in series:
        points = _finite(one)
        if points:
            first, last = (formatting.mean(points[i].y, share=percent) for i in (0, -1))
            sentences.append(f"{one.name}: {len(points)} points, from {first} to {last}")
    return "; ".join(sentences) + "."


def _empty(title: str, dropped: int, frame: Frame) -> str:
    reason = f"all {dropped} values are not finite" if dropped else "no values"
    label = escape(f"{title}: {reason}")
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {frame.width} 60" aria-label="{label}">'
        f"{draw.text(4, 15, title, draw.TITLE_STYLE)}{draw.text(4, 38, reason)}</svg>"
    )

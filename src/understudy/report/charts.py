"""Line charts as inline SVG text: no dependency, readable in print, by keyboard and without colour.

Series differ in colour, dash and marker. Colours are CSS variables with a fallback, so that a page can
restyle them for dark mode and a chart still works alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from understudy.report import formatting
from understudy.report.scales import Axis, linear_x_axis, log_x_axis, y_axis

WIDTH, PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 460, 52, 444, 44, 234
LEGEND_TOP, LEGEND_ROW, CHARACTER = 284, 19, 6.6
# Beyond this many points a series is thinned; beyond MARKED its markers appear on hover only.
MAX_POINTS, MARKED = 160, 40
# Okabe and Ito's palette, dark enough for lines on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b0509a", "#b8860b", "#3a9bd9", "#6b6b6b", "#8c3b2a")
LABEL_STYLE = "fill:var(--muted,#555);font-size:12px"
NAME_STYLE = "fill:var(--text,#111);font-size:12px"
TITLE_STYLE = "fill:var(--text,#111);font-size:14px;font-weight:600"
GRID_STYLE = "stroke:var(--grid,#ddd);stroke-width:1"
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 3", "12 3", "6 2 1 2")


@dataclass(frozen=True)
class Series:
    """A named line: points (x, y) and, if given, a standard error per point (``None``: unknown there)."""

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float | None] | None = None


@dataclass(frozen=True)
class _Point:
    x: float
    y: float
    error: float | None


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    percent: bool = False,
    references: Sequence[tuple[str, float]] = (),
) -> str:
    """An ``<svg>`` with one line per series.

    Errors are drawn as a band of one standard error. ``references`` are named horizontal lines.
    ``percent`` labels shares in 0..1 as percentages. Values that are not finite are left out and counted in a
    line under the title.

    >>> "<svg" in line_chart([Series("a", [(0, 1), (1, 2)])], title="t", x_label="step", y_label="nats")
    True
    """
    cleaned = [(_finite(one), one) for one in series]
    dropped = sum(len(one.points) - len(points) for points, one in cleaned)
    points = [point for kept, _ in cleaned for point in kept]
    if not points:
        return _empty(title, dropped)
    x_axis = (log_x_axis if log_x else linear_x_axis)([p.x for p in points], PLOT_LEFT, PLOT_RIGHT)
    y_scale = _vertical(points, [value for _, value in references], percent)
    names = [one.name for one in series] + [name for name, _ in references]
    legend, rows = _legend(names, len(series))
    parts = [
        _axes(x_axis, y_scale, percent),
        _labels(title, x_label, y_label, dropped),
        *(
            _reference(index, name, value, y_scale, percent)
            for index, (name, value) in enumerate(references, len(series))
        ),
        *(_band(i, _thin(kept), x_axis, y_scale) for i, (kept, _) in enumerate(cleaned)),
        *(_line(i, _thin(kept), x_axis, y_scale) for i, (kept, _) in enumerate(cleaned)),
        *(_markers(i, one.name, _thin(kept), (x_axis, y_scale), percent) for i, (kept, one) in enumerate(cleaned)),
        legend,
    ]
    height = LEGEND_TOP + rows * LEGEND_ROW
    summary = f"{title}. {_summary(series, percent)}"
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {height}" aria-label="{escape(summary)}">'
        f"{''.join(parts)}</svg>"
    )


def _finite(series: Series) -> list[_Point]:
    errors = series.errors if series.errors is not None else [None] * len(series.points)
    return [
        _Point(float(x), float(y), error)
        for (x, y), error in zip(series.points, errors, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]


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


def _vertical(points: Sequence[_Point], references: Sequence[float], percent: bool) -> Axis:
    low = min([p.y - (p.error or 0) for p in points] + list(references))
    high = max([p.y + (p.error or 0) for p in points] + list(references))
    if percent:  # a share cannot leave 0..1, even where its error band would
        low, high = 0.0, min(high, 1.0) or 1.0
    return y_axis(low, high, PLOT_BOTTOM, PLOT_TOP)


def _colour(index: int) -> str:
    return f"var(--series-{index % len(PALETTE) + 1},{PALETTE[index % len(PALETTE)]})"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _path(positions: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in positions)


def _text(x: float, y: float, text: str, css: str = LABEL_STYLE, anchor: str = "start") -> str:
    place = f'x="{_number(x)}" y="{_number(y)}" text-anchor="{anchor}"'
    return f'<text {place} style="{css}">{escape(text)}</text>'


def _stroke(index: int, width: float) -> str:
    """Colour and dash of series ``index`` as attributes."""
    return (
        f'style="fill:none;stroke:{_colour(index)};stroke-width:{width};stroke-linejoin:round" '
        f'stroke-dasharray="{DASHES[index % len(DASHES)]}"'
    )


def _axes(x_axis: Axis, y_scale: Axis, percent: bool) -> str:
    parts = []
    y_step = y_scale.ticks[1] - y_scale.ticks[0]
    for value in y_scale.ticks:
        y = y_scale.place(value)
        label = f"{formatting.tick(100 * value, 100 * y_step)} %" if percent else formatting.tick(value, y_step)
        parts.append(f'<path d="M{PLOT_LEFT} {_number(y)}H{PLOT_RIGHT}" style="{GRID_STYLE}"/>')
        parts.append(_text(PLOT_LEFT - 6, y + 4, label, anchor="end"))
    x_step = x_axis.ticks[1] - x_axis.ticks[0] if len(x_axis.ticks) > 1 else 1.0
    places = [
        (x_axis.place(v), formatting.scientific(v) if x_axis.log else formatting.tick(v, x_step)) for v in x_axis.ticks
    ]
    if x_axis.gutter:
        places.insert(0, (x_axis.start, "0"))
        parts.append(_break(x_axis.start + x_axis.gutter / 2))
    parts += [_text(x, PLOT_BOTTOM + 17, label, anchor="middle") for x, label in places]
    return "".join(parts)


def _break(x: float) -> str:
    """Two slanted strokes: the axis jumps here, from zero to the first value that has a logarithm."""
    strokes = "".join(f"M{_number(x + d)} {PLOT_BOTTOM + 5}l4 -10" for d in (-4, 0))
    return f'<path d="{strokes}" style="stroke:var(--muted,#555);stroke-width:1"/>'


def _labels(title: str, x_label: str, y_label: str, dropped: int) -> str:
    note = f" ({dropped} values not finite, not drawn)" if dropped else ""
    return (
        _text(4, 15, title, TITLE_STYLE)
        + _text(4, 32, y_label + note)
        + _text((PLOT_LEFT + PLOT_RIGHT) / 2, PLOT_BOTTOM + 34, x_label, anchor="middle")
    )


def _line(index: int, points: Sequence[_Point], x_axis: Axis, y_scale: Axis) -> str:
    if len(points) < 2:
        return ""
    path = _path((x_axis.place(p.x), y_scale.place(p.y)) for p in points)
    return f'<path d="{path}" {_stroke(index, 2)}/>'


def _band(index: int, points: Sequence[_Point], x_axis: Axis, y_scale: Axis) -> str:
    known = [point for point in points if point.error]
    if not known:
        return ""

    def clipped(value: float) -> float:
        return min(max(y_scale.place(value), PLOT_TOP), PLOT_BOTTOM)

    upper = [(x_axis.place(p.x), clipped(p.y + (p.error or 0))) for p in known]
    lower = [(x_axis.place(p.x), clipped(p.y - (p.error or 0))) for p in known]
    if len(known) == 1:
        style = f"stroke:{_colour(index)};stroke-width:2;opacity:.5"
        return f'<path class="band" d="{_path([upper[0], lower[0]])}" style="{style}"/>'
    outline = _path(upper + lower[::-1])
    return f'<path class="band" d="{outline}Z" style="fill:{_colour(index)};opacity:.16"/>'


def _reference(index: int, name: str, value: float, y_scale: Axis, percent: bool) -> str:
    y = _number(y_scale.place(value))
    tooltip = f"<title>{escape(name)}: {_value(value, None, percent)}</title>"
    return f'<path d="M{PLOT_LEFT} {y}H{PLOT_RIGHT}" {_stroke(index, 1.6)}>{tooltip}</path>'


def _shape(index: int, x: float, y: float) -> str:
    """A marker outline around (x, y): circle, square, triangle, diamond, in turn."""
    if index % 4 == 0:
        return f"M{_number(x - 3)} {_number(y)}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0"
    if index % 4 == 1:
        return f"M{_number(x - 2.8)} {_number(y - 2.8)}h5.6v5.6h-5.6z"
    if index % 4 == 2:
        return f"M{_number(x)} {_number(y - 3.6)}l3.6 6h-7.2z"
    return f"M{_number(x)} {_number(y - 4)}l4 4l-4 4l-4 -4z"


def _value(value: float, error: float | None, percent: bool) -> str:
    if percent:
        return formatting.percent(value, error)
    return formatting.number(value) + (f" ± {formatting.number(error)}" if error is not None else "")


def _markers(index: int, name: str, points: Sequence[_Point], axes: tuple[Axis, Axis], percent: bool) -> str:
    x_axis, y_scale = axes
    quiet = ' class="quiet"' if len(points) > MARKED else ""
    marks = "".join(
        f'<path d="{_shape(index, x_axis.place(p.x), y_scale.place(p.y))}">'
        f"<title>{escape(name)}, {formatting.number(p.x)}: {_value(p.y, p.error, percent)}</title></path>"
        for p in points
    )
    # The wide transparent stroke is the hover target: a bare marker is too small to hit.
    style = f"fill:{_colour(index)};stroke:transparent;stroke-width:9"
    return f'<g{quiet} pointer-events="all" style="{style}">{marks}</g>'


def _legend(names: Sequence[str], series_count: int) -> tuple[str, int]:
    """The legend and its number of rows; entries wrap by estimated text width. A single series needs none."""
    if len(names) == 1 and series_count == 1:
        return "", 0
    parts, x, row = [], 4.0, 0
    for index, name in enumerate(names):
        width = 38 + CHARACTER * len(name) + 12
        if x > 4 and x + width > WIDTH:
            x, row = 4.0, row + 1
        y = LEGEND_TOP + row * LEGEND_ROW + 4
        parts.append(f'<path d="M{_number(x)} {y}h28" {_stroke(index, 2)}/>')
        if index < series_count:
            parts.append(f'<path d="{_shape(index, x + 14, y)}" style="fill:{_colour(index)}"/>')
        parts.append(_text(x + 34, y + 4, name, NAME_STYLE))
        x += width
    return "".join(parts), row + 1


def _summary(series: Sequence[Series], percent: bool) -> str:
    """What the picture shows, for people who do not see it."""
    sentences = []
    for one in series:
        points = _finite(one)
        if points:
            first, last = _value(points[0].y, None, percent), _value(points[-1].y, None, percent)
            sentences.append(f"{one.name}: {len(points)} points, from {first} to {last}")
    return "; ".join(sentences) + "."


def _empty(title: str, dropped: int) -> str:
    reason = f"all {dropped} values are not finite" if dropped else "no values"
    label = escape(f"{title}: {reason}")
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} 60" aria-label="{label}">'
        f"{_text(4, 15, title, TITLE_STYLE)}{_text(4, 38, reason)}</svg>"
    )

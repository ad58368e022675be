"""What charts are drawn of: SVG text for lines, bands, markers, axes, legends. No chart is known here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from understudy.report import formatting
from understudy.report.scales import Axis

LEGEND_ROW, CHARACTER = 19, 6.6
# Okabe and Ito's palette, dark enough for lines on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b0509a", "#b8860b", "#3a9bd9", "#6b6b6b", "#8c3b2a")
LABEL_STYLE = "fill:var(--muted,#555);font-size:12px"
NAME_STYLE = "fill:var(--text,#111);font-size:12px"
TITLE_STYLE = "fill:var(--text,#111);font-size:14px;font-weight:600"
GRID_STYLE = "stroke:var(--grid,#ddd);stroke-width:1"
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 3", "12 3", "6 2 1 2")


@dataclass(frozen=True)
class Frame:
    """Where a chart's parts lie, in pixels of its view box."""

    width: int = 460
    left: int = 52
    right: int = 444
    top: int = 44
    bottom: int = 234

    @property
    def legend_top(self) -> int:
        """The first line of names, below the axis and its label."""
        return self.bottom + 50


NORMAL, WIDE = Frame(), Frame(width=960, right=944, bottom=264)


def colour(index: int) -> str:
    """Of series ``index``: a variable that pages set by scheme, with a value for charts that stand alone."""
    return f"var(--series-{index % len(PALETTE) + 1},{PALETTE[index % len(PALETTE)]})"


def pixels(value: float) -> str:
    """A coordinate, with no more digits than can be seen."""
    return f"{value:.1f}".removesuffix(".0")


def path(positions: Iterable[tuple[float, float]]) -> str:
    """A line through positions."""
    return "M" + "L".join(f"{pixels(x)} {pixels(y)}" for x, y in positions)


def text(x: float, y: float, words: str, css: str = LABEL_STYLE, anchor: str = "start") -> str:
    """One line of text."""
    place = f'x="{pixels(x)}" y="{pixels(y)}" text-anchor="{anchor}"'
    return f'<text {place} style="{css}">{escape(words)}</text>'


def stroke(index: int, width: float) -> str:
    """Colour and dash of series ``index`` as attributes."""
    return (
        f'style="fill:none;stroke:{colour(index)};stroke-width:{width};stroke-linejoin:round" '
        f'stroke-dasharray="{DASHES[index % len(DASHES)]}"'
    )


def shape(index: int, x: float, y: float) -> str:
    """A marker outline around (x, y): circle, square, triangle, diamond, in turn."""
    if index % 4 == 0:
        return f"M{pixels(x - 3)} {pixels(y)}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0"
    if index % 4 == 1:
        return f"M{pixels(x - 2.8)} {pixels(y - 2.8)}h5.6v5.6h-5.6z"
    if index % 4 == 2:
        return f"M{pixels(x)} {pixels(y - 3.6)}l3.6 6h-7.2z"
    return f"M{pixels(x)} {pixels(y - 4)}l4 4l-4 4l-4 -4z"


def axes(frame: Frame, x_axis: Axis, y_scale: Axis, percent: bool) -> str:
    """Grid lines, tick labels, and the sign where a log axis jumps to zero."""
    parts = []
    y_step = y_scale.ticks[1] - y_scale.ticks[0]
    for value in y_scale.ticks:
        y = y_scale.place(value)
        label = f"{formatting.tick(100 * value, 100 * y_step)} %" if percent else formatting.tick(value, y_step)
        parts.append(f'<path d="M{frame.left} {pixels(y)}H{frame.right}" style="{GRID_STYLE}"/>')
        parts.append(text(frame.left - 6, y + 4, label, anchor="end"))
    x_step = x_axis.ticks[1] - x_axis.ticks[0] if len(x_axis.ticks) > 1 else 1.0
    places = [
        (x_axis.place(v), formatting.scientific(v) if x_axis.log else formatting.tick(v, x_step)) for v in x_axis.ticks
    ]
    if x_axis.gutter:
        places.insert(0, (x_axis.start, "0"))
        parts.append(_break(x_axis.start + x_axis.gutter / 2, frame.bottom))
    parts += [text(x, frame.bottom + 17, label, anchor="middle") for x, label in places]
    return "".join(parts)


def _break(x: float, bottom: int) -> str:
    """Two slanted strokes: the axis jumps here, from zero to the first value that has a logarithm."""
    strokes = "".join(f"M{pixels(x + d)} {bottom + 5}l4 -10" for d in (-4, 0))
    return f'<path d="{strokes}" style="stroke:var(--muted,#555);stroke-width:1"/>'


def legend(names: Sequence[str], series_count: int, frame: Frame) -> tuple[str, int]:
    """Names with their lines, and the number of rows; entries wrap by estimated text width. A single series needs
    none."""
    if len(names) == 1 and series_count == 1:
        return "", 0
    parts, x, row = [], 4.0, 0
    for index, name in enumerate(names):
        width = 38 + CHARACTER * len(name) + 12
        if x > 4 and x + width > frame.width:
            x, row = 4.0, row + 1
        y = frame.legend_top + row * LEGEND_ROW + 4
        parts.append(f'<path d="M{pixels(x)} {y}h28" {stroke(index, 2)}/>')
        if index < series_count:
            parts.append(f'<path d="{shape(index, x + 14, y)}" style="fill:{colour(index)}"/>')
        parts.append(text(x + 34, y + 4, name, NAME_STYLE))
        x += width
    return "".join(parts), row + 1

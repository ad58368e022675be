"""Curves for papers: each as SVG and PNG, drawn by matplotlib, with its numbers as CSV; and all metrics as one CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.report import page
from understudy.report.chart_shapes import DASHES, PALETTE
from understudy.report.charts import Series
from understudy.report.curves import Curve
from understudy.report.page import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A column of a two-column page, and both, in inches; dots per inch of the PNG.
COLUMN, BOTH, RESOLUTION = (3.4, 2.6), (7.0, 2.8), 300
# Type that is read beside a paper's text; text stays text in the SVG, and the file is the same every time.
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "legend.fontsize": 7,
    "lines.linewidth": 1.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "understudy",
}
_MARKERS = ("o", "s", "^", "D")


def write_figures(curves: Sequence[Curve], folder: Path) -> list[Path]:
    """<curve>.svg, .png and .csv for each curve with points; the folder is made. Returns the paths."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    names: dict[str, int] = {}
    for curve in curves:
        names[curve.slug] = names.get(curve.slug, 0) + 1
        name = curve.slug if names[curve.slug] == 1 else f"{curve.slug}-{names[curve.slug]}"
        svg, png, table = (folder / f"{name}.{ending}" for ending in ("svg", "png", "csv"))
        with rc_context(STYLE):
            figure = Figure(figsize=BOTH if curve.wide else COLUMN, layout="constrained")
            axes = figure.add_subplot()
            draw(curve, axes)
            if len(axes.get_legend_handles_labels()[1]) > 1:  # below: no corner is free of lines for certain
                figure.legend(loc="outside lower center", ncols=4 if curve.wide else 2, frameon=False)
            figure.savefig(svg, metadata={"Date": None})
            figure.savefig(png, dpi=RESOLUTION, metadata={"Software": None})
        _write_csv(table, ("series", "x", "place", "y", "low", "high"), _points(curve))
        paths += [svg, png, table]
    return paths


def write_metrics_csv(runs: Mapping[str, Sequence[Row]], path: Path) -> Path:
    """One line per run, step and metric, with the metric's standard error where there is one."""

    def rows() -> Iterator[Sequence[object]]:
        for name, own in runs.items():
            for row in own:
                values = {key: value for key in row if (value := page.finite_number(row[key])) is not None}
                for key, value in values.items():
                    if key != "step" and not (key.endswith("_se") and key.removesuffix("_se") in values):
                        yield name, _exact(values["step"]), key, value, values.get(f"{key}_se", "")

    _write_csv(path, ("run", "step", "metric", "value", "standard_error"), rows())
    return path


def _write_csv(path: Path, header: Sequence[str], rows: Iterator[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _points(curve: Curve) -> Iterator[Sequence[object]]:
    """Every finite point with its band; ``place``: where x is, where a number would say nothing."""
    for line in curve.lines:
        for (x, y), band in zip(line.points, _bands(line), strict=True):
            if math.isfinite(x) and math.isfinite(y):
                yield line.name, _exact(x), curve.x_words.get(x, ""), y, *(band or ("", ""))


def _exact(value: float) -> str:
    """All digits; whole numbers without a point."""
    return repr(value).removesuffix(".0")


def _bands(line: Series) -> list[tuple[float, float] | None]:
    if line.band is not None:
        return list(line.band)
    errors = line.errors if line.errors is not None else [None] * len(line.points)
    return [
        None if error is None else (y - error, y + error) for (_, y), error in zip(line.points, errors, strict=True)
    ]


def draw(curve: Curve, axes: Axes) -> None:
    """The curve into axes of one's own figure."""
    factor = 100.0 if curve.percent else 1.0
    for index, line in enumerate(curve.lines):
        known = [
            (x, y, band)
            for (x, y), band in zip(line.points, _bands(line), strict=True)
            if math.isfinite(factor * x * y)
        ]
        if not known:
            continue
        colour, xs = PALETTE[index % len(PALETTE)], [x for x, _, _ in known]
        style = _line_style(index) | {"marker": _MARKERS[index % 4] if len(known) <= 12 else None, "markersize": 3}
        axes.plot(xs, [factor * y for _, y, _ in known], color=colour, label=_plain(line.name), **style)
        low = [factor * (band or (y, y))[0] for _, y, band in known]
        high = [factor * (band or (y, y))[1] for _, y, band in known]
        if low != high:
            axes.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
    for index, (name, value) in enumerate(curve.references, len(curve.lines)):
        colour = PALETTE[index % len(PALETTE)]
        axes.axhline(factor * value, color=colour, label=_plain(name), **_line_style(index))
    if curve.log_x and any(x > 0 for line in curve.lines for x, _ in line.points):
        axes.set_xscale("symlog", linthresh=min(x for line in curve.lines for x, _ in line.points if x > 0))
    _label(curve, axes)


def _label(curve: Curve, axes: Axes) -> None:
    for number, region in enumerate(curve.regions):
        if number % 2:
            axes.axvspan(region.start, region.end, color="0.5", alpha=0.1, linewidth=0)
    if curve.regions:
        centres = [(region.start + region.end) / 2 for region in curve.regions]
        names = [f"{number} {_plain(region.name)}" for number, region in enumerate(curve.regions, 1)]
        axes.set_xticks(centres, names if curve.wide else [str(number) for number in range(1, len(names) + 1)])
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(curve.regions[0].start, curve.regions[-1].end)
    axes.set_title(_plain(curve.title), loc="left")
    axes.set_xlabel(curve.x_label.removesuffix(" (log scale)"))
    axes.set_ylabel(f"{curve.unit} (%)" if curve.percent else curve.unit)
    if curve.percent:
        axes.set_ylim(bottom=0, top=min(axes.get_ylim()[1], 101.0))


def _line_style(index: int) -> dict[str, Any]:
    """The dashes of the pages' charts; in numbers, as matplotlib wants them."""
    dashes = DASHES[index % len(DASHES)].split()
    return {"linestyle": (0, tuple(float(length) / 2 for length in dashes)) if dashes else "solid"}


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula, and that has no half of a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("$", r"\$")

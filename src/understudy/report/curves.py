"""The curves of one run, or of several: what each shows, as data. Pages, figures and tables are made from the same."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from markupsafe import Markup

from understudy.report import page
from understudy.report.chart_shapes import NORMAL, PALETTE, WIDE
from understudy.report.charts import Mark, Region, Series, line_chart
from understudy.report.page import Row

STEPS = "optimizer steps"
FLOPS, SECONDS = "cost/flops", "cost/seconds"
ERROR, NOISE = "one standard error", "noise from row to row"
# Where no standard error is known: differences of neighbouring rows that a band is estimated from, at each side, and
# the least of them.
REACH, LEAST_DIFFERENCES = 8, 4
# More lines cannot be told apart: of more tasks or teachers those with the most rows are drawn.
MOST_LINES = len(PALETTE)
RIGHT = "share of answers that are right"


class Plan(NamedTuple):
    """Title, unit, (key, name in the legend) of each line; ``percent``: of shares."""

    title: str
    unit: str
    entries: tuple[tuple[str, str], ...]
    percent: bool = False


# The curves of every run, in reading order.
PLANS = (
    Plan(
        "Reverse KL",
        "nats per token",
        (("reverse_kl/mean", "sampled tokens"), ("reverse_kl/full", "full vocabulary")),
    ),
    Plan(
        "Entropy",
        "nats per token",
        (
            ("entropy/sampled", "student, sampled tokens"),
            ("entropy/student", "student, full vocabulary"),
            ("entropy/teacher", "teacher, full vocabulary"),
        ),
    ),
    Plan("Reward", "mean reward", (("reward/mean", "reward"),)),
    Plan("Completion length", "tokens", (("completion_length/mean", "mean length"),)),
    Plan("Cut at the length cap", "share of rollouts", (("truncated/share", "truncated"),), percent=True),
    Plan(
        "Mismatch: tails of the ratio w",
        "share of tokens",
        (("ratio/tail_share", "|log w| above 1"), ("ratio/outside_share", "w outside [0.9, 1.1]")),
        percent=True,
    ),
    Plan("Mismatch: largest |log w|", "nats", (("ratio/abs_log_max", "largest"), ("ratio/abs_log_mean", "mean"))),
    Plan("Gradient norm", "norm before clipping", (("optim/grad_norm", "gradient norm"),)),
    Plan("Loss", "", (("optim/loss", "loss"),)),
    Plan("Learning rate", "", (("optim/learning_rate", "learning rate"),)),
)
# Numbers that a schedule sets have no uncertainty.
_EXACT = frozenset({"optim/learning_rate"})
# Of each task, and of each teacher.
_PARTED = ("reverse_kl/mean", "entropy/sampled", "reward/mean", "completion_length/mean", "truncated/share")
_PART = re.compile(rf"by_(task|teacher)/(.+)/({'|'.join(_PARTED)})")


@dataclass(frozen=True)
class Curve:
    """One chart. ``band``: what its bands are, in words; ``x_words``: names of places on the axis, where numbers would
    say nothing; ``wide``: as wide as the page."""

    title: str
    unit: str
    lines: tuple[Series, ...]
    x_label: str = STEPS
    band: str = ""
    percent: bool = False
    log_x: bool = False
    references: tuple[tuple[str, float], ...] = ()
    regions: tuple[Region, ...] = ()
    x_words: Mapping[float, str] = field(default_factory=dict)
    wide: bool = False

    @property
    def slug(self) -> str:
        """The title as a file's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-") or "curve"

    def svg(self, marks: Sequence[Mark] = ()) -> Markup:
        """As a chart of a page. ``marks`` stand on curves over steps alone."""
        unit = ", ".join(part for part in (self.unit, self.band and f"band: {self.band}") if part)
        return Markup(
            line_chart(
                self.lines,
                title=self.title,
                x_label=self.x_label,
                y_label=unit,
                log_x=self.log_x,
                percent=self.percent,
                references=self.references,
                marks=marks if self.x_label == STEPS else (),
                regions=self.regions,
                x_words=self.x_words,
                frame=WIDE if self.wide else NORMAL,
            )
        )


def run_curves(rows: Sequence[Row]) -> tuple[list[Curve], set[str]]:
    """A run's curves by step, and the metric keys they show."""
    curves = [_accuracy(rows, task, decodings) for task, decodings in page.evaluations(rows).items()]
    planned = [(plan, *_lines(rows, plan.entries)) for plan in PLANS]
    curves += [Curve(p.title, p.unit, lines, band=band, percent=p.percent) for p, lines, band in planned if lines]
    times = sorted({key for row in rows for key in row if key.startswith("time/") and key != "time/evaluation"})
    lines, band = _lines(rows, [(key, key.removeprefix("time/").replace("_", " ")) for key in times])
    curves += [Curve("Time per phase", "seconds per step", lines, band=band)] if lines else []
    used = {"step", FLOPS, SECONDS, *times} | {key for plan in PLANS for key, _ in plan.entries}
    used |= {f"eval/{task}/{name}" for task, names in page.evaluations(rows).items() for name in names}
    used |= {f"{key}_se" for key in used}
    return curves, used | {key for row in rows for key in row if key.startswith("by_")}


def part_curves(rows: Sequence[Row]) -> list[Curve]:
    """A line for each task, and each teacher, where there are several."""
    curves = []
    for kind, names in parts_of(rows).items():
        for plan, key in _parted_plans():
            lines, band = _lines(rows, [(f"by_{kind}/{name}/{key}", name) for name in names])
            if lines:
                curves.append(Curve(f"{plan.title} by {kind}", plan.unit, lines, band=band, percent=plan.percent))
    return curves


def parts_of(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Names by kind ("task", "teacher"), of each kind with several; those with the most rows, in order of
    appearance."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        for match in filter(None, map(_PART.fullmatch, row)):
            own = counts.setdefault(match[1], {})
            own[match[2]] = own.get(match[2], 0) + 1
    parts = {}
    for kind, own in counts.items():
        most = sorted(own, key=lambda name: -own[name])[:MOST_LINES]
        if len(most) > 1:
            parts[kind] = [name for name in own if name in most]
    return parts


def cost_curves(runs: Mapping[str, Sequence[Row]]) -> list[Curve]:
    """Accuracy by compute and by time without evaluation; a line for each run, of one run for each decoding."""
    filled = {name: carried_costs(rows) for name, rows in runs.items()}
    curves = []
    for key, label, log_x, words in (
        (FLOPS, "cumulative FLOPs (log scale)", True, "compute"),
        (SECONDS, "cumulative seconds", False, "time"),
    ):
        if not any(row[key] > 0 for rows in filled.values() for row in rows):
            continue
        for metric in page.evaluation_metrics(row for rows in filled.values() for row in rows):
            lines = tuple(
                page.series(rows, metric, name, error_key=f"{metric}_se", x_key=key) for name, rows in filled.items()
            )
            title = f"Accuracy by {words}: {page.metric_words(metric)}"
            curves.append(_shares(title, lines, x_label=label, log_x=log_x))
    return curves


def carried_costs(rows: Sequence[Row]) -> list[Row]:
    """Rows with their running costs carried forward: evaluations need not repeat them; before training they are 0."""
    filled, costs = [], dict.fromkeys((FLOPS, SECONDS), 0.0)
    for row in rows:
        known = {key: value for key in costs if (value := page.finite_number(row.get(key))) is not None}
        costs |= known
        filled.append({**row, **costs})
    return filled


def compared_curves(runs: Mapping[str, Sequence[Row]]) -> list[Curve]:
    """Every metric that several runs may share: a chart each, with a line for each run."""
    rows = [row for own in runs.values() for row in own]
    curves = [
        _shares(f"Accuracy: {page.metric_words(metric)}", _run_lines(runs, metric)[0])
        for metric in page.evaluation_metrics(rows)
    ]
    entries = [(plan, key, _alone(plan, name)) for plan in PLANS for key, name in plan.entries]
    for kind, names in parts_of(rows).items():
        entries += [
            (plan, f"by_{kind}/{name}/{key}", f"{plan.title}: {kind} {name}")
            for plan, key in _parted_plans()
            for name in names
        ]
    for plan, key, title in entries:
        lines, band = _run_lines(runs, key)
        if any(line.points for line in lines):
            curves.append(Curve(title, plan.unit, lines, band=band, percent=plan.percent))
    return curves


def _alone(plan: Plan, name: str) -> str:
    return plan.title if len(plan.entries) == 1 else f"{plan.title}: {name}"


def _parted_plans() -> list[tuple[Plan, str]]:
    return [(plan, key) for plan in PLANS for key, _ in plan.entries if key in _PARTED]


def _accuracy(rows: Sequence[Row], task: str, decodings: Sequence[str]) -> Curve:
    keys = [f"eval/{task}/{name}" for name in decodings]
    lines = [
        page.series(rows, key, page.decoding_words(name), error_key=f"{key}_se")
        for key, name in zip(keys, decodings, strict=True)
    ]
    return _shares(f"Accuracy: {task}", tuple(lines))


def _shares(title: str, lines: tuple[Series, ...], *, x_label: str = STEPS, log_x: bool = False) -> Curve:
    """Of graders' means: shares of right answers, unless some value is none."""
    percent = all(0 <= y <= 1 for line in lines for _, y in line.points)
    band = ERROR if any(line.errors and any(line.errors) for line in lines) else ""
    unit = RIGHT if percent else "mean reward"
    return Curve(title, unit, lines, x_label=x_label, band=band, percent=percent, log_x=log_x)


def _lines(rows: Sequence[Row], entries: Sequence[tuple[str, str]]) -> tuple[tuple[Series, ...], str]:
    """Series of metrics that are there, and what their bands are."""
    made = [(key, page.series(rows, key, name, error_key=f"{key}_se")) for key, name in entries]
    return _banded([(key, line) for key, line in made if line.points])


def _run_lines(runs: Mapping[str, Sequence[Row]], key: str) -> tuple[tuple[Series, ...], str]:
    """A line for each run, without points where it has no such metric: a run has the same colour in every chart."""
    return _banded([(key, page.series(rows, key, name, error_key=f"{key}_se")) for name, rows in runs.items()])


def _banded(made: Sequence[tuple[str, Series]]) -> tuple[tuple[Series, ...], str]:
    """Lines with their standard errors, and where none is known with the noise of the values around."""
    lines, kinds = [], []
    for key, line in made:
        if line.errors and any(error is not None for error in line.errors):
            kinds.append(ERROR)
        else:
            band = None if key in _EXACT else noise_band([y for _, y in line.points])
            kinds += [NOISE] if band and any(band) else []
            line = Series(line.name, line.points, band=band)
        lines.append(line)
    return tuple(lines), ", else ".join(kind for kind in (ERROR, NOISE) if kind in kinds)


def noise_band(values: Sequence[float]) -> list[tuple[float, float] | None]:
    """(value - s, value + s), s^2 being half the mean square of the differences of neighbouring values around (von
    Neumann 1941): the variance of independent noise on a course that changes slowly. None where fewer than
    ``LEAST_DIFFERENCES`` are known; where no value is negative, neither is a band."""
    squares = [(b - a) ** 2 / 2 for a, b in pairwise(values)]
    least = 0.0 if all(value >= 0 for value in values if math.isfinite(value)) else -math.inf
    bands: list[tuple[float, float] | None] = []
    for index, value in enumerate(values):
        around = [square for square in squares[max(0, index - REACH) : index + REACH] if math.isfinite(square)]
        enough = len(around) >= LEAST_DIFFERENCES and math.isfinite(value)
        reach = math.sqrt(fmean(around)) if enough else 0.0
        bands.append((max(least, value - reach), value + reach) if enough else None)
    return bands

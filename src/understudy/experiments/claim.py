"""What an experiment is: a claim, the code that tests it, and what was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from understudy.experiments.lab import Lab
from understudy.experiments.search import Search
from understudy.experiments.worlds import ScaleName
from understudy.report.charts import Series
from understudy.statistics import mean_and_error, t_interval

Verdict = Literal["holds", "direction only", "does not hold here"]
Record = Mapping[str, Any]
"""What one pipeline found: JSON types."""


@dataclass(frozen=True)
class Estimate:
    """A mean over pipelines with its 95% interval (Student's t)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """One value per pipeline. Of a single one nothing is known of its spread: the interval is everything."""
        mean, _ = mean_and_error(values)
        low, high = t_interval(values) if len(values) > 1 else (float("-inf"), float("inf"))
        return cls(mean, low, high)

    @classmethod
    def of_differences(cls, ours: Sequence[float], others: Sequence[float]) -> Estimate:
        """Of paired values."""
        return cls.of([one - other for one, other in zip(ours, others, strict=True)])

    @classmethod
    def geometric(cls, ratios: Sequence[float]) -> Estimate:
        """The geometric mean: the interval is that of the logarithms."""
        return cls.of([math.log(ratio) for ratio in ratios]).exponential()

    def exponential(self) -> Estimate:
        """Of what this is the logarithm of."""
        return Estimate(*(math.exp(min(value, _LARGEST_LOG)) for value in (self.mean, self.low, self.high)))

    def show(self, form: str = "{:.3f}") -> str:
        """``0.123 [0.100, 0.150]``."""
        mean, low, high = (form.format(value) for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"

    def points(self) -> str:
        """A difference of shares in percentage points: ``+12.3 [+10.0, +15.0]``."""
        return Estimate(100 * self.mean, 100 * self.low, 100 * self.high).show("{:+.1f}")


# Where exp leaves float64. What is beyond is infinite for every purpose here.
_LARGEST_LOG = 700.0


def column(records: Sequence[Record], *path: str) -> list[float]:
    """The number at ``path`` of every record."""
    values = []
    for record in records:
        value: Any = record
        for name in path:
            value = value[name]
        values.append(float(value))
    return values


def crossing(curve: Sequence[Sequence[float]], level: float) -> float | None:
    """Where the curve of (x, y), with straight lines between its points, first reaches ``level``; None if it does
    not."""
    if curve[0][1] >= level:
        return curve[0][0]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y1 >= level:
            return x0 + (x1 - x0) * (level - y0) / (y1 - y0)
    return None


def mean_curve(name: str, curves: Sequence[Sequence[Sequence[float]]]) -> Series:
    """A chart's line: the mean over pipelines of curves that share their x, with its standard error."""
    points, errors = [], []
    for places in zip(*curves, strict=True):
        mean, error = mean_and_error([y for _, y in places])
        points.append((places[0][0], mean))
        errors.append(error if len(places) > 1 else None)
    return Series(name, points, errors)


@dataclass(frozen=True)
class Chart:
    """A plot: arguments of ``report.charts.line_chart``; ``name`` is its file's, without ".svg"."""

    name: str
    series: Sequence[Series]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """What the records say. ``ours``: a cell for the table of all claims. ``text``: a paragraph with the pass rule's
    numbers. ``numbers``: every estimate that the verdict rests on. ``rollouts``: completions to colour on the page,
    each {"rollout": a stored rollout (``rollout_store``), "notes": {token: text}}."""

    verdict: Verdict
    ours: str
    text: str
    numbers: Mapping[str, Any]
    table: Sequence[Mapping[str, str]] = ()
    charts: Sequence[Chart] = ()
    rollouts: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Claim:
    """One of the article's claims. ``settings``: a frozen dataclass per scale. ``arms``: those whose learning rate is
    searched, by ``search(lab, settings, arm)`` in the first pipeline. ``pipeline(lab, settings, rates)``: one whole
    pipeline's record. ``analyse(records)``: by the rule that the claim's README states.

    ``article``: what the article reports. ``limits``: what the result does not say.
    """

    name: str
    title: str
    article: str
    limits: str
    settings: Mapping[ScaleName, Any]
    search: Callable[[Lab, Any, str], Search]
    pipeline: Callable[[Lab, Any, Mapping[str, float]], Record]
    analyse: Callable[[Sequence[Record]], Finding]
    arms: Sequence[str] = field(default=())

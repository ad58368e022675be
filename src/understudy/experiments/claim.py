"""What an experiment is: a claim, the code that tests it, and what was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from understudy.experiments.lab import Lab
from understudy.experiments.worlds import ScaleName
from understudy.report.charts import Series
from understudy.statistics import mean_and_error, t_interval

Verdict = Literal["holds", "direction only", "does not hold here"]
Record = Mapping[str, Any]
"""What one pipeline found: JSON types."""

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Learning rates that every arm is searched over."""
LORA_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""The same, ten times higher: adapters want about ten times the rate (Schulman et al., LoRA Without Regret)."""


@dataclass(frozen=True)
class Search:
    """Scores on the validation problems by learning rate, as (rate, score); the best is taken."""

    scores: Sequence[tuple[float, float]]

    @property
    def chosen(self) -> float:
        """Of equal scores the lowest rate."""
        return max(self.scores, key=lambda pair: (pair[1], -pair[0]))[0]

    @property
    def at_edge(self) -> bool:
        """Whether the best is the lowest or the highest tried: a better one may lie beyond."""
        rates = [rate for rate, _ in self.scores]
        return self.chosen in (min(rates), max(rates))


def searched(score: Callable[[float], float], rates: Sequence[float] = RATES) -> Search:
    """Score every rate."""
    return Search([(rate, score(rate)) for rate in rates])


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

    def show(self, form: str = "{:.3f}") -> str:
        """``0.123 [0.100, 0.150]``."""
        mean, low, high = (form.format(value) for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


def column(records: Sequence[Record], *path: str) -> list[float]:
    """The number at ``path`` of every record."""
    values = []
    for record in records:
        value: Any = record
        for name in path:
            value = value[name]
        values.append(float(value))
    return values


def first_reaching(curve: Sequence[Sequence[float]], level: float) -> float | None:
    """The first x of a curve of (x, y) whose y is at least ``level``; None if it never is."""
    return next((x for x, y in curve if y >= level), None)


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

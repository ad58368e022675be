"""When a logged metric leaves the band of healthy runs, and when accuracy collapses. Reads records, makes none.

A record's "runs" hold {"accuracy", "metrics", "broke_off"} by name, one of them "healthy": curves of (step, value), and
the step that a run died in (None: it went to its end).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from understudy.experiments.claim import Estimate, Record

# The band's least widening, steps in a row outside it, and the fall in accuracy that is a collapse.
LEAST_WIDENING, IN_A_ROW, COLLAPSE = 0.05, 2, 0.05


@dataclass(frozen=True)
class Judged:
    """``harm``: final accuracy minus the healthy run's. By pipeline: ``alarms`` and ``collapses``, steps or None for
    never; ``known_sound``, the last evaluation before the collapse."""

    harm: Estimate
    alarms: Sequence[int | None]
    collapses: Sequence[int | None]
    known_sound: Sequence[int]
    broke_off: int

    @property
    def in_time(self) -> int:
        """Pipelines with an alarm before any collapse is seen."""
        return self._count(lambda alarm, collapse, _: collapse is None or alarm < collapse)

    @property
    def strictly_in_time(self) -> int:
        """Pipelines with an alarm at a step at which accuracy had certainly not collapsed."""
        return self._count(lambda alarm, collapse, sound: collapse is None or alarm <= sound)

    def _count(self, early: Callable[[int, int | None, int], bool]) -> int:
        rows = zip(self.alarms, self.collapses, self.known_sound, strict=True)
        return sum(alarm is not None and early(alarm, collapse, sound) for alarm, collapse, sound in rows)


def judge(records: Sequence[Record], mode: str, watched: Sequence[str]) -> Judged:
    """The faulty runs named ``mode``, by the metrics that are to show their fault."""
    runs = [record["runs"][mode] for record in records]
    collapses = [collapse(run) for run in runs]
    evaluated = [[int(step) for step, _ in run["accuracy"]] for run in runs]
    pairs = zip(evaluated, collapses, strict=True)
    return Judged(
        harm=Estimate.of_differences(
            [final_accuracy(run) for run in runs], [final_accuracy(record["runs"]["healthy"]) for record in records]
        ),
        alarms=[alarm(records, mode, i, watched) for i in range(len(records))],
        collapses=collapses,
        known_sound=[max(step for step in steps if end is None or step < end) for steps, end in pairs],
        broke_off=sum(run["broke_off"] is not None for run in runs),
    )


def final_accuracy(run: Mapping[str, Any]) -> float:
    """Accuracy at the end. A run that broke off leaves no model: nothing is right."""
    return run["accuracy"][-1][1] if run["broke_off"] is None else 0.0


def alarm(records: Sequence[Record], name: str, place: int, metrics: Sequence[str]) -> int | None:
    """The step at which any of ``metrics`` raises the alarm in pipeline ``place``."""
    others = [record for i, record in enumerate(records) if i != place]
    steps = []
    for metric in metrics if others else ():
        curve = records[place]["runs"][name]["metrics"][metric]
        healthy = [record["runs"]["healthy"]["metrics"][metric] for record in others]
        steps.append(first_outside(curve, healthy))
    return min((step for step in steps if step is not None), default=None)


def first_outside(curve: Sequence[Sequence[float]], healthy: Sequence[Sequence[Sequence[float]]]) -> int | None:
    """The step at which ``curve`` has been outside the healthy curves' widened band ``IN_A_ROW`` times in a row. A run
    that broke off has fewer steps than they."""
    outside = 0
    for (step, value), *others in zip(curve, *(one[: len(curve)] for one in healthy), strict=True):
        low, high = min(y for _, y in others), max(y for _, y in others)
        widening = max(high - low, LEAST_WIDENING)
        outside = 0 if low - widening <= value <= high + widening else outside + 1
        if outside == IN_A_ROW:
            return int(step)
    return None


def collapse(run: Mapping[str, Any]) -> int | None:
    """The first evaluation that lies ``COLLAPSE`` below the start's, or the step that the run died in."""
    start = run["accuracy"][0][1]
    fallen = (int(step) for step, value in run["accuracy"] if value <= start - COLLAPSE)
    return next(fallen, run["broke_off"])

"""What is known of a run in progress and the few numbers of it that matter. No clock, no screen, no files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

Row = Mapping[str, Any]

# Steps that curves show: as many as a wide terminal has columns, several times over.
KEPT = 1000
# Steps that the pace is taken from: enough to even out lengths, few enough to follow a change.
WINDOW = 20
_EVALUATION = re.compile(r"eval/[^/]+/(greedy|t[\d.e+-]+)")  # the means: no errors, shares or details


@dataclass(frozen=True)
class Metric:
    """One number of a row. ``keys``: of these, a run shows the first that it has. ``form`` formats the value."""

    label: str
    form: str
    keys: tuple[str, ...]


KL = Metric("reverse KL", "{:.3f}", ("reverse_kl/full", "reverse_kl/mean"))
REWARD = Metric("reward", "{:.3f}", ("reward/mean",))
LOSS = Metric("loss", "{:.3f}", ("optim/loss",))
LENGTH = Metric("length", "{:,.1f}", ("completion_length/mean",))
NORM = Metric("gradient norm", "{:.3g}", ("optim/grad_norm",))
ENTROPY = Metric("entropy", "{:.3f}", ("entropy/student", "entropy/sampled"))
RATE = Metric("learning rate", "{:.2g}", ("optim/learning_rate",))
# Stands for the first evaluation, or for the reward where there is none.
SCORE = Metric("score", "{:.3f}", ())
# What matters, by method; then what fills the places of those that a run does not have.
MATTERS: Mapping[str, tuple[Metric, ...]] = {
    "distill": (KL, SCORE, LENGTH, NORM),
    "rl": (REWARD, SCORE, LENGTH, NORM),
    "sft": (LOSS, SCORE, NORM, RATE),
}
SPARE = (ENTROPY, LOSS, RATE)
SHOWN = 4


@dataclass(frozen=True)
class Point:
    """A step's row, and when it came (seconds of any one clock; None: before anyone looked)."""

    row: Row
    at: float | None = None

    @cached_property
    def evaluations(self) -> Mapping[str, float]:
        """``evaluations`` of the row, looked up once: every picture asks all points."""
        return evaluations(self.row)


@dataclass(frozen=True)
class Track:
    """The rows so far, oldest first. ``title`` says what runs where, ``method`` is the command, ``total`` its steps."""

    title: str
    method: str
    total: int
    points: tuple[Point, ...] = ()

    @property
    def done(self) -> int:
        """Steps that are finished."""
        return int(self.points[-1].row["step"]) if self.points else 0

    def with_row(self, row: Row, at: float | None = None) -> Track:
        """With a newer row. One of the last row's step takes its place; one of an earlier step (the run began again
        there) also takes that of those after it."""
        kept = self.points
        while kept and kept[-1].row["step"] >= row["step"]:
            kept = kept[:-1]
        return replace(self, points=(*kept[-KEPT + 1 :], Point(row, at)))


def evaluations(row: Row) -> dict[str, float]:
    """Means of a row's evaluations by "<task>/<decoding>"."""
    return {key.removeprefix("eval/"): value for key, value in row.items() if _EVALUATION.fullmatch(key)}


def metrics_that_matter(track: Track) -> list[tuple[Metric, list[float]]]:
    """At most four metrics with their values so far, chosen by method and by what the rows hold."""
    rows = [point.row for point in track.points]
    shown: list[tuple[Metric, list[float]]] = []
    for metric in (*MATTERS.get(track.method, ()), *SPARE):
        found = _score(track.points) if metric is SCORE else metric
        values = _values(rows, found.keys)
        # Progress that counts prompts has no optimizer, and nothing to fill places for.
        if values and len(shown) < SHOWN and all(other.keys != found.keys for other, _ in shown):
            shown.append((found, values))
    return shown


def _score(points: Sequence[Point]) -> Metric:
    for point in points:
        for name in point.evaluations:
            return Metric(name.replace("/", " "), SCORE.form, (f"eval/{name}",))
    return REWARD


def _values(rows: Iterable[Row], keys: Sequence[str]) -> list[float]:
    rows = list(rows)
    for key in keys:
        values = [float(row[key]) for row in rows if isinstance(row.get(key), int | float)]
        if values:
            return values
    return []


@dataclass(frozen=True)
class Pace:
    """``seconds`` of a step without evaluation, ``evaluation`` seconds per step, trained ``tokens`` per second."""

    seconds: float
    evaluation: float
    tokens: float | None


def pace(track: Track) -> Pace | None:
    """How fast the last steps were: by the clock where two of them came under its eyes, else by the roles' seconds in
    their rows, which overlap where ``sampling.max_policy_lag`` lets stages do. None before the first step."""
    points = [point for point in track.points if point.row["step"] > 0]
    stamped = [point for point in track.points[-WINDOW:] if point.at is not None]
    if len(stamped) > 1:
        first, last = stamped[0], stamped[-1]
        timed = [point for point in points if first.row["step"] < point.row["step"] <= last.row["step"]]
        seconds = (last.at or 0.0) - (first.at or 0.0) - sum(_evaluation_seconds(point.row) for point in timed)
    else:
        timed = points[-WINDOW:]
        seconds = sum(_role_seconds(point.row) for point in timed)
    if not timed or seconds <= 0:
        return None
    # Not the number of rows: a run that counts prompts makes one row for many.
    steps = timed[-1].row["step"] - (stamped[0].row["step"] if len(stamped) > 1 else timed[0].row["step"] - 1)
    tokens = sum(point.row.get("tokens/trained", 0) for point in timed)
    evaluation = sum(_evaluation_seconds(point.row) for point in points) / max(1, len(points))
    return Pace(seconds / steps, evaluation, tokens / seconds if tokens else None)


def seconds_left(track: Track, known: Pace | None) -> float | None:
    """Until the last step, evaluations at their share so far included."""
    if known is None:
        return None
    return (track.total - track.done) * (known.seconds + known.evaluation)


def _evaluation_seconds(row: Row) -> float:
    return float(row.get("time/evaluation", 0.0))


def _role_seconds(row: Row) -> float:
    return sum(value for key, value in row.items() if key.startswith("time/") and key != "time/evaluation")


def role_shares(track: Track) -> dict[str, float]:
    """Share of the last steps' seconds by role, largest first."""
    seconds: dict[str, float] = {}
    for point in track.points[-WINDOW:]:
        for key, value in point.row.items():
            if key.startswith("time/"):
                name = key.removeprefix("time/").replace("_", " ")
                seconds[name] = seconds.get(name, 0.0) + value
    total = sum(seconds.values())
    return {name: seconds[name] / total for name in sorted(seconds, key=lambda name: -seconds[name])} if total else {}

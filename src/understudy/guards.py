"""What the numbers of a step say about the health of a run. Pure: no I/O, nothing changed in place.

A run's past is a fold over its rows of metrics (``past_of``): a resumed run reads metrics.jsonl and judges on as if
nothing had happened. Rules and thresholds: docs/guards.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from understudy.config_guards import GuardsConfig

# Steps that make a start, and a present; steps in a row whose lowest mean a rise is measured from.
START, RECENT, SMOOTH = 3, 3, 5
# Values that are remembered, and gradients that say how large one may be.
WINDOW, LEAST_WINDOW = 50, 20
# Nats per token of reverse KL below which a student writes as its teacher does.
NEAR = 0.1
# A rise has to stand out from how much a metric jumps from step to step, by so many standard errors.
ERRORS = 3.0
# Of a Gaussian with a standard deviation of one: the median of |difference of two values|.
_MEDIAN_CHANGE = 0.9539
# A share of completions is judged over at least so many, and over so many finished ones.
LEAST_COMPLETIONS, LEAST_FINISHED = 16, 8
# An episode is over when its guard has been quiet for so many steps.
QUIET = 10

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """A number beyond its threshold. ``words``: both, as a sentence; ``causes``: what it is likely to come from."""

    guard: str
    metric: str
    value: float
    limit: float
    words: str
    causes: str


@dataclass(frozen=True)
class Track:
    """What is remembered of one metric: its first ``START`` values, its last ``WINDOW`` ones, the lowest mean of
    ``SMOOTH`` in a row."""

    first: tuple[float, ...] = ()
    last: tuple[float, ...] = ()
    lowest: float | None = None

    def after(self, value: float) -> Track:
        """With one more value."""
        first = self.first if len(self.first) == START else (*self.first, value)
        last = (*self.last, value)[-WINDOW:]
        lowest = self.lowest
        if len(last) >= SMOOTH:
            mean = fmean(last[-SMOOTH:])
            lowest = mean if lowest is None else min(lowest, mean)
        return Track(first, last, lowest)

    @property
    def start(self) -> float | None:
        """Mean of the first ``START`` values; None before there are as many."""
        return fmean(self.first) if len(self.first) == START else None

    def mean(self, value: float, count: int) -> float | None:
        """Mean of the last ``count`` values, ``value`` being the newest; None where there are fewer."""
        values = (*self.last, value)[-count:]
        return fmean(values) if len(values) == count else None

    @property
    def noise(self) -> float:
        """Standard deviation of one value, by the median of the changes from each to the next: a trend, or a single
        leap, hardly counts. 0 before there are two."""
        changes = [abs(b - a) for a, b in pairwise(self.last)]
        return median(changes) / _MEDIAN_CHANGE if changes else 0.0


@dataclass(frozen=True)
class Past:
    """A run up to a step. ``tracks`` by metric; ``active``: the step at which a guard last found something; ``skips``:
    updates in a row that were not made."""

    tracks: Mapping[str, Track] = field(default_factory=dict)
    active: Mapping[str, int] = field(default_factory=dict)
    skips: int = 0

    def track(self, metric: str) -> Track:
        """Of a metric, empty where it never was."""
        return self.tracks.get(metric, Track())

    def in_episode(self, guard: str, step: int) -> bool:
        """Whether an alarm of ``guard`` at ``step`` belongs to one that was raised before."""
        return guard in self.active and step - self.active[guard] <= QUIET

    def after(self, step: int, row: Row, findings: Sequence[Finding]) -> Past:
        """With the row of ``step``. Numbers of a skipped update are no measure for later ones."""
        active = {**self.active, **{finding.guard: step for finding in findings}}
        if row.get("update/skipped"):
            return replace(self, active=active, skips=self.skips + 1)
        known = {name: float(row[name]) for name in TRACKED if name in row and math.isfinite(row[name])}
        tracks = {**self.tracks, **{name: self.track(name).after(value) for name, value in known.items()}}
        return Past(tracks, active)


def past_of(rows: Sequence[Row], config: GuardsConfig, *, per_step: int) -> Past:
    """The past that rows of metrics.jsonl tell. Rows without updates (step 0) say nothing."""
    past = Past()
    for row in rows:
        step = int(row["step"])
        if step > 0:
            past = past.after(step, row, judge(past, row, config, per_step=per_step))
    return past


def judge(past: Past, row: Row, config: GuardsConfig, *, per_step: int) -> list[Finding]:
    """What is beyond its threshold in ``row``, by every guard that is not off. ``per_step``: completions of a step.

    A row may hold a part of a step's metrics; what is not there is not judged.
    """
    findings = []
    for name, look in _LOOKS.items():
        if config.action(name) != "off":
            findings += look(config, past, row, per_step)
    return findings


def _reverse_kl(config: GuardsConfig, past: Past, row: Row, per_step: int) -> Iterator[Finding]:
    own, metric = config.reverse_kl, "reverse_kl/mean"
    track, value = past.track(metric), row.get(metric)
    if value is None:
        return
    steps = _steps(LEAST_COMPLETIONS, per_step)
    level = track.mean(value, steps)
    if level is not None and level > own.level:
        words = f"{metric} is {level:.3g} nats per token{_over(steps)}, above reverse_kl.level = {own.level:g}"
        yield Finding("reverse_kl", metric, level, own.level, words, CAUSES["level"])
    recent = track.mean(value, RECENT)
    if recent is not None and track.lowest is not None:
        noise = ERRORS * track.noise * math.sqrt(1 / RECENT + 1 / SMOOTH)
        limit = own.rise * max(track.lowest, 0.0) + own.slack + noise
        if recent > limit:
            words = (
                f"{metric} is {recent:.3g} nats per token{_over(RECENT)}, above {limit:.3g}: reverse_kl.rise = "
                f"{own.rise:g} times {track.lowest:.3g}, its lowest mean of {SMOOTH} steps, plus {own.slack:g} and "
                f"{noise:.3g} for its noise"
            )
            yield Finding("reverse_kl", metric, recent, limit, words, CAUSES["reverse_kl"])


def _entropy(config: GuardsConfig, past: Past, row: Row, per_step: int) -> Iterator[Finding]:
    own, metric = config.entropy, "entropy/sampled"
    start, recent = _start_and_recent(past, row, metric)
    if start is None or recent is None or _nearer(past, row):
        return
    rewarded = _reward_change(past, row)
    for name, factor, slack, sign in (("collapse", own.collapse, 0.0, -1), ("explosion", own.explosion, own.slack, 1)):
        limit = factor * start + slack
        # What pays is no fault; and a search that costs nothing is none either.
        excused = rewarded is not None and (rewarded[0] > 0 or (sign > 0 and rewarded[0] > -rewarded[1]))
        if sign * (recent - limit) > 0 and not excused:
            words = (
                f"{metric} is {recent:.3g} nats per token{_over(RECENT)}, {'above' if sign > 0 else 'below'} "
                f"{limit:.3g}: entropy.{name} = {factor:g} times {start:.3g} of the first {START} steps"
                f"{f', plus {slack:g}' if slack else ''}"
            )
            yield Finding("entropy", metric, recent, limit, words, CAUSES[name])


def _nearer(past: Past, row: Row) -> bool:
    """Whether the student has come clearly nearer to its teacher: that of a sure one becomes sure itself."""
    start, recent = _start_and_recent(past, row, "reverse_kl/mean")
    return start is not None and recent is not None and recent < max(start / 2, NEAR)


def _reward_change(past: Past, row: Row) -> tuple[float, float] | None:
    """(recent mean reward minus that of the start, what of it may be noise); None without rewards."""
    start, recent = _start_and_recent(past, row, "reward/mean")
    if start is None or recent is None:
        return None
    return recent - start, ERRORS * past.track("reward/mean").noise * math.sqrt(2 / RECENT)


def _length(config: GuardsConfig, past: Past, row: Row, per_step: int) -> Iterator[Finding]:
    metric, factor = "completion_length/mean", config.length.growth
    start, recent = _start_and_recent(past, row, metric)
    if start is not None and recent is not None and recent > (limit := factor * start):
        words = (
            f"{metric} is {recent:.4g} tokens{_over(RECENT)}, above {limit:.4g}: length.growth = {factor:g} times "
            f"{start:.4g} of the first {START} steps"
        )
        yield Finding("length", metric, recent, limit, words, CAUSES["length"])


def _truncated(config: GuardsConfig, past: Past, row: Row, per_step: int) -> Iterator[Finding]:
    yield from _share(past, row, "truncated", "truncated/share", config.truncated.rise)


def _repetition(config: GuardsConfig, past: Past, row: Row, per_step: int) -> Iterator[Finding]:
    yield from _share(past, row, "repetition", "repeated_4gram/share", config.repetition.rise)


def _share(past: Past, row: Row, guard: str, metric: str, rise: float) -> Iterator[Finding]:
    start, recent = _start_and_recent(past, row, metric)
    if start is not None and recent is not None and recent > (limit := start + rise):
        words = (
            f"{metric} is {recent:.3g}{_over(RECENT)}, above {limit:.3g}: {guard}.rise = {rise:g} plus {start:.3g} of "
            f"the first {START} steps"
        )
        yield Finding(guard, metric, recent, limit, words, CAUSES[guard])


def _ratio(config: GuardsConfig, past: Past, row: Row, per_step: int) -> Iterator[Finding]:
    own = config.ratio
    for name, limit, unit in (
        ("abs_log_mean", own.abs_log_mean, " nats per token"),
        ("outside_share", own.outside_share, " of the tokens"),
    ):
        value = row.get(f"ratio/{name}")
        if value is not None and value > limit:
            words = f"ratio/{name} is {value:.3g}{unit}, above ratio.{name} = {limit:g}"
            yield Finding("ratio", f"ratio/{name}", value, limit, words, CAUSES["ratio"])


def _gradient(config: GuardsConfig, past: Past, row: Row, per_step: int) -> Iterator[Finding]:
    metric, factor = "optim/grad_norm", config.gradient.factor
    value, known = row.get(metric), past.track(metric).last
    if value is None or not math.isfinite(value) or len(known) < LEAST_WINDOW:
        return
    largest = max(known)
    if 0 < factor * largest < value:
        words = (
            f"{metric} is {value:.3g}, above {factor * largest:.3g}: gradient.factor = {factor:g} times {largest:.3g}, "
            f"the largest of the last {len(known)} updates"
        )
        yield Finding("gradient", metric, value, factor * largest, words, CAUSES["gradient"])


def _nonfinite(config: GuardsConfig, past: Past, row: Row, per_step: int) -> Iterator[Finding]:
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield Finding("nonfinite", name, value, math.inf, f"{name} is {value}", CAUSES["nonfinite"])
            return
    if row.get("update/nonfinite"):
        words = "the loss or the gradient was not finite"
        yield Finding("nonfinite", "update/nonfinite", 1.0, 0.0, words, CAUSES["nonfinite"])


def _agreement(config: GuardsConfig, past: Past, row: Row, per_step: int) -> Iterator[Finding]:
    own = config.agreement
    everywhere = _rejected(past, row, "teacher/rejected_share", per_step)
    if everywhere is not None and everywhere[0] > own.anywhere:
        value, steps = everywhere
        words = (
            f"the teacher gives a probability below 0.001 to {value:.0%} of all tokens{_over(steps)}, "
            f"agreement.anywhere = {own.anywhere:g}"
        )
        yield Finding("agreement", "teacher/rejected_share", value, own.anywhere, words, CAUSES["level"])
        return
    finished = (1 - row.get("truncated/share", 0.0)) * per_step
    for place, limit, of, whose in (
        ("first", own.first, per_step, "first tokens"),
        ("end", own.end, finished, "last tokens of finished completions"),
    ):
        metric = f"teacher/rejected_{place}_share"
        found = _rejected(past, row, metric, per_step)
        # A few completions that end are no share.
        if found is not None and found[0] > limit and of * found[1] >= LEAST_FINISHED:
            value, steps = found
            words = (
                f"the teacher gives a probability below 0.001 to {value:.0%} of the {whose}{_over(steps)}, "
                f"agreement.{place} = {limit:g}"
            )
            yield Finding("agreement", metric, value, limit, words, CAUSES[place])


def _temperature(config: GuardsConfig, past: Past, row: Row, per_step: int) -> Iterator[Finding]:
    metric, apart = "teacher/temperature_ratio", config.temperature.apart
    value = row.get(metric)
    if value is None or abs(value - 1) <= apart:
        return
    limit = 1 + math.copysign(apart, value - 1)
    words = (
        f"{metric} is {value:.3g}: marks are those of teacher.model at {value:.3g} times the temperature that the "
        f"student samples at; temperature.apart = {apart:g}"
    )
    yield Finding("temperature", metric, value, limit, words, CAUSES["temperature"])


def _direction(config: GuardsConfig, past: Past, row: Row, per_step: int) -> Iterator[Finding]:
    metric, limit = "update/alignment", -config.direction.opposed
    value = row.get(metric)
    if value is not None and value < limit:
        words = (
            f"{metric} is {value:.3g}, below {limit:g} (direction.opposed): the update makes less likely what its "
            "advantages favour"
        )
        yield Finding("direction", metric, value, limit, words, CAUSES["direction"])


def _start_and_recent(past: Past, row: Row, metric: str) -> tuple[float | None, float | None]:
    value = row.get(metric)
    track = past.track(metric)
    return (None, None) if value is None else (track.start, track.mean(value, RECENT))


def _rejected(past: Past, row: Row, metric: str, per_step: int) -> tuple[float, int] | None:
    """(share, steps that it is the mean of), where there are enough completions."""
    value, steps = row.get(metric), _steps(LEAST_COMPLETIONS, per_step)
    mean = None if value is None else past.track(metric).mean(value, steps)
    return None if mean is None else (mean, steps)


def _steps(completions: int, per_step: int) -> int:
    """Steps that make so many completions."""
    return max(1, math.ceil(completions / max(1, per_step)))


def _over(steps: int) -> str:
    return "" if steps == 1 else f" over the last {steps} steps"


_LOOKS: Mapping[str, Callable[[GuardsConfig, Past, Row, int], Iterator[Finding]]] = {
    "nonfinite": _nonfinite,
    "agreement": _agreement,
    "temperature": _temperature,
    "direction": _direction,
    "reverse_kl": _reverse_kl,
    "entropy": _entropy,
    "length": _length,
    "truncated": _truncated,
    "repetition": _repetition,
    "ratio": _ratio,
    "gradient": _gradient,
}
TRACKED = (
    "reverse_kl/mean",
    "reward/mean",
    "entropy/sampled",
    "completion_length/mean",
    "truncated/share",
    "repeated_4gram/share",
    "optim/grad_norm",
    "teacher/rejected_share",
    "teacher/rejected_first_share",
    "teacher/rejected_end_share",
    "update/alignment",
)
"""Metrics that are remembered."""
CAUSES: Mapping[str, str] = {
    "level": "ids that mean other tokens to the teacher (another tokenizer, a shifted vocabulary), or a teacher that "
    "never saw such prompts",
    "reverse_kl": "a learning rate that is too high, a sign turned round, a loss with another gradient than it should "
    "have, or a teacher that changed",
    "collapse": "the student has settled on one way to write: a learning rate that is too high, or rewards without "
    "kl_coef",
    "explosion": "updates that push tokens down without pushing any up: a sign turned round, a loss whose expected "
    "gradient is zero, or a learning rate that is too high",
    "length": "an end token that the teacher does not know as one, or a teacher that writes longer than it should",
    "truncated": "an end token that the teacher does not know as one, or sampling.max_completion_tokens too low for "
    "what the teacher writes",
    "repetition": "an end token that the teacher does not know as one, or a learning rate that is too high",
    "ratio": "a sampler with other weights, another precision or another temperature than the trainer; top-p or top-k "
    "in a served sampler; completions much older than the weights",
    "gradient": "a few tokens that the teacher finds impossible (objective.signal_clip bounds them), or a learning "
    "rate that is too high",
    "nonfinite": "a teacher that gives a token probability zero where the student does not, or weights that overflowed "
    "(lower optim.learning_rate)",
    "first": "another chat template or thinking mode than the teacher was trained with, a missing or doubled begin "
    "token",
    "end": "another end token than the teacher's: compare sampling.stop_token_ids with its generation_config.json",
    "temperature": "a server that scores at a temperature of its own, or after processing its logits; a teacher that "
    "divides them itself",
    "direction": "the sign of the signal or of the loss, turned round between the advantages and the gradient",
}

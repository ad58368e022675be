"""[guards]: what is watched during a run, where an alarm begins, and what it does. Rules: docs/guards.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from understudy.config_base import Section

Action = Literal["off", "warn", "stop", "skip"]


class Guard(Section):
    """One guard's action."""

    action: Action = "warn"
    """off; warn: say so once per episode; stop: end the run, the last good update in a checkpoint, exit code 1; skip:
    do not make this step's update."""


class ReverseKlGuard(Guard):
    """The student moves away from its teacher, or is nowhere near it."""

    level: float = Field(default=8.0, gt=0)
    """Nats per token."""
    rise: float = Field(default=1.75, gt=1)
    """Mean of three steps, as a multiple of the lowest mean of five."""
    slack: float = Field(default=0.1, ge=0)
    """Nats per token that a rise may have on top of that."""


class EntropyGuard(Guard):
    """The student's entropy collapses or explodes."""

    collapse: float = Field(default=0.1, ge=0, lt=1)
    """Mean of three steps, as a multiple of that of the first three."""
    explosion: float = Field(default=2.0, gt=1)
    """The same, upwards."""
    slack: float = Field(default=0.05, ge=0)
    """Nats per token that an explosion may have on top of that."""


class LengthGuard(Guard):
    """Completions grow."""

    growth: float = Field(default=2.0, gt=1)
    """Mean of three steps, as a multiple of that of the first three."""


class TruncatedGuard(Guard):
    """Completions reach the length cap that did not before."""

    rise: float = Field(default=0.25, gt=0)
    """Mean share of three steps above that of the first three."""


class RepetitionGuard(Guard):
    """Completions repeat themselves."""

    rise: float = Field(default=0.2, gt=0)
    """Mean share of repeated 4-grams of three steps above that of the first three."""


class RatioGuard(Guard):
    """Sampler and trainer disagree about the same tokens."""

    abs_log_mean: float = Field(default=0.1, gt=0)
    """Mean of the absolute log-ratio, in nats."""
    outside_share: float = Field(default=0.3, gt=0)
    """Share of tokens with a ratio outside [0.9, 1.1]."""


class GradientGuard(Guard):
    """A gradient is far larger than those before it."""

    factor: float = Field(default=5.0, gt=1)
    """Norm before clipping, as a multiple of the largest of the last 50 updates (from the 21st on)."""


class NonfiniteGuard(Section):
    """A loss, a gradient, a mark or a metric is not a finite number."""

    action: Literal["stop", "skip"] = "stop"
    """As of the others; an update with such a number is never made. Marks that are not finite always stop the run."""


class AgreementGuard(Guard):
    """The teacher finds impossible (probability below 0.001) what the student writes at one place: another template
    shows at the first token, another end token at the last."""

    first: float = Field(default=0.8, gt=0, le=1)
    """Share of completions whose first token is impossible."""
    end: float = Field(default=0.8, gt=0, le=1)
    """Share of finished completions whose last token is."""
    anywhere: float = Field(default=0.8, gt=0, le=1)
    """Share of all tokens that are."""


class TemperatureGuard(Guard):
    """Marks are those of teacher.model at another temperature than the student samples at. Looked at in the first step,
    for teachers that are brought along or served while their weights (2 GiB at most) are at hand."""

    apart: float = Field(default=0.1, gt=0)
    """Largest distance of teacher/temperature_ratio from 1."""


class DirectionGuard(Section):
    """The first update makes less likely what its advantages favour: the sign of the signal, or of the loss, is
    wrong."""

    action: Literal["off", "warn", "stop"] = "warn"
    """As of the others; stop ends the run after the update that was looked at."""
    opposed: float = Field(default=0.1, ge=0, lt=1)
    """An alarm where update/alignment is below its negative."""


class GuardsConfig(Section):
    """What is watched during a run, and what an alarm does."""

    max_skips: int = Field(default=10, ge=1)
    """So many updates in a row may be skipped; one more stops the run."""
    reverse_kl: ReverseKlGuard = ReverseKlGuard()
    entropy: EntropyGuard = EntropyGuard()
    length: LengthGuard = LengthGuard()
    truncated: TruncatedGuard = TruncatedGuard()
    repetition: RepetitionGuard = RepetitionGuard()
    ratio: RatioGuard = RatioGuard()
    gradient: GradientGuard = GradientGuard()
    nonfinite: NonfiniteGuard = NonfiniteGuard()
    agreement: AgreementGuard = AgreementGuard()
    temperature: TemperatureGuard = TemperatureGuard()
    direction: DirectionGuard = DirectionGuard()

    def actions(self) -> Iterator[tuple[str, Action]]:
        """(guard, action) of each."""
        for name in type(self).model_fields:
            action = getattr(getattr(self, name), "action", None)
            if action is not None:
                yield name, action

    def action(self, guard: str) -> Action:
        """That of one guard."""
        return dict(self.actions())[guard]

"""What an alarm does: it is said once per episode and kept in guards.jsonl; an update is skipped, or the run stops."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from understudy.backends.protocols import Teacher, Trainer
from understudy.errors import ConfigError, GuardStop, first_line
from understudy.guards import CAUSES, Finding, Row, judge, past_of
from understudy.mark_temperature import NOISE, errors_by_ratio
from understudy.metrics import alignment, read_metrics, repeated_4grams, update_metrics
from understudy.rollout_store import rollouts_path
from understudy.runs import RunFolder
from understudy.teacher_scores import teacher_view
from understudy.types import LossOutput, ScoredRollout, TokenSequence, TrainingExample

if TYPE_CHECKING:
    from understudy.config import RunConfig
    from understudy.objectives import Objective
    from understudy.types import Batch

log = logging.getLogger("understudy")

# A teacher's name -> the model it is said to be, as a teacher of hidden states with a head; None where that is not at
# hand, or is the teacher itself.
WeightsOf = Callable[[str], Teacher | None]

_AFTER = {
    "stop": "The last good update goes into a checkpoint. Mend the cause and go on with --resume, which may also "
    "change [guards]; without a checkpoint it begins anew.",
    "made": "These weights are not kept. Mend the cause and go on from the last checkpoint with --resume.",
}
# Rollouts that a message names; those of each teacher that show its temperature; updates among which one is large
# enough to have a direction: the first ones, before momentum mixes them.
NAMED, PROBED, DIRECTED = 3, 4, 3


class GuardWatch:
    """The guards of one run: ``inspect`` before an update, ``refuses`` when its gradient is known, ``record`` after
    it. ``tell`` is called with every alarm as it is stored."""

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        tell: Callable[[Mapping[str, Any]], None],
        weights_of: WeightsOf | None = None,
    ) -> None:
        self._folder, self._config, self._guards, self._to_others = folder, config, config.guards, tell
        self._weights_of = weights_of or (lambda name: None)
        sampling = config.sampling
        self._per_step = sampling.group_size * sampling.groups_per_batch
        path = folder.metrics.path
        rows = read_metrics(path) if path.exists() else []
        self._past = past_of(rows, self._guards, per_step=self._per_step)
        self._begin(folder.first_step + 1)

    def _begin(self, step: int) -> None:
        """``step``: the number that the row of the coming update will have."""
        self._step = step
        self._scored: Sequence[ScoredRollout] = ()
        self._examples: Sequence[TrainingExample] = ()
        self._before: list[list[float]] = []
        self._probed: dict[str, float] = {}
        self._told: set[str] = set()
        self._skipping: set[str] = set()

    def inspect(
        self, row: Row, scored: Sequence[ScoredRollout], examples: Sequence[TrainingExample], trainer: Trainer
    ) -> None:
        """Judge what was written and marked, before the update. Raises GuardStop."""
        self._scored = scored
        self._probed = self._temperature() if self._step == 1 else {}
        self._act(self._judge({**row, **self._probed}))
        if self._looks_for_direction and all(map(_follows_advantages, examples)):
            self._examples, self._before = examples, _logprobs(trainer, examples)

    def completed(self, row: Row, trainer: Trainer) -> Row:
        """The row with what was found out about its marks and its update."""
        made = "optim/loss" in row and not row.get("update/skipped")
        if not made or not self._examples:
            return {**row, **self._probed}
        value = alignment(self._examples, self._before, _logprobs(trainer, self._examples))
        return {**row, **self._probed, **({} if value is None else {"update/alignment": value})}

    @property
    def _looks_for_direction(self) -> bool:
        unknown = self._step <= DIRECTED and not self._past.track("update/alignment").last
        return unknown and self._guards.direction.action != "off"

    def _temperature(self) -> dict[str, float]:
        """teacher/temperature_ratio, of several teachers the one that is farthest off."""
        if self._guards.temperature.action == "off":
            return {}
        ratios = [ratio for name in self._config.all_teachers if (ratio := self._temperature_ratio(name)) is not None]
        return {"teacher/temperature_ratio": max(ratios, key=lambda ratio: abs(math.log(ratio)))} if ratios else {}

    def _temperature_ratio(self, name: str) -> float | None:
        """None where the teacher's weights are not at hand, or give other marks at every temperature: that is another
        model, and may be meant."""
        own = [s for s in self._scored if s.rollout.prompt.teacher == name and s.scores is not None][:PROBED]
        try:
            weights = self._weights_of(name) if own else None
        except ConfigError as error:  # weights that the run itself does without are no reason to end it
            log.info("guard temperature: teacher %s is not looked at: %s", name, first_line(error))
            return None
        if weights is None:
            return None
        marks = [s.scores.teacher_logprobs for s in own if s.scores is not None]
        sequences = [teacher_view(s.rollout) for s in own]
        errors = errors_by_ratio(marks, weights, sequences, temperature=self._config.sampling.temperature)
        best = 1.0 if errors[1.0] <= NOISE else min(errors, key=lambda ratio: errors[ratio])
        return best if errors[best] <= NOISE else None

    def refuses(self, metrics: Row) -> bool:
        """Whether the update whose metrics these are is not to be made. Raises GuardStop."""
        self._act(self._judge(metrics))
        if not self._skipping:
            return False
        if self._past.skips >= self._guards.max_skips:
            names = ", ".join(sorted(self._skipping))
            raise GuardStop(
                f"step {self._step}: {self._past.skips} updates in a row were skipped, and guards ({names}) ask for "
                f"one more; guards.max_skips = {self._guards.max_skips}. {_AFTER['stop']}"
            )
        return True

    @property
    def skips_what_is_not_finite(self) -> bool:
        """Whether that is why the update at hand is refused."""
        return "nonfinite" in self._skipping

    def finite(self, row: Row) -> dict[str, Any]:
        """The row without numbers that are not finite, which only that of a skipped update may hold.

        Raises GuardStop for others: such numbers are in the weights.
        """
        known = {name: value for name, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        if len(known) < len(row) and not row.get("update/skipped"):
            name = next(name for name in row if name not in known)
            finding = Finding("nonfinite", name, row[name], math.inf, f"{name} is {row[name]}", CAUSES["nonfinite"])
            raise self._ruined(finding)
        return known

    def weights(self, step: int, trainer: Trainer) -> None:
        """Look at the weights after ``step`` before they are saved. Raises GuardStop where they are not finite."""
        if not weights_are_finite(trainer):
            self._begin(step)  # it is that step's update which ruined them
            words = "with the weights after its update, log-probabilities are not finite"
            raise self._ruined(Finding("nonfinite", "", math.nan, math.inf, words, CAUSES["nonfinite"]))

    def _ruined(self, finding: Finding) -> GuardStop:
        """What ends a run whose weights are lost."""
        self._tell(finding, "stop")
        return GuardStop(f"{self._message(finding)} {_AFTER['made']}", keeps=False)

    def record(self, row: Row) -> None:
        """Judge a whole row, and remember it. Raises GuardStop."""
        findings = self._judge(row)
        try:
            self._act(findings)
        finally:
            self._past = self._past.after(self._step, row, findings)
            self._begin(self._step + 1)

    def not_finite(self, error: Exception) -> None:
        """Keep what ended the run before there was a row to judge: a completion's log-probabilities, marks or a
        divergence that are not finite."""
        self._tell(Finding("nonfinite", "", math.inf, math.inf, str(error), CAUSES["nonfinite"]), "stop")

    def _judge(self, row: Row) -> list[Finding]:
        return judge(self._past, row, self._guards, per_step=self._per_step)

    def _act(self, findings: Sequence[Finding]) -> None:
        for finding in findings:
            action = self._guards.action(finding.guard)
            known = finding.guard in self._told or self._past.in_episode(finding.guard, self._step)
            if finding.guard not in self._told and (action == "stop" or not known):
                self._tell(finding, action)
            self._told.add(finding.guard)
            if action == "skip":
                self._skipping.add(finding.guard)
            elif action == "stop":
                raise GuardStop(f"{self._message(finding)} {_AFTER['stop']}")

    def _tell(self, finding: Finding, action: str) -> None:
        log.warning("%s", self._message(finding))
        alarm = {
            "step": self._step,
            "guard": finding.guard,
            "action": action,
            "metric": finding.metric,
            "value": finding.value if math.isfinite(finding.value) else None,
            "limit": finding.limit if math.isfinite(finding.limit) else None,
            "words": finding.words,
            "causes": finding.causes,
            "rollouts": self._rollouts(finding),
        }
        self._folder.alarms.append(alarm)
        self._to_others(alarm)

    def _message(self, finding: Finding) -> str:
        return (
            f"guard {finding.guard}, step {self._step}: {finding.words}. {_named(self._rollouts(finding))}Likely: "
            f"{finding.causes}."
        )

    def _rollouts(self, finding: Finding) -> list[dict[str, Any]]:
        """The rollouts of the step in which it shows most; ``file`` is None where they are not stored."""
        rank = _RANKS.get(finding.metric if finding.guard == "agreement" else finding.guard, _gap)
        ranks = [(rank(own), index) for index, own in enumerate(self._scored)]
        sign = 1 if finding.guard == "entropy" and finding.value < finding.limit else -1
        worst = sorted((sign * rank, index) for rank, index in ranks if rank is not None and math.isfinite(rank))
        return [self._place(index) for _, index in worst[:NAMED]]

    def _place(self, index: int) -> dict[str, Any]:
        config, written_by = self._config.rollouts, self._step - 1
        stored = index < config.per_step and written_by % config.every == 0
        file = rollouts_path(Path("rollouts"), written_by).as_posix() if stored else None
        return {"file": file, "index": index, "prompt_index": self._scored[index].rollout.prompt.index}


def weights_are_finite(trainer: Trainer) -> bool:
    """Whether they give a token a log-probability: what an update has ruined shows in any, at the price of one."""
    [logprobs] = trainer.compute_logprobs([TokenSequence([0], [0])])
    return all(map(math.isfinite, logprobs))


def _follows_advantages(own: TrainingExample) -> bool:
    """Whether a policy loss is all that the example teaches."""
    return own.advantages is not None and own.teacher_hidden is own.reference_hidden is own.topk_ids is None


def _logprobs(trainer: Trainer, examples: Sequence[TrainingExample]) -> list[list[float]]:
    return trainer.compute_logprobs([TokenSequence(own.prompt_ids, own.completion_ids) for own in examples])


def _named(rollouts: Sequence[Mapping[str, Any]]) -> str:
    if not rollouts:
        return ""
    stored = [place for place in rollouts if place["file"]]
    texts = []
    if stored:
        places = ", ".join(str(place["index"]) for place in stored)
        texts.append(f"{stored[0]['file']}, number {places} (from 0)")
    if others := [str(place["prompt_index"]) for place in rollouts if not place["file"]]:
        texts.append(f"the answers to prompts {', '.join(others)} (not stored: rollouts.every, rollouts.per_step)")
    return f"Most in {', and in '.join(texts)}. "


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _gap(scored: ScoredRollout) -> float | None:
    """Mean of log p - log q."""
    if scored.scores is None:
        return None
    return _mean(scored.rollout.sampler_logprobs) - _mean(scored.scores.teacher_logprobs)


_RANKS: Mapping[str, Callable[[ScoredRollout], float | None]] = {
    "entropy": lambda own: -_mean(own.rollout.sampler_logprobs),
    "length": lambda own: len(own.rollout.completion_ids),
    "truncated": lambda own: len(own.rollout.completion_ids) if own.rollout.finish_reason == "length" else None,
    "repetition": lambda own: repeated_4grams(own.rollout.completion_ids) / len(own.rollout.completion_ids),
    # These belong to no completion in particular.
    "ratio": lambda own: None,
    "temperature": lambda own: None,
    "direction": lambda own: None,
    "teacher/rejected_first_share": lambda own: own.scores and -own.scores.teacher_logprobs[0],
    "teacher/rejected_end_share": lambda own: (
        own.scores and -own.scores.teacher_logprobs[-1] if own.rollout.finish_reason == "stop" else None
    ),
}


class GuardedTrainer:
    """A trainer whose updates the guards look at before they are made; the rest is ``trainer``'s own."""

    def __init__(self, trainer: Trainer, watch: GuardWatch) -> None:
        self._trainer, self._watch = trainer, watch
        self._window = _Window()

    def forward_backward(self, batch: Batch, objective: Objective) -> LossOutput:
        """See ``Trainer.forward_backward``. Numbers that are not finite end the run here, or leave the step's update
        out."""
        output = self._trainer.forward_backward(batch, objective)
        loss = float(output.loss)
        if not all(map(math.isfinite, (loss, *output.metrics.values()))):
            self._window.refused |= self._watch.refuses({"optim/loss": loss if not math.isfinite(loss) else math.nan})
            output = LossOutput(torch.zeros_like(output.loss), {})
        self._window.add(output, batch.num_tokens)
        return output

    def optimizer_step(self, *, learning_rate: float, divisor: int) -> Mapping[str, float]:
        """See ``Trainer.optimizer_step``. Of an update that is skipped: {"skipped": 1, ...}."""
        window, self._window = self._window, _Window()
        norm = None if window.refused else self._trainer.gradient_norm(divisor=divisor)
        row = window.row() | ({} if norm is None else {"optim/grad_norm": norm})
        if not window.refused and not self._watch.refuses(row):
            return self._trainer.optimizer_step(learning_rate=learning_rate, divisor=divisor)
        self._trainer.discard_gradients()
        if self._watch.skips_what_is_not_finite:
            return {"skipped": 1.0, "nonfinite": 1.0}
        return {"skipped": 1.0} | ({} if norm is None else {"grad_norm": norm})

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """See ``Trainer.compute_logprobs``."""
        return self._trainer.compute_logprobs(sequences)

    def topk_ids(self, sequences: Sequence[TokenSequence], k: int) -> list[Sequence[Sequence[int]]]:
        """See ``Trainer.topk_ids``."""
        return self._trainer.topk_ids(sequences, k)

    def gradient_norm(self, *, divisor: int) -> float | None:
        """See ``Trainer.gradient_norm``."""
        return self._trainer.gradient_norm(divisor=divisor)

    def discard_gradients(self) -> None:
        """See ``Trainer.discard_gradients``."""
        self._window = _Window()
        self._trainer.discard_gradients()

    def state_dict(self) -> dict[str, Any]:
        """See ``Trainer.state_dict``."""
        return self._trainer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Trainer.load_state_dict``."""
        self._trainer.load_state_dict(state)

    def save_pretrained(self, folder: Path) -> None:
        """See ``Trainer.save_pretrained``."""
        self._trainer.save_pretrained(folder)


class _Window:
    """What the micro-batches of one update add up to."""

    def __init__(self) -> None:
        self.refused = False
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._tokens = 0

    def add(self, output: LossOutput, tokens: int) -> None:
        self._tokens += tokens
        for name, value in output.metrics.items():
            if not name.endswith("_max"):
                self._sums[name] += value

    def row(self) -> dict[str, float]:
        """Token means under their public names."""
        return update_metrics({name: value / max(1, self._tokens) for name, value in self._sums.items()})

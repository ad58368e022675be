"""Everything a step leaves behind: metrics, evaluations, kept rollouts, checkpoints, progress, and whether to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from understudy.backends.protocols import Teacher, Trainer
from understudy.checkpoints import checkpoint_path
from understudy.errors import NonFiniteError, ServerUnavailable, UnderstudyError
from understudy.guard_actions import GuardedTrainer, GuardWatch, WeightsOf, weights_are_finite
from understudy.live.follow import title_of
from understudy.next_tokens import NextTokens, next_tokens, next_tokens_of
from understudy.progress import StepProgress
from understudy.rollout_store import rollout_record
from understudy.runs import RunFolder
from understudy.stopping import StopRequest
from understudy.teacher_scores import score_reachable
from understudy.tokenization import ModelText
from understudy.trackers import Trackers
from understudy.types import (
    HiddenScores,
    Rollout,
    ScoredRollout,
    Scores,
    TokenSequence,
    TopkScores,
    TrainingExample,
)

if TYPE_CHECKING:
    from understudy.backends.local import LocalTeacher
    from understudy.config import RunConfig


class Recorder:
    """The loops' only door to disk and screen. ``evaluate`` returns eval/... metrics of the current weights;
    ``marker`` has the trainer's weights, and gives its log-probabilities; ``weights_of`` is for the guards."""

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        *,
        trainer: Trainer,
        teachers: Mapping[str, Teacher],
        student: ModelText,
        evaluate: Callable[[], Mapping[str, float]],
        stop: StopRequest,
        trackers: Trackers,
        may_be_away: frozenset[str] = frozenset(),
        marker: LocalTeacher | None = None,
        weights_of: WeightsOf | None = None,
        quiet: bool = False,
    ) -> None:
        self._folder, self._config, self._trainer, self._teachers = folder, config, trainer, teachers
        self._student, self._evaluate, self._stop = student, evaluate, stop
        self._trackers, self._may_be_away, self._marker = trackers, may_be_away, marker
        self._watch = GuardWatch(folder, config, self._tell, weights_of)
        self.first_step = folder.first_step
        self.last_step = folder.first_step
        self.last_row: dict[str, Any] = folder.last_row()
        self.interrupted_at: int | None = None
        self._sent = folder.first_step
        self._progress = StepProgress(
            folder.method,
            first_step=self.first_step,
            num_steps=config.optim.num_steps,
            quiet=quiet,
            title=title_of(folder.path, folder.method),
            history=folder.rows(),
            alarm=folder.last_alarm(),
            stop=stop,
        )

    def start(self) -> None:
        """Begin to show and to track; evaluate the untrained student, once per run, or the student that a run could not
        evaluate before it ended."""
        rows = self._folder.rows() if self._folder.checkpoint else []
        self._trackers.start(rows[:-1] if self._folder.owes_evaluation else rows)  # every row once, and whole
        self._progress.start()
        if self._folder.checkpoint is None and self._config.evaluation.tasks:
            with self._progress.saying("evaluating"):
                measured = self._evaluate()
            with self._stop.whole():
                row = self._folder.record(0, measured)
            self._show(row)
        elif self._folder.owes_evaluation:
            self._amend()
            self._show(self.last_row)

    def _show(self, row: Mapping[str, Any]) -> None:
        """A row that is whole, its evaluation in it."""
        self._progress.update(row)
        self._trackers.log(row)
        self._sent = row["step"]

    def _tell(self, alarm: Mapping[str, Any]) -> None:
        self._progress.show_alarm(alarm)
        self._trackers.log_alarm(alarm)

    def guarded(self, trainer: Trainer) -> Trainer:
        """``trainer``, whose updates the guards look at first."""
        return GuardedTrainer(trainer, self._watch)

    def inspect(
        self, row: Mapping[str, Any], scored: Sequence[ScoredRollout], examples: Sequence[TrainingExample]
    ) -> None:
        """Let the guards see what was written and marked. Raises GuardStop, before anything is learnt from it."""
        self._watch.inspect(row, scored, examples, self._trainer)

    def record(self, step: int, row: Mapping[str, Any]) -> None:
        """Log an update as soon as it is made. From here on the run can go on after it, whatever fails next.

        Raises GuardStop, with the row in place.
        """
        self._stop.hold()  # as it has been since the update, where one was made
        row = self._watch.finite(self._watch.completed(row, self._trainer))
        self.last_row, self.last_step = self._folder.record(step, row), step
        self._watch.record(row)
        self._stop.release()

    def finish_step(self) -> Literal["go on", "stop"]:
        """Evaluate when due, save when due or asked to stop. Raises GuardStop for weights that are no numbers."""
        step, config = self.last_step, self._config
        last = step == config.optim.num_steps
        if self._folder.evaluation_is_due(step):
            self._amend()
        self._show(self.last_row)
        if last or self._stop.requested or step % config.checkpoints.every == 0:
            self._save()
        if self._stop.requested and not last:
            self.interrupted_at = step
            return "stop"
        return "go on"

    def save_after(self, error: UnderstudyError) -> int | None:
        """``save_last_update``, where the weights are still those of the last good update; else None."""
        if isinstance(error, NonFiniteError):
            self._watch.not_finite(error)
        # A loss is also NaN where an update before it has ruined the weights.
        if not getattr(error, "keeps", True) or not weights_are_finite(self._trainer):
            return None
        return self.save_last_update()

    def save_last_update(self) -> int:
        """Put the last update into a checkpoint, where it is not in one yet. Returns the step to go on after."""
        if (
            self.last_step > self.first_step
            and not checkpoint_path(self._folder.checkpoints_path, self.last_step).exists()
        ):
            self._save()
        return self.last_step

    def _amend(self) -> None:
        """Evaluate, and add what was found to the newest row."""
        with self._progress.saying("evaluating"):
            measured = self._evaluate()
        with self._stop.whole():
            self.last_row = self._folder.amend(measured)

    def _save(self) -> None:
        self._watch.weights(self.last_step, self._trainer)
        start = time.perf_counter()
        with self._progress.saying("saving a checkpoint"), self._stop.whole():
            self._folder.save_checkpoint(self.last_step, self._trainer, self._student.tokenizer)
            self._stop.saved_in(time.perf_counter() - start)

    def keep_rollouts(self, step: int, scored: Sequence[ScoredRollout], examples: Sequence[TrainingExample]) -> None:
        """Store the first few of a step's rollouts with all log-probabilities, before the step changes the weights."""
        config = self._config.rollouts
        if config.per_step == 0 or (step % config.every and step != self._config.optim.num_steps):
            return
        kept = list(scored[: config.per_step])
        alternatives: Sequence[Any] = [None] * len(kept)
        if topk := self._alternatives():
            alternatives = self._alternatives_of([s.rollout for s in kept], topk)
        logprobs, student = self._student_marks([s.rollout for s in kept])
        columns = zip(kept, examples[: len(kept)], logprobs, student, alternatives, strict=True)
        records = [
            self._record(step, number % self._config.sampling.group_size, *column)
            for number, column in enumerate(columns)
        ]
        self._folder.save_rollouts(step, records)
        if records:
            self._progress.show_sample(records[0])
            self._trackers.log_samples(step, records)

    def _student_marks(
        self, rollouts: Sequence[Rollout]
    ) -> tuple[Sequence[Sequence[float]], Sequence[NextTokens | None]]:
        """The trainer's log-probabilities, and the student's next tokens where its weights are at hand."""
        sequences = [TokenSequence(rollout.prompt.prompt_ids, rollout.completion_ids) for rollout in rollouts]
        if self._marker is None:
            return self._trainer.compute_logprobs(sequences), [None] * len(sequences)
        return next_tokens_of(self._marker, sequences, topk=self._config.rollouts.topk)

    def _teacher_entropy(self, scored: ScoredRollout) -> Sequence[float] | None:
        """Where the step has the teacher's hidden states: nothing is asked for it."""
        if not isinstance(scored.scores, HiddenScores):
            return None
        teacher: Any = self._teachers[scored.rollout.prompt.teacher]
        temperature = self._config.sampling.temperature
        return next_tokens(teacher.head, scored.scores.teacher_hidden, topk=0, temperature=temperature).entropy

    def _alternatives_of(self, rollouts: Sequence[Rollout], topk: int) -> Sequence[Scores | None]:
        """None for those of a teacher that is away, and may be: what pages show stops no run."""
        try:
            return score_reachable(self._teachers, rollouts, "topk", topk=topk, may_be_away=self._may_be_away)
        except ServerUnavailable:
            if not {rollout.prompt.teacher for rollout in rollouts} <= self._may_be_away:
                raise
            return [None] * len(rollouts)

    def _alternatives(self) -> int:
        """How many every teacher can offer, of those wanted."""
        if not self._teachers or not all("topk" in teacher.kinds for teacher in self._teachers.values()):
            return 0
        wanted = self._config.rollouts.topk
        return min(wanted, *(getattr(teacher, "max_topk", None) or wanted for teacher in self._teachers.values()))

    def _record(
        self,
        step: int,
        sample_index: int,
        scored: ScoredRollout,
        example: TrainingExample,
        trainer_logprobs: Sequence[float],
        student: NextTokens | None,
        alternatives: Scores | None,
    ) -> dict[str, Any]:
        return rollout_record(
            scored,
            step=step,
            sample_index=sample_index,
            tokens=self._student.tokens,
            text=self._student.tokenizer.decode(list(scored.rollout.completion_ids), skip_special_tokens=True),
            trainer_logprobs=trainer_logprobs,
            advantages=example.advantages,
            loss_mask=example.loss_mask,
            alternatives=alternatives if isinstance(alternatives, TopkScores) else None,
            student=student,
            teacher_entropy=self._teacher_entropy(scored),
        )

    def close(self) -> None:
        """End the display. An update that the run ended after is sent to the trackers, unless it is evaluated on
        --resume: they get every row once."""
        if self.last_step > self._sent and not self._folder.evaluation_is_due(self.last_step):
            self._trackers.log(self.last_row)
        self._progress.close()

"""The on-policy loop. Distillation, outcome-reward RL and their mixture differ only in what ``parts`` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import chain

from understudy.advantages import training_examples
from understudy.assembly import Parts
from understudy.metrics import rollout_metrics, update_metrics
from understudy.optimizer_step import learning_rate_at
from understudy.overlap import ahead
from understudy.recorder import Recorder
from understudy.rewards import grade_rollouts
from understudy.rollouts import sample_rollouts, step_seed, within_lag
from understudy.teacher_scores import score_reachable, score_reference
from understudy.types import Prompt, Rollout, ScoredRollout, Scores, TokenSequence, TrainingExample
from understudy.updates import Updates
from understudy.weight_sync import sync_weights

Marked = tuple[Sequence[ScoredRollout], Sequence[TrainingExample], Mapping[str, float]]


def on_policy_loop(parts: Parts, recorder: Recorder) -> None:
    """Sample, score, update; once per step until ``optim.num_steps`` or a request to stop."""
    config = parts.config

    def write(step: int) -> tuple[int, list[Rollout]]:
        return step, sample(parts, parts.prompts_at(step), seed=step_seed(config.seed, step))

    def mark(written: tuple[int, list[Rollout]]) -> Marked:
        rollouts, ages = within_lag(written[1], written[0], config.sampling)
        scored, examples = score(parts, rollouts)
        return scored, examples, {**ages, **rollout_metrics(scored, config.objective, num_written=len(rollouts))}

    steps = range(recorder.first_step, config.optim.num_steps)
    updates = Updates(parts.trainer, parts.batching)
    lag = config.sampling.max_policy_lag
    with closing(ahead(steps, [write, mark], lag=lag, cancel=parts.cancel)) as marked:
        for step, (scored, examples, row) in marked:
            recorder.keep_rollouts(step, scored, examples)
            recorder.inspect(row, scored, examples)

            # 4. One optimizer step over all of them, in micro-batches.
            rate, reduction = learning_rate_at(config.optim, step), config.objective.reduction
            if examples:  # none where the teacher of all these prompts is away
                update = updates.make(examples, parts.objective, learning_rate=rate, reduction=reduction)
                row = {"optim/learning_rate": rate, **row, **update_metrics(update)}
            recorder.record(step + 1, row)
            sync_weights(parts.sampler, policy_version=step + 1)
            if recorder.finish_step() == "stop":
                return


def sample(parts: Parts, prompts: Sequence[Prompt], *, seed: int) -> list[Rollout]:
    """1. The student writes, with the log-probability it gives each token; group after group."""
    return list(chain.from_iterable(sample_rollouts(parts.sampler, prompts, parts.config.training_sampling, seed=seed)))


def score(parts: Parts, rollouts: Sequence[Rollout]) -> tuple[list[ScoredRollout], list[TrainingExample]]:
    """Marked rollouts, and what they teach. Those whose teacher is away are left out where that is allowed."""
    # 2. The teacher marks every token; a grader, if there is one, the whole answer.
    nothing, needs = [None] * len(rollouts), parts.needs
    scores = _teacher_scores(parts, rollouts) if parts.teachers else nothing
    rewards = grade_rollouts(rollouts, parts.grader, parts.decode) if parts.grader else nothing
    reference = score_reference(parts.reference, rollouts, needs.reference) if parts.reference else nothing
    scored = [ScoredRollout(*columns) for columns in zip(rollouts, scores, rewards, reference, strict=True)]
    scored = [s for s in scored if s.scores is not None or not parts.teachers]

    # 3. advantages = -(sampler_logprobs - teacher_logprobs), plus rewards centred on their group.
    size = parts.config.sampling.group_size
    return scored, training_examples([scored[i : i + size] for i in range(0, len(scored), size)], parts.credit)


def _teacher_scores(parts: Parts, rollouts: Sequence[Rollout]) -> list[Scores | None]:
    needs, ids = parts.needs, None
    if needs.teacher == "chosen":
        written = [TokenSequence(rollout.prompt.prompt_ids, rollout.completion_ids) for rollout in rollouts]
        ids = parts.trainer.topk_ids(written, needs.topk)
    return score_reachable(
        parts.teachers, rollouts, needs.teacher, topk=needs.topk, ids=ids, may_be_away=parts.may_be_away
    )

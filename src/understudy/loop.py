"""The on-policy loop. Distillation, outcome-reward RL and their mixture differ only in what ``parts`` holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from understudy.advantages import training_examples
from understudy.assembly import Parts
from understudy.batching import micro_batches
from understudy.metrics import rollout_metrics, update_metrics
from understudy.optimizer_step import learning_rate_at, optimizer_step
from understudy.recorder import Recorder
from understudy.rewards import grade_rollouts
from understudy.rollouts import sample_rollouts, step_seed
from understudy.teacher_scores import score_reference, score_rollouts
from understudy.types import Prompt, ScoredRollout, TrainingExample
from understudy.weight_sync import sync_weights


def on_policy_loop(parts: Parts, recorder: Recorder) -> None:
    """Sample, score, update; once per step until ``optim.num_steps`` or a request to stop."""
    config = parts.config
    for step in range(recorder.first_step, config.optim.num_steps):
        scored, examples = sample_and_score(parts, parts.prompts_at(step), seed=step_seed(config.seed, step))
        recorder.keep_rollouts(step, scored, examples)

        batches = micro_batches(examples, **parts.batching)
        learning_rate = learning_rate_at(config.optim, step)
        update = optimizer_step(
            parts.trainer, batches, parts.objective, learning_rate=learning_rate, reduction=config.objective.reduction
        )
        sync_weights(parts.sampler, policy_version=step + 1)

        row = {
            "optim/learning_rate": learning_rate,
            **rollout_metrics(scored, config.objective),
            **update_metrics(update),
        }
        if recorder.finish_step(step + 1, row) == "stop":
            return


def sample_and_score(
    parts: Parts, prompts: Sequence[Prompt], *, seed: int
) -> tuple[list[ScoredRollout], list[TrainingExample]]:
    """One step's rollouts with their marks, and what they teach."""
    # 1. The student writes, with the log-probability it gives each token.
    groups = sample_rollouts(parts.sampler, prompts, parts.config.training_sampling, seed=seed)
    rollouts = list(chain.from_iterable(groups))

    # 2. The teacher marks every token; a grader, if there is one, the whole answer.
    nothing = [None] * len(rollouts)
    needs = parts.needs
    scores = score_rollouts(parts.teachers, rollouts, needs.teacher, topk=needs.topk) if parts.teachers else nothing
    rewards = grade_rollouts(rollouts, parts.grader, parts.decode) if parts.grader else nothing
    reference = score_reference(parts.reference, rollouts, needs.reference) if parts.reference else nothing
    scored = [ScoredRollout(*columns) for columns in zip(rollouts, scores, rewards, reference, strict=True)]

    # 3. advantages = -(sampler_logprobs - teacher_logprobs), plus rewards centred on their group.
    size = parts.config.sampling.group_size
    examples = training_examples([scored[i : i + size] for i in range(0, len(scored), size)], parts.credit)
    return scored, examples

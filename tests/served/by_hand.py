"""On-policy distillation written down step by step, without the loop: what runs are compared with to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from understudy import RunConfig
from understudy.advantages import training_examples
from understudy.assembly import Given, assemble
from understudy.batching import micro_batches
from understudy.costs import CostLedger
from understudy.optimizer_step import optimizer_step
from understudy.preflight import check_run
from understudy.rollouts import sample_rollouts, step_seed
from understudy.teacher_scores import score_rollouts
from understudy.types import Rollout, ScoredRollout

# (step, place of its group in the step, rollout) -> whether it trains
Kept = Callable[[int, int, Rollout], bool]


def vector(file: Path) -> torch.Tensor:
    """All weights of a safetensors file in one row."""
    tensors = load_file(file)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def weights(run: Path, step: int) -> torch.Tensor:
    return vector(run / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def trained_by_hand(
    config: RunConfig, folder: Path, *, lag: int = 0, kept: Kept = lambda step, place, rollout: True
) -> torch.Tensor:
    """The weights after all steps, of which step s was written by the weights after max(0, s - lag) updates.

    For the sampled estimator, a linear warm-up and nothing after it. ``folder``: where the weights are written.
    """
    parts = assemble(config, check_run(config, "distill"), CostLedger(), checkpoint=None, given=Given())
    optim, sampling = config.optim, config.sampling
    assert optim.schedule == "constant"
    with parts.connections:
        parts.sampler.set_policy_version(0)
        written: list[list[list[Rollout]]] = []
        for step in range(optim.num_steps):
            for number in range(len(written), min(step + lag + 1, optim.num_steps)):
                seed = step_seed(config.seed, number)
                written.append(sample_rollouts(parts.sampler, parts.prompts_at(number), sampling, seed=seed))
            groups = [[r for r in group if kept(step, place, r)] for place, group in enumerate(written[step])]
            marked = [
                [
                    ScoredRollout(rollout, scores, None, None)
                    for rollout, scores in zip(group, score_rollouts(parts.teachers, group, "sampled"), strict=True)
                ]
                for group in groups
                if group
            ]
            optimizer_step(
                parts.trainer,
                micro_batches(training_examples(marked, parts.credit), **parts.batching),
                parts.objective,
                learning_rate=optim.learning_rate * min(1.0, (step + 1) / max(1, optim.warmup_steps)),
            )
            parts.sampler.set_policy_version(step + 1)
        folder.mkdir()
        parts.trainer.save_pretrained(folder)
    return vector(folder / "model.safetensors")

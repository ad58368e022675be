"""Prompt -> groups of Rollout: ask the sampler, check what comes back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from understudy.backends.protocols import Sampler
from understudy.config import SamplingConfig
from understudy.errors import RunError
from understudy.types import Prompt, Rollout


def step_seed(seed: int, step: int) -> int:
    """The sampler's seed at a step, so that a resumed run draws what the uninterrupted one would have drawn."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


def sample_rollouts(
    sampler: Sampler, prompts: Sequence[Prompt], sampling: SamplingConfig, *, seed: int
) -> list[list[Rollout]]:
    """``sampling.group_size`` rollouts per prompt. Raises RunError for completions that could not be trained on."""
    groups = sampler.sample(prompts, sampling, seed=seed)
    for prompt, group in zip(prompts, groups, strict=True):
        for rollout in group:
            if not rollout.completion_ids or not all(map(math.isfinite, rollout.sampler_logprobs)):
                raise RunError(
                    f"the sampler returned {len(rollout.completion_ids)} tokens with log-probabilities "
                    f"{list(rollout.sampler_logprobs)[:5]} for prompt {prompt.index}; expected at least one token and "
                    "finite values. A model whose weights have become NaN does this: resume from an earlier checkpoint "
                    "with a lower optim.learning_rate"
                )
    return groups

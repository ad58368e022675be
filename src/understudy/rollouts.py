"""Prompt -> groups of Rollout: ask the sampler, check what comes back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from understudy.backends.protocols import Sampler
from understudy.config import SamplingConfig
from understudy.errors import NonFiniteError, RunError
from understudy.types import Prompt, Rollout


def step_seed(seed: int, step: int) -> int:
    """The sampler's seed at a step, so that a resumed run draws what the uninterrupted one would have drawn."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


def sample_rollouts(
    sampler: Sampler, prompts: Sequence[Prompt], sampling: SamplingConfig, *, seed: int
) -> list[list[Rollout]]:
    """``sampling.group_size`` rollouts per prompt. Raises RunError for completions that could not be trained on, of
    these NonFiniteError for log-probabilities that are not finite."""
    groups = sampler.sample(prompts, sampling, seed=seed)
    for prompt, group in zip(prompts, groups, strict=True):
        for rollout in group:
            finite = all(map(math.isfinite, rollout.sampler_logprobs))
            if not rollout.completion_ids or not finite:
                kind = RunError if finite else NonFiniteError
                raise kind(
                    f"the sampler returned {len(rollout.completion_ids)} tokens with log-probabilities "
                    f"{list(rollout.sampler_logprobs)[:5]} for prompt {prompt.index}; expected at least one token and "
                    "finite values. A model whose weights have become NaN does this: lower optim.learning_rate in a "
                    "new run"
                )
    return groups


def within_lag(
    rollouts: Sequence[Rollout], step: int, sampling: SamplingConfig
) -> tuple[list[Rollout], dict[str, float]]:
    """What step ``step`` trains on, and how old it is: policy_lag/... in updates, of all rollouts.

    A rollout is as old as the oldest weights that wrote a part of it. Those older than ``sampling.max_policy_lag`` stay
    with ``stale = "correct"``; with "drop" their whole groups go. Nothing is said of age where none is allowed and none
    is found.

    Raises:
        RunError: nothing is left; or some are to be corrected in a run whose objective takes all for its own weights'.
    """
    ages = [step - rollout.policy_version_start for rollout in rollouts]
    stale = [age > sampling.max_policy_lag for age in ages]
    if sampling.max_policy_lag == 0 and not any(ages):
        return list(rollouts), {}
    if sampling.max_policy_lag == 0 and sampling.stale == "correct":
        raise RunError(
            f"step {step}: the sampler wrote with weights up to {max(ages)} updates old; with sampling.max_policy_lag "
            '= 0 nothing corrects for that. Set it to 1 or more, or sampling.stale = "drop"; --resume takes either'
        )
    size = sampling.group_size
    dropped = [sampling.stale == "drop" and any(stale[i - i % size :][:size]) for i in range(len(rollouts))]
    kept = [rollout for rollout, drop in zip(rollouts, dropped, strict=True) if not drop]
    if not kept:
        raise RunError(
            f"step {step}: every group holds a completion that is older than {sampling.max_policy_lag} updates, up to "
            f'{max(ages)}; raise sampling.max_policy_lag, or set sampling.stale = "correct"'
        )
    corrected = sum(old and not drop for old, drop in zip(stale, dropped, strict=True))
    return kept, {
        "policy_lag/mean": sum(ages) / len(ages),
        "policy_lag/max": float(max(ages)),
        "policy_lag/corrected_share": corrected / len(ages),
        "policy_lag/dropped_share": sum(dropped) / len(ages),
    }

"""Trainer -> sampler: the sampler writes the next rollouts with the new weights."""

from __future__ import annotations

from understudy.backends.protocols import Sampler


def sync_weights(sampler: Sampler, *, policy_version: int) -> None:
    """Stamp the version. An in-process sampler shares the trainer's weights, or refreshes its copy of them now."""
    sampler.set_policy_version(policy_version)

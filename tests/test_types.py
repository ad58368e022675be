"""The data that travels through a step."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from tiny import prompt_of, rollout_of
from understudy.types import Batch, Rollout


def test_a_rollout_has_one_logprob_per_token() -> None:
    with pytest.raises(ValueError, match="prompt 7: got 2 sampler_logprobs for 3 completion tokens"):
        Rollout(prompt_of([1], 7), [1, 2, 0], [-1.0, -2.0], "stop", 0, 0)


def test_nothing_changes_after_it_was_made() -> None:
    rollout = rollout_of(prompt_of([1]), [2, 0], [-1.0, -2.0])
    with pytest.raises(FrozenInstanceError):
        rollout.completion_ids = [3]  # pyright: ignore[reportAttributeAccessIssue]


def test_a_batch_counts_the_tokens_that_train() -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    mask = torch.tensor([True, False, True])
    batch = Batch(
        ids, None, ids[0, :3], ids[0, :3], mask, None, None, None, "default", sequence_tokens=4, num_sequences=1
    )
    assert batch.num_tokens == 2

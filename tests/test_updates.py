"""Updates that run out of memory are made again in smaller micro-batches: the same maths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tiny import tiny_model, trainer_of
from understudy.backends.local import LocalTrainer
from understudy.errors import RunError
from understudy.objectives import CrossEntropy, Objective
from understudy.types import Batch, LossOutput, TrainingExample
from understudy.updates import Updates

# Of 3 to 9 tokens; padded to blocks of at most 40 tokens they make two micro-batches.
EXAMPLES = [
    TrainingExample([1, 2], [1 + (i + t) % 5 for t in range(1 + i % 7)], [True] * (1 + i % 7)) for i in range(8)
]


class Cramped:
    """A trainer on a device that holds ``most`` tokens, padding included; it notices at the end of the backward pass,
    when the gradient is there."""

    def __init__(self, trainer: LocalTrainer, most: int) -> None:
        self.trainer, self.most = trainer, most
        self.sizes: list[int] = []

    def forward_backward(self, batch: Batch, objective: Objective) -> LossOutput:
        self.sizes.append(batch.input_ids.numel())
        output = self.trainer.forward_backward(batch, objective)
        if batch.input_ids.numel() > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return output

    def optimizer_step(self, *, learning_rate: float, divisor: int) -> Mapping[str, float]:
        return self.trainer.optimizer_step(learning_rate=learning_rate, divisor=divisor)

    def discard_gradients(self) -> None:
        self.trainer.discard_gradients()


def weights(trainer: LocalTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.model.parameters()])


def updated(most: int, tokens: int, *, times: int = 2) -> tuple[Cramped, list[Mapping[str, float]]]:
    trainer: Any = Cramped(trainer_of(tiny_model(seed=5, dtype=torch.float32)), most)
    updates = Updates(trainer, {"micro_batch_tokens": tokens})
    return trainer, [updates.make(EXAMPLES, CrossEntropy(), learning_rate=1e-2) for _ in range(times)]


@pytest.mark.parametrize(("most", "tokens", "fitting"), [(40, 72, 36), (20, 72, 18), (10, 72, 9), (9, 10**6, 7)])
def test_what_does_not_fit_is_done_again_in_smaller_pieces(
    most: int, tokens: int, fitting: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit what a run that began with the smaller size does, in the update that failed and in the next one."""
    cramped, found = updated(most, tokens)
    small, expected = updated(10**9, fitting)
    assert found == expected
    assert torch.equal(weights(cramped.trainer), weights(small.trainer))
    failed = [size for size in cramped.sizes if size > most]
    assert failed
    assert len(caplog.messages) == len(failed)  # each attempt ends at its first batch that does not fit
    assert f"set optim.micro_batch_tokens = {fitting}" in caplog.messages[-1]
    # The second update begins with what fitted.
    assert max(cramped.sizes[-len(small.sizes) // 2 :]) <= most


def test_the_split_changes_float_noise_alone() -> None:
    """Against one large batch, sums are taken in another order: a few times float32's 6e-8 of the weights."""
    cramped, found = updated(10, 72, times=1)
    whole, expected = updated(10**9, 72, times=1)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert float((weights(cramped.trainer) - weights(whole.trainer)).abs().max()) < 1e-6


def test_a_sequence_that_does_not_fit_ends_the_run() -> None:
    trainer: Any = Cramped(trainer_of(tiny_model(seed=5)), 4)
    before = weights(trainer.trainer).clone()
    with pytest.raises(RunError, match=r"single sequences of up to 9 tokens; lower sampling.max_completion_tokens"):
        Updates(trainer, {"micro_batch_tokens": 72}).make(EXAMPLES, CrossEntropy(), learning_rate=1e-2)
    assert torch.equal(weights(trainer.trainer), before)


def test_other_errors_are_not_tried_again() -> None:
    class Broken(Cramped):
        def forward_backward(self, batch: Batch, objective: Objective) -> LossOutput:
            self.sizes.append(1)
            raise RuntimeError("size mismatch")

    trainer: Any = Broken(trainer_of(tiny_model(seed=5)), 4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Updates(trainer, {"micro_batch_tokens": 72}).make(EXAMPLES, CrossEntropy(), learning_rate=1e-2)
    assert trainer.sizes == [1]

"""Sums over micro-batches, one division, and the learning rate's schedule."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from tiny import gradient_of, prompt_of, rollout_of, tiny_model, trainer_of
from understudy.advantages import CreditRules, training_examples
from understudy.batching import micro_batches
from understudy.config import OptimConfig
from understudy.errors import RunError
from understudy.objectives import CrossEntropy, Objective, PolicyGradient
from understudy.optimizer_step import learning_rate_at, optimizer_step
from understudy.types import Batch, LossOutput, SampledScores, ScoredRollout, TrainingExample


class Told:
    """A trainer that reports what it was told to and remembers what was asked."""

    def __init__(self, *outputs: tuple[float, Mapping[str, float]]) -> None:
        self.outputs = list(outputs)
        self.steps: list[tuple[float, int]] = []

    def forward_backward(self, batch: Batch, objective: Objective) -> LossOutput:
        loss, metrics = self.outputs.pop(0)
        return LossOutput(torch.tensor(loss, dtype=torch.float64), metrics)

    def optimizer_step(self, *, learning_rate: float, divisor: int) -> dict[str, float]:
        self.steps.append((learning_rate, divisor))
        return {"grad_norm": 0.25}


def batch(trained: int, masked: int = 0) -> Batch:
    ids = torch.zeros(trained + masked, dtype=torch.long)
    mask = torch.tensor([True] * trained + [False] * masked)
    return Batch(ids[None], None, ids, ids, mask, None, None, None, "default", sequence_tokens=9, num_sequences=1)


def step(trainer: Any, *batches: Batch) -> Mapping[str, float]:
    return optimizer_step(trainer, batches, CrossEntropy(), learning_rate=0.1)


def test_token_means_over_the_window_not_means_of_means() -> None:
    trainer = Told((6.0, {"kl": 1.0, "ratio_max": 2.0}), (2.0, {"kl": 3.0, "ratio_max": 1.5}))
    result = step(trainer, batch(3, masked=2), batch(1))
    assert result == {"loss": 2.0, "kl": 1.0, "ratio_max": 2.0, "grad_norm": 0.25, "tokens": 4}
    assert trainer.steps == [(0.1, 4)]


def test_maxima_may_be_negative() -> None:
    assert step(Told((1.0, {"x_max": -3.0}), (1.0, {"x_max": -2.0})), batch(1), batch(1))["x_max"] == -2.0


def test_nothing_to_train_is_an_error() -> None:
    trainer = Told((1.0, {}))
    with pytest.raises(RunError, match="every loss_mask is empty"):
        step(trainer, batch(0, masked=3))
    assert trainer.steps == []


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_an_error_and_moves_nothing(loss: float) -> None:
    trainer = Told((1.0, {}), (loss, {}))
    with pytest.raises(RunError, match="the loss is") as error:
        step(trainer, batch(1), batch(1))
    assert "a teacher that gives a token probability zero where the student does not" in str(error.value)
    assert "weights that overflowed" in str(error.value)
    assert trainer.steps == []


@pytest.mark.parametrize(
    ("reduction", "divisor", "loss"), [("token_mean", 6, 2.0), ("sum", 1, 12.0), ("sequence_mean", 3, 4.0)]
)
def test_the_divisor_of_each_reduction(reduction: Any, divisor: int, loss: float) -> None:
    """Six tokens of three completions; metrics other than the loss stay token means."""
    trainer = Told((8.0, {"kl": 3.0}), (4.0, {"kl": 9.0}))
    batches = [replace(batch(4, masked=1), num_sequences=2), batch(2)]
    result = optimizer_step(trainer, batches, CrossEntropy(), learning_rate=0.1, reduction=reduction)  # type: ignore[arg-type]
    assert trainer.steps == [(0.1, divisor)]
    assert (result["loss"], result["kl"], result["tokens"]) == (loss, 2.0, 6)


# Eight sequences of different lengths; the sixth has a token left out, and the seventh trains on none.
LENGTHS = (1, 3, 2, 5, 4, 2, 3, 1)


def examples(reduction: str) -> list[TrainingExample]:
    completions = [[1 + (i + t) % 5 for t in range(length)] for i, length in enumerate(LENGTHS)]
    completions[5][0], completions[6] = 0, [0, 0, 0]
    rollouts = [rollout_of(prompt_of([1 + i % 4, 2]), ids, [-1.0] * len(ids)) for i, ids in enumerate(completions)]
    rules = CreditRules(sequence_mean=reduction == "sequence_mean", kl_coef=0.5, masked_ids=frozenset({0}))
    scores = [SampledScores([-0.5 - t - i / 4 for t in range(length)]) for i, length in enumerate(LENGTHS)]
    scored = [[ScoredRollout(*columns, None)] for columns in zip(rollouts, scores, strict=True)]
    return training_examples(scored, rules)


def stepped(reduction: Any, count: int) -> tuple[Mapping[str, float], torch.Tensor]:
    """One step of ``count`` micro-batches of the eight sequences, and the weights after it."""
    trainer = trainer_of(tiny_model(seed=5), grad_clip=0.0)
    given = examples(reduction)
    size = len(given) // count
    batches = [
        one
        for start in range(0, len(given), size)
        for one in micro_batches(given[start : start + size], micro_batch_tokens=10**6, dtype=torch.float64)
    ]
    assert len(batches) == count
    result = optimizer_step(trainer, batches, PolicyGradient(), learning_rate=1e-3, reduction=reduction)
    return result, torch.cat([p.detach().flatten() for p in trainer.model.model.parameters()])


@pytest.mark.parametrize("reduction", ["token_mean", "sum", "sequence_mean"])
def test_reductions_do_not_depend_on_micro_batching(reduction: str) -> None:
    """4 x 2 = 1 x 8, for gradient, weights and numbers."""
    whole, weights = stepped(reduction, 1)
    for count in (2, 4, 8):
        split, other = stepped(reduction, count)
        assert split == pytest.approx(whole, rel=1e-6)  # float32 metrics
        assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-9)
        torch.testing.assert_close(other, weights, rtol=0, atol=1e-9)


def test_reductions_by_hand() -> None:
    """The gradient of each completion on its own, put together as each reduction says."""
    model = tiny_model(seed=5)
    singles, counts = [], []
    for one in examples("token_mean"):
        trainer = trainer_of(model)
        [alone] = micro_batches([one], micro_batch_tokens=99, dtype=torch.float64)
        trainer.forward_backward(alone, PolicyGradient())
        singles.append(gradient_of(trainer))
        counts.append(sum(one.loss_mask))
    assert counts == [1, 3, 2, 5, 4, 1, 0, 1]
    by_hand = {
        "token_mean": sum(singles) / 17,
        "sum": sum(singles),
        # every completion that trains weighs the same; the one that does not is not counted
        "sequence_mean": sum(g / n for g, n in zip(singles, counts, strict=True) if n) / 7,
    }
    for reduction, expected in by_hand.items():
        result, _ = stepped(reduction, 2)
        assert isinstance(expected, torch.Tensor)
        assert result["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-9)


def rates(steps: range, **options: Any) -> list[float]:
    optim = OptimConfig(learning_rate=0.8, num_steps=8, **options)
    return [learning_rate_at(optim, step) for step in steps]


def test_constant_rate_after_linear_warm_up() -> None:
    assert rates(range(3)) == [0.8] * 3
    assert rates(range(6), warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_linear_rate() -> None:
    assert rates(range(9), schedule="linear") == pytest.approx([0.8 - 0.1 * i for i in range(8)] + [0.0])
    # from 0.8 to 0.2 over the 4 steps after warm-up, and no further
    with_floor = rates(range(10), schedule="linear", warmup_steps=4, final_fraction=0.25)
    assert with_floor == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.65, 0.5, 0.35, 0.2, 0.2])


def test_cosine_rate() -> None:
    half = math.sqrt(0.5)
    expected = [0.8, 0.4 * (1 + half), 0.4, 0.4 * (1 - half), 0.0]
    assert rates(range(0, 9, 2), schedule="cosine") == pytest.approx(expected)
    floor = [0.4 + value / 2 for value in expected]
    assert rates(range(0, 9, 2), schedule="cosine", final_fraction=0.5) == pytest.approx(floor)
    assert rates(range(2), schedule="cosine", warmup_steps=2) == pytest.approx([0.4, 0.8])


def test_warm_up_may_outlast_the_run() -> None:
    assert rates(range(8), schedule="cosine", warmup_steps=16)[-1] == pytest.approx(0.4)

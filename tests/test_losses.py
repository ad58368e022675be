"""Losses and divergences, with numbers worked out by hand."""

import math

import pytest
import torch

from understudy.losses import cross_entropy_loss, distribution_divergence, importance_sampling_loss

INF = float("inf")


def test_importance_sampling_by_hand() -> None:
    trainer = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    sampler = torch.tensor([-1.0, -2.0 - math.log(2), -0.5 + math.log(4)])  # ratios 1, 2, 1/4
    output = importance_sampling_loss(trainer, sampler, torch.tensor([3.0, -1.0, 8.0]), torch.tensor([True] * 3))
    assert output.loss.item() == pytest.approx(-(3.0 - 2.0 + 2.0))
    output.loss.backward()
    assert trainer.grad is not None
    assert trainer.grad.tolist() == pytest.approx([-3.0, 2.0, -2.0])  # -ratio * advantage
    assert output.metrics == pytest.approx(
        {"ratio": 3.25, "ratio_max": 2.0, "abs_log_ratio": 3 * math.log(2), "abs_log_ratio_max": 2 * math.log(2)}
    )


def test_gradient_flows_through_the_trainer_alone() -> None:
    trainer, sampler, advantages = (torch.tensor([-1.0, -2.0], requires_grad=True) for _ in range(3))
    importance_sampling_loss(trainer, sampler, advantages, torch.tensor([True, True])).loss.backward()
    assert sampler.grad is None
    assert advantages.grad is None


@pytest.mark.parametrize("garbage", [INF, -INF, math.nan, -1e30, 0.0])
def test_masked_entries_do_not_exist(garbage: float) -> None:
    """Neither in values nor in gradients, nor in metrics, whatever a placeholder holds."""
    mask = torch.tensor([True, False])
    trainer = torch.tensor([-1.0, -3.0], requires_grad=True)
    sampler, advantages = torch.tensor([-1.0, garbage]), torch.tensor([2.0, garbage])
    output = importance_sampling_loss(trainer, sampler, advantages, mask)
    output.loss.backward()
    assert output.loss.item() == -2.0
    assert trainer.grad is not None
    assert trainer.grad.tolist() == [-2.0, 0.0]
    assert output.metrics == {"ratio": 1.0, "ratio_max": 1.0, "abs_log_ratio": 0.0, "abs_log_ratio_max": 0.0}

    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.stack([torch.full((4,), 0.25).log(), torch.full((4,), garbage)])
    divergence = distribution_divergence(logits.log_softmax(-1), teacher, mask)
    divergence.loss.backward()
    assert logits.grad is not None
    assert logits.grad[1].tolist() == [0.0] * 4
    assert torch.isfinite(logits.grad).all()
    assert divergence.loss.item() == pytest.approx(math.log(4) - divergence.metrics["student_entropy"], rel=1e-5)
    assert divergence.metrics["teacher_entropy"] == pytest.approx(math.log(4))


def test_the_largest_ratio_is_that_of_a_trained_token() -> None:
    trainer, sampler = torch.tensor([-2.0, -1.0]), torch.tensor([-2.0 + math.log(4), -1.0])  # 1/4, and 1 masked
    output = importance_sampling_loss(trainer, sampler, torch.ones(2), torch.tensor([True, False]))
    assert output.metrics == pytest.approx(
        {"ratio": 0.25, "ratio_max": 0.25, "abs_log_ratio": math.log(4), "abs_log_ratio_max": math.log(4)}
    )


def test_nothing_to_train_is_zero() -> None:
    empty = torch.zeros(0)
    output = importance_sampling_loss(empty, empty, empty, torch.zeros(0, dtype=torch.bool))
    assert output.loss.item() == 0.0
    assert set(output.metrics.values()) == {0.0}


def test_cross_entropy_and_reductions() -> None:
    logprobs, mask = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True), torch.tensor([True, False, True])
    assert cross_entropy_loss(logprobs, mask).loss.item() == 5.0
    mean = cross_entropy_loss(logprobs, mask, reduction="mean").loss
    assert mean.item() == 2.5
    mean.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-0.5, 0.0, -0.5]
    sampler, advantages = torch.tensor([-1.0, -9.0, -4.0]), torch.tensor([1.0, 9.0, 2.0])
    assert importance_sampling_loss(logprobs, sampler, advantages, mask, reduction="mean").loss.item() == -1.5


def test_reverse_kl_by_hand() -> None:
    """(1/2, 1/2) against (1/4, 3/4): ln 2 / 2 + ln (2/3) / 2. The other direction would be 0.1308."""
    student = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.25, 0.75], [0.9, 0.1]], dtype=torch.float64).log()
    output = distribution_divergence(student, teacher, torch.tensor([True, True]))
    assert output.loss.item() == pytest.approx(0.1438410362258904, rel=1e-12)
    entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert output.metrics == pytest.approx(
        {
            "reverse_kl_full": 0.14384103622589042,
            "student_entropy": math.log(2) + entropy,
            "teacher_entropy": 0.25 * math.log(4) + 0.75 * math.log(4 / 3) + entropy,
        },
        rel=1e-6,
    )
    masked = distribution_divergence(student, teacher, torch.tensor([False, True]))
    assert masked.loss.item() == 0.0
    assert distribution_divergence(student, teacher, torch.tensor([True, True]), reduction="mean").loss.item() == (
        pytest.approx(0.1438410362258904 / 2, rel=1e-12)
    )


def test_reverse_kl_gradient_is_the_derivative_of_its_value() -> None:
    """By logits: p * (gap - KL), and by finite differences."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher = torch.randn(1, 6, dtype=torch.float64, generator=generator).log_softmax(-1)
    mask = torch.tensor([True])
    loss = distribution_divergence(logits.log_softmax(-1), teacher, mask).loss
    loss.backward()
    p = logits.detach().softmax(-1)
    expected = p * (p.log() - teacher - loss.detach())
    torch.testing.assert_close(logits.grad, expected)

    def value(x: torch.Tensor) -> float:
        return float(distribution_divergence(x.log_softmax(-1), teacher, mask).loss)

    step = 1e-6 * torch.eye(6, dtype=torch.float64)
    slopes = [(value(logits.detach() + d) - value(logits.detach() - d)) / 2e-6 for d in step]
    assert slopes == pytest.approx(expected[0].tolist(), abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reverse_kl_of_equals_is_exactly_nothing(dtype: torch.dtype) -> None:
    logits = 5 * torch.randn(7, 50, dtype=dtype, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    logprobs = logits.log_softmax(-1)
    loss = distribution_divergence(logprobs, logprobs.detach().clone(), torch.ones(7, dtype=torch.bool)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.count_nonzero(logits.grad) == 0


def test_tokens_the_student_cannot_write_cost_nothing() -> None:
    """-inf student entries, where the teacher's is finite or -inf too; no NaN in the value, gradient or entropies."""
    logits = torch.tensor([[0.0, -INF, -INF, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.25, 0.25, 0.0, 0.5]]).log()
    output = distribution_divergence(logits.log_softmax(-1), teacher, torch.tensor([True]))
    assert output.loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(1))
    assert output.metrics["student_entropy"] == pytest.approx(math.log(2))
    assert output.metrics["teacher_entropy"] == pytest.approx(1.5 * math.log(2))
    output.loss.backward()
    kl = 0.5 * math.log(2)
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([0.5 * (math.log(2) - kl), 0.0, 0.0, 0.5 * (0 - kl)])


def test_a_token_the_teacher_rules_out_is_infinitely_bad() -> None:
    output = distribution_divergence(
        torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log(), torch.tensor([True])
    )
    assert output.loss.item() == INF  # the step then refuses it: see optimizer_step

"""Policy losses and cross-entropy, with numbers worked out by hand; what the sampled estimators of the literature have
for an expected gradient. Divergences: the hand-made cases here, the rest in ``test_divergences.py``."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from understudy.errors import ZeroProbabilityError
from understudy.losses import (
    cispo_loss,
    cross_entropy_loss,
    distribution_divergence,
    importance_sampling_loss,
    ppo_loss,
)
from understudy.types import LossOutput

INF = float("inf")
POLICY_LOSSES = (importance_sampling_loss, ppo_loss, cispo_loss)
each_loss = pytest.mark.parametrize("policy_loss", POLICY_LOSSES)
properties = settings(deadline=None, max_examples=60, derandomize=True)


def slope_of(output: LossOutput, leaf: Tensor) -> Tensor:
    [gradient] = torch.autograd.grad(output.loss, leaf)
    return gradient


def test_importance_sampling_by_hand() -> None:
    trainer = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    sampler = torch.tensor([-1.0, -2.0 - math.log(2), -0.5 + math.log(4)])  # ratios 1, 2, 1/4
    output = importance_sampling_loss(trainer, sampler, torch.tensor([3.0, -1.0, 8.0]), torch.tensor([True] * 3))
    assert output.loss.item() == pytest.approx(-(3.0 - 2.0 + 2.0))
    output.loss.backward()
    assert trainer.grad is not None
    assert trainer.grad.tolist() == pytest.approx([-3.0, 2.0, -2.0])  # -ratio * advantage
    assert output.metrics == pytest.approx(
        {
            "ratio": 3.25,
            "ratio_max": 2.0,
            "abs_log_ratio": 3 * math.log(2),
            "abs_log_ratio_max": 2 * math.log(2),
            "ratio_outside": 2.0,
            "ratio_tail": 1.0,
        }
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
    assert output.metrics == {
        "ratio": 1.0,
        "ratio_max": 1.0,
        "abs_log_ratio": 0.0,
        "abs_log_ratio_max": 0.0,
        "ratio_outside": 0.0,
        "ratio_tail": 0.0,
    }

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
        {
            "ratio": 0.25,
            "ratio_max": 0.25,
            "abs_log_ratio": math.log(4),
            "abs_log_ratio_max": math.log(4),
            "ratio_outside": 1.0,
            "ratio_tail": 1.0,
        }
    )


def test_shares_of_ratios_far_from_one() -> None:
    """Outside [0.9, 1.1], and beyond a nat, masked tokens left out."""
    log_ratios = torch.tensor([0.09, -0.1, 0.1, -0.11, 0.99, -1.01, 5.0])
    mask = torch.tensor([True] * 6 + [False])
    zeros = torch.zeros(7)
    metrics = importance_sampling_loss(log_ratios, zeros, zeros, mask).metrics
    # exp(0.09) = 1.094, exp(-0.1) = 0.905, exp(0.1) = 1.105, exp(-0.11) = 0.896
    assert (metrics["ratio_outside"], metrics["ratio_tail"]) == (4.0, 1.0)


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


def test_a_token_the_teacher_rules_out_is_refused() -> None:
    with pytest.raises(ZeroProbabilityError, match="position 0: the teacher gives token 1 probability zero"):
        distribution_divergence(
            torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log(), torch.tensor([True])
        )


# Clips and bands. Six tokens: log p is -1 to -6, their ratios and advantages below; 0.25 and 4 are past every clip,
# in the direction their advantage wants (4 up, 0.25 down) and in the other.

RATIOS = [4.0, 4.0, 0.25, 0.25, 1.1, 0.9]
CREDITS = [3.0, -3.0, 2.0, -2.0, 1.0, -1.0]


def six_tokens(policy_loss: Callable[..., LossOutput], **options: Any) -> tuple[list[float], list[float], float]:
    """Every token's loss, one at a time, their gradients, and how many count as clipped."""
    trainer = -torch.arange(1, 7, dtype=torch.float64).requires_grad_()
    sampler = trainer.detach() - torch.tensor(RATIOS, dtype=torch.float64).log()
    credits = torch.tensor(CREDITS, dtype=torch.float64)
    output = policy_loss(trainer, sampler, credits, torch.ones(6, dtype=torch.bool), **options)
    one_each = torch.eye(6, dtype=torch.bool)
    losses = [policy_loss(trainer, sampler, credits, mask, **options).loss.item() for mask in one_each]
    assert output.loss.item() == pytest.approx(sum(losses), rel=1e-12)
    return losses, slope_of(output, trainer).tolist(), output.metrics.get("ratio_clipped", math.nan)


def test_importance_sampling_off_policy_weighs_by_the_ratio() -> None:
    losses, slopes, clipped = six_tokens(importance_sampling_loss)
    assert losses == pytest.approx([-12.0, 12.0, -0.5, 0.5, -1.1, 0.9])
    assert slopes == pytest.approx([-12.0, 12.0, -0.5, 0.5, -1.1, 0.9])
    assert math.isnan(clipped)  # nothing is clipped, so nothing is reported


def test_truncation_caps_the_weight_of_a_tokens_gradient() -> None:
    losses, slopes, clipped = six_tokens(importance_sampling_loss, max_importance_ratio=2.0)
    assert losses == pytest.approx([-6.0, 6.0, -0.5, 0.5, -1.1, 0.9])
    assert slopes == pytest.approx([-6.0, 6.0, -0.5, 0.5, -1.1, 0.9])
    assert clipped == 2


def test_the_band_leaves_tokens_outside_it_out() -> None:
    losses, slopes, clipped = six_tokens(importance_sampling_loss, importance_band=(0.5, 2.0))
    assert losses == pytest.approx([0.0, 0.0, 0.0, 0.0, -1.1, 0.9])
    assert slopes == pytest.approx([0.0, 0.0, 0.0, 0.0, -1.1, 0.9])
    assert clipped == 4


def test_truncation_and_band_together_count_every_touched_token_once() -> None:
    """The band looks at the ratio before truncation: 4 is inside (0.5, 5) and then counts 2."""
    losses, slopes, clipped = six_tokens(importance_sampling_loss, max_importance_ratio=2.0, importance_band=(0.5, 5.0))
    assert losses == pytest.approx([-6.0, 6.0, 0.0, 0.0, -1.1, 0.9])
    assert slopes == pytest.approx([-6.0, 6.0, 0.0, 0.0, -1.1, 0.9])
    assert clipped == 4
    _, slopes, clipped = six_tokens(importance_sampling_loss, max_importance_ratio=2.0, importance_band=(0.2, 3.0))
    assert slopes == pytest.approx([0.0, 0.0, -0.5, 0.5, -1.1, 0.9])
    assert clipped == 2


def test_ppo_holds_tokens_that_have_gone_far_enough_where_their_advantage_sends_them() -> None:
    losses, slopes, clipped = six_tokens(ppo_loss, clip_low=0.2, clip_high=0.5)
    assert losses == pytest.approx([-4.5, 12.0, -0.5, 1.6, -1.1, 0.9])
    assert slopes == pytest.approx([0.0, 12.0, -0.5, 0.0, -1.1, 0.9])
    assert clipped == 2


def test_cispo_clips_weights_and_keeps_every_tokens_gradient() -> None:
    losses, slopes, clipped = six_tokens(cispo_loss, clip_low=0.2, clip_high=0.5)
    weights = [1.5, 1.5, 0.8, 0.8, 1.1, 0.9]
    assert slopes == pytest.approx([-w * a for w, a in zip(weights, CREDITS, strict=True)])
    assert losses == pytest.approx([w * a * (n + 1) for n, (w, a) in enumerate(zip(weights, CREDITS, strict=True))])
    assert clipped == 4


def test_the_edges_of_clips_and_band_are_inside_them() -> None:
    """Ratios of exactly 1/2 and 2."""
    trainer = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    ratios = torch.tensor([0.5, 0.5, 2.0, 2.0], dtype=torch.float64)
    sampler = -torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64) * math.log(2)
    assert torch.equal((trainer - sampler).exp().detach(), ratios)
    inputs = (trainer, sampler, torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([True] * 4))
    for output in (
        importance_sampling_loss(*inputs, max_importance_ratio=2.0),
        importance_sampling_loss(*inputs, importance_band=(0.5, 2.0)),
        ppo_loss(*inputs, clip_low=0.5, clip_high=1.0),
        cispo_loss(*inputs, clip_low=0.5, clip_high=1.0),
    ):
        assert slope_of(output, trainer).tolist() == [-0.5, 0.5, -2.0, 2.0]
        assert output.metrics["ratio_clipped"] == 0


@each_loss
def test_on_policy_every_policy_loss_has_the_reinforce_gradient(policy_loss: Callable[..., LossOutput]) -> None:
    trainer = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    credits = torch.tensor([2.0, -0.5, 0.0])
    output = policy_loss(trainer, trainer.detach().clone(), credits, torch.tensor([True] * 3))
    assert slope_of(output, trainer).tolist() == [-2.0, 0.5, 0.0]
    assert output.metrics["ratio"] == 3
    assert output.metrics.get("ratio_clipped", 0.0) == 0


def test_a_ratio_that_overflows_does_not_reach_a_gradient_that_ignores_it() -> None:
    """exp(1000) is infinite: held by PPO, capped by truncation, left out by the band, clipped by CISPO."""
    trainer = torch.tensor([-1.0], requires_grad=True)
    inputs = (trainer, torch.tensor([-1001.0]), torch.tensor([3.0]), torch.tensor([True]))
    for policy_loss, loss, slope in ((ppo_loss, -3.6, 0.0), (cispo_loss, 3.6, -3.6)):
        output = policy_loss(*inputs)
        assert output.loss.item() == pytest.approx(loss)
        assert slope_of(output, trainer).item() == pytest.approx(slope)
    output = importance_sampling_loss(*inputs, max_importance_ratio=2.0)
    assert (output.loss.item(), slope_of(output, trainer).item()) == (-6.0, -6.0)
    output = importance_sampling_loss(*inputs, importance_band=(0.5, 2.0))
    assert (output.loss.item(), slope_of(output, trainer).item()) == (0.0, 0.0)


def policy_token(name: str, log_p: float, log_mu: float, credit: float, low: float, high: float) -> tuple[float, float]:
    """One token's loss and its derivative by log p, by the textbook; ``low`` and ``high`` are the ratio's bounds."""
    ratio = math.exp(log_p - log_mu)
    capped = min(max(ratio, low), high)
    return {
        "plain": (-ratio * credit, -ratio * credit),
        "truncated": (-min(ratio, high) * credit, -min(ratio, high) * credit),
        "banded": (-ratio * credit, -ratio * credit) if low <= ratio <= high else (0.0, 0.0),
        "ppo": (-capped * credit, 0.0) if capped * credit < ratio * credit else (-ratio * credit, -ratio * credit),
        "cispo": (-capped * credit * log_p, -capped * credit),
    }[name]


tokens = st.lists(
    st.tuples(
        st.floats(-9, -0.01), st.floats(-2, 2), st.floats(-5, 5), st.booleans(), st.sampled_from([0.0, 0.5, 3.0])
    ),
    min_size=1,
    max_size=8,
)


@settings(properties, max_examples=200)
@given(tokens, st.floats(0.05, 0.9), st.floats(0.05, 3.0), st.sampled_from(["sum", "mean"]))
def test_policy_losses_are_the_textbooks_token_by_token(
    rows: list[tuple[float, float, float, bool, float]], clip_low: float, clip_high: float, reduction: Any
) -> None:
    low, high = 1 - clip_low, 1 + clip_high
    clips = {"clip_low": clip_low, "clip_high": clip_high}
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    (trainer, drift, credits), mask, weights = columns[:3], columns[3].bool(), columns[4]
    sampler = trainer - drift
    count = max(int(mask.sum()), 1) if reduction == "mean" else 1
    losses: dict[str, tuple[Callable[..., LossOutput], dict[str, Any]]] = {
        "plain": (importance_sampling_loss, {}),
        "truncated": (importance_sampling_loss, {"max_importance_ratio": high}),
        "banded": (importance_sampling_loss, {"importance_band": (low, high)}),
        "ppo": (ppo_loss, clips),
        "cispo": (cispo_loss, clips),
    }
    for name, (policy_loss, options) in losses.items():
        leaf = trainer.clone().requires_grad_()
        output = policy_loss(leaf, sampler, credits, mask, weights=weights, reduction=reduction, **options)
        numbers = zip(trainer.tolist(), sampler.tolist(), credits.tolist(), strict=True)
        expected = [policy_token(name, *row, low, high) for row in numbers]
        shares = (mask * weights / count).tolist()
        total = sum(share * value for share, (value, _) in zip(shares, expected, strict=True))
        assert output.loss.item() == pytest.approx(total, rel=1e-11, abs=1e-11)
        slopes = [share * slope for share, (_, slope) in zip(shares, expected, strict=True)]
        assert slope_of(output, leaf).tolist() == pytest.approx(slopes, rel=1e-11, abs=1e-13)


def test_policy_gradients_are_the_numerical_derivatives_of_their_values() -> None:
    """Where the value carries its own slope: the plain ratio and PPO, away from PPO's corners."""
    generator = torch.Generator().manual_seed(0)
    trainer, drift, credits = (torch.randn(50, dtype=torch.float64, generator=generator) for _ in range(3))
    mask = torch.ones(50, dtype=torch.bool)
    for policy_loss in (importance_sampling_loss, ppo_loss):
        leaf = trainer.clone().requires_grad_()
        output = policy_loss(leaf, trainer - 0.3 * drift, credits, mask)
        step = 1e-6 * torch.eye(50, dtype=torch.float64)
        values = [
            [policy_loss(trainer + sign * d, trainer - 0.3 * drift, credits, mask).loss for sign in (1, -1)]
            for d in step
        ]
        slopes = [float(up - down) / 2e-6 for up, down in values]
        assert slope_of(output, leaf).tolist() == pytest.approx(slopes, abs=1e-7)


def test_ratio_metrics_are_those_of_the_trained_tokens() -> None:
    trainer = torch.tensor([0.0, 0.0, 0.0, -INF])
    sampler = -torch.tensor([1.0, 4.0, 0.25, 1.0]).log()
    sampler[3] = math.nan
    mask = torch.tensor([True, True, True, False])
    for policy_loss in (ppo_loss, cispo_loss):
        metrics = policy_loss(trainer, sampler, torch.tensor([1.0, 1.0, -1.0, math.nan]), mask).metrics
        assert metrics == pytest.approx(
            {
                "ratio": 5.25,
                "ratio_max": 4.0,
                "abs_log_ratio": 2 * math.log(4),
                "abs_log_ratio_max": math.log(4),
                "ratio_outside": 2.0,
                "ratio_tail": 2.0,
                "ratio_clipped": 2.0,
            }
        )


@each_loss
@pytest.mark.parametrize("garbage", [INF, -INF, math.nan, -1e30])
def test_masked_tokens_do_not_exist_for_any_policy_loss(policy_loss: Callable[..., LossOutput], garbage: float) -> None:
    """To the last bit, weights included."""
    mask = torch.tensor([True, False, True])
    clean = [torch.tensor(x) for x in ([-1.0, -2.0, -3.0], [-1.1, -2.0, -2.9], [2.0, 1.0, -3.0], [0.5, 1.0, 2.0])]
    dirty = [x.masked_fill(~mask, garbage) for x in clean]
    results = []
    for trainer, sampler, credits, weights in (clean, dirty):
        leaf = trainer.clone().requires_grad_()
        output = policy_loss(leaf, sampler, credits, mask, weights=weights)
        results.append((output.loss.item(), slope_of(output, leaf).tolist(), output.metrics))
    assert results[0] == results[1]
    assert results[0][1][1] == 0
    assert 0 not in (results[0][1][0], results[0][1][2])


@pytest.mark.parametrize("garbage", [INF, -INF, math.nan])
def test_masked_tokens_do_not_exist_for_cross_entropy(garbage: float) -> None:
    logprobs = torch.tensor([-1.0, garbage], requires_grad=True)
    output = cross_entropy_loss(logprobs, torch.tensor([True, False]), weights=torch.tensor([3.0, garbage]))
    assert output.loss.item() == 3.0
    assert slope_of(output, logprobs).tolist() == [-3.0, 0.0]
    assert output.metrics == {}


@each_loss
def test_nothing_to_train_is_zero_for_every_policy_loss(policy_loss: Callable[..., LossOutput]) -> None:
    empty = torch.zeros(0)
    for reduction in ("sum", "mean"):
        nothing = policy_loss(empty, empty, empty, torch.zeros(0, dtype=torch.bool), reduction=reduction)
        assert nothing.loss.item() == 0.0
        leaf = torch.tensor([-1.0, -2.0], requires_grad=True)
        masked = policy_loss(leaf, leaf.detach(), torch.ones(2), torch.zeros(2, dtype=torch.bool), reduction=reduction)
        assert masked.loss.item() == 0.0
        assert slope_of(masked, leaf).tolist() == [0.0, 0.0]
        assert masked.metrics["ratio_max"] == 0.0


@each_loss
def test_credit_and_weights_are_constants_for_every_policy_loss(policy_loss: Callable[..., LossOutput]) -> None:
    trainer, sampler, credits, weights = (torch.tensor([-1.0, -2.0], requires_grad=True) for _ in range(4))
    policy_loss(trainer, sampler, credits, torch.tensor([True, True]), weights=weights).loss.backward()
    assert trainer.grad is not None
    assert sampler.grad is credits.grad is weights.grad is None


# Estimators. One state, seven tokens, every one of them "sampled" and weighed by its probability: an expectation
# without noise. What an estimator's gradient is worth is decided against the two exact KLs.


class OneState:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.logits = torch.randn(7, dtype=torch.float64, generator=generator).requires_grad_()
        self.teacher = 1.5 * torch.randn(7, dtype=torch.float64, generator=generator)
        self.log_p, self.log_q = self.logits.log_softmax(-1), self.teacher.log_softmax(-1)
        self.p = self.log_p.detach().exp()
        self.gap = (self.log_p - self.log_q).detach()
        self.everyone = torch.ones(7, dtype=torch.bool)

    def slope(self, loss: Tensor) -> Tensor:
        [gradient] = torch.autograd.grad(loss, self.logits, retain_graph=True)
        return gradient

    def exact(self, kind: Any) -> Tensor:
        rows = self.logits[None], self.teacher[None]
        return self.slope(distribution_divergence(*rows, torch.tensor([True]), kind=kind).loss)

    def expected(self, per_token: Tensor) -> Tensor:
        """The gradient of a sampled loss that does not differentiate the sampling."""
        return self.slope((self.p * per_token).sum())

    def policy(self, policy_loss: Callable[..., LossOutput], sampler: Tensor, **options: Any) -> Tensor:
        """Tokens come from ``sampler`` (log-probabilities); each is credited with log q - log p."""
        weights = sampler.exp()
        return self.slope(policy_loss(self.log_p, sampler, -self.gap, self.everyone, weights=weights, **options).loss)


@each_loss
def test_log_ratio_as_credit_has_the_reverse_kls_expected_gradient(policy_loss: Callable[..., LossOutput]) -> None:
    state = OneState()
    torch.testing.assert_close(state.policy(policy_loss, state.log_p.detach()), state.exact("reverse_kl"))
    assert state.exact("reverse_kl").norm() > 0.1


def test_importance_sampling_keeps_that_gradient_off_policy_and_clips_give_it_up() -> None:
    state = OneState()
    other = (0.5 * state.logits.detach() + torch.linspace(-1, 1, 7, dtype=torch.float64)).log_softmax(-1)
    ratios = (state.log_p.detach() - other).exp()
    assert ratios.max() > 1.5
    assert ratios.min() < 0.5
    exact = state.exact("reverse_kl")
    torch.testing.assert_close(state.policy(importance_sampling_loss, other), exact)
    unweighted = state.slope((other.exp() * state.gap * state.log_p).sum())
    for biased in (
        unweighted,
        state.policy(importance_sampling_loss, other, max_importance_ratio=1.2),
        state.policy(importance_sampling_loss, other, importance_band=(0.5, 1.5)),
        state.policy(ppo_loss, other),
        state.policy(cispo_loss, other),
    ):
        assert float((biased - exact).norm()) > 0.05 * float(exact.norm())


def test_differentiating_the_log_ratio_of_sampled_tokens_teaches_nothing() -> None:
    """k1 as a loss: the score's expectation, zero whatever the teacher."""
    state = OneState()
    torch.testing.assert_close(
        state.expected(state.log_p - state.log_q), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-15
    )


def test_differentiating_half_the_squared_log_ratio_gives_the_reverse_kls_gradient() -> None:
    """k2 as a loss."""
    state = OneState()
    torch.testing.assert_close(state.expected((state.log_p - state.log_q).square() / 2), state.exact("reverse_kl"))


def test_differentiating_the_low_variance_estimator_gives_the_forward_kls_gradient() -> None:
    """k3 = q / p - 1 - log (q / p) as a loss, which is often labelled reverse."""
    state = OneState()
    log_ratio = state.log_q - state.log_p
    slope = state.expected(log_ratio.exp() - 1 - log_ratio)
    torch.testing.assert_close(slope, state.exact("forward_kl"))
    assert float((slope - state.exact("reverse_kl")).norm()) > 0.3 * float(slope.norm())


def test_credit_that_is_the_same_for_every_token_of_a_state_teaches_nothing() -> None:
    """A state's whole KL as the penalty of whichever token was written."""
    state = OneState()
    credits = -(state.p * state.gap).sum().expand(7)
    output = importance_sampling_loss(state.log_p, state.log_p.detach(), credits, state.everyone, weights=state.p)
    torch.testing.assert_close(state.slope(output.loss), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-15)


def test_every_estimator_is_still_where_teacher_and_student_agree() -> None:
    state = OneState()
    agreed = state.log_p.detach()
    for policy_loss in POLICY_LOSSES:
        output = policy_loss(state.log_p, agreed, torch.zeros(7), state.everyone, weights=state.p)
        assert output.loss.item() == 0.0
        assert torch.count_nonzero(state.slope(output.loss)) == 0

"""Objectives join heads to losses; their gradients are proved in tests/parity."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from understudy import lm_head
from understudy.lm_head import LMHead
from understudy.objectives import CrossEntropy, FullDivergence, Mixture, PolicyGradient
from understudy.types import Batch

# One hidden number, two tokens: logits (h, 0), so p(token 0) = sigmoid(h).
HEAD = LMHead(torch.tensor([[1.0], [0.0]], dtype=torch.float64))
HIDDEN = torch.tensor([[math.log(3)], [0.0], [5.0]], dtype=torch.float64)  # p(token 0): 3/4, 1/2, masked
TEACHER_HIDDEN = torch.tensor([[0.0], [math.log(3)], [-5.0]], dtype=torch.float64)  # 1/2, 3/4, masked
KL = (0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.5 * math.log(2 / 3) + 0.5 * math.log(2))


def batch(**changes: Tensor | None) -> Batch:
    one = Batch(
        input_ids=torch.tensor([[0, 1, 0, 1]]),
        position_ids=None,
        token_index=torch.tensor([0, 1, 2]),
        target_ids=torch.tensor([0, 1, 0]),
        loss_mask=torch.tensor([True, True, False]),
        sampler_logprobs=torch.tensor([0.75, 0.25, 1.0], dtype=torch.float64).log(),
        advantages=torch.tensor([2.0, -1.0, 100.0], dtype=torch.float64),
        teacher_hidden=TEACHER_HIDDEN,
        teacher="default",
        sequence_tokens=4,
        num_sequences=1,
    )
    return replace(one, **changes)  # pyright: ignore[reportArgumentType]


def test_cross_entropy() -> None:
    assert float(CrossEntropy()(batch(), HIDDEN, HEAD).loss) == pytest.approx(math.log(4 / 3) + math.log(2))


def test_policy_gradient() -> None:
    output = PolicyGradient()(batch(), HIDDEN, HEAD)
    assert float(output.loss) == pytest.approx(-(1 * 2.0 + 2 * -1.0))  # ratios 3/4 : 3/4 and 1/2 : 1/4
    assert output.metrics["ratio"] == pytest.approx(3.0)
    warm = PolicyGradient(temperature=2.0)(batch(), HIDDEN, HEAD)  # p(token 0) = sqrt 3 / (1 + sqrt 3), then 1/2
    assert float(warm.loss) == pytest.approx(-(2 * math.sqrt(3) / (1 + math.sqrt(3)) / 0.75 - 2))


def test_full_reverse_kl() -> None:
    output = FullDivergence({"default": HEAD}, kl_coef=0.5)(batch(), HIDDEN, HEAD)
    assert float(output.loss) == pytest.approx(0.5 * sum(KL))
    assert output.metrics["reverse_kl_full"] == pytest.approx(sum(KL))  # the coefficient is the loss's, not the KL's
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert output.metrics["student_entropy"] == pytest.approx(entropy + math.log(2))
    assert output.metrics["teacher_entropy"] == pytest.approx(entropy + math.log(2))


def test_full_reverse_kl_uses_the_named_teachers_head_and_dtype() -> None:
    heads = {"default": HEAD, "other": LMHead(torch.tensor([[2.0], [0.0]], dtype=torch.float32))}
    changed = replace(batch(), teacher="other", teacher_hidden=TEACHER_HIDDEN.float() / 2)
    assert float(FullDivergence(heads)(changed, HIDDEN, HEAD).loss) == pytest.approx(sum(KL), rel=1e-6)


@pytest.mark.parametrize("max_logits", [1, 4])
def test_full_reverse_kl_in_slices(max_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[float, Tensor, dict[str, float]]:
        hidden = HIDDEN.clone().requires_grad_()
        output = FullDivergence({"default": HEAD}, 0.5, 0.7)(batch(), hidden, HEAD)
        output.loss.backward()
        assert hidden.grad is not None
        return float(output.loss.detach()), hidden.grad, dict(output.metrics)

    loss, gradient, metrics = run()
    monkeypatch.setattr(lm_head, "MAX_LOGITS", max_logits)
    sliced_loss, sliced_gradient, sliced_metrics = run()
    assert sliced_loss == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(sliced_gradient, gradient)
    assert gradient[2].item() == 0.0  # masked
    assert sliced_metrics == pytest.approx(metrics, rel=1e-6)


def test_a_mixture_is_a_sum() -> None:
    first, second = FullDivergence({"default": HEAD}), PolicyGradient()
    output = Mixture([first, second])(batch(), HIDDEN, HEAD)
    assert float(output.loss) == pytest.approx(sum(KL) + 0.0)
    assert set(output.metrics) == {
        *("reverse_kl_full", "student_entropy", "teacher_entropy"),
        *("ratio", "ratio_max", "abs_log_ratio", "abs_log_ratio_max"),
    }


def test_a_missing_signal_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs sampler_logprobs and advantages"):
        PolicyGradient()(batch(advantages=None), HIDDEN, HEAD)
    with pytest.raises(ValueError, match="needs the teacher's hidden states"):
        FullDivergence({"default": HEAD})(batch(teacher_hidden=None), HIDDEN, HEAD)

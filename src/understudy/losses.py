"""Policy losses and distribution divergences: pure functions of tensors.

Every loss is a masked **sum** over tokens (``reduction="mean"`` divides by the mask's count). A step adds the sums
of its
micro-batches and divides once by the step's token count, so that splitting a step changes nothing.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from understudy.types import LossOutput

Reduction = Literal["sum", "mean"]
DivergenceKind = Literal["reverse_kl"]
DIVERGENCE_METRICS = ("reverse_kl_full", "student_entropy", "teacher_entropy")


def _reduce(per_token: Tensor, loss_mask: Tensor, reduction: Reduction) -> Tensor:
    total = torch.where(loss_mask, per_token, 0.0).sum()
    return total / loss_mask.sum() if reduction == "mean" else total


def _masked_sum(per_token: Tensor, loss_mask: Tensor) -> float:
    return float(torch.where(loss_mask, per_token.detach().float(), 0.0).sum())


def importance_sampling_loss(
    trainer_logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    reduction: Reduction = "sum",
) -> LossOutput:
    """``-sum(importance_ratio * advantages)`` with ``importance_ratio = exp(trainer_logprobs - sampler_logprobs)``.

    All inputs [N]; gradient flows through ``trainer_logprobs`` only. On policy the ratio is 1 and the gradient is
    REINFORCE's, ``-advantages * grad log p``.

    Metrics (sums over the mask, but for ``*_max``): ``ratio``, ``ratio_max``, ``abs_log_ratio``, ``abs_log_ratio_max``.
    """
    # Masked first: what stands at a masked position (a placeholder, NaN) must not reach exp() and its gradient.
    log_ratio = torch.where(loss_mask, trainer_logprobs - sampler_logprobs.detach(), 0.0)
    importance_ratio = log_ratio.exp()
    loss = _reduce(-importance_ratio * advantages.detach(), loss_mask, reduction)
    return LossOutput(loss, _ratio_metrics(log_ratio, loss_mask))


def _ratio_metrics(log_ratio: Tensor, loss_mask: Tensor) -> dict[str, float]:
    log_ratio = log_ratio.detach()
    empty = log_ratio.numel() == 0
    return {
        "ratio": _masked_sum(log_ratio.exp(), loss_mask),
        "ratio_max": 0.0 if empty else float(log_ratio.masked_fill(~loss_mask, -math.inf).max().exp()),
        "abs_log_ratio": _masked_sum(log_ratio.abs(), loss_mask),
        "abs_log_ratio_max": 0.0 if empty else float(log_ratio.abs().max()),
    }


def cross_entropy_loss(trainer_logprobs: Tensor, loss_mask: Tensor, *, reduction: Reduction = "sum") -> LossOutput:
    """``-sum(trainer_logprobs)`` over the mask [N]: supervised fine-tuning."""
    return LossOutput(_reduce(-trainer_logprobs, loss_mask, reduction), {})


def distribution_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    loss_mask: Tensor,
    *,
    kind: DivergenceKind = "reverse_kl",
    reduction: Reduction = "sum",
) -> LossOutput:
    """Exact divergence per position between two distributions over the vocabulary, summed over the mask.

    Args:
        student_logits: [N, V], with gradient; divided by the temperature already.
        teacher_logits: [N, V], detached here.
        loss_mask: [N] bool.
        kind: "reverse_kl", ``KL(student || teacher) = sum_v p_v (log p_v - log q_v)``.

    Its gradient equals the expectation of the sampled estimator's at discount 0 (states held fixed), with less variance
    (GKD on student states, arXiv 2306.13649). Metrics (sums): DIVERGENCE_METRICS.

    Raises:
        ValueError: another kind.
    """
    if kind != "reverse_kl":
        raise ValueError(f"got kind {kind!r}; expected 'reverse_kl'")
    columns = divergence_columns(student_logits, teacher_logits, loss_mask).sum(0)
    loss = columns[0] / loss_mask.sum() if reduction == "mean" else columns[0]
    return LossOutput(loss, dict(zip(DIVERGENCE_METRICS, columns.tolist(), strict=True)))


def divergence_columns(student_logits: Tensor, teacher_logits: Tensor, loss_mask: Tensor) -> Tensor:
    """[N, V], [N, V], [N] -> [N, 3]: reverse KL (with gradient), student's entropy, teacher's; 0 where masked."""
    student_logprobs = _log_softmax(student_logits)
    teacher_logprobs = _log_softmax(teacher_logits.detach())
    probabilities = student_logprobs.exp()
    # The gap is a constant: differentiating it adds the gradient of sum_v p_v = 1, which is zero but for rounding, and
    # Adam would blow that rounding up to whole steps where student and teacher agree.
    gap = (student_logprobs - teacher_logprobs).detach()
    # 0 * (-inf - x) is NaN in floating point but 0 in the limit; the entropies share the convention. Masked rows may
    # hold anything.
    gap = torch.where((probabilities > 0) & loss_mask[:, None], gap, 0.0)
    columns = [(probabilities * gap).sum(-1), _entropy(student_logprobs), _entropy(teacher_logprobs)]
    return torch.where(loss_mask[:, None], torch.stack(columns, dim=-1), 0.0)


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32 or wider."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _entropy(logprobs: Tensor) -> Tensor:
    logprobs = logprobs.detach()
    return -(logprobs.exp() * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)).sum(-1)

"""Policy losses and distribution divergences: pure functions of tensors.

Every loss is a masked **sum** over tokens (``reduction="mean"`` divides by the mask's count). A step adds the sums of
its micro-batches and divides once for the whole step, so that splitting a step changes nothing. ``weights`` multiply
single tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from understudy.divergences import Divergence, DivergenceKind, entropy_terms, forward_kl_terms, gated
from understudy.errors import ZeroProbabilityError
from understudy.types import LossOutput

Reduction = Literal["sum", "mean"]
Tail = Literal["bucket", "renormalize", "stop_gradient"]

# Below every logarithm of a probability, and finite: nothing less -inf is not a number.
_LOWEST = -1e30


def importance_sampling_loss(
    trainer_logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    max_importance_ratio: float | None = None,
    importance_band: tuple[float, float] | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "sum",
) -> LossOutput:
    """``-sum(importance_ratio * advantages)`` with ``importance_ratio = exp(trainer_logprobs - sampler_logprobs)``.

    All inputs [N]; gradient flows through ``trainer_logprobs`` only. On policy the ratio is 1 and the gradient is
    REINFORCE's, ``-advantages * grad log p``.

    Args:
        max_importance_ratio: truncated importance sampling: a token's gradient, ``importance_ratio * grad log p``,
            counts ``min(importance_ratio, max_importance_ratio)`` instead. Truncated tokens go on learning.
        importance_band: (low, high): tokens whose ratio is outside are left out (two-sided mask, IcePop).

    Metrics (sums over the mask, but for ``*_max``): ``ratio``, ``ratio_max``, ``abs_log_ratio``, ``abs_log_ratio_max``,
    ``ratio_outside`` (tokens with a ratio outside [0.9, 1.1]), ``ratio_tail`` (tokens whose log-probabilities differ by
    more than 1 nat), and ``ratio_clipped``, the tokens that truncation or mask touched, where there is either.
    """
    log_ratio = _log_ratio(trainer_logprobs, sampler_logprobs, loss_mask)
    ratio = log_ratio.exp()
    weight, touched = ratio.detach(), None
    if max_importance_ratio is not None:
        touched = weight > max_importance_ratio
        weight = weight.clamp(max=max_importance_ratio)
    if importance_band is not None:
        outside = (ratio.detach() < importance_band[0]) | (ratio.detach() > importance_band[1])
        weight = weight.masked_fill(outside, 0.0)
        touched = outside if touched is None else touched | outside
    # exp(x - x) is 1 and its derivative that of x: the same gradient as the ratio's, with a weight of one's choice.
    ratio = ratio if touched is None else weight * (log_ratio - log_ratio.detach()).exp()
    loss = _reduce(-ratio * advantages.detach(), loss_mask, weights, reduction)
    return LossOutput(loss, _ratio_metrics(log_ratio, loss_mask, touched))


def ppo_loss(
    trainer_logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    weights: Tensor | None = None,
    reduction: Reduction = "sum",
) -> LossOutput:
    """``-sum(min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A))`` (PPO, arXiv 1707.06347), all [N].

    A token that has already moved past the clip in its advantage's direction gets no gradient. Metrics: those of
    ``importance_sampling_loss``; ``ratio_clipped`` counts the tokens without gradient.
    """
    log_ratio = _log_ratio(trainer_logprobs, sampler_logprobs, loss_mask)
    ratio, credit = log_ratio.detach().exp(), advantages.detach()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * credit
    held = clipped < ratio * credit
    # Held tokens are taken out before exp(): a ratio that overflows would make NaN of their zero gradient.
    kept = torch.where(held, 0.0, log_ratio).exp() * credit
    loss = _reduce(-torch.where(held, clipped, kept), loss_mask, weights, reduction)
    return LossOutput(loss, _ratio_metrics(log_ratio, loss_mask, held))


def cispo_loss(
    trainer_logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    weights: Tensor | None = None,
    reduction: Reduction = "sum",
) -> LossOutput:
    """``-sum(constant(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * trainer_logprobs)`` (CISPO, arXiv 2506.13585).

    All inputs [N]. The ratio is a clipped constant, so every token keeps a gradient. Metrics: those of
    ``importance_sampling_loss``; ``ratio_clipped`` counts the tokens whose ratio was clipped.
    """
    log_ratio = _log_ratio(trainer_logprobs, sampler_logprobs, loss_mask)
    ratio = log_ratio.detach().exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    # Masked first, as in _log_ratio.
    logprobs = torch.where(loss_mask, trainer_logprobs, 0.0)
    loss = _reduce(-clipped * advantages.detach() * logprobs, loss_mask, weights, reduction)
    return LossOutput(loss, _ratio_metrics(log_ratio, loss_mask, clipped != ratio))


def cross_entropy_loss(
    trainer_logprobs: Tensor, loss_mask: Tensor, *, weights: Tensor | None = None, reduction: Reduction = "sum"
) -> LossOutput:
    """``-sum(trainer_logprobs)`` over the mask [N]: supervised fine-tuning."""
    return LossOutput(_reduce(-trainer_logprobs, loss_mask, weights, reduction), {})


def distribution_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    loss_mask: Tensor,
    *,
    kind: DivergenceKind = "reverse_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    entropy_threshold: float = 1.0,
    weights: Tensor | None = None,
    reduction: Reduction = "sum",
) -> LossOutput:
    """Exact divergence per position between two distributions over the vocabulary, summed over the mask.

    Args:
        student_logits: [N, V], with gradient; divided by the temperature already.
        teacher_logits: [N, V], detached here.
        loss_mask: [N] bool.
        kind, beta, skew, entropy_threshold: see ``Divergence``.

    The states are constants, as in GKD on student states (arXiv 2306.13649). For ``reverse_kl`` the gradient equals
    the expectation of the sampled estimator's at discount 0, with less variance. Metrics (sums): see
    ``divergence_metrics``.

    Raises:
        ValueError: unknown kind or option.
        ZeroProbabilityError: the divergence is infinite at a position, which the message names.
    """
    divergence = Divergence(kind, beta, skew, entropy_threshold)
    log_p, log_q = _log_softmax(student_logits), _log_softmax(teacher_logits.detach())
    p, q = log_p.exp(), log_q.exp()
    with torch.no_grad():
        entropies = entropy_terms(log_p, p).sum(-1), entropy_terms(log_q, q).sum(-1)
        gates = divergence.gates(entropies[1])
        terms = [part(log_p, log_q, p, q) for part in divergence.parts]
        values = sum(gated(gate, value.sum(-1)) for gate, (value, _) in zip(gates, terms, strict=True))
        pull = sum(gated(gate[:, None], pull) for gate, (_, pull) in zip(gates, terms, strict=True))
        assert isinstance(values, Tensor)
        assert isinstance(pull, Tensor)
        check_finite(values, loss_mask, lambda n: (log_p[n], log_q[n]), divergence)
        slope = pull - p * pull.sum(-1, keepdim=True)
        # Masked rows may hold anything, and it must not reach the gradient.
        slope = torch.where(loss_mask[:, None], slope, 0.0)
    per_token = carry_gradient(values, student_logits, slope)
    columns = torch.stack([values, *entropies, *gates[1:]], dim=-1)
    return LossOutput(
        _reduce(per_token, loss_mask, weights, reduction), divergence_metrics(divergence, columns, loss_mask)
    )


def carry_gradient(values: Tensor, inputs: Tensor, slope: Tensor) -> Tensor:
    """``values`` [N] with ``slope`` [N, V] for a gradient on ``inputs`` [N, V]."""
    carrier = torch.where(slope != 0, slope * inputs, 0.0).sum(-1)
    return values + (carrier - carrier.detach())


def divergence_metrics(divergence: Divergence, columns: Tensor, loss_mask: Tensor) -> dict[str, float]:
    """[N, 3 or 4] (value, student's entropy, teacher's, gate) -> masked sums ``<kind>_full``, ``student_entropy``,
    ``teacher_entropy`` and, for ``entropy_gated``, ``gate``: the positions with the forward KL."""
    names = (f"{divergence.kind}_full", "student_entropy", "teacher_entropy", "gate")
    sums = torch.where(loss_mask[:, None], columns, 0.0).sum(0).tolist()
    return dict(zip(names, sums, strict=False))


def check_finite(
    values: Tensor,
    loss_mask: Tensor,
    rows: Callable[[int], tuple[Tensor, Tensor]],
    divergence: Divergence | None = None,
    *,
    first_position: int = 0,
) -> None:
    """Raise ZeroProbabilityError for the first position [N] that trains and has no finite divergence. ``rows``: n ->
    the position's (student's, teacher's) log-probabilities [V]. ``divergence`` says whose zeros are to blame, where
    both have some; the teacher's without it. ``first_position`` is what the first row is called."""
    bad = loss_mask & ~torch.isfinite(values)
    if not bad.any():
        return
    row = int(bad.nonzero()[0])
    log_p, log_q = rows(row)
    where = f"position {first_position + row}"
    culprits = [("teacher", log_q, "student", log_p), ("student", log_p, "teacher", log_q)]
    if divergence is not None and divergence.parts == (forward_kl_terms,):
        culprits.reverse()  # it is finite where the teacher alone has zeros
    for name, own, giver, other in culprits:
        without = torch.isneginf(own) & (other.exp() > 0)
        if without.any():
            token = int(other.masked_fill(~without, -math.inf).argmax())
            raise ZeroProbabilityError(
                f"{where}: the {name} gives token {token} probability zero, where the {giver} gives "
                f"{float(other[token].exp()):.3g}; expected probabilities above zero for this divergence. Use another "
                f"{name}, a shared vocabulary, or a bounded divergence (jsd, skewed_reverse_kl)"
            )
    raise ZeroProbabilityError(
        f"{where}: the divergence is {float(values[row])}; expected a finite number. Logits are not "
        "finite there: the weights of student or teacher have overflowed"
    )


def topk_divergence(
    student_topk_logprobs: Tensor,
    teacher_topk_logprobs: Tensor,
    loss_mask: Tensor,
    *,
    tail: Tail = "bucket",
    weights: Tensor | None = None,
    reduction: Reduction = "sum",
    first_position: int = 0,
) -> LossOutput:
    """Reverse KL from K of the vocabulary's entries S per position: [N, K] log-probabilities of the same tokens, [N].

    Args:
        student_topk_logprobs: with gradient, normalised over the whole vocabulary. ``-inf`` together with the
            teacher's marks a place that is not in use.
        teacher_topk_logprobs: detached here.
        tail: what becomes of the mass outside S:
            ``"bucket"``: it is one more class, a KL of K + 1 classes and a lower bound on the whole (data processing);
            ``"renormalize"``: both are divided by their mass in S; the student's mass outside is not looked at;
            ``"stop_gradient"``: ``sum_S p constant(log p - log q)``.
        first_position: what errors call the first row, where the rows are a block of more.

    None has the gradient of the whole KL; each is stationary at p = q, which ``sum_S p (log p - log q)`` with plain
    back-propagation is not. Metrics (sums): ``topk``, ``topk_student_mass``, ``topk_teacher_mass``.

    Raises:
        ValueError: unknown tail, or shapes that differ.
        ZeroProbabilityError: the teacher gives an entry probability zero where the student does not.
    """
    if tail not in Tail.__args__:
        raise ValueError(f"got tail {tail!r}; expected one of {', '.join(Tail.__args__)}")
    if student_topk_logprobs.shape != teacher_topk_logprobs.shape or student_topk_logprobs.dim() != 2:
        raise ValueError(
            f"got {tuple(student_topk_logprobs.shape)} student's and {tuple(teacher_topk_logprobs.shape)} teacher's "
            "log-probabilities; expected [N, K] of the same tokens"
        )
    wide = torch.promote_types(student_topk_logprobs.dtype, torch.float32)
    with torch.no_grad():
        # A masked row is one without a place in use: everything below is zero there.
        log_p, log_q = (
            torch.where(loss_mask[:, None], x.to(wide), -math.inf)
            for x in (student_topk_logprobs, teacher_topk_logprobs)
        )
        masses = log_p.exp().sum(-1, keepdim=True), log_q.exp().sum(-1, keepdim=True)
        if tail == "renormalize":
            # In logarithms: all of S may be beyond exp() for one of them.
            log_p, log_q = (x - x.logsumexp(-1, keepdim=True).clamp(min=_LOWEST) for x in (log_p, log_q))
        p = log_p.exp()
        _check_topk_zeros(p, log_q, first_position)
        # Rounding in K numbers, or in the input: below it, a tail cannot be told from none.
        narrow = max(torch.finfo(x.dtype).eps for x in (student_topk_logprobs, teacher_topk_logprobs))
        eps = torch.finfo(wide).eps
        floor = max(p.shape[-1] * eps, narrow if narrow > eps else 0.0)
        values, slope = _topk_terms(p, torch.where(p == 0, 0.0, log_p - log_q), masses, tail, floor)
        check_finite(values, loss_mask, lambda n: (log_p[n], log_q[n]), first_position=first_position)
    loss = _reduce(carry_gradient(values, student_topk_logprobs, slope), loss_mask, weights, reduction)
    sums = torch.stack([values, masses[0][:, 0], masses[1][:, 0]]).sum(-1)
    names = ("topk", "topk_student_mass", "topk_teacher_mass")
    return LossOutput(loss, dict(zip(names, sums.tolist(), strict=True)))


def _check_topk_zeros(p: Tensor, log_q: Tensor, first_position: int) -> None:
    lost = torch.isneginf(log_q) & (p > 0)
    if lost.any():
        row, place = lost.nonzero()[0].tolist()
        raise ZeroProbabilityError(
            f"position {first_position + row}: the teacher gives entry {place} of the top-k set probability zero, "
            f"where the student gives {float(p[row, place]):.3g}; expected one above zero"
        )


def _topk_terms(
    p: Tensor, gap: Tensor, masses: tuple[Tensor, Tensor], tail: Tail, floor: float
) -> tuple[Tensor, Tensor]:
    """(divergence [N], its slope on the student's log-probabilities [N, K]) from p and log p - log q in the top k."""
    values = (p * gap).sum(-1)
    if tail == "bucket":
        rest = [(1 - mass).clamp(min=floor) for mass in masses]
        tail_gap = (rest[0] / rest[1]).log()
        return values + (rest[0] * tail_gap)[:, 0], p * (gap - tail_gap)
    return values, p * (gap - values[:, None]) if tail == "renormalize" else p * gap


def _reduce(per_token: Tensor, loss_mask: Tensor, weights: Tensor | None, reduction: Reduction) -> Tensor:
    per_token = torch.where(loss_mask, per_token, 0.0)
    # Masked too: a masked weight of NaN would reach the gradient as 0 * NaN.
    total = (per_token if weights is None else per_token * torch.where(loss_mask, weights.detach(), 0.0)).sum()
    return total / loss_mask.sum().clamp(min=1) if reduction == "mean" else total


def _masked_sum(per_token: Tensor, loss_mask: Tensor) -> float:
    return float(torch.where(loss_mask, per_token.detach().float(), 0.0).sum())


def _log_ratio(trainer_logprobs: Tensor, sampler_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """Masked before anything else: what stands at a masked position (a placeholder, NaN) must not reach exp() and its
    gradient."""
    return torch.where(loss_mask, trainer_logprobs - sampler_logprobs.detach(), 0.0)


def _ratio_metrics(log_ratio: Tensor, loss_mask: Tensor, clipped: Tensor | None) -> dict[str, float]:
    log_ratio = log_ratio.detach()
    empty = log_ratio.numel() == 0
    metrics = {
        "ratio": _masked_sum(log_ratio.exp(), loss_mask),
        "ratio_max": 0.0 if empty else float(log_ratio.masked_fill(~loss_mask, -math.inf).max().exp()),
        "abs_log_ratio": _masked_sum(log_ratio.abs(), loss_mask),
        "abs_log_ratio_max": 0.0 if empty else float(log_ratio.abs().max()),
        "ratio_outside": _masked_sum((log_ratio.exp() - 1).abs() > 0.1, loss_mask),
        "ratio_tail": _masked_sum(log_ratio.abs() > 1, loss_mask),
    }
    return metrics if clipped is None else metrics | {"ratio_clipped": _masked_sum(clipped, loss_mask)}


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32 or wider."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))

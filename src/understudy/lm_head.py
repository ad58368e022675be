"""Hidden states -> log-probabilities, losses and divergences over the vocabulary, without the [N, V] logits.

Only completion positions come here, so no softmax is spent on prompts. Log-softmax is always float32 or wider, whatever
the model's dtype. The work is done in ``head_kernels``, tile by tile, with gradients in closed form; they reach hidden
states, weight and bias, each where it requires one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from understudy.divergence_kernel import DivergenceInputs, divergence_kernel
from understudy.divergences import REVERSE_KL, Divergence, DivergenceKind
from understudy.head_kernels import (
    BlockLoss,
    GradientSums,
    Projection,
    SelectedLogprobs,
    WithGradient,
    detached,
    loss_kernel,
    topk_kernel,
)
from understudy.losses import Reduction, check_finite, divergence_metrics
from understudy.sampling_kernel import Drawer
from understudy.types import LossOutput


@dataclass(frozen=True)
class LMHead:
    """The map from a hidden state [H] to logits [V].

    ``softcap``: ``softcap * tanh(logits / softcap)`` (Gemma 2). ``scale`` multiplies logits (Cohere; 1 / Granite's).
    ``rows``: only the first ``rows`` ids count (padding beyond them means nothing). The weight itself stays whole:
    slicing a parameter would make autograd pad every gradient back to full size.

    Raises:
        ValueError: more rows than the weight has.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and not 0 < self.rows <= self.weight.shape[0]:
            raise ValueError(f"got rows = {self.rows}; expected 1 to the weight's {self.weight.shape[0]}")

    def sliced(self, vocab_size: int) -> LMHead:
        """The head over the first ``vocab_size`` ids only."""
        return self if vocab_size == self.vocab_size else replace(self, rows=vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V] in float32 (float64 stays)."""
        weight = self.weight[: self.vocab_size]
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        logits = torch.nn.functional.linear(hidden.to(torch.promote_types(hidden.dtype, weight.dtype)), weight, bias)
        logits = (logits if logits.dtype == torch.float64 else logits.float()) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logprobs(self, hidden: Tensor, *, temperature: float = 1.0) -> Tensor:
        """[N, H] -> [N, V] log-softmax of logits / temperature."""
        return torch.log_softmax(self.logits(hidden) / temperature, dim=-1)

    @property
    def vocab_size(self) -> int:
        """V: the ids that count."""
        return self.weight.shape[0] if self.rows is None else self.rows


def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Log-probabilities of one or K tokens per hidden state: [N, H], [V, H], [N] or [N, K] -> float32 [N] or [N, K].

    ``vocab_size``: only the first ids count. float64 stays float64.

    Raises:
        ValueError: hidden states and weight differ in dtype (outside autocast), or an id lies outside the vocabulary.
    """
    head = LMHead(weight, bias, softcap, scale, vocab_size)
    return head_logprobs(head, hidden, target_ids, temperature=temperature)


def head_logprobs(head: LMHead, hidden: Tensor, target_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``selected_logprobs`` for an ``LMHead``."""
    _check_ids(head, target_ids)
    ids = target_ids if target_ids.dim() == 2 else target_ids[:, None]
    cast = _cast(head, hidden, temperature)
    logprobs = SelectedLogprobs.apply(hidden, head.weight, head.bias, ids, cast)
    assert isinstance(logprobs, Tensor)
    return logprobs.view(target_ids.shape)


def head_topk(head: LMHead, hidden: Tensor, k: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The ``k`` likeliest tokens (all, if there are fewer) after each hidden state [N, H]: log-probabilities [N, k],
    best first, and ids [N, k]. No gradient."""
    own, projection = _projected(head, hidden, temperature)
    with detached(hidden.device):
        return topk_kernel(projection, own, min(k, head.vocab_size))


def head_drawer(head: LMHead, rows: int, *, temperature: float = 1.0) -> Drawer:
    """What draws the next token of up to ``rows`` hidden states at once from the softmax of logits / temperature."""
    weight, bias = head.weight.detach(), head.bias
    projection = Projection(
        weight, None if bias is None else bias.detach(), head.vocab_size, head.softcap, head.scale, temperature
    )
    return Drawer(projection, rows)


def logprob_loss(
    head: LMHead, hidden: Tensor, target_ids: Tensor, token_loss: BlockLoss, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A loss of ``selected_logprobs``: (scalar, log-probabilities [N] or [N, K], detached).

    ``token_loss``: (log-probabilities of a block of tokens, their rows) -> scalar. The loss is its sum over blocks, so
    it must be a sum over tokens that looks at each block alone: a policy loss, cross-entropy, a top-k divergence. It
    is differentiated with respect to the log-probabilities only. Gradients are formed right here, which saves a second
    projection; a later ``backward`` hands them out, without a copy where nothing multiplies the loss on its way. Hidden
    states must be finite also where the loss leaves a token out.

        logprob_loss(head, hidden, ids, lambda logprobs, rows: -(advantages[rows] * logprobs).sum())

    Raises:
        ValueError: see ``selected_logprobs``.
    """
    _check_ids(head, target_ids)
    ids = target_ids if target_ids.dim() == 2 else target_ids[:, None]

    def block_loss(logprobs: Tensor, rows: slice) -> Tensor:
        return token_loss(logprobs if target_ids.dim() == 2 else logprobs[:, 0], rows)

    own, projection = _projected(head, hidden, temperature)
    sums = _sums(head, hidden, projection)
    with detached(hidden.device):
        loss, logprobs = loss_kernel(projection, own, ids, block_loss, sums)
    return _with_gradient(loss, sums, head, hidden), logprobs.view(target_ids.shape)


def head_divergence(
    student_head: LMHead,
    teacher_head: LMHead,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    loss_mask: Tensor,
    *,
    divergence: Divergence = REVERSE_KL,
    weights: Tensor | None = None,
    temperature: float = 1.0,
) -> LossOutput:
    """``losses.distribution_divergence`` of two heads' outputs: ``sum_n weights_n D_n`` over the mask.

    Hidden states [N, H_student] and [N, H_teacher], mask and weights [N]. The heads may differ in width, dtype, device
    and everything but the vocabulary; nothing flows back to the teacher's. Positions outside the mask are not looked
    at. Metrics (sums over the mask, without weights): see ``losses.divergence_metrics``.

    Raises:
        ValueError: different vocabularies; hidden states and weight of one head differ in dtype (outside autocast).
        ZeroProbabilityError: the divergence is infinite at a position, which the message names.
    """
    heads, hidden = (student_head, teacher_head), (student_hidden, teacher_hidden)
    inputs, sums, columns = _divergence(heads, hidden, loss_mask, weights, divergence, temperature)
    loss = (inputs.weights * columns[inputs.rows, 0]).sum()
    metrics = divergence_metrics(divergence, columns, loss_mask)
    return LossOutput(_with_gradient(loss, sums, student_head, student_hidden), metrics)


def divergence_columns(
    student_head: LMHead,
    teacher_head: LMHead,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    loss_mask: Tensor,
    *,
    divergence: Divergence = REVERSE_KL,
    temperature: float = 1.0,
) -> Tensor:
    """Per position [N, 3], or [N, 4] for ``entropy_gated``: divergence, student's entropy, teacher's, gate; zeros
    outside the mask. No gradient. Raises as ``head_divergence``."""
    heads, hidden = (student_head, teacher_head), (student_hidden, teacher_hidden)
    with torch.no_grad():
        return _divergence(heads, hidden, loss_mask, None, divergence, temperature)[2]


def divergence_from_hidden(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    loss_mask: Tensor,
    *,
    kind: DivergenceKind = "reverse_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    entropy_threshold: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    reduction: Reduction = "sum",
) -> LossOutput:
    """``head_divergence`` of plain tensors: [N, H_s], [V, H_s], [N, H_t], [V, H_t], [N] -> scalar.

    ``kind``, ``beta``, ``skew``, ``entropy_threshold``: see ``Divergence``. ``vocab_size``: only the first ids count,
    for weights padded to different lengths.
    """
    output = head_divergence(
        LMHead(student_weight, rows=vocab_size),
        LMHead(teacher_weight, rows=vocab_size),
        student_hidden,
        teacher_hidden,
        loss_mask,
        divergence=Divergence(kind, beta, skew, entropy_threshold),
        temperature=temperature,
    )
    return LossOutput(output.loss / loss_mask.sum(), output.metrics) if reduction == "mean" else output


def _divergence(
    heads: tuple[LMHead, LMHead],
    hidden: tuple[Tensor, Tensor],
    loss_mask: Tensor,
    weights: Tensor | None,
    divergence: Divergence,
    temperature: float,
) -> tuple[DivergenceInputs, GradientSums, Tensor]:
    """What went into the kernel, the gradients that came out (where autograd is on), and the columns of every position:
    zeros outside the mask, and known to be finite."""
    if heads[0].vocab_size != heads[1].vocab_size:
        raise ValueError(
            f"got a student's head over {heads[0].vocab_size} ids and a teacher's over {heads[1].vocab_size}; "
            "expected one vocabulary. Restrict both to the ids they share (LMHead.rows, or vocab_size)"
        )
    student_own, student = _projected(heads[0], hidden[0], temperature)
    teacher_own, teacher = _projected(heads[1], hidden[1], temperature)
    sums = _sums(heads[0], hidden[0], student)
    rows = loss_mask.nonzero()[:, 0]
    weights = torch.ones(len(rows), dtype=student.wide, device=rows.device) if weights is None else weights[rows]
    weights = weights.detach().to(student.wide)
    inputs = DivergenceInputs(student, teacher, student_own, teacher_own, rows, weights, divergence)

    @torch.no_grad()
    def logprobs(n: int) -> tuple[Tensor, Tensor]:
        log_p, log_q = (
            head.logprobs(own[n : n + 1].to(head.weight.device, head.weight.dtype), temperature=temperature)[0]
            for head, own in zip(heads, hidden, strict=True)
        )
        return log_p, log_q.to(log_p.device)

    with detached(hidden[0].device, heads[1].weight.device):
        found = divergence_kernel(inputs, sums)
    columns = found.new_zeros(len(loss_mask), found.shape[1]).index_put((rows,), found)
    check_finite(columns[:, 0], loss_mask, logprobs, divergence)
    return inputs, sums, columns


def _projected(head: LMHead, hidden: Tensor, temperature: float) -> tuple[Tensor, Projection]:
    return _cast(head, hidden, temperature)(hidden, head.weight, head.bias)


def _cast(
    head: LMHead, hidden: Tensor, temperature: float
) -> Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Projection]]:
    """What brings hidden states, weight and bias to the dtype to multiply in: autocast's, or their own."""
    given, kind = head.weight.dtype, head.weight.device.type
    # As autocast does it: float64 is left alone.
    autocast = torch.is_autocast_enabled(kind) and torch.float64 not in (given, hidden.dtype)
    if not autocast and torch.promote_types(hidden.dtype, given) != given:
        raise ValueError(
            f"got hidden states in {hidden.dtype} and an LM head in {given}; expected a head that is at least as wide. "
            "Cast one of them, or run under torch.autocast"
        )
    dtype = torch.get_autocast_dtype(kind) if autocast else given

    def cast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Projection]:
        bias = None if bias is None else bias.detach().to(dtype)
        projection = Projection(weight.detach().to(dtype), bias, head.vocab_size, head.softcap, head.scale, temperature)
        return hidden.detach().to(dtype), projection

    return cast


def _sums(head: LMHead, hidden: Tensor, projection: Projection) -> GradientSums:
    """Room for the gradients that somebody will ask for."""
    inputs = hidden, head.weight, head.bias
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    return GradientSums(projection, hidden, head.weight.shape[0], (needs[0], needs[1], needs[2]))


def _with_gradient(loss: Tensor, sums: GradientSums, head: LMHead, hidden: Tensor) -> Tensor:
    inputs = hidden, head.weight, head.bias
    gradients = sums.result(*inputs)
    if all(x is None for x in gradients):
        return loss
    attached = WithGradient.apply(loss, gradients, *inputs)
    assert isinstance(attached, Tensor)
    return attached


def _check_ids(head: LMHead, target_ids: Tensor) -> None:
    if target_ids.numel() == 0:
        return
    low, high = (int(x) for x in target_ids.aminmax())
    if low < 0 or high >= head.vocab_size:
        raise ValueError(
            f"got token ids from {low} to {high}; expected 0 to {head.vocab_size - 1}, the LM head's vocabulary"
        )

"""Hidden states -> log-probabilities. Only completion positions come here, so no softmax is spent on prompts.

Log-softmax is always float32 or wider, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from understudy.losses import DIVERGENCE_METRICS, DivergenceKind, Reduction, divergence_columns
from understudy.types import LossOutput

# Logits held at once, in numbers: 2**25 float32 are 128 MiB. Larger inputs go through in slices, recomputed backwards.
MAX_LOGITS = 2**25


@dataclass(frozen=True)
class LMHead:
    """The map from a hidden state [H] to logits [V].

    ``softcap``: ``softcap * tanh(logits / softcap)`` (Gemma 2). ``scale`` multiplies logits (Cohere; 1 / Granite's).
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def sliced(self, vocab_size: int) -> LMHead:
        """The head over the first ``vocab_size`` ids only."""
        if vocab_size == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:vocab_size]
        return LMHead(self.weight[:vocab_size], bias, self.softcap, self.scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V] in float32 (float64 stays)."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias) * self.scale
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logprobs(self, hidden: Tensor, *, temperature: float = 1.0) -> Tensor:
        """[N, H] -> [N, V] log-softmax of logits / temperature."""
        return torch.log_softmax(self.logits(hidden) / temperature, dim=-1)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight.shape[0]


def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Log-probability of one token per hidden state: [N, H], [V, H], [N] -> [N] float32."""
    return head_logprobs(LMHead(weight, bias, softcap, scale), hidden, target_ids, temperature=temperature)


def head_logprobs(head: LMHead, hidden: Tensor, target_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``selected_logprobs`` for an ``LMHead``."""

    def piece(hidden: Tensor, target_ids: Tensor) -> Tensor:
        logits = head.logits(hidden) / temperature
        return logits.gather(-1, target_ids[:, None])[:, 0] - logits.logsumexp(-1)

    return torch.cat(in_slices(piece, (hidden, target_ids), head.vocab_size))


def divergence_from_hidden(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    loss_mask: Tensor,
    *,
    kind: DivergenceKind = "reverse_kl",
    reduction: Reduction = "sum",
) -> LossOutput:
    """``distribution_divergence`` of two heads' outputs: [N, H_s], [V, H_s], [N, H_t], [V, H_t], [N] -> scalar.

    Raises:
        ValueError: a kind other than "reverse_kl".
    """
    if kind != "reverse_kl":
        raise ValueError(f"got kind {kind!r}; expected 'reverse_kl'")
    output = head_divergence(LMHead(student_weight), LMHead(teacher_weight), student_hidden, teacher_hidden, loss_mask)
    return LossOutput(output.loss / loss_mask.sum(), output.metrics) if reduction == "mean" else output


def head_divergence(
    student_head: LMHead,
    teacher_head: LMHead,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    loss_mask: Tensor,
    *,
    temperature: float = 1.0,
) -> LossOutput:
    """``divergence_from_hidden`` for two ``LMHead``s, which may sit on different devices."""

    def piece(student_hidden: Tensor, teacher_hidden: Tensor, loss_mask: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head.logits(teacher_hidden.to(teacher_head.weight.device)) / temperature
        student_logits = student_head.logits(student_hidden) / temperature
        return divergence_columns(student_logits, teacher_logits.to(student_logits.device), loss_mask).sum(0)

    inputs = (student_hidden, teacher_hidden, loss_mask)
    columns = torch.stack(in_slices(piece, inputs, student_head.vocab_size)).sum(0)
    return LossOutput(columns[0], dict(zip(DIVERGENCE_METRICS, columns.tolist(), strict=True)))


def in_slices(piece: Callable[..., Tensor], inputs: Sequence[Tensor], vocab_size: int) -> list[Tensor]:
    """``piece`` over slices of ``inputs`` ([N, ...] each) that hold at most MAX_LOGITS logits; the backward pass
    recomputes a slice instead of keeping its logits. One slice runs plainly."""
    rows = max(1, MAX_LOGITS // vocab_size)
    slices = list(zip(*(tensor.split(rows) for tensor in inputs), strict=True))
    if len(slices) <= 1:
        return [piece(*inputs)]
    return [checkpoint(piece, *part, use_reentrant=False) for part in slices]

"""Training examples -> micro-batches. The only place that shifts: a token is predicted at the position before it.

Rows are right-padded without an attention mask: attention is causal, so no real position ever sees padding. With
``packing`` several sequences share one row and restart their position ids; the model's mask keeps them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from understudy.types import Batch, TokenSequence, TrainingExample


def completion_index(prompt_length: int, completion_length: int, *, offset: int = 0) -> range:
    """Positions whose outputs predict the completion's tokens, in a row where the sequence starts at ``offset``.

    Entry t predicts ``completion_ids[t]``, which stands at ``offset + prompt_length + t``; hence the minus one.
    """
    if prompt_length < 1:
        raise ValueError("got an empty prompt; expected at least one token before the first one that is predicted")
    start = offset + prompt_length - 1
    return range(start, start + completion_length)


@dataclass(frozen=True)
class Layout:
    """Sequences as model input: ``input_ids`` [B, L], ``position_ids`` [1, L] (packed rows only), and for the N
    completion tokens of all of them, in order, ``token_index`` [N] (the predicting positions, flat) and ``target_ids``
    [N]."""

    input_ids: Tensor
    position_ids: Tensor | None
    token_index: Tensor
    target_ids: Tensor


def lay_out(
    sequences: Sequence[TokenSequence | TrainingExample], *, device: str | torch.device, packing: bool = False
) -> Layout:
    """Put sequences into one padded block, or one packed row."""
    rows = [[*s.prompt_ids, *s.completion_ids] for s in sequences]
    width = max(map(len, rows))
    if packing:
        offsets = list(accumulate(map(len, rows[:-1]), initial=0))
        ids = [[token for row in rows for token in row]]
        position_ids = torch.tensor([[i for row in rows for i in range(len(row))]], device=device)
    else:
        offsets = list(range(0, width * len(rows), width))
        ids = [row + [0] * (width - len(row)) for row in rows]
        position_ids = None
    index = [
        position
        for s, offset in zip(sequences, offsets, strict=True)
        for position in completion_index(len(s.prompt_ids), len(s.completion_ids), offset=offset)
    ]
    targets = [token for s in sequences for token in s.completion_ids]
    return Layout(
        torch.tensor(ids, device=device),
        position_ids,
        torch.tensor(index, dtype=torch.long, device=device),
        torch.tensor(targets, dtype=torch.long, device=device),
    )


def plan_batches(
    sequences: Sequence[TokenSequence | TrainingExample], *, max_tokens: int, packing: bool = False
) -> list[list[int]]:
    """Sequence numbers per batch of at most ``max_tokens`` tokens, padding included; a longer single sequence gets a
    batch of its own. Like lengths go together; none is dropped or cut."""
    lengths = [len(s.prompt_ids) + len(s.completion_ids) for s in sequences]
    plan: list[list[int]] = []
    used = 0
    for i in sorted(range(len(sequences)), key=lengths.__getitem__):
        # Lengths ascend, so the newest sequence sets a padded block's width.
        used = used + lengths[i] if packing else lengths[i] * (len(plan[-1]) + 1 if plan else 1)
        if not plan or used > max_tokens:
            plan.append([])
            used = lengths[i]
        plan[-1].append(i)
    return plan


def micro_batches(
    examples: Sequence[TrainingExample],
    *,
    micro_batch_tokens: int,
    packing: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Batch]:
    """Examples -> batches of at most ``micro_batch_tokens`` tokens and one teacher each; see ``plan_batches``.
    ``dtype`` is that of log-probabilities, advantages and weights. All tensors are on ``device`` but hidden states: see
    ``Batch``."""
    batches: list[Batch] = []
    for teacher in sorted({example.teacher for example in examples}):
        own = [example for example in examples if example.teacher == teacher]
        for chosen in plan_batches(own, max_tokens=micro_batch_tokens, packing=packing):
            batches.append(_make_batch([own[i] for i in chosen], packing, device, dtype))
    return batches


def _make_batch(
    examples: Sequence[TrainingExample], packing: bool, device: str | torch.device, dtype: torch.dtype
) -> Batch:
    def column(name: str, dtype: torch.dtype) -> Tensor:
        rows = [_checked(getattr(example, name), example) for example in examples]
        return torch.tensor([value for row in rows for value in row], dtype=dtype, device=device)

    def optional(name: str, dtype: torch.dtype) -> Tensor | None:
        return None if all(getattr(example, name) is None for example in examples) else column(name, dtype)

    def hidden(name: str) -> Tensor | None:
        if all(getattr(example, name) is None for example in examples):
            return None
        return torch.cat([_checked(getattr(example, name), example) for example in examples]).cpu()

    layout = lay_out(examples, device=device, packing=packing)
    # A policy loss needs both: where one is missing, that is an error.
    has_policy = any(example.advantages is not None for example in examples)
    return Batch(
        input_ids=layout.input_ids,
        position_ids=layout.position_ids,
        token_index=layout.token_index,
        target_ids=layout.target_ids,
        loss_mask=column("loss_mask", torch.bool),
        sampler_logprobs=column("sampler_logprobs", dtype) if has_policy else None,
        advantages=optional("advantages", dtype),
        teacher_hidden=hidden("teacher_hidden"),
        teacher=examples[0].teacher,
        sequence_tokens=sum(len(e.prompt_ids) + len(e.completion_ids) for e in examples),
        num_sequences=sum(any(e.loss_mask) for e in examples),
        reference_hidden=hidden("reference_hidden"),
        topk_ids=optional("topk_ids", torch.long),
        topk_logprobs=optional("topk_logprobs", dtype),
        weights=optional("weights", dtype),
    )


def _checked(column: Any, example: TrainingExample) -> Any:
    """A missing or misaligned signal must never turn into zeros."""
    if column is None or len(column) != len(example.completion_ids):
        got = "none" if column is None else str(len(column))
        raise ValueError(
            f"got {got} entries for {len(example.completion_ids)} completion tokens; expected one each, "
            "in every example"
        )
    return column

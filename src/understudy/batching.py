"""Training examples -> micro-batches. The only place that shifts: a token is predicted at the position before it.

Rows are right-padded without an attention mask: attention is causal, so no real position ever sees padding. With
``packing`` several sequences share one row and restart their position ids; the model's mask keeps them apart. With
``share_prompts`` a prompt of several completions goes through the model once, and they continue its key-value cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, Literal

import torch
from torch import Tensor

from understudy.types import Batch, Continuation, SharedPrompts, TokenSequence, TrainingExample


def completion_index(prompt_length: int, completion_length: int, *, offset: int = 0) -> range:
    """Positions whose outputs predict the completion's tokens, in a row where the sequence starts at ``offset``.

    Entry t predicts ``completion_ids[t]``, which stands at ``offset + prompt_length + t``; hence the minus one.
    """
    if prompt_length < 1:
        raise ValueError("got an empty prompt; expected at least one token before the first one that is predicted")
    start = offset + prompt_length - 1
    return range(start, start + completion_length)


Arrangement = Literal["padded", "packed", "shared"]

# Sharing a prompt takes a second pass: it must save this share of the tokens.
_SHARING_GAIN = 0.1
# Completions behind shared prompts go through the model in blocks of at least so many tokens, and are padded to at most
# so many times their length.
_BLOCK_TOKENS = 512
_BLOCK_SPREAD = 1.2


@dataclass(frozen=True)
class Layout:
    """Sequences as model input: ``input_ids`` [B, L], ``position_ids`` [1, L] (packed rows only), ``shared`` (shared
    prompts only), and for the N completion tokens of all of them, in order, ``token_index`` [N] (the predicting
    positions, flat; see ``Batch``) and ``target_ids`` [N]."""

    input_ids: Tensor
    position_ids: Tensor | None
    shared: SharedPrompts | None
    token_index: Tensor
    target_ids: Tensor


def lay_out(
    sequences: Sequence[TokenSequence | TrainingExample],
    *,
    device: str | torch.device,
    arrangement: Arrangement = "padded",
) -> Layout:
    """Put sequences into one padded block, one packed row, or completions behind prompts that they share (in ascending
    order of length, for little padding)."""
    position_ids = shared = None
    rows = [[*s.prompt_ids, *s.completion_ids] for s in sequences]
    if arrangement == "shared":
        ids, shared, indices = _behind_prompts(sequences, device)
    elif arrangement == "packed":
        ids = [[token for row in rows for token in row]]
        position_ids = torch.tensor([[i for row in rows for i in range(len(row))]], device=device)
        indices = _indices(sequences, accumulate(map(len, rows[:-1]), initial=0))
    else:
        ids = _padded(rows)
        indices = _indices(sequences, range(0, len(ids[0]) * len(rows), len(ids[0])))
    targets = [token for s in sequences for token in s.completion_ids]
    return Layout(
        torch.tensor(ids, device=device),
        position_ids,
        shared,
        torch.tensor(list(chain.from_iterable(indices)), dtype=torch.long, device=device),
        torch.tensor(targets, dtype=torch.long, device=device),
    )


def _indices(sequences: Sequence[TokenSequence | TrainingExample], offsets: Iterable[int]) -> Iterator[Sequence[int]]:
    for s, offset in zip(sequences, offsets, strict=True):
        yield completion_index(len(s.prompt_ids), len(s.completion_ids), offset=offset)


def _behind_prompts(
    sequences: Sequence[TokenSequence | TrainingExample], device: str | torch.device
) -> tuple[list[list[int]], SharedPrompts, list[Sequence[int]]]:
    """Every prompt once, the completions but for their last tokens (which predict nothing), and the predicting
    positions of each: its prompt's last, then its own."""
    numbers: dict[tuple[int, ...], int] = {}
    rows = [numbers.setdefault(tuple(s.prompt_ids), len(numbers)) for s in sequences]
    width = max(map(len, numbers))
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in numbers]
    continuations: list[Continuation] = []
    indices: list[Sequence[int]] = []
    start = width * len(numbers)
    for chosen in _of_like_length([len(s.completion_ids) for s in sequences]):
        ids = _padded([sequences[i].completion_ids[:-1] for i in chosen])
        for i in chosen:
            first = completion_index(width, 1, offset=rows[i] * width)
            own = completion_index(1, len(sequences[i].completion_ids) - 1, offset=start)
            indices.append([*first, *own] if sequences[i].completion_ids else [])
            start += len(ids[0])
        if ids[0]:
            own_rows = torch.tensor([rows[i] for i in chosen], device=device)
            continuations.append(Continuation(torch.tensor(ids, device=device), own_rows))
    prompts = [[0] * (width - len(prompt)) + list(prompt) for prompt in numbers]
    return prompts, SharedPrompts(torch.tensor(mask, device=device), continuations), indices


def _of_like_length(lengths: Sequence[int]) -> Iterator[range]:
    """Numbers of ascending lengths, cut where a longer one would pad a block that fills the machine already."""
    start = 0
    for i, length in enumerate(lengths):
        if (i - start) * length >= _BLOCK_TOKENS and length > _BLOCK_SPREAD * lengths[start]:
            yield range(start, i)
            start = i
    yield range(start, len(lengths))


def _padded(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    width = max(map(len, rows))
    return [[*row, *[0] * (width - len(row))] for row in rows]


def plan_batches(
    sequences: Sequence[TokenSequence | TrainingExample],
    *,
    max_tokens: int,
    packing: bool = False,
    share_prompts: bool = False,
) -> list[tuple[Arrangement, list[int]]]:
    """Batches of at most ``max_tokens`` tokens, padding included: how each is arranged, and its sequences' numbers.

    A longer single sequence gets a batch of its own. Like lengths go together; none is dropped or cut. With
    ``share_prompts``, sequences with one prompt share it where that saves tokens after padding.
    """
    lengths = [len(s.prompt_ids) + len(s.completion_ids) for s in sequences]
    groups = _sharing_groups(sequences, max_tokens) if share_prompts and not packing else []
    shared = {i for group in groups for i in group}
    plan: list[tuple[Arrangement, list[int]]] = []
    used = 0
    for i in sorted(set(range(len(sequences))) - shared, key=lengths.__getitem__):
        # Lengths ascend, so the newest sequence sets a padded block's width.
        used = used + lengths[i] if packing else lengths[i] * (len(plan[-1][1]) + 1 if plan else 1)
        if not plan or used > max_tokens:
            plan.append(("packed" if packing else "padded", []))
            used = lengths[i]
        plan[-1][1].append(i)
    return plan + [("shared", batch) for batch in _merged(groups, sequences, max_tokens)]


def _sharing_groups(sequences: Sequence[TokenSequence | TrainingExample], max_tokens: int) -> list[list[int]]:
    """Sequences that should share a prompt, as many as fit a batch."""
    by_prompt: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, s in enumerate(sequences):
        by_prompt[tuple(s.prompt_ids)].append(i)
    groups: list[list[int]] = []
    for members in by_prompt.values():
        parts: list[list[int]] = []
        for i in sorted(members, key=lambda i: len(sequences[i].completion_ids)):
            if not parts or _tokens([[*parts[-1], i]], sequences) > max_tokens:
                parts.append([])
            parts[-1].append(i)
        for part in parts:
            prompt = len(sequences[part[0]].prompt_ids)
            completions = sum(len(sequences[i].completion_ids) for i in part)
            # Padding is left out: other groups will fill it.
            if prompt + completions <= (1 - _SHARING_GAIN) * (prompt * len(part) + completions):
                groups.append(part)
    return groups


def _merged(
    groups: Sequence[list[int]], sequences: Sequence[TokenSequence | TrainingExample], max_tokens: int
) -> list[list[int]]:
    """Groups joined into batches: prompts of like length together, completions in ascending order."""
    batches: list[list[list[int]]] = []
    for group in sorted(groups, key=lambda group: len(sequences[group[0]].prompt_ids)):
        if not batches or _tokens([*batches[-1], group], sequences) > max_tokens:
            batches.append([])
        batches[-1].append(group)
    return [sorted(chain.from_iterable(b), key=lambda i: len(sequences[i].completion_ids)) for b in batches]


def _tokens(groups: Sequence[Sequence[int]], sequences: Sequence[TokenSequence | TrainingExample]) -> int:
    """Tokens of a batch of groups that share prompts, padding included."""
    prompts = max(len(sequences[group[0]].prompt_ids) for group in groups) * len(groups)
    lengths = sorted(len(sequences[i].completion_ids) for group in groups for i in group)
    return prompts + sum(max(0, lengths[block[-1]] - 1) * len(block) for block in _of_like_length(lengths))


def micro_batches(
    examples: Sequence[TrainingExample],
    *,
    micro_batch_tokens: int,
    packing: bool = False,
    share_prompts: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Batch]:
    """Examples -> batches of at most ``micro_batch_tokens`` tokens and one teacher each; see ``plan_batches``.
    ``dtype`` is that of log-probabilities, advantages and weights. All tensors are on ``device`` but hidden states: see
    ``Batch``."""
    batches: list[Batch] = []
    for teacher in sorted({example.teacher for example in examples}):
        own = [example for example in examples if example.teacher == teacher]
        plan = plan_batches(own, max_tokens=micro_batch_tokens, packing=packing, share_prompts=share_prompts)
        for arrangement, chosen in plan:
            batches.append(_make_batch([own[i] for i in chosen], arrangement, device, dtype))
    return batches


def _make_batch(
    examples: Sequence[TrainingExample], arrangement: Arrangement, device: str | torch.device, dtype: torch.dtype
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

    layout = lay_out(examples, device=device, arrangement=arrangement)
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
        shared=layout.shared,
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

"""Autoregressive sampling over a key-value cache: prompts of any lengths, one uniform number per row and token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from understudy.backends.cache import new_cache, select_rows
from understudy.backends.language_model import LanguageModel
from understudy.lm_head import LMHead, head_drawer
from understudy.sampling_kernel import float64_device, invert

# Nucleus sampling looks among this many of the likeliest tokens first: sorting a vocabulary costs more than the head.
_NUCLEUS = 1024


def rollout_uniforms(seed: int, prompt_index: int, sample_index: int, length: int) -> np.ndarray:
    """The random numbers [length] in [0, 1) that decide one rollout: a function of its identity alone."""
    return np.random.default_rng([seed, prompt_index, sample_index]).random(length)


class TokenChooser:
    """Draws the next token of up to ``rows`` rows by inverse CDF. Log-probabilities are at ``temperature`` (at 1 for
    greedy, temperature 0), before top-p and top-k."""

    def __init__(self, head: LMHead, *, rows: int, temperature: float, top_p: float = 1.0, top_k: int = 0) -> None:
        self._greedy = temperature == 0
        self._truncated = not self._greedy and (top_p < 1 or 0 < top_k < head.vocab_size)
        self._head, self._temperature, self._top_p, self._top_k = head, temperature, top_p, top_k
        self._drawer = None if self._truncated else head_drawer(head, rows, temperature=temperature or 1.0)

    def __call__(self, hidden: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [n, H], uniforms [n] float64 -> (ids [n], logprobs [n])."""
        if self._drawer is not None:
            return self._drawer.draw(hidden, None if self._greedy else uniforms)
        logprobs = self._head.logprobs(hidden, temperature=self._temperature)
        ids = _draw_truncated(logprobs, uniforms, self._top_p, self._top_k)
        return ids, logprobs.gather(-1, ids[:, None])[:, 0]


def _draw_truncated(logprobs: Tensor, uniforms: Tensor, top_p: float, top_k: int) -> Tensor:
    """A token [n] of the ``top_k`` likeliest (0: all) and of the smallest set of them with mass >= ``top_p``."""
    exact = float64_device(logprobs.device)
    size = logprobs.shape[-1]
    values, ids = logprobs.topk(min(size, top_k or _NUCLEUS))
    if not top_k and bool((values.exp().sum(-1) < top_p).any()):
        values, ids = logprobs.sort(dim=-1, descending=True)
    probabilities = values.to(exact, torch.float64).exp()
    before = probabilities.cumsum(-1) - probabilities
    total = probabilities.sum(-1, keepdim=True) if top_k or probabilities.shape[-1] == size else 1.0
    # The likeliest token always stays, and the one that crosses top_p belongs to the set.
    outside = before >= top_p * total
    outside[:, 0] = False
    ids, order = ids.to(exact).sort(dim=-1)
    kept = probabilities.masked_fill(outside, 0.0).gather(-1, order).cumsum(-1)
    return ids.gather(-1, invert(kept, uniforms.to(exact))[0][:, None])[:, 0].to(logprobs.device)


@torch.no_grad()
def decode(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    uniforms: np.ndarray,
    *,
    stop_ids: frozenset[int],
    max_tokens: Sequence[int],
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    ends: Callable[[Sequence[int]], bool] | None = None,
) -> list[tuple[list[int], list[float]]]:
    """Complete every prompt: (completion ids, their log-probabilities) per row, at most ``max_tokens`` of them.

    ``uniforms`` [B, >= max(max_tokens)]. ``ends`` (completion so far) -> whether it ends here, beside ``stop_ids``.

    Prompts that are equal go through the model once. Others are padded on the left and the padding masked, so that all
    rows append to the cache together. Rows that have ended leave the batch once they are an eighth of it (compacting
    the cache is not free). Architectures whose cache cannot choose rows do neither.
    """
    device = model.device
    cache = new_cache(model.config, in_place=True)
    can_select = cache is not None
    distinct = list(dict.fromkeys(map(tuple, prompts))) if can_select else list(map(tuple, prompts))
    ids, mask = _left_padded(distinct, device)
    ragged = not bool(mask.all())
    rows = torch.arange(len(prompts), device=device)  # the batch's rows -> the caller's
    written = torch.zeros(len(prompts), max(max_tokens), dtype=torch.long, device=device)
    logprobs = torch.zeros(written.shape, dtype=torch.promote_types(model.dtype, torch.float32), device=device)
    lengths = torch.zeros(len(prompts), dtype=torch.long, device=device)
    limits = torch.tensor(max_tokens, device=device)
    draws = torch.tensor(uniforms, dtype=torch.float64, device=float64_device(device))
    stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    choose = TokenChooser(model.head, rows=len(prompts), temperature=temperature, top_p=top_p, top_k=top_k)
    for t in range(max(max_tokens)):
        inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if ragged:
            inputs |= {"attention_mask": mask, "position_ids": _positions(mask, ids.shape[1])}
        output = model.hidden(ids, **inputs)
        cache, hidden = output.past_key_values, output.last_hidden_state[:, -1]
        if t == 0 and len(distinct) < len(prompts):
            numbers = {prompt: i for i, prompt in enumerate(distinct)}
            index = torch.tensor([numbers[tuple(prompt)] for prompt in prompts], device=device)
            select_rows(cache, index)
            hidden, mask = hidden[index], mask[index]
        tokens, own = choose(hidden, draws[rows.to(draws.device), t])
        written[rows, t], logprobs[rows, t] = tokens, own
        lengths[rows] += ~finished
        finished = finished | torch.isin(tokens, stop) | (t + 1 >= limits[rows])
        if ends is not None:
            finished = finished | _ended(ends, written[rows, : t + 1], finished)
        if finished.all():
            break
        if can_select and int(finished.sum()) * 8 >= len(rows):
            keep = (~finished).nonzero()[:, 0]
            select_rows(cache, keep)
            rows, tokens, mask, finished = rows[keep], tokens[keep], mask[keep], finished[keep]
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    columns = zip(written.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)
    return [(own_ids[:n], own[:n]) for own_ids, own, n in columns]


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, L]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, (torch.arange(width, device=device) >= (width - lengths)[:, None]).long()


def _positions(mask: Tensor, length: int) -> Tensor:
    """Position ids of the last ``length`` columns: padding does not count."""
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]


def _ended(ends: Callable[[Sequence[int]], bool], written: Tensor, finished: Tensor) -> Tensor:
    """Rows [n] whose text ends here; those that have finished are not looked at."""
    rows = zip(written.tolist(), finished.tolist(), strict=True)
    return torch.tensor([not over and ends(ids) for ids, over in rows], device=written.device)

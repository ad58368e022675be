"""Autoregressive sampling over a key-value cache: prompts of any lengths, one uniform number per row and token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from understudy.backends.loading import LanguageModel


def rollout_uniforms(seed: int, prompt_index: int, sample_index: int, length: int) -> np.ndarray:
    """The random numbers [length] in [0, 1) that decide one rollout: a function of its identity alone."""
    return np.random.default_rng([seed, prompt_index, sample_index]).random(length)


def float64_device(device: torch.device) -> torch.device:
    """Where float64 is to be had: sums over a vocabulary want it, and MPS has none."""
    return torch.device("cpu") if device.type == "mps" else device


def choose_tokens(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF: logits [B, V], uniforms [B] float64 -> (ids [B], logprobs [B]).

    Log-probabilities are at ``temperature`` (at 1 for greedy, temperature 0), before top-p and top-k.
    """
    greedy = temperature == 0
    logprobs = torch.log_softmax(logits if greedy else logits / temperature, dim=-1)
    if greedy:
        ids = logits.argmax(-1)
    else:
        exact = float64_device(logits.device)
        probabilities = _truncated(logprobs, top_p, top_k).to(exact, torch.float64)
        cumulative = probabilities.cumsum(-1)
        # Strictly below the total, so that rounding cannot select past the last token that has any mass.
        point = uniforms.to(exact).clamp(max=1 - 2.0**-32) * cumulative[:, -1]
        ids = torch.searchsorted(cumulative, point[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
        ids = ids.to(logits.device)
    return ids, logprobs.gather(-1, ids[:, None])[:, 0]


def _truncated(logprobs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Probabilities with everything outside the top k and the smallest set of mass >= top_p set to zero."""
    probabilities = logprobs.exp()
    if 0 < top_k < probabilities.shape[-1]:
        kth = probabilities.topk(top_k, dim=-1).values[:, -1:]
        probabilities = torch.where(probabilities < kth, 0.0, probabilities)
    if top_p < 1:
        ordered, order = (probabilities / probabilities.sum(-1, keepdim=True)).sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p still belongs to the set
        probabilities = probabilities.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
    return probabilities


@torch.no_grad()
def decode(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    uniforms: np.ndarray,
    *,
    stop_ids: frozenset[int],
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
) -> list[tuple[list[int], list[float]]]:
    """Complete every prompt: (completion ids, their log-probabilities) per row. ``uniforms`` [B, >= max_tokens].

    Prompts are padded on the left and the padding masked, so that all rows append to the cache together. Rows that have
    ended leave the batch once they are an eighth of it (compacting the cache is not free) where the cache can drop
    rows.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    lengths = torch.tensor([len(p) for p in prompts], device=model.device)
    mask = (torch.arange(width, device=model.device) >= (width - lengths)[:, None]).long()
    ragged = bool((lengths != width).any())
    draws = torch.tensor(uniforms, dtype=torch.float64, device=float64_device(model.device))
    stop = torch.tensor(sorted(stop_ids), device=model.device)
    rows = torch.arange(len(prompts), device=model.device)  # the batch's rows -> the caller's
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    head, cache = model.head, None
    written: list[tuple[Tensor, Tensor, Tensor]] = []
    for t in range(max_tokens):
        inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if ragged:
            inputs |= {"attention_mask": mask, "position_ids": _positions(mask, ids.shape[1])}
        output = model.hidden(ids, **inputs)
        cache = output.past_key_values
        logits = head.logits(output.last_hidden_state[:, -1])
        tokens, logprobs = choose_tokens(
            logits, draws[rows.to(draws.device), t], temperature=temperature, top_p=top_p, top_k=top_k
        )
        written.append((rows[~finished], tokens[~finished], logprobs[~finished]))
        finished = finished | torch.isin(tokens, stop)
        if finished.all():
            break
        if int(finished.sum()) * 8 >= len(rows) and _can_drop_rows(cache):
            keep = (~finished).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, tokens, mask, finished = rows[keep], tokens[keep], mask[keep], finished[keep]
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return _per_row(written, len(prompts))


def _can_drop_rows(cache: Any) -> bool:
    """Whether every layer's state is keys and values. States of convolutions and linear attention (hybrids) cannot be
    selected from, and layers with both inherit a selection that forgets the state."""
    layers = getattr(cache, "layers", None) or [None]
    return all(hasattr(layer, "batch_select_indices") and not hasattr(layer, "conv_states") for layer in layers)


def _positions(mask: Tensor, length: int) -> Tensor:
    """Position ids of the last ``length`` columns: padding does not count."""
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]


def _per_row(written: Sequence[tuple[Tensor, Tensor, Tensor]], num_rows: int) -> list[tuple[list[int], list[float]]]:
    completions: list[tuple[list[int], list[float]]] = [([], []) for _ in range(num_rows)]
    for rows, tokens, logprobs in written:
        for row, token, logprob in zip(rows.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
            completions[row][0].append(token)
            completions[row][1].append(logprob)
    return completions

"""Exact draws from a softmax over a vocabulary in two levels, at less than the cost of the LM head.

The head's logits are made tile by tile, and each tile is reduced to the masses of blocks of ids while it is in the
cache. One uniform number picks a block, and what is left of it a token inside: the inverse of the cumulative
distribution in vocabulary order, without a cumulative sum over the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.head_kernels import Projection

BLOCK = 128
# For a batch of 64 rows a tile is a megabyte of float32: it stays in a core's cache.
TILE_IDS = 4096


def float64_device(device: torch.device) -> torch.device:
    """Where float64 is to be had: sums over a vocabulary want it, and MPS has none."""
    return torch.device("cpu") if device.type == "mps" else device


class Drawer:
    """Draws tokens for up to ``rows`` hidden states at once, in storage that is allocated once."""

    def __init__(self, projection: Projection, rows: int) -> None:
        self._projection = projection
        ids = projection.rows if projection.weight.device.type == "cuda" else min(projection.rows, TILE_IDS)
        self._width = -(-ids // BLOCK) * BLOCK
        self._tiles = -(-projection.rows // self._width)
        device = projection.weight.device
        self._storage = torch.empty(self._tiles * rows * self._width, dtype=projection.wide, device=device)
        self._scratch = torch.empty(rows * self._width, dtype=projection.wide, device=device)

    def draw(self, hidden: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states [n, H] and uniforms [n] float64 (None: take the likeliest) -> ids [n], log-probabilities
        [n]."""
        logits, peaks, masses = self._blocks(hidden.to(self._projection.weight.dtype))
        exact = float64_device(hidden.device)
        peak = peaks.amax(-1, keepdim=True)
        weights = (peaks - peak).to(exact, torch.float64).exp() * masses.to(exact)
        cumulative = weights.cumsum(-1)
        if uniforms is None:
            block, left = peaks.argmax(-1).to(exact), None
        else:
            block, left = invert(cumulative, uniforms.to(exact))
        tile, inside = block // (self._width // BLOCK), block % (self._width // BLOCK)
        rows = torch.arange(len(hidden), device=logits.device)
        own = logits.view(self._tiles, len(hidden), -1, BLOCK)[tile.to(rows.device), rows, inside.to(rows.device)]
        if left is None:
            offset = own.argmax(-1).to(exact)
        else:
            offset, _ = invert((own - peak).to(exact, torch.float64).exp().cumsum(-1), left)
        chosen = own.gather(-1, offset.to(own.device)[:, None])[:, 0]
        # Logits that are not numbers select past the vocabulary's end; their log-probability tells.
        ids = (block * BLOCK + offset).clamp(max=self._projection.rows - 1)
        return ids.to(hidden.device), chosen - peak[:, 0] - cumulative[:, -1].log().to(peak)

    def _blocks(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [tiles, n, width], and for the blocks [n, blocks] of every row their highest logit (0 where all are
        -inf) and the sum of exponentials relative to it."""
        n, width = len(hidden), self._width
        logits = self._storage[: self._tiles * n * width].view(self._tiles, n, width)
        scratch = self._scratch[: n * width].view(n, -1, BLOCK)
        peaks = logits.new_empty(n, self._tiles, width // BLOCK)
        masses = torch.empty_like(peaks)
        for i, tile in enumerate(logits):
            low = i * width
            high = min(low + width, self._projection.rows)
            self._projection.logits(hidden, low, high, tile[:, : high - low])
            tile[:, high - low :] = -torch.inf
            blocks = tile.view(n, -1, BLOCK)
            peaks[:, i] = blocks.amax(-1)
            torch.sub(blocks, peaks[:, i, :, None].nan_to_num(neginf=0.0), out=scratch)
            masses[:, i] = scratch.exp_().sum(-1)
        return logits, peaks.flatten(1), masses.flatten(1)


def invert(cumulative: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The entry [n] of each row of ``cumulative`` [n, m] where its share ``uniforms`` of the total falls, and how far
    into the entry that is, in [0, 1)."""
    # Strictly below the total, so that rounding cannot select past the last entry that has any mass.
    point = uniforms.clamp(max=1 - 2.0**-32)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, point, right=True).clamp(max=cumulative.shape[1] - 1)
    before = torch.where(index > 0, cumulative.gather(1, (index - 1).clamp(min=0)), 0.0)
    share = (point - before) / (cumulative.gather(1, index) - before)
    return index[:, 0], share[:, 0]

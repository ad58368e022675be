"""Softmax over a vocabulary in tiles: what ``lm_head`` runs. Never more than a block of logits exists.

Tokens are taken in blocks whose float32 logits fit BLOCK_BYTES, the vocabulary in tiles that fit a cache. Where the
loss is known in the forward pass, the gradients are formed there, block by block, while the block's logits are still at
hand: one projection, as in a plain loss. Matrix products run in the model's dtype, everything else in float32 or wider.

Tiles live in storage that is allocated once: fresh memory costs more than the arithmetic on it, a page fault at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits of one model kept for a block of tokens. More of it means fewer passes over the weight's gradient, which is as
# large as the weight.
BLOCK_BYTES = 112 * 2**20
# A tile of 128 tokens is a megabyte of float32: a few of them stay in a core's cache.
TILE_WIDTH = 2048
# Where no logits are kept, blocks are as short as the matrix products allow.
TILE_ROWS = 512
# GPUs want large kernels rather than cached ones: 32 Mi numbers are 128 MiB of float32.
GPU_BLOCK_BYTES = 2**29
GPU_TILE_NUMBERS = 2**25
GPU_TILE_ROWS = 4096

# exp() of less is zero in float64 too, so that a difference of logits may be cut here: 0 * -inf is avoided for free.
NEGLIGIBLE = -1000.0

# (log-probabilities of a block [n, K], its rows) -> the block's summed loss
BlockLoss = Callable[[Tensor, slice], Tensor]
# Gradients of hidden states [N, H], weight [V, H] and bias [V], None where not needed
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool]


@contextlib.contextmanager
def detached(*devices: torch.device) -> Iterator[None]:
    """No autograd, and no autocast: operands have been cast to what they should be multiplied in."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in {device.type for device in devices}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@dataclass(frozen=True)
class Projection:
    """Hidden states -> logits / temperature of the first ``rows`` ids; ``weight`` is in the dtype to multiply in."""

    weight: Tensor
    bias: Tensor | None
    rows: int
    softcap: float | None
    scale: float
    temperature: float

    @property
    def wide(self) -> torch.dtype:
        """The dtype of everything but matrix products."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def factor(self) -> float:
        """Logits per unit of the matrix product, soft-capping apart."""
        return self.scale / self.temperature

    def width(self, tokens: int) -> int:
        """Ids in a tile, for blocks of ``tokens`` rows."""
        on_cpu = self.weight.device.type == "cpu"
        return min(self.rows, TILE_WIDTH if on_cpu else max(TILE_WIDTH, GPU_TILE_NUMBERS // max(1, tokens)))

    def tiles(self, tokens: int) -> list[tuple[int, int]]:
        """[low, high) id ranges for blocks of ``tokens`` rows."""
        width = self.width(tokens)
        return [(low, min(low + width, self.rows)) for low in range(0, self.rows, width)]

    def storage(self, count: int, tokens: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room for ``count`` tiles of ``tokens`` rows, to be used again and again."""
        shape = count, tokens * self.width(tokens)
        return torch.empty(shape, dtype=dtype or self.wide, device=self.weight.device)

    def logits(self, hidden: Tensor, low: int, high: int, out: Tensor) -> Tensor:
        """[n, H] -> ``out`` [n, high - low], which is float32 or wider and may lie on another device."""
        weight, bias = self.weight[low:high], self.bias
        if bias is not None:
            out.copy_(torch.addmm(bias[low:high], hidden, weight.T))
        elif (out.dtype, out.device) == (weight.dtype, weight.device):
            torch.mm(hidden, weight.T, out=out)
        else:
            out.copy_(hidden @ weight.T)
        if self.softcap is None:
            return out if self.factor == 1 else out.mul_(self.factor)
        return out.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def slope(self, logits: Tensor) -> Tensor:
        """d logits / d (matrix product), the constant ``factor`` left out. Only for soft-capped heads."""
        assert self.softcap is not None
        return 1 - (logits * (self.temperature / self.softcap)).square()


def tile_rows(device: torch.device) -> int:
    """Tokens at a time where no logits are kept."""
    return TILE_ROWS if device.type == "cpu" else GPU_TILE_ROWS


def block_rows(vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens whose logits fit the budget, at least one."""
    budget = BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES
    return max(1, budget // (vocab_size * dtype.itemsize))


class GradientSums:
    """Sums over tiles and blocks, float32 or wider."""

    def __init__(self, projection: Projection, hidden: Tensor, full_rows: int, needs: Needs) -> None:
        wide, width = projection.wide, hidden.shape[-1]

        def zeros(needed: bool, *shape: int) -> Tensor | None:
            return torch.zeros(shape, dtype=wide, device=hidden.device) if needed else None

        self.hidden = zeros(needs[0], *hidden.shape)
        self.weight = zeros(needs[1], full_rows, width)
        self.bias = zeros(needs[2], full_rows)
        self.wanted = any(needs)

    def add(self, slope: Tensor, hidden: Tensor, weight: Tensor, low: int, hidden_sum: Tensor | None) -> None:
        """A tile's part: ``slope`` [n, v] on the products of ``hidden`` [n, H] and ``weight`` [v, H], the ids from
        ``low`` on. ``hidden_sum`` [n, H] collects the hidden states' gradient."""
        high = low + slope.shape[1]
        if self.bias is not None:
            self.bias[low:high] += slope.sum(0)
        slope = slope.to(hidden.dtype)
        if hidden_sum is not None:
            add_product(hidden_sum, slope, weight)
        if self.weight is not None:
            add_product(self.weight[low:high], slope.T, hidden)

    def result(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
        """In the inputs' dtypes."""
        sums = zip((self.hidden, self.weight, self.bias), (hidden, weight, bias), strict=True)
        first, second, third = (s if s is None or x is None else s.to(x.dtype) for s, x in sums)
        return first, second, third


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, which may be of a narrower dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def tile_of(storage: Tensor, tokens: int, low: int, high: int) -> Tensor:
    """A tile's place [tokens, high - low] in a block's storage: contiguous, so that a tile is a run of memory."""
    return storage[tokens * low : tokens * high].view(tokens, high - low)


def normalise(tile: Tensor) -> Tensor:
    """Logits [n, v] become their softmax; returns their logsumexp [n]. A row of nothing but -inf has a logsumexp of
    -inf, and a softmax that means nothing."""
    maximum = tile.amax(-1)
    tile[:, 0] = torch.where(maximum == -torch.inf, 0.0, tile[:, 0])  # rather than 0 / 0
    torch.softmax(tile, -1, out=tile)
    # The entry at the maximum is exp(0) / sum: torch's softmax is several times faster than a sum of exponentials.
    return maximum - tile.amax(-1).log()


def _picked(chosen: Tensor, logits: Tensor, ids: Tensor, low: int) -> Tensor:
    """``chosen`` [n, K] with the entries whose ids lie in this tile."""
    local, inside = _local(ids, low, logits.shape[1])
    return torch.where(inside, logits.gather(1, local), chosen)


def _local(ids: Tensor, low: int, width: int) -> tuple[Tensor, Tensor]:
    local = ids - low
    return local.clamp(0, width - 1), (local >= 0) & (local < width)


def _add_at(tile: Tensor, ids: Tensor, values: Tensor, low: int) -> None:
    """tile[:, ids] += values, for the ids that lie in it."""
    local, inside = _local(ids, low, tile.shape[1])
    tile.scatter_add_(1, local, torch.where(inside, values, 0.0))


class SelectedLogprobs(torch.autograd.Function):
    """[N, H], [V, H], [V], [N, K] -> [N, K] for a loss that is not known yet: the backward pass projects again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, cast):  # pyright: ignore[reportIncompatibleMethodOverride]
        """``cast``: (hidden, weight, bias) -> (hidden in the dtype to multiply in, Projection)."""
        own, projection = cast(hidden, weight, bias)
        with detached(hidden.device):
            rows = tile_rows(hidden.device)
            pieces = zip(own.split(rows), ids.split(rows), strict=True)
            parts = [_selected(projection, block, block_ids) for block, block_ids in pieces]
            chosen, lse = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.cast = cast
        ctx.save_for_backward(hidden, weight, bias, ids, chosen, lse)
        return chosen - lse[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Tile by tile over the vocabulary: a tile of the weight's gradient stays in the cache while tokens pass."""
        hidden, weight, bias, ids, chosen, lse = ctx.saved_tensors
        own, projection = ctx.cast(hidden, weight, bias)
        with detached(hidden.device):
            sums = GradientSums(projection, own, weight.shape[0], ctx.needs_input_grad[:3])
            pull = gradient * projection.factor
            total = -pull.sum(-1, keepdim=True)
            at_ids = pull if projection.softcap is None else pull * projection.slope(chosen)
            rows = tile_rows(hidden.device)
            [storage] = projection.storage(1, min(rows, len(own)))
            for low, high in projection.tiles(rows):
                for start in range(0, len(own), rows):
                    block = slice(start, start + rows)
                    tile = tile_of(storage, len(own[block]), 0, high - low)
                    projection.logits(own[block], low, high, out=tile)
                    capped = None if projection.softcap is None else projection.slope(tile)
                    tile.sub_(lse[block, None]).exp_().mul_(total[block])
                    if capped is not None:
                        tile.mul_(capped)
                    _add_at(tile, ids[block], at_ids[block], low)
                    hidden_sum = None if sums.hidden is None else sums.hidden[block]
                    sums.add(tile, own[block], projection.weight[low:high], low, hidden_sum)
            return *sums.result(hidden, weight, bias), None, None


def _selected(projection: Projection, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """A block -> (logits at ``ids`` [n, K], logsumexp [n])."""
    chosen = torch.zeros(ids.shape, dtype=projection.wide, device=hidden.device)
    tiles = projection.tiles(len(hidden))
    [storage] = projection.storage(1, len(hidden))
    lse = chosen.new_empty(len(tiles), len(hidden))
    for part, (low, high) in zip(lse, tiles, strict=True):
        tile = projection.logits(hidden, low, high, out=tile_of(storage, len(hidden), 0, high - low))
        chosen = _picked(chosen, tile, ids, low)
        part.copy_(normalise(tile))
    return chosen, lse.logsumexp(0)


def topk_kernel(projection: Projection, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(log-probabilities [N, k], ids [N, k]), best first."""
    best: list[tuple[Tensor, Tensor]] = []
    for block in hidden.split(tile_rows(hidden.device)):
        values = torch.empty(len(block), 0, dtype=projection.wide, device=block.device)
        ids = torch.empty(len(block), 0, dtype=torch.long, device=block.device)
        tiles = projection.tiles(len(block))
        [storage] = projection.storage(1, len(block))
        lse = values.new_empty(len(tiles), len(block))
        for part, (low, high) in zip(lse, tiles, strict=True):
            tile = projection.logits(block, low, high, out=tile_of(storage, len(block), 0, high - low))
            top, places = tile.topk(min(k, high - low), -1)
            values, order = torch.cat([values, top], -1).sort(dim=-1, descending=True, stable=True)
            values, ids = values[:, :k], torch.cat([ids, places + low], -1).gather(-1, order[:, :k])
            part.copy_(normalise(tile))
        best.append((values - lse.logsumexp(0)[:, None], ids))
    logprobs, ids = (torch.cat(parts) for parts in zip(*best, strict=True))
    return logprobs, ids


def loss_kernel(
    projection: Projection, hidden: Tensor, ids: Tensor, block_loss: BlockLoss, sums: GradientSums
) -> tuple[Tensor, Tensor]:
    """(summed loss, log-probabilities [N, K]); the gradients go to ``sums``."""
    rows = min(block_rows(projection.rows, projection.wide, hidden.device), max(1, len(hidden)))
    logprobs = torch.empty(ids.shape, dtype=projection.wide, device=hidden.device)
    loss = logprobs.new_zeros(())
    numbers = rows * (projection.rows if sums.wanted else projection.width(rows))
    kept = torch.empty(numbers, dtype=loss.dtype, device=loss.device)
    for start in range(0, len(hidden), rows):
        block = slice(start, min(start + rows, len(hidden)))
        own, chosen, tiles = hidden[block], torch.zeros_like(logprobs[block]), projection.tiles(rows)
        lse = chosen.new_empty(len(tiles), len(own))
        for part, (low, high) in zip(lse, tiles, strict=True):
            tile = tile_of(kept, len(own), low, high) if sums.wanted else tile_of(kept, len(own), 0, high - low)
            projection.logits(own, low, high, out=tile)
            chosen = _picked(chosen, tile, ids[block], low)
            capped = None if projection.softcap is None or not sums.wanted else projection.slope(tile)
            part.copy_(normalise(tile))
            if capped is not None:
                tile.mul_(capped)
        whole = lse.logsumexp(0)
        logprobs[block] = chosen - whole[:, None]
        value, gradient = _loss_gradient(block_loss, logprobs[block], block, sums.wanted)
        loss += value
        if gradient is None:
            continue
        gradient = gradient * projection.factor
        at_ids = gradient if projection.softcap is None else gradient * projection.slope(chosen)
        # One exponential per logit: a tile's own softmax, times its share of the whole, is the whole's.
        shares = (lse - whole).exp() * -gradient.sum(-1)
        hidden_sum = None if sums.hidden is None else sums.hidden[block]
        for share, (low, high) in zip(shares, tiles, strict=True):
            tile = tile_of(kept, len(own), low, high).mul_(share[:, None])
            _add_at(tile, ids[block], at_ids, low)
            sums.add(tile, own, projection.weight[low:high], low, hidden_sum)
    return loss, logprobs


def _loss_gradient(block_loss: BlockLoss, logprobs: Tensor, rows: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
    if not wanted:
        return block_loss(logprobs, rows).detach(), None
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        loss = block_loss(leaf, rows)
        if not loss.requires_grad:  # a constant: nothing in this block trains
            return loss, None
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


class WithGradient(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx, value, gradients, *inputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        """``gradients``: one per input, None where not needed."""
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, factor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """A factor of 1 hands out the gradients themselves: autograd takes them over without a copy, unless it keeps
        the graph."""
        same = bool(factor == 1)
        return None, None, *(x if x is None or same else x * factor.to(x.dtype) for x in ctx.saved_tensors)

"""Divergences between two heads' outputs, block by block: ``divergences`` over the tiles of ``head_kernels``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from understudy.divergences import Divergence, gated
from understudy.head_kernels import NEGLIGIBLE, GradientSums, Projection, block_rows, tile_of


@dataclass(frozen=True)
class DivergenceInputs:
    """Two heads' outputs at the positions ``rows`` [n] of their hidden states; ``weights`` [n] multiply positions."""

    student: Projection
    teacher: Projection
    student_hidden: Tensor
    teacher_hidden: Tensor
    rows: Tensor
    weights: Tensor
    divergence: Divergence


def divergence_kernel(inputs: DivergenceInputs, sums: GradientSums) -> Tensor:
    """Columns [n, 3 or 4]: value, student's entropy, teacher's, gate if there is one. Gradients of the weighted sum of
    values go to ``sums``."""
    student, device = inputs.student, inputs.student_hidden.device
    dtype = torch.promote_types(student.wide, inputs.teacher.wide)
    size = min(block_rows(student.rows, dtype, device), max(1, len(inputs.rows)))
    kept = torch.empty(2, size * student.rows, dtype=dtype, device=device)
    scratch = student.storage(3, size, dtype)
    columns = [kept.new_empty(0, 2 + len(inputs.divergence.gates(kept.new_empty(0))))]
    for rows, weights in zip(inputs.rows.split(size), inputs.weights.split(size), strict=True):
        own = inputs.student_hidden[rows]
        other = inputs.teacher_hidden[rows.to(inputs.teacher_hidden.device)].to(inputs.teacher.weight.device)
        tiles = student.tiles(size)
        lse, entropy = _fill(student, own, tiles, kept[0], scratch)
        teacher_lse, teacher_entropy = _fill(inputs.teacher, other, tiles, kept[1], scratch)
        gates = inputs.divergence.gates(teacher_entropy)
        values, pulls = _terms(inputs, tiles, (lse, teacher_lse), gates, kept, scratch)
        columns.append(torch.stack([values, entropy, teacher_entropy, *gates[1:]], dim=-1))
        if not sums.wanted:
            continue
        factor = (weights * student.factor)[:, None]
        hidden_sum = None if sums.hidden is None else torch.zeros_like(own, dtype=sums.hidden.dtype)
        for low, high in tiles:
            p, pull = (tile_of(x, len(own), low, high) for x in kept)
            slope = pull.addcmul_(p, pulls[:, None], value=-1).mul_(factor)
            sums.add(slope, own, student.weight[low:high], low, hidden_sum)
        if sums.hidden is not None and hidden_sum is not None:
            sums.hidden[rows] = hidden_sum
    return torch.cat(columns)


def _fill(
    projection: Projection, hidden: Tensor, tiles: list[tuple[int, int]], kept: Tensor, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep a block's logits -> (logsumexp [n], entropy [n])."""
    lse, entropy = kept.new_empty(2, len(tiles), len(hidden))
    for part, part_entropy, (low, high) in zip(lse, entropy, tiles, strict=True):
        shifted, softmax = (tile_of(x, len(hidden), 0, high - low) for x in scratch[:2])
        logits = projection.logits(hidden, low, high, out=tile_of(kept, len(hidden), low, high))
        maximum = logits.amax(-1)
        finite = maximum.clamp(min=torch.finfo(logits.dtype).min)
        torch.sub(logits, finite[:, None], out=shifted).clamp_(min=NEGLIGIBLE)
        torch.softmax(shifted, -1, out=softmax)
        log_top = softmax.amax(-1).log()  # as in normalise
        part.copy_(maximum - log_top)
        # log(sum of exponentials) + mean distance from the maximum: two numbers that are never negative.
        part_entropy.copy_(-log_top - torch.linalg.vecdot(softmax, shifted))
    whole = lse.logsumexp(0)
    distance = (whole - lse).clamp(max=-NEGLIGIBLE)
    return whole, ((-distance).exp() * (entropy + distance)).sum(0)


def _terms(
    inputs: DivergenceInputs,
    tiles: list[tuple[int, int]],
    normalisers: tuple[Tensor, Tensor],
    gates: tuple[Tensor, ...],
    kept: Tensor,
    scratch: Tensor,
) -> tuple[Tensor, Tensor]:
    """(divergence [n], sum of pulls [n]); the logits kept become (p, pull), both times the soft-capping's slope."""
    student, tokens = inputs.student, len(gates[0])
    values, pulls = (torch.zeros_like(gates[0]) for _ in range(2))
    for low, high in tiles:
        p, pull = (tile_of(x, tokens, low, high) for x in kept)  # logits until overwritten
        log_p, log_q, q = (tile_of(x, tokens, 0, high - low) for x in scratch)
        capped = None if student.softcap is None else student.slope(p)
        for log_softmax, logits, lse in zip((log_p, log_q), (p, pull), normalisers, strict=True):
            torch.sub(logits, lse[:, None], out=log_softmax)
        torch.exp(log_p, out=p)
        torch.exp(log_q, out=q)
        pull.zero_()
        for part, gate in zip(inputs.divergence.parts, gates, strict=True):
            value, part_pull = part(log_p, log_q, p, q)
            values += gated(gate, value.sum(-1))
            pull.addcmul_(part_pull, gate[:, None])
        pulls += pull.sum(-1)
        if capped is not None:
            p.mul_(capped)
            pull.mul_(capped)
    return values, pulls

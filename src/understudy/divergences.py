"""Divergences between two next-token distributions, entry by entry: the maths that dense losses and the LM head's tiles
share. Pure functions of tensors.

With student p and teacher q over one vocabulary, a divergence is ``D = sum_v value_v``. Its gradient on the student's
logits is ``p_v (s_v - E_p[s])`` where ``s_v = dD/dp_v`` up to a constant, so an entry is described by two numbers:
``value_v`` and ``pull_v = p_v s_v``. Written out like this, p = q gives a gradient of exactly zero, and no term
overflows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DivergenceKind = Literal["reverse_kl", "forward_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "entropy_gated"]
KINDS: tuple[DivergenceKind, ...] = DivergenceKind.__args__

# exp of more leaves float32. The side whose mixture has such a gap weighs less than exp(-80): the cap does not show.
_LARGE = 80.0
# A beta or skew below this is zero: dividing by it would leave float32, and makes no other difference.
_NEGLIGIBLE = 1e-20

# (log p, log q, p, q) -> (value, pull), all of one shape
Terms = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Divergence:
    """Which divergence of student p from teacher q, in nats.

    - ``reverse_kl``: KL(p || q).
    - ``forward_kl``: KL(q || p).
    - ``jsd``: (beta KL(q || m) + (1 - beta) KL(p || m)) / (beta (1 - beta)) with m = beta q + (1 - beta) p. GKD's
      generalised Jensen-Shannon divergence (arXiv 2306.13649) vanishes at both ends of beta; divided like this it
      *is* the forward KL at beta = 0 and the reverse KL at beta = 1, and has KL's curvature at p = q for every beta.
    - ``skewed_kl``: KL(q || skew q + (1 - skew) p), ``skewed_reverse_kl``: KL(p || skew p + (1 - skew) q)
      (DistiLLM, arXiv 2402.03898): bounded by -log(skew).
    - ``entropy_gated``: KL(p || q), plus KL(q || p) at positions where the teacher's entropy is above
      ``entropy_threshold`` nats (arXiv 2603.07079).

    Raises:
        ValueError: unknown kind, or beta or skew outside their range.
    """

    kind: DivergenceKind = "reverse_kl"
    beta: float = 0.5
    skew: float = 0.1
    entropy_threshold: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"got kind {self.kind!r}; expected one of {', '.join(KINDS)}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"got beta = {self.beta}; expected 0 (forward KL) to 1 (reverse KL)")
        if not 0 <= self.skew < 1:
            raise ValueError(f"got skew = {self.skew}; expected at least 0 and below 1")

    @property
    def parts(self) -> tuple[Terms, ...]:
        """What is added up: one term, or two for ``entropy_gated``."""
        return {
            "reverse_kl": (reverse_kl_terms,),
            "forward_kl": (forward_kl_terms,),
            "jsd": (_jsd_terms(self.beta),),
            "skewed_kl": (_skewed_terms(self.skew),),
            "skewed_reverse_kl": (_skewed_reverse_terms(self.skew),),
            "entropy_gated": (reverse_kl_terms, forward_kl_terms),
        }[self.kind]

    def gates(self, teacher_entropy: Tensor) -> tuple[Tensor, ...]:
        """What each part counts at each position: [N] -> one [N] per part."""
        ones = torch.ones_like(teacher_entropy)
        if self.kind == "entropy_gated":
            return ones, (teacher_entropy > self.entropy_threshold).to(ones.dtype)
        return (ones,)


REVERSE_KL = Divergence()


def reverse_kl_terms(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q): value and pull are both p (log p - log q)."""
    # 0 log 0 = 0, the limit. Asked like this, NaN goes through instead of becoming 0.
    value = torch.where(p == 0, 0.0, p * (log_p - log_q))
    return value, value


def forward_kl_terms(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p): value q (log q - log p), pull p - q."""
    return torch.where(q == 0, 0.0, q * (log_q - log_p)), p - q


def _log_mix(gap: Tensor, share: float, rest: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of the mixture ``m = rest + share exp(gap)``, with rest = 1 - share: log m, m - 1 and m. ``rest`` is given
    because 1 - share has lost it in float32, where share is near 1. log m is exactly 0 at gap 0."""
    capped = gap.clamp(max=_LARGE)
    change, mix = share * torch.expm1(capped), rest + share * torch.exp(capped)
    # Each where it does not cancel: log1p near 1, log far below.
    log_mix = torch.where(change > -0.5, torch.log1p(change), torch.log(mix))
    return log_mix, change, mix


def _jsd_terms(beta: float) -> Terms:
    if beta < _NEGLIGIBLE:
        return forward_kl_terms
    if beta == 1:
        return reverse_kl_terms

    def terms(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        gap = log_q - log_p
        pull = torch.where(p == 0, 0.0, -p * _log_mix(gap, beta, 1 - beta)[0] / beta)  # p log(p / m) / beta
        teacher_side = torch.where(q == 0, 0.0, -q * _log_mix(-gap, 1 - beta, beta)[0] / (1 - beta))
        return pull + teacher_side, pull

    return terms


def _skewed_terms(skew: float) -> Terms:
    if skew < _NEGLIGIBLE:
        return forward_kl_terms

    def terms(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        log_mix, change, mix = _log_mix(log_p - log_q, 1 - skew, skew)
        # s = -(1 - skew) q / m; adding (1 - skew) makes it zero at p = q.
        pull = torch.where(p == 0, 0.0, p * (1 - skew) * change / mix)
        return torch.where(q == 0, 0.0, -q * log_mix), pull

    return terms


def _skewed_reverse_terms(skew: float) -> Terms:
    if skew < _NEGLIGIBLE:
        return reverse_kl_terms

    def terms(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        log_mix, change, mix = _log_mix(log_q - log_p, 1 - skew, skew)
        value = torch.where(p == 0, 0.0, -p * log_mix)
        # s = log(p / m) + 1 - skew p / m; the constant 1 - skew is taken off, so that it is zero at p = q.
        return value, torch.where(p == 0, 0.0, value + p * skew * change / mix)

    return terms


def gated(gate: Tensor, values: Tensor) -> Tensor:
    """``gate * values``, and 0 where the gate is closed, though the value be infinite there."""
    return torch.where(gate > 0, gate * values, 0.0)


def entropy_terms(log_p: Tensor, p: Tensor) -> Tensor:
    """-p log p, zero where p is."""
    return torch.where(p == 0, 0.0, -p * log_p)

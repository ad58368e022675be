"""Marks and rewards -> advantages and weights. Pure functions; credit is always detached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from understudy.errors import RunError
from understudy.types import HiddenScores, Rollout, ScoredRollout, Scores, TopkScores, TrainingExample


def reverse_kl(sampler_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """``log p_student - log q_teacher`` of the written tokens [T], in nats.

    Its expectation over the student's own tokens is KL(student || teacher) at each position. A positive entry marks a
    token that the teacher finds less likely than the student did.
    """
    return sampler_logprobs - teacher_logprobs


def distillation_advantages(
    sampler_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    kl_coef: float = 1.0,
    discount: float = 0.0,
    reference_logprobs: Tensor | None = None,
    extrapolation: float = 1.0,
    anchor_coef: float = 0.0,
    signal_clip: float | None = None,
    loss_mask: Tensor | None = None,
) -> Tensor:
    """Per-token credit of on-policy distillation, [T] -> [T], detached.

    ``-kl_coef * sum over k >= t of discount**(k - t) * reverse_kl[k]``, so with discount 0 (the article's setting) each
    token answers for itself alone. Inputs cover completion tokens only, so no credit can leak onto the prompt.

    Args:
        reference_logprobs: of a third model r [T], needed by the next two.
        extrapolation: lambda; the target is ``q**lambda r**(1 - lambda)``, that is
            ``reverse_kl = lambda (log p - log q) + (1 - lambda) (log p - log r)`` (G-OPD, arXiv 2602.12125).
        anchor_coef: adds ``-anchor_coef * (log p - log r)``, the sampled KL(p || r).
        signal_clip: each token's reverse_kl is clipped to +- this, before it is discounted.
        loss_mask: [T] bool; a masked token neither gets nor gives credit.

    Source: Thinking Machines Lab, "On-Policy Distillation" (2025); discount 1 is MiniLLM's sequence-level return
    (arXiv 2306.08543).

    Raises:
        ValueError: shapes differ, a log-probability that counts is not finite or is above 0 by more than rounding, or
            the reference is missing.
    """
    mask = torch.ones_like(sampler_logprobs, dtype=torch.bool) if loss_mask is None else loss_mask
    _check_logprobs(sampler_logprobs, teacher_logprobs, mask)
    signal = reverse_kl(sampler_logprobs, teacher_logprobs)
    anchor = torch.zeros_like(signal)
    if extrapolation != 1 or anchor_coef != 0:
        if reference_logprobs is None:
            raise ValueError("extrapolation and anchor_coef measure from a reference; got no reference_logprobs")
        _check_logprobs(sampler_logprobs, reference_logprobs, mask, name="reference_logprobs")
        anchor = reverse_kl(sampler_logprobs, reference_logprobs)
        signal = extrapolation * signal + (1 - extrapolation) * anchor
    if signal_clip is not None:
        signal = signal.clamp(-signal_clip, signal_clip)
    credit = -(kl_coef * signal + anchor_coef * anchor).detach()
    return _returns(torch.where(mask, credit, 0.0), discount).masked_fill(~mask, 0.0)


def _check_logprobs(
    sampler_logprobs: Tensor, other: Tensor, loss_mask: Tensor, *, name: str = "teacher_logprobs"
) -> None:
    if sampler_logprobs.shape != other.shape or sampler_logprobs.dim() != 1:
        raise ValueError(
            f"got sampler_logprobs {tuple(sampler_logprobs.shape)} and {name} {tuple(other.shape)}; expected two "
            "vectors of one length, one entry per completion token"
        )
    for label, values in (("sampler_logprobs", sampler_logprobs), (name, other)):
        bad = (~torch.isfinite(values) | (values > 1e-3)) & loss_mask
        if bad.any():
            position = int(bad.nonzero()[0])
            raise ValueError(
                f"{label}[{position}] is {values[position].item()}; expected a finite log-probability <= 0 "
                "(a teacher that gives a written token probability zero cannot be distilled from)"
            )


def _returns(credit: Tensor, discount: float) -> Tensor:
    if discount == 0.0:
        return credit
    running = torch.zeros_like(credit[:1])
    returns = []
    for value in credit.flip(0):
        running = value + discount * running
        returns.append(running)
    return torch.cat(returns).flip(0) if returns else credit


def fixed_negative_advantages(sampler_logprobs: Tensor, *, kl_coef: float = 1.0, threshold: float = 0.1) -> Tensor:
    """A control without a teacher, [T] -> [T]: ``-kl_coef`` for tokens that the student gave a probability below
    ``threshold``, else 0. arXiv 2608.31046 finds it hard to beat; what a method gains over it, its teacher knew."""
    return -kl_coef * (sampler_logprobs.detach() < math.log(threshold)).to(sampler_logprobs.dtype)


def swapped_marks(rollouts: Sequence[Rollout], scores: Sequence[Scores]) -> list[Tensor]:
    """A control with a teacher that says nothing about the token it marks: each completion gets the reverse_kl [T] of
    the next one in the step, repeated or cut to its own length.

    The marks keep their sizes, and are independent of the tokens they fall on: the expected gradient is zero.

    Raises:
        RunError: fewer than two completions.
    """
    if len(rollouts) < 2:
        raise RunError('objective.control = "shuffled_teacher" needs at least two completions a step; got one')
    own = [
        reverse_kl(_tensor(rollout.sampler_logprobs), _tensor(score.teacher_logprobs))
        for rollout, score in zip(rollouts, scores, strict=True)
    ]
    swapped = []
    for rollout, marks in zip(rollouts, own[1:] + own[:1], strict=True):
        length = len(rollout.completion_ids)
        swapped.append(marks.repeat(-(-length // len(marks)))[:length])
    return swapped


def group_advantages(rewards: Tensor, *, normalize: bool = False) -> Tensor:
    """Rewards of one prompt's completions, centred on their mean, [G] -> [G], detached.

    ``normalize`` divides by the group's (population) standard deviation as GRPO does (arXiv 2402.03300); a group whose
    rewards all agree teaches nothing either way and gets zeros.
    """
    centred = (rewards - rewards.mean()).detach()
    if not normalize:
        return centred
    deviation = centred.square().mean().sqrt()
    return centred / deviation if deviation > 1e-8 else torch.zeros_like(centred)


def token_mask(
    completion_ids: Sequence[int],
    *,
    first: int | None = None,
    span: tuple[float, float] = (0.0, 1.0),
    masked_ids: frozenset[int] = frozenset(),
) -> list[bool]:
    """Which of T tokens train: the first ``first``; those in ``span``, from ``floor(T * start)`` to ``ceil(T * end)``;
    none of ``masked_ids``."""
    length = len(completion_ids)
    # Rounded first: 0.07 * 100 is a little more than 7.
    start, end = math.floor(round(length * span[0], 6)), math.ceil(round(length * span[1], 6))
    end = end if first is None else min(end, first)
    return [start <= t < end and token not in masked_ids for t, token in enumerate(completion_ids)]


@dataclass(frozen=True)
class CreditRules:
    """What a step's rollouts teach: [objective] in the form this stage takes it; names are the configuration's.

    ``masked_ids``: tokens that never train. ``compare_sampler``: a policy loss runs whatever the estimator, if only to
    measure how far trainer and sampler are apart.
    """

    estimator: Literal["sampled", "full", "topk"] = "sampled"
    kl_coef: float = 1.0
    discount: float = 0.0
    signal_clip: float | None = None
    extrapolation: float = 1.0
    anchor_coef: float = 0.0
    reward_coef: float = 0.0
    normalize_rewards: bool = False
    control: Literal["none", "fixed_negative", "shuffled_teacher"] = "none"
    control_threshold: float = 0.1
    sequence_mean: bool = False
    first: int | None = None
    span: tuple[float, float] = (0.0, 1.0)
    half_life: float | None = None
    masked_ids: frozenset[int] = frozenset()
    compare_sampler: bool = False


def training_examples(groups: Sequence[Sequence[ScoredRollout]], rules: CreditRules) -> list[TrainingExample]:
    """Groups of scored rollouts (one group per prompt) -> examples, in order.

    ``advantages = distillation_advantages + reward_coef * group_advantages``; with another estimator than ``sampled``
    the teacher's part travels as hidden states or top-k scores instead, for an exact divergence.
    """
    everything = [scored for group in groups for scored in group]
    swapped: Sequence[Tensor | None] = [None] * len(everything)
    if rules.control == "shuffled_teacher":
        swapped = swapped_marks([s.rollout for s in everything], [_present(s.scores) for s in everything])
    rewards = [reward for group in groups for reward in _centred_rewards(group, rules)]
    return [_example(*columns, rules) for columns in zip(everything, rewards, swapped, strict=True)]


def _centred_rewards(group: Sequence[ScoredRollout], rules: CreditRules) -> Tensor:
    if rules.reward_coef == 0:
        return torch.zeros(len(group), dtype=torch.float64)
    for scored in group:
        if scored.reward is None:
            index = scored.rollout.prompt.index
            raise ValueError(f"reward_coef is {rules.reward_coef} but prompt {index} was not graded")
    return group_advantages(_tensor([s.reward or 0.0 for s in group]), normalize=rules.normalize_rewards)


def _example(scored: ScoredRollout, reward: Tensor, swapped: Tensor | None, rules: CreditRules) -> TrainingExample:
    rollout, scores = scored.rollout, scored.scores
    mask = token_mask(rollout.completion_ids, first=rules.first, span=rules.span, masked_ids=rules.masked_ids)
    has_policy = rules.estimator == "sampled" or rules.reward_coef > 0 or rules.compare_sampler
    topk = scores if rules.estimator == "topk" and isinstance(scores, TopkScores) else None
    return TrainingExample(
        prompt_ids=rollout.prompt.prompt_ids,
        completion_ids=rollout.completion_ids,
        loss_mask=mask,
        sampler_logprobs=rollout.sampler_logprobs if has_policy else None,
        advantages=_advantages(scored, reward, swapped, torch.tensor(mask), rules) if has_policy else None,
        teacher_hidden=scores.teacher_hidden if isinstance(scores, HiddenScores) else None,
        teacher=rollout.prompt.teacher,
        reference_hidden=scored.reference.teacher_hidden if isinstance(scored.reference, HiddenScores) else None,
        topk_ids=topk.ids if topk else None,
        topk_logprobs=topk.logprobs if topk else None,
        weights=_weights(mask, rules),
    )


def _advantages(
    scored: ScoredRollout, reward: Tensor, swapped: Tensor | None, loss_mask: Tensor, rules: CreditRules
) -> list[float]:
    credit = rules.reward_coef * reward + _teacher_credit(scored, swapped, loss_mask, rules)
    return credit.masked_fill(~loss_mask, 0.0).tolist()


def _teacher_credit(scored: ScoredRollout, swapped: Tensor | None, loss_mask: Tensor, rules: CreditRules) -> Tensor:
    own = _tensor(scored.rollout.sampler_logprobs)
    if rules.estimator != "sampled":
        return torch.zeros_like(own)
    if rules.control == "fixed_negative":
        return fixed_negative_advantages(own, kl_coef=rules.kl_coef, threshold=rules.control_threshold)
    if swapped is not None:
        return -rules.kl_coef * swapped
    reference = None if scored.reference is None else _tensor(scored.reference.teacher_logprobs)
    options: dict[str, Any] = {
        "discount": rules.discount,
        "loss_mask": loss_mask,
        "reference_logprobs": reference,
        "anchor_coef": rules.anchor_coef,
    }
    if scored.scores is None:  # rewards alone, perhaps with an anchor: the student's own marks are no signal
        return distillation_advantages(own, own, **options)
    return distillation_advantages(
        own,
        _tensor(scored.scores.teacher_logprobs),
        kl_coef=rules.kl_coef,
        signal_clip=rules.signal_clip,
        extrapolation=rules.extrapolation,
        **options,
    )


def _weights(loss_mask: Sequence[bool], rules: CreditRules) -> list[float] | None:
    """Half-life and sequence mean as factors of each token's loss."""
    if rules.half_life is None and not rules.sequence_mean:
        return None
    half_life = rules.half_life or math.inf
    share = 1 / max(1, sum(loss_mask)) if rules.sequence_mean else 1.0
    return [share * 2 ** (-t / half_life) for t in range(len(loss_mask))]


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _present(scores: Scores | None) -> Scores:
    if scores is None:
        raise ValueError("shuffled_teacher needs a teacher's marks; got none")
    return scores

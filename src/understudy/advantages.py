"""Reverse KL and rewards -> advantages. Pure functions; credit is always detached."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from understudy.types import HiddenScores, ScoredRollout, TrainingExample


def reverse_kl(sampler_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """``log p_student - log q_teacher`` of the written tokens [T], in nats.

    Its expectation over the student's own tokens is KL(student || teacher) at each position. A positive entry marks a
    token that the teacher finds less likely than the student did.
    """
    return sampler_logprobs - teacher_logprobs


def distillation_advantages(
    sampler_logprobs: Tensor, teacher_logprobs: Tensor, *, kl_coef: float = 1.0, discount: float = 0.0
) -> Tensor:
    """Per-token credit of on-policy distillation, [T] -> [T], detached.

    ``-kl_coef * sum over k >= t of discount**(k - t) * reverse_kl[k]``, so with discount 0 (the article's setting) each
    token answers for itself alone. Both inputs cover completion tokens only, so no credit can leak onto the prompt.

    Source: Thinking Machines Lab, "On-Policy Distillation" (2025); discount 1 is MiniLLM's sequence-level return
    (arXiv 2306.08543).

    Raises:
        ValueError: shapes differ, or a log-probability is not finite or is above 0 by more than rounding.
    """
    if sampler_logprobs.shape != teacher_logprobs.shape or sampler_logprobs.dim() != 1:
        raise ValueError(
            f"got sampler_logprobs {tuple(sampler_logprobs.shape)} and teacher_logprobs "
            f"{tuple(teacher_logprobs.shape)}; expected two vectors of one length, one entry per completion token"
        )
    for name, values in (("sampler_logprobs", sampler_logprobs), ("teacher_logprobs", teacher_logprobs)):
        bad = ~torch.isfinite(values) | (values > 1e-3)
        if bad.any():
            position = int(bad.nonzero()[0])
            raise ValueError(
                f"{name}[{position}] is {values[position].item()}; expected a finite log-probability <= 0 "
                "(a teacher that gives a written token probability zero cannot be distilled from)"
            )
    credit = -kl_coef * reverse_kl(sampler_logprobs, teacher_logprobs).detach()
    if discount == 0.0:
        return credit
    running = torch.zeros_like(credit[:1])
    returns = []
    for value in credit.flip(0):
        running = value + discount * running
        returns.append(running)
    return torch.cat(returns).flip(0) if returns else credit


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


def training_examples(
    groups: Sequence[Sequence[ScoredRollout]],
    *,
    full: bool = False,
    kl_coef: float = 1.0,
    discount: float = 0.0,
    reward_coef: float = 0.0,
    normalize_rewards: bool = False,
) -> list[TrainingExample]:
    """Groups of scored rollouts (one group per prompt) -> examples, in order.

    ``advantages = distillation_advantages + reward_coef * group_advantages``; with ``full`` the teacher's part
    travels as
    hidden states instead, for the exact divergence. Every completion token trains.
    """
    examples = []
    for group in groups:
        rewards = [_reward(scored, reward_coef) for scored in group]
        centred = group_advantages(torch.tensor(rewards, dtype=torch.float64), normalize=normalize_rewards)
        for scored, reward in zip(group, centred, strict=True):
            rollout, scores = scored.rollout, scored.scores
            logprobs = torch.tensor(rollout.sampler_logprobs, dtype=torch.float64)
            advantages = (reward_coef * reward).expand_as(logprobs)
            if scores is not None and not full:
                teacher_logprobs = torch.tensor(scores.teacher_logprobs, dtype=torch.float64)
                advantages = advantages + distillation_advantages(
                    logprobs, teacher_logprobs, kl_coef=kl_coef, discount=discount
                )
            has_policy = not full or reward_coef > 0
            examples.append(
                TrainingExample(
                    prompt_ids=rollout.prompt.prompt_ids,
                    completion_ids=rollout.completion_ids,
                    loss_mask=[True] * len(rollout.completion_ids),
                    sampler_logprobs=rollout.sampler_logprobs if has_policy else None,
                    advantages=advantages.tolist() if has_policy else None,
                    teacher_hidden=scores.teacher_hidden if full and isinstance(scores, HiddenScores) else None,
                    teacher=rollout.prompt.teacher,
                )
            )
    return examples


def _reward(scored: ScoredRollout, reward_coef: float) -> float:
    if reward_coef == 0.0:
        return 0.0
    if scored.reward is None:
        raise ValueError(f"reward_coef is {reward_coef} but prompt {scored.rollout.prompt.index} was not graded")
    return scored.reward

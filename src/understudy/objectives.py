"""What a micro-batch is trained on: hidden states and a head -> LossOutput. Joins ``lm_head`` to ``losses``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from understudy.lm_head import LMHead, head_divergence, head_logprobs
from understudy.losses import cross_entropy_loss, importance_sampling_loss
from understudy.types import Batch, LossOutput


class Objective(Protocol):
    """Called by a trainer with the hidden states [N, H] that predict ``batch.target_ids``."""

    def __call__(self, batch: Batch, hidden: Tensor, head: LMHead) -> LossOutput: ...


@dataclass(frozen=True)
class CrossEntropy:
    """Supervised: make the completion likely."""

    def __call__(self, batch: Batch, hidden: Tensor, head: LMHead) -> LossOutput:
        return cross_entropy_loss(head_logprobs(head, hidden, batch.target_ids), batch.loss_mask)


@dataclass(frozen=True)
class PolicyGradient:
    """Importance sampling over ``batch.advantages``: sampled distillation, rewards, or their sum."""

    temperature: float = 1.0

    def __call__(self, batch: Batch, hidden: Tensor, head: LMHead) -> LossOutput:
        if batch.sampler_logprobs is None or batch.advantages is None:
            raise ValueError(
                "a policy loss needs sampler_logprobs and advantages for every token; got a supervised batch"
            )
        trainer_logprobs = head_logprobs(head, hidden, batch.target_ids, temperature=self.temperature)
        return importance_sampling_loss(trainer_logprobs, batch.sampler_logprobs, batch.advantages, batch.loss_mask)


@dataclass(frozen=True)
class FullReverseKL:
    """Exact reverse KL over the vocabulary against in-process teachers, by name."""

    teacher_heads: Mapping[str, LMHead]
    kl_coef: float = 1.0
    temperature: float = 1.0

    def __call__(self, batch: Batch, hidden: Tensor, head: LMHead) -> LossOutput:
        if batch.teacher_hidden is None:
            raise ValueError("the full reverse KL needs the teacher's hidden states; got a batch without them")
        output = head_divergence(
            head,
            self.teacher_heads[batch.teacher],
            hidden,
            batch.teacher_hidden,
            batch.loss_mask,
            temperature=self.temperature,
        )
        return LossOutput(self.kl_coef * output.loss, output.metrics)


@dataclass(frozen=True)
class Mixture:
    """The sum of two objectives on one batch, e.g. the full reverse KL and group-centred rewards."""

    first: Objective
    second: Objective

    def __call__(self, batch: Batch, hidden: Tensor, head: LMHead) -> LossOutput:
        first, second = self.first(batch, hidden, head), self.second(batch, hidden, head)
        return LossOutput(first.loss + second.loss, {**first.metrics, **second.metrics})

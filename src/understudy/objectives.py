"""What a micro-batch is trained on: hidden states and a head -> LossOutput. Joins ``lm_head`` to ``losses``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from understudy.divergences import REVERSE_KL, Divergence
from understudy.errors import RunError
from understudy.lm_head import (
    LMHead,
    divergence_columns,
    head_divergence,
    head_logprobs,
    head_topk,
    logprob_loss,
)
from understudy.losses import Tail, cross_entropy_loss, importance_sampling_loss, topk_divergence
from understudy.types import Batch, LossOutput


class Objective(Protocol):
    """Called by a trainer with the hidden states [N, H] that predict ``batch.target_ids``."""

    def __call__(self, batch: Batch, hidden: Tensor, head: LMHead) -> LossOutput: ...


@dataclass(frozen=True)
class CrossEntropy:
    """Supervised: make the completion likely."""

    def __call__(self, batch: Batch, hidden: Tensor, head: LMHead) -> LossOutput:
        def loss(logprobs: Tensor, rows: slice) -> LossOutput:
            return cross_entropy_loss(logprobs, batch.loss_mask[rows], weights=_part(batch.weights, rows))

        return _through_logprobs(loss, head, hidden, batch.target_ids)


# (trainer_logprobs, sampler_logprobs, advantages, loss_mask, weights=...) -> LossOutput
PolicyLoss = Callable[..., LossOutput]


@dataclass(frozen=True)
class PolicyGradient:
    """A policy loss over ``batch.advantages``: sampled distillation, rewards, or their sum.

    ``baseline_heads`` (in-process teachers, by name): ``baseline_coef`` times the exact KL(p || q) of each position is
    added to the advantages, a function of the state alone: the expected gradient stays, its variance falls.

    ``live_coef``: ``live_coef * (trainer_logprobs - sampler_logprobs)`` is taken from the advantages, so that
    -coef (log p - log q) is of the weights that learn, p, where older ones wrote: with the importance ratio the
    expectation at each visited state is then the gradient of KL(p || q), whatever wrote the tokens.
    """

    temperature: float = 1.0
    policy_loss: PolicyLoss = importance_sampling_loss
    baseline_heads: Mapping[str, LMHead] | None = None
    baseline_coef: float = 1.0
    live_coef: float = 0.0

    def __call__(self, batch: Batch, hidden: Tensor, head: LMHead) -> LossOutput:
        if batch.sampler_logprobs is None or batch.advantages is None:
            raise ValueError(
                "a policy loss needs sampler_logprobs and advantages for every token; got a supervised batch"
            )
        sampler_logprobs, advantages = batch.sampler_logprobs, batch.advantages
        metrics: dict[str, float] = {}
        if self.baseline_heads is not None:
            baseline = self._baseline(batch, hidden, head, self.baseline_heads)
            advantages = advantages + self.baseline_coef * baseline
            metrics["reverse_kl_full"] = float(baseline.sum())

        def loss(logprobs: Tensor, rows: slice) -> LossOutput:
            written, mask, credit = sampler_logprobs[rows], batch.loss_mask[rows], advantages[rows]
            if self.live_coef:
                change = (logprobs.detach() - written).masked_fill(~mask, 0.0)
                credit = credit - self.live_coef * change
            return self.policy_loss(logprobs, written, credit, mask, weights=_part(batch.weights, rows))

        output = _through_logprobs(loss, head, hidden, batch.target_ids, self.temperature)
        return LossOutput(output.loss, {**output.metrics, **metrics})

    def _baseline(self, batch: Batch, hidden: Tensor, head: LMHead, heads: Mapping[str, LMHead]) -> Tensor:
        """[N], zero where masked."""
        columns = divergence_columns(
            head,
            heads[batch.teacher],
            hidden.detach(),
            _needed(batch.teacher_hidden, "the baseline"),
            batch.loss_mask,
            temperature=self.temperature,
        )
        return columns[:, 0]


@dataclass(frozen=True)
class FullDivergence:
    """``coef`` times an exact divergence over the vocabulary from in-process teachers, by name; or from the reference
    model, whose head is ``heads["reference"]``, with ``against="reference"``."""

    heads: Mapping[str, LMHead]
    coef: float = 1.0
    temperature: float = 1.0
    divergence: Divergence = REVERSE_KL
    against: Literal["teacher", "reference"] = "teacher"

    def __call__(self, batch: Batch, hidden: Tensor, head: LMHead) -> LossOutput:
        of_teacher = self.against == "teacher"
        output = head_divergence(
            head,
            self.heads[batch.teacher if of_teacher else "reference"],
            hidden,
            _needed(batch.teacher_hidden if of_teacher else batch.reference_hidden, f"the {self.divergence.kind}"),
            batch.loss_mask,
            divergence=self.divergence,
            weights=_scaled(batch, hidden, self.coef),
            temperature=self.temperature,
        )
        if of_teacher:
            return output
        return LossOutput(output.loss, {"reference_kl_full": output.metrics[f"{self.divergence.kind}_full"]})


@dataclass(frozen=True)
class TopkDivergence:
    """``coef`` times the reverse KL on the ``k`` most likely tokens of each position.

    ``chosen_by`` "teacher" uses the batch's top-k scores, which any teacher can send; so does "student" without
    ``heads``: its teacher was asked for the student's best tokens. With them "student" and "union" look up both models'
    own.
    """

    k: int
    chosen_by: Literal["teacher", "student", "union"] = "teacher"
    tail: Tail = "bucket"
    coef: float = 1.0
    temperature: float = 1.0
    heads: Mapping[str, LMHead] | None = None

    def __call__(self, batch: Batch, hidden: Tensor, head: LMHead) -> LossOutput:
        metrics: dict[str, float] = {}
        if self.chosen_by == "teacher" or self.heads is None:
            if batch.topk_ids is None or batch.topk_logprobs is None:
                raise ValueError("the top-k divergence needs the teacher's top-k scores; got a batch without them")
            ids, teacher_logprobs = batch.topk_ids, batch.topk_logprobs
            if ids.numel() and int(ids.max()) >= head.vocab_size:
                raise RunError(
                    f"got a top-k set of teacher {batch.teacher!r} with token id {int(ids.max())}; expected ids below "
                    f"{head.vocab_size}, the vocabulary that student and teacher share"
                )
            twice = torch.zeros_like(ids, dtype=torch.bool)
        else:
            ids, teacher_logprobs, twice = self._looked_up(batch, hidden.detach(), head)
            if self.chosen_by == "union":
                shared = twice.sum(-1) / self.k
                metrics["topk_overlap"] = float(torch.where(batch.loss_mask, shared, 0.0).sum())
        teacher_logprobs = teacher_logprobs.masked_fill(twice, -math.inf)
        weights = _scaled(batch, hidden, self.coef)

        def loss(logprobs: Tensor, rows: slice) -> LossOutput:
            own, mask = logprobs.masked_fill(twice[rows], -math.inf), batch.loss_mask[rows]
            return topk_divergence(
                own,
                teacher_logprobs[rows],
                mask,
                tail=self.tail,
                weights=_part(weights, rows),
                first_position=rows.start or 0,
            )

        output = _through_logprobs(loss, head, hidden, ids, self.temperature)
        return LossOutput(output.loss, {**output.metrics, **metrics})

    @torch.no_grad()
    def _looked_up(self, batch: Batch, hidden: Tensor, head: LMHead) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids [N, K], the teacher's log-probabilities of them, and which are a union's second mention of a
        token."""
        assert self.heads is not None
        teacher_head = self.heads[batch.teacher]
        teacher_hidden = _needed(batch.teacher_hidden, "the top-k divergence").to(teacher_head.weight.device)
        _, ids = head_topk(head, hidden, self.k, temperature=self.temperature)
        twice = torch.zeros_like(ids, dtype=torch.bool)
        if self.chosen_by == "union":
            _, others = head_topk(teacher_head, teacher_hidden, self.k, temperature=self.temperature)
            others = others.to(ids.device)
            again = (others[:, :, None] == ids[:, None, :]).any(-1)
            ids, twice = torch.cat([ids, others], dim=1), torch.cat([twice, again], dim=1)
        logprobs = head_logprobs(
            teacher_head, teacher_hidden, ids.to(teacher_head.weight.device), temperature=self.temperature
        )
        return ids, logprobs.to(ids.device), twice


@dataclass(frozen=True)
class Mixture:
    """The sum of objectives on one batch, e.g. the full reverse KL and group-centred rewards."""

    objectives: Sequence[Objective]

    def __call__(self, batch: Batch, hidden: Tensor, head: LMHead) -> LossOutput:
        outputs = [objective(batch, hidden, head) for objective in self.objectives]
        metrics = {name: value for output in outputs for name, value in output.metrics.items()}
        return LossOutput(torch.stack([output.loss for output in outputs]).sum(), metrics)


def _through_logprobs(
    loss: Callable[[Tensor, slice], LossOutput], head: LMHead, hidden: Tensor, ids: Tensor, temperature: float = 1.0
) -> LossOutput:
    """A loss of selected log-probabilities, with its gradient from the head's tiles; the metrics are read off once."""
    total, logprobs = logprob_loss(
        head, hidden, ids, lambda logprobs, rows: loss(logprobs, rows).loss, temperature=temperature
    )
    return LossOutput(total, loss(logprobs, slice(None)).metrics)


def _part(column: Tensor | None, rows: slice) -> Tensor | None:
    return None if column is None else column[rows]


def _scaled(batch: Batch, hidden: Tensor, coef: float) -> Tensor:
    """``coef`` and the batch's weights in one factor per token [N]."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weights = torch.ones_like(batch.loss_mask, dtype=wide) if batch.weights is None else batch.weights
    return coef * weights


def _needed(hidden: Tensor | None, what: str) -> Tensor:
    if hidden is None:
        raise ValueError(f"{what} needs hidden states of an in-process model; got a batch without them")
    return hidden

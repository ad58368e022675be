"""The estimators have the gradients they are said to have: expectations over every completion there is, in float64.

Completions go through the package as rollouts do (teacher scores, training examples, micro-batches, the trainer), one
at a time, and their gradients are added up with the completions' probabilities as weights. ``oracle`` computes what
must come out from plain forward passes. A loss is minimised, so gradients are those of the KL, not of the advantages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parity.oracle import Ids, Oracle
from tiny import (
    EOS,
    gradient_of,
    prompt_of,
    relative_error,
    rollout_of,
    sampler_of,
    teacher_of,
    tiny_model,
)
from understudy.advantages import CreditRules, training_examples
from understudy.backends.language_model import LanguageModel
from understudy.backends.local import LocalTeacher, LocalTrainer
from understudy.batching import micro_batches
from understudy.config import OptimConfig, SamplingConfig
from understudy.objectives import FullDivergence, Mixture, Objective, PolicyGradient
from understudy.optimizer_step import optimizer_step
from understudy.rollouts import sample_rollouts
from understudy.teacher_scores import score_rollouts
from understudy.types import Batch, HiddenScores, Prompt, Rollout, ScoredRollout, TokenSequence, TrainingExample

PROMPT = [1, 4, 2]
CONTEXT = [3, 1, 1, 4, 2]  # a teacher that has read more than the student
EXACT = 1e-10  # relative: float64 sums of some hundred gradients


class World:
    """A student, a teacher, and all completions of one prompt as rollouts of the package."""

    def __init__(
        self,
        *,
        vocab_size: int = 5,
        horizon: int = 3,
        temperature: float = 1.0,
        context: Sequence[int] | None = None,
        same: bool = False,
        dtype: torch.dtype = torch.float64,
        share_prompts: bool = True,
    ) -> None:
        student = tiny_model(seed=1, vocab_size=vocab_size, dtype=dtype)
        teacher = tiny_model(seed=1 if same else 2, vocab_size=vocab_size, dtype=dtype)
        self.temperature, self.dtype = temperature, dtype
        self.oracle = Oracle(student, teacher, PROMPT, horizon, temperature=temperature, teacher_prompt=context)
        own, other = (LanguageModel(model, share_prompts=share_prompts) for model in (student, teacher))
        self.trainer = LocalTrainer(own, OptimConfig(grad_clip=0), temperature=temperature)
        self.teacher = LocalTeacher(other, temperature=temperature)
        self.prompt: Prompt = prompt_of(PROMPT, teacher_prompt_ids=context)
        self.completions = self.oracle.completions
        sequences = [TokenSequence(PROMPT, c) for c in self.completions]
        logprobs = self.trainer.compute_logprobs(sequences)
        rows = zip(self.completions, logprobs, strict=True)
        self.rollouts: list[Rollout] = [rollout_of(self.prompt, ids, own) for ids, own in rows]

    def scored(self, *, full: bool, reward: Mapping[Ids, float] | None = None) -> list[ScoredRollout]:
        scores = score_rollouts({"default": self.teacher}, self.rollouts, "hidden" if full else "sampled")
        rewards = [None if reward is None else reward[tuple(r.completion_ids)] for r in self.rollouts]
        return [ScoredRollout(*columns) for columns in zip(self.rollouts, scores, rewards, strict=True)]

    def examples(self, *, full: bool = False, **credit: Any) -> list[TrainingExample]:
        return training_examples(
            [[one] for one in self.scored(full=full)], CreditRules(estimator="full" if full else "sampled", **credit)
        )

    def objective(self, *, full: bool = False, kl_coef: float = 1.0) -> Objective:
        if not full:
            return PolicyGradient(self.temperature)
        return FullDivergence({"default": self.teacher.head}, kl_coef, self.temperature)

    def batch(self, examples: Sequence[TrainingExample]) -> Batch:
        """Arranged as runs arrange it."""
        sharing = self.trainer.model.shares_prompts
        [batch] = micro_batches(examples, micro_batch_tokens=10**6, dtype=self.dtype, share_prompts=sharing)
        return batch

    def run(self, examples: Sequence[TrainingExample], objective: Objective) -> tuple[float, Tensor]:
        """The trainer's loss and gradient of these examples alone."""
        loss = self.trainer.forward_backward(self.batch(examples), objective).loss
        return float(loss), gradient_of(self.trainer)

    def each(self, *, full: bool = False, kl_coef: float = 1.0, discount: float = 0.0) -> tuple[Tensor, Tensor]:
        """Losses [C] and gradients [C, P], one completion at a time."""
        examples = self.examples(full=full, kl_coef=kl_coef, discount=discount)
        results = [self.run([example], self.objective(full=full, kl_coef=kl_coef)) for example in examples]
        losses, gradients = zip(*results, strict=True)
        return torch.tensor(losses, dtype=torch.float64), torch.stack(gradients)

    def expected(self, per_completion: Tensor) -> Tensor:
        return torch.einsum("c,c...->...", self.oracle.probabilities, per_completion)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_the_enumeration_is_complete(world: World) -> None:
    """1 + 4 + 16 that end within three tokens and 64 that are cut; together they have all the probability."""
    assert len(world.completions) == len(set(world.completions)) == 85
    assert sum(r.finish_reason == "length" for r in world.rollouts) == 64
    assert float(world.oracle.probabilities.sum()) == pytest.approx(1, abs=1e-13)
    logprobs = torch.tensor([sum(r.sampler_logprobs) for r in world.rollouts], dtype=torch.float64)
    torch.testing.assert_close(logprobs.exp(), world.oracle.probabilities, atol=1e-13, rtol=0)


@pytest.mark.parametrize(("vocab_size", "horizon"), [(5, 4), (8, 2)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("context", [None, CONTEXT])
def test_expected_summed_reverse_kl_is_the_exact_kl(
    vocab_size: int, horizon: int, temperature: float, context: list[int] | None
) -> None:
    world = World(vocab_size=vocab_size, horizon=horizon, temperature=temperature, context=context)
    exact = float(world.oracle.sequence_kl().detach())
    assert exact == pytest.approx(float(world.oracle.frozen_state_kl().detach()), rel=1e-12)  # the chain rule of KL
    summed = [
        sum(p - q for p, q in zip(s.rollout.sampler_logprobs, s.scores.teacher_logprobs, strict=True))
        for s in world.scored(full=False)
        if s.scores is not None
    ]
    assert float(world.expected(torch.tensor(summed, dtype=torch.float64))) == pytest.approx(exact, rel=1e-12)
    assert exact > 0.5  # far from the trivial case


def test_expected_loss_of_full_is_the_exact_kl(world: World) -> None:
    losses, _ = world.each(full=True, kl_coef=0.5)
    exact = float(world.oracle.frozen_state_kl().detach())
    assert float(world.expected(losses)) == pytest.approx(0.5 * exact, rel=1e-12)


@pytest.mark.parametrize("full", [False, True], ids=["sampled", "full"])
@pytest.mark.parametrize(
    ("temperature", "context"),
    [(1.0, None), (0.7, None), (1.6, CONTEXT)],
    ids=["plain", "cool", "hot, informed teacher"],
)
def test_gradient_is_that_of_the_kl_at_fixed_states(full: bool, temperature: float, context: list[int] | None) -> None:
    world = World(temperature=temperature, context=context)
    exact = world.oracle.gradient(world.oracle.frozen_state_kl())
    _, gradients = world.each(full=full, kl_coef=0.5)
    assert relative_error(world.expected(gradients), 0.5 * exact) < EXACT


def test_these_checks_can_tell_objectives_apart(world: World) -> None:
    """What a wrong direction, frozen states, or differentiating log p - log q would have given is far from equal."""
    oracle = world.oracle
    exact = oracle.gradient(oracle.frozen_state_kl())
    assert relative_error(oracle.gradient(oracle.frozen_state_forward_kl()), exact) > 0.3
    assert relative_error(oracle.gradient(oracle.sequence_kl()), exact) > 0.1
    terms = [oracle.probabilities[i] * oracle.logprob(c) for i, c in enumerate(world.completions)]
    assert relative_error(oracle.gradient(torch.stack(terms).sum()), exact) == pytest.approx(1, abs=EXACT)  # it is zero


@pytest.mark.parametrize("discount", [0.5, 1.0])
def test_discounted_gradient(world: World, discount: float) -> None:
    exact = world.oracle.gradient(world.oracle.discounted(discount))
    _, gradients = world.each(discount=discount)
    assert relative_error(world.expected(gradients), exact) < EXACT


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_discount_one_is_the_sequence_kl(temperature: float) -> None:
    world = World(temperature=temperature)
    exact = world.oracle.gradient(world.oracle.sequence_kl())
    _, gradients = world.each(discount=1.0)
    assert relative_error(world.expected(gradients), exact) < EXACT


def spread(probabilities: Tensor, gradients: Tensor) -> float:
    """Total variance of a gradient estimator: the trace of its covariance."""
    mean = torch.einsum("c,cp->p", probabilities, gradients)
    return float((probabilities * (gradients - mean).square().sum(-1)).sum())


def test_full_varies_less_than_sampled(world: World) -> None:
    """Token by token (Rao-Blackwell: full is sampled's expectation given the state), and in total here."""
    probabilities = world.oracle.probabilities
    totals = {full: spread(probabilities, world.each(full=full)[1]) for full in (False, True)}
    assert totals[True] < 0.5 * totals[False]
    for t in range(world.oracle.horizon):
        per_token = {}
        for full in (False, True):
            gradients = []
            for example in world.examples(full=full):
                only_t = replace(example, loss_mask=[i == t for i in range(len(example.completion_ids))])
                gradients.append(world.run([only_t], world.objective(full=full))[1])
            per_token[full] = torch.stack(gradients)
        torch.testing.assert_close(world.expected(per_token[True]), world.expected(per_token[False]))
        assert spread(probabilities, per_token[True]) < spread(probabilities, per_token[False])
        if t == 0:  # one state, so nothing is left to chance
            assert spread(probabilities, per_token[True]) < 1e-24


REWARD_COEF, KL_COEF = 2.0, 0.5


def graded(ids: Ids) -> float:
    """An arbitrary reward that depends on the whole completion."""
    return float(sum((t + 1) * token for t, token in enumerate(ids)) % 5) - 1.0


@pytest.mark.parametrize("kind", ["reward", "reward + sampled", "reward + full"])
def test_reward_gradient_over_groups(kind: str) -> None:
    """Over all pairs of completions (group_size 2), a group's expected gradient is, with G = 2,

        G * (kl_coef * grad KL - reward_coef * (G - 1) / G * grad E[reward]).

    Centring on a mean that holds the completion's own reward scales the reward's gradient by (G - 1) / G and adds no
    bias otherwise.
    """
    world = World(horizon=2)
    oracle, full = world.oracle, kind.endswith("full")
    scored = world.scored(full=full, reward={c: graded(c) for c in world.completions})
    if kind == "reward":
        scored = [replace(one, scores=None) for one in scored]
    policy = PolicyGradient()
    divergence = FullDivergence({"default": world.teacher.head}, KL_COEF)
    objective = Mixture([divergence, policy]) if full else policy
    expected = torch.zeros(sum(p.numel() for p in oracle.model.parameters()), dtype=torch.float64)
    for i, j in combinations_with_replacement(range(len(scored)), 2):
        group = [scored[i], scored[j]]
        examples = training_examples(
            [group], CreditRules("full" if full else "sampled", kl_coef=KL_COEF, reward_coef=REWARD_COEF)
        )
        weight = oracle.probabilities[i] * oracle.probabilities[j] * (1 if i == j else 2)
        expected += weight * world.run(examples, objective)[1]
    group_size = 2
    reward_part = (group_size - 1) / group_size * oracle.gradient(oracle.expected_reward(graded))
    kl_part = oracle.gradient(oracle.frozen_state_kl()) if kind != "reward" else torch.zeros_like(reward_part)
    exact = group_size * (KL_COEF * kl_part - REWARD_COEF * reward_part)
    assert relative_error(expected, exact) < EXACT


@pytest.mark.parametrize("share_prompts", [True, False], ids=["shared prompts", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_equal_to_the_student_teaches_exactly_nothing(dtype: torch.dtype, share_prompts: bool) -> None:
    world = World(same=True, dtype=dtype, share_prompts=share_prompts)
    assert (world.batch(world.examples()).shared is not None) == share_prompts
    for example in world.examples():
        assert example.advantages is not None
        assert set(example.advantages) == {0.0}
    for full in (False, True):
        loss, gradient = world.run(world.examples(full=full), world.objective(full=full))
        assert loss == 0.0
        assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_sampled_advantages_vanish_up_to_the_samplers_rounding(dtype: torch.dtype, rounding: float) -> None:
    """A cached decode and a full pass round differently: what is left is rounding and no more."""
    model = tiny_model(seed=1, dtype=dtype)
    sampling = SamplingConfig(group_size=8, max_completion_tokens=5)
    groups = sample_rollouts(sampler_of(model), [prompt_of(PROMPT, 0), prompt_of([2], 1)], sampling, seed=3)
    rollouts = [r for group in groups for r in group]
    scores = score_rollouts({"default": teacher_of(model)}, rollouts, "sampled")
    scored = [[ScoredRollout(r, s, None)] for r, s in zip(rollouts, scores, strict=True)]
    worst = max(abs(a) for e in training_examples(scored, CreditRules()) for a in e.advantages or [])
    assert worst < rounding


@pytest.mark.parametrize(
    ("full", "discount"), [(False, 0.0), (False, 1.0), (True, 0.0)], ids=["sampled", "sampled, discount 1", "full"]
)
def test_steps_on_samples_lower_the_exact_kl(full: bool, discount: float) -> None:
    """The sign, end to end: sample, score, step; the KL that is compared is the enumerated one."""
    world = World()
    student = world.oracle.model
    before = float(world.oracle.sequence_kl().detach())
    sampling = SamplingConfig(group_size=128, max_completion_tokens=world.oracle.horizon)
    sampler = sampler_of(student)
    kls = [before]
    for step in range(3):
        groups = sample_rollouts(sampler, [world.prompt], sampling, seed=step)
        scores = score_rollouts({"default": world.teacher}, groups[0], "hidden" if full else "sampled")
        scored = [[ScoredRollout(r, s, None) for r, s in zip(groups[0], scores, strict=True)]]
        batch = world.batch(training_examples(scored, CreditRules("full" if full else "sampled", discount=discount)))
        optimizer_step(world.trainer, [batch], world.objective(full=full), learning_rate=1e-3)
        moved = Oracle(student, world.teacher.model.model, PROMPT, world.oracle.horizon)
        kls.append(float(moved.sequence_kl().detach()))
    assert kls == sorted(kls, reverse=True)
    assert kls[-1] < 0.9 * before


def test_hidden_scores_hold_the_same_logprobs_as_sampled_ones(world: World) -> None:
    for one, other in zip(world.scored(full=True), world.scored(full=False), strict=True):
        assert isinstance(one.scores, HiddenScores)
        assert other.scores is not None
        assert one.scores.teacher_logprobs == other.scores.teacher_logprobs
        assert len(one.scores.teacher_hidden) == len(one.rollout.completion_ids)
        logprobs = world.teacher.head.logprobs(one.scores.teacher_hidden)
        ids = torch.tensor(one.rollout.completion_ids)[:, None]
        assert logprobs.gather(1, ids)[:, 0].tolist() == pytest.approx(one.scores.teacher_logprobs, abs=1e-12)


def test_every_completion_is_reached_with_its_probability(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform numbers from the middle of a completion's intervals make the sampler write it, log-probabilities and
    finish reason included; the intervals' widths are the oracle's probabilities."""
    oracle = world.oracle
    draws = []
    for completion in world.completions:
        row = [0.5] * oracle.horizon
        for t, token in enumerate(completion):
            probabilities = oracle.student[completion[:t]].detach().exp()
            row[t] = float(probabilities[:token].sum() + probabilities[token] / 2)
        draws.append(row)
    monkeypatch.setattr(
        "understudy.backends.local.rollout_uniforms", lambda seed, prompt, sample, length: np.array(draws[sample])
    )
    sampling = SamplingConfig(group_size=len(draws), max_completion_tokens=oracle.horizon)
    [group] = sampler_of(oracle.model).sample([world.prompt], sampling, seed=0)
    for rollout, expected in zip(group, world.rollouts, strict=True):
        assert tuple(rollout.completion_ids) == tuple(expected.completion_ids)
        assert (
            rollout.finish_reason == expected.finish_reason == ("stop" if EOS in rollout.completion_ids else "length")
        )
        assert rollout.sampler_logprobs == pytest.approx(expected.sampler_logprobs, abs=1e-12)

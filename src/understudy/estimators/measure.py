"""The gradient of an objective for every outcome of sampling, through the code that runs use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from understudy.advantages import training_examples
from understudy.batching import micro_batches
from understudy.config import PromptsConfig, RewardConfig, RunConfig, StudentConfig, TeacherConfig
from understudy.estimators.tabular import EOS, SPECIAL, Ids, World
from understudy.lm_head import LMHead, head_topk
from understudy.signals import build_objective, credit_rules, resolve_estimator, score_needs
from understudy.types import HiddenScores, Prompt, Rollout, SampledScores, ScoredRollout, ScoreKind, Scores, TopkScores


@dataclass(frozen=True)
class Outcomes:
    """Every outcome of one draw (a completion, or a group of them): its gradient [C, S, V] and probability [C]."""

    gradients: Tensor
    probabilities: Tensor
    completions_per_draw: int
    mean_length: float

    @property
    def expectation(self) -> Tensor:
        """Per completion, [S, V]."""
        return torch.einsum("c,csv->sv", self.probabilities, self.gradients) / self.completions_per_draw

    @property
    def variance_per_token(self) -> float:
        """Trace of a draw's covariance / mean number of tokens in a draw."""
        return self._covariance / (self.completions_per_draw * self.mean_length)

    @property
    def noise(self) -> float:
        """Root mean square of a draw's gradient."""
        return float((self.probabilities * self.gradients.square().sum((1, 2))).sum().sqrt())

    def signal_to_noise(self, num_completions: int) -> float:
        """Length of the expected gradient / standard deviation of a batch's mean gradient."""
        draws = num_completions / self.completions_per_draw
        spread = (self._covariance / draws) ** 0.5 / self.completions_per_draw
        return float(self.expectation.norm()) / spread if spread > 1e-12 else float("inf")

    @property
    def _covariance(self) -> float:
        mean = self.expectation * self.completions_per_draw
        return max(0.0, self.noise**2 - float(mean.square().sum()))


class TabularTeacher:
    """Marks from a table of logits; the "hidden state" of a state is its row."""

    kinds: frozenset[ScoreKind] = frozenset({"sampled", "topk", "hidden"})

    def __init__(self, world: World, table: Tensor) -> None:
        self._world, self._table = world, table
        self.head = LMHead(torch.eye(table.shape[1], dtype=table.dtype))

    def compute_logprobs(self, sequences: Sequence[Any]) -> list[list[float]]:
        """See ``Teacher.compute_logprobs``."""
        return [list(scores.teacher_logprobs) for scores in self.score(sequences, "sampled")]

    def score(self, sequences: Sequence[Any], kind: ScoreKind, *, topk: int = 0) -> list[Scores]:
        """See ``Teacher.score``."""
        return [self._score(tuple(sequence.completion_ids), kind, topk) for sequence in sequences]

    def _score(self, completion: Ids, kind: ScoreKind, topk: int) -> Scores:
        logprobs = self._world.logprobs(self._table, completion).tolist()
        rows = self._table[self._world.state_index(completion)]
        if kind == "topk":
            values, ids = head_topk(self.head, rows, topk)
            return TopkScores(logprobs, ids.tolist(), values.tolist())
        return HiddenScores(logprobs, rows) if kind == "hidden" else SampledScores(logprobs)


def reward_of(completion: Ids) -> float:
    """A task: write a 1, and end."""
    return float(1 in completion and completion[-1] == EOS)


def run_config(objective: Mapping[str, Any]) -> RunConfig:
    """A run with this [objective], in one process, with a reward where it asks for one. ``max_policy_lag`` may stand
    among its keys."""
    model = TeacherConfig(model="table")
    objective = dict(objective)
    lag = objective.pop("max_policy_lag", 0)
    measures = objective.get("extrapolation", 1.0) != 1 or objective.get("anchor_coef", 0.0) != 0
    return RunConfig.model_validate(
        {
            "output_dir": "none",
            "student": StudentConfig(model="table"),
            "teacher": model,
            "reference": model if measures else None,
            "prompts": PromptsConfig(path="none"),
            "reward": RewardConfig(grader="none") if objective.get("reward_coef") else None,
            "sampling": {"group_size": 2, "max_policy_lag": lag},
            "objective": objective,
        }
    )


def outcomes(world: World, objective: Mapping[str, Any], *, sampler: Tensor | None = None) -> Outcomes:
    """All outcomes of a run with this [objective] on ``world``. ``sampler``: the table that wrote the completions, if
    it is not the student's."""
    teacher, reference = TabularTeacher(world, world.teacher), TabularTeacher(world, world.reference)
    config = resolve_estimator(run_config(objective), {"default": teacher})
    rules, needs = credit_rules(config, special_ids=frozenset({SPECIAL})), score_needs(config.objective)
    table = world.student if sampler is None else sampler
    size = 2 if rules.reward_coef > 0 or rules.control == "shuffled_teacher" else 1

    rollouts = [_rollout(world, table, completion) for completion in world.completions]
    scored = [
        ScoredRollout(rollout, score, reward_of(completion), mark)
        for rollout, score, completion, mark in zip(
            rollouts,
            teacher.score(rollouts, needs.teacher, topk=needs.topk),
            world.completions,
            reference.score(rollouts, needs.reference),
            strict=True,
        )
    ]
    draws = list(product(range(len(scored)), repeat=size))
    examples = []
    for draw in draws:  # a draw is a step of its own: nothing may leak between outcomes
        examples += training_examples([[scored[i] for i in draw]], rules)
    owners = [number for number, draw in enumerate(draws) for _ in draw]

    # Batching orders by length; ordered already, they stay where they are.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].completion_ids))
    [batch] = micro_batches([examples[i] for i in order], micro_batch_tokens=10**9, dtype=torch.float64)
    tokens = [(owners[i], state) for i in order for state in world.state_index(tuple(examples[i].completion_ids))]
    loss = build_objective(config, {"default": teacher}, reference)
    gradients = _per_draw(
        world, tokens, len(draws), lambda hidden: loss(batch, hidden, LMHead(torch.eye(hidden.shape[1]).double())).loss
    )
    return _outcomes(world, table, gradients, draws, size)


def _rollout(world: World, table: Tensor, completion: Ids) -> Rollout:
    logprobs = world.logprobs(table, completion).tolist()
    reason = "stop" if completion[-1] == EOS else "length"
    return Rollout(Prompt(0, [EOS], ""), completion, logprobs, reason, 0, 0)


def _per_draw(
    world: World, tokens: Sequence[tuple[int, int]], num_draws: int, loss: Callable[[Tensor], Tensor]
) -> Tensor:
    """Gradients [C, S, V] from the gradient of the loss on every token's own copy of its state's logits [N, V]."""
    owners, states = (torch.tensor(column) for column in zip(*tokens, strict=True))
    logits = world.student[states].clone().requires_grad_()
    slopes = torch.autograd.grad(loss(logits), logits)[0]
    num_states, width = world.student.shape
    flat = torch.zeros(num_draws * num_states, width, dtype=torch.float64)
    return flat.index_add(0, owners * num_states + states, slopes).view(num_draws, num_states, width)


def _outcomes(world: World, table: Tensor, gradients: Tensor, draws: Sequence[tuple[int, ...]], size: int) -> Outcomes:
    single = world.probabilities(table).detach()
    lengths = torch.tensor([float(len(completion)) for completion in world.completions], dtype=torch.float64)
    probabilities = single[torch.tensor(draws)].prod(-1)
    return Outcomes(gradients, probabilities, size, float((single * lengths).sum()))


def agreeing(world: World) -> World:
    """The same world with teacher and reference equal to the student."""
    return replace(world, teacher=world.student.clone(), reference=world.student.clone())


# What is not offered: (trainer's log-probs [V], teacher's [V], written token) of every token -> loss per token.
_PerToken = Callable[[Tensor, Tensor, Tensor], Tensor]


def _k1(log_p: Tensor, log_q: Tensor, token: Tensor) -> Tensor:
    return (log_p - log_q).gather(-1, token)[:, 0]


def _k3(log_p: Tensor, log_q: Tensor, token: Tensor) -> Tensor:
    gap = -_k1(log_p, log_q, token)
    return gap.exp() - 1 - gap


def _k3_reward(log_p: Tensor, log_q: Tensor, token: Tensor) -> Tensor:
    return _k3(log_p, log_q, token).detach() * log_p.gather(-1, token)[:, 0]


def _truncated(log_p: Tensor, log_q: Tensor, token: Tensor) -> Tensor:
    kept = log_q.topk(2, dim=-1).indices
    return (log_p.exp() * (log_p - log_q)).gather(-1, kept).sum(-1)


def _truncated_as_advantage(log_p: Tensor, log_q: Tensor, token: Tensor) -> Tensor:
    return _truncated(log_p, log_q, token).detach() * log_p.gather(-1, token)[:, 0]


def _flipped(log_p: Tensor, log_q: Tensor, token: Tensor) -> Tensor:
    return -_k1(log_p, log_q, token).detach() * log_p.gather(-1, token)[:, 0]


REFUSED: Mapping[str, _PerToken] = {
    "log p − log q on samples, back-propagated (k1)": _k1,
    "q/p − 1 − log(q/p) on samples, back-propagated (k3)": _k3,
    "k3 as a detached reward": _k3_reward,
    "Σ over the top k of p log(p/q), back-propagated": _truncated,
    "that sum as an advantage, whatever token was written": _truncated_as_advantage,
    "the sign flipped: log p − log q as the reward": _flipped,
}


def refused_outcomes(world: World, per_token: _PerToken) -> Outcomes:
    """Outcomes of a loss that is not offered."""
    tokens, targets, log_q = [], [], world.teacher.log_softmax(-1)
    for number, completion in enumerate(world.completions):
        tokens += [(number, state) for state in world.state_index(completion)]
        targets += completion
    states = torch.tensor([state for _, state in tokens])

    def loss(logits: Tensor) -> Tensor:
        return per_token(logits.log_softmax(-1), log_q[states], torch.tensor(targets)[:, None]).sum()

    gradients = _per_draw(world, tokens, len(world.completions), loss)
    return _outcomes(world, world.student, gradients, list(product(range(len(world.completions)))), 1)


def normalised_outcomes(world: World) -> Outcomes:
    """Outcomes of distillation advantages brought to mean 0 and deviation 1 over a group of two completions."""
    singles = [world.logprobs(world.student, c) - world.logprobs(world.teacher, c) for c in world.completions]
    draws = list(product(range(len(world.completions)), repeat=2))
    tokens, targets, advantages = [], [], []
    for number, draw in enumerate(draws):
        marks = -torch.cat([singles[i] for i in draw])
        advantages.append((marks - marks.mean()) / marks.std(correction=0).clamp(min=1e-6))
        for completion in (world.completions[i] for i in draw):
            tokens += [(number, state) for state in world.state_index(completion)]
            targets += completion
    credit = torch.cat(advantages)

    def loss(logits: Tensor) -> Tensor:
        return -(credit * logits.log_softmax(-1).gather(-1, torch.tensor(targets)[:, None])[:, 0]).sum()

    return _outcomes(world, world.student, _per_draw(world, tokens, len(draws), loss), draws, 2)

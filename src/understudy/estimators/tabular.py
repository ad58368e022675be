"""Random models small enough to write down every completion, and the exact gradients an objective may have.

A model is a table of logits [S, V], one row per state; a state is what has been written so far. Gradients are with
respect to the student's table. Float64 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from understudy.divergences import Divergence, DivergenceKind

EOS = 0
SPECIAL = 2  # what objective.tokens.mask_special leaves out
Ids = tuple[int, ...]


@dataclass(frozen=True)
class World:
    """Student, teacher and reference over one vocabulary and horizon."""

    student: Tensor
    teacher: Tensor
    reference: Tensor
    states: tuple[Ids, ...]
    completions: tuple[Ids, ...]

    def state_index(self, completion: Ids) -> list[int]:
        """The states in which the completion's tokens were written."""
        return [self._numbers[completion[:t]] for t in range(len(completion))]

    @cached_property
    def _numbers(self) -> dict[Ids, int]:
        return {state: i for i, state in enumerate(self.states)}

    def logprobs(self, table: Tensor, completion: Ids) -> Tensor:
        """[T] under one of the tables."""
        rows = table.log_softmax(-1)[self.state_index(completion)]
        return rows.gather(-1, torch.tensor(completion)[:, None])[:, 0]

    def probabilities(self, table: Tensor) -> Tensor:
        """Of every completion, [C], differentiable."""
        return torch.stack([self.logprobs(table, completion).sum().exp() for completion in self.completions])

    def reach(self, table: Tensor) -> Tensor:
        """How often each state is visited, [S], detached."""
        visits = torch.zeros(len(self.states), dtype=table.dtype)
        for completion, probability in zip(self.completions, self.probabilities(table).detach(), strict=True):
            visits[self.state_index(completion)] += probability
        return visits


def random_world(seed: int, *, vocab_size: int = 4, horizon: int = 3) -> World:
    """A teacher that partly agrees with the student, and a reference near the student."""
    words = [token for token in range(vocab_size) if token != EOS]
    states = tuple(state for length in range(horizon) for state in product(words, repeat=length))
    ended = tuple((*state, EOS) for state in states)
    cut = tuple(product(words, repeat=horizon))
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.randn(len(states), vocab_size, generator=generator, dtype=torch.float64) for _ in range(3)]
    student = 1.5 * tables[0]
    return World(student, 0.5 * student + 1.2 * tables[1], student + 0.5 * tables[2], states, ended + cut)


def textbook(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """[S, V], [S, V] -> [S], as the papers write it, for automatic differentiation: not how ``divergences`` does it."""
    p, q = log_p.exp(), log_q.exp()

    def kl(one: Tensor, other: Tensor) -> Tensor:
        return (one * (one.log() - other.log())).sum(-1)

    beta, skew = divergence.beta, divergence.skew
    mix = beta * q + (1 - beta) * p
    gate = ((-q * log_q).sum(-1) > divergence.entropy_threshold).to(p.dtype)
    formulas: dict[DivergenceKind, Callable[[], Tensor]] = {
        "reverse_kl": lambda: kl(p, q),
        "forward_kl": lambda: kl(q, p),
        "jsd": lambda: (beta * kl(q, mix) + (1 - beta) * kl(p, mix)) / (beta * (1 - beta)),
        "skewed_kl": lambda: kl(q, skew * q + (1 - skew) * p),
        "skewed_reverse_kl": lambda: kl(p, skew * p + (1 - skew) * q),
        "entropy_gated": lambda: kl(p, q) + gate * kl(q, p),
    }
    return formulas[divergence.kind]()


def at_frozen_states(world: World, per_state: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient of sum_s reach(s) per_state(log p)(s), reach held fixed: [S, V]."""
    table = world.student.clone().requires_grad_()
    total = (world.reach(world.student) * per_state(table.log_softmax(-1))).sum()
    return torch.autograd.grad(total, table)[0]


def discounted_gradient(world: World, discount: float) -> Tensor:
    """Of the discounted return: in state s, token a costs its own log-ratio plus ``discount`` times what is expected
    after it, and only the choice of a is differentiated."""
    log_p, log_q = world.student.log_softmax(-1), world.teacher.log_softmax(-1)
    numbers = {state: i for i, state in enumerate(world.states)}
    costs = torch.zeros_like(log_p)
    for state in reversed(world.states):  # longest first
        own = (log_p - log_q)[numbers[state]].clone()
        for token in range(len(own)):
            after = numbers.get((*state, token)) if token != EOS else None
            if after is not None:
                own[token] += discount * (log_p[after].exp() * costs[after]).sum()
        costs[numbers[state]] = own
    return at_frozen_states(world, lambda moving: (moving.exp() * costs).sum(-1))


def reward_gradient(world: World, reward: Callable[[Ids], float]) -> Tensor:
    """Of the expected reward, [S, V]."""
    table = world.student.clone().requires_grad_()
    rewards = torch.tensor([reward(completion) for completion in world.completions], dtype=table.dtype)
    return torch.autograd.grad((world.probabilities(table) * rewards).sum(), table)[0]


def weighted_gradient(world: World, weight: Callable[[int], float]) -> Tensor:
    """Of the reverse KL, states with t tokens counted ``weight(t)``."""
    weights = torch.tensor([weight(len(state)) for state in world.states], dtype=torch.float64)
    log_q = world.teacher.log_softmax(-1)
    return at_frozen_states(world, lambda log_p: weights * textbook(Divergence(), log_p, log_q))


def coarse_gradient(world: World, k: int, *, chosen_by: str, bucket: bool) -> Tensor:
    """Of the reverse KL on the k most likely tokens: with one more class for the rest, or divided by their mass."""
    log_q = world.teacher.log_softmax(-1)
    kept = torch.zeros_like(log_q, dtype=torch.bool)
    for name, table in (("teacher", world.teacher), ("student", world.student)):
        if chosen_by in (name, "union"):
            kept.scatter_(-1, table.topk(k, dim=-1).indices, value=True)

    def per_state(log_p: Tensor) -> Tensor:
        p, q = (torch.where(kept, x.exp(), 0.0) for x in (log_p, log_q))
        mass = p.sum(-1), q.sum(-1)
        inside = torch.where(kept, p * (log_p - log_q), 0.0).sum(-1)
        if not bucket:
            return inside / mass[0] - (mass[0] / mass[1]).log()
        rest = [(1 - m).clamp(min=1e-12) for m in mass]  # a union may hold every token: nothing is left over then
        return inside + rest[0] * (rest[0] / rest[1]).log()

    return at_frozen_states(world, per_state)


def lagging_candidates(world: World, sampler: Tensor) -> Mapping[str, Tensor]:
    """Exact gradients when ``sampler`` wrote the completions."""
    log_q, log_mu = world.teacher.log_softmax(-1), sampler.log_softmax(-1)
    visited = replace(world, student=sampler).reach(sampler)

    def of(per_state: Callable[[Tensor], Tensor]) -> Tensor:
        table = world.student.clone().requires_grad_()
        return torch.autograd.grad((visited * per_state(table.log_softmax(-1))).sum(), table)[0]

    return {
        "KL(p‖q) at the sampler's states": of(lambda log_p: textbook(Divergence(), log_p, log_q)),
        "Σ p (log μ − log q) at the sampler's states": of(lambda log_p: (log_p.exp() * (log_mu - log_q)).sum(-1)),
    }


def candidates(world: World, reward: Callable[[Ids], float]) -> Mapping[str, Tensor]:
    """Exact gradients by name, among which an expected gradient is looked up."""
    log_q, log_r = (table.log_softmax(-1) for table in (world.teacher, world.reference))

    def of(divergence: Divergence, target: Tensor = log_q) -> Tensor:
        return at_frozen_states(world, lambda moving: textbook(divergence, moving, target))

    reverse, anchor = of(Divergence()), of(Divergence(), log_r)
    gains = reward_gradient(world, reward)
    beyond = (1.25 * log_q - 0.25 * log_r).log_softmax(-1)
    return {
        "KL(p‖q)": reverse,
        "zero": torch.zeros_like(reverse),
        "KL(q‖p)": of(Divergence("forward_kl")),
        **{f"JSD, beta {beta}": of(Divergence("jsd", beta)) for beta in (0.1, 0.5, 0.9)},
        "KL(q‖0.1q + 0.9p)": of(Divergence("skewed_kl")),
        "KL(p‖0.1p + 0.9q)": of(Divergence("skewed_reverse_kl")),
        "KL(p‖q) + KL(q‖p) where H(q) > 1": of(Divergence("entropy_gated")),
        "KL(p‖q^1.25 r^-0.25)": of(Divergence(), beyond),
        "KL(p‖q) + 0.5 KL(p‖r)": reverse + 0.5 * anchor,
        "discounted return": discounted_gradient(world, 0.5),
        "KL of whole completions": discounted_gradient(world, 1.0),
        "KL(p‖q) of the first two tokens": weighted_gradient(world, lambda t: float(t < 2)),
        "KL(p‖q) weighted with 2^(−t/2)": weighted_gradient(world, lambda t: 2 ** (-t / 2)),
        **{
            f"KL of {'k + 1 classes' if bucket else 'the top k, renormalised'} ({chosen_by})": coarse_gradient(
                world, 2, chosen_by=chosen_by, bucket=bucket
            )
            for bucket in (True, False)
            for chosen_by in ("teacher", "student", "union")
        },
        "−½ expected reward": -0.5 * gains,
        "KL(p‖q) − ½ expected reward": reverse - 0.5 * gains,
    }

"""The exact answer, by writing down every completion there is.

With a vocabulary of 5 to 8 and a horizon of 2 to 4 tokens, a student's expectation is a finite sum. ``Oracle`` takes
next-token distributions from plain transformers forward passes, one prefix a row, no padding and no cache, and uses
nothing of the package, so that it can judge it. All in float64, differentiable in the student's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

Ids = tuple[int, ...]


def all_completions(vocab_size: int, horizon: int, eos: int) -> list[Ids]:
    """Every completion: those that end with ``eos``, and those cut at ``horizon``, which do not."""
    words = [token for token in range(vocab_size) if token != eos]
    ended = [(*body, eos) for length in range(horizon) for body in product(words, repeat=length)]
    return ended + list(product(words, repeat=horizon))


def state_logprobs(model: Any, prompt: Sequence[int], states: Sequence[Ids], temperature: float) -> dict[Ids, Tensor]:
    """log-softmax(logits / temperature) [V] after ``prompt + state``, one forward pass per length of state."""
    found: dict[Ids, Tensor] = {}
    for length in sorted({len(state) for state in states}):
        own = [state for state in states if len(state) == length]
        logits = model(input_ids=torch.tensor([[*prompt, *state] for state in own]), use_cache=False).logits
        found |= dict(zip(own, torch.log_softmax(logits[:, -1] / temperature, dim=-1), strict=True))
    return found


class Oracle:
    """Student and teacher over all completions of one prompt."""

    def __init__(
        self,
        student: Any,
        teacher: Any,
        prompt: Sequence[int],
        horizon: int,
        *,
        eos: int = 0,
        temperature: float = 1.0,
        teacher_prompt: Sequence[int] | None = None,
    ) -> None:
        self.model, self.horizon, self.eos = student, horizon, eos
        self.completions = all_completions(student.config.vocab_size, horizon, eos)
        # A state is a prefix after which a token is still to be written.
        states = sorted({c[:t] for c in self.completions for t in range(len(c))}, key=len)
        self.student = state_logprobs(student, prompt, states, temperature)
        with torch.no_grad():
            self.teacher = state_logprobs(teacher, teacher_prompt or prompt, states, temperature)

    def logprob(self, completion: Ids) -> Tensor:
        """log P(completion) under the student."""
        return torch.stack([self.student[completion[:t]][token] for t, token in enumerate(completion)]).sum()

    def teacher_logprob(self, completion: Ids) -> Tensor:
        return torch.stack([self.teacher[completion[:t]][token] for t, token in enumerate(completion)]).sum()

    @property
    def probabilities(self) -> Tensor:
        """[C], detached."""
        return torch.stack([self.logprob(c) for c in self.completions]).detach().exp()

    def reach(self, state: Ids) -> Tensor:
        """The probability of coming by ``state``, detached."""
        return self.logprob(state).detach().exp() if state else torch.ones((), dtype=torch.float64)

    def sequence_kl(self) -> Tensor:
        """KL between the distributions over completions, with its true gradient: states move with the weights."""
        gaps = [(self.logprob(c), self.logprob(c) - self.teacher_logprob(c)) for c in self.completions]
        return torch.stack([own.exp() * gap for own, gap in gaps]).sum()

    def frozen_state_kl(self) -> Tensor:
        """The same value, state by state; the probability of reaching a state is held fixed."""
        return torch.stack([self.reach(s) * _kl(own, self.teacher[s]) for s, own in self.student.items()]).sum()

    def frozen_state_forward_kl(self) -> Tensor:
        """The other direction: what the objective must not be."""
        return torch.stack([self.reach(s) * _kl(self.teacher[s], own) for s, own in self.student.items()]).sum()

    def discounted(self, discount: float) -> Tensor:
        """A scalar whose gradient is that of the discounted return: from state s, token a costs its own gap plus
        ``discount`` times what is expected after it, and only the choice of a is differentiated."""
        terms = [self.reach(s) * (own.exp() * self._costs(s, discount)).sum() for s, own in self.student.items()]
        return torch.stack(terms).sum()

    def _costs(self, state: Ids, discount: float) -> Tensor:
        gaps = (self.student[state] - self.teacher[state]).detach()
        later = [self._expected_cost((*state, token), discount) for token in range(len(gaps))]
        return gaps + discount * torch.stack(later)

    def _expected_cost(self, state: Ids, discount: float) -> Tensor:
        if state[-1] == self.eos or len(state) == self.horizon:
            return torch.zeros((), dtype=torch.float64)
        return (self.student[state].detach().exp() * self._costs(state, discount)).sum()

    def expected_reward(self, reward: Callable[[Ids], float]) -> Tensor:
        return torch.stack([self.logprob(c).exp() * reward(c) for c in self.completions]).sum()

    def gradient(self, scalar: Tensor) -> Tensor:
        """d scalar / d student weights, as one vector."""
        parameters = list(self.model.parameters())
        parts = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
        rows = zip(parts, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if part is None else part).flatten() for part, p in rows])


def _kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum()

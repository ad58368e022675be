"""The three roles of the loop. Anything with these methods will do: no base class, no registration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from understudy.types import Prompt, Rollout, ScoreKind, Scores, TokenSequence

if TYPE_CHECKING:
    from understudy.config import SamplingConfig
    from understudy.objectives import Objective
    from understudy.types import Batch, LossOutput


class Sampler(Protocol):
    """Writes completions with the student's current weights."""

    def set_policy_version(self, version: int) -> None:
        """Stamp rollouts from now on: the weights have been updated ``version`` times."""
        ...

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, seed: int) -> list[list[Rollout]]:
        """One group of ``sampling.group_size`` rollouts per prompt.

        Each rollout's randomness derives from (seed, prompt.index, sample index) alone, never from its batch
        neighbours.
        """
        ...


class Teacher(Protocol):
    """Marks completions. ``kinds``: the scores it can give."""

    kinds: frozenset[ScoreKind]

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """Log-probability of every completion token given all before it; one list per sequence, completion only."""
        ...

    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0) -> list[Scores]:
        """Scores of one kind per sequence; ``topk``: how many alternatives, for kind "topk".

        A teacher with kind "chosen" also takes ``ids`` [sequence][position][k], and then gives ``TopkScores`` of these.
        """
        ...


class Trainer(Protocol):
    """Holds the weights that learn."""

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """Log-probabilities under the live weights, without gradient."""
        ...

    def topk_ids(self, sequences: Sequence[TokenSequence], k: int) -> list[Sequence[Sequence[int]]]:
        """The live weights' ``k`` most likely tokens at every completion position: [sequence][position][k].

        Called for ``objective.topk_set = "student"`` with teachers that mark chosen ids; others may leave it out.
        """
        ...

    def forward_backward(self, batch: Batch, objective: Objective) -> LossOutput:
        """Add the gradient of the objective's **sum** over the batch to what has accumulated."""
        ...

    def optimizer_step(self, *, learning_rate: float, divisor: int) -> Mapping[str, float]:
        """Divide the accumulated gradient by ``divisor``, clip, step, clear. Returns {"grad_norm": ...}."""
        ...

    def gradient_norm(self, *, divisor: int) -> float | None:
        """The norm of what has accumulated, divided by ``divisor``; None: not known before the step. For [guards]."""
        ...

    def discard_gradients(self) -> None:
        """Forget the gradient that has accumulated: of an update that [guards] refuse, or where ``forward_backward``
        ran out of memory, before the update is tried again with smaller batches."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state; with the folder of ``save_pretrained`` it restores the trainer exactly."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder that plain transformers (or peft) loads."""
        ...

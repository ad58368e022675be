"""What a run costs: FLOPs, tokens and seconds by role.

Convention (the one papers on distillation use): a token costs 2N FLOPs forward, 2N more for the gradient of activations
and 2 per *trainable* weight for the gradient of weights, so 6N in full fine-tuning; N counts the matrices a token is
multiplied with, the LM head included. Attention scores are left out. Sampling pays for the prompt once per completion.

Seconds are wall time. On CUDA the clock is read when the device is done: each role pays for its own kernels.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from understudy.backends.protocols import Sampler, Teacher, Trainer
from understudy.config import SamplingConfig
from understudy.objectives import Objective
from understudy.types import Batch, LossOutput, Prompt, Rollout, ScoreKind, Scores, TokenSequence


def forward_flops(num_matmul_parameters: int, num_tokens: int) -> float:
    """2N per token."""
    return 2.0 * num_matmul_parameters * num_tokens


def training_flops(num_matmul_parameters: int, num_trainable: int, num_tokens: int) -> float:
    """Forward, gradient of activations, gradient of the trainable weights."""
    return (4.0 * num_matmul_parameters + 2.0 * num_trainable) * num_tokens


def _now() -> float:
    """A clock that waits for queued CUDA work, which would else be billed to whichever role waits for it next."""
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(device):  # to touch a device that is not in use takes memory there
                torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass
class CostLedger:
    """Running totals by role ("student_sampling", "teacher_scoring", "student_training", "evaluation", ...)."""

    roles: dict[str, dict[str, float]] = field(default_factory=dict)
    last_seconds: dict[str, float] = field(default_factory=dict)

    def add(self, role: str, *, tokens: int, flops: float, seconds: float) -> None:
        """Add one phase's cost."""
        entry = self.roles.setdefault(role, {"tokens": 0, "flops": 0.0, "seconds": 0.0})
        entry["tokens"] += tokens
        entry["flops"] += flops
        entry["seconds"] += seconds
        self.last_seconds[role] = self.last_seconds.get(role, 0.0) + seconds

    def take_seconds(self) -> dict[str, float]:
        """Seconds by role since the last call."""
        taken, self.last_seconds = self.last_seconds, {}
        return taken

    def total(self, amount: str) -> float:
        """Sum over roles, evaluation left out: it is not part of a method's price."""
        return sum(entry[amount] for role, entry in self.roles.items() if role != "evaluation")

    def to_json(self) -> dict[str, Any]:
        """The content of costs.json."""
        return {
            "schema_version": 1,
            "roles": self.roles,
            "total_without_evaluation": {name: self.total(name) for name in ("tokens", "flops", "seconds")},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CostLedger:
        """Continue from costs.json."""
        return cls({role: dict(entry) for role, entry in content["roles"].items()})


class MeteredSampler:
    """A sampler whose work goes into the ledger."""

    def __init__(self, sampler: Sampler, costs: CostLedger, role: str, num_matmul_parameters: int) -> None:
        self._sampler, self._costs, self._role, self._size = sampler, costs, role, num_matmul_parameters

    def set_policy_version(self, version: int) -> None:
        """See ``Sampler.set_policy_version``."""
        self._sampler.set_policy_version(version)

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, seed: int) -> list[list[Rollout]]:
        """See ``Sampler.sample``."""
        start = _now()
        groups = self._sampler.sample(prompts, sampling, seed=seed)
        seconds = _now() - start
        tokens = sum(len(r.prompt.prompt_ids) + len(r.completion_ids) for group in groups for r in group)
        self._costs.add(self._role, tokens=tokens, flops=forward_flops(self._size, tokens), seconds=seconds)
        return groups


class MeteredTeacher:
    """A teacher whose work goes into the ledger."""

    def __init__(
        self, teacher: Teacher, costs: CostLedger, num_matmul_parameters: int, role: str = "teacher_scoring"
    ) -> None:
        self._teacher, self._costs, self._role, self._size = teacher, costs, role, num_matmul_parameters
        self.kinds = teacher.kinds

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """See ``Teacher.compute_logprobs``."""
        return [list(score.teacher_logprobs) for score in self.score(sequences, "sampled")]

    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0) -> list[Scores]:
        """See ``Teacher.score``."""
        start = _now()
        scores = self._teacher.score(sequences, kind, topk=topk)
        seconds = _now() - start
        tokens = sum(len(s.prompt_ids) + len(s.completion_ids) for s in sequences)
        flops = forward_flops(self._size, tokens)
        self._costs.add(self._role, tokens=tokens, flops=flops, seconds=seconds)
        return scores


class MeteredTrainer:
    """A trainer whose updates go into the ledger; looking at log-probabilities for pages does not."""

    def __init__(self, trainer: Trainer, costs: CostLedger, sizes: tuple[int, int]) -> None:
        self._trainer, self._costs, self._sizes = trainer, costs, sizes

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """See ``Trainer.compute_logprobs``."""
        return self._trainer.compute_logprobs(sequences)

    def forward_backward(self, batch: Batch, objective: Objective) -> LossOutput:
        """See ``Trainer.forward_backward``."""
        start = _now()
        output = self._trainer.forward_backward(batch, objective)
        seconds = _now() - start
        tokens = batch.sequence_tokens
        flops = training_flops(*self._sizes, tokens)
        self._costs.add("student_training", tokens=tokens, flops=flops, seconds=seconds)
        return output

    def optimizer_step(self, *, learning_rate: float, divisor: int) -> Mapping[str, float]:
        """See ``Trainer.optimizer_step``."""
        start = _now()
        metrics = self._trainer.optimizer_step(learning_rate=learning_rate, divisor=divisor)
        self._costs.add("student_training", tokens=0, flops=0.0, seconds=_now() - start)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """See ``Trainer.state_dict``."""
        return self._trainer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Trainer.load_state_dict``."""
        self._trainer.load_state_dict(state)

    def save_pretrained(self, folder: Path) -> None:
        """See ``Trainer.save_pretrained``."""
        self._trainer.save_pretrained(folder)

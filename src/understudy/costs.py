"""What a run costs: FLOPs, tokens and seconds by role.

FLOPs are counted in two ways. ``flops`` is the convention that papers on distillation use: a token costs 2N forward, 2N
more for the gradient of activations and 2 per *trainable* weight for the gradient of weights, so 6N in full
fine-tuning; N counts the matrices a token is multiplied with, the LM head included. Attention scores are left out.
Sampling pays for the prompt once per completion. ``exact_flops`` counts the products that the role's work consists of,
see ``flops.py``: attention too, prompts as often as they go through the model, the LM head where it is applied.

Seconds are wall time. On CUDA the clock is read when the device is done: each role pays for its own kernels.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, FiniteFloat, ValidationError

from understudy import flops as exact
from understudy.backends.protocols import Sampler, Teacher, Trainer
from understudy.batching import plan_batches
from understudy.config import SamplingConfig
from understudy.errors import ConfigError, first_line
from understudy.flops import ALL_WEIGHTS, Flops, ModelShape, Update
from understudy.json_text import parsed
from understudy.objectives import Mixture, Objective
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


_AMOUNTS = ("tokens", "flops", "exact_flops", "seconds")


class _Entry(BaseModel):
    tokens: int
    flops: FiniteFloat
    exact_flops: FiniteFloat | None = None
    seconds: FiniteFloat


class _Stored(BaseModel):
    roles: dict[str, _Entry]


@dataclass
class CostLedger:
    """Running totals by role ("student_sampling", "teacher_scoring", "student_training", "evaluation", ...)."""

    roles: dict[str, dict[str, float]] = field(default_factory=dict)
    last_seconds: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, role: str, *, tokens: int, flops: float, seconds: float, exact_flops: float | None = None) -> None:
        """Add one phase's cost. Where the exact count is not known, the convention's stands in for it. Stages that
        overlap may add at the same time."""
        with self._lock:
            self._add(role, tokens, flops, seconds, exact_flops)

    def _add(self, role: str, tokens: int, flops: float, seconds: float, exact_flops: float | None) -> None:
        entry = self.roles.setdefault(role, dict.fromkeys(_AMOUNTS, 0.0) | {"tokens": 0})
        entry["tokens"] += tokens
        entry["flops"] += flops
        entry["exact_flops"] += flops if exact_flops is None else exact_flops
        entry["seconds"] += seconds
        self.last_seconds[role] = self.last_seconds.get(role, 0.0) + seconds

    def take_seconds(self) -> dict[str, float]:
        """Seconds by role since the last call."""
        with self._lock:
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
            "total_without_evaluation": {name: self.total(name) for name in _AMOUNTS},
        }

    @classmethod
    def from_json(cls, content: Any, where: str = "costs") -> CostLedger:
        """Continue from costs.json; where there is no exact count yet, the convention's stands in. Raises ConfigError,
        about ``where``, for what is none."""
        try:
            stored = _Stored.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise _unreadable(where, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        entries = {role: entry.model_dump(exclude_none=True) for role, entry in stored.roles.items()}
        return cls({role: {"exact_flops": entry["flops"]} | entry for role, entry in entries.items()})

    @classmethod
    def read(cls, path: Path) -> CostLedger:
        """Continue from a costs.json. Raises ConfigError for what is none."""
        try:
            return cls.from_json(parsed(path.read_bytes()), str(path))
        except ConfigError:
            raise
        except ValueError as error:
            raise _unreadable(str(path), first_line(error)) from None


def _unreadable(where: str, got: str) -> ConfigError:
    expected = f"{', '.join(_AMOUNTS)} of every role, as a run writes them"
    return ConfigError(where, got=got, expected=expected, remedy="put the file back from a copy")


@dataclass(frozen=True)
class CountedModel:
    """What the exact count of a model's work needs to know: its shape, what trains, and whether completions share their
    prompt when it scores or trains (``shares_prompts``) and when it writes (``samples_shared``)."""

    shape: ModelShape
    shares_prompts: bool
    samples_shared: bool
    update: Update = ALL_WEIGHTS

    def sampling(self, groups: Sequence[Sequence[Rollout]]) -> float:
        """FLOPs of writing these completions."""
        written = Flops()
        for group in groups:
            lengths = [len(rollout.completion_ids) for rollout in group]
            prompt = len(group[0].prompt.prompt_ids)
            written += exact.sampling(self.shape, prompt, lengths, shared=self.samples_shared)
        return written.total

    def scoring(self, sequences: Sequence[TokenSequence], kind: ScoreKind) -> float:
        """FLOPs of marking these sequences. A prompt counts once for all that share it, though a batch's limit may
        separate them."""
        marked = Flops()
        for arrangement, chosen in plan_batches(sequences, max_tokens=sys.maxsize, share_prompts=self.shares_prompts):
            by_prompt: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
            for i in chosen:
                by_prompt[tuple(sequences[i].prompt_ids)].append(len(sequences[i].completion_ids))
            for prompt, lengths in by_prompt.items():
                marked += exact.scoring(self.shape, len(prompt), lengths, shared=arrangement == "shared")
        # The best tokens are found in a second pass over the vocabulary.
        return marked.total + (marked.head if kind == "topk" else 0.0)

    def training(self, batch: Batch, objective: Objective) -> float:
        """FLOPs of a forward and backward pass: the student's head once for each of a mixture's objectives, and the
        head of each model whose hidden states the batch brings."""
        num_tokens = len(batch.target_ids)
        once = sum((exact.forward(self.shape, *span, 0) for span in _spans(batch)), Flops())
        passes = len(objective.objectives) if isinstance(objective, Mixture) else 1
        once += Flops(head=2.0 * self.shape.head_weights * num_tokens * passes)
        hidden = [h for h in (batch.teacher_hidden, batch.reference_hidden) if h is not None]
        others = sum(2.0 * h.shape[-1] * self.shape.vocab * num_tokens for h in hidden)
        return exact.backpropagated(self.shape, once, self.update).total + others


def _spans(batch: Batch) -> Iterator[tuple[int, int]]:
    """(start, stop) of the runs of positions that go through the layers; what is before a start is in a cache."""
    index = batch.token_index.cpu()
    if batch.shared is not None:
        prompts = batch.shared.attention_mask.sum(-1).tolist()
        yield from ((0, length) for length in prompts)
        # Each completion begins at its prompt's last position.
        width = batch.input_ids.shape[1]
        firsts = (index < batch.input_ids.numel()).nonzero()[:, 0].tolist()
        for first, end in zip(firsts, [*firsts[1:], len(index)], strict=True):
            prompt = prompts[int(index[first]) // width]
            yield prompt, prompt + end - first - 1
    elif batch.position_ids is not None:
        starts = (batch.position_ids[0] == 0).nonzero()[:, 0].tolist()
        yield from (
            (0, end - start) for start, end in zip(starts, [*starts[1:], batch.position_ids.shape[1]], strict=True)
        )
    else:
        # A row's last prediction is made one position before its end.
        width = batch.input_ids.shape[1]
        rows = index // width
        for row in range(len(batch.input_ids)):
            own = index[rows == row]
            yield 0, int(own.max()) - row * width + 2 if len(own) else width


class MeteredSampler:
    """A sampler whose work goes into the ledger."""

    def __init__(
        self,
        sampler: Sampler,
        costs: CostLedger,
        role: str,
        num_matmul_parameters: int,
        counted: CountedModel | None = None,
    ) -> None:
        self._sampler, self._costs, self._role, self._size = sampler, costs, role, num_matmul_parameters
        self._counted = counted

    def set_policy_version(self, version: int) -> None:
        """See ``Sampler.set_policy_version``: a role of its own, as weights may have far to go."""
        start = _now()
        self._sampler.set_policy_version(version)
        self._costs.add("weight_sync", tokens=0, flops=0.0, seconds=_now() - start)

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, seed: int) -> list[list[Rollout]]:
        """See ``Sampler.sample``."""
        start = _now()
        groups = self._sampler.sample(prompts, sampling, seed=seed)
        seconds = _now() - start
        tokens = sum(len(r.prompt.prompt_ids) + len(r.completion_ids) for group in groups for r in group)
        flops = forward_flops(self._size, tokens)
        counted = self._counted.sampling(groups) if self._counted else None
        self._costs.add(self._role, tokens=tokens, flops=flops, seconds=seconds, exact_flops=counted)
        return groups


class MeteredTeacher:
    """A teacher whose work goes into the ledger."""

    def __init__(
        self,
        teacher: Teacher,
        costs: CostLedger,
        num_matmul_parameters: int,
        role: str = "teacher_scoring",
        counted: CountedModel | None = None,
    ) -> None:
        self._teacher, self._costs, self._role, self._size = teacher, costs, role, num_matmul_parameters
        self._counted = counted
        self.kinds = teacher.kinds

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """See ``Teacher.compute_logprobs``."""
        return [list(score.teacher_logprobs) for score in self.score(sequences, "sampled")]

    def score(
        self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0, **options: Any
    ) -> list[Scores]:
        """See ``Teacher.score``."""
        start = _now()
        scores = self._teacher.score(sequences, kind, topk=topk, **options)
        seconds = _now() - start
        tokens = sum(len(s.prompt_ids) + len(s.completion_ids) for s in sequences)
        flops = forward_flops(self._size, tokens)
        counted = self._counted.scoring(sequences, kind) if self._counted else None
        self._costs.add(self._role, tokens=tokens, flops=flops, seconds=seconds, exact_flops=counted)
        return scores


class MeteredTrainer:
    """A trainer whose work for updates goes into the ledger; looking at log-probabilities for pages does not."""

    def __init__(
        self,
        trainer: Trainer,
        costs: CostLedger,
        sizes: tuple[int, int],
        counted: CountedModel | None = None,
        *,
        before_update: Callable[[], None] = lambda: None,
    ) -> None:
        self._trainer, self._costs, self._sizes, self._counted = trainer, costs, sizes, counted
        self._before_update = before_update

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """See ``Trainer.compute_logprobs``."""
        return self._trainer.compute_logprobs(sequences)

    def topk_ids(self, sequences: Sequence[TokenSequence], k: int) -> list[Sequence[Sequence[int]]]:
        """See ``Trainer.topk_ids``."""
        start = _now()
        ids = self._trainer.topk_ids(sequences, k)
        seconds = _now() - start
        tokens = sum(len(s.prompt_ids) + len(s.completion_ids) for s in sequences)
        counted = self._counted.scoring(sequences, "topk") if self._counted else None
        flops = forward_flops(self._sizes[0], tokens)
        self._costs.add("student_scoring", tokens=tokens, flops=flops, seconds=seconds, exact_flops=counted)
        return ids

    def forward_backward(self, batch: Batch, objective: Objective) -> LossOutput:
        """See ``Trainer.forward_backward``."""
        start = _now()
        output = self._trainer.forward_backward(batch, objective)
        seconds = _now() - start
        tokens = batch.sequence_tokens
        flops = training_flops(*self._sizes, tokens)
        counted = self._counted.training(batch, objective) if self._counted else None
        self._costs.add("student_training", tokens=tokens, flops=flops, seconds=seconds, exact_flops=counted)
        return output

    def optimizer_step(self, *, learning_rate: float, divisor: int) -> Mapping[str, float]:
        """See ``Trainer.optimizer_step``."""
        self._before_update()
        start = _now()
        metrics = self._trainer.optimizer_step(learning_rate=learning_rate, divisor=divisor)
        self._costs.add("student_training", tokens=0, flops=0.0, seconds=_now() - start)
        return metrics

    def gradient_norm(self, *, divisor: int) -> float | None:
        """See ``Trainer.gradient_norm``."""
        look = getattr(self._trainer, "gradient_norm", None)
        return look(divisor=divisor) if look is not None else None

    def discard_gradients(self) -> None:
        """See ``Trainer.discard_gradients``."""
        self._trainer.discard_gradients()

    def state_dict(self) -> dict[str, Any]:
        """See ``Trainer.state_dict``."""
        return self._trainer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Trainer.load_state_dict``."""
        self._trainer.load_state_dict(state)

    def save_pretrained(self, folder: Path) -> None:
        """See ``Trainer.save_pretrained``."""
        self._trainer.save_pretrained(folder)

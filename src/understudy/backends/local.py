"""Sampler, Teacher and Trainer in this process, on transformers models. Sampler and trainer share one set of
weights."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from understudy.backends.decoding import decode, rollout_uniforms
from understudy.backends.loading import LanguageModel
from understudy.batching import lay_out, plan_batches
from understudy.config import OptimConfig, SamplingConfig
from understudy.errors import RunError
from understudy.lm_head import LMHead, head_logprobs, head_topk
from understudy.objectives import Objective
from understudy.types import (
    Batch,
    HiddenScores,
    LossOutput,
    Prompt,
    Rollout,
    SampledScores,
    ScoreKind,
    Scores,
    TokenSequence,
    TopkScores,
)


@contextlib.contextmanager
def _enough_memory(work: str, remedy: str) -> Iterator[None]:
    """Say which setting an out-of-memory error comes from."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"out of GPU memory while {work}; {remedy}") from error


class LocalSampler:
    """Writes with the trainer's own weights, so a sync moves nothing."""

    def __init__(self, model: LanguageModel, *, stop_ids: frozenset[int]) -> None:
        self._model = model
        self._stop_ids = stop_ids
        self._policy_version = 0

    def set_policy_version(self, version: int) -> None:
        """See ``Sampler.set_policy_version``."""
        self._policy_version = version

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, seed: int) -> list[list[Rollout]]:
        """See ``Sampler.sample``. A prompt that stands twice in ``prompts`` gets further samples, not the same
        again."""
        seen: Counter[int] = Counter()
        jobs: list[tuple[Prompt, int]] = []
        for prompt in prompts:
            start = seen[prompt.index]
            jobs += [(prompt, start + i) for i in range(sampling.group_size)]
            seen[prompt.index] += sampling.group_size
        rollouts: list[Rollout | None] = [None] * len(jobs)
        # Like lengths decode together: less padding. Results do not depend on it.
        order = sorted(range(len(jobs)), key=lambda i: len(jobs[i][0].prompt_ids))
        for start in range(0, len(order), sampling.max_batch_rows):
            chosen = order[start : start + sampling.max_batch_rows]
            for i, rollout in zip(chosen, self._rollouts([jobs[i] for i in chosen], sampling, seed), strict=True):
                rollouts[i] = rollout
        done = [rollout for rollout in rollouts if rollout is not None]
        size = sampling.group_size
        return [done[i : i + size] for i in range(0, len(done), size)]

    def _rollouts(self, jobs: Sequence[tuple[Prompt, int]], sampling: SamplingConfig, seed: int) -> list[Rollout]:
        length = sampling.max_completion_tokens
        with _enough_memory("sampling", f"lower sampling.max_batch_rows (now {sampling.max_batch_rows})"):
            completions = decode(
                self._model,
                [prompt.prompt_ids for prompt, _ in jobs],
                np.stack([rollout_uniforms(seed, prompt.index, sample, length) for prompt, sample in jobs]),
                stop_ids=self._stop_ids,
                max_tokens=length,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
            )
        return [
            Rollout(
                prompt=prompt,
                completion_ids=ids,
                sampler_logprobs=logprobs,
                finish_reason="stop" if ids[-1] in self._stop_ids else "length",
                policy_version_start=self._policy_version,
                policy_version_end=self._policy_version,
            )
            for (prompt, _), (ids, logprobs) in zip(jobs, completions, strict=True)
        ]


class LocalTeacher:
    """Marks with one forward pass; the head runs on completion positions only. Hidden states come back on the CPU: a
    step's worth of them would fill a device."""

    kinds: frozenset[ScoreKind] = frozenset({"sampled", "topk", "hidden"})

    def __init__(self, model: LanguageModel, *, temperature: float = 1.0, batch_tokens: int = 16384) -> None:
        self.model = model
        self.temperature = temperature
        self._batch_tokens = batch_tokens

    @property
    def head(self) -> LMHead:
        """For full-vocabulary objectives."""
        return self.model.head

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """See ``Teacher.compute_logprobs``."""
        return [list(scores.teacher_logprobs) for scores in self.score(sequences, "sampled")]

    @torch.no_grad()
    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0) -> list[Scores]:
        """See ``Teacher.score``."""
        scores: list[Scores | None] = [None] * len(sequences)
        for chosen in plan_batches(sequences, max_tokens=self._batch_tokens):
            with _enough_memory("scoring", f"lower optim.micro_batch_tokens (now {self._batch_tokens})"):
                for i, score in zip(chosen, self._batch([sequences[i] for i in chosen], kind, topk), strict=True):
                    scores[i] = score
        return [score for score in scores if score is not None]

    def _batch(self, sequences: Sequence[TokenSequence], kind: ScoreKind, topk: int) -> list[Scores]:
        layout = lay_out(sequences, device=self.model.device)
        hidden = self.model.hidden(layout.input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1)[layout.token_index]
        logprobs = head_logprobs(self.head, hidden, layout.target_ids, temperature=self.temperature)
        hidden = hidden.cpu() if kind == "hidden" else hidden
        lengths = [len(s.completion_ids) for s in sequences]
        parts = zip(hidden.split(lengths), logprobs.split(lengths), strict=True)
        return [self._scores(kind, own_hidden, own.tolist(), topk) for own_hidden, own in parts]

    def _scores(self, kind: ScoreKind, hidden: Tensor, logprobs: list[float], topk: int) -> Scores:
        if kind == "sampled":
            return SampledScores(logprobs)
        if kind == "hidden":
            return HiddenScores(logprobs, hidden)
        values, ids = head_topk(self.head, hidden, topk, temperature=self.temperature)
        return TopkScores(logprobs, ids.tolist(), values.tolist())


class LocalTrainer:
    """AdamW on a transformers model; dropout is off, so that teacher = student gives exactly zero."""

    def __init__(self, model: LanguageModel, optim: OptimConfig, *, temperature: float = 1.0) -> None:
        self.model = model
        self._temperature = temperature
        self._grad_clip = optim.grad_clip
        self._batch_tokens = optim.micro_batch_tokens
        self._parameters = [p for p in model.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=0.0,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """See ``Trainer.compute_logprobs``."""
        return LocalTeacher(
            self.model, temperature=self._temperature, batch_tokens=self._batch_tokens
        ).compute_logprobs(sequences)

    def forward_backward(self, batch: Batch, objective: Objective) -> LossOutput:
        """See ``Trainer.forward_backward``."""
        inputs = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        with _enough_memory("training", f"lower optim.micro_batch_tokens (now {self._batch_tokens})"):
            output = self.model.hidden(batch.input_ids, use_cache=False, **inputs)
            hidden = output.last_hidden_state.flatten(0, 1)[batch.token_index]
            loss = objective(self._on_device(batch), hidden, self.model.head)
            loss.loss.backward()
        return LossOutput(loss.loss.detach(), loss.metrics)

    def _on_device(self, batch: Batch) -> Batch:
        """With the hidden states that were on the CPU until their micro-batch had its turn."""
        hidden = {"teacher_hidden": batch.teacher_hidden, "reference_hidden": batch.reference_hidden}
        return replace(batch, **{name: h.to(self.model.device) for name, h in hidden.items() if h is not None})

    def optimizer_step(self, *, learning_rate: float, divisor: int) -> dict[str, float]:
        """See ``Trainer.optimizer_step``."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        for gradient in gradients:
            gradient.div_(divisor)
        limit = self._grad_clip or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, limit))
        if not math.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise RunError(
                f"the gradient's norm is {norm}; expected a finite number. Lower optim.learning_rate and resume"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        # Its state is made in the first step: two numbers per trained weight, whatever the batch.
        with _enough_memory("updating the weights", "train adapters ([student.lora]) or a smaller student"):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """See ``Trainer.state_dict``."""
        return {"optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Trainer.load_state_dict``."""
        self._optimizer.load_state_dict(state["optimizer"])

    def save_pretrained(self, folder: Path) -> None:
        """See ``Trainer.save_pretrained``."""
        model = self.model.model
        # An adapted head is saved as its adapters; peft would write the whole head and embedding too.
        options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
        model.save_pretrained(folder, **options)

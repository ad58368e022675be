"""Sampler, Teacher and Trainer in this process, on transformers models. Sampler and trainer share one set of
weights."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from understudy.backends.cache import new_cache
from understudy.backends.decoding import decode, rollout_uniforms
from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import default_micro_batch_tokens
from understudy.backends.memory import fewer_tokens, is_out_of_memory, memory_budget
from understudy.batching import Arrangement, Layout, lay_out, plan_batches
from understudy.config import OptimConfig, SamplingConfig
from understudy.errors import NonFiniteError, RunError
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

log = logging.getLogger("understudy")


@contextlib.contextmanager
def _enough_memory(work: str, remedy: str) -> Iterator[None]:
    """Say what helps where memory ran out, and nothing smaller can be tried."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"out of memory while {work}; {remedy}") from error


def _autocast(model: LanguageModel, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in ``dtype``; None: in that of their operands."""
    return torch.autocast(model.device.type, dtype) if dtype else contextlib.nullcontext()


class LocalSampler:
    """Writes with the trainer's own weights, so that a sync moves nothing; or, with a ``shadow``, with a copy of them
    in another dtype, which a sync refreshes.

    ``ends`` (completion so far) -> whether a stop string ends it here.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        stop_ids: frozenset[int],
        shadow: LanguageModel | None = None,
        ends: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        self._source = model
        self._model = shadow or model
        self._stop_ids = stop_ids
        self._ends = ends
        self._policy_version = 0
        if new_cache(model.config) is None:
            log.warning(
                "%s keeps states that rows cannot be chosen from: prompts are not shared by their group, and finished "
                "rows stay in the batch",
                type(model.model).__name__,
            )

    def set_policy_version(self, version: int) -> None:
        """See ``Sampler.set_policy_version``."""
        self._policy_version = version
        if self._model is not self._source:
            self._model.take_weights(self._source)

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, seed: int) -> list[list[Rollout]]:
        """See ``Sampler.sample``. A prompt that stands twice in ``prompts`` gets further samples, not the same
        again."""
        if not prompts:
            return []
        seen: Counter[int] = Counter()
        jobs: list[tuple[Prompt, int]] = []
        for prompt in prompts:
            start = seen[prompt.index]
            jobs += [(prompt, start + i) for i in range(sampling.group_size)]
            seen[prompt.index] += sampling.group_size
        rollouts: list[Rollout | None] = [None] * len(jobs)
        # Like lengths decode together: less padding. Results do not depend on it.
        order = sorted(range(len(jobs)), key=lambda i: len(jobs[i][0].prompt_ids))
        size = self._rows_at_once(jobs, sampling)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            for i, rollout in zip(chosen, self._rollouts([jobs[i] for i in chosen], sampling, seed), strict=True):
                rollouts[i] = rollout
        done = [rollout for rollout in rollouts if rollout is not None]
        return [done[i : i + sampling.group_size] for i in range(0, len(done), sampling.group_size)]

    def _rows_at_once(self, jobs: Sequence[tuple[Prompt, int]], sampling: SamplingConfig) -> int:
        """At most ``sampling.max_batch_rows``, and no more than memory holds: batches change no result."""
        longest = max(len(prompt.prompt_ids) for prompt, _ in jobs) + sampling.max_completion_tokens
        truncated = sampling.top_p < 1 or sampling.top_k > 0
        fitting = memory_budget(self._model.device) // self._model.decoding_bytes(longest, truncated=truncated)
        return max(1, min(sampling.max_batch_rows, fitting))

    def _rollouts(self, jobs: Sequence[tuple[Prompt, int]], sampling: SamplingConfig, seed: int) -> list[Rollout]:
        length = sampling.max_completion_tokens
        try:
            completions = decode(
                self._model,
                [prompt.prompt_ids for prompt, _ in jobs],
                np.stack([rollout_uniforms(seed, prompt.index, sample, length) for prompt, sample in jobs]),
                stop_ids=self._stop_ids,
                max_tokens=[length] * len(jobs),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                ends=self._ends,
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(jobs) == 1:
                raise RunError(
                    "out of memory while sampling a single completion; lower sampling.max_completion_tokens "
                    f"(now {length}), or use a smaller student"
                ) from None
            completions = None
        if completions is None:  # outside the handler, which would keep the failed attempt's tensors alive
            log.warning("out of memory with %d completions at once: decoding them in two halves", len(jobs))
            half = len(jobs) // 2
            return self._rollouts(jobs[:half], sampling, seed) + self._rollouts(jobs[half:], sampling, seed)
        return [
            Rollout(
                prompt=prompt,
                completion_ids=ids,
                sampler_logprobs=logprobs,
                finish_reason="stop" if self._stopped(ids) else "length",
                policy_version_start=self._policy_version,
                policy_version_end=self._policy_version,
            )
            for (prompt, _), (ids, logprobs) in zip(jobs, completions, strict=True)
        ]

    def _stopped(self, ids: Sequence[int]) -> bool:
        return ids[-1] in self._stop_ids or (self._ends is not None and self._ends(ids))


class LocalTeacher:
    """Marks with one forward pass; the head runs on completion positions only. Hidden states come back on the CPU: a
    step's worth of them would fill a device."""

    kinds: frozenset[ScoreKind] = frozenset({"sampled", "topk", "hidden"})

    def __init__(
        self,
        model: LanguageModel,
        *,
        temperature: float = 1.0,
        batch_tokens: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.temperature = temperature
        self._batch_tokens = batch_tokens or default_micro_batch_tokens(model.device)
        self.autocast = autocast

    @property
    def head(self) -> LMHead:
        """For full-vocabulary objectives."""
        return self.model.head

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """See ``Teacher.compute_logprobs``."""
        return [list(scores.teacher_logprobs) for scores in self.score(sequences, "sampled")]

    @torch.no_grad()
    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0) -> list[Scores]:
        """See ``Teacher.score``. Where memory runs out, all of it is done again in smaller batches."""
        while True:
            plan = self._plan(sequences, self._batch_tokens)
            if len(plan) == len(sequences):  # nothing smaller is left
                with _enough_memory(
                    "scoring a single completion", "lower sampling.max_completion_tokens, or use a smaller model"
                ):
                    return self._marked(sequences, plan, kind, topk)
            try:
                return self._marked(sequences, plan, kind, topk)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler, which would keep the failed attempt's tensors alive.
            self._batch_tokens = fewer_tokens(self._batch_tokens, lambda most: len(self._plan(sequences, most)))
            log.warning(
                "out of memory while scoring: done again in batches of at most %d tokens; to begin with that, set "
                "optim.micro_batch_tokens = %d",
                self._batch_tokens,
                self._batch_tokens,
            )

    def _plan(self, sequences: Sequence[TokenSequence], max_tokens: int) -> list[tuple[Arrangement, list[int]]]:
        return plan_batches(sequences, max_tokens=max_tokens, share_prompts=self.model.shares_prompts)

    def _marked(
        self,
        sequences: Sequence[TokenSequence],
        plan: Sequence[tuple[Arrangement, list[int]]],
        kind: ScoreKind,
        topk: int,
    ) -> list[Scores]:
        scores: list[Scores | None] = [None] * len(sequences)
        for arrangement, chosen in plan:
            layout = lay_out([sequences[i] for i in chosen], device=self.model.device, arrangement=arrangement)
            lengths = [len(sequences[i].completion_ids) for i in chosen]
            with _autocast(self.model, self.autocast):
                for i, score in zip(chosen, self._batch(layout, lengths, kind, topk), strict=True):
                    scores[i] = score
        return [score for score in scores if score is not None]

    def _batch(self, layout: Layout, lengths: list[int], kind: ScoreKind, topk: int) -> list[Scores]:
        hidden = self.model.completion_hidden(layout)
        logprobs = head_logprobs(self.head, hidden, layout.target_ids, temperature=self.temperature)
        hidden = hidden.cpu() if kind == "hidden" else hidden
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

    def __init__(
        self,
        model: LanguageModel,
        optim: OptimConfig,
        *,
        temperature: float = 1.0,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self._autocast = autocast
        self._grad_clip = optim.grad_clip
        # The live weights as a teacher.
        self._marker = LocalTeacher(
            model, temperature=temperature, batch_tokens=optim.micro_batch_tokens, autocast=autocast
        )
        self._parameters = [p for p in model.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=0.0,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """See ``Trainer.compute_logprobs``."""
        return self._marker.compute_logprobs(sequences)

    def topk_ids(self, sequences: Sequence[TokenSequence], k: int) -> list[Sequence[Sequence[int]]]:
        """See ``Trainer.topk_ids``."""
        return [score.ids for score in self._marker.score(sequences, "topk", topk=k) if isinstance(score, TopkScores)]

    def forward_backward(self, batch: Batch, objective: Objective) -> LossOutput:
        """See ``Trainer.forward_backward``."""
        with _autocast(self.model, self._autocast):
            loss = objective(self._on_device(batch), self.model.completion_hidden(batch), self.model.head)
        loss.loss.backward()
        return LossOutput(loss.loss.detach(), loss.metrics)

    def discard_gradients(self) -> None:
        """See ``Trainer.discard_gradients``."""
        self._optimizer.zero_grad(set_to_none=True)

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
            raise NonFiniteError(
                f"the gradient's norm is {norm}; expected a finite number. Lower optim.learning_rate in a new run"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        # Its state is made in the first step: two numbers per trained weight, whatever the batch.
        with _enough_memory("updating the weights", "train adapters ([student.lora]) or a smaller student"):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm}

    def gradient_norm(self, *, divisor: int) -> float:
        """See ``Trainer.gradient_norm``."""
        return float(torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])) / divisor

    def state_dict(self) -> dict[str, Any]:
        """See ``Trainer.state_dict``."""
        return {"optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Trainer.load_state_dict``. Raises ValueError for the state of other weights."""
        moments = state["optimizer"]["state"]
        for index, own in moments.items():
            shapes = {name: tuple(value.shape) for name, value in own.items()}
            shape = tuple(self._parameters[index].shape)
            if shapes != {"step": (), "exp_avg": shape, "exp_avg_sq": shape}:
                raise ValueError(f"optimizer state {index} of shapes {shapes}; the weights have {shape}")
        # What else it holds is the configuration's.
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def save_pretrained(self, folder: Path) -> None:
        """See ``Trainer.save_pretrained``."""
        model = self.model.model
        # An adapted head is saved as its adapters; peft would write the whole head and embedding too.
        options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
        model.save_pretrained(folder, **options)

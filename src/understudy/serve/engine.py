"""The served model: what the worker thread asks of it, and what can be said of it without running it."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import default_micro_batch_tokens
from understudy.backends.local import LocalSampler, LocalTeacher
from understudy.batching import plan_batches
from understudy.config import SamplingConfig
from understudy.lm_head import LMHead, head_logprobs, head_topk
from understudy.tokenization import ModelText
from understudy.types import FinishReason, HiddenScores, Prompt, ScoreKind, Scores, TokenSequence, TopkScores

# "ranked" is "topk" (also with no alternatives at all) plus each token's rank.
WorkKind = Literal["sampled", "topk", "chosen", "hidden", "ranked"]

# Logits [n, V] that are held at once to count ranks.
_RANK_NUMBERS = 2**24


class Dropped(Exception):
    """Nobody waits for this completion any more."""


@dataclass(frozen=True)
class Scored:
    """A sequence's scores. ``logprobs`` [T]; ``ids`` and ``topk_logprobs`` [T, k]; ``ranks`` [T], 1 the likeliest;
    ``hidden`` [T, H] on the CPU. None: not asked for."""

    logprobs: Sequence[float]
    ids: Sequence[Sequence[int]] | None = None
    topk_logprobs: Sequence[Sequence[float]] | None = None
    ranks: Sequence[int] | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Decoding:
    """How prompts are continued. ``stop_ids`` end a completion, beside the texts ``stop``."""

    n: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Written:
    """A completion, its last token included that ended it."""

    ids: Sequence[int]
    finish_reason: FinishReason


class Engine:
    """A model with its tokenizer. ``score`` and ``generate`` belong to one thread; the rest may be called from any.

    ``context``: tokens of a sequence at most. ``batch_tokens``: tokens that go through the model at once.
    """

    def __init__(
        self,
        model: LanguageModel,
        text: ModelText,
        *,
        name: str | None = None,
        context: int | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        self.name = name or text.name
        self.root = text.name
        self.context = context or text.context_length
        self.end_ids = text.end_ids
        self.batch_tokens = batch_tokens or default_micro_batch_tokens(model.device)
        self.shares_prompts = model.shares_prompts
        self.head: LMHead = model.head
        self.vocab_size = self.head.vocab_size
        self.head_hash = head_hash(self.head)
        self.fingerprint = fingerprint(model.model, self.vocab_size)
        self._model = model
        self._teacher = LocalTeacher(model, batch_tokens=self.batch_tokens)
        # Tokenizers are not safe in two threads at a time: the worker has one of its own, for stop strings.
        self._worker_text = replace(text, tokenizer=copy.deepcopy(text.tokenizer))
        self._text = text
        self._text_lock = threading.Lock()
        self.token_text: Callable[[int], str] = lru_cache(maxsize=None)(self._decode_one)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Text -> token ids, with the begin token where the tokenizer adds one and ``special`` asks for it."""
        with self._text_lock:
            return self._text.encode(text) if special else self._text.encode_completion(text)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Token ids -> text."""
        with self._text_lock:
            return self._text.tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def _decode_one(self, token: int) -> str:
        return self.decode([token])

    def reused_tokens(self, sequences: Sequence[TokenSequence]) -> int:
        """Prompt tokens that do not go through the model again when these are scored together."""
        if not self.shares_prompts:
            return 0
        reused = 0
        for arrangement, chosen in plan_batches(sequences, max_tokens=self.batch_tokens, share_prompts=True):
            if arrangement == "shared":
                prompts = [tuple(sequences[i].prompt_ids) for i in chosen]
                reused += sum(map(len, prompts)) - sum(map(len, set(prompts)))
        return reused

    @torch.no_grad()
    def score(
        self,
        sequences: Sequence[TokenSequence],
        kind: WorkKind,
        *,
        k: int = 0,
        ids: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> list[Scored]:
        """One ``Scored`` per sequence, in nats at temperature 1. ``k``: alternatives per position, for "topk" and
        "ranked"; ``ids`` [sequence][T][k]: whose log-probabilities "chosen" wants."""
        scores = self._teacher.score(sequences, _TEACHER_KIND[kind], topk=k)
        chosen = [None] * len(sequences) if ids is None else ids
        return [self._scored(*parts, kind, k) for parts in zip(sequences, scores, chosen, strict=True)]

    def _scored(
        self, sequence: TokenSequence, score: Scores, ids: Sequence[Sequence[int]] | None, kind: WorkKind, k: int
    ) -> Scored:
        logprobs = score.teacher_logprobs
        if isinstance(score, TopkScores):
            return Scored(logprobs, score.ids, score.logprobs)
        if not isinstance(score, HiddenScores):
            return Scored(logprobs)
        if kind == "hidden":
            return Scored(logprobs, hidden=score.teacher_hidden)
        hidden = score.teacher_hidden.to(self._model.device)
        if ids is not None:
            chosen = torch.tensor(ids, dtype=torch.long, device=hidden.device)
            return Scored(logprobs, ids, head_logprobs(self.head, hidden, chosen).tolist())
        ranks = list(self._ranks(hidden, torch.tensor(sequence.completion_ids, device=hidden.device)))
        if k == 0:
            return Scored(logprobs, ranks=ranks)
        values, top = head_topk(self.head, hidden, k)
        return Scored(logprobs, top.tolist(), values.tolist(), ranks)

    def _ranks(self, hidden: Tensor, target_ids: Tensor) -> Iterator[int]:
        """1 + how many tokens are likelier than each position's own."""
        rows = max(1, _RANK_NUMBERS // self.vocab_size)
        for states, own in zip(hidden.split(rows), target_ids.split(rows), strict=True):
            logits = self.head.logits(states)
            yield from (1 + (logits > logits.gather(1, own[:, None])).sum(-1)).tolist()

    def generate(
        self, prompts: Sequence[Sequence[int]], how: Decoding, *, max_rows: int = 256, dropped: Callable[[], bool]
    ) -> list[list[Written]]:
        """``how.n`` completions per prompt. ``dropped``: asked after every token; raises Dropped once it says so.

        A completion's randomness derives from the seed, its prompt's place and its number among the prompt's.
        """
        test = self._worker_text.stop_test(how.stop)

        def ends(ids: Sequence[int]) -> bool:
            if dropped():
                raise Dropped
            return test is not None and test(ids)

        sampler = LocalSampler(self._model, stop_ids=how.stop_ids, ends=ends)
        sampling = SamplingConfig(
            group_size=how.n,
            max_completion_tokens=how.max_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            max_batch_rows=max_rows,
        )
        numbered = [Prompt(index=i, prompt_ids=ids, text="") for i, ids in enumerate(prompts)]
        groups = sampler.sample(numbered, sampling, seed=how.seed)
        return [[Written(r.completion_ids, r.finish_reason) for r in group] for group in groups]


_TEACHER_KIND: dict[WorkKind, ScoreKind] = {
    "sampled": "sampled",
    "topk": "topk",
    "chosen": "hidden",
    "hidden": "hidden",
    "ranked": "hidden",
}


def fingerprint(model: nn.Module, vocab_size: int) -> str:
    """A hash (hex) of the weights in the precision they are loaded in, and of how many ids count: what scores are a
    function of."""
    digest = hashlib.sha256(f"{vocab_size}\n".encode())
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.numel() and (tensor.data_ptr(), tensor.shape) in seen:
            continue  # tied
        seen.add((tensor.data_ptr(), tensor.shape))
        _add(digest, name, tensor)
    return digest.hexdigest()


def head_hash(head: LMHead) -> str:
    """A hash (hex) of everything that turns hidden states into logits."""
    digest = hashlib.sha256(f"{head.softcap} {head.scale} {head.vocab_size}\n".encode())
    _add(digest, "weight", head.weight[: head.vocab_size])
    if head.bias is not None:
        _add(digest, "bias", head.bias[: head.vocab_size])
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

"""vLLM and SGLang as their replies look, over a small distribution that is written out. ``tamper`` changes a reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fake_server import Answer, Asked

VOCABULARY = 20
LETTERS = "abcdefghijklmnopqrst"


class LetterTokenizer:
    """Token i is the i-th letter."""

    def __init__(self, letters: str = LETTERS) -> None:
        self.letters = letters

    def __len__(self) -> int:
        return len(self.letters)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.letters[i] for i in ids)


def distributions(ids: Sequence[int], seed: int = 0) -> np.ndarray:
    """Log-probabilities of every token after each prefix [L, V]; entry i predicts ``ids[i + 1]``."""
    logits = np.stack(
        [np.random.default_rng([seed, *ids[: i + 1]]).normal(size=VOCABULARY) * 2 for i in range(len(ids))]
    )
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def expected_logprobs(prompt_ids: Sequence[int], completion_ids: Sequence[int], seed: int = 0) -> list[float]:
    """What a teacher should say of a completion [T]."""
    table = distributions([*prompt_ids, *completion_ids], seed)
    return [float(table[len(prompt_ids) - 1 + t, token]) for t, token in enumerate(completion_ids)]


def expected_topk(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], k: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Its alternatives: ids [T, k] and log-probabilities [T, k], best first."""
    table = distributions([*prompt_ids, *completion_ids])[len(prompt_ids) - 1 : -1]
    ids = np.argsort(-table, axis=-1, kind="stable")[:, :k]
    return ids.tolist(), np.take_along_axis(table, ids, axis=-1).tolist()


def _detokenized(asked: Asked, key: str, letters: str) -> Answer:
    tokens = asked.body["tokens"]
    if max(tokens) >= len(letters):
        return Answer({"error": {"message": "token id out of range"}}, 400)
    return Answer({key: LetterTokenizer(letters).decode(tokens)})


class FakeVllm:
    """The routes a teacher uses. ``models``: the entries of /v1/models; ``letters``: what the ids mean."""

    def __init__(
        self,
        *,
        tamper: Callable[[dict[str, Any]], object] = lambda reply: None,
        models: list[dict[str, Any]] | None = None,
        letters: str | None = LETTERS,
        max_logprobs: int = 20,
        seed: int = 0,
    ) -> None:
        self.models = [{"id": "m", "object": "model", "root": "/m", "max_model_len": 64}] if models is None else models
        self.tamper, self.letters, self.max_logprobs, self.seed = tamper, letters, max_logprobs, seed

    def __call__(self, asked: Asked) -> Answer:
        if asked.path == "/v1/models":
            return Answer({"object": "list", "data": self.models})
        if asked.path == "/detokenize" and self.letters is not None:
            return _detokenized(asked, "prompt", self.letters)
        if asked.path == "/v1/completions":
            return self._completions(asked.body)
        return Answer({"detail": "Not Found"}, 404)

    def _completions(self, body: dict[str, Any]) -> Answer:
        if body["max_tokens"] < 1:
            return Answer({"error": {"message": "max_tokens must be at least 1"}}, 400)
        if body["prompt_logprobs"] > self.max_logprobs:
            message = f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater than max allowed"
            return Answer({"error": {"message": message, "code": 400}}, 400)
        choices = [
            {
                "index": i,
                "text": "a",
                "finish_reason": "length",
                "prompt_logprobs": self._rows(ids, body["prompt_logprobs"]),
                "prompt_token_ids": ids,
                "token_ids": [0],
            }
            for i, ids in enumerate(body["prompt"])
        ]
        reply = {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices}
        self.tamper(reply)
        return Answer(reply)

    def _rows(self, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        """null first; then the k best and the token itself, best first."""
        rows: list[dict[str, Any] | None] = [None]
        for table, token in zip(distributions(ids, self.seed), ids[1:], strict=False):
            order = np.argsort(-table, kind="stable").tolist()
            shown = [token, *[i for i in order[:k] if i != token]]
            rows.append(
                {
                    str(i): {"logprob": float(table[i]), "rank": order.index(i) + 1, "decoded_token": LETTERS[i]}
                    for i in shown
                }
            )
        return rows


class FakeSglang:
    """The routes a teacher uses; replies as tests/served/contracts/sglang.json has them."""

    def __init__(
        self,
        *,
        tamper: Callable[[list[dict[str, Any]]], object] = lambda reply: None,
        letters: str | None = LETTERS,
        old: bool = False,
        weight_version: str = "default",
        context: int = 64,
        server_info: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.tamper, self.letters, self.old, self.context, self.seed = tamper, letters, old, context, seed
        self.model_info = {"model_path": "/m", "is_generation": True, "weight_version": weight_version}
        self.server_info = {"max_req_input_len": context - 6} if server_info is None else server_info

    def __call__(self, asked: Asked) -> Answer:
        if asked.path == ("/get_model_info" if self.old else "/model_info"):
            return Answer(self.model_info)
        if asked.path == "/server_info" and self.server_info:
            return Answer(self.server_info)
        if asked.path == "/v1/models":
            return Answer({"object": "list", "data": [{"id": "m", "root": "m", "max_model_len": self.context}]})
        if asked.path == "/detokenize" and self.letters is not None:
            assert asked.body["skip_special_tokens"] is False
            return _detokenized(asked, "text", self.letters)
        if asked.path == "/generate":
            return self._generate(asked.body)
        return Answer({"detail": "Not Found"}, 404)

    def _generate(self, body: dict[str, Any]) -> Answer:
        starts = body["logprob_start_len"]
        if any(len(ids) >= self.context - 6 for ids in body["input_ids"]):
            return Answer({"error": {"message": "Input length exceeds the maximum allowed length"}}, 400)
        reply = [
            self._one(ids, start, body["top_logprobs_num"], body["return_prompt_token_ids"] and not self.old)
            for ids, start in zip(body["input_ids"], starts, strict=True)
        ]
        self.tamper(reply)
        return Answer(reply)

    def _one(self, ids: list[int], start: int, k: int, echo: bool) -> dict[str, Any]:
        table = distributions(ids, self.seed)
        shown = [0 if i >= VOCABULARY - 1 else i for i in ids]  # as SGLang does
        values = [None, *(float(table[i - 1, ids[i]]) for i in range(start + 1, len(ids)))]
        meta: dict[str, Any] = {
            "id": "x",
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(ids),
            "weight_version": self.model_info["weight_version"],
            "input_token_logprobs": [[value, i, None] for value, i in zip(values, shown[start:], strict=True)],
            "output_token_logprobs": [],
            "completion_tokens": 0,
            "cached_tokens": 0,
        }
        if k:
            order = np.argsort(-table, axis=-1, kind="stable")[:, :k].tolist()
            tops = [[[float(table[i, j]), j, None] for j in order[i]] for i in range(start, len(ids) - 1)]
            meta["input_top_logprobs"] = [None, *tops]
            meta["output_top_logprobs"] = []
        return {"text": "", "output_ids": [], "meta_info": meta} | ({"prompt_token_ids": ids} if echo else {})

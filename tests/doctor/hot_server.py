"""A server that writes at the temperature it is asked for, and marks prompts at another one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from cases import on_cpu

from understudy.backends.local import LocalSampler, LocalTeacher
from understudy.config import SamplingConfig
from understudy.types import Prompt, TokenSequence, TopkScores

sys.path.append(str(Path(__file__).resolve().parents[1] / "served"))
from fake_server import Answer, Asked, FakeServer


class Hot(FakeServer):
    """vLLM's routes over the model in ``folder``; ``temperature``: of its marks."""

    def __init__(self, folder: Path, temperature: float) -> None:
        super().__init__(self._answer)
        self.temperature = temperature
        self._model = on_cpu(folder)

    def _answer(self, asked: Asked) -> Answer:
        if asked.path == "/v1/models":
            return Answer({"data": [{"id": "m", "max_model_len": 256}]})
        if asked.path == "/v1/completions" and "prompt_logprobs" in asked.body:
            body = asked.body
            choices = [
                {"index": i, "prompt_token_ids": ids, "prompt_logprobs": self._marks(ids, body["prompt_logprobs"])}
                for i, ids in enumerate(body["prompt"])
            ]
            return Answer({"choices": choices})
        if asked.path == "/v1/completions":
            return Answer({"choices": [self._written(asked.body)]})
        return Answer({"detail": "Not Found"}, 404)

    def _marks(self, ids: list[int], k: int) -> list[Any]:
        teacher = LocalTeacher(self._model, temperature=self.temperature)
        [score] = teacher.score([TokenSequence(ids[:1], ids[1:])], "topk", topk=max(1, k))
        assert isinstance(score, TopkScores)
        rows: list[Any] = [None]
        for token, mark, others, logprobs in zip(
            ids[1:], score.teacher_logprobs, score.ids, score.logprobs, strict=True
        ):
            alternatives = dict(zip(others, logprobs, strict=True)) if k else {}
            rows.append({str(i): {"logprob": value} for i, value in {**alternatives, token: mark}.items()})
        return rows

    def _written(self, body: dict[str, Any]) -> dict[str, Any]:
        sampler = LocalSampler(self._model, stop_ids=frozenset(body.get("stop_token_ids", ())))
        sampling = SamplingConfig(
            group_size=1, temperature=body["temperature"], max_completion_tokens=body["max_tokens"]
        )
        [[rollout]] = sampler.sample([Prompt(0, body["prompt"], "")], sampling, seed=body["seed"])
        return {
            "index": 0,
            "prompt_token_ids": body["prompt"],
            "token_ids": list(rollout.completion_ids),
            "logprobs": {"token_logprobs": list(rollout.sampler_logprobs)},
            "finish_reason": rollout.finish_reason,
        }

"""The routes' handlers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import prometheus_client
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

import understudy
from understudy.serve import binary, completions
from understudy.serve.batcher import (
    Batcher,
    Closed,
    GenerateWork,
    NotFinite,
    QueueFull,
    ScoreWork,
    Work,
    WorkFailed,
)
from understudy.serve.engine import Engine, Scored
from understudy.serve.gate import shutting_down
from understudy.serve.limits import Limits
from understudy.serve.metrics import Metrics
from understudy.serve.openapi import document
from understudy.serve.replies import ApiError, bad_request, from_validation, json_response
from understudy.serve.schemas import (
    CompletionRequest,
    DetokenizeRequest,
    ScoreRequest,
    TokenizeRequest,
)
from understudy.serve.schemas import Request as RequestModel
from understudy.serve.settings import BODY_SECONDS, ServeSettings
from understudy.types import HiddenScores, TokenSequence

R = TypeVar("R", bound=RequestModel)

_CHUNK = 2**20  # bytes of a large reply that are written at once


class Service:
    """One model, its queue, and the handlers that feed it. Tokenising and writing replies happens in other threads, so
    that /health answers at any time."""

    def __init__(self, engine: Engine, settings: ServeSettings, *, token: bool = False) -> None:
        self.engine, self.settings = engine, settings
        self.metrics = Metrics()
        self.limits = Limits(engine, settings)
        self.batcher = Batcher(
            engine,
            self.metrics,
            max_sequences=settings.max_batch_sequences,
            max_queued=settings.max_queued_sequences,
        )
        self.stopping: Callable[[], bool] = lambda: False
        self._started = int(time.time())
        self._document = document(token=token)
        self._head: bytes | None = None
        self._packing = asyncio.Lock()

    async def health(self, request: Request) -> Response:
        if self.stopping():
            return json_response({"status": "shutting down"}, status=503)
        if not self.batcher.alive:
            return json_response({"status": "the model's thread has ended"}, status=503)
        return json_response({"status": "ok"})

    async def metrics_page(self, request: Request) -> Response:
        page = prometheus_client.generate_latest(self.metrics.registry)
        return Response(page, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})

    async def version(self, request: Request) -> Response:
        return json_response({"version": understudy.__version__})

    async def openapi(self, request: Request) -> Response:
        return json_response(self._document)

    async def models(self, request: Request) -> Response:
        entry = {
            "id": self.engine.name,
            "object": "model",
            "created": self._started,
            "owned_by": "understudy",
            "root": self.engine.root,
            "max_model_len": self.engine.context,
            "fingerprint": self.engine.fingerprint,
            "max_logprobs": self.limits.max_logprobs,
            "vocab_size": self.engine.vocab_size,
        }
        return json_response({"object": "list", "data": [entry]})

    async def tokenize(self, request: Request) -> Response:
        asked = await self._read(request, TokenizeRequest)
        special = asked.add_special_tokens is not False
        tokens = await asyncio.to_thread(self.engine.encode, asked.prompt, special=special)
        return json_response({"count": len(tokens), "max_model_len": self.engine.context, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        asked = await self._read(request, DetokenizeRequest)
        self.limits.check_ids(asked.tokens, "tokens")
        return json_response({"prompt": await asyncio.to_thread(self.engine.decode, asked.tokens)})

    async def head(self, request: Request) -> Response:
        etag = f'"{self.engine.head_hash}"'
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers={"ETag": etag})
        async with self._packing:  # once, for all who ask
            if self._head is None:
                self._head = await asyncio.to_thread(binary.pack_head, self.engine.head, self.engine.head_hash)
        return _download(self._head, {"ETag": etag})

    async def score(self, request: Request) -> Response:
        asked = await self._read(request, ScoreRequest)
        k = self._alternatives(asked)
        sequences = [TokenSequence(s.prompt_ids, s.completion_ids) for s in asked.sequences]
        for i, sequence in enumerate(sequences):
            self.limits.check_ids(sequence.prompt_ids, f"sequences.{i}.prompt_ids")
            self.limits.check_ids(sequence.completion_ids, f"sequences.{i}.completion_ids")
            self.limits.check_length(len(sequence.prompt_ids), len(sequence.completion_ids))
        tokens = sum(len(s.prompt_ids) + len(s.completion_ids) for s in sequences)
        self.limits.check_size(len(sequences), tokens, k + 1)
        self._note(request, len(sequences), tokens, asked)
        scores = await self._run(request, ScoreWork(sequences, asked.kind, k, asked.ids))
        digests = [binary.digest(sequence) for sequence in sequences]
        if asked.kind == "hidden":
            return _download(await asyncio.to_thread(self._pack_hidden, scores, digests))
        return await asyncio.to_thread(self._score_reply, scores, digests)

    def _alternatives(self, asked: ScoreRequest) -> int:
        """k, once what belongs to the kind alone is there and fits."""
        if (asked.topk is None) == (asked.kind == "topk"):
            raise bad_request("topk: a number is expected with kind topk, and with no other", param="topk")
        if (asked.ids is None) == (asked.kind == "chosen"):
            raise bad_request("ids: token ids are expected with kind chosen, and with no other", param="ids")
        if asked.ids is None:
            self.limits.check_alternatives(asked.topk or 0, "topk")
            return min(asked.topk or 0, self.engine.vocab_size)
        shape = [len(s.completion_ids) for s in asked.sequences]
        widths = {len(row) for rows in asked.ids for row in rows}
        if [len(rows) for rows in asked.ids] != shape or len(widths) != 1:
            raise bad_request(
                f"ids: got {[len(rows) for rows in asked.ids][:5]} rows (of {sorted(widths)[:5]} ids) for completions "
                f"of {shape[:5]} tokens; expected one row per completion token, and as many ids in every row",
                param="ids",
            )
        self.limits.check_alternatives(max(widths), "ids")
        for rows in asked.ids:
            for row in rows:
                self.limits.check_ids(row, "ids")
        return max(widths)

    def _score_reply(self, scores: Sequence[Scored], digests: Sequence[str]) -> Response:
        rows: list[dict[str, Any]] = []
        for score, digest in zip(scores, digests, strict=True):
            row: dict[str, Any] = {"digest": digest, "logprobs": score.logprobs}
            if score.ids is not None:
                row |= {"ids": score.ids, "topk_logprobs": score.topk_logprobs}
            rows.append(row)
        return json_response({"model": self.engine.name, "fingerprint": self.engine.fingerprint, "scores": rows})

    def _pack_hidden(self, scores: Sequence[Scored], digests: Sequence[str]) -> bytes:
        pairs = [HiddenScores(s.logprobs, s.hidden) for s in scores if s.hidden is not None]
        return binary.pack_hidden(
            pairs, fingerprint=self.engine.fingerprint, head=self.engine.head_hash, digests=digests
        )

    async def complete(self, request: Request) -> Response:
        asked = await self._read(request, CompletionRequest)
        plan = await asyncio.to_thread(completions.plan_of, asked, self.engine, self.limits)
        self._note(request, len(plan.prompts) * plan.decoding.n, plan.tokens, asked)
        writes = plan.decoding.max_tokens > 0
        groups = await self._run(request, GenerateWork(plan.prompts, plan.decoding)) if writes else None
        texts = completions.unscored(plan, groups)
        sequences = completions.to_score(plan, texts)
        if sequences:
            work = ScoreWork(sequences, "ranked", plan.k or 0)
            texts = completions.with_scores(texts, await self._run(request, work, admitted=writes))
        request_id = request.state.noted["request_id"]
        return await asyncio.to_thread(
            lambda: json_response(completions.reply(plan, self.engine, texts, request_id=request_id))
        )

    def _note(self, request: Request, sequences: int, tokens: int, asked: RequestModel) -> None:
        """For the log."""
        request.state.noted.update(sequences=sequences, tokens=tokens)
        if self.settings.log_prompts:
            request.state.noted["request"] = asked.model_dump(mode="json", exclude_defaults=True)

    async def _read(self, request: Request, model: type[R]) -> R:
        """The request's body, checked. Raises ApiError."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # anything else a web page may send without being asked about it first
            raise ApiError(415, f"got content type {kind or 'none'}; expected application/json", code="not_json")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._body(request)
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {BODY_SECONDS:.0f} s", code="body_timeout") from None
        except ClientDisconnect:
            raise _gone() from None
        try:
            asked = model.model_validate_json(body)
        except ValidationError as error:
            raise from_validation(error) from None
        if asked.model not in (None, self.engine.name):
            raise ApiError(
                404,
                f"the model {asked.model!r} is not served here; this server has {self.engine.name!r}",
                param="model",
                code="model_not_found",
            )
        return asked

    async def _body(self, request: Request) -> bytes:
        most = self.settings.max_body_bytes
        too_large = ApiError(413, f"the body is longer than {most} bytes (--max-body-bytes)", code="body_too_large")
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > most:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise too_large
        return bytes(body)

    async def _run(self, request: Request, work: Work, *, admitted: bool = False) -> Any:
        """The work's result; dropped when the client leaves or time is up. Raises ApiError."""
        try:
            future = self.batcher.submit(work, admitted=admitted)
        except QueueFull:
            raise ApiError(
                429,
                f"{self.settings.max_queued_sequences} sequences wait already (--max-queued-sequences); try again soon",
                code="queue_full",
                headers={"Retry-After": "1"},
            ) from None
        except Closed:
            raise shutting_down() from None
        try:
            return await self._result(request, future)
        except Closed:
            raise shutting_down() from None
        except WorkFailed:
            raise ApiError(500, "the model failed at this batch; the server's log says how", code="failed") from None
        except NotFinite as error:
            raise ApiError(
                422,
                f"sequence {error.sequence}, position {error.position}: a score is infinite or not a number",
                code="not_finite",
            ) from None

    async def _result(self, request: Request, future: Future[Any]) -> Any:
        result = asyncio.wrap_future(future)
        gone = asyncio.create_task(_disconnected(request))
        try:
            left = self.settings.request_seconds - (time.perf_counter() - request.state.began)
            await asyncio.wait({result, gone}, timeout=max(0, left), return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                return result.result()
            if gone.done():
                raise _gone()
            raise ApiError(
                503,
                f"not done after {self.settings.request_seconds:g} s (--request-seconds)",
                code="timeout",
                headers={"Retry-After": "1"},
            )
        finally:
            result.cancel()
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _gone() -> ApiError:
    """nginx's number for a client that did not wait; it reaches the log only."""
    return ApiError(499, "the client left", code="client_left")


def _download(data: bytes, headers: dict[str, str] | None = None) -> Response:
    """A file of known length, written as fast as the client reads it."""
    view = memoryview(data)
    chunks = (view[i : i + _CHUNK] for i in range(0, len(view), _CHUNK))
    headers = {"Content-Length": str(len(data))} | (headers or {})
    return StreamingResponse(chunks, headers=headers, media_type="application/octet-stream")

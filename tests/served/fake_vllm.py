"""vLLM's HTTP behaviour over a tiny real model: sampling with a prefix cache, prompt scores, weight updates, adapters.

The process can die, at any request, and come back on the same port with the weights it began with.
"""

from __future__ import annotations

import asyncio
import copy
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import transformers
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transformers import AutoModelForCausalLM, DynamicCache

transformers.utils.logging.disable_progress_bar()

BLOCK = 2  # tokens that the prefix cache keeps together


def load(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


class Engine:
    """What dies with the process."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.model = load(checkpoint)
        self.weight_version = "default"
        self.adapters: dict[str, tuple[str, Any]] = {}
        self.cache: dict[tuple[Any, ...], list[tuple[list[int], Any]]] = {}  # by whose entries they are
        self.running = asyncio.Event()
        self.running.set()
        self.caches = True

    def load_adapter(self, name: str, path: str) -> None:
        from peft import PeftModel

        self.adapters[name] = (path, PeftModel.from_pretrained(load(self.checkpoint), path).eval())

    @torch.no_grad()
    def score(self, model: Any, ids: Sequence[int]) -> list[Any]:
        """prompt_logprobs = 0. Computed from nothing, as vLLM does."""
        table = model(input_ids=torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)
        rows = [{str(i): {"logprob": float(table[t, i]), "rank": 1}} for t, i in enumerate(ids[1:])]
        return [None, *rows]

    @torch.no_grad()
    def write(self, model: Any, owner: tuple[Any, ...], body: dict[str, Any], seed: int, ends: Any) -> dict[str, Any]:
        """One choice. Sampled by inverse CDF from the seed's own generator."""
        prompt: list[int] = body["prompt"]
        generator = torch.Generator().manual_seed(seed)
        cache, known = self._cached(owner, prompt)
        ids, logprobs, new = [], [], prompt[known:]
        reason = "length"
        while len(ids) < body["max_tokens"]:
            output = model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[0, -1].double()
            token = _draw(logits, body, generator)
            ids.append(token)
            logprobs.append(float(logits.log_softmax(-1)[token]))
            new = [token]
            if token in body["stop_token_ids"] or ends(ids):
                reason = "stop"
                break
        self.cache.setdefault(owner, []).append((prompt + ids[:-1], cache))
        return {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}

    def _cached(self, owner: tuple[Any, ...], prompt: list[int]) -> tuple[Any, int]:
        """Keys and values of the longest part of the prompt that is there, whatever weights they are from."""
        best, found = 0, None
        if not self.caches:
            return DynamicCache(), 0
        for ids, cache in self.cache.get(owner, []):
            same = next(
                (i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), min(len(ids), len(prompt))
            )
            same = min(same, len(prompt) - 1) // BLOCK * BLOCK  # the last token has to go through the model
            if same > best:
                best, found = same, cache
        if found is None:
            return DynamicCache(), 0
        own = copy.deepcopy(found)
        own.crop(best - own.get_seq_length())
        return own, best


def _draw(logits: torch.Tensor, body: dict[str, Any], generator: torch.Generator) -> int:
    if allowed := body.get("allowed_token_ids"):
        return allowed[int(logits[allowed].argmax())]
    if body["temperature"] == 0:
        return int(logits.argmax())
    logits = logits / body["temperature"]
    if body["top_k"] > 0:
        logits = logits.masked_fill(logits < logits.topk(body["top_k"]).values[-1], -torch.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


class FakeVllm:
    """``dev``, ``lora``: which routes are there. ``decode`` reads tokens for stop strings.

    ``asked``: (path, body) of every request. ``canned``: what a path answers instead, (status, JSON). ``mangle``
    changes replies to requests for completions. ``at``: called when the nth request to a path arrives, before it is
    looked at. ``keeps_cache``: /reset_prefix_cache does nothing. ``caches``: prefixes are kept; without, a completion's
    last bits do not depend on what was asked before.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        dev: bool = True,
        lora: bool = False,
        name: str = "student",
        max_model_len: int = 64,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self.checkpoint, self.name, self.max_model_len, self.decode = checkpoint, name, max_model_len, decode
        self.asked: list[tuple[str, Any]] = []
        self.canned: dict[str, tuple[int, Any]] = {}
        self.mangle: Callable[[dict[str, Any]], Any] = lambda reply: reply
        self.at: dict[tuple[str, int], Callable[[], None]] = {}
        self.keeps_cache, self.caches = False, True
        self.starts = 0
        self.stays_down = False
        self.port = 0
        self._up = threading.Event()
        routes = [("GET", "/health", self._health), ("GET", "/v1/models", self._models)]
        routes += [("POST", "/v1/completions", self._completions)]
        if dev:
            routes += [("POST", "/pause", self._pause), ("POST", "/resume", self._resume)]
            routes += [("POST", "/collective_rpc", self._rpc), ("POST", "/reset_prefix_cache", self._reset)]
            routes += [("POST", "/update_weight_version", self._relabel), ("GET", "/weight_info", self._label)]
        if lora:
            routes += [("POST", "/v1/load_lora_adapter", self._load), ("POST", "/v1/unload_lora_adapter", self._unload)]
        self._app = Starlette(routes=[Route(path, self._seen(answer), methods=[how]) for how, path, answer in routes])

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._live)
        self._thread.start()
        assert self._up.wait(30)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def paths(self) -> list[str]:
        """All that was asked of it, in order."""
        return [path for path, _ in self.asked]

    def bodies(self, path: str) -> list[Any]:
        return [body for asked, body in self.asked if asked == path]

    def count(self, path: str) -> int:
        return len(self.bodies(path))

    def stop(self) -> None:
        """For good."""
        self.stays_down = True
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self.die)
        self._thread.join()

    def die(self) -> None:
        """Break all connections and end; called in the server's own thread. It comes back unless ``stays_down``."""
        self._up.clear()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()  # pyright: ignore
        self._server.should_exit = self._server.force_exit = True

    def _live(self) -> None:
        while not self.stays_down:
            listening = socket.socket(proto=socket.IPPROTO_TCP)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(("127.0.0.1", self.port))
            self.port = listening.getsockname()[1]
            asyncio.run(self._serve(listening))

    async def _serve(self, listening: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self.engine = Engine(self.checkpoint)
        self.engine.caches = self.caches
        config = uvicorn.Config(self._app, log_config=None, lifespan="off", ws="none", http="h11")
        self._server = uvicorn.Server(config)
        self.starts += 1
        self._loop.call_later(0.02, self._up.set)
        await self._server.serve(sockets=[listening])

    def _seen(self, answer: Callable[[Any], Any]) -> Callable[[Request], Any]:
        async def seen(request: Request) -> Response:
            content = await request.body()
            body = await request.json() if content else dict(request.query_params)
            path = request.url.path
            self.asked.append((path, body))
            self.at.get((path, self.count(path)), lambda: None)()
            if self._server.should_exit:
                await asyncio.sleep(3600)  # it is dead
            if path in self.canned:
                status, reply = self.canned[path]
                return JSONResponse(reply, status)
            return await answer(body)

        return seen

    async def _health(self, body: Any) -> Response:
        return Response()

    async def _models(self, body: Any) -> Response:
        cards = [{"id": self.name, "max_model_len": self.max_model_len, "root": str(self.checkpoint), "parent": None}]
        cards += [{"id": name, "root": path, "parent": self.name} for name, (path, _) in self.engine.adapters.items()]
        return JSONResponse({"object": "list", "data": cards})

    async def _pause(self, body: Any) -> Response:
        assert body["mode"] == "keep"
        self.engine.running.clear()
        return JSONResponse({"status": "paused"})

    async def _resume(self, body: Any) -> Response:
        self.engine.running.set()
        return JSONResponse({"status": "resumed"})

    async def _rpc(self, body: Any) -> Response:
        assert body["method"] == "reload_weights"
        try:
            self.engine.model = load(body["kwargs"]["weights_path"])
        except OSError as error:
            return JSONResponse({"error": {"message": str(error)}}, 500)
        return JSONResponse({"results": [None]})

    async def _reset(self, body: Any) -> Response:
        if not self.keeps_cache:
            self.engine.cache.clear()
        return Response()

    async def _relabel(self, body: Any) -> Response:
        self.engine.weight_version = body["new_version"]
        return JSONResponse({"success": True, "new_version": body["new_version"]})

    async def _label(self, body: Any) -> Response:
        return JSONResponse({"weight_version": self.engine.weight_version})

    async def _load(self, body: Any) -> Response:
        name, path = body["lora_name"], body["lora_path"]
        if not name or not path:
            return _error(400, "Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.engine.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if not Path(path).exists():
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
        try:
            self.engine.load_adapter(name, path)
        except (OSError, ValueError) as error:
            return _error(500, str(error))
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, body: Any) -> Response:
        if self.engine.adapters.pop(body["lora_name"], None) is None:
            return _error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return Response("Success")

    async def _completions(self, body: Any) -> Response:
        engine = self.engine
        await engine.running.wait()
        if body["model"] != self.name and body["model"] not in engine.adapters:
            return _error(404, f"The model `{body['model']}` does not exist.")
        if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            return _error(400, f"This model's maximum context length is {self.max_model_len} tokens.")
        n = body.get("n", 1)
        if n > 1 and body["temperature"] == 0:
            return _error(400, f"n must be 1 when using greedy sampling, got {n}.")
        model = engine.model if body["model"] == self.name else engine.adapters[body["model"]][1]
        owner = (body["model"], body.get("cache_salt"))
        if "prompt_logprobs" in body:
            assert not engine.adapters  # the real one dies of it
            scores = engine.score(model, body["prompt"])
            return JSONResponse({"choices": [{"index": 0, "prompt_logprobs": scores, "finish_reason": "length"}]})
        stop, decode = body.get("stop") or [], self.decode or (lambda ids: "")
        ends = lambda ids: any(text in decode(ids) for text in stop)  # noqa: E731
        body = {"stop_token_ids": [], **body}
        written = [engine.write(model, owner, body, body["seed"] + i, ends) for i in range(n)]
        choices = [{"index": i, "prompt_token_ids": body["prompt"], **choice} for i, choice in enumerate(written)]
        return JSONResponse(self.mangle({"model": body["model"], "choices": choices}))


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "Error", "param": None, "code": status}}, status)

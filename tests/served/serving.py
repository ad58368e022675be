"""A model, an engine over it, and servers: what the tests of ``understudy.serve`` share."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import torch
import uvicorn
from starlette.applications import Starlette

from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import load_model
from understudy.serve.app import create_app
from understudy.serve.engine import Engine
from understudy.serve.settings import ServeSettings
from understudy.tokenization import load_text
from understudy.types import TokenSequence
from user import bpe_tokenizer, save_model

CONTEXT = 128
WIDTH = 320  # rows of the embedding: more than the tokenizer's 300
NAME = "tiny"


def make_checkpoint(folder: Path) -> Path:
    """A random model whose next-token distributions are far from uniform."""
    save_model(folder, bpe_tokenizer(), width=WIDTH, context=CONTEXT)
    model = load_model(str(folder), role="teacher", dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    return folder


def load_engine(folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Engine:
    model = load_model(str(folder), role="teacher", dtype=dtype, device=torch.device("cpu"))
    return Engine(LanguageModel(model.requires_grad_(False)), load_text(str(folder), "teacher"), name=NAME, **options)


@contextlib.contextmanager
def listening(app: Starlette) -> Iterator[str]:
    """The application behind uvicorn in a thread: its address."""
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, http="h11", ws="none", lifespan="on", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
        app.state.service.batcher.close()


@contextlib.contextmanager
def client_of(engine: Engine, *, api_key: str | None = None, **settings: Any) -> Iterator[httpx2.Client]:
    """A client of a server of its own."""
    app = create_app(engine, ServeSettings(**settings), api_key=api_key)
    with listening(app) as url, httpx2.Client(base_url=url, timeout=30) as client:
        yield client


def wait_for(condition: Callable[[], Any], *, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def random_sequences(count: int, *, seed: int = 0, prompts: int = 0) -> list[TokenSequence]:
    """Sequences of several lengths; with ``prompts``, over so many different prompts."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(0, WIDTH, (length,), generator=generator).tolist()

    shared = [ids(20, 30) for _ in range(prompts)]
    return [TokenSequence(shared[i % prompts] if prompts else ids(1, 30), ids(1, 30)) for i in range(count)]


def as_json(sequences: Sequence[TokenSequence]) -> list[dict[str, Any]]:
    return [{"prompt_ids": list(s.prompt_ids), "completion_ids": list(s.completion_ids)} for s in sequences]


@torch.no_grad()
def whole_logprobs(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """[T - 1, V]: the model's own log-softmax at every position but the last, by a plain forward pass."""
    model = load_model(str(folder), role="teacher", dtype=torch.float32, device=torch.device("cpu"))
    return model(torch.tensor([list(ids)])).logits[0, :-1].log_softmax(-1)


def completion_logprobs(folder: Path, sequence: TokenSequence) -> torch.Tensor:
    """[T, V]: the rows that predict the completion's tokens."""
    whole = whole_logprobs(folder, [*sequence.prompt_ids, *sequence.completion_ids])
    return whole[len(sequence.prompt_ids) - 1 :]


def metric(client: httpx2.Client, name: str, **labels: str) -> float:
    from prometheus_client.parser import text_string_to_metric_families

    text = client.get("/metrics").raise_for_status().text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

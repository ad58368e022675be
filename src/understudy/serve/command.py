"""``understudy serve teacher``: load a checkpoint, listen, stop in good order."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import math
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import transformers
import uvicorn

from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import fast_bfloat16, load_model, pick_device
from understudy.config import Dtype
from understudy.errors import ConfigError
from understudy.serve.app import create_app
from understudy.serve.engine import Engine
from understudy.serve.gate import JsonLines
from understudy.serve.settings import ServeSettings
from understudy.tokenization import ModelText, load_text

log = logging.getLogger("understudy.serve")

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
# What a connection may idle for: clients keep theirs between the steps of a run.
_KEEPALIVE_SECONDS = 75
# Beyond the grace period, for a batch that has begun; after that the process leaves it where it is.
_LAST_BATCH_SECONDS = 10.0


@dataclass(frozen=True)
class ServedModel:
    """What is served, and how it is loaded. ``vocab_size``: the ids that count (padding rows beyond them mean nothing);
    None: all. ``max_model_len``: tokens of a sequence; None: the model's context."""

    checkpoint: str
    name: str | None = None
    device: str = "auto"
    dtype: Dtype = "auto"
    vocab_size: int | None = None
    max_model_len: int | None = None
    trust_remote_code: bool = False


def serve(model: ServedModel, settings: ServeSettings, *, host: str, port: int, api_key_env: str | None) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns 0, the exit code.

    Raises ConfigError, before weights are read where that can be known: no token for an address others can reach, an
    address that cannot be had, a model that cannot be loaded.
    """
    is_loopback = _is_loopback(host)
    api_key = _api_key(api_key_env, host, required=not is_loopback)
    with _json_log(), _bound(host, port) as listener:
        # In a thread that ends, and its OpenMP team with it: beside a second team, the one of the thread that scores
        # sleeps at every barrier instead of spinning.
        with ThreadPoolExecutor(1) as loader:
            engine = loader.submit(_load, model, settings).result()
        hosts = (*_LOOPBACK_NAMES, host) if is_loopback and api_key is None else None
        app = create_app(engine, settings, api_key=api_key, hosts=hosts)
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEPALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(settings.grace_seconds),
        )
        server = uvicorn.Server(config)
        app.state.service.stopping = lambda: server.should_exit
        # uvicorn takes these signals while it runs, and raises them again once it has stopped; that must not end the
        # process before this function returns 0.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        address = f"http://{_in_url(host)}:{listener.getsockname()[1]}"
        log.info("listening", extra={"fields": {"event": "listening", "url": address, "model": engine.name}})
        server.run(sockets=[listener])
        ended = app.state.service.batcher.close(timeout=_LAST_BATCH_SECONDS)
        log.info("stopped", extra={"fields": {"event": "stopped"}})
        if not ended:
            # The model's thread is in the middle of a batch. Finishing the interpreter under it can crash.
            sys.stderr.flush()
            os._exit(0)
    return 0


def _load(model: ServedModel, settings: ServeSettings) -> Engine:
    trust = model.trust_remote_code
    text = load_text(model.checkpoint, "teacher", trust_remote_code=trust)
    context = _context(model, text)
    device = pick_device(model.device)
    half = device.type == "cuda" and fast_bfloat16(device)
    name = ("bfloat16" if half else "float32") if model.dtype == "auto" else model.dtype
    log.info("loading", extra={"fields": {"event": "loading", "model": model.checkpoint, "dtype": name}})
    loaded = load_model(
        model.checkpoint, role="teacher", dtype=getattr(torch, name), device=device, trust_remote_code=trust
    )
    rows = loaded.get_output_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    if model.vocab_size is not None and model.vocab_size > rows:
        raise ConfigError(
            "--vocab-size",
            got=str(model.vocab_size),
            expected=f"at most the model's {rows}",
            remedy="leave it out, or give the number of ids that student and teacher share",
        )
    served = LanguageModel(loaded.requires_grad_(False), vocab_size=model.vocab_size)
    return Engine(served, text, name=model.name, context=context, batch_tokens=settings.max_batch_tokens)


def _context(model: ServedModel, text: ModelText) -> int:
    if model.max_model_len is None:
        return text.context_length
    if not 1 <= model.max_model_len <= text.context_length:
        raise ConfigError(
            "--max-model-len",
            got=str(model.max_model_len),
            expected=f"1 to the model's context, {text.context_length}",
            remedy="leave it out",
        )
    return model.max_model_len


def _addresses(host: str) -> list[str]:
    try:
        return [str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--host {host}",
            got=str(error),
            expected="a name or address of this machine",
            remedy="--host 127.0.0.1 for this machine alone, --host 0.0.0.0 for all its networks",
        ) from None


def _is_loopback(host: str) -> bool:
    """Whether nobody outside this machine can reach it there."""
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in _addresses(host))


def _api_key(variable: str | None, host: str, *, required: bool) -> str | None:
    if variable is None:
        if not required:
            return None
        raise ConfigError(
            "--api-key-env",
            got=f"none, with --host {host}, which other machines can reach",
            expected="the name of an environment variable that holds the token clients must send",
            remedy="export UNDERSTUDY_API_KEY=$(openssl rand -hex 32) and give --api-key-env UNDERSTUDY_API_KEY",
        )
    key = os.environ.get(variable, "")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        got = "a variable that is not set" if variable not in os.environ else "an empty variable"
        raise ConfigError(
            f"--api-key-env {variable}",
            got="a token with spaces, or letters beyond ASCII" if key else got,
            expected="a token of printable ASCII characters, which HTTP headers can carry",
            remedy=f"export {variable}=$(openssl rand -hex 32)",
        )
    return key


def _bound(host: str, port: int) -> socket.socket:
    """A socket bound to the address, which is thus known to be free before weights are read; it does not listen yet, so
    that nobody waits for a server that is still loading."""
    if not 0 <= port < 2**16:  # getaddrinfo would take it modulo 65536
        raise ConfigError("--port", got=str(port), expected="0 to 65535", remedy="--port 8000")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # Of localhost's two addresses the one that everybody tries.
    family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--host {host} --port {port}",
            got=str(error),
            expected="an address of this machine and a free port",
            remedy="choose another port; 0 takes a free one and logs it",
        ) from None
    return listener


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@contextlib.contextmanager
def _json_log() -> Iterator[None]:
    """All that is logged goes to stderr as JSON lines, what transformers and the warnings module say included."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    before, root.handlers[:] = list(root.handlers), [handler]
    logging.captureWarnings(True)
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()
    try:
        yield
    finally:
        root.handlers[:] = before
        logging.captureWarnings(False)
        transformers.logging.disable_propagation()
        transformers.logging.enable_default_handler()

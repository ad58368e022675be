"""Is there a vLLM server that can write for a run, and be sent its weights? Looked at before the run begins."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from understudy.backends.http import Request, ServerClient
from understudy.backends.served_models import model_cards
from understudy.config_served import SamplerServerConfig
from understudy.errors import ConfigError, ServerError

PATIENCE_SECONDS = 10.0  # before a run begins a server is there, or its address is wrong
NO_ADAPTER = "understudy-asks-for-no-adapter"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


@dataclass(frozen=True)
class Served:
    """What a server said of itself."""

    model: str
    max_model_len: int


@dataclass(frozen=True)
class Wanted:
    """What a server is to be like. ``model``: what it is started with. ``lora_rank``: of the adapters that the trainer
    holds; None: it holds whole weights. ``longest``: tokens of the longest prompt and completion together."""

    config: SamplerServerConfig
    model: str
    lora_rank: int | None
    longest: int = 0


def check_server(client: ServerClient, wanted: Wanted) -> Served:
    """What the server says of itself.

    Raises:
        ConfigError: it cannot be reached, lacks the routes that weights are pushed through, does not serve the model,
            or serves too short a context; with the command that starts one that would do.
    """
    try:
        served = _served(client, wanted)
        _check_routes(client, wanted)
    except ServerError as error:
        raise _unfit(wanted, str(error), "a vLLM server") from None
    if served.max_model_len < wanted.longest:
        expected = f"at least {wanted.longest}, for prompt and completion"
        raise _unfit(wanted, f"max_model_len {served.max_model_len}", expected)
    return served


def check_config(config: SamplerServerConfig, lora_rank: int | None, temperature: float) -> None:
    """Raises ConfigError for what no server could do."""
    held = "full" if lora_rank is None else "lora"
    if config.url is None:
        raise ConfigError(
            "sampler.url", got="nothing", expected="a vLLM server's address", remedy='e.g. "http://127.0.0.1:8000/v1"'
        )
    if config.api not in ("auto", "vllm"):
        raise ConfigError(
            "sampler.api", got=config.api, expected="vllm: others take no weights", remedy='drop it, or set "vllm"'
        )
    if temperature != 1:
        raise ConfigError(
            "sampling.temperature",
            got=f"{temperature:g} with a [sampler]",
            expected="1 in training: vLLM gives log-probabilities at temperature 1 alone",
            remedy="set sampling.temperature = 1, or drop [sampler]",
        )
    if config.push not in ("auto", held):
        student = "whole weights" if lora_rank is None else "adapters ([student.lora])"
        raise ConfigError(
            "sampler.push",
            got=f"{config.push} for a student with {student}",
            expected=held,
            remedy='leave it at "auto"',
        )


def serve_command(wanted: Wanted) -> str:
    """The shell command that starts a server which would do."""
    port = urlsplit(wanted.config.url or "").port
    name = wanted.config.served_model or Path(wanted.model).name
    words = ["vllm serve", shlex.quote(wanted.model), "--served-model-name", shlex.quote(name)]
    words += [f"--port {port}"] if port else []
    words += [f"--max-model-len {wanted.longest}"] if wanted.longest else []
    if wanted.lora_rank is None:
        return " ".join(["VLLM_SERVER_DEV_MODE=1", *words])
    rank = next((rank for rank in RANKS if rank >= (wanted.lora_rank or 0)), wanted.lora_rank)
    return " ".join(["VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", *words, f"--enable-lora --max-lora-rank {rank}"])


def _served(client: ServerClient, wanted: Wanted) -> Served:
    request = Request("GET", "/v1/models", parse=model_cards)
    cards = client.call(request, patience_seconds=_patience(wanted))
    models = {card["id"]: card for card in cards if not card.get("parent")}  # adapters have one
    name = wanted.config.served_model
    if name is None and len(models) == 1:
        name = next(iter(models))
    if name is None or name not in models:
        expected = name or "one model, or one of them in sampler.served_model"
        raise _unfit(wanted, f"models {', '.join(models) or '(none)'}", expected)
    length = models[name].get("max_model_len")
    if not isinstance(length, int):
        raise _unfit(wanted, f"a model {name} without max_model_len", "a vLLM server")
    return Served(name, length)


def _check_routes(client: ServerClient, wanted: Wanted) -> None:
    """Raises ConfigError where weights cannot be pushed; ServerError for other troubles."""
    if wanted.lora_rank is None:
        request = Request("GET", "/weight_info", parse=lambda _: None)
    else:  # a server that takes adapters looks for this one, and says that it is not there
        body = {"lora_name": NO_ADAPTER, "lora_path": f"/{NO_ADAPTER}"}
        request = Request("POST", "/v1/load_lora_adapter", body, parse=lambda _: None)
    try:
        client.call(request, patience_seconds=0 if wanted.lora_rank else _patience(wanted))
    except ServerError as error:
        looked = wanted.lora_rank is not None and f"/{NO_ADAPTER}" in str(error)
        if error.status in (404, 405) and not looked:
            expected = "a vLLM server that takes weights while it runs (0.32 does)"
            raise _unfit(wanted, f"no route {request.path}", expected) from None
        if error.status == 500 and wanted.lora_rank is not None:
            raise _unfit(wanted, str(error), "a vLLM server that takes adapters") from None
        if not looked:
            raise


def _patience(wanted: Wanted) -> float:
    return min(PATIENCE_SECONDS, wanted.config.connection.patience_seconds)


def _unfit(wanted: Wanted, got: str, expected: str) -> ConfigError:
    remedy = f"start it with\n            {serve_command(wanted)}"
    return ConfigError(f"sampler.url {wanted.config.url}", got=got, expected=expected, remedy=remedy)

"""Commands that serve. ``cli`` registers them."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import App, Parameter

from understudy.errors import ConfigError
from understudy.serve.settings import ServeSettings

serve = App(name="serve", help="Serve a model over HTTP.")
_DEFAULTS = ServeSettings()


@serve.command(name="teacher")
def serve_teacher(
    checkpoint: str,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_env: str | None = None,
    served_model_name: str | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    vocab_size: int | None = None,
    max_model_len: int | None = None,
    num_threads: int | None = None,
    trust_remote_code: Annotated[bool, Parameter(negative="")] = False,
    settings: Annotated[ServeSettings, Parameter(name="*", negative="")] = _DEFAULTS,
) -> int:
    """Serve a checkpoint as teacher or sampler: a part of vLLM's routes, scores of chosen tokens, hidden states.

    For machines and architectures without vLLM; docs/serving.md compares. Stops in good order on SIGTERM and Ctrl-C.
    The log goes to stderr, a JSON object per line, without prompts.

    For example:

        understudy serve teacher checkpoints/teacher --port 8001

        understudy serve teacher Qwen/Qwen3-1.7B --host 0.0.0.0 --api-key-env UNDERSTUDY_API_KEY

    Parameters
    ----------
    checkpoint
        A folder written by save_pretrained (adapters among them), or a hub id.
    host
        The address to listen on. One that other machines can reach needs --api-key-env.
    port
        0: any free one; the log says which.
    api_key_env
        The environment variable that holds the token clients must send (Authorization: Bearer ...).
    served_model_name
        What clients call the model; the checkpoint's name as given here by default.
    device
        auto, cpu, mps, cuda or cuda:0.
    dtype
        auto: bfloat16 on a GPU that is fast at it, float32 elsewhere.
    vocab_size
        Ids that count, where the model's embedding is padded further than its students'; all by default.
    max_model_len
        Tokens of a sequence; the model's context by default.
    num_threads
        CPU threads; torch's choice by default.
    trust_remote_code
        Run the Python code that the checkpoint brings along (auto_map), with your rights.
    """
    try:
        import prometheus_client  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import starlette  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import uvicorn  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ConfigError(
            "understudy serve",
            got=f"the package `{error.name}` is not installed",
            expected="starlette, uvicorn and prometheus-client",
            remedy='pip install "understudy[serve]"',
        ) from None
    if num_threads is not None:
        import torch

        torch.set_num_threads(num_threads)
    from understudy.serve.command import ServedModel, serve

    model = ServedModel(checkpoint, served_model_name, device, dtype, vocab_size, max_model_len, trust_remote_code)
    return serve(model, settings, host=host, port=port, api_key_env=api_key_env)

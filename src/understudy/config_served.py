"""The parts of sections that say where a server is and how to treat it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from understudy.config_base import Section, usable_path

WEIGHTS_FOLDER = "sampler_weights"  # in output_dir, where sampler.weights_dir names no other


class ConnectionConfig(Section):
    """How requests are sent."""

    max_concurrency: int = Field(default=32, ge=1)
    """Requests at a time. Halved while the server is overloaded (429, 503, no answer in time), and grown back."""
    request_tokens: int = Field(default=16384, ge=1)
    """Tokens of sequences in one scoring request; a longer sequence has one to itself."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """For one request, from sending it to the reply's last byte."""
    patience_seconds: float = Field(default=600.0, ge=0)
    """How long a server may be away or overloaded before it counts as lost."""


class ServerConfig(Section):
    """Where a server is."""

    url: str | None = Field(default=None, pattern=r"^https?://[^/@?#]+(/[^@?#]*)?$")
    """E.g. "http://127.0.0.1:8000/v1"."""
    served_model: str | None = None
    """The name the server knows the model by. Absent: the only one it serves."""
    api: Literal["auto", "vllm", "sglang", "understudy"] = "auto"
    """What the server speaks; auto: asked of it."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)
    """The environment variable that holds the API key; the key itself is never written anywhere."""
    connection: ConnectionConfig = ConnectionConfig()


class SamplerServerConfig(ServerConfig):
    """A vLLM server that writes the student's completions, and how each update's weights get there."""

    weights_dir: str | None = None
    """Folder through which weights travel: this process writes, the server reads the same path. Absent: one in
    output_dir."""
    push: Literal["auto", "full", "lora"] = "auto"
    """full: all weights, in place of the server's; lora: the adapters, beside its base model. auto: lora for a student
    with adapters, else full."""
    max_mismatch: float = Field(default=0.05, gt=0)
    """Nats. After every push the server's log-probabilities of a few sequences are compared with the trainer's; the run
    refuses to go on where they differ by more than this per token on average."""
    probe_sequences: int = Field(default=8, ge=1)
    """How many sequences are compared."""
    cache: Literal["reset", "salt"] = "reset"
    """What keeps keys and values of older weights out (with push = "full"): the prefix cache is cleared with each push,
    or each version has entries of its own, which also holds for caches outside the server."""

    _usable_weights_dir = field_validator("weights_dir")(usable_path)

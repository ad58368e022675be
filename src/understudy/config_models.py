"""The sections that say which models there are, and how they are loaded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from understudy.config_base import ModelConfig, Section, usable_path
from understudy.config_served import ServerConfig

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


class LoraConfig(Section):
    """Train low-rank adapters instead of all weights (needs the `lora` extra)."""

    rank: int = Field(default=32, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """Adapter outputs are scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Module names to adapt; "all-linear" is every linear layer, MLP included, but the LM head; an untied
    head is adapted where "lm_head" is named."""


class StudentConfig(ModelConfig):
    """The model that writes and learns."""

    dtype: Dtype = "auto"
    """Weights' precision. auto: float32 (one master copy), or bfloat16 under adapters on a GPU; in `eval`: bfloat16 on
    a GPU that is fast at it."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products over float32 weights. bfloat16: samples with a copy that every update refreshes,
    trains under autocast. auto: bfloat16 where the hardware multiplies it, the model is large enough to gain, and a few
    completions show that sampler and trainer agree; else float32."""
    device: str = "auto"
    """auto: cuda, then mps, then cpu."""
    lora: LoraConfig | None = None
    """Absent: full fine-tuning."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more training time."""


class LoadedConfig(ModelConfig):
    """A model that marks, and how it is loaded."""

    model: str
    """Hub id or folder of a causal language model with the student's token-to-id map. With a url only its tokenizer is
    read, and it may be left out: the student's then stands in for it."""
    dtype: Dtype = "auto"
    """auto: the student's dtype for a model of the student's shape (an earlier self); else bfloat16 where the hardware
    is fast at it and its measured error is far below the reverse KL; else float32. In `generate`: bfloat16 on a GPU
    that is fast at it, else float32."""
    device: str = "auto"
    """auto: the student's device."""


class TeacherConfig(ServerConfig, LoadedConfig):
    """The model that marks. It needs only to give log-probabilities of tokens it is handed: in this process, or, with a
    url, on a server."""

    cache: str | None = None
    """A file that keeps this teacher's marks, for runs that ask for the same again; several runs may share it."""
    cache_gib: float = Field(default=10.0, gt=0)
    """How large the file may grow; what has not been used for longest then goes."""
    when_away: Literal["stop", "skip"] = "stop"
    """What a server that is lost (connection.patience_seconds) does: stop the run, its state saved; or leave its rows
    out of the steps until it is back."""

    _usable_cache = field_validator("cache")(usable_path)

"""What a run keeps on disk, beside its metrics."""

from __future__ import annotations

from pydantic import Field

from understudy.config_base import Section


class CheckpointsConfig(Section):
    """Folders that any Hugging Face or PEFT code loads, with optimizer state for --resume."""

    every: int = Field(default=50, ge=1)
    """In optimizer steps; the last step is always kept."""
    keep: int = Field(default=2, ge=1)
    """How many to keep."""
    stop_within_seconds: float = Field(default=25.0, ge=0)
    """How long a run goes on after SIGTERM, the time to save included: a step that ends later is left out, and done
    again on --resume. 0: the step is finished, however long it takes. Clusters kill after 30 seconds, by default."""


class RolloutsConfig(Section):
    """Scored rollouts kept on disk for pages."""

    every: int = Field(default=10, ge=1)
    """In optimizer steps; first and last steps always."""
    per_step: int = Field(default=16, ge=0)
    """Rollouts kept per such step."""
    topk: int = Field(default=5, ge=0)
    """The teacher's best alternatives kept per token."""

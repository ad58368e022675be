"""The sections that say what a run leaves behind, and where else its numbers go."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from understudy.config_base import Section

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


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
    """The best alternatives kept per token, the teacher's and the student's."""


class TrackingConfig(Section):
    """Where a run's metrics go besides its folder. Keys and addresses are the trackers' own environment variables'
    business, and are never stored."""

    trackers: tuple[TrackerName, ...] = ()
    """Each needs the extra of its name. One that fails later is dropped with a warning; the run goes on."""
    project: str = Field(default="understudy", min_length=1)
    """Project or experiment that the run is listed in."""
    run_name: str | None = Field(default=None, min_length=1)
    """What it is called there. Absent: output_dir's last part, a pipeline's phase with the pipeline's before it."""
    samples: int = Field(default=2, ge=0)
    """Rollouts sent as text each time that rollouts are kept."""

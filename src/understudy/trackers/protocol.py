"""The interface of experiment trackers, and what one is told of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# A metric that every row has: what is held of it tells which steps are.
ALWAYS = "cost/seconds"


@dataclass(frozen=True)
class TrackedRun:
    """``id`` stays the same when a run goes on; ``goes_on_after`` is the step it then goes on after, None for a new
    run. ``config`` has dotted keys and neither keys nor addresses of servers."""

    id: str
    project: str
    name: str
    folder: Path
    config: Mapping[str, str | int | float | bool]
    goes_on_after: int | None = None


class Tracker(Protocol):
    """One backend, opened for one run. Any method may raise: the run then goes on without it. All calls come from one
    thread, steps in order."""

    last_step: int
    """The newest step whose metrics it holds of this run; -1 for none. It is sent only those of later steps."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a step, whole and once."""
        ...

    def log_text(self, step: int, name: str, text: str) -> None:
        """Text, in Markdown, e.g. rollouts of the policy after ``step`` updates."""
        ...

    def close(self, *, finished: bool) -> None:
        """Hand over what is still underway. ``finished``: all steps are done, else the run may go on later."""
        ...

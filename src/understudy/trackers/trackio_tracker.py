"""trackio: its local database, or the Space or server that TRACKIO_SPACE_ID or TRACKIO_SERVER_URL name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from understudy.trackers.protocol import TrackedRun


def open_run(run: TrackedRun) -> TrackioTracker:
    """Begin the run, or go on with the one of this name."""
    import trackio  # pyright: ignore[reportMissingImports]

    started: Any = trackio.init(
        project=run.project,
        # It knows runs by their names: two of one name would become one.
        name=f"{run.name}-{run.id[:6]}",
        config=dict(run.config),
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    # It found out where the run stands, and has no public name for it.
    return TrackioTracker(trackio, started, started._next_step - 1)


class TrackioTracker:
    """See ``Tracker``."""

    def __init__(self, trackio: Any, run: Any, last_step: int) -> None:
        self._trackio, self._run, self.last_step = trackio, run, last_step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Tracker.log``."""
        self._run.log(dict(metrics), step=step)

    def log_text(self, step: int, name: str, text: str) -> None:
        """See ``Tracker.log_text``."""
        self._run.log({name: self._trackio.Markdown(text)}, step=step)

    def close(self, *, finished: bool) -> None:
        """See ``Tracker.close``."""
        self._run.finish()

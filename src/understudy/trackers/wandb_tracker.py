"""Weights & Biases. WANDB_API_KEY, WANDB_ENTITY, WANDB_MODE and its other variables are read by its library alone."""

from __future__ import annotations

import html
import logging
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from understudy.trackers.protocol import TrackedRun

# Its own process writes what it was sent every 15 seconds, and loses the rest when the run is killed.
FLUSHED_SECONDS = 60.0

log = logging.getLogger("understudy")


def open_run(run: TrackedRun) -> WandbTracker:
    """Begin the run, or go on with it, under its id; files lie in ``<output_dir>/wandb``."""
    import wandb  # pyright: ignore[reportMissingImports]

    # Silent from the start: without a key it would else ask for one on the terminal, in the middle of the run.
    wandb.setup(settings=wandb.Settings(silent=True))
    settings = wandb.Settings(
        # The live view has the terminal; what is printed there is in nobody's interest.
        console="off",
        silent=True,
        # What this machine, its repository and its command line look like is not part of a run's numbers.
        disable_git=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
        init_timeout=60,
    )
    started = wandb.init(
        project=run.project,
        name=run.name,
        id=run.id,
        dir=str(run.folder.absolute()),  # its own process may work elsewhere
        config=dict(run.config),
        resume="allow",
        settings=settings,
    )
    if not started.offline:
        log.info("wandb: %s", started.url)
        return WandbTracker(wandb, started, started.starting_step - 1, None)
    # Offline it knows nothing of an earlier session.
    notes = run.folder / "wandb" / f"offline-{run.id}.step"
    held = notes.read_text() if notes.exists() else ""
    return WandbTracker(wandb, started, int(held) if held.isdigit() else -1, notes)


class WandbTracker:
    """See ``Tracker``. ``notes``: the file that holds the newest step whose metrics are on disk for certain."""

    def __init__(self, wandb: Any, run: Any, last_step: int, notes: Path | None) -> None:
        self._wandb, self._run, self.last_step, self._notes = wandb, run, last_step, notes
        self._underway: deque[tuple[float, int]] = deque()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Tracker.log``."""
        self._run.log(dict(metrics), step=step)
        now = time.monotonic()
        self._underway.append((now, step))
        while self._underway[0][0] < now - FLUSHED_SECONDS:
            self._note(self._underway.popleft()[1])

    def log_text(self, step: int, name: str, text: str) -> None:
        """See ``Tracker.log_text``."""
        # Escaped: what a model wrote is text, whatever it looks like.
        self._run.log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step=step)

    def close(self, *, finished: bool) -> None:
        """See ``Tracker.close``."""
        self._run.finish(exit_code=0 if finished else 1)
        if self._underway:
            self._note(self._underway.pop()[1])

    def _note(self, step: int) -> None:
        if self._notes is not None:
            self._notes.write_text(str(step))

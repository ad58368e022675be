"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from understudy.trackers.protocol import ALWAYS, TrackedRun


def open_run(run: TrackedRun) -> TensorBoardTracker:
    """Begin or go on in ``<output_dir>/tensorboard``."""
    from torch.utils.tensorboard import SummaryWriter

    folder = run.folder / "tensorboard"
    earlier = any(folder.glob("events.*"))
    last_step = -1 if run.goes_on_after is None or not earlier else min(run.goes_on_after, _newest_in(folder))
    # TensorBoard hides what earlier files say of the steps from here on: they are made, or sent, again.
    writer: Any = SummaryWriter(str(folder), purge_step=last_step + 1 if earlier else None, flush_secs=10)
    if last_step < 0:
        rows = "\n".join(f"| {key} | {value} |" for key, value in run.config.items())
        writer.add_text("config", f"| key | value |\n|---|---|\n{rows}", 0)
    return TensorBoardTracker(writer, last_step)


def _newest_in(folder: Path) -> int:
    """The newest step that the event files hold, -1 for none: a run that was killed wrote some of its last steps to
    metrics.jsonl only."""
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    events: Any = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 1})
    events.Reload()
    held = events.Scalars(ALWAYS) if ALWAYS in events.Tags()["scalars"] else []
    return max((event.step for event in held), default=-1)


class TensorBoardTracker:
    """See ``Tracker``."""

    def __init__(self, writer: Any, last_step: int) -> None:
        self._writer, self.last_step = writer, last_step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Tracker.log``."""
        for name, value in metrics.items():
            # What TensorBoard's tags may not hold, it would replace with a message for each.
            self._writer.add_scalar(name.replace("@", "_"), value, step)

    def log_text(self, step: int, name: str, text: str) -> None:
        """See ``Tracker.log_text``."""
        self._writer.add_text(name, text, step)

    def close(self, *, finished: bool) -> None:
        """See ``Tracker.close``."""
        self._writer.close()

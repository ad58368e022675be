"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from understudy.trackers.protocol import TrackedRun


def open_run(run: TrackedRun) -> TensorBoardTracker:
    """Begin or go on in ``<output_dir>/tensorboard``."""
    from torch.utils.tensorboard import SummaryWriter

    folder = run.folder / "tensorboard"
    held = run.goes_on_after is not None and any(folder.glob("events.*"))
    last_step = run.goes_on_after if held and run.goes_on_after is not None else -1
    # TensorBoard hides what earlier files say of the steps from here on: the run makes them again.
    writer: Any = SummaryWriter(str(folder), purge_step=last_step + 1 if held else None, flush_secs=10)
    if not held:
        rows = "\n".join(f"| {key} | {value} |" for key, value in run.config.items())
        writer.add_text("config", f"| key | value |\n|---|---|\n{rows}", 0)
    return TensorBoardTracker(writer, last_step)


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

"""What a long run shows while it works: step, rate, time left, the metrics that matter."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console

from understudy.backends.protocols import Sampler
from understudy.config import SamplingConfig
from understudy.live.frame import View
from understudy.live.lines import StepLines
from understudy.live.screen import LiveView, Stop, can_redraw
from understudy.live.track import Track
from understudy.types import Prompt, Rollout


class StepProgress:
    """A live view on a terminal; elsewhere (logs, pipes) a line every ten seconds and after evaluations.

    ``title`` says what runs where, ``history`` are the rows and ``alarm`` the newest alarm of a run that goes on;
    ``stop`` is the request that a signal makes: on a terminal the view says that it was heard.
    """

    def __init__(
        self,
        name: str,
        *,
        first_step: int,
        num_steps: int,
        quiet: bool = False,
        title: str = "",
        history: Sequence[Mapping[str, Any]] = (),
        alarm: Mapping[str, Any] | None = None,
        stop: Stop | None = None,
    ) -> None:
        console = Console(stderr=True)
        track = Track(title or name, name, num_steps)
        for row in history:
            track = track.with_row(row)
        # The clock of the first step starts here.
        first = track.points[-1].row if track.done == first_step and track.points else {"step": first_step}
        self._track = track.with_row(first, time.monotonic())
        live = not quiet and can_redraw(console)
        self._view = LiveView(console, self._track, View(alarm=alarm), stop) if live else None
        self._lines = None if live or quiet else StepLines(console.file)

    def start(self) -> None:
        """Take the terminal, where there is one. Whoever does must ``close``, whatever happens in between."""
        if self._view is not None:
            self._view.start()

    def update(self, row: Mapping[str, Any]) -> None:
        """Show a step's row of metrics."""
        if self._view is not None:
            self._view.show_row(row)
        elif self._lines is not None:
            self._track = self._track.with_row(row, time.monotonic())
            self._lines.show(self._track)

    def show_alarm(self, alarm: Mapping[str, Any]) -> None:
        """Show a guard's alarm, on a terminal; logs have it as a line of their own."""
        if self._view is not None:
            self._view.show_alarm(alarm)

    def show_sample(self, record: Mapping[str, Any]) -> None:
        """Show a stored rollout, on a terminal."""
        if self._view is not None:
            self._view.show_sample(record)

    def saying(self, note: str) -> AbstractContextManager[None]:
        """Name what goes on inside the block, on a terminal."""
        return nullcontext() if self._view is None else self._view.saying(note)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._view is not None:
            self._view.close()


class ProgressSampler:
    """A sampler that works through its prompts in pieces and shows how far it is: for commands without steps.

    A prompt must not stand twice in what it is given: pieces do not know of each other.
    """

    def __init__(self, sampler: Sampler, name: str, *, num_prompts: int, done: int = 0, quiet: bool = False) -> None:
        self._sampler = sampler
        self._done = done
        self._progress = StepProgress(name, first_step=done, num_steps=num_prompts, quiet=quiet)
        self._progress.start()

    def set_policy_version(self, version: int) -> None:
        """See ``Sampler.set_policy_version``."""
        self._sampler.set_policy_version(version)

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, seed: int) -> list[list[Rollout]]:
        """See ``Sampler.sample``."""
        size = piece_size(sampling)
        groups: list[list[Rollout]] = []
        for start in range(0, len(prompts), size):
            groups += self._sampler.sample(prompts[start : start + size], sampling, seed=seed)
            self._done += len(prompts[start : start + size])
            self._progress.update({"step": self._done})
        return groups

    def close(self) -> None:
        """End the display."""
        self._progress.close()


def piece_size(sampling: SamplingConfig) -> int:
    """Prompts in a piece: two batches, so that prompts of like lengths can decode together."""
    return max(1, 2 * sampling.max_batch_rows // sampling.group_size)

"""`understudy watch`: a run's picture in another shell, until the run ends."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

from rich.console import Console, ConsoleRenderable

from understudy.live.follow import PIPELINE_FILE, Follower, Seen, run_in
from understudy.live.frame import View, alarm_text, frame
from understudy.live.lines import StepLines
from understudy.live.screen import Screen, can_redraw
from understudy.locking import is_held


def watch(folder: Path, console: Console, *, every: float = 1.0) -> None:
    """Show the run in ``folder``, or a pipeline's phases one after the other, until nobody is at work there. A
    terminal gets the live view, anything else a line now and then.

    Raises ConfigError where there is no run.
    """
    run_in(folder)
    show = _Picture(console) if can_redraw(console) else _Lines(console)
    with closing(show):
        while True:
            at_work = is_held(folder)  # before reading: what is written until it lets go is read below
            path = run_in(folder)
            with closing(Follower(path)) as follower:
                seen = follower.look()
                show.update(seen)
                while seen.running and run_in(folder) == path:
                    time.sleep(every)
                    seen = follower.look()
                    show.update(seen)
            if not at_work or not (folder / PIPELINE_FILE).exists():
                return
            time.sleep(every)  # between two phases


class _Picture:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: Seen | None = None
        self._screen: Screen | None = None

    def update(self, seen: Seen) -> None:
        self._seen = seen
        if self._screen is None:
            self._screen = Screen(self._console, self._frame)
            self._screen.start()

    def _frame(self) -> ConsoleRenderable:
        seen = self._seen
        assert seen is not None
        view = View(note=seen.note, sample=seen.sample, alarm=seen.alarm)
        return frame(seen.track, view, self._console)

    def close(self) -> None:
        if self._screen is not None:
            self._screen.close()


class _Lines:
    def __init__(self, console: Console) -> None:
        self._lines = StepLines(console.file)
        self._last: Seen | None = None

    def update(self, seen: Seen) -> None:
        if seen.alarm is not None and (self._last is None or seen.alarm != self._last.alarm):
            self._lines.say(seen.track, alarm_text(seen.alarm))
        if seen.track.points:
            self._lines.show(seen.track, last=not seen.running)
        self._last = seen

    def close(self) -> None:
        if self._last is not None and not self._last.running:
            self._lines.say(self._last.track, self._last.note)

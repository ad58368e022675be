"""A picture that stays in its place in a terminal and is drawn anew while the run works."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Protocol

from rich.console import Console, ConsoleRenderable
from rich.control import Control
from rich.live import Live
from rich.text import Text

from understudy.live.frame import View, frame
from understudy.live.track import Row, Track

# A clock that moves, at a few milliseconds a frame.
FRAMES_PER_SECOND = 1.0


class Stop(Protocol):
    """A signal that has been noticed, and what it is answered with. ``shown``: the answer is not printed, but shown by
    somebody else, in a place where it spoils nothing."""

    requested: bool
    said: str
    shown: bool


def can_redraw(console: Console) -> bool:
    """Whether the console is a terminal whose cursor can be moved (and not a log that is told to keep colours)."""
    return console.is_interactive and not console.is_dumb_terminal and console.file.isatty()


class Screen:
    """Draws what ``draw`` returns until it is closed; the last picture stays. Log lines and prints go above it."""

    def __init__(self, console: Console, draw: Callable[[], ConsoleRenderable]) -> None:
        self._console, self._draw = console, draw
        self._size = console.size
        self._live = Live(
            console=console,
            get_renderable=self._picture,
            refresh_per_second=FRAMES_PER_SECOND,
            # What goes to a file must not be pulled to the terminal.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
            vertical_overflow="crop",
        )
        self._moved: list[tuple[logging.StreamHandler[Any], Any]] = []

    def start(self) -> None:
        """Take the terminal."""
        before = sys.stderr
        self._live.start()
        for handler in logging.getLogger().handlers:
            # Log lines would otherwise be written into the picture: the handler holds the stream that was there first.
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                self._moved.append((handler, handler.setStream(sys.stderr)))

    def close(self) -> None:
        """Give the terminal back with its cursor, the last picture on it."""
        for handler, stream in self._moved:
            handler.setStream(stream)
        self._moved = []
        with suppress(OSError):  # the terminal is gone: nothing is left to be put right
            self._live.stop()

    def _picture(self) -> ConsoleRenderable:
        if self._console.size != self._size:
            # Terminals break the old picture's lines in ways of their own; what is above it scrolls away.
            self._size = self._console.size
            self._console.control(Control.clear(), Control.home())
        try:
            return self._draw()
        except Exception as error:  # shown in its place: a picture is no reason to end a run of many hours
            return Text(f"the view failed ({type(error).__name__}: {error}); the run goes on", style="red")


class LiveView:
    """A run's picture in this process. ``tell`` and the ``show_`` methods cost an assignment; a thread draws."""

    def __init__(self, console: Console, track: Track, view: View, stop: Stop | None = None) -> None:
        self._console, self._track, self._view, self._stop = console, track, view, stop
        self._began = time.monotonic()
        self._screen = Screen(console, self._frame)

    def start(self) -> None:
        """Take the terminal; a signal is then answered in the picture."""
        if self._stop is not None:
            self._stop.shown = True
        self._screen.start()

    def close(self) -> None:
        """Leave the terminal as it was, with the last picture on it."""
        stopped = self._stop is not None and self._stop.requested and self._track.done < self._track.total
        if self._stop is not None:
            self._stop.shown = False
            self._stop = None
        self._view = replace(self._view, note="stopped" if stopped else "")
        self._screen.close()

    def show_row(self, row: Row) -> None:
        """A step's row of metrics."""
        self._track = self._track.with_row(row, time.monotonic())

    def show_alarm(self, alarm: Mapping[str, Any]) -> None:
        """The guards' newest alarm."""
        self._view = replace(self._view, alarm=alarm)

    def show_sample(self, record: Mapping[str, Any]) -> None:
        """The newest stored rollout."""
        self._view = replace(self._view, sample=record)

    @contextmanager
    def saying(self, note: str) -> Iterator[None]:
        """Name what goes on inside the block."""
        self._view = replace(self._view, note=note)
        try:
            yield
        finally:
            self._view = replace(self._view, note="")

    def _frame(self) -> ConsoleRenderable:
        view = replace(self._view, elapsed=time.monotonic() - self._began)
        stop = self._stop
        if stop is not None and stop.requested:
            view = replace(view, note=stop.said)
        return frame(self._track, view, self._console)

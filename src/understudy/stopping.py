"""How a run is asked to stop, and what it may still finish."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

# Of the time until a deadline, what the next save is given: as long as the longest so far, and half as long again.
_SAVE_RESERVE = 1.5


class StopNow(KeyboardInterrupt):
    """The step does not end in time: the run saves its last update and ends. Raised in the main thread, anywhere but
    between an update and its record; code that catches ``Exception`` lets it pass."""


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request to finish the step.

    A second Ctrl-C is a KeyboardInterrupt at once. A second SIGTERM, or the end of ``within_seconds`` after the first,
    is a ``StopNow``. ``within_seconds`` includes the time that saving takes, as far as earlier saves tell; 0: no limit.

    ``said`` is what a signal was answered with. It is printed, but where ``shown`` says that a display shows it: a line
    in the middle of that would spoil it.
    """

    def __init__(self, within_seconds: float = 0.0) -> None:
        self.requested = False
        self.said = ""
        self.shown = False
        self._within = within_seconds
        self._longest_save = 0.0
        self._held = False
        self._overdue = False
        self._waiting = False
        self._timer: threading.Timer | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals inside the block (main thread only; elsewhere signals are left alone)."""
        try:
            previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread
            previous = {}
        try:
            yield self
        finally:
            self.end()
            if self._timer is not None:
                self._timer.cancel()
                self._timer.join()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def hold(self) -> None:
        """From here on the state on disk and in memory is torn: a ``StopNow`` waits for ``release``."""
        self._held = True

    def release(self) -> None:
        """The state is whole again. Raises the ``StopNow`` that waited."""
        self._held = False
        if self._waiting:
            self._waiting = False  # once: what is saved afterwards has nothing to wait for
            raise StopNow

    def end(self) -> None:
        """The run ends in any case: from here on there is nothing to abandon, and no ``StopNow``."""
        self._within, self._overdue, self._waiting = 0.0, True, False

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """A block that is finished once it has begun, for what is written to disk."""
        self.hold()
        yield
        self.release()

    def saved_in(self, seconds: float) -> None:
        """Remember how long a save took: the deadline leaves time for another one."""
        self._longest_save = max(self._longest_save, seconds)

    def _on_signal(self, number: int, frame: object) -> None:
        if not self.requested:
            self.requested = True
            if number == signal.SIGTERM and self._within:
                self._set_deadline()
                self._say(f"stopping: this step is finished, if it ends within {self._within:g} seconds, and saved")
            else:
                self._say("stopping: this step is finished and saved first; Ctrl-C again stops at once")
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._overdue:
            self._overdue = True
            self._say("stopping now: what the unfinished step did is left out, the last update is saved")
            self._waiting = self._held
            if not self._held:
                raise StopNow

    def _say(self, text: str) -> None:
        self.said = text
        if not self.shown:
            # Not print: a handler may run in the middle of another write to the same stream.
            os.write(2, f"\n{text}\n".encode())

    def _set_deadline(self) -> None:
        seconds = max(0.0, self._within - _SAVE_RESERVE * self._longest_save)
        self._timer = threading.Timer(seconds, _signal_main_thread)
        self._timer.daemon = True
        self._timer.start()


def _signal_main_thread() -> None:
    """What the deadline does: a signal, unlike a flag, also ends what waits for a server, a lock, a sleep."""
    identity = threading.main_thread().ident
    assert identity is not None
    signal.pthread_kill(identity, signal.SIGTERM)

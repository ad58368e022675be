"""A run in a log: a line every ten seconds, after evaluations, and after the last step."""

from __future__ import annotations

import time
from typing import IO

from understudy.live.track import KL, LENGTH, LOSS, REWARD, Row, Track, evaluations, pace, seconds_left

SECONDS_BETWEEN = 10.0
_FORMS = ((KL, "reverse KL {:.3f}"), (REWARD, "reward {:.3f}"), (LOSS, "loss {:.3f}"), (LENGTH, "length {:.0f}"))


class StepLines:
    """Prints to ``file`` when there is news."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._time = time.monotonic()
        self._shown: tuple[str, int, int] | None = None

    def show(self, track: Track, *, last: bool = False) -> None:
        """The newest row, where a line is due."""
        row, now = track.points[-1].row, time.monotonic()
        news = any(key.startswith("eval/") for key in row) or last or track.done == track.total
        due = now - self._time > SECONDS_BETWEEN or news
        # The same row may be looked at again and again, and again with its evaluation.
        seen = (track.title, track.done, len(row))
        if due and seen != self._shown:
            self._time, self._shown = now, seen
            print(line_of(track), file=self._file, flush=True)

    def say(self, track: Track, note: str) -> None:
        """A line of its own."""
        print(f"{track.title} step {track.done}/{track.total}: {note}", file=self._file, flush=True)


def line_of(track: Track) -> str:
    """One row of a run as text."""
    known = pace(track)
    left = seconds_left(track, known)
    rate = f", {left:.0f} s left" if left is not None else ""
    rate += f", {known.tokens:,.0f} tokens/s" if known is not None and known.tokens is not None else ""
    return f"{track.title} step {track.done}/{track.total}{rate}  {summary(track.points[-1].row)}"


def summary(row: Row) -> str:
    """The few numbers of a row that tell how a run goes."""
    parts = []
    for metric, form in _FORMS:
        known = [row[key] for key in metric.keys if key in row]
        parts += [form.format(known[0])] if known else []
    return "  ".join(parts + [f"{name} {value:.3f}" for name, value in evaluations(row).items()])

"""What experiments show while they run: parts done, time left, and the newest line of every running part."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

EVERY = 30.0
"""Seconds between lines where there is no terminal."""


class Board:
    """A live table on a terminal; elsewhere lines. ``parts``: how many each claim has."""

    def __init__(self, parts: Mapping[str, int]) -> None:
        self._parts, self._seconds = parts, {name: list[float]() for name in parts}
        self._start = time.monotonic()
        self._last_line = 0.0
        console = Console(stderr=True)
        self._live = Live(console=console, refresh_per_second=2) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def done(self, claim: str, seconds: float) -> None:
        """A part of ``claim`` took ``seconds`` (next to nothing where it was in the cache)."""
        self._seconds[claim].append(seconds)
        self._last_line = 0.0

    def header(self, slots: int) -> str:
        """Parts done and the time left, as long as parts of a claim take what its others took."""
        done, total = sum(map(len, self._seconds.values())), sum(self._parts.values())
        spent = [seconds for claim in self._seconds.values() for seconds in claim]
        overall = sum(spent) / len(spent) if spent else 0.0
        left = 0.0
        for claim, seconds in self._seconds.items():
            mean = sum(seconds) / len(seconds) if seconds else overall
            left += mean * (self._parts[claim] - len(seconds))
        time_left = f"about {left / max(1, slots) / 60:.0f} min left" if spent else "estimating the time left"
        return f"experiments: {done} of {total} parts, {(time.monotonic() - self._start) / 60:.0f} min, {time_left}"

    def show(self, running: Sequence[tuple[str, Path, float]]) -> None:
        """``running``: (name, log, start) of each part."""
        if self._live is None and time.monotonic() - self._last_line < EVERY:
            return
        header = self.header(len(running))
        rows = [(name, f"{time.monotonic() - start:.0f} s", newest_line(log)) for name, log, start in running]
        if self._live:
            table = Table(box=None, pad_edge=False, show_header=False)
            for row in rows:
                table.add_row(*row)
            self._live.update(Group(Text(header, style="bold"), table))
            return
        self._last_line = time.monotonic()
        lines = [header, *(f"  {name:<34} {seconds:>6}  {line}" for name, seconds, line in rows)]
        print("\n".join(lines), file=sys.stderr, flush=True)


def newest_line(log: Path) -> str:
    """The last line of a log that says something, cut to a screen's width."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "")[:110]

"""A run seen from outside: its folder is read while another process writes it. Needs neither torch nor its code."""

from __future__ import annotations

import json
import os
import re
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from understudy.errors import ConfigError
from understudy.live.track import MATTERS, Track
from understudy.locking import is_held

PIPELINE_FILE = "pipeline.json"
# The last file of commands that have no steps to count.
_RESULTS = {"generate": "samples.jsonl", "eval": "evaluation.json"}


class AddedLines:
    """JSON objects as they are added to a file, one per line. A line that is only half there waits for its rest; one
    that cannot be read is counted in ``broken``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Held open: the number of a replaced file is not given to another one while somebody reads it.
        self._file: IO[bytes] | None = None
        self._offset = 0
        self.broken = 0

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """New objects, and whether the file was replaced or cut, so that they are all there are."""
        anew = self._open()
        if self._file is None:
            return [], anew
        self._file.seek(self._offset)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        found = [self._parsed(line) for line in data[:whole].split(b"\n") if line.strip()]
        return [row for row in found if row is not None], anew

    def _open(self) -> bool:
        """Hold the file that is there now. Whether it is another one, or shorter than what was read."""
        try:
            there = self._path.stat()
        except FileNotFoundError:
            there = None
        held = os.fstat(self._file.fileno()) if self._file else None
        if held and there and held.st_ino == there.st_ino and there.st_size >= self._offset:
            return False
        self.close()
        self._offset = self.broken = 0
        if there is not None:
            self._file = self._path.open("rb")
        return True

    def _parsed(self, line: bytes) -> dict[str, Any] | None:
        try:
            row = json.loads(line)
        except ValueError:  # what is not UTF-8 among them
            row = None
        if not isinstance(row, dict):
            self.broken += 1
            return None
        return row

    def close(self) -> None:
        """Let the file go."""
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(frozen=True)
class Seen:
    """A run as it stands. ``running``: somebody is at work there; ``sample``: a rollout of the newest stored step;
    ``alarm``: the guards' newest; ``broken``: lines that could not be read; ``missing``: the file that the command ends
    with, as long as it is not there."""

    track: Track
    running: bool
    sample: Mapping[str, Any] | None = None
    alarm: Mapping[str, Any] | None = None
    broken: int = 0
    missing: str = ""

    @property
    def note(self) -> str:
        """What there is to say besides the numbers."""
        broken = f"{self.broken} unreadable lines left out" if self.broken else ""
        if self.running:
            state = "" if self.track.points or not self.track.total else "starting"
        elif self.missing:
            state = f"stopped before {self.missing} was whole"
        elif not self.track.method:  # nothing says what was to be done
            state = "not running"
        elif self.track.done >= self.track.total:
            state = "finished"
        else:
            state = f"stopped after step {self.track.done}; --resume goes on"
        return ", ".join(part for part in (state, broken) if part)


class Follower:
    """Reads what was added to a run's folder since it last looked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows = AddedLines(folder / "metrics.jsonl")
        self._alarms = AddedLines(folder / "guards.jsonl")
        self._seen = Seen(Track(title_of(folder, ""), "", 0), running=True)
        self._sample_file: Path | None = None
        self._config_time = 0.0
        self._looked = False

    def look(self) -> Seen:
        """How the run stands now."""
        # First of all: what a run wrote before it let go is then read below.
        running = is_held(self.folder)
        track, now = self._described(self._seen.track), time.monotonic()
        rows, anew = self._rows.read()
        first_look, self._looked = not self._looked, True
        # Rows that are read once more came when they came.
        stamps = {point.row["step"]: point.at for point in track.points} if anew else {}
        track = replace(track, points=()) if anew else track
        for row in rows:
            if isinstance(row.get("step"), int):
                at = now if row is rows[-1] else stamps.get(row["step"], now)
                track = track.with_row(row, None if first_look else at)
        broken = self._rows.broken + self._alarms.broken
        result = _RESULTS.get(track.method, "")
        missing = "" if (self.folder / result).exists() else result
        self._seen = Seen(track, running, self._sample(), self._alarm(), broken, missing)
        return self._seen

    def close(self) -> None:
        """Let the files go."""
        self._rows.close()
        self._alarms.close()

    def _described(self, track: Track) -> Track:
        """The method and the number of steps, from the configuration as it is now: --resume may change it."""
        path = self.folder / "config.toml"
        try:
            changed = path.stat().st_mtime
            if changed == self._config_time:
                return track
            text = path.read_text(encoding="utf-8")
            config = tomllib.loads(text)
        except (OSError, tomllib.TOMLDecodeError):  # not written yet
            return track
        self._config_time = changed
        header = re.match(r"# understudy (\w+), resolved", text)
        method = header[1] if header else ""
        total = int(config.get("optim", {}).get("num_steps", 0)) if method in MATTERS else 0
        return replace(track, title=title_of(self.folder, method), method=method, total=total)

    def _sample(self) -> Mapping[str, Any] | None:
        """The first rollout of the newest stored step."""
        newest = max((self.folder / "rollouts").glob("step_*.jsonl"), default=None)
        if newest is None or newest == self._sample_file:
            return self._seen.sample
        lines = AddedLines(newest)
        records, _ = lines.read()
        lines.close()
        self._sample_file = newest
        return records[0] if records else None

    def _alarm(self) -> Mapping[str, Any] | None:
        """The newest one. A run that goes on forgets those of the steps that it repeats."""
        alarms, anew = self._alarms.read()
        known = None if anew else self._seen.alarm
        return alarms[-1] if alarms else known


def title_of(folder: Path, method: str) -> str:
    """``distill  runs/first``; of a pipeline's phase its number and name too."""
    parts = [method, _shown(folder)]
    number = re.match(r"(\d+)-", folder.name)
    total = _phases_of(folder.parent)
    if number and total:
        parts.insert(0, f"phase {int(number[1])} of {total}:")
    return "  ".join(part for part in parts if part)


def _shown(folder: Path) -> str:
    absolute, here = folder.absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(folder)


def _phases_of(folder: Path) -> int:
    """How many runs a pipeline's plan has; 0 where there is no pipeline."""
    try:
        plan = json.loads((folder / PIPELINE_FILE).read_text(encoding="utf-8"))["plan"]
        once = sum(bool(phase["once"]) for phase in plan["phases"])
        return len(plan["phases"]) + (plan["cycles"] - 1) * (len(plan["phases"]) - once)
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def run_in(folder: Path) -> Path:
    """``folder`` itself, or the newest phase of the pipeline there.

    Raises ConfigError where neither is.
    """
    if (folder / PIPELINE_FILE).exists():
        phases = sorted(path for path in folder.glob("[0-9]*-*") if path.is_dir())
        return phases[-1] if phases else folder
    if not folder.is_dir() or not ((folder / "config.toml").exists() or is_held(folder)):
        raise ConfigError(
            f"run {folder}",
            got="a folder without a run" if folder.is_dir() else "no such folder",
            expected="the output_dir of a run or a pipeline, running or finished",
            remedy=f"check the path (working folder: {Path.cwd()})",
        )
    return folder

"""Several `understudy` commands as processes of their own, a few at a time, watched through their metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from understudy.checkpoints import write_jsonl
from understudy.errors import RunError
from understudy.live.lines import summary
from understudy.metrics import read_metrics


@dataclass(frozen=True)
class Job:
    """One command. ``seconds`` is what it took elsewhere: it weighs the time left, nothing else."""

    name: str
    arguments: Sequence[str]
    folder: Path
    seconds: float
    num_steps: int = 0
    after: Sequence[str] = ()

    @property
    def command(self) -> str:
        """As a person would type it."""
        return " ".join(["understudy", *self.arguments])

    @property
    def rerun_command(self) -> str:
        """The same into a folder of its own."""
        return f"{self.command} --output_dir {self.folder}-again"

    def rows(self) -> list[dict[str, Any]]:
        """Metrics written so far."""
        path = self.folder / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    started: float = field(default_factory=time.monotonic)


def run_jobs(jobs: Sequence[Job], *, logs: Path, title: str, slots: int = 2) -> Mapping[str, float]:
    """Run every job, ``slots`` at a time and after those it names; seconds per job. Raises RunError when one fails."""
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running, seconds = list(jobs), [], {}
    console = Console(stderr=True)
    board = _Board(jobs, title, console)
    try:
        with board:
            while waiting or running:
                for job in [job for job in waiting if set(job.after) <= seconds.keys()][: slots - len(running)]:
                    waiting.remove(job)
                    running.append(_start(job, logs))
                time.sleep(0.2)
                for entry in [entry for entry in running if entry.process.poll() is not None]:
                    running.remove(entry)
                    seconds[entry.job.name] = time.monotonic() - entry.started
                    _check(entry)
                board.show({entry.job.name for entry in running}, seconds)
    finally:
        for entry in running:
            entry.process.kill()
            entry.process.wait()
    return seconds


def _start(job: Job, logs: Path) -> _Running:
    log = logs / f"{job.name.replace(' ', '-')}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "understudy", *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A Ctrl-C in the terminal reaches this process, which ends its children itself.
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    return _Running(job, process, log)


def _check(entry: _Running) -> None:
    if entry.process.returncode:
        tail = "\n".join(entry.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RunError(
            f"`{entry.job.command}` ended with exit code {entry.process.returncode}:\n{tail}\n(log: {entry.log})"
        )


class _Board:
    """A live table on a terminal; elsewhere a line per job every ten seconds and when it ends."""

    def __init__(self, jobs: Sequence[Job], title: str, console: Console) -> None:
        self._jobs, self._title, self._console = jobs, title, console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._start = self._last_line = time.monotonic()
        self._ended: set[str] = set()

    def __enter__(self) -> _Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, running: set[str], seconds: Mapping[str, float]) -> None:
        """Draw the current state."""
        rows = {job.name: job.rows() for job in self._jobs}
        steps = {name: int(own[-1]["step"]) if own else 0 for name, own in rows.items()}
        done = sum(
            job.seconds * (1.0 if job.name in seconds else steps[job.name] / max(1, job.num_steps))
            for job in self._jobs
        )
        share = done / sum(job.seconds for job in self._jobs)
        elapsed = time.monotonic() - self._start
        left = f"about {elapsed * (1 - share) / share:.0f} s left" if share > 0.02 else "estimating the time left"
        header = f"{self._title}: {share:.0%}, {elapsed:.0f} s, {left}"
        if self._live is not None:
            self._live.update(Group(Text(header, style="bold"), self._table(running, seconds, rows, steps)))
            return
        now = time.monotonic()
        newly_ended = seconds.keys() - self._ended
        if newly_ended or now - self._last_line > 10:
            self._last_line = now
            self._ended |= newly_ended
            print(header, file=sys.stderr)
            for job in self._jobs:
                if job.name in running or job.name in newly_ended:
                    state = "done" if job.name in seconds else f"step {steps[job.name]}/{job.num_steps}"
                    print(f"  {job.name:<28} {state:<14} {self._note(rows[job.name])}", file=sys.stderr, flush=True)

    def _table(
        self,
        running: set[str],
        seconds: Mapping[str, float],
        rows: Mapping[str, Sequence[Mapping[str, Any]]],
        steps: Mapping[str, int],
    ) -> Table:
        table = Table(box=None, pad_edge=False)
        for column in ("", "step", "", ""):
            table.add_column(column)
        for job in self._jobs:
            state = "done" if job.name in seconds else "running" if job.name in running else "waiting"
            step = f"{steps[job.name]}/{job.num_steps}" if job.num_steps else ""
            table.add_row(job.name, step, state, self._note(rows[job.name]))
        return table

    @staticmethod
    def _note(rows: Sequence[Mapping[str, Any]]) -> str:
        """The newest numbers, with the newest evaluation even when it is some steps old."""
        if not rows:
            return ""
        evaluated = [row for row in rows if any(key.startswith("eval/") for key in row)]
        evaluation = {k: v for k, v in evaluated[-1].items() if k.startswith("eval/")} if evaluated else {}
        return summary({k: v for k, v in rows[-1].items() if not k.startswith("eval/")} | evaluation)


def new_folder(wanted: Path) -> Path:
    """``wanted``, or ``wanted-2``, ``wanted-3``, ... : a demo never writes over an earlier one."""
    candidate, number = wanted, 2
    while candidate.exists() and any(candidate.iterdir()):
        candidate = wanted.with_name(f"{wanted.name}-{number}")
        number += 1
    candidate.mkdir(parents=True, exist_ok=True)
    return candidate


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as JSONL."""
    write_jsonl(path, rows)


def count_rows(path: Path) -> int:
    """Lines of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return sum(1 for _ in lines)


def with_sampling_cost(rows: Sequence[Mapping[str, Any]], samples: Job, num_steps: int) -> list[dict[str, Any]]:
    """Rows of an ``sft`` run over ``samples``, each with its share of what the teacher's sampling cost."""
    costs = json.loads((samples.folder / "costs.json").read_text(encoding="utf-8"))["roles"]["teacher_sampling"]
    return [
        {**row, **{f"cost/{name}": row[f"cost/{name}"] + costs[name] * row["step"] / num_steps for name in _PRICES}}
        for row in rows
    ]


_PRICES = ("flops", "seconds")

"""What a long run shows while it works: step, rate, time left, the metrics that matter."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from understudy.backends.protocols import Sampler
from understudy.config import SamplingConfig
from understudy.types import Prompt, Rollout

_SHOWN = {
    "reverse_kl/full": "reverse KL {:.3f}",
    "reverse_kl/mean": "reverse KL {:.3f}",
    "reward/mean": "reward {:.3f}",
    "optim/loss": "loss {:.3f}",
    "completion_length/mean": "length {:.0f}",
}


class StepProgress:
    """A live bar on a terminal; elsewhere (logs, pipes) a line every ten seconds and after evaluations."""

    def __init__(self, name: str, *, first_step: int, num_steps: int, quiet: bool = False) -> None:
        self._name, self._first, self._total = name, first_step, num_steps
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._bar = self._make_bar() if self._console.is_terminal and not quiet else None
        self._start = self._last_line = time.monotonic()

    def _make_bar(self) -> Progress:
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        bar = Progress(*columns, console=self._console)
        self._task = bar.add_task(self._name, total=self._total, completed=self._first, note="")
        bar.start()
        return bar

    def update(self, row: Mapping[str, Any]) -> None:
        """Show a step's row of metrics."""
        step = int(row["step"])
        note = summary(row)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
            return
        now = time.monotonic()
        due = now - self._last_line > 10 or step == self._total or any(k.startswith("eval/") for k in row)
        if due and not self._quiet:
            self._last_line = now
            rate = (step - self._first) / max(1e-9, now - self._start)
            left = f", {(self._total - step) / rate:.0f} s left" if rate else ""
            print(f"{self._name} step {step}/{self._total}{left}  {note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


class ProgressSampler:
    """A sampler that works through its prompts in pieces and shows how far it is: for commands without steps.

    A prompt must not stand twice in what it is given: pieces do not know of each other.
    """

    def __init__(self, sampler: Sampler, name: str, *, num_prompts: int, done: int = 0, quiet: bool = False) -> None:
        self._sampler = sampler
        self._done = done
        self._progress = StepProgress(name, first_step=done, num_steps=num_prompts, quiet=quiet)

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


def summary(row: Mapping[str, Any]) -> str:
    """The few numbers of a row that tell how a run goes."""
    parts = []
    for name, form in _SHOWN.items():
        shown = form.format(row[name]) if name in row else ""
        if shown and not any(part.split()[:-1] == shown.split()[:-1] for part in parts):
            parts.append(shown)
    for name, value in row.items():
        if re.fullmatch(r"eval/[^/]+/(greedy|t[\d.e+-]+)", name):  # the means: no errors, shares or details
            parts.append(f"{name.removeprefix('eval/')} {value:.3f}")
    return "  ".join(parts)

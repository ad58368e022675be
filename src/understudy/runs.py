"""A run's folder: who may write in it, what it holds, where an interrupted run goes on.

config.toml  metrics.jsonl  costs.json  rollouts/  checkpoints/  report.html
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import platform
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from understudy.checkpoints import (
    list_checkpoints,
    load_state,
    remove_partial,
    save_checkpoint,
    write_atomic,
    write_json,
)
from understudy.config import RunConfig
from understudy.costs import CostLedger
from understudy.errors import ConfigError
from understudy.metrics import MetricsLog
from understudy.rollout_store import write_rollouts

if TYPE_CHECKING:
    from understudy.backends.protocols import Trainer

# What may change between a run and its continuation: how far, how often, how many. Everything else would silently make
# another experiment of it.
_RESUMABLE = ("optim.num_steps", "checkpoints.", "evaluation.", "rollouts.", "num_threads")


class RunFolder:
    """Exclusive access to ``output_dir``; released when the process ends, however it ends."""

    def __init__(self, config: RunConfig, *, method: str, resume: bool = False) -> None:
        self.path = Path(config.output_dir)
        self._refuse_unless_usable(resume)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        self.method = method
        self.checkpoints_path = self.path / "checkpoints"
        self.config = self._continued(config) if resume else config
        self.metrics = MetricsLog(self.path / "metrics.jsonl")
        remove_partial(self.checkpoints_path)
        whole = list_checkpoints(self.checkpoints_path)
        self.first_step, self.checkpoint = whole[-1] if whole else (0, None)
        self.state = load_state(self.checkpoint) if self.checkpoint else {}
        self.costs = CostLedger.from_json(self.state["costs"]) if self.state else CostLedger()
        self._forget_after(self.first_step)

    def _refuse_unless_usable(self, resume: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(
                f"output_dir {self.path}",
                got="a file",
                expected="a new or empty folder",
                remedy="choose another output_dir",
            )
        held = [p.name for p in self.path.iterdir() if p.name != ".lock"] if self.path.is_dir() else []
        if held and not resume:
            is_run = "config.toml" in held
            raise ConfigError(
                f"output_dir {self.path}",
                got="a run is already there" if is_run else f"a folder with {', '.join(sorted(held)[:4])}",
                expected="a new or empty folder",
                remedy="continue the run with --resume, or choose another output_dir"
                if is_run
                else "choose another output_dir",
            )
        if held and "config.toml" not in held:
            raise ConfigError(
                f"output_dir {self.path}",
                got=f"a folder with {', '.join(sorted(held)[:4])} but no config.toml",
                expected="a run's folder, for --resume",
                remedy="check output_dir",
            )

    def _take_lock(self) -> IO[str]:
        lock = (self.path / ".lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ConfigError(
                f"output_dir {self.path}",
                got="another process is writing there",
                expected="a folder of this run's own",
                remedy="wait for the other run to end, or choose another output_dir",
            ) from None
        return lock

    def close(self) -> None:
        """Let another run in."""
        self._lock.close()

    def _continued(self, config: RunConfig) -> RunConfig:
        """The stored configuration, with what may change taken from the new one."""
        path = self.path / "config.toml"
        if not path.exists():
            return config
        stored = flat(RunConfig.from_toml(path))
        given = flat(config)
        for key in sorted(stored.keys() | given.keys()):
            old, new = stored.get(key), given.get(key)
            # "auto" was resolved when the run began, and stays what it was resolved to.
            if old == new or new == "auto" or key == "output_dir" or key.startswith(_RESUMABLE):
                continue
            raise ConfigError(
                f"--resume in {self.path}: {key}",
                got=repr(new),
                expected=f"{old!r}, as the run began",
                remedy=f"restore {key}, or start a new run in another output_dir",
            )
        overrides = {key: value for key, value in given.items() if key.startswith(_RESUMABLE)}
        kept = {key: value for key, value in stored.items() if not key.startswith(_RESUMABLE)}
        return RunConfig.model_validate(nested(kept | overrides | {"output_dir": config.output_dir}))

    def _forget_after(self, step: int) -> None:
        """Drop what was logged after the checkpoint: it happens again, the same."""
        self.metrics.truncate_after(step if self.checkpoint else -1)
        rollouts = self.path / "rollouts"
        for path in rollouts.glob("step_*.jsonl") if rollouts.is_dir() else []:
            if int(path.stem.removeprefix("step_")) >= step:
                path.unlink()

    def write_config(self, config: RunConfig) -> None:
        """Store the resolved configuration; versions stand in its comments, so that it can be run as it is."""
        self.config = config
        names = ("understudy", "torch", "transformers")
        versions = ", ".join(f"{name} {version(name)}" for name in names)
        header = (
            f"understudy {self.method}, resolved\n{versions}, Python {platform.python_version()}, {platform.platform()}"
        )
        write_atomic(self.path / "config.toml", config.to_toml(header))

    def record(self, step: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """Append a step's metrics with its running costs."""
        full = {"step": step, **row}
        full |= {f"time/{role}": seconds for role, seconds in self.costs.take_seconds().items()}
        full |= {"cost/flops": self.costs.total("flops"), "cost/seconds": self.costs.total("seconds")}
        self.metrics.append(full)
        write_json(self.path / "costs.json", self.costs.to_json())
        return full

    def save_rollouts(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Store one step's rollouts."""
        if records:
            write_rollouts(self.path / "rollouts", step, records)

    def save_checkpoint(self, step: int, trainer: Trainer, tokenizer: Any) -> Path:
        """Write a checkpoint with everything a resumed run needs."""
        extra = {"costs": self.costs.to_json()}
        keep = self.config.checkpoints.keep
        return save_checkpoint(self.checkpoints_path, step, trainer, tokenizer, extra, keep=keep)

    def discard_if_untouched(self) -> None:
        """Remove the folder when preparation failed before anything was written in it."""
        self.close()
        if self.path.is_dir() and {p.name for p in self.path.iterdir()} <= {".lock"}:
            shutil.rmtree(self.path)


def flat(config: RunConfig) -> dict[str, Any]:
    """The tree as dotted keys."""

    def walk(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(json.loads(config.model_dump_json(exclude_none=True)), ""))


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys back to a tree."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a request to finish the step; the second one is immediate."""

    def __init__(self) -> None:
        self.requested = False

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
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

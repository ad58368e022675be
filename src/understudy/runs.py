"""A run's folder: who may write in it, what it holds, where an interrupted run goes on.

config.toml  metrics.jsonl  doctor.jsonl  guards.jsonl  environment.jsonl  costs.json  rollouts/  checkpoints/
report.html
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from understudy.checkpoints import (
    STATE_FILE,
    newest_state,
    remove_partial,
    save_checkpoint,
    set_aside,
    write_atomic,
    write_json,
    writing,
)
from understudy.config import RunConfig
from understudy.config_served import WEIGHTS_FOLDER, ServerConfig
from understudy.costs import CostLedger
from understudy.environment import environment
from understudy.errors import ConfigError, first_line
from understudy.locking import LOCK_FILE, lock_folder
from understudy.metrics import MetricsLog, read_metrics
from understudy.rollout_store import rollouts_path, write_rollouts

if TYPE_CHECKING:
    from understudy.backends.protocols import Trainer

log = logging.getLogger("understudy")

# What may change between a run and its continuation: how far, how often, how many. Everything else would silently make
# another experiment of it.
RESUMABLE = (
    "num_threads",
    "sampling.max_batch_rows",
    "sampling.max_policy_lag",
    "sampling.stale",
    "optim.micro_batch_tokens",
    "optim.num_steps",
    "reward.grader_timeout_seconds",
    "checkpoints",
    "evaluation",
    "rollouts",
    "guards",
    "tracking",
)

# How a server is reached may change too: a run goes on when its teacher has moved.
_OF_SERVERS = (*ServerConfig.model_fields, *("cache", "cache_gib", "when_away"), *("weights_dir", "max_mismatch"))
_ROLE = r"(teacher|reference|sampler|teachers\.[^.]+)"

# Keys whose absence means "auto".
_AUTO_WHEN_ABSENT = ("objective.reward_coef", "sampling.stop_token_ids")


class RunFolder:
    """Exclusive access to ``output_dir`` inside a ``with`` block; released too when the process dies.

    ``first_step``: where to go on. A block that wrote nothing leaves no folder behind.
    """

    def __init__(self, config: RunConfig, *, method: str, resume: bool = False) -> None:
        self.path = Path(config.output_dir)
        self.method = method
        self.checkpoints_path = self.path / "checkpoints"
        self.metrics = MetricsLog(self.path / "metrics.jsonl")
        self.alarms = MetricsLog(self.path / "guards.jsonl")
        # One row, or a few, for each time that the run was begun or gone on with; "step": after which.
        self.starts = tuple(MetricsLog(self.path / f"{name}.jsonl") for name in ("environment", "doctor"))
        try:
            self._refuse_unless_usable(resume)
            self._lock = self._take_lock()
        except OSError as error:
            raise ConfigError(
                f"output_dir {self.path}",
                got=first_line(error),
                expected="a folder that this process can write in",
                remedy="choose another output_dir",
            ) from None
        try:
            self._refuse_unless_usable(resume)  # again: another run may have come and gone before the lock was ours
            self._go_on(config, resume)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the folder when nothing was written in it; let another run in."""
        with self._lock:
            if {path.name for path in self.path.iterdir()} <= {LOCK_FILE}:
                shutil.rmtree(self.path)

    def _go_on(self, config: RunConfig, resume: bool) -> None:
        """Find the last checkpoint that is as it was written, and forget what came after it: it happens again, the
        same."""
        self.first_step, self.checkpoint, self.state, damaged = newest_state(self.checkpoints_path)
        for path, what in damaged.items():
            log.warning("checkpoint %s is damaged (%s): going on after step %d instead", path, what, self.first_step)
        where = f"checkpoint {self.checkpoint}: costs in {STATE_FILE}"
        self.costs = CostLedger.from_json(self.state.get("costs"), where) if self.state else CostLedger()
        self._recorded_costs = copy.deepcopy(self.costs.to_json())
        self.config, planned = self._continued(config) if resume else (config, 0)
        # Whether the last step's checkpoint is there, of a run that was to end there.
        self.trained = self.first_step == self.config.optim.num_steps == planned
        with writing(self.path):
            for path in damaged:
                set_aside(path)
            for folder in (self.path, self.path / "rollouts", self.checkpoints_path):
                remove_partial(folder)
        for rows in (self.metrics, self.alarms):
            rows.truncate_after(self.first_step if self.checkpoint else -1)
        rollouts = self.path / "rollouts"
        for path in rollouts.glob("step_*.jsonl") if rollouts.is_dir() else []:
            # Those of the checkpoint's own step are written in the step after it, but for a finished run's last ones.
            step = path.stem.removeprefix("step_")
            if step.isdecimal() and int(step) >= self.first_step + self.trained:
                path.unlink()

    def holds_rollouts(self, step: int) -> bool:
        """Whether the rollouts of a step are stored."""
        return rollouts_path(self.path / "rollouts", step).exists()

    def _refuse_unless_usable(self, resume: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(
                f"output_dir {self.path}",
                got="a file",
                expected="a new or empty folder",
                remedy="choose another output_dir",
            )
        # A crash before config.toml was whole leaves its half, the lock, and weights for a server: as good as empty.
        held = [p.name for p in self.path.iterdir() if p.name != LOCK_FILE] if self.path.is_dir() else []
        if "config.toml" not in held:
            held = [name for name in held if name != WEIGHTS_FOLDER]
        held = [name for name in held if not name.endswith(".partial")]
        if held and not resume:
            is_run = "config.toml" in held
            resumable = is_run and self.method != "eval"
            raise ConfigError(
                f"output_dir {self.path}",
                got="a run is already there" if is_run else f"a folder with {', '.join(sorted(held)[:4])}",
                expected="a new or empty folder",
                remedy="continue the run with --resume, or choose another output_dir"
                if resumable
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
        try:
            return lock_folder(self.path)
        except BlockingIOError:
            raise ConfigError(
                f"output_dir {self.path}",
                got="another process is writing there",
                expected="a folder of this run's own",
                remedy="wait for the other run to end, or choose another output_dir",
            ) from None

    def _continued(self, config: RunConfig) -> tuple[RunConfig, int]:
        """The stored configuration with what may change taken from the new one, and the stored number of steps."""
        path = self.path / "config.toml"
        if not path.exists():
            return config, 0
        stored = RunConfig.from_toml(path)
        self._refuse_another_run(flat(stored), flat(config))
        changes = {name: getattr(config, name) for name in ("output_dir", *RESUMABLE) if "." not in name}
        for section, key in (name.split(".") for name in RESUMABLE if "." in name):
            part = changes.get(section, getattr(stored, section))
            if part is not None:  # [reward] is, in a run without rewards
                changes[section] = part.model_copy(update={key: getattr(getattr(config, section), key)})
        for role in ("teacher", "reference", "sampler"):
            changes[role] = _moved(getattr(stored, role), getattr(config, role))
        changes["teachers"] = {name: _moved(old, config.teachers[name]) for name, old in stored.teachers.items()}
        return stored.model_copy(update=changes), stored.optim.num_steps

    def _refuse_another_run(self, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        def refuse(what: str, got: object, expected: str, remedy: str) -> None:
            raise ConfigError(f"--resume in {self.path}: {what}", got=str(got), expected=expected, remedy=remedy)

        method = self.state.get("method") or self._stored_method()
        if method != self.method:
            refuse("command", self.method, f"{method}, as the run began", f"use `understudy {method}`")
        for key in sorted(stored.keys() | given.keys()):
            old, new = stored.get(key), given.get(key)
            free = any(key == name or key.startswith(f"{name}.") for name in ("output_dir", *RESUMABLE))
            # But it stays a server, or in this process.
            moved = re.fullmatch(rf"{_ROLE}\.({'|'.join(_OF_SERVERS)})(\..*)?", key)
            free = free or (moved is not None and not (moved[2] == "url" and None in (old, new)))
            # "auto" was resolved when the run began, and stays what it was resolved to.
            auto = new == "auto" or (new is None and key in _AUTO_WHEN_ABSENT)
            if old != new and not auto and not free:
                began = "nothing" if old is None else repr(old)
                remedy = f"restore {key}, or start a new run in another output_dir"
                refuse(key, "nothing" if new is None else repr(new), f"{began}, as the run began", remedy)
        if given["optim.num_steps"] < self.first_step:
            refuse(
                "optim.num_steps",
                given["optim.num_steps"],
                f"at least {self.first_step}: so many steps are done",
                "raise it, or drop --resume and choose another output_dir",
            )

    def _stored_method(self) -> str:
        """The command that began the run, as the header of its config.toml has it; else this one."""
        first = (self.path / "config.toml").read_text(encoding="utf-8").partition("\n")[0]
        header = re.fullmatch(r"# understudy (\w+), resolved", first)
        return header[1] if header else self.method

    def write_config(self, config: RunConfig) -> None:
        """Store the resolved configuration; versions stand in its comments, so that it can be run as it is."""
        self.config = config
        names = ("understudy", "torch", "transformers")
        versions = ", ".join(f"{name} {version(name)}" for name in names)
        header = (
            f"understudy {self.method}, resolved\n{versions}, Python {platform.python_version()}, {platform.platform()}"
        )
        write_atomic(self.path / "config.toml", config.to_toml(header))

    def write_start(self, findings: Sequence[Mapping[str, Any]]) -> None:
        """Store where this process runs, and what the doctor found before it began; after ``write_config``."""
        for rows in self.starts:
            rows.truncate_after(self.first_step - 1)  # what began here before left nothing
        environments, doctor = self.starts
        environments.append({"step": self.first_step, "method": self.method, **environment()})
        for finding in findings:
            doctor.append({"step": self.first_step, **finding})

    def record(self, step: int, row: Mapping[str, Any], *, again: bool = False) -> dict[str, Any]:
        """Append a step's metrics with its running costs; or put them in the newest row's place, ``again``."""
        full = {"step": step, **row}
        for role, seconds in self.costs.take_seconds().items():
            full[f"time/{role}"] = full.get(f"time/{role}", 0.0) + seconds
        full |= {"cost/flops": self.costs.total("flops"), "cost/seconds": self.costs.total("seconds")}
        if again:  # in one go: its checkpoint may be there already, and then nobody would write the row anew
            self.metrics.replace_last(full)
        else:
            self.metrics.append(full)
        self._recorded_costs = copy.deepcopy(self.costs.to_json())
        write_json(self.path / "costs.json", self._recorded_costs)
        return full

    def amend(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Add metrics to the newest row, with what they cost."""
        row = self.last_row()
        return self.record(row.pop("step"), {**row, **metrics}, again=True)

    def evaluation_is_due(self, step: int) -> bool:
        """After step ``step``: every so many steps, and after the last."""
        evaluation = self.config.evaluation
        regular = bool(evaluation.every) and step % evaluation.every == 0
        return bool(evaluation.tasks) and (regular or step == self.config.optim.num_steps)

    @property
    def owes_evaluation(self) -> bool:
        """Whether the step to go on after was to be evaluated, and was not."""
        row = self.last_row()
        due = self.checkpoint is not None and self.evaluation_is_due(self.first_step)
        return due and row.get("step") == self.first_step and not any(name.startswith("eval/") for name in row)

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics."""
        return read_metrics(self.metrics.path) if self.metrics.path.exists() else []

    def last_alarm(self) -> dict[str, Any] | None:
        """The newest of the guards' alarms, if there is one."""
        alarms = self.alarms.rows()
        return alarms[-1] if alarms else None

    def last_row(self) -> dict[str, Any]:
        """The newest row of metrics; empty before the first."""
        rows = self.rows()
        return rows[-1] if rows else {}

    def save_rollouts(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Store one step's rollouts."""
        if records:
            write_rollouts(self.path / "rollouts", step, records)

    def save_checkpoint(self, step: int, trainer: Trainer, tokenizer: Any) -> Path:
        """Write a checkpoint with everything a resumed run needs. Its costs are those of the newest row: what a step
        under way has cost since is paid again by the run that goes on. Raises RunError when it cannot be written."""
        extra = {"costs": self._recorded_costs, "method": self.method}
        for rows in (self.metrics, self.alarms):
            rows.flush()  # a checkpoint must not outlive the rows before it
        keep = self.config.checkpoints.keep
        return save_checkpoint(self.checkpoints_path, step, trainer, tokenizer, extra, keep=keep)


def _moved(stored: ServerConfig | None, given: ServerConfig | None) -> ServerConfig | None:
    """The stored role, reached as the new configuration says."""
    if stored is None or given is None:
        return stored
    return stored.model_copy(update={key: getattr(given, key) for key in _OF_SERVERS if hasattr(given, key)})


def remove_run(path: Path) -> None:
    """Delete a run's folder, unless a process is writing there."""
    with contextlib.suppress(BlockingIOError), lock_folder(path):
        shutil.rmtree(path)


def flat(config: RunConfig) -> dict[str, Any]:
    """The tree as dotted keys."""

    def walk(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(json.loads(config.model_dump_json(exclude_none=True)), ""))

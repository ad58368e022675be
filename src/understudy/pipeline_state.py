"""What a pipeline's folder remembers: pipeline.json, replaced as a whole after every phase."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import ValidationError, field_validator

from understudy.checkpoints import write_json
from understudy.config_base import Section, usable_path
from understudy.config_pipeline import GateConfig, PhaseMethod, PipelineConfig, runs_of
from understudy.errors import ConfigError, first_line
from understudy.locking import LOCK_FILE, lock_folder
from understudy.runs import RESUMABLE, flat

log = logging.getLogger("understudy")

STATE_FILE = "pipeline.json"


class GateOutcome(Section):
    """What one gate found after one phase."""

    gate: GateConfig
    value: float
    """The metric after the phase."""
    reference: float
    """What it was compared with."""
    passed: bool


class PhaseRecord(Section):
    """One finished phase, as pipeline.json keeps it."""

    name: str
    cycle: int
    method: PhaseMethod
    folder: str
    """Within the pipeline's."""
    began_with: str
    """The student's model."""
    output: str
    """The student it made, or the samples; empty for an evaluation."""
    steps: int
    flops: float
    seconds: float
    """Both without evaluation."""
    start: dict[str, float]
    """eval/... metrics before its first step."""
    final: dict[str, float]
    """The same after its last."""
    gates: tuple[GateOutcome, ...] = ()
    outcome: Literal["kept", "rolled_back", "stopped"] = "kept"

    _usable_folder = field_validator("folder")(usable_path)

    @property
    def student(self) -> str:
        """What "@phase:<name>" stands for: a phase that was rolled back has changed nothing."""
        return self.began_with if self.outcome == "rolled_back" else self.output


class PipelineState(Section):
    """The content of pipeline.json."""

    schema_version: Literal[1] = 1
    plan: PipelineConfig
    phases: tuple[PhaseRecord, ...] = ()
    """Those that are finished, in order."""


@contextlib.contextmanager
def exclusive_folder(path: Path, resume: bool) -> Iterator[None]:
    """Exclusive access to the pipeline's folder. A block in which no phase wrote anything leaves none behind."""

    def refuse(got: str, expected: str, remedy: str) -> ConfigError:
        return ConfigError(f"output_dir {path}", got=got, expected=expected, remedy=remedy)

    if path.exists() and not path.is_dir():
        raise refuse("a file", "a new or empty folder", "choose another output_dir")
    held = sorted(one.name for one in path.iterdir()) if path.is_dir() else []
    held = [name for name in held if name != LOCK_FILE and not name.endswith(".partial")]
    if held and STATE_FILE not in held:
        wanted = "a pipeline's folder, for --resume" if resume else "a new or empty folder"
        raise refuse(f"a folder with {', '.join(held[:4])} but no {STATE_FILE}", wanted, "choose another output_dir")
    if held and not resume:
        remedy = "continue it with --resume, or choose another output_dir"
        raise refuse("a pipeline is already there", "a new or empty folder", remedy)
    try:
        lock = lock_folder(path)
    except BlockingIOError:
        remedy = "wait for the other one to end, or choose another output_dir"
        raise refuse("another process is working there", "a folder of this pipeline's own", remedy) from None
    except OSError as error:
        raise refuse(str(error), "a folder that this process can write in", "choose another output_dir") from None
    with lock:
        try:
            yield
        finally:
            if {one.name for one in path.iterdir()} <= {LOCK_FILE, STATE_FILE, "report.html"}:
                shutil.rmtree(path)


def save_state(path: Path, state: PipelineState) -> None:
    """Write the state, and the page made from it. A page that fails must not look like a pipeline that failed."""
    from understudy.report.pipeline_report import write_pipeline_report

    write_json(path / STATE_FILE, state.model_dump(mode="json"))
    try:
        write_pipeline_report(path)
    except Exception as error:
        log.warning(
            "report.html could not be written (%s: %s). Once mended: understudy report %s",
            type(error).__name__,
            error,
            path,
        )


def load_state(path: Path) -> PipelineState:
    """The state of the pipeline in ``path``. Raises ConfigError where it cannot be read."""
    file = path / STATE_FILE
    try:
        return PipelineState.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        got = first_line(error)
        if isinstance(error, ValidationError):
            got = f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
        raise ConfigError(
            f"pipeline {file}",
            got=got,
            expected="what `understudy pipeline` wrote there",
            remedy="choose another output_dir",
        ) from None


def refuse_another_plan(path: Path, state: PipelineState, plan: PipelineConfig) -> None:
    """Raise ConfigError for a plan that would make another pipeline of the stored one. What a run may change may
    differ, and the gates, and how many cycles are to come."""

    def refuse(what: str, given: object, stored: object) -> None:
        if given != stored:
            raise ConfigError(
                f"--resume in {path}: {what}",
                got="nothing" if given is None else str(given),
                expected=f"{'nothing' if stored is None else stored}, as the pipeline began",
                remedy=f"restore {what}, or start a new pipeline in another output_dir",
            )

    done = {record.name for record in state.phases}
    refuse("output_dir", plan.output_dir, state.plan.output_dir)
    refuse("the first student", plan.start, state.plan.start)
    refuse("phases", _outline(plan), _outline(state.plan))
    for phase, stored_phase in zip(plan.phases, state.plan.phases, strict=True):
        given, stored = flat(phase.config), flat(stored_phase.config)
        for key in sorted(given.keys() | stored.keys()):
            free = any(key == name or key.startswith(f"{name}.") for name in RESUMABLE)
            # A run may be made longer while it lasts; later phases have gone on from a finished one.
            if not free or (key == "optim.num_steps" and phase.name in done):
                refuse(f"{key} of phase {phase.name}", given.get(key), stored.get(key))
    if len(runs_of(plan)) < len(state.phases):
        refuse("cycles", plan.cycles, f"at least {state.phases[-1].cycle}")


def _outline(plan: PipelineConfig) -> str:
    return ", ".join(f"{phase.name} ({phase.method}{', once' if phase.once else ''})" for phase in plan.phases)

"""Phases in order: each an ordinary run whose student the next one goes on from.

pipeline.json says what is done. A phase that a crash or a Ctrl-C ended goes on from its own folder; finished ones are
not looked at again.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from understudy import api
from understudy.config import RowsConfig, RunConfig
from understudy.config_pipeline import (
    READING,
    TRAINING,
    GateConfig,
    Made,
    PhaseMethod,
    PipelineConfig,
    PlannedRun,
    planned_runs,
    runs_of,
    with_models,
    with_rows,
)
from understudy.errors import ConfigError, RunError
from understudy.evaluation import temperature_name
from understudy.metrics import read_metrics
from understudy.pipeline_state import (
    STATE_FILE,
    GateOutcome,
    PhaseRecord,
    PipelineState,
    exclusive_folder,
    load_state,
    refuse_another_plan,
    save_state,
)
from understudy.preflight import Checked, check_run
from understudy.rows import read_rows
from understudy.runs import remove_run
from understudy.supervised import supervised_examples

log = logging.getLogger("understudy")


@dataclass(frozen=True)
class PipelineResult:
    """Where a pipeline stands. ``student`` is the newest one that was kept."""

    folder: Path
    student: Path
    phases: Sequence[PhaseRecord]
    interrupted: bool = False


def pipeline(plan: PipelineConfig | str | Path, *, resume: bool = False, quiet: bool = False) -> PipelineResult:
    """Run every phase of ``plan``, a TOML file or what was read from one, in order.

    Raises ConfigError before anything is computed when a phase cannot work, as far as that can be told from what is
    there; RunError when a gate stops the pipeline, or a phase cannot go on. Everything that was finished is kept.
    """
    if not isinstance(plan, PipelineConfig):
        plan = PipelineConfig.from_toml(plan)
    planned_runs(plan)  # raises for references that lead nowhere, wherever a resumed pipeline stands
    _check_gates(plan)
    path = Path(plan.output_dir)
    with exclusive_folder(path, resume):
        state = _continued(path, plan) if (path / STATE_FILE).exists() else PipelineState(plan=plan)
        made = _made(plan, state.phases)
        planned = planned_runs(plan, made, done=len(state.phases))
        check_runs(planned)
        save_state(path, state)
        _refuse_if_stopped(path, state)
        return _go_on(path, state, len(planned), resume, quiet)


def _go_on(path: Path, state: PipelineState, left: int, resume: bool, quiet: bool) -> PipelineResult:
    """Run what is left, phase by phase."""
    plan, total = state.plan, len(state.phases) + left
    while len(state.phases) < total:
        # Planned anew each time: a phase that was rolled back changes where the next one begins.
        made = _made(plan, state.phases)
        planned = planned_runs(plan, made, done=len(state.phases))[0]
        run = planned.run
        log.info("phase %d of %d: %s (%s), in %s", run.number, total, run.phase.name, run.phase.method, run.folder)
        try:
            result = _run_phase(planned, resume, quiet)
        except ConfigError as error:
            if not state.phases:
                raise
            raise RunError(f"phase {run.phase.name}: {error}\nThe phases before it are kept.") from None
        if result.interrupted_at is not None:
            return PipelineResult(path, Path(made.previous), state.phases, interrupted=True)
        record = _judged(plan.gates, _record(planned), state.phases, made.previous)
        state = state.model_copy(update={"phases": (*state.phases, record)})
        save_state(path, state)
        _refuse_if_stopped(path, state)
        _release_memory()
        if result.stop_requested and len(state.phases) < total:
            return PipelineResult(path, Path(_made(plan, state.phases).previous), state.phases, interrupted=True)
    return PipelineResult(path, Path(_made(plan, state.phases).previous), state.phases)


def _run_phase(planned: PlannedRun, resume: bool, quiet: bool) -> api.RunResult:
    method, config = planned.run.phase.method, planned.config
    if method == "eval":
        if resume and Path(config.output_dir).exists():  # an evaluation has nothing to go on from
            remove_run(Path(config.output_dir))
        return api.evaluate(config, quiet=quiet)
    return getattr(api, method)(config, resume=resume, quiet=quiet)


def _release_memory() -> None:
    """A phase's models go before the next one's come: they hang together in cycles, and torch keeps their memory."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# What is known of a finished phase


def _record(planned: PlannedRun) -> PhaseRecord:
    run, config, folder = planned.run, planned.config, Path(planned.config.output_dir)
    start, final = _evaluations(folder, run.phase.method)
    costs = folder / "costs.json"
    total = _read(costs)["total_without_evaluation"] if costs.exists() else {"flops": 0.0, "seconds": 0.0}
    return PhaseRecord(
        name=run.phase.name,
        cycle=run.cycle,
        method=run.phase.method,
        folder=run.folder,
        began_with=config.student.model,
        output=planned.output,
        steps=config.optim.num_steps if run.phase.trains else 0,
        flops=total["flops"],
        seconds=total["seconds"],
        start=start,
        final=final,
    )


def _evaluations(folder: Path, method: PhaseMethod) -> tuple[dict[str, float], dict[str, float]]:
    """eval/... metrics before the first and after the last step; of an evaluation its result, twice."""
    if method == "generate":
        return {}, {}
    rows = [_read(folder / "evaluation.json")] if method == "eval" else read_metrics(folder / "metrics.jsonl")
    found = [{key: value for key, value in row.items() if key.startswith("eval/")} for row in rows]
    return (found[0], found[-1]) if found else ({}, {})


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _made(plan: PipelineConfig, records: Sequence[PhaseRecord]) -> Made:
    """What the finished phases left for those to come."""
    made = Made(plan.start, plan.start)
    for run, record in zip(runs_of(plan), records, strict=False):  # there are more runs than records
        made = made.after(run, record.student, kept=record.outcome != "rolled_back")
    return made


# Gates


def _judged(
    gates: Sequence[GateConfig], record: PhaseRecord, earlier: Sequence[PhaseRecord], previous: str
) -> PhaseRecord:
    """``record`` with what the gates make of it. ``previous``: the newest student that was kept before it."""
    if record.method not in TRAINING:
        return record
    trained = [*(one for one in earlier if one.method in TRAINING), record]
    outcomes = [_outcome(gate, trained) for gate in gates if not gate.after or record.name in gate.after]
    failed = {outcome.gate.action for outcome in outcomes if not outcome.passed}
    outcome = "stopped" if "stop" in failed else "rolled_back" if failed else "kept"
    if outcome == "rolled_back":
        log.warning("%s: rolled back; the pipeline goes on from %s", record.name, previous)
    return record.model_copy(update={"gates": tuple(outcomes), "outcome": outcome})


def _outcome(gate: GateConfig, trained: Sequence[PhaseRecord]) -> GateOutcome:
    """One gate after the last of the ``trained`` phases. Raises RunError where the metric is not there."""
    first, *_, last = [trained[0], *trained]
    rows = {
        "start": [first.start],
        "previous": [last.start],
        "best": [first.start, last.start, *(one.final for one in trained[:-1] if one.outcome == "kept")],
    }[gate.against]
    known = [row[gate.metric] for row in rows if gate.metric in row]
    if gate.metric not in last.final or not known:
        place = f"after phase {last.name}" if gate.metric not in last.final else f"for {gate.against}"
        raise RunError(
            f"gate {gate.metric}: no such metric {place}; the phase has {', '.join(last.final) or 'no evaluation'}. "
            "Change the gate and continue with --resume"
        )
    value, reference = last.final[gate.metric], max(known)
    # A drop of exactly max_drop passes, whatever its last bit; what is not a number does not.
    passed = value >= reference - gate.max_drop - 1e-9
    return GateOutcome(gate=gate, value=value, reference=reference, passed=passed)


def _refuse_if_stopped(path: Path, state: PipelineState) -> None:
    """Raise RunError when a gate stopped the pipeline after its newest phase."""
    if not state.phases or state.phases[-1].outcome != "stopped":
        return
    last = state.phases[-1]
    failed = [one for one in last.gates if not one.passed and one.gate.action == "stop"]
    said = "; ".join(
        f"{one.gate.metric} is {one.value:.4g}, from {one.reference:.4g} ({one.gate.against}), and may drop by "
        f"{one.gate.max_drop:g}"
        for one in failed
    )
    raise RunError(
        f"a gate stopped the pipeline after phase {last.name} (cycle {last.cycle}): {said}.\n"
        f"What is finished is kept: {path / 'report.html'}. To go on all the same, change the gate in the plan and "
        "continue with --resume"
    )


def _check_gates(plan: PipelineConfig) -> None:
    """Every gate's metric comes from an evaluation of the phases that it follows, and of what it compares with."""
    trained = [phase for phase in plan.phases if phase.trains]
    for gate in plan.gates:
        watched = [phase for phase in trained if not gate.after or phase.name in gate.after]
        for phase in watched + (trained[:1] if gate.against == "start" else []):
            tasks = phase.config.evaluation.tasks
            names = [f"eval/{task.name}/{temperature_name(t)}" for task in tasks for t in task.temperatures]
            if not any(gate.metric == name or gate.metric.startswith(f"{name}_") for name in names):
                raise ConfigError(
                    f"gate {gate.metric}",
                    got=f"phase {phase.name}, which does not measure it",
                    expected=f"one of {', '.join(names)}" if names else "a phase with [[evaluation.tasks]]",
                    remedy="mind the task's name and temperatures; `after` limits a gate to some phases",
                )


# Before anything is computed


def check_runs(planned: Sequence[PlannedRun]) -> None:
    """``check_run`` for every run, with what is not there yet replaced by what it comes from: a student by the model it
    is trained from, whose tokens it shares, and samples by the prompts they answer. Raises ConfigError."""
    models: dict[str, str] = {}
    sources: dict[str, RowsConfig] = {}
    seen: set[tuple[str, str, frozenset[str]]] = set()
    for one in planned:
        method = one.run.phase.method
        config = with_models(one.config, lambda name: models.get(name, name))
        both = {"prompts": config.prompts, "mix": config.supervised.mix}
        sampled = frozenset(name for name, rows in both.items() if rows and rows.path in sources)
        config = with_rows(config, lambda rows: _same_rows(rows, sources))
        key = (method, config.model_copy(update={"output_dir": "", "seed": 0}).model_dump_json(), sampled)
        if key not in seen:  # later cycles often repeat the first one
            _check(config, one, sampled)
        seen.add(key)
        if one.run.phase.trains:
            models[one.output] = config.student.model
        elif method == "generate" and config.prompts is not None:
            sources[one.output] = config.prompts


def _same_rows(rows: RowsConfig, sources: Mapping[str, RowsConfig]) -> RowsConfig:
    """``rows``, or, where they are samples to come, the prompts that these will answer: read as `generate` reads them,
    used as the phase uses its samples."""
    source = sources.get(rows.path)
    if source is None:
        return rows
    update = {name: getattr(source, name) for name in ("path", *READING)}
    # What `generate` does not read, or leaves out as too long, never becomes a sample.
    update["limit"] = min((limit for limit in (rows.limit, source.limit) if limit), default=None)
    update["over_long"] = "skip" if source.over_long == "skip" else rows.over_long
    return rows.model_copy(update=update)


def _check(config: RunConfig, one: PlannedRun, sampled: Collection[str]) -> None:
    method = one.run.phase.method
    try:
        checked = check_run(config, method)
        if method == "sft":
            _check_examples(config, checked, sampled)
    except ConfigError as error:
        where = f"phase {one.run.phase.name}: {error.where}"
        raise ConfigError(where, got=error.got, expected=error.expected, remedy=error.remedy) from None


def _check_examples(config: RunConfig, checked: Checked, sampled: Collection[str]) -> None:
    """Both sources of `sft`, each by itself. Of those that are ``sampled`` there are only prompts yet, no examples:
    that they can be read is all there is to check."""
    longest, mix = config.supervised.max_tokens, config.supervised.mix
    sources = {"prompts": (config.prompts, checked.rows), "mix": (mix, read_rows(mix) if mix else [])}
    for name, (source, rows) in sources.items():
        if source is not None and name not in sampled:
            supervised_examples(rows, source, checked.student, checked.stop_ids, max_tokens=longest)


def _continued(path: Path, plan: PipelineConfig) -> PipelineState:
    """The stored state with ``plan`` in place of the stored one, after refusing what would make another pipeline of it.

    A phase that a gate stopped is judged anew: the gates are what a user changes to go on.
    """
    state = load_state(path)
    refuse_another_plan(path, state, plan)
    records = list(state.phases)
    if records and records[-1].outcome == "stopped":
        last, earlier = records[-1].model_copy(update={"outcome": "kept"}), records[:-1]
        records[-1] = _judged(plan.gates, last, earlier, _made(plan, earlier).previous)
    return PipelineState(plan=plan, phases=tuple(records))


def remove_miniature(folder: Path, smaller: Callable[[RunConfig], RunConfig]) -> None:
    """Make room where an earlier smoke pipeline was. Anything else stays, and is refused as ever."""
    try:
        stored = load_state(folder).plan
    except ConfigError:
        return
    again = stored.in_miniature(smaller).model_copy(update={"output_dir": stored.output_dir})
    if Path(stored.output_dir).name == folder.name and again == stored:
        remove_run(folder)

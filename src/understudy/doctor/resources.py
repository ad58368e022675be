"""Memory, disk, time and FLOPs against what there is."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.doctor.case import LESS_MEMORY, Case
from understudy.doctor.findings import Check, Found

if TYPE_CHECKING:
    from understudy.assembly import Parts
    from understudy.config_base import ModelConfig
    from understudy.config_plan import PlanConfig
    from understudy.costs import CostLedger
    from understudy.tasks import Grade, Grader
    from understudy.types import FinishReason, Prompt, TrainingExample

# Float32 weights with AdamW's two moments.
_SINGLE, _MOMENTS = 4, 8
# What pages, metrics and rollouts take beside checkpoints, at most.
_REST = 50e6
# A step of the probe: enough prompts to say what one costs, few enough not to wait for it.
_PROBE_PROMPTS, _PROBE_EXAMPLES = 8, 16
# What a step does once, however many prompts it has.
_ONCE = frozenset({"weight_sync"})


def disk(case: Case) -> Iterator[Found]:
    """Room for the checkpoints that are kept, and one more that is being written. Those of a run that goes on are there
    already, and will make room."""
    weights = _checkpoint_bytes(case)
    if weights is None:
        return
    checkpoints, steps = case.config.checkpoints, case.config.optim.num_steps
    count = min(checkpoints.keep + 1, -(-steps // checkpoints.every))
    folder = _existing(Path(case.config.output_dir).absolute())
    free = shutil.disk_usage(folder).free
    stored = sum(path.stat().st_size for path in Path(case.config.output_dir).glob("checkpoints/step_*/*"))
    needed = max(weights, count * weights - stored) + _REST
    numbers = {"free": free, "needed": needed, "checkpoint": weights, "checkpoints": count}
    evidence = (
        f"{_size(free)} free in {folder}; {count} checkpoints of {_size(weights)} at a time, with optimizer state, and "
        f"{_size(_REST)} for the rest"
    )
    level = "fail" if weights > free else "warn" if needed > free else "pass"
    yield Found(level, evidence, numbers)


def _existing(path: Path) -> Path:
    """The folder on whose disk ``path`` will be."""
    return path if path.exists() else _existing(path.parent)


def _checkpoint_bytes(case: Case) -> float | None:
    """Weights that train and their optimizer's state; None where the sizes are not known."""
    from understudy.flops import Update, adapter_weights, shape_of_config

    student = case.config.student
    shape = shape_of_config(case.student.config)
    lora = student.lora
    if shape is not None:
        trained = (
            adapter_weights(shape, Update(rank=lora.rank, targets=lora.target_modules)) if lora else shape.parameters
        )
        return trained * ((_width_of(student.dtype) if lora is None else _SINGLE) + _MOMENTS)
    stored = sum(path.stat().st_size for path in Path(student.model).glob("*.safetensors"))
    return 3 * stored if stored and lora is None else None


def _width_of(dtype: str) -> int:
    return {"bfloat16": 2, "float16": 2, "float64": 8}.get(dtype, _SINGLE)


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


# Memory


def memory(case: Case) -> Iterator[Found]:
    """What each phase of a step needs at its height beside what stays, against what is free."""
    from understudy.backends.loading import pick_device
    from understudy.backends.memory import memory_budget
    from understudy.planner import predict

    if own := [role for role, model in _models(case) if model.trust_remote_code]:
        yield Found("pass", f"{', '.join(own)}: sizes of models with code of their own are not known in advance")
        return
    device = pick_device(case.config.student.device)
    plan = _plan(case)
    prediction = predict(plan)
    phases, resident = _phases(case, prediction.memory, device.type)
    if not phases:
        return
    budget = memory_budget(device)
    numbers = {"device": str(device), "resident": resident, "phases": phases, "budget": budget}
    listed = ", ".join(f"{phase} {_size(resident + own)}" for phase, own in phases.items())
    worst = resident + max(phases.values())
    evidence = (
        f"on {device}: {listed}; {_size(budget)} to plan with, {_size(resident)} taken by weights and their state"
    )
    # The budget is 70% of what is free.
    level = "fail" if worst > budget / 0.7 else "warn" if worst > budget else "pass"
    yield Found(level, evidence, numbers)


def _models(case: Case) -> list[tuple[str, ModelConfig]]:
    """Those that are loaded, by role."""
    teachers = case.config.all_teachers if case.method == "distill" else {}
    return [("student", case.config.student), *((f"teacher {name}", one) for name, one in teachers.items())]


def _plan(case: Case) -> PlanConfig:
    from understudy.config_plan import PlanConfig, tree_of_run

    tree = tree_of_run(case.config, prompt_tokens=None, completion_tokens=None)
    # Without a teacher (objective.control) a step has the phases of `rl`.
    kind = "rl" if case.method == "distill" and not case.teacher_names else case.method
    method = dict(next(iter(tree["methods"].values()))) | {"kind": kind}
    if kind != "distill":
        tree["teacher"] = None
        method.pop("estimator", None)
    return PlanConfig.model_validate(tree | {"methods": {kind: method}})


def _phases(case: Case, planned: Mapping[str, Any], device: str) -> tuple[dict[str, float], float]:
    """(bytes of each phase, bytes that stay). The planner's bfloat16 is float32 on a CPU."""
    from understudy.flops import shape_of_config

    config = case.config
    single = 2.0 if device != "cuda" else 1.0
    training = planned["student_training"]
    resident = training.weights + training.gradients + training.optimizer
    phases = {"training": single * (training.activations or 0.0)}
    sampling = planned.get("student_sampling")
    if sampling is not None and config.sampler is None:
        phases["sampling"] = single * (sampling.cache or 0.0)
    scoring = planned.get("teacher_scoring")
    here = [case.teacher(name) for name in case.teacher_names if config.all_teachers[name].url is None]
    if scoring is not None and here:
        phases["scoring"] = single * (scoring.activations or 0.0)
    if case.reference is not None and config.reference is not None and config.reference.url is None:
        here.append(case.reference)
    shapes = [shape_of_config(text.config) for text in here]
    resident += sum(single * 2.0 * shape.parameters for shape in shapes if shape is not None)
    return phases, resident


# Time


def steps(case: Case) -> Iterator[Found]:
    """Two steps of the run, smaller where it is large: the second one is timed."""
    parts = case.parts
    if case.on_policy:
        full = parts.config.sampling.groups_per_batch
        size = min(full, _PROBE_PROMPTS)
        work = _on_policy_step
    else:
        full = parts.config.supervised.batch_size
        size = min(full, _PROBE_EXAMPLES)
        work = _supervised_step
    work(case, parts, size, 0)
    before = _amounts(case)
    work(case, parts, size, 1)
    spent = {
        role: {k: v - before.get(role, {}).get(k, 0.0) for k, v in own.items()} for role, own in _amounts(case).items()
    }
    scale, count = full / size, parts.config.optim.num_steps
    seconds = {
        role: own["seconds"] * (1 if role in _ONCE else scale) for role, own in spent.items() if own["seconds"] > 0
    }
    flops = scale * sum(own["flops"] for own in spent.values())
    step = sum(seconds.values())
    hours = step * count / 3600
    numbers = {
        "step_seconds": step,
        "seconds": seconds,
        "step_flops": flops,
        "hours": hours,
        "flops": flops * count,
        "probed": size,
        "of": full,
    }
    listed = ", ".join(f"{role.replace('_', ' ')} {value:.3g}" for role, value in seconds.items())
    evidence = (
        f"a step takes about {step:.3g} s ({listed}), {count} steps {_time(hours)} and {flops * count:.3g} FLOPs (2N), "
        f"evaluations and checkpoints left out; probed with {size} of {full} "
        f"{'prompts' if case.on_policy else 'sequences'}"
    )
    yield Found("pass", evidence, numbers)


def _time(hours: float) -> str:
    return f"{hours:.3g} hours" if hours >= 1 else f"{60 * hours:.3g} minutes"


def _amounts(case: Case) -> dict[str, dict[str, float]]:
    return {role: dict(own) for role, own in case.costs.roles.items()}


def _on_policy_step(case: Case, parts: Parts, size: int, step: int) -> None:
    from understudy.loop import sample, score
    from understudy.rollouts import step_seed

    if parts.grader is not None:
        parts = replace(parts, grader=_timed(parts.grader, case.costs))
    rollouts = sample(parts, parts.prompts_at(step)[:size], seed=step_seed(parts.config.seed, step))
    _, examples = score(parts, rollouts)
    _update(parts, examples, parts.objective, step)
    parts.sampler.set_policy_version(step + 1)


def _timed(grader: Grader, costs: CostLedger) -> Grader:
    """``grader``, with its seconds on the ledger: a run's own leaves them out."""

    def grade(prompt: Prompt, completion: str, finish_reason: FinishReason) -> float | Grade:
        start = time.perf_counter()
        given = grader(prompt, completion, finish_reason)
        costs.add("grading", tokens=0, flops=0.0, seconds=time.perf_counter() - start)
        return given

    return grade


def _supervised_step(case: Case, parts: Parts, size: int, step: int) -> None:
    from understudy.objectives import CrossEntropy

    examples = case.examples
    _update(parts, [examples[(step * size + i) % len(examples)] for i in range(size)], CrossEntropy(), step)


def _update(parts: Parts, examples: Sequence[TrainingExample], objective: Any, step: int) -> None:
    from understudy.optimizer_step import learning_rate_at
    from understudy.updates import Updates

    rate, reduction = learning_rate_at(parts.config.optim, step), parts.config.objective.reduction
    Updates(parts.trainer, parts.batching).make(examples, objective, learning_rate=rate, reduction=reduction)


CHECKS = (
    Check(
        "resources.disk",
        disk,
        "fails where one checkpoint does not fit on the disk of output_dir, warns where those that are kept at "
        "a time do not",
        "a full disk ends a run at a checkpoint, and all since the last one is lost",
        "checkpoints.keep = 1, or an output_dir on another disk",
        fast=True,
    ),
    Check(
        "resources.memory",
        memory,
        "warns above 70% of the memory that is free, fails above all of it, and then no weights are loaded; an "
        "estimate from the models' sizes",
        "memory that runs out in the first long batch ends the run hours later than it could have been known",
        LESS_MEMORY,
        gate=True,
    ),
    Check(
        "resources.steps",
        steps,
        "passes; says what a step and the whole run take",
        "a run that takes days is better known to before it begins",
        "`understudy cost run.toml` compares methods and hardware",
        weights=True,
    ),
)

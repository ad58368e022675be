"""A prediction as tables for the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from understudy.config_plan import PlanConfig
from understudy.planner import MethodCost, Prediction, RoleMemory, SizedModel, gpus_for

_WIDTH = 110  # tables are laid out for it; a terminal that is narrower wraps lines


def print_prediction(prediction: Prediction, plan: PlanConfig) -> None:
    """To standard output."""
    Console(width=_WIDTH, highlight=False).print(page(prediction, plan))


def page(prediction: Prediction, plan: PlanConfig) -> RenderableType:
    """Everything there is to say: models, FLOPs by role, hours, memory, comparisons, assumptions."""
    hardware, use = plan.hardware, plan.hardware.utilisation
    lines = [f"student  {_described(prediction.student)}"]
    if prediction.teacher:
        lines.append(f"teacher  {_described(prediction.teacher)}")
    lines.append(
        f"hardware {hardware.count} × {hardware.gpu}: {hardware.peak / 1e12:,.0f} TFLOP/s dense bfloat16 and "
        f"{hardware.memory / 1e9:.0f} GB each, of which sampling reaches {use.sampling:.0%}, scoring "
        f"{use.scoring:.0%}, training {use.training:.0%}"
    )
    parts: list[RenderableType] = [Text("\n".join(lines))]
    parts += [_flops(prediction), _hours(prediction, plan), _memory(prediction, plan)]
    if plan.baseline and len(prediction.methods) > 1:
        parts.append(_ratios(prediction, plan.baseline))
    said = [*plan.assumptions, *prediction.warnings]
    if said:
        parts.append(Text("Assumed:\n" + "\n".join(f"- {line}" for line in said)))
    return Group(parts[0], *(line for part in parts[1:] for line in (Text(), part)))


def _described(model: SizedModel) -> str:
    if model.shape is None:
        return model.name
    per_token = f"{model.active / 1e9:.3g}B of them multiplied with each token"
    return f"{model.name}: {model.parameters / 1e9:.3g}B weights, {per_token}"


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", no_wrap=not i)
    return table


_COLUMNS = {
    "student_sampling": "student samples",
    "teacher_sampling": "teacher samples",
    "teacher_scoring": "teacher scores",
    "student_training": "student trains",
}


def _flops(prediction: Prediction) -> Table:
    """Each method twice: the convention's count, then the exact one."""
    used = [role for role in _COLUMNS if any(role in method.roles for method in prediction.methods.values())]
    table = _table(
        "FLOPs by role", ["method", "count", *(_COLUMNS[role] for role in used), "teacher", "student", "all"]
    )
    for name, method in prediction.methods.items():
        convention = {role: cost.flops for role, cost in method.roles.items()}
        exact = {role: cost.exact_flops for role, cost in method.roles.items()}
        table.add_row(name, "2N", *_amounts(convention, used))
        if any(amount is not None for amount in exact.values()):
            table.add_row("", "exact", *_amounts(exact, used))
    return table


def _amounts(of_roles: Mapping[str, float | None], used: Sequence[str]) -> list[str]:
    """A method's roles, then the teacher's, the student's and all of them together."""
    sums = [[amount for role, amount in of_roles.items() if role.startswith(who)] for who in ("teacher", "student", "")]
    totals = [sum(a for a in amounts if a is not None) if None not in amounts else None for amounts in sums]
    return [_scientific(amount) for amount in [*(of_roles.get(role) for role in used), *totals]]


def _hours(prediction: Prediction, plan: PlanConfig) -> Table:
    names = ["method", "sampling", "scoring", "training", "GPU hours", f"hours on {plan.hardware.count}"]
    priced = plan.hardware.price is not None
    table = _table("GPU hours" + (" and money" if priced else ""), [*names, "money"] if priced else names)
    for name, method in prediction.methods.items():
        cells = [_hours_of(method, suffix) for suffix in ("_sampling", "_scoring", "_training")]
        row = [*cells, _number(method.gpu_hours), _number(method.gpu_hours / plan.hardware.count)]
        table.add_row(name, *row, *([_number(method.money)] if priced else []))
    return table


def _hours_of(method: MethodCost, suffix: str) -> str:
    hours = [cost.gpu_hours for role, cost in method.roles.items() if role.endswith(suffix)]
    return _number(sum(hours)) if hours else "–"


def _memory(prediction: Prediction, plan: PlanConfig) -> Table:
    names = ["role", "weights", "gradients", "optimizer", "activations", "KV cache", "all", "GPUs"]
    table = _table("Memory by role, GB", names)
    for role, memory in prediction.memory.items():
        table.add_row(_COLUMNS[role], *_gigabytes(memory), str(gpus_for(memory, plan)))
    return table


def _gigabytes(memory: RoleMemory) -> list[str]:
    amounts = [memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.cache, memory.total]
    return [f"{amount / 1e9:,.1f}" if amount else "–" for amount in amounts]


def _ratios(prediction: Prediction, baseline: str) -> Table:
    found = prediction.ratios(baseline)
    names = next(iter(found.values()))
    table = _table(f"FLOPs (2N) of {baseline}, as multiples of each", ["method", *names])
    for name, ratios in found.items():
        table.add_row(name, *(f"{ratio:.1f}×" for ratio in ratios.values()))
    return table


def _scientific(value: float | None) -> str:
    return "–" if not value else f"{value:.2e}".replace("e+", "e")


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

"""The card of an exported student: README.md with the hub's front matter, the run's own numbers, and its curves."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from understudy.config import RunConfig

Row = Mapping[str, Any]

_TAGS = {"distill": "on-policy-distillation", "rl": "reinforcement-learning", "sft": "supervised-fine-tuning"}
_SAID = {
    "distill": "On-policy distillation: the student wrote completions, the teacher marked every token of them, and the "
    "student learnt from the marks.",
    "rl": "Reinforcement learning: the student wrote completions, a grader judged each, and the student learnt from "
    "the grades.",
    "sft": "Supervised fine-tuning on given completions.",
}
# Title, unit, metric, name of the file.
_CURVES = (
    ("Reverse KL, full vocabulary", "nats per token", "reverse_kl/full", "reverse_kl_full"),
    ("Reverse KL, sampled tokens", "nats per token", "reverse_kl/mean", "reverse_kl"),
    ("Reward", "mean reward", "reward/mean", "reward"),
    ("Loss", "", "optim/loss", "loss"),
    ("Completion length", "tokens", "completion_length/mean", "completion_length"),
    ("Gradient norm", "before clipping", "optim/grad_norm", "gradient_norm"),
)
_EVALUATION = re.compile(r"eval/(?P<task>[^/]+)/(?P<decoding>greedy|t[\d.e+-]+)")


@dataclass(frozen=True)
class Exported:
    """What was exported. ``base``: the base model's hub id, None where it has none; ``ends``: ids that end a
    completion; ``separate``: metrics of evaluations by the names of their folders; ``alarms``: the guards'."""

    name: str
    method: str
    step: int
    base: str | None
    adapters: bool
    merged: bool
    ends: tuple[int, ...]
    versions: str
    separate: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    alarms: Sequence[Row] = ()


def is_hub_id(name: str) -> bool:
    """Whether ``name`` looks like owner/name, and is no path.

    >>> is_hub_id("Qwen/Qwen3-8B-Base"), is_hub_id("/data/model"), is_hub_id("../model"), is_hub_id("a/b/c")
    (True, False, False, False)
    """
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def base_on_hub(run: Path) -> str | None:
    """The hub id that the run's student began as, through the runs that made it; None where it began in a folder."""
    seen: set[Path] = set()
    while run.resolve() not in seen:
        seen.add(run.resolve())
        model = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))["student"]["model"]
        folder = Path(model)
        if not folder.exists():
            return model if is_hub_id(model) else None
        if folder.parent.name != "checkpoints" or not (folder.parent.parent / "config.toml").exists():
            return None
        run = folder.parent.parent
    return None


def curves(rows: Sequence[Row]) -> dict[str, str]:
    """SVG files by name, without extension: accuracy by task, and the metrics that the rows hold."""
    from understudy.report import Series, line_chart

    def points(key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]

    charts = {}
    by_task: dict[str, list[tuple[str, str]]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        if found := _EVALUATION.fullmatch(key):
            by_task.setdefault(found["task"], []).append((found["decoding"], key))
    for task, keys in by_task.items():
        lines = [
            Series(name, points(key), [row.get(f"{key}_se") for row in rows if isinstance(row.get(key), int | float)])
            for name, key in keys
        ]
        charts[f"evaluation_{_file_name(task)}"] = line_chart(
            lines, title=f"Evaluation: {task}", x_label="optimizer steps", y_label="mean, band of one standard error"
        )
    for title, unit, key, name in _CURVES:
        if len(points(key)) > 1:
            charts[name] = line_chart(
                [Series(title, points(key))], title=title, x_label="optimizer steps", y_label=unit
            )
    return {name: _standing_alone(svg) for name, svg in charts.items()}


def _standing_alone(svg: str) -> str:
    """A page's chart as a file: it says what it is, in a font and on a ground of its own, which a dark page needs."""
    head, rest = svg.split(">", 1)
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" ', 1)
    return f'{head}><rect width="100%" height="100%" fill="#fff"/>{rest}'


def _file_name(text: str) -> str:
    return re.sub(r"[^\w-]+", "_", text)


def card(
    what: Exported, config: RunConfig, rows: Sequence[Row], costs: Mapping[str, Row], images: Sequence[str]
) -> str:
    """README.md."""
    parts = [
        _front_matter(what),
        f"# {what.name}",
        _intro(what, config),
        _usage(what),
        _results(what, rows),
        _training(config, rows),
        _alarms(what.alarms),
        _curves(images),
        _costs(costs, what.step),
        _limits(what),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(what: Exported) -> str:
    lines = []
    if what.base is not None:
        relation = "adapter" if what.adapters else "finetune"
        lines += [f"base_model: {what.base}", f"base_model_relation: {relation}"]
    else:
        lines.append("# base_model: owner/name, where the base model is on the hub")
    lines += [
        f"library_name: {'peft' if what.adapters else 'transformers'}",
        "pipeline_tag: text-generation",
        "# license: yours to choose, within what the licences of base model, teacher and data allow",
        "tags:",
        *(f"- {tag}" for tag in ("understudy", _TAGS.get(what.method, "fine-tuning"), *["lora"] * what.adapters)),
    ]
    return "\n".join(["---", *lines, "---"])


def _intro(what: Exported, config: RunConfig) -> str:
    begun = f" from [{what.base}](https://huggingface.co/{what.base})" if what.base else ""
    form = "Adapters" if what.adapters else "Adapters merged into their base" if what.merged else "All weights"
    steps = f"{form}, after {what.step:,} optimizer steps{begun}, trained with understudy."
    return f"{_SAID.get(what.method, '')}\n\n{steps}".strip() + _teachers(config, what.method)


def _teachers(config: RunConfig, method: str) -> str:
    if method != "distill":
        return ""
    named = [_portable(teacher.model) for teacher in config.all_teachers.values()]
    return f" Teacher{'s' if len(named) > 1 else ''}: {', '.join(dict.fromkeys(named))}."


def _portable(model: str) -> str:
    """A model's name to somebody who does not have this machine's folders."""
    return model if is_hub_id(model) and not Path(model).exists() else f"a model of the authors' ({Path(model).name})"


def _usage(what: Exported) -> str:
    load = (
        [
            "from peft import AutoPeftModelForCausalLM",
            'model = AutoPeftModelForCausalLM.from_pretrained("this/repository")',
        ]
        if what.adapters
        else [
            "from transformers import AutoModelForCausalLM",
            'model = AutoModelForCausalLM.from_pretrained("this/repository")',
        ]
    )
    code = [
        *load,
        "from transformers import AutoTokenizer",
        'tokenizer = AutoTokenizer.from_pretrained("this/repository")',
    ]
    code = [*sorted(line for line in code if "import" in line), *(line for line in code if "import" not in line)]
    return "## Use\n\n```python\n" + "\n".join(code) + "\n```"


def _results(what: Exported, rows: Sequence[Row]) -> str:
    """Evaluations before training and at this step, with standard errors, and those made separately."""
    keys = dict.fromkeys(key for row in rows for key in row if _EVALUATION.fullmatch(key))
    table = [
        [f"{_decoded(key)}", *(_with_error(row, key) for row in (_first(rows, key), _last(rows, key)))] for key in keys
    ]
    steps = {key: (_first(rows, key)["step"], _last(rows, key)["step"]) for key in keys}
    table = [[*cells, f"{steps[key][0]} and {steps[key][1]}"] for cells, key in zip(table, keys, strict=True)]
    parts = [_table(["evaluation", "before", "after", "at steps"], table)] if table else []
    for name, metrics in what.separate.items():
        found = [[_decoded(key), _with_error(metrics, key)] for key in metrics if _EVALUATION.fullmatch(key)]
        parts.append(f"Evaluated separately ({name}):\n\n" + _table(["evaluation", "result"], found))
    if not parts:
        return "## Results\n\nThe run has no evaluation."
    return "## Results\n\nMeans over problems ± one standard error.\n\n" + "\n\n".join(parts)


def _decoded(key: str) -> str:
    found = _EVALUATION.fullmatch(key)
    assert found is not None
    decoding = found["decoding"]
    return f"{found['task']}, {'greedy' if decoding == 'greedy' else f'sampled at T = {decoding[1:]}'}"


def _first(rows: Sequence[Row], key: str) -> Row:
    return next(row for row in rows if key in row)


def _last(rows: Sequence[Row], key: str) -> Row:
    return next(row for row in reversed(rows) if key in row)


def _with_error(row: Row, key: str) -> str:
    error = row.get(f"{key}_se")
    return f"{row[key]:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _training(config: RunConfig, rows: Sequence[Row]) -> str:
    """Settings that decide the result, and what the metrics were at both ends."""
    settings = {
        "learning rate": f"{config.optim.learning_rate:g}, {config.optim.schedule}",
        "seed": str(config.seed),
    }
    trained = [row for row in rows if row["step"] > 0]
    if any("completion_length/mean" in row for row in trained):
        sampling = config.sampling
        settings |= {
            "prompts per step": str(sampling.groups_per_batch),
            "completions per prompt": str(sampling.group_size),
            "longest completion": f"{sampling.max_completion_tokens} tokens",
            "temperature": f"{sampling.temperature:g}",
            "estimator": config.objective.estimator,
        }
    else:
        settings["sequences per step"] = str(config.supervised.batch_size)
    if config.student.lora is not None:
        settings["adapters"] = f"rank {config.student.lora.rank}, alpha {config.student.lora.alpha:g}"
    ends = []
    for title, unit, key, _ in _CURVES:
        known = [row[key] for row in trained if isinstance(row.get(key), int | float)]
        if known:
            ends.append([title, unit, f"{known[0]:.4g}", f"{known[-1]:.4g}"])
    parts = ["## Training", _table(["setting", "value"], [list(pair) for pair in settings.items()])]
    return "\n\n".join(parts + ([_table(["metric", "unit", "first step", "last step"], ends)] if ends else []))


def _alarms(alarms: Sequence[Row]) -> str:
    if not alarms:
        return ""
    rows = [[str(alarm.get(key, "?")) for key in ("step", "guard", "action", "words")] for alarm in alarms]
    return "The guards' alarms:\n\n" + _table(["step", "guard", "action", "what"], rows)


def _curves(images: Sequence[str]) -> str:
    shown = "\n".join(f"![{name.replace('_', ' ')}](curves/{name}.svg)" for name in images)
    return f"## Curves\n\n{shown}" if shown else ""


def _costs(costs: Mapping[str, Row], step: int) -> str:
    from understudy.report import formatting

    rows = [
        [
            role.replace("_", " "),
            f"{cost['tokens']:,.0f}",
            formatting.flops(cost["flops"]),
            formatting.duration(cost["seconds"]),
        ]
        for role, cost in costs.items()
    ]
    if not rows:
        return ""
    total = {
        name: sum(cost[name] for role, cost in costs.items() if role != "evaluation")
        for name in ("tokens", "flops", "seconds")
    }
    rows.append(
        [
            "total without evaluation",
            f"{total['tokens']:,.0f}",
            formatting.flops(total["flops"]),
            formatting.duration(total["seconds"]),
        ]
    )
    head = f"## Cost\n\nUp to step {step}; FLOPs are counted, seconds measured. `costs.json` has the exact numbers.\n\n"
    return head + _table(["role", "tokens", "compute", "time"], rows)


def _limits(what: Exported) -> str:
    lines = ["## What is not said here", ""]
    lines.append(
        "Nothing was measured but what stands above: no safety, bias or contamination tests. The licence, the data and "
        "the intended use are the authors' to describe."
    )
    if what.ends:
        lines[-1] += f" Completions end at token {', '.join(map(str, what.ends))}; `generation_config.json` says so."
    return "\n".join(lines + (["", f"Made with {what.versions}."] if what.versions else []))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *(line(row) for row in rows)])

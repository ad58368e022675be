"""A plan: phases that run in order, each a run of its own, from one TOML file.

Models and rows may be named by what an earlier phase makes: "@start", "@previous", "@phase:<name>", "@samples:<name>".
Importing this module needs neither torch nor transformers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

from pydantic import Field, ValidationError

from understudy.checkpoints import checkpoint_path
from understudy.config import RowsConfig, RunConfig, shown_input
from understudy.config_base import Section, read_toml, set_dotted, toml_value
from understudy.errors import ConfigError

PhaseMethod = Literal["sft", "distill", "rl", "generate", "eval"]
TRAINING = ("sft", "distill", "rl")
# Keys that make rows of a source's records. Samples are rows already.
READING = ("format", "options", "prompt_template", "chat", "subset", "split", "columns")

# Sections that a method does not read; what they name there need not exist.
_UNREAD: Mapping[str, Mapping[str, Any]] = {
    "sft": {"teacher": None, "teachers": {}, "reference": None},
    "distill": {},
    "rl": {"teacher": None, "teachers": {}},
    "generate": {"teachers": {}, "reference": None},
    "eval": {"teacher": None, "teachers": {}, "reference": None, "prompts": None},
}


class GateConfig(Section):
    """What training must not lose."""

    metric: str
    """An evaluation's metric, e.g. "eval/instructions/greedy"; higher is better."""
    max_drop: float = Field(ge=0)
    """How far it may fall below what it is compared with."""
    against: Literal["start", "best", "previous"] = "previous"
    """start: the pipeline's first student. best: the best that the metric was for any student that was kept. previous:
    the student that the phase began with."""
    action: Literal["stop", "roll_back"] = "stop"
    """stop: the pipeline ends. roll_back: the phase's student is left, and the pipeline goes on from the newest one
    that was kept before it."""
    after: tuple[str, ...] = ()
    """Training phases that it follows; absent: all of them."""


class PhaseConfig(Section):
    """One phase. ``config`` is the run's, the plan's defaults included; references in it are still to be resolved, and
    output_dir is the pipeline's to choose."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Part of its folder's name."""
    method: PhaseMethod
    once: bool = False
    """Run in the first cycle only."""
    config: RunConfig

    @property
    def trains(self) -> bool:
        """Whether it makes a student."""
        return self.method in TRAINING


class PipelineConfig(Section):
    """Everything a pipeline needs."""

    output_dir: str
    """The pipeline's folder: new or empty, or continued with --resume."""
    cycles: int = Field(default=1, ge=1)
    """How often the phases run."""
    gates: tuple[GateConfig, ...] = ()
    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    start: str
    """The first student: [student] model of the plan, or of its first phase."""

    @classmethod
    def from_toml(cls, path: str | Path, overrides: Mapping[str, object] = {}) -> Self:
        """Read ``path``. Overrides are dotted keys of the plan's defaults, or ``phases.<name>.<key>`` of one phase.

        Raises ConfigError for a missing or malformed file, unknown keys (with the nearest valid name), wrong types and
        names that are given twice.
        """
        tree = read_toml(Path(path))
        for key, value in overrides.items():
            value = toml_value(value) if isinstance(value, str) else value
            head, _, rest = key.partition(".")
            if head == "phases":
                name, _, own_key = rest.partition(".")
                set_dotted(_phase_table(tree, name, key), own_key, value)
            else:
                set_dotted(tree, key, value)
        return cls.from_tree(tree, str(path))

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], source: str) -> Self:
        """A plan that is already read. Errors name ``source``; raised as by from_toml."""
        own = {"cycles", "gates", "phases"}
        _refuse_unknown(tree, own | RunConfig.model_fields.keys(), f"configuration {source}")
        tables = tree.get("phases")
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            _refuse(f"configuration {source}", "no [[phases]]", "a [[phases]] table for each phase", _EXAMPLE)
        defaults = {key: value for key, value in tree.items() if key not in own | {"output_dir"}}
        heads = {key: tree[key] for key in ("output_dir", "cycles", "gates") if key in tree}
        phases = [_phase(table, defaults, source) for table in tables]
        try:
            plan = cls.model_validate(heads | {"phases": phases, "start": _start(tables[0], defaults, source)})
        except ValidationError as error:
            raise _explain(error, source) from None
        _check_plan(plan, source)
        return plan

    def in_miniature(self, smaller: Callable[[RunConfig], RunConfig]) -> Self:
        """The same plan with every run made ``smaller``, in a folder of its own. Its gates judge and let everything
        pass: what tiny runs lose says nothing."""
        phases = [
            phase.model_copy(update={"config": smaller(phase.config).model_copy(update={"output_dir": ""})})
            for phase in self.phases
        ]
        gates = [gate.model_copy(update={"max_drop": 1e9}) for gate in self.gates]
        update = {"output_dir": f"{self.output_dir}-smoke", "phases": tuple(phases), "gates": tuple(gates)}
        return self.model_copy(update=update)


@dataclass(frozen=True)
class Run:
    """One phase in one cycle; ``number`` counts from 1, ``folder`` is its name within the pipeline's."""

    number: int
    cycle: int
    phase: PhaseConfig
    folder: str


@dataclass(frozen=True)
class Made:
    """What there is so far: the newest student that was kept, and every phase's by (name, cycle)."""

    start: str
    previous: str
    students: Mapping[tuple[str, int], str] = field(default_factory=dict)
    samples: Mapping[tuple[str, int], str] = field(default_factory=dict)

    def after(self, run: Run, output: str, *, kept: bool = True) -> Made:
        """With what ``run`` made, a student or samples. A student that is not ``kept`` is not the newest one."""
        key = (run.phase.name, run.cycle)
        if run.phase.trains:
            previous = output if kept else self.previous
            return replace(self, previous=previous, students={**self.students, key: output})
        return replace(self, samples={**self.samples, key: output}) if run.phase.method == "generate" else self


@dataclass(frozen=True)
class PlannedRun:
    """A run with its configuration, and where it is going to put what it makes (an evaluation makes nothing)."""

    run: Run
    config: RunConfig
    output: str


def runs_of(plan: PipelineConfig) -> list[Run]:
    """Every run in order. Folders are numbered; those of later cycles say which."""
    pairs = [(c, phase) for c in range(1, plan.cycles + 1) for phase in plan.phases if c == 1 or not phase.once]
    suffixes = ["" if cycle == 1 else f"-cycle{cycle}" for cycle, _ in pairs]
    return [
        Run(number, cycle, phase, f"{number:02d}-{phase.name}{suffix}")
        for number, ((cycle, phase), suffix) in enumerate(zip(pairs, suffixes, strict=True), 1)
    ]


def planned_runs(plan: PipelineConfig, made: Made | None = None, *, done: int = 0) -> list[PlannedRun]:
    """The runs after the first ``done``, as they will be if every student is kept.

    Raises ConfigError for references to what is not there by then, and for adapters on top of an earlier phase's.
    """
    made = made or Made(plan.start, plan.start)
    planned: list[PlannedRun] = []
    adapters: dict[str, str] = {}
    for run in runs_of(plan)[done:]:
        one = plan_run(plan, run, made)
        if one.run.phase.trains and one.config.student.lora is not None:
            if one.config.student.model in adapters:
                _refuse(
                    f"phase {run.phase.name}: student.lora",
                    f"adapters on top of those of phase {adapters[one.config.student.model]}",
                    "adapters in one phase, and full fine-tuning in those that go on from it",
                    "drop [student.lora] in one of them, or merge the first phase's adapters and begin from the result",
                )
            adapters[one.output] = run.phase.name
        made = made.after(run, one.output)
        planned.append(one)
    return planned


def plan_run(plan: PipelineConfig, run: Run, made: Made) -> PlannedRun:
    """One run's configuration: "{cycle}" and references replaced, its own folder, and in later cycles another seed."""
    tree = _with_cycle(run.phase.config.model_dump(mode="json"), str(run.cycle))
    folder = Path(plan.output_dir) / run.folder
    tree |= {"output_dir": str(folder), "seed": tree["seed"] + run.cycle - 1}
    config = RunConfig.from_tree(tree, f"of phase {run.phase.name}")
    config = with_models(config, lambda text: _model(text, run, made))
    config = with_rows(config, lambda rows: rows.model_copy(update={"path": _rows(rows.path, run, made)}))
    output = ""
    if run.phase.trains:
        output = str(checkpoint_path(folder / "checkpoints", config.optim.num_steps))
    elif run.phase.method == "generate":
        output = str(folder / "samples.jsonl")
    return PlannedRun(run, config, output)


def with_models(config: RunConfig, rename: Callable[[str], str]) -> RunConfig:
    """``config`` with every model renamed."""

    def renamed(section: Any) -> Any:
        return section and section.model_copy(update={"model": rename(section.model)})

    teachers = {name: renamed(teacher) for name, teacher in config.teachers.items()}
    sections = {name: renamed(getattr(config, name)) for name in ("student", "teacher", "reference")}
    return config.model_copy(update={**sections, "teachers": teachers})


def with_rows(config: RunConfig, change: Callable[[RowsConfig], RowsConfig]) -> RunConfig:
    """``config`` with the rows that it trains on changed: [prompts] and [supervised.mix]."""
    mix = config.supervised.mix
    supervised = config.supervised.model_copy(update={"mix": mix and change(mix)})
    return config.model_copy(update={"prompts": config.prompts and change(config.prompts), "supervised": supervised})


def _model(text: str, run: Run, made: Made) -> str:
    if not text.startswith("@"):
        return text
    if text in ("@start", "@previous"):
        return made.start if text == "@start" else made.previous
    if text.startswith("@phase:"):
        return _newest(text, run, made.students, "training")
    _refuse(
        f"phase {run.phase.name}: model {text}",
        text,
        '"@start", "@previous", "@phase:<name>", "@phase:<name>:<cycle>", a folder or a hub id',
        "docs/pipelines.md says what each of them means",
    )


def _rows(text: str, run: Run, made: Made) -> str:
    if not text.startswith("@"):
        return text
    if text.startswith("@samples:"):
        return _newest(text, run, made.samples, "generate")
    expected = '"@samples:<name>", "@samples:<name>:<cycle>", a file or a hub dataset'
    _refuse(f"phase {run.phase.name}: path {text}", text, expected, "docs/pipelines.md says what each of them means")


def _newest(text: str, run: Run, outputs: Mapping[tuple[str, int], str], kind: str) -> str:
    """What "@kind:name" or "@kind:name:cycle" stands for."""
    _, name, *cycle = text.split(":")
    found = {number: path for (phase, number), path in outputs.items() if phase == name}
    wanted = cycle[0] if cycle else str(max(found, default=0))
    if wanted.isdecimal() and int(wanted) in found and len(cycle) < 2:
        return found[int(wanted)]
    there = list(dict.fromkeys(phase for phase, _ in outputs))
    got = f"cycle {':'.join(cycle)} of phase {name}" if found else f"phase {name}"
    _refuse(
        f"phase {run.phase.name}: {text}",
        f"{got}, which is no {kind} phase that comes before it",
        f"one of {', '.join(there)}" if there else f"a {kind} phase before it; there is none",
        _near(name, there, "name an earlier phase, or change the order of [[phases]]"),
    )


def _with_cycle(node: Any, cycle: str) -> Any:
    """ "{cycle}" replaced in every text."""
    if isinstance(node, dict):
        return {key: _with_cycle(value, cycle) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_cycle(value, cycle) for value in node]
    return node.replace("{cycle}", cycle) if isinstance(node, str) else node


_EXAMPLE = 'e.g. [[phases]] with name = "documents", method = "sft" and its own sections; docs/pipelines.md has a plan'
_HEAD = ("name", "method", "once")


def _phase(table: Mapping[str, Any], defaults: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A phase's head, and its configuration laid over the defaults."""
    where = f"configuration {source}: phase {table.get('name', '(without a name)')}"
    _refuse_unknown(table, {*_HEAD, *RunConfig.model_fields} - {"output_dir"}, where)
    head = {key: table[key] for key in _HEAD if key in table}
    own = {key: value for key, value in table.items() if key not in _HEAD}
    student = own.get("student", {})
    if isinstance(student, dict) and "model" not in student:
        own = merged(own, {"student": {"model": "@previous"}})
    config = RunConfig.from_tree(merged(defaults, own) | {"output_dir": ""}, f"{source}, phase {head.get('name')}")
    config = _plain_samples(config, own, where)
    return head | {"config": config.model_copy(update=_UNREAD.get(str(head.get("method")), {}))}


def _plain_samples(config: RunConfig, own: Mapping[str, Any], where: str) -> RunConfig:
    """Samples are rows already: how the plan's own rows are read does not concern them. Raises ConfigError where the
    phase's ``own`` keys say how to read them."""
    both = {"prompts": config.prompts, "supervised.mix": config.supervised.mix}
    given = {"prompts": own.get("prompts"), "supervised.mix": own.get("supervised", {}).get("mix")}
    for name, rows in both.items():
        for key in READING if rows and rows.path.startswith("@samples:") else ():
            if key in (given[name] or {}):
                expected = "nothing: samples are rows already"
                _refuse(f"{where}: {name}.{key}", f"{given[name][key]!r}", expected, "set it in the generate phase")
    plain = RowsConfig(path="").model_dump(include=set(READING))
    return with_rows(config, lambda rows: rows.model_copy(update=plain if rows.path.startswith("@samples:") else {}))


def _start(first: Mapping[str, Any], defaults: Mapping[str, Any], source: str) -> str:
    """The first student: the first phase's own, else the plan's."""
    shared = defaults.get("student", {})
    model = first.get("student", {}).get("model", "@start")
    if model.startswith("@"):
        model = shared.get("model") if isinstance(shared, dict) else shared
    if not isinstance(model, str) or model.startswith("@") or not isinstance(shared, dict):
        _refuse(
            f"configuration {source}: student.model",
            "nothing" if model is None else repr(model),
            "the model that the pipeline begins with: a folder or a hub id",
            'set it before the phases: [student] with model = "..."',
        )
    return model


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``, table by table; anything but a table is replaced whole."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def _check_plan(plan: PipelineConfig, source: str) -> None:
    """Names that hang together."""
    where = f"configuration {source}"
    names = [phase.name for phase in plan.phases]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        _refuse(where, f"{names.count(twice[0])} phases named {twice[0]}", "different names", "rename one of them")
    trained = [phase.name for phase in plan.phases if phase.trains]
    for gate in plan.gates:
        for name in set(gate.after) - set(trained):
            expected = f"training phases: {', '.join(trained) or 'there is none'}"
            remedy = _near(name, trained, "name a training phase, or drop it")
            _refuse(f"{where}: gates after", name, expected, remedy)
    first = plan.phases[0]
    if plan.cycles > 1 and not first.once and not first.config.student.model.startswith("@"):
        _refuse(
            f"{where}: phase {first.name}: student.model",
            f"{first.config.student.model} in a phase that every cycle begins with: each would start anew",
            "the first student in the plan's own [student], before the phases",
            'move it there; or write "@start" if every cycle is to start anew',
        )


def _phase_table(tree: Mapping[str, Any], name: str, key: str) -> dict[str, Any]:
    tables = [table for table in tree.get("phases", []) if isinstance(table, dict)]
    names = [str(table.get("name")) for table in tables]
    if name not in names:
        _refuse(f"--{key}", f"phase {name}", f"one of {', '.join(names)}", _near(name, names, "name one of them"))
    return tables[names.index(name)]


def _explain(error: ValidationError, source: str) -> ConfigError:
    first = error.errors()[0]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    where = f"configuration {source}: {name}"
    if first["type"] == "missing":
        return ConfigError(where, got="nothing", expected=f"a value for {name}", remedy=f"set {name}")
    if first["type"] == "extra_forbidden":  # only gates come here with keys that nobody has looked at
        remedy = _near(str(first["loc"][-1]), GateConfig.model_fields, "drop it")
        return ConfigError(where, got=f"unknown key {name}", expected="a known key", remedy=remedy)
    return ConfigError(where, got=shown_input(name, first["input"]), expected=first["msg"], remedy=f"change {name}")


def _refuse_unknown(table: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for key in table:
        if key not in known:
            _refuse(where, f"unknown key {key}", "a known key", _near(key, known, f"known are {', '.join(known)}"))


def _near(name: str, known: Collection[str], otherwise: str) -> str:
    near = [one for one in difflib.get_close_matches(name, list(known), n=2) if one != name]
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def _refuse(where: str, got: str, expected: str, remedy: str) -> NoReturn:
    raise ConfigError(where, got=got, expected=expected, remedy=remedy)

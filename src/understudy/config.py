"""One frozen tree describes a run. TOML file first, dotted overrides second, unknown keys refused.

Importing this module needs neither torch nor transformers, so a broken file is reported before either is loaded.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from understudy.config_base import GradedConfig, Section, read_toml, set_dotted, toml_value, usable_path
from understudy.config_guards import GuardsConfig
from understudy.config_kept import CheckpointsConfig, RolloutsConfig, TrackingConfig
from understudy.config_models import Dtype as Dtype
from understudy.config_models import LoraConfig as LoraConfig
from understudy.config_models import StudentConfig, TeacherConfig
from understudy.config_objective import ObjectiveConfig
from understudy.config_rows import MixConfig, PromptsConfig, RowsConfig
from understudy.config_served import SamplerServerConfig
from understudy.errors import ConfigError


class SamplingConfig(Section):
    """How the student writes."""

    group_size: int = Field(default=4, ge=1)
    """Completions per prompt."""
    groups_per_batch: int = Field(default=64, ge=1)
    """Prompts per step."""
    max_completion_tokens: int = Field(default=512, ge=1)
    """A completion is cut here; it then has no end token and its finish_reason is "length"."""
    temperature: float = Field(default=1.0, ge=0)
    """Training samples, scores and differentiates at this one temperature. 0 (greedy) is for evaluation."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus mass; for `generate`, refused in training."""
    top_k: int = Field(default=0, ge=0)
    """0: off; for `generate`, refused in training."""
    stop_token_ids: tuple[int, ...] | None = None
    """What ends a completion. Absent: the model's own end-of-text ids, which student and teacher must share."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a completion, beside stop_token_ids; the token that completes one is its last."""
    max_batch_rows: int = Field(default=256, ge=1)
    """Completions decoded at once, where memory holds as many: changes no result beyond float noise."""
    max_policy_lag: int = Field(default=0, ge=0)
    """How many updates old the weights may be that wrote a step's completions. 0: sample, score, train in turn. Above
    0 (needs a [sampler]): the steps after the one that trains are sampled and scored meanwhile."""
    stale: Literal["correct", "drop"] = "correct"
    """Completions older than max_policy_lag, which a sampler of your own may hand over: train on them by their
    importance ratios, or leave them out. Both are counted."""


class RewardConfig(GradedConfig):
    """How a completion is graded."""


class SupervisedConfig(Section):
    """What one step of `sft` holds."""

    batch_size: int = Field(default=64, ge=1)
    """Sequences per optimizer step."""
    max_tokens: int | None = Field(default=None, ge=2)
    """The longest sequence. Absent: the model's context."""
    mix: MixConfig | None = None
    """A second source of sequences."""


class OptimConfig(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate. Adapters want about ten times that of full fine-tuning."""
    num_steps: int = Field(default=100, ge=1)
    """Optimizer steps."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up; linear and cosine fall towards final_fraction of the peak and reach it one step after the last."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """What linear and cosine fall towards, as a share of the peak: the rate that a step after the last would have."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates: at least 0, below 1."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    grad_clip: float = Field(default=1.0, ge=0)
    """Clip the gradient's norm; 0: never."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens (padding included) in one forward-backward or scoring pass; splitting a step changes no gradient. Absent:
    16384 on a GPU, 2048 on a CPU, whose caches hold no more."""
    packing: bool = False
    """Put several sequences in one row, kept apart by the attention mask, instead of padding."""

    @field_validator("betas")
    @classmethod
    def _rates(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both at least 0 and below 1")
        return betas


class EvalTaskConfig(RowsConfig, GradedConfig):
    """One held-out set of problems."""

    name: str = "eval"
    """Metrics are named eval/<name>/..."""
    grader: str = "exact_match"
    """A grader's name (docs/tasks.md) or "package.module:function"."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """Completions are sampled at each; 0 is greedy."""
    samples: int = Field(default=1, ge=1)
    """Completions per problem at temperatures above 0; greedy decoding needs but one."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus mass."""
    top_k: int = Field(default=0, ge=0)
    """0: off."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Absent: [sampling] max_completion_tokens."""

    @model_validator(mode="after")
    def _samples_have_a_temperature(self) -> Self:
        names = {f"{temperature:g}" for temperature in self.temperatures}  # as metrics have them
        if not names or len(names) < len(self.temperatures) or min(self.temperatures) < 0:
            raise ValueError(f"temperatures: at least one, none twice or below 0; got {list(self.temperatures)}")
        if self.samples > 1 and max(self.temperatures) == 0:
            raise ValueError(f"samples = {self.samples} needs a temperature above 0: greedy ones are all the same")
        return self


class EvaluationConfig(Section):
    """Accuracy on held-out problems while training."""

    every: int = Field(default=0, ge=0)
    """In optimizer steps; 0: only before the first and after the last step."""
    tasks: tuple[EvalTaskConfig, ...] = ()
    """[[evaluation.tasks]] tables."""


class RunConfig(Section):
    """Everything a run needs. `distill`, `rl`, `sft`, `generate` and `eval` read the same tree."""

    output_dir: str
    """The run's folder: new or empty, or continued with --resume."""
    seed: int = Field(default=0, ge=0)
    """All randomness of training and `generate` derives from it. Evaluations draw the same numbers whatever it is."""
    num_threads: int = Field(default=0, ge=0, le=4096)
    """CPU threads of torch; 0: leave torch's choice. Set 1 per process on shared machines."""
    student: StudentConfig
    teacher: TeacherConfig | None = None
    """The default teacher."""
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)
    """Further teachers by name; a row picks one with "teacher"."""
    reference: TeacherConfig | None = None
    """The model r that objective.extrapolation and objective.anchor_coef measure from, e.g. the student as it was. It
    reads the student's prompt."""
    sampler: SamplerServerConfig | None = None
    """A server that writes the student's completions; each update's weights are pushed to it. Absent: this process."""
    prompts: PromptsConfig | None = None
    sampling: SamplingConfig = SamplingConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    reward: RewardConfig | None = None
    supervised: SupervisedConfig = SupervisedConfig()
    optim: OptimConfig = OptimConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    rollouts: RolloutsConfig = RolloutsConfig()
    guards: GuardsConfig = GuardsConfig()
    tracking: TrackingConfig = TrackingConfig()

    _usable_output_dir = field_validator("output_dir")(usable_path)

    @model_validator(mode="before")
    @classmethod
    def _served_teachers_read_as_the_student(cls, tree: Any) -> Any:
        """A served teacher without a model has the student's tokens; its server is asked whether that is so."""
        if not isinstance(tree, Mapping) or not isinstance(tree.get("student"), Mapping):
            return tree
        model = {"model": tree["student"].get("model")}

        def named(teacher: Any) -> Any:
            return {**model, **teacher} if isinstance(teacher, Mapping) and "url" in teacher else teacher

        filled = {role: named(tree[role]) for role in ("teacher", "reference") if role in tree}
        if isinstance(tree.get("teachers"), Mapping):
            filled["teachers"] = {name: named(teacher) for name, teacher in tree["teachers"].items()}
        return {**tree, **filled}

    @model_validator(mode="after")
    def _teacher_named_once(self) -> Self:
        if self.teacher is not None and "default" in self.teachers:
            raise ValueError("[teacher] and [teachers.default] are the same thing; keep one")
        routes = self.prompts.teacher_of_task if self.prompts else {}
        if unknown := sorted(set(routes.values()) - self.all_teachers.keys()) if self.all_teachers else []:
            raise ValueError(f"prompts.teacher_of_task names {unknown}; there are {sorted(self.all_teachers)}")
        names = [task.name for task in self.evaluation.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"evaluation tasks need different names, got {names}")
        return self

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """Every teacher by name; [teacher] is "default"."""
        return ({"default": self.teacher} if self.teacher else {}) | self.teachers

    @property
    def reward_coef(self) -> float:
        """The weight of rewards in force."""
        if self.objective.reward_coef is not None:
            return self.objective.reward_coef
        return 0.0 if self.all_teachers or self.objective.control == "fixed_negative" else 1.0

    @property
    def training_sampling(self) -> SamplingConfig:
        """How training samples: a rollout stops where objective.tokens.first ends what is trained, unless its whole
        answer is graded."""
        if self.first_tokens is None or self.reward_coef > 0:
            return self.sampling
        length = min(self.first_tokens, self.sampling.max_completion_tokens)
        return self.sampling.model_copy(update={"max_completion_tokens": length})

    @property
    def first_tokens(self) -> int | None:
        """objective.tokens.first as a number of tokens."""
        first = self.objective.tokens.first
        if first is None or first >= 1:
            return None if first is None else int(first)
        # Rounded first: 0.07 * 100 is a little more than 7.
        return max(1, math.ceil(round(first * self.sampling.max_completion_tokens, 6)))

    @classmethod
    def from_toml(cls, path: str | Path, overrides: Mapping[str, object] = {}) -> Self:
        """Read `path`, apply dotted `overrides` ({"optim.learning_rate": "1e-4"}; strings are read as TOML values).

        Raises ConfigError for a missing or malformed file, unknown keys (with the nearest valid name) and wrong types.
        """
        tree = read_toml(Path(path))
        for key, value in overrides.items():
            set_dotted(tree, key, toml_value(value) if isinstance(value, str) else value)
        return cls.from_tree(tree, str(path))

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], source: str) -> Self:
        """A file's tree that is already read. Errors name ``source``; raised as by from_toml."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise explain(error, source) from None

    def to_toml(self, header: str = "") -> str:
        """This tree as TOML that from_toml reads back; `header` lines become comments."""
        comments = "".join(f"# {line}\n" for line in header.splitlines())
        return comments + tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def field_rows(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(dotted name, type, default, description) of every key, in reading order."""
    for name, info in model.model_fields.items():
        section = _section_type(info.annotation)
        dotted = f"{prefix}{name}"
        if section is not None:
            repeated = {"teachers": ".<name>", "methods": ".<name>", "tasks": "[]"}.get(name, "")
            yield from field_rows(section, f"{dotted}{repeated}.")
        else:
            default = "required" if info.is_required() else repr(info.get_default(call_default_factory=True))
            yield dotted, _type_name(info.annotation), default, " ".join((info.description or "").split())


def _section_type(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_type(argument)
        if found is not None:
            return found
    return None


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _nearest(name: str, model: type[BaseModel]) -> str:
    """What an unknown key may have meant: a key of its section, a section, a key elsewhere; else its section's keys."""
    generic = re.sub(r"^(teachers|methods)\.[^.]+", r"\1.<name>", re.sub(r"\.(\d+)(?=\.|$)", "[]", name))
    section, _, leaf = generic.rpartition(".")
    known = [row[0] for row in field_rows(model)]
    prefix = f"{section}." if section else ""
    # Keys and sections that stand beside it.
    siblings = list(dict.fromkeys(k[len(prefix) :].split(".")[0] for k in known if k.startswith(prefix)))
    near = [prefix + key for key in difflib.get_close_matches(leaf, siblings, n=2)]
    leaves = [key.rpartition(".")[2] for key in known]
    elsewhere = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    near = near or [key for key in known if key.rpartition(".")[2] in elsewhere][:3]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"[{section}] has {', '.join(siblings)}" if siblings and section else "`understudy keys` lists every key"


def shown_input(name: str, value: object) -> str:
    """A refused value as errors show it: cut where it is long, hidden where it may hold a secret."""
    if name.endswith("api_key_env") or (name.endswith("url") and any(mark in str(value) for mark in "@?#")):
        return "a value that may hold a secret, not shown"
    return repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:200]}..."


def explain(error: ValidationError, path: str, model: type[BaseModel] = RunConfig) -> ConfigError:
    """What ``error`` found in the file ``path``, as one thing to do about it."""
    # A misspelt key often leaves another one missing: the former is the cause.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    name = ".".join(str(part) for part in first["loc"])
    others = f" ({error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
    where = f"configuration {path}: {name}{others}" if name else f"configuration {path}{others}"
    if first["type"] == "extra_forbidden":
        return ConfigError(where, got=f"unknown key {name}", expected="a known key", remedy=_nearest(name, model))
    if first["type"] == "missing":
        description = next((row[3] for row in field_rows(model) if row[0] == name), "")
        return ConfigError(where, got="nothing", expected=description or f"a value for {name}", remedy=f"set {name}")
    got = shown_input(name, first["input"]) if name else first["msg"]
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", first["msg"])
        near = difflib.get_close_matches(str(first["input"]), choices, n=1, cutoff=0.5)
        if near:
            return ConfigError(where, got=got, expected=first["msg"], remedy=f'did you mean "{near[0]}"?')
    return ConfigError(where, got=got, expected=first["msg"], remedy=f"change {name}" if name else "change the file")

"""What methods will cost before any of them runs: FLOPs, GPU hours, memory and money by role."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from understudy import flops
from understudy.config_plan import MethodPlan, ModelPlan, PlanConfig, StudentPlan
from understudy.flops import KNOWN_SHAPES, Flops, ModelShape, Update, adapter_weights, shape_of_config

_ROLES = ("student_sampling", "teacher_sampling", "teacher_scoring", "student_training")
# bfloat16 for what is only read; float32 for the master copy, its gradients and AdamW's two moments.
_HALF, _SINGLE, _MOMENTS = 2, 4, 8


@dataclass(frozen=True)
class SizedModel:
    """A model as far as it is known: ``parameters`` in all, ``active`` ones that a token is multiplied with, and, where
    its products are known, its ``shape``."""

    name: str
    parameters: float
    active: float
    shape: ModelShape | None

    def sampling(self, prompt: int, completions: Sequence[int]) -> Flops | None:
        """A group of completions; None without a shape."""
        return flops.sampling(self.shape, prompt, completions) if self.shape else None


@dataclass(frozen=True)
class RoleCost:
    """One role of one method: tokens it reads and writes, FLOPs by the convention (2N) and counted exactly (None: the
    shape is not known), GPU hours at the role's utilisation."""

    tokens: float
    flops: float
    exact_flops: float | None
    gpu_hours: float


@dataclass(frozen=True)
class MethodCost:
    """A method's roles and what they come to. ``money`` is None without a price."""

    kind: str
    roles: Mapping[str, RoleCost]
    money: float | None

    @property
    def flops(self) -> float:
        """By the convention, over all roles."""
        return sum(role.flops for role in self.roles.values())

    @property
    def exact_flops(self) -> float | None:
        """Counted exactly, over all roles; None where one role's are not known."""
        known = [role.exact_flops for role in self.roles.values() if role.exact_flops is not None]
        return sum(known) if len(known) == len(self.roles) else None

    @property
    def gpu_hours(self) -> float:
        """Over all roles."""
        return sum(role.gpu_hours for role in self.roles.values())

    def of_student(self) -> float:
        """FLOPs by the convention without the teacher's: its scores, or its completions, come free."""
        return sum(role.flops for name, role in self.roles.items() if name.startswith("student"))


@dataclass(frozen=True)
class RoleMemory:
    """Bytes that a role needs, over all the GPUs that share it. ``activations`` is an estimate; it and ``cache`` are
    None where the shape is not known."""

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float | None = None
    cache: float | None = None

    @property
    def total(self) -> float:
        """What is known of it."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0.0) + (self.cache or 0.0)


@dataclass(frozen=True)
class Prediction:
    """The plan's answer."""

    student: SizedModel
    teacher: SizedModel | None
    methods: Mapping[str, MethodCost]
    memory: Mapping[str, RoleMemory]
    warnings: Sequence[str]

    def ratios(self, baseline: str) -> dict[str, dict[str, float]]:
        """The baseline's FLOPs (by the convention) as multiples of each other method's: "completions exist", neither
        pays for what a teacher writes beforehand; "teacher free", nor for its marks; "all in", for everything."""

        def beforehand(method: MethodCost) -> float:
            written = method.roles.get("teacher_sampling")
            return method.flops - (written.flops if written else 0.0)

        base = self.methods[baseline]
        return {
            name: {
                "completions exist": beforehand(base) / beforehand(method),
                "teacher free": base.of_student() / method.of_student(),
                "all in": base.flops / method.flops,
            }
            for name, method in self.methods.items()
            if name != baseline
        }

    def to_json(self, plan: PlanConfig) -> dict[str, Any]:
        """For machines: FLOPs, hours, bytes and the plan itself."""
        methods = {
            name: {
                "kind": method.kind,
                "roles": {role: asdict(cost) for role, cost in method.roles.items()},
                "flops": method.flops,
                "exact_flops": method.exact_flops,
                "gpu_hours": method.gpu_hours,
                "money": method.money,
            }
            for name, method in self.methods.items()
        }
        return {
            "schema_version": 1,
            "student": asdict(self.student),
            "teacher": asdict(self.teacher) if self.teacher else None,
            "methods": methods,
            "memory_bytes": {role: asdict(memory) | {"total": memory.total} for role, memory in self.memory.items()},
            "ratios": self.ratios(plan.baseline) if plan.baseline else {},
            "assumptions": [*plan.assumptions, *self.warnings],
            "plan": plan.model_dump(mode="json", exclude_none=True),
        }


def predict(plan: PlanConfig) -> Prediction:
    """Every method of the plan. Raises ConfigError for a model whose sizes cannot be found."""
    warnings: list[str] = []
    student = size_of(plan.student, "student", warnings)
    teacher = size_of(plan.teacher, "teacher", warnings) if plan.teacher else None
    update = _update(plan.student)
    if update.rank and student.shape and student.shape.experts and update.targets == "all-linear":
        warnings.append("adapters on experts are not counted: peft merges them into the weights in every pass")
    methods = {name: _method(method, plan, student, teacher, update) for name, method in plan.methods.items()}
    return Prediction(student, teacher, methods, _memory(plan, student, teacher, update), warnings)


# Models


def size_of(model: ModelPlan, role: str, warnings: list[str]) -> SizedModel:
    """A model's sizes, from the plan, the table of known ones, a folder, or the hub. ``warnings`` is added to where
    FLOPs can only be counted by the convention."""
    if model.parameters is not None:
        return SizedModel(f"{model.parameters:.3g} weights", model.parameters, model.parameters, None)
    if model.shape is not None:
        return _sized("the given shape", model.shape.to_shape())
    assert model.model is not None
    if model.model in KNOWN_SHAPES and not Path(model.model).exists():
        return _sized(model.model, KNOWN_SHAPES[model.model])
    return _from_transformers(model.model, role, warnings)


def _sized(name: str, shape: ModelShape) -> SizedModel:
    return SizedModel(name, shape.parameters, shape.active_weights, shape)


def _from_transformers(name: str, role: str, warnings: list[str]) -> SizedModel:
    import torch
    from huggingface_hub.utils import logging
    from transformers import AutoConfig, AutoModelForCausalLM

    from understudy.model_files import adapter_base, unreadable

    logging.set_verbosity_error()  # no line for each of its attempts: the error below says it once
    base = adapter_base(Path(name)) or name
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except Exception as error:  # as in tokenization.load_text
        raise unreadable(
            error,
            name,
            role,
            expected="a folder with config.json, a hub id that can be reached, or one of "
            f"{', '.join(list(KNOWN_SHAPES)[:3])}, ... ({len(KNOWN_SHAPES)} are known without a network)",
            remedy=f"give a model of the same sizes, e.g. --{role}.model Qwen/Qwen3-8B; or, in a plan, the sizes "
            f"themselves: [{role}.shape] hidden = ..., layers = ..., or {role}.parameters = 8e9 alone",
        ) from None
    shape = shape_of_config(config)
    if shape is not None:
        return _sized(name, shape)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    parameters = sum(p.numel() for p in model.parameters())
    active = parameters - (0 if embedding is head else embedding.numel())
    warnings.append(
        f"{name} ({config.model_type}): its products are not known, so that FLOPs are counted by the convention alone, "
        "2N per token, with all of its experts if it has any"
    )
    return SizedModel(name, parameters, active, None)


def _update(student: StudentPlan) -> Update:
    lora = student.lora
    return Update(
        rank=lora.rank if lora else 0,
        targets=lora.target_modules if lora else "all-linear",
        recompute=student.gradient_checkpointing,
    )


# FLOPs and hours


def _method(
    method: MethodPlan, plan: PlanConfig, student: SizedModel, teacher: SizedModel | None, update: Update
) -> MethodCost:
    """Roles in the order of a step."""
    prompt, group = method.prompt_tokens, [method.completion_tokens] * method.group_size
    groups = method.steps * method.prompts_per_step
    tokens = method.sequences * (prompt + method.completion_tokens)
    hardware = plan.hardware
    roles: dict[str, RoleCost] = {}

    def add(role: str, tokens: float, convention: float, exact: Flops | None, utilisation: float) -> None:
        counted = exact.total * groups if exact else None
        hours = (convention if counted is None else counted) / (hardware.peak * utilisation) / 3600
        roles[role] = RoleCost(tokens, convention, counted, hours)

    use = hardware.utilisation
    shared = _shares_prompt(prompt, group)
    if method.kind in ("rl", "distill"):
        written = student.sampling(prompt, group)
        add("student_sampling", tokens, 2 * _active(student, update) * tokens, written, use.sampling)
    if method.kind == "sft" and teacher is not None and method.teacher_completion_tokens != 0:
        length = method.teacher_completion_tokens or method.completion_tokens
        read = method.sequences * (prompt + length)
        written = teacher.sampling(prompt, [length] * method.group_size)
        add("teacher_sampling", read, 2 * teacher.active * read, written, use.sampling)
    if method.kind == "distill":
        assert teacher is not None
        marked = flops.scoring(teacher.shape, prompt, group, shared=shared) if teacher.shape else None
        marked = marked + Flops(head=marked.head) if marked and method.estimator == "topk" else marked
        add("teacher_scoring", tokens, 2 * teacher.active * tokens, marked, use.scoring)
    trained = None
    if student.shape:
        shared = shared and not update.recompute  # a cache cannot be written twice
        trained = flops.training(student.shape, prompt, group, update, shared=shared)
        if method.kind == "distill" and method.estimator == "full" and teacher is not None and teacher.shape:
            trained += Flops(head=2.0 * teacher.shape.head_weights * sum(group))
    per_token = 4 * _active(student, update) + 2 * _trainable(student, update)
    add("student_training", tokens, per_token * tokens, trained, use.training)
    hours = sum(role.gpu_hours for role in roles.values())
    return MethodCost(method.kind, roles, None if hardware.price is None else hours * hardware.price)


def _shares_prompt(prompt: int, group: Sequence[int]) -> bool:
    """Whether scoring and training put the group behind one prompt."""
    from understudy.batching import plan_batches
    from understudy.types import TokenSequence

    rows: Any = [TokenSequence(range(prompt), range(length)) for length in group]
    return plan_batches(rows, max_tokens=sys.maxsize, share_prompts=True)[0][0] == "shared"


def _trainable(student: SizedModel, update: Update) -> float:
    """Weights that train, of those a token is multiplied with. Without a shape adapters are taken for nothing."""
    if not update.rank:
        return student.active
    return adapter_weights(student.shape, update) if student.shape else 0.0


def _active(student: SizedModel, update: Update) -> float:
    """The convention's N: adapters are weights too."""
    return student.active + (_trainable(student, update) if update.rank else 0.0)


# Memory


def _memory(plan: PlanConfig, student: SizedModel, teacher: SizedModel | None, update: Update) -> dict[str, RoleMemory]:
    """Of each role that occurs, for the method that needs most. Under full fine-tuning the student is sampled from a
    bfloat16 copy of its float32 weights; under adapters both roles read one bfloat16 base."""
    hardware = plan.hardware
    found: dict[str, RoleMemory] = {}
    for method in plan.methods.values():
        length, rows = method.prompt_tokens + method.completion_tokens, method.prompts_per_step * method.group_size
        rows = min(rows, hardware.rows_at_once)
        written = method.prompt_tokens + (method.teacher_completion_tokens or method.completion_tokens)
        needs: dict[str, RoleMemory] = {}
        if method.kind in ("rl", "distill"):
            needs["student_sampling"] = RoleMemory(_HALF * student.parameters, cache=_cache(student, rows, length))
        if teacher and method.kind == "sft" and method.teacher_completion_tokens != 0:
            needs["teacher_sampling"] = RoleMemory(_HALF * teacher.parameters, cache=_cache(teacher, rows, written))
        tokens = min(hardware.micro_batch_tokens, length * method.prompts_per_step * method.group_size)
        if teacher and method.kind == "distill":
            layer = _HALF * tokens * _layer_numbers(teacher.shape) if teacher.shape else None
            needs["teacher_scoring"] = RoleMemory(_HALF * teacher.parameters, activations=layer)
        trainable = _trainable(student, update) if update.rank else student.parameters
        needs["student_training"] = RoleMemory(
            weights=_HALF * student.parameters + _SINGLE * trainable if update.rank else _SINGLE * trainable,
            gradients=_SINGLE * trainable,
            optimizer=_MOMENTS * trainable,
            activations=_kept(student.shape, tokens, update) if student.shape else None,
        )
        for role, memory in needs.items():
            if role not in found or memory.total > found[role].total:
                found[role] = memory
    return {role: found[role] for role in _ROLES if role in found}


def _cache(model: SizedModel, rows: int, length: int) -> float | None:
    return float(_HALF * rows * model.shape.cache_numbers(length)) if model.shape else None


def _layer_numbers(shape: ModelShape) -> int:
    """Numbers a token leaves in a layer: the inputs of its norms and matrices, q, k, v, attention's result, and the
    MLP's three. An estimate: fused kernels keep fewer, eager attention many more."""
    queries, keys = shape.heads * shape.head_dim, 2 * shape.kv_heads * shape.head_dim
    width = max(shape.intermediate if shape.expert_layers < shape.layers else 0, _experts_width(shape))
    return 4 * shape.hidden + 2 * queries + keys + 4 * width


def _experts_width(shape: ModelShape) -> int:
    return shape.active_experts * shape.expert_intermediate + shape.shared_intermediate


def _kept(shape: ModelShape, tokens: int, update: Update) -> float:
    """Bytes kept for the backward pass: every layer's numbers, or with recomputation every layer's input and one
    layer's numbers."""
    layer = _layer_numbers(shape)
    return _HALF * tokens * (shape.layers * shape.hidden + layer if update.recompute else shape.layers * layer)


def gpus_for(memory: RoleMemory, plan: PlanConfig) -> int:
    """GPUs that hold it together."""
    return math.ceil(memory.total / plan.hardware.memory)

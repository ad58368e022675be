"""Configuration -> the parts a loop works with. Models are loaded here, after everything cheaper has been checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from understudy.advantages import CreditRules
from understudy.backends.loading import (
    LanguageModel,
    check_packing,
    fast_bfloat16,
    load_model,
    load_student,
    meta_shape,
    pick_device,
)
from understudy.backends.local import LocalSampler, LocalTeacher, LocalTrainer
from understudy.backends.protocols import Sampler, Teacher, Trainer
from understudy.config import RunConfig, TeacherConfig
from understudy.costs import CostLedger, MeteredSampler, MeteredTeacher, MeteredTrainer
from understudy.errors import ConfigError
from understudy.evaluation import EvalTask
from understudy.objectives import Objective
from understudy.preflight import Checked
from understudy.prompts import batch_for_step
from understudy.rollouts import step_seed
from understudy.signals import Needs, build_objective, credit_rules, resolve_estimator, score_needs
from understudy.tasks import Grader
from understudy.teacher_scores import score_rollouts
from understudy.tokenization import adapter_base
from understudy.types import Prompt

log = logging.getLogger("understudy")

# Below this size a forward pass on a CPU is not dominated by matrix products, and bfloat16 gains nothing.
_BF16_MIN_PARAMETERS = 5_000_000
# "Far below the reverse KL": a lower-precision teacher may err by this share of the signal.
_BF16_MAX_ERROR_SHARE = 0.05


@dataclass(frozen=True)
class Parts:
    """The loop's working parts, and its settings in the form its stages take them.

    ``page_teachers`` and ``page_reference`` are off the cost ledger: what pages show is not part of a method's price.
    """

    config: RunConfig
    sampler: Sampler
    teachers: Mapping[str, Teacher]
    page_teachers: Mapping[str, Teacher]
    reference: Teacher | None
    page_reference: Teacher | None
    trainer: Trainer
    evaluator: Sampler
    objective: Objective
    needs: Needs
    grader: Grader | None
    prompts: Sequence[Prompt]
    tasks: Sequence[EvalTask]
    decode: Callable[[Sequence[int]], str]
    batching: Mapping[str, Any]
    credit: CreditRules

    def prompts_at(self, step: int) -> list[Prompt]:
        """The prompts of step ``step``."""
        sampling = self.config.sampling
        rows = batch_for_step(
            len(self.prompts),
            sampling.groups_per_batch,
            seed=self.config.seed,
            step=step,
            shuffle=self.config.prompts is None or self.config.prompts.shuffle,
        )
        return [self.prompts[row] for row in rows]


@dataclass(frozen=True)
class Given:
    """Parts a caller brings instead of the configured ones."""

    sampler: Sampler | None = None
    teachers: Mapping[str, Teacher] | None = None
    trainer: Trainer | None = None
    grader: Grader | None = None


def set_threads(config: RunConfig) -> None:
    """Apply ``num_threads``."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)


def assemble(config: RunConfig, checked: Checked, costs: CostLedger, *, checkpoint: Path | None, given: Given) -> Parts:
    """Load the models that are not ``given`` and resolve what "auto" means here. ``Parts.config`` is the resolved
    tree."""
    set_threads(config)
    _check_given(config, checked, given)
    temperature = config.sampling.temperature
    student = _student(config, checked, checkpoint, given)
    sizes = student.matmul_parameters() if student else (0, 0)
    sampler = given.sampler or LocalSampler(_present(student), stop_ids=checked.stop_ids)
    trainer = given.trainer or LocalTrainer(_present(student), config.optim, temperature=temperature)
    teachers, config = _teachers(config, checked, student, sampler, given)
    reference, config = _reference(config, checked, student, sampler)
    effective = resolve_estimator(config, teachers)
    config = _resolve_rest(_with_estimator(config, effective.objective.estimator, bool(teachers)), checked, student)
    return Parts(
        config=config,
        sampler=MeteredSampler(sampler, costs, "student_sampling", sizes[0]),
        teachers={name: MeteredTeacher(teacher, costs, _size(teacher)) for name, teacher in teachers.items()},
        page_teachers=teachers,
        reference=MeteredTeacher(reference, costs, _size(reference), "reference_scoring") if reference else None,
        page_reference=reference,
        trainer=MeteredTrainer(trainer, costs, sizes),
        evaluator=MeteredSampler(sampler, costs, "evaluation", sizes[0]),
        objective=build_objective(effective, teachers, reference),
        needs=score_needs(effective.objective),
        grader=given.grader or checked.grader,
        prompts=checked.prompts,
        tasks=checked.tasks,
        decode=checked.decode,
        batching={
            "micro_batch_tokens": config.optim.micro_batch_tokens,
            "packing": config.optim.packing,
            "device": student.device if student else "cpu",
            "dtype": torch.float64 if student and student.dtype == torch.float64 else torch.float32,
        },
        credit=credit_rules(effective, special_ids=checked.special_ids),
    )


def _with_estimator(config: RunConfig, estimator: str, taught: bool) -> RunConfig:
    """ "auto" replaced by what it became. What else was asked for stays, though it may not apply without a teacher."""
    if config.objective.estimator != "auto":
        return config
    if taught:
        log.info("objective.estimator: auto -> %s", estimator)
    return config.model_copy(update={"objective": config.objective.model_copy(update={"estimator": estimator})})


def _student(config: RunConfig, checked: Checked, checkpoint: Path | None, given: Given) -> LanguageModel | None:
    """The model that is trained in this process, if any."""
    if isinstance(given.trainer, LocalTrainer):
        student = given.trainer.model
    elif given.sampler is None or given.trainer is None:
        _check_student(config)
        student = load_student(config.student, vocab_size=checked.vocab_size, weights=checkpoint, seed=config.seed)
        log.info("student %s: %s on %s", config.student.model, _dtype_name(student), student.device)
    else:
        return None
    if config.optim.packing:
        check_packing(student)
    return student


def _check_student(config: RunConfig) -> None:
    """What evaluation can do with a student and training cannot."""
    student = config.student
    if student.lora is not None and (base := adapter_base(Path(student.model))) is not None:
        raise ConfigError(
            "student.lora",
            got=f"new adapters for {student.model}, which is itself a folder of adapters",
            expected="a whole model: a checkpoint holds the new adapters alone, and would be read on top of "
            f"{base} without the old ones",
            remedy="merge and save first: AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()"
            ".save_pretrained(merged), with the tokenizer beside it; or drop [student.lora]",
        )
    if student.dtype == "float16":
        raise ConfigError(
            "student.dtype",
            got="float16",
            expected="a dtype to train in: gradients leave float16's range",
            remedy='use "bfloat16" or "float32"',
        )
    if student.dtype == "bfloat16" and student.lora is None:
        log.warning(
            "student.dtype = bfloat16 without [student.lora]: there is no float32 master copy, and updates below about "
            "1/256 of a weight round away"
        )


def _dtype_name(model: LanguageModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _resolve_rest(config: RunConfig, checked: Checked, student: LanguageModel | None) -> RunConfig:
    """The student's dtype, what ends a completion and the weight of rewards, as they came out."""
    stop_ids = config.sampling.stop_token_ids
    # A resumed run's are stored; what was read from the models may be another thing by now.
    if stop_ids is not None and frozenset(stop_ids) != checked.stop_ids:
        raise ConfigError(
            "sampling.stop_token_ids",
            got=f"{sorted(checked.stop_ids)}",
            expected=f"{list(stop_ids)}, as the run began",
            remedy=f"set sampling.stop_token_ids = {list(stop_ids)}",
        )
    update: dict[str, Any] = {}
    if stop_ids is None:
        resolved = tuple(sorted(checked.stop_ids))
        update["sampling"] = config.sampling.model_copy(update={"stop_token_ids": resolved})
    if checked.prompts:  # `sft` has no rewards to weigh
        update["objective"] = config.objective.model_copy(update={"reward_coef": config.reward_coef})
    if student:
        update["student"] = config.student.model_copy(update={"dtype": _dtype_name(student)})
    return config.model_copy(update=update)


def _check_given(config: RunConfig, checked: Checked, given: Given) -> None:
    """Refuse parts that would work, but not together."""
    writes = bool(checked.prompts or checked.tasks)
    if writes and given.trainer is not None and given.sampler is None and not isinstance(given.trainer, LocalTrainer):
        raise ConfigError(
            "trainer",
            got=f"a {type(given.trainer).__name__} without a sampler",
            expected="a sampler that writes with this trainer's weights; the configured one would never see an update",
            remedy="pass sampler=... too",
        )
    if given.sampler is not None and given.trainer is None:
        raise ConfigError(
            "sampler",
            got=f"a {type(given.sampler).__name__} without a trainer",
            expected="the trainer whose weights it writes with; the configured one's updates would not reach it",
            remedy="pass trainer=... too",
        )
    for name, teacher in (given.teachers or {}).items():
        temperature = getattr(teacher, "temperature", 1.0)
        if temperature != config.sampling.temperature:
            raise ConfigError(
                f"teacher {name!r}",
                got=f"log-probabilities at temperature {temperature}, sampling.temperature = "
                f"{config.sampling.temperature}",
                expected="one temperature: the reverse KL would compare two different distributions",
                remedy="set sampling.temperature = 1; or give the teacher an attribute `temperature`, and let it score "
                "at that",
            )
        if "hidden" in teacher.kinds and not hasattr(teacher, "head"):
            raise ConfigError(
                f"teacher {name!r}",
                got='"hidden" among its kinds, and no attribute `head`',
                expected="an LMHead, which turns its hidden states into logits",
                remedy='add it, or leave "hidden" out of kinds',
            )
    if given.teachers is not None:
        resolve_estimator(config, given.teachers)  # raises where they cannot give what the objective needs
    names = {prompt.teacher for prompt in checked.prompts}
    if given.teachers is not None and not names <= given.teachers.keys():
        raise ConfigError(
            "teachers",
            got=", ".join(sorted(given.teachers)) or "none",
            expected=f"one for each that the rows name: {', '.join(sorted(names))}",
            remedy='pass teachers={name: teacher}; rows that name none go to "default"',
        )


def _present(student: LanguageModel | None) -> LanguageModel:
    assert student is not None
    return student


def _size(teacher: Teacher) -> int:
    """Weights a scored token passes; 0 where that is not known (a caller's own teacher)."""
    return teacher.model.matmul_parameters()[0] if isinstance(teacher, LocalTeacher) else 0


def _teachers(
    config: RunConfig,
    checked: Checked,
    student: LanguageModel | None,
    sampler: Sampler,
    given: Given,
) -> tuple[dict[str, Teacher], RunConfig]:
    """Teachers by name, and the configuration with their dtypes resolved."""
    if given.teachers is not None:
        return dict(given.teachers), config
    teachers: dict[str, Teacher] = {}
    resolved: dict[str, TeacherConfig] = {}
    for name, teacher_config in config.all_teachers.items():
        prompts = [p for p in checked.prompts if p.teacher == name]
        teacher, dtype = _load_teacher(teacher_config, config, checked, student, sampler, prompts)
        teachers[name] = teacher
        resolved[name] = teacher_config.model_copy(update={"dtype": dtype})
        log.info("teacher %s: %s on %s", teacher_config.model, dtype, teacher.model.device)
    default = resolved.pop("default", None)
    return teachers, config.model_copy(update={"teacher": default, "teachers": resolved})


def _reference(
    config: RunConfig, checked: Checked, student: LanguageModel | None, sampler: Sampler
) -> tuple[LocalTeacher | None, RunConfig]:
    """The reference model, if there is one, and the configuration with its dtype resolved."""
    if config.reference is None or not checked.prompts:  # `sft` has no use for it
        return None, config
    prompts = [
        replace(prompt, teacher_prompt_ids=None) for prompt in checked.prompts
    ]  # it reads what the student reads
    reference, dtype = _load_teacher(config.reference, config, checked, student, sampler, prompts, role="reference")
    log.info("reference %s: %s on %s", config.reference.model, dtype, reference.model.device)
    return reference, config.model_copy(update={"reference": config.reference.model_copy(update={"dtype": dtype})})


def _load_teacher(
    teacher: TeacherConfig,
    config: RunConfig,
    checked: Checked,
    student: LanguageModel | None,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    *,
    role: str = "teacher",
) -> tuple[LocalTeacher, str]:
    """A frozen teacher and the name of the dtype it ended up in."""
    device = student.device if teacher.device == "auto" and student else pick_device(teacher.device)

    def load(dtype: torch.dtype) -> LocalTeacher:
        model = load_model(teacher.model, role=role, dtype=dtype, device=device).requires_grad_(False)
        return LocalTeacher(
            LanguageModel(model, vocab_size=checked.vocab_size),
            temperature=config.sampling.temperature,
            batch_tokens=config.optim.micro_batch_tokens,
        )

    if teacher.dtype != "auto":
        return load(getattr(torch, teacher.dtype)), teacher.dtype
    shape = meta_shape(teacher.model, role=role)
    if student is not None and shape == student.shape:
        log.info("%s %s has the student's shape: scored in the student's dtype", role, teacher.model)
        return load(student.dtype), _dtype_name(student)
    if _too_large_to_compare(sum(shape), device):
        log.info("%s %s in bfloat16: two precisions of it do not fit in memory to be compared", role, teacher.model)
        return load(torch.bfloat16), "bfloat16"
    loaded = load(torch.float32)
    large = sum(shape) >= _BF16_MIN_PARAMETERS
    if not (large and fast_bfloat16(device) and prompts):
        return loaded, "float32"
    half = load(torch.bfloat16)
    error, signal = _precision_error(loaded, half, sampler, prompts, config)
    chosen = error <= _BF16_MAX_ERROR_SHARE * signal
    log.info(
        "%s %s in %s: bfloat16 errs by %.4f nats a token against a reverse KL of %.4f",
        role,
        teacher.model,
        "bfloat16" if chosen else "float32",
        error,
        signal,
    )
    return (half, "bfloat16") if chosen else (loaded, "float32")


def _too_large_to_compare(num_parameters: int, device: torch.device) -> bool:
    """Whether a float32 and a bfloat16 copy would not fit on this GPU (a CPU has the host's memory)."""
    if device.type != "cuda":
        return False
    return 6 * num_parameters > 0.8 * torch.cuda.mem_get_info(device)[0]


def _precision_error(
    exact: LocalTeacher, half: LocalTeacher, sampler: Sampler, prompts: Sequence[Prompt], config: RunConfig
) -> tuple[float, float]:
    """(mean |difference| of the two precisions, mean reverse KL), nats per token, on a few of the student's
    completions."""
    length = min(64, config.sampling.max_completion_tokens)
    sampling = config.sampling.model_copy(update={"group_size": 1, "max_completion_tokens": length})
    groups = sampler.sample(list(prompts[:16]), sampling, seed=step_seed(config.seed, 2**31))
    rollouts = [rollout for group in groups for rollout in group]
    names = {rollout.prompt.teacher for rollout in rollouts}
    exact_scores = score_rollouts(dict.fromkeys(names, exact), rollouts, "sampled")
    half_scores = score_rollouts(dict.fromkeys(names, half), rollouts, "sampled")
    errors, gaps = [], []
    for rollout, right, rough in zip(rollouts, exact_scores, half_scores, strict=True):
        errors += [abs(a - b) for a, b in zip(right.teacher_logprobs, rough.teacher_logprobs, strict=True)]
        gaps += [p - q for p, q in zip(rollout.sampler_logprobs, right.teacher_logprobs, strict=True)]
    return sum(errors) / len(errors), sum(gaps) / len(gaps)

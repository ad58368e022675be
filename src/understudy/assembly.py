"""Configuration -> the parts a loop works with. Models are loaded here, after everything cheaper has been checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from understudy.advantages import CreditRules
from understudy.backends.language_model import LanguageModel, check_packing
from understudy.backends.loading import default_micro_batch_tokens, load_student
from understudy.backends.local import LocalSampler, LocalTeacher, LocalTrainer
from understudy.backends.protocols import Sampler, Teacher, Trainer
from understudy.backends.vllm_sampler import VllmSampler
from understudy.config import RunConfig
from understudy.connect import RemoteTeacher, check_sampler, connect_sampler, connect_teachers
from understudy.costs import CostLedger, MeteredSampler, MeteredTrainer
from understudy.errors import ConfigError
from understudy.evaluation import EvalTask
from understudy.metering import counted_model, matmul_sizes, metered
from understudy.model_files import adapter_base
from understudy.objectives import Objective
from understudy.precision import check_compute_dtype, choose_compute_dtype, compute_autocast
from understudy.preflight import Checked
from understudy.prompts import batch_for_step
from understudy.signals import Needs, build_objective, credit_rules, resolve_estimator, score_needs
from understudy.tasks import Grader
from understudy.teachers import load_reference, load_teachers, warn_of_idle_caches
from understudy.types import Prompt

log = logging.getLogger("understudy")


@dataclass(frozen=True)
class Parts:
    """The loop's working parts, and its settings in the form its stages take them.

    ``page_teachers`` and ``page_reference`` are off the cost ledger: what pages show is not part of a method's price.
    ``student``: the model that is trained in this process, if one is; ``marker``: its weights as a teacher, off the
    ledger too, unless the trainer was brought along.
    ``may_be_away``: teachers without whose marks a step may do. ``cancel``: ends what servers are being asked;
    ``connections``: to be closed after the run.
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
    student: LanguageModel | None = None
    marker: LocalTeacher | None = None
    may_be_away: frozenset[str] = frozenset()
    cancel: Callable[[], None] = lambda: None
    connections: ExitStack = field(default_factory=ExitStack)

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

    @property
    def roles(self) -> frozenset[str]:
        """Those whose configured weights are not read."""
        student = isinstance(self.trainer, LocalTrainer) or (self.sampler is not None and self.trainer is not None)
        return frozenset(["student"] * student + ["teacher"] * (self.teachers is not None))


def set_threads(config: RunConfig) -> None:
    """Apply ``num_threads``."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)


def assemble(
    config: RunConfig,
    checked: Checked,
    costs: CostLedger,
    *,
    checkpoint: Path | None,
    given: Given,
    before_update: Callable[[], None] = lambda: None,
) -> Parts:
    """Load the models that are not ``given`` and resolve what "auto" means here. ``Parts.config`` is the resolved
    tree. ``before_update`` is called whenever weights are about to change."""
    set_threads(config)
    _check_given(config, checked, given)
    with ExitStack() as connections:
        parts = _assemble(config, checked, costs, checkpoint, given, connections, before_update)
        return replace(parts, connections=connections.pop_all())


def _assemble(
    config: RunConfig,
    checked: Checked,
    costs: CostLedger,
    checkpoint: Path | None,
    given: Given,
    connections: ExitStack,
    before_update: Callable[[], None],
) -> Parts:
    remote = connect_teachers(config, checked, connections, brought=given.teachers is not None)
    if config.sampler is not None and given.sampler is None:
        check_sampler(config, checked)
    student = _student(config, checked, checkpoint, given)
    sizes, counted = matmul_sizes(student), counted_model(student, config.student)
    config = _with_micro_batches(config, student)
    sampler, trainer, config = _sampler_and_trainer(config, checked, student, given, connections)
    teachers, kept, config = load_teachers(config, checked, student, sampler, given.teachers, remote, connections)
    reference, keep_reference, config = load_reference(
        config, checked, student, sampler, remote.get("reference"), connections
    )
    effective = resolve_estimator(config, teachers)
    warn_of_idle_caches(config, score_needs(effective.objective, teachers).teacher)
    config = _resolve_rest(_with_estimator(config, effective.objective.estimator, bool(teachers)), checked, student)
    return Parts(
        config=config,
        sampler=MeteredSampler(sampler, costs, "student_sampling", sizes[0], counted),
        # Marks that were kept cost nothing: the meter is behind the cache.
        teachers={
            name: kept[name](metered(teacher, costs, "teacher_scoring", config.all_teachers.get(name), config.student))
            for name, teacher in teachers.items()
        },
        page_teachers={name: kept[name](teacher) for name, teacher in teachers.items()},
        reference=keep_reference(metered(reference, costs, "reference_scoring", config.reference, config.student))
        if reference
        else None,
        page_reference=keep_reference(reference) if reference else None,
        trainer=MeteredTrainer(trainer, costs, sizes, counted, before_update=before_update),
        evaluator=MeteredSampler(sampler, costs, "evaluation", sizes[0], counted),
        objective=build_objective(effective, teachers, reference),
        needs=score_needs(effective.objective, teachers),
        grader=given.grader or checked.grader,
        prompts=checked.prompts,
        tasks=checked.tasks,
        decode=checked.decode,
        batching={
            "micro_batch_tokens": config.optim.micro_batch_tokens,
            "packing": config.optim.packing,
            "share_prompts": student is not None and student.shares_prompts,
            "device": student.device if student else "cpu",
            "dtype": torch.float64 if student and student.dtype == torch.float64 else torch.float32,
        },
        credit=credit_rules(effective, special_ids=checked.special_ids),
        student=student,
        marker=None if student is None or given.trainer is not None else _marker(config, student),
        may_be_away=frozenset(name for name, role in config.all_teachers.items() if role.when_away == "skip"),
        cancel=partial(_cancel, [*remote.values(), *([sampler] if isinstance(sampler, VllmSampler) else [])]),
    )


def _cancel(clients: Sequence[RemoteTeacher | VllmSampler]) -> None:
    for client in clients:
        client.cancel()


def _with_estimator(config: RunConfig, estimator: str, taught: bool) -> RunConfig:
    """ "auto" replaced by what it became. What else was asked for stays, though it may not apply without a teacher."""
    if config.objective.estimator != "auto":
        return config
    if taught:
        log.info("objective.estimator: auto -> %s", estimator)
    return config.model_copy(update={"objective": config.objective.model_copy(update={"estimator": estimator})})


def _with_micro_batches(config: RunConfig, student: LanguageModel | None) -> RunConfig:
    """The size of micro-batches, where the file gives none."""
    if config.optim.micro_batch_tokens is not None:
        return config
    tokens = default_micro_batch_tokens(student.device if student else torch.device("cpu"))
    return config.model_copy(update={"optim": config.optim.model_copy(update={"micro_batch_tokens": tokens})})


def _student(config: RunConfig, checked: Checked, checkpoint: Path | None, given: Given) -> LanguageModel | None:
    """The model that is trained in this process, if any."""
    if isinstance(given.trainer, LocalTrainer):
        student = given.trainer.model
    elif given.sampler is None or given.trainer is None:
        _check_student(config)
        student = load_student(config.student, vocab_size=checked.vocab_size, weights=checkpoint, seed=config.seed)
        log.info("student %s: %s on %s", config.student.model, student.dtype_name, student.device)
    else:
        return None
    if config.optim.packing:
        check_packing(student)
    return student


def _sampler_and_trainer(
    config: RunConfig, checked: Checked, student: LanguageModel | None, given: Given, connections: ExitStack
) -> tuple[Sampler, Trainer, RunConfig]:
    """Both in the precision that ``student.compute_dtype`` resolves to."""

    def in_precision(autocast: torch.dtype | None) -> tuple[Sampler, Trainer]:
        temperature = config.sampling.temperature
        trainer = given.trainer or LocalTrainer(
            _present(student), config.optim, temperature=temperature, autocast=autocast
        )
        if given.sampler is not None:
            return given.sampler, trainer
        if config.sampler is not None:
            return connect_sampler(config, checked, trainer, connections), trainer
        shadow = student.copy_in(autocast) if student and autocast else None
        sampler = LocalSampler(_present(student), stop_ids=checked.stop_ids, shadow=shadow, ends=checked.ends)
        return sampler, trainer

    if config.sampler is not None and given.sampler is None and given.trainer is None:
        # A trial of precisions would send the server weights before the run begins.
        dtype = check_compute_dtype(config.student, _present(student))
        update = {"student": config.student.model_copy(update={"compute_dtype": dtype})}
        config = config.model_copy(update=update)
        return *in_precision(compute_autocast(config.student)), config
    if student is None or given.sampler or given.trainer:
        if config.student.compute_dtype == "bfloat16":
            raise ConfigError(
                "student.compute_dtype",
                got="bfloat16, and a sampler or trainer brought along",
                expected="no precision: parts that are brought along decide on their own",
                remedy='drop it, or leave it at "auto"',
            )
        return *in_precision(None), config
    sampler, trainer, dtype = choose_compute_dtype(config, student, checked.prompts, in_precision)
    update = {"student": config.student.model_copy(update={"compute_dtype": dtype})}
    return sampler, trainer, config.model_copy(update=update)


def _marker(config: RunConfig, student: LanguageModel) -> LocalTeacher:
    """Gives what the trainer's ``compute_logprobs`` gives, and more."""
    return LocalTeacher(
        student,
        temperature=config.sampling.temperature,
        batch_tokens=config.optim.micro_batch_tokens,
        autocast=compute_autocast(config.student),
    )


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
        update["student"] = config.student.model_copy(update={"dtype": student.dtype_name})
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
    skipping = [name for name, action in config.guards.actions() if action == "skip"]
    skipping += ["gradient"] if config.guards.gradient.action == "stop" else []
    if skipping and given.trainer is not None and not hasattr(given.trainer, "discard_gradients"):
        raise ConfigError(
            f"guards.{skipping[0]}.action",
            got=f"{config.guards.action(skipping[0])}, and a {type(given.trainer).__name__} without discard_gradients",
            expected="a trainer that can look at a gradient and forget it",
            remedy="give it the methods gradient_norm and discard_gradients (Trainer), or set "
            f'guards.{skipping[0]}.action = "warn"',
        )
    if config.sampling.max_policy_lag > 0 and given.sampler is None and config.sampler is None:
        raise ConfigError(
            "sampling.max_policy_lag",
            got=f"{config.sampling.max_policy_lag} with a sampler in this process",
            expected="a sampler with weights of its own: this one would write with weights that change as it writes",
            remedy="add [sampler] url = ..., or set max_policy_lag = 0",
        )
    if given.sampler is not None and given.trainer is None:
        raise ConfigError(
            "sampler",
            got=f"a {type(given.sampler).__name__} without a trainer",
            expected="the trainer whose weights it writes with; the configured one's updates would not reach it",
            remedy="pass trainer=... too",
        )
    if given.teachers is not None:
        _check_teachers(config, checked, given.teachers)


def _check_teachers(config: RunConfig, checked: Checked, teachers: Mapping[str, Teacher]) -> None:
    """Refuse teachers that score at another temperature, or that cannot give what is asked of them."""
    for name, teacher in teachers.items():
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
    resolve_estimator(config, teachers)  # raises where they cannot give what the objective needs
    names = {prompt.teacher for prompt in checked.prompts}
    if not names <= teachers.keys():
        raise ConfigError(
            "teachers",
            got=", ".join(sorted(teachers)) or "none",
            expected=f"one for each that the rows name: {', '.join(sorted(names))}",
            remedy='pass teachers={name: teacher}; rows that name none go to "default"',
        )


def _present(student: LanguageModel | None) -> LanguageModel:
    assert student is not None
    return student

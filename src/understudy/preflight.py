"""Checks that need no weights: what is asked for, whether the roles fit together, whether the rows fit the models."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from understudy.backends.loading import pick_device
from understudy.checkpoints import jsonl
from understudy.config import EvalTaskConfig, RowsConfig, RunConfig, SamplingConfig
from understudy.config_base import GradedConfig, ModelConfig
from understudy.errors import ConfigError, first_line
from understudy.evaluation import EvalTask
from understudy.model_files import adapter_base, check_weights
from understudy.preflight_objective import check_objective
from understudy.prompts import load_prompts
from understudy.rows import Row, read_rows
from understudy.tasks import GRADERS, Grader, load_grader
from understudy.tokenization import ModelText, check_same_tokens, load_text, resolve_stop_ids
from understudy.types import Prompt

log = logging.getLogger("understudy")

Method = Literal["distill", "rl", "sft", "generate", "eval"]
# Some graders ask another process about each row, at a millisecond and more: silence until then is short enough.
_QUIET_ROWS = 10_000
# Of one step, or of one problem: beyond what any run samples, and still a list that fits in memory.
_MOST_COMPLETIONS = 10_000_000


@dataclass(frozen=True)
class Checked:
    """Everything about a run that is known before any weights are read."""

    student: ModelText
    teachers: Mapping[str, ModelText]
    reference: ModelText | None
    stop_ids: frozenset[int]
    ends: Callable[[Sequence[int]], bool] | None
    special_ids: frozenset[int]
    vocab_size: int
    prompts: Sequence[Prompt]
    rows: Sequence[Row]
    tasks: Sequence[EvalTask]
    grader: Grader | None

    def decode(self, ids: Sequence[int]) -> str:
        """Completion ids -> the text a grader reads."""
        return self.student.tokenizer.decode(list(ids), skip_special_tokens=True)


def check_run(
    config: RunConfig, method: Method, *, grader: Grader | None = None, brought: frozenset[str] = frozenset()
) -> Checked:
    """Raise ConfigError for anything in ``config`` that cannot work for ``method``; else what was read on the way.

    ``grader`` stands in for [reward]; ``brought``: roles whose configured weights are not read.
    """
    check_sections(config, method, brought_grader=grader is not None)
    check_machine(config, method, brought=brought)
    check_counts(config, method)
    if grader is None and config.reward and method in ("distill", "rl"):
        grader = grader_of(config.reward)
    tasks = () if method == "generate" else config.evaluation.tasks
    graders = [grader_of(task) for task in tasks]
    student, teachers, reference = _texts(config, method)
    stop_ids = resolve_stop_ids(student, teachers, config.sampling.stop_token_ids)
    prompts: Sequence[Prompt] = []
    if config.prompts and method in ("distill", "rl", "generate"):
        sampling = config.sampling if method == "generate" else config.training_sampling
        length = sampling.max_completion_tokens
        prompts = load_prompts(config.prompts, student, teachers, max_completion_tokens=length)
    if reference is not None:
        _check_reference(reference, student, prompts, config)
    if config.prompts and grader is not None:
        _check_answers(prompts, grader, config.prompts)
    rows = read_rows(config.prompts) if config.prompts and method in ("sft", "generate") else []
    if method == "generate":
        _check_writable(rows)
    elif config.prompts and config.rollouts.per_step:
        _check_kept(prompts, config.prompts)
    texts = [student, *teachers.values(), *([reference] if reference else [])]
    vocab_size = min(text.vocab_width for text in texts)
    if method == "distill":
        _check_topk(config, vocab_size)
    return Checked(
        student=student,
        teachers=teachers,
        reference=reference,
        stop_ids=stop_ids,
        ends=student.stop_test(config.sampling.stop),
        special_ids=frozenset(student.tokenizer.all_special_ids) - stop_ids,
        vocab_size=vocab_size,
        prompts=prompts,
        rows=rows,
        tasks=[eval_task(config, task, own, student) for task, own in zip(tasks, graders, strict=True)],
        grader=grader,
    )


def check_machine(config: RunConfig, method: Method, *, brought: frozenset[str] = frozenset()) -> None:
    """Raise ConfigError for what this machine lacks: devices that are named, packages that adapters and trackers need,
    and weights, but for those of roles that are ``brought``."""
    teachers = [*config.all_teachers.values()] if method == "distill" else []
    teachers += [config.reference] if config.reference and method in ("distill", "rl") else []
    models = [config.teacher] if method == "generate" and config.teacher else [config.student, *teachers]
    for device in {model.device for model in models} - {"auto"}:
        pick_device(device)
    lora = method != "generate" and config.student.lora is not None
    adapters = [model.model for model in models if adapter_base(Path(model.model)) is not None]
    if (lora or adapters) and importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "student.lora" if lora else f"model {adapters[0]}",
            got="the package `peft` is not installed",
            expected="peft, for adapters",
            remedy='pip install "understudy[lora]"',
        )
    trackers = config.tracking.trackers if method in ("distill", "rl", "sft") else ()
    for name in trackers:  # each is the name of its package too
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.trackers: {name}",
                got=f"the package `{name}` is not installed",
                expected="the packages of all trackers that are named",
                remedy=f'pip install "understudy[{name}]"',
            )
    for model in models:
        role = "student" if model is config.student else "reference" if model is config.reference else "teacher"
        if getattr(model, "url", None) is None and role not in brought:
            check_weights(model.model, role)


def check_counts(config: RunConfig, method: Method) -> None:
    """Numbers that no machine would come to the end of: lists of that length are made before anything else is."""
    sampling = config.sampling
    counts = {"supervised.batch_size": config.supervised.batch_size} if method == "sft" else {}
    if method in ("distill", "rl"):
        counts["sampling.groups_per_batch * group_size"] = sampling.groups_per_batch * sampling.group_size
    if method == "generate":
        counts["sampling.group_size"] = sampling.group_size
    counts |= {f"samples of the task {task.name}": task.samples for task in config.evaluation.tasks}
    for name, count in counts.items():
        if count > _MOST_COMPLETIONS:
            raise ConfigError(name, got=str(count), expected=f"at most {_MOST_COMPLETIONS}", remedy="lower it")


def _check_kept(prompts: Sequence[Prompt], source: RowsConfig) -> None:
    """Rollouts are kept with their row's further columns, in JSON."""
    for prompt in prompts:
        try:
            jsonl([prompt.metadata])
        except (TypeError, ValueError) as error:
            raise read_rows(source)[prompt.index].error(
                first_line(error),
                "columns that JSON can hold: rollouts are kept with them",
                "leave that column out, or write its values as text; or set rollouts.per_step = 0",
            ) from None


def _check_writable(rows: Sequence[Row]) -> None:
    """`generate` copies its rows into a JSONL file; other formats hold values that have no form there."""
    for row in rows:
        try:
            jsonl([row.values])
        except (TypeError, ValueError) as error:
            raise row.error(
                str(error), "values that JSON can hold", "leave that column out, or write its values as text"
            ) from None


def _texts(config: RunConfig, method: Method) -> tuple[ModelText, dict[str, ModelText], ModelText | None]:
    """Who reads, who marks, who is the reference: `generate` has only a writer, `sft` and `eval` only a student."""
    if method == "generate":
        assert config.teacher is not None
        if config.teacher.url is not None:
            raise ConfigError(
                "teacher.url",
                got=config.teacher.url,
                expected="a teacher in this process: `generate` writes with its weights",
                remedy="drop url and name the checkpoint in teacher.model",
            )
        return model_text(config.teacher, "teacher"), {}, None
    student = model_text(config.student, "student")
    if method in ("sft", "eval"):
        return student, {}, None
    teachers = {name: model_text(teacher, "teacher") for name, teacher in config.all_teachers.items()}
    reference = model_text(config.reference, "reference") if config.reference else None
    for teacher in teachers.values():
        check_same_tokens(student, teacher)
    if reference is not None:
        check_same_tokens(student, reference, role="reference")
    return student, teachers, reference


def model_text(model: ModelConfig, role: str) -> ModelText:
    """Tokenizer and configuration of a model. Raises ConfigError when they cannot be read."""
    return load_text(model.model, role, trust_remote_code=model.trust_remote_code)


def grader_of(config: GradedConfig) -> Grader:
    """The grader that a section names. Raises ConfigError when it cannot be found."""
    return load_grader(config.grader, timeout_seconds=config.grader_timeout_seconds)


def _check_reference(reference: ModelText, student: ModelText, prompts: Sequence[Prompt], config: RunConfig) -> None:
    """The reference reads what the student reads."""
    longest = max((len(prompt.prompt_ids) for prompt in prompts), default=0)
    longest += config.training_sampling.max_completion_tokens
    if longest > reference.context_length:
        raise ConfigError(
            "reference.model",
            got=f"a context of {reference.context_length} tokens",
            expected=f"at least {longest}, the longest prompt and a completion",
            remedy="use another reference, or shorter prompts or completions",
        )


def _check_topk(config: RunConfig, vocab_size: int) -> None:
    if config.objective.estimator == "topk" and config.objective.topk > vocab_size:
        raise ConfigError(
            "objective.topk",
            got=str(config.objective.topk),
            expected=f"at most {vocab_size}, the vocabulary's size",
            remedy='lower it, or use estimator = "full"',
        )


def eval_task(config: RunConfig, task: EvalTaskConfig, grader: Grader, student: ModelText) -> EvalTask:
    """A task with its problems read and its answers tried on the grader. Raises ConfigError."""
    length = task.max_completion_tokens or config.sampling.max_completion_tokens
    prompts = load_prompts(task, student, max_completion_tokens=length, task=task.name)
    _check_answers(prompts, grader, task)
    sampling = SamplingConfig(
        group_size=1,
        max_completion_tokens=length,
        top_p=task.top_p,
        top_k=task.top_k,
        max_batch_rows=config.sampling.max_batch_rows,
    )
    return EvalTask(task, prompts, grader, sampling)


def _check_answers(prompts: Sequence[Prompt], grader: Grader, source: RowsConfig) -> None:
    """The package's own graders need an answer they can read; what a user's function needs is its own affair."""
    if grader not in GRADERS.values():
        return
    name = getattr(grader, "__name__", grader)
    if len(prompts) > _QUIET_ROWS:
        log.info("checking that the grader %s can grade the %d rows of %s", name, len(prompts), source.path)
    for prompt in prompts:
        try:
            grader(prompt, "", "stop")
        except ConfigError as error:
            if error.where != f"prompt {prompt.index}":
                raise  # a package is missing, which is no row's fault
            row = read_rows(source)[prompt.index]
            raise row.error(error.got, error.expected, error.remedy) from None
        except ValueError as error:
            raise read_rows(source)[prompt.index].error(
                str(error),
                f'an "answer" that the grader {name} can read, in every row',
                'add it, or name its column in columns, e.g. columns = {answer = "solution"}',
            ) from None


def check_sections(config: RunConfig, method: Method, *, brought_grader: bool) -> None:
    """Raise ConfigError for what a method needs and has not, or must not be given."""
    rewarded = brought_grader or config.reward is not None
    taught = bool(config.all_teachers) or config.objective.control == "fixed_negative"
    required = {
        "distill": {"teacher": taught, "prompts": config.prompts is not None},
        "rl": {"reward": rewarded, "prompts": config.prompts is not None},
        "sft": {"prompts": config.prompts is not None},
        "generate": {"teacher": config.teacher is not None, "prompts": config.prompts is not None},
        "eval": {"evaluation.tasks": bool(config.evaluation.tasks)},
    }
    for section, present in required[method].items():
        if not present:
            raise ConfigError(
                f"configuration of {method}",
                got=f"no [{section}]",
                expected=f"a [{section}] section",
                remedy="`understudy keys` lists every key; README.md shows complete examples",
            )
    if method in ("distill", "rl"):
        check_objective(config, method, rewarded)

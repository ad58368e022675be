"""Checks that need no weights: what is asked for, whether the roles fit together, whether the rows fit the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from understudy.config import RunConfig, SamplingConfig
from understudy.errors import ConfigError
from understudy.evaluation import EvalTask
from understudy.prompts import load_prompts
from understudy.rows import Row, read_rows
from understudy.tasks import Grader, load_grader
from understudy.tokenization import ModelText, check_same_tokens, load_text, resolve_stop_ids
from understudy.types import Prompt

Method = Literal["distill", "rl", "sft", "generate", "eval"]


@dataclass(frozen=True)
class Checked:
    """Everything about a run that is known before any weights are read."""

    student: ModelText
    teachers: Mapping[str, ModelText]
    stop_ids: frozenset[int]
    vocab_size: int
    prompts: Sequence[Prompt]
    rows: Sequence[Row]
    tasks: Sequence[EvalTask]
    grader: Grader | None

    def decode(self, ids: Sequence[int]) -> str:
        """Completion ids -> the text a grader reads."""
        return self.student.tokenizer.decode(list(ids), skip_special_tokens=True)


def check_run(config: RunConfig, method: Method) -> Checked:
    """Raise ConfigError for anything in ``config`` that cannot work for ``method``; else what was read on the way."""
    _check_sections(config, method)
    grader = load_grader(config.reward.grader) if config.reward else None
    graders = [load_grader(task.grader) for task in config.evaluation.tasks]
    rows = read_rows(config.prompts) if config.prompts and method in ("sft", "generate") else []
    for task in config.evaluation.tasks:
        _check_answers(read_rows(task), f"evaluation task {task.name}")
    if config.prompts and config.reward:
        _check_answers(read_rows(config.prompts), "rewards")
    student = load_text(config.student.model, "student")
    teachers = {name: load_text(teacher.model, "teacher") for name, teacher in config.all_teachers.items()}
    for teacher in teachers.values():
        check_same_tokens(student, teacher)
    stop_ids = resolve_stop_ids(student, teachers, config.sampling.stop_token_ids)
    prompts: Sequence[Prompt] = []
    if config.prompts and method != "sft":
        reader = teachers["default"] if method == "generate" else student
        length = config.sampling.max_completion_tokens
        prompts = load_prompts(
            config.prompts, reader, {} if method == "generate" else teachers, max_completion_tokens=length
        )
    return Checked(
        student=student,
        teachers=teachers,
        stop_ids=stop_ids,
        vocab_size=min(text.vocab_width for text in (student, *teachers.values())),
        prompts=prompts,
        rows=rows,
        tasks=[_eval_task(config, i, graders[i], student) for i in range(len(graders))],
        grader=grader,
    )


def _eval_task(config: RunConfig, number: int, grader: Grader, student: ModelText) -> EvalTask:
    task = config.evaluation.tasks[number]
    length = task.max_completion_tokens or config.sampling.max_completion_tokens
    prompts = load_prompts(task, student, max_completion_tokens=length, task=task.name)
    sampling = SamplingConfig(group_size=1, max_completion_tokens=length, max_batch_rows=config.sampling.max_batch_rows)
    return EvalTask(task, prompts, grader, sampling)


def _check_answers(rows: Sequence[Row], what: str) -> None:
    for row in rows:
        if row.values.get("answer") is None:
            raise row.error(
                f"columns {sorted(row.values)}",
                f'"answer", to grade for {what}',
                "add it, or name its column in columns",
            )


def _check_sections(config: RunConfig, method: Method) -> None:
    """What each method needs, and what it must not be given."""
    required = {
        "distill": {"teacher": bool(config.all_teachers), "prompts": config.prompts is not None},
        "rl": {"reward": config.reward is not None, "prompts": config.prompts is not None},
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
                remedy="`understudy distill --help` lists every key; README.md shows complete examples",
            )
    if method in ("distill", "rl"):
        _check_objective(config, method)


def _check_objective(config: RunConfig, method: Method) -> None:
    sampling, objective = config.sampling, config.objective

    def refuse(where: str, got: object, expected: str, remedy: str) -> None:
        raise ConfigError(where, got=str(got), expected=expected, remedy=remedy)

    if sampling.temperature == 0:
        refuse("sampling.temperature", 0, "above 0 in training", "use 1.0, the article's setting")
    if sampling.top_p != 1 or sampling.top_k != 0:
        refuse(
            "sampling",
            f"top_p = {sampling.top_p}, top_k = {sampling.top_k}",
            "no truncation in training: the written tokens' probabilities would not be the trained ones",
            "drop top_p and top_k; evaluation and `generate` may use them",
        )
    if objective.estimator == "full" and objective.discount != 0:
        refuse("objective.discount", objective.discount, '0 with estimator = "full"', 'use estimator = "sampled"')
    if config.reward_coef > 0 and config.reward is None:
        refuse("objective.reward_coef", config.reward_coef, "a [reward] grader", 'add [reward] grader = "..."')
    if config.reward_coef > 0 and sampling.group_size < 2:
        refuse(
            "sampling.group_size",
            sampling.group_size,
            "at least 2 with rewards: they are centred on their group",
            "set sampling.group_size = 8",
        )
    if method == "rl" and config.reward_coef == 0:
        refuse("objective.reward_coef", 0, "above 0 for rl", "drop it (1 without a teacher) or use `distill`")
    if method == "distill" and objective.kl_coef == 0:
        refuse("objective.kl_coef", 0, "above 0 for distill", "drop it, or use `rl`")

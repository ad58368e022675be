"""Dataset -> Prompt: what the student reads, what its teacher reads, which rows a step takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from understudy.config import PromptsConfig, RowsConfig
from understudy.errors import ConfigError
from understudy.rows import Row, read_rows
from understudy.tokenization import ModelText
from understudy.types import Prompt

log = logging.getLogger("understudy")

_OWN_FIELDS = {"prompt", "messages", "answer", "task", "teacher", "teacher_prompt", "completion", "text"}


def load_prompts(
    config: RowsConfig,
    student: ModelText,
    teachers: Mapping[str, ModelText] | None = None,
    *,
    max_completion_tokens: int,
    task: str = "default",
) -> list[Prompt]:
    """Read and tokenise every row. Raises ConfigError naming file and line for rows that cannot be used.

    Messages are rendered by each role's own chat template; the completion's ids are common to all.
    """
    prompts: list[Prompt] = []
    rows = read_rows(config)
    for row in rows:
        prompt = _prompt(row, config, student, teachers or {}, task)
        if _fits(row, prompt, config, student, teachers or {}, max_completion_tokens):
            prompts.append(prompt)
    if not prompts:
        raise ConfigError(
            config.path,
            got="only rows that are too long",
            expected=f"prompt + {max_completion_tokens} completion tokens within {student.context_length}",
            remedy="lower sampling.max_completion_tokens",
        )
    if len(prompts) < len(rows):
        log.info("%s: %d of %d rows left out, which are too long", config.path, len(rows) - len(prompts), len(rows))
    return prompts


def batch_for_step(num_rows: int, batch_size: int, *, seed: int, step: int, shuffle: bool = True) -> list[int]:
    """Row numbers of step ``step`` (0-based): a fresh order each epoch, no row twice within one.

    A function of its arguments alone, so that a resumed run needs no reader state.
    """
    return rows_from(num_rows, step * batch_size, batch_size, seed=[seed], shuffle=shuffle)


def rows_from(num_rows: int, start: int, count: int, *, seed: Sequence[int], shuffle: bool = True) -> list[int]:
    """``count`` row numbers of an endless run through epochs, from its place ``start`` on."""
    chosen: list[int] = []
    while len(chosen) < count:
        epoch, place = divmod(start + len(chosen), num_rows)
        order = np.random.default_rng([*seed, epoch]).permutation(num_rows) if shuffle else np.arange(num_rows)
        chosen.extend(int(i) for i in order[place : place + count - len(chosen)])
    return chosen


def with_system_prompt(messages: list[dict[str, str]], system_prompt: str | None) -> list[dict[str, str]]:
    """``messages`` behind the configured system prompt, if there is one."""
    return [{"role": "system", "content": system_prompt}, *messages] if system_prompt else messages


def render_messages(row: Row, messages: list[dict[str, str]], config: RowsConfig, model: ModelText) -> list[int]:
    """Messages as ``model`` reads them before it answers. Raises ConfigError without a chat template, or with two
    system prompts."""
    if not model.tokenizer.chat_template:
        raise row.error(
            f'"messages", but the tokenizer of {model.name} has no chat template',
            "a chat template, or rows with a plain-text prompt",
            'use {"prompt": "..."} rows, or an instruction-tuned checkpoint\'s tokenizer',
        )
    if config.system_prompt and any(message["role"] == "system" for message in messages):
        raise row.error(
            "a system message, and system_prompt is set too",
            "one system prompt",
            "drop system_prompt, or take the message out of the row",
        )
    messages = with_system_prompt(messages, config.system_prompt)
    return model.render(messages, add_generation_prompt=True, template_kwargs=config.chat_template_kwargs)


def _prompt(row: Row, config: RowsConfig, student: ModelText, teachers: Mapping[str, ModelText], task: str) -> Prompt:
    text, messages = row.text("prompt"), row.messages()
    if (text is None) == (messages is None):
        raise row.error(
            f"columns {sorted(row.values)}",
            'either "prompt" or "messages"',
            "rename columns with prompts.columns",
        )
    task = row.text("task") or task
    routes = config.teacher_of_task if isinstance(config, PromptsConfig) else {}
    named = row.text("teacher") or routes.get(task)
    teacher = named or "default"
    if teachers and teacher not in teachers:
        got = f"teacher {teacher!r}" if named else 'no "teacher", and there is no [teacher] to fall back on'
        raise row.error(got, f'"teacher": one of {sorted(teachers)}', f"name one, or add [teachers.{teacher}]")
    if messages is not None:
        prompt_ids = render_messages(row, messages, config, student)
        text = messages[-1]["content"]
    else:
        assert text is not None
        prompt_ids = student.encode(text)
    if not prompt_ids:
        raise row.error("a prompt of no tokens", "at least one token", "drop the row or add a begin token to it")
    teacher_ids = _teacher_view(row, config, teachers.get(teacher), messages, prompt_ids)
    answer = row.values.get("answer")
    return Prompt(
        index=row.index,
        prompt_ids=prompt_ids,
        text=text,
        task=task,
        answer=None if answer is None else str(answer),
        teacher=teacher,
        teacher_prompt_ids=teacher_ids,
        metadata={name: value for name, value in row.values.items() if name not in _OWN_FIELDS},
    )


def _teacher_view(
    row: Row, config: RowsConfig, teacher: ModelText | None, messages: Any, prompt_ids: list[int]
) -> list[int] | None:
    """What the teacher reads, or None where that is the student's own prompt."""
    if teacher is None:
        return None
    privileged = row.values.get("teacher_prompt")
    if isinstance(privileged, list):
        ids = render_messages(row, row.messages("teacher_prompt") or [], config, teacher)
    elif privileged is not None:
        ids = teacher.encode(row.text("teacher_prompt") or "")
    elif messages is not None and teacher.tokenizer.chat_template:
        ids = render_messages(row, messages, config, teacher)
    else:
        return None
    return None if ids == prompt_ids else ids


def check_embedded(row: Row, ids: Sequence[int], model: ModelText) -> None:
    """Raise ConfigError for a token that the tokenizer knows and the model has no embedding for."""
    if max(ids) >= model.vocab_width:
        raise row.error(
            f"token {max(ids)}, {model.tokenizer.decode([max(ids)])!r}",
            f"ids below {model.vocab_width}, as many as {model.name} has embeddings",
            "leave this token out of the row, or use the tokenizer that belongs to the model",
        )


def _fits(
    row: Row,
    prompt: Prompt,
    config: RowsConfig,
    student: ModelText,
    teachers: Mapping[str, ModelText],
    max_completion_tokens: int,
) -> bool:
    views: Sequence[tuple[str, Sequence[int], ModelText]] = [("student", prompt.prompt_ids, student)]
    if teachers:
        ids = prompt.teacher_prompt_ids or prompt.prompt_ids
        views = [*views, (f"teacher {prompt.teacher}", ids, teachers[prompt.teacher])]
    for role, ids, model in views:
        check_embedded(row, ids, model)
        if len(ids) + max_completion_tokens > model.context_length:
            if config.over_long == "skip":
                return False
            raise row.error(
                f"{len(ids)} prompt tokens + {max_completion_tokens} completion tokens",
                f"at most {model.context_length}, the context of {role} {model.name}",
                'lower max_completion_tokens, or set over_long = "skip" to leave such rows out',
            )
    return True

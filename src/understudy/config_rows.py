"""The sections that say where rows come from."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from understudy.config_base import Section, usable_path


class RowsConfig(Section):
    """Where rows come from and how they are read."""

    path: str
    """A .jsonl, .json or .parquet file, or a hub dataset id; "hub": the format's own dataset there;
    "reasoning_gym:<generator>"; "package.module:function", which yields rows. Rows: {"prompt": text} or
    {"messages": [...]}, optional "answer" (a text, or a list of right ones), "task", "teacher", "teacher_prompt"; for
    `sft`: {"prompt", "completion"}, {"messages"} ending with the assistant, {"messages", "completion"}, or {"text"} (a
    document)."""
    format: Literal["gsm8k", "math500", "aime24", "deepmath", "tulu3", "ifeval", "simplebench"] | None = None
    """The published set whose records these are, to be made rows (docs/tasks.md). Absent: rows already."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a generator ({size = 1000, seed = 1, ...}) or of a function that path names."""
    prompt_template: str | None = None
    """Text around every prompt (or last message); "{prompt}" stands for it. Absent: the format's own, which asks for
    the answer as graders look for it, or nothing."""
    chat: bool = True
    """Problems of a format or a generator become a user's message, for models with a chat template; false: plain text,
    for base models. Other rows stay what they are."""
    subset: str | None = None
    """Configuration name, for hub datasets that have several."""
    split: str = "train"
    """Split, for hub datasets."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames: {prompt = "question"} reads the prompt from the column "question"."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first rows only."""
    over_long: Literal["error", "skip", "split"] = "error"
    """What to do with rows that do not fit the model's context (in `sft` also supervised.max_tokens). split: documents
    of `sft` go on in a further sequence; other rows are errors."""
    system_prompt: str | None = None
    """Put before every row's messages (rows with "messages" only); refused where a row brings a system message."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, e.g. {enable_thinking = false}."""

    _usable_path = field_validator("path")(usable_path)

    @model_validator(mode="after")
    def _template_holds_the_prompt(self) -> Self:
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ValueError(f'prompt_template holds no "{{prompt}}": {self.prompt_template!r}')
        return self


class PromptsConfig(RowsConfig):
    """The rows a run trains on."""

    shuffle: bool = True
    """A new order each epoch, from the run's seed."""
    teacher_of_task: dict[str, str] = Field(default_factory=dict)
    """{maths = "large"}: rows whose "task" is maths are marked by [teachers.large]. A row's own "teacher" comes
    first."""


class MixConfig(RowsConfig):
    """Other rows among those of [prompts], e.g. chats among documents."""

    share: float = Field(gt=0, lt=1)
    """Share of the sequences of all steps that come from here; each source runs through its own epochs."""

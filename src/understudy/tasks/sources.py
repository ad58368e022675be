"""Where problems come from: the records of published sets as rows, generators, and a user's own functions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from understudy.errors import ConfigError
from understudy.tasks.imports import imported, require

HUB = "hub"
GENERATOR = "reasoning_gym:"
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

_BOX = "{prompt}\n\nReason step by step, and put the final answer in \\boxed{}."
_BOX_PLAIN = "Problem: {prompt}\n\nReason step by step, and put the final answer in \\boxed{}.\n\nSolution:"
_TAGS = "{prompt}\n\nPut the final answer between <answer> and </answer>."


@dataclass(frozen=True)
class Hub:
    """A dataset on the Hugging Face hub. ``split``: its only one; None where it has several."""

    path: str
    subset: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Format:
    """The records of one published set. ``convert``: the columns named in ``columns`` -> a row's "prompt", "answer",
    further values; ``left_out`` are too large to keep, and other columns stay as they are. ``template`` and
    ``plain_template``: what is asked, as a chat message and as plain text."""

    columns: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], dict[str, Any]]
    hub: Hub | None = None
    template: str = "{prompt}"
    plain_template: str = "{prompt}"
    left_out: tuple[str, ...] = ()


def _gsm8k(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": record["question"], "answer": record["answer"].rpartition("####")[2].strip()}


def _problem(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": record["problem"], "answer": str(record["answer"])}


def _deepmath(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": record["question"], "answer": str(record["final_answer"])}


def _tulu3(record: Mapping[str, Any]) -> dict[str, Any]:
    """A chat up to what its user said last: the answer is for the student to write."""
    last = max((i for i, message in enumerate(record["messages"]) if message["role"] == "user"), default=None)
    if last is None:
        raise TypeError("no user's message")
    return {"messages": [dict(message) for message in record["messages"][: last + 1]]}


def _simplebench(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": record["prompt"].strip(), "answer": record["answer"]}


def _ifeval(record: Mapping[str, Any]) -> dict[str, Any]:
    """The hub's table gives every instruction every argument, None where it takes none."""
    arguments = [{name: value for name, value in each.items() if value is not None} for each in record["kwargs"]]
    return {
        "prompt": record["prompt"],
        "instruction_id_list": list(record["instruction_id_list"]),
        "kwargs": arguments,
    }


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "gsm8k": Format(("question", "answer"), _gsm8k, Hub("openai/gsm8k", "main"), _BOX, _BOX_PLAIN),
        "math500": Format(
            ("problem", "answer"), _problem, Hub("HuggingFaceH4/MATH-500", split="test"), _BOX, _BOX_PLAIN
        ),
        "aime24": Format(
            ("problem", "answer"), _problem, Hub("HuggingFaceH4/aime_2024", split="train"), _BOX, _BOX_PLAIN
        ),
        "deepmath": Format(
            ("question", "final_answer"),
            _deepmath,
            Hub("zwhe99/DeepMath-103K", split="train"),
            _BOX,
            _BOX_PLAIN,
            left_out=("r1_solution_1", "r1_solution_2", "r1_solution_3"),
        ),
        "tulu3": Format(("messages",), _tulu3, Hub("allenai/tulu-3-sft-mixture", split="train")),
        "ifeval": Format(("prompt", "instruction_id_list", "kwargs"), _ifeval, Hub("google/IFEval", split="train")),
        "simplebench": Format(("prompt", "answer"), _simplebench),
    }
)


def converted(where: str, record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A record of the format ``name`` as a row with "prompt". Raises ConfigError for a record of another form."""
    known = FORMATS[name]
    missing = [column for column in known.columns if column not in record]
    if missing:
        raise _not_a_record(where, f"columns {sorted(record)}", name)
    try:
        row = known.convert(record)
    except (AttributeError, KeyError, TypeError):  # a number where a text belongs, a text where a list does
        raise _not_a_record(where, str({column: record[column] for column in known.columns})[:200], name) from None
    gone = {*known.columns, *known.left_out}
    return {column: value for column, value in record.items() if column not in gone} | row


def template_of(path: str, name: str | None, *, chat: bool) -> str:
    """What surrounds the problems of a format, or of a generator, unless the configuration says something else."""
    if path.startswith(GENERATOR):
        return _TAGS
    if name is None:
        return "{prompt}"
    return FORMATS[name].template if chat else FORMATS[name].plain_template


def asked(where: str, row: dict[str, Any], template: str, *, chat: bool) -> dict[str, Any]:
    """``row`` with its "prompt", or its last message, put into ``template``; then with the prompt as a message, if
    ``chat``. Raises ConfigError for rows that a template does not fit."""
    text, messages = row.get("prompt"), row.get("messages")
    if template != "{prompt}" and isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        last = messages[-1]
        if last.get("role") != "user" or not isinstance(last.get("content"), str):
            raise ConfigError(
                where,
                got=f"a last message {last!r}"[:200],
                expected="a user's message, for prompt_template to surround",
                remedy="drop prompt_template, or the row",
            )
        return row | {"messages": [*messages[:-1], last | {"content": template.replace("{prompt}", last["content"])}]}
    if not isinstance(text, str):
        return row
    text = template.replace("{prompt}", text)
    if not chat:
        return row | {"prompt": text}
    return {name: value for name, value in row.items() if name != "prompt"} | {
        "messages": [{"role": "user", "content": text}]
    }


def hub_dataset(name: str | None) -> Hub:
    """Where ``path = "hub"`` leads. Raises ConfigError for formats without a dataset there."""
    hub = FORMATS[name].hub if name else None
    if hub is None:
        raise ConfigError(
            f'rows "{HUB}"',
            got=f'format = "{name}", which has no dataset of its own there' if name else "no format",
            expected=f"format = one of {', '.join(key for key, value in FORMATS.items() if value.hub)}",
            remedy="set format, or path to a file or a hub dataset id",
        )
    return hub


def is_function(path: str) -> bool:
    """Whether ``path`` names a generator or a function, rather than a file or a dataset."""
    return path.startswith(GENERATOR) or _FUNCTION.fullmatch(path) is not None


def made_rows(path: str, options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of "reasoning_gym:<generator>", or of the iterable that "package.module:function" returns when it is
    called with ``options``. Raises ConfigError for one that cannot be called so, or yields no rows."""
    if path.startswith(GENERATOR):
        require("reasoning_gym", f"rows {path}")
        from understudy.tasks.reasoning import generated_rows

        rows: Any = generated_rows(path.removeprefix(GENERATOR), options)
    else:
        rows = _called(path, options)
    for number, row in enumerate(rows):
        where = f"{path}[{number}]"
        if not isinstance(row, Mapping):
            got = f"a {type(row).__name__}"
            raise ConfigError(where, got=got, expected="a row, as a dict", remedy="change what the function yields")
        yield where, dict(row)


def _called(path: str, options: Mapping[str, Any]) -> Any:
    try:
        function = imported(path)
        inspect.signature(function).bind(**options)
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"rows {path}",
            got=str(error),
            expected='a function "package.module:function" that takes the keys of options',
            remedy="check the name (modules are looked for as Python does, the working folder included) and options",
        ) from None
    rows = function(**options)
    if not hasattr(rows, "__iter__"):
        got = f"a {type(rows).__name__}"
        raise ConfigError(f"rows {path}", got=got, expected="rows, one dict each", remedy="return or yield dicts")
    return rows


def _not_a_record(where: str, got: str, name: str) -> ConfigError:
    return ConfigError(
        where,
        got=got,
        expected=f'a record of format "{name}": {", ".join(FORMATS[name].columns)}',
        remedy="rename columns with columns, or change format",
    )

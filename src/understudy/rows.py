"""Rows of files, hub datasets, generators and functions. Every error names the source and the place in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from understudy.config_rows import RowsConfig
from understudy.errors import ConfigError, first_line
from understudy.json_text import check_texts, parsed
from understudy.tasks.sources import GENERATOR, HUB, asked, converted, hub_dataset, is_function, made_rows, template_of


@dataclass(frozen=True)
class Row:
    """One record; ``where`` says where it came from ("prompts.jsonl:17"), ``index`` its place in the source."""

    index: int
    where: str
    values: Mapping[str, Any]

    def text(self, name: str) -> str | None:
        """A text value, or None when absent. Raises ConfigError for another type or an empty text."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip():
            raise self.error(f'"{name}" is {value!r}'[:200], "a non-empty text", f'fix or drop the row\'s "{name}"')
        return value

    def messages(self, name: str = "messages") -> list[dict[str, str]] | None:
        """A list of {"role", "content"} messages, or None when absent."""
        value = self.values.get(name)
        if value is None:
            return None
        valid = isinstance(value, list) and bool(value)
        for message in value if valid else []:
            valid &= isinstance(message, dict) and isinstance(message.get("role"), str)
            valid = valid and isinstance(message.get("content"), str)
        if not valid:
            expected = '[{"role": "user", "content": "..."}, ...]'
            raise self.error(f'"{name}" is {value!r}'[:200], expected, "give every message a role and a text content")
        return value

    def error(self, got: str, expected: str, remedy: str) -> ConfigError:
        """A ConfigError that names this row."""
        return ConfigError(self.where, got=got, expected=expected, remedy=remedy)


def read_rows(config: RowsConfig) -> list[Row]:
    """Every row that ``config`` names: columns renamed, records of a format made rows, prompts put in their template. A
    list of answers becomes "answer", its first, and "answers". Raises ConfigError for missing, broken or empty
    sources."""
    rows = [
        Row(index, where, _row(where, values, config))
        for index, (where, values) in enumerate(islice(_records(config), config.limit))
    ]
    if not rows:
        raise ConfigError(config.path, got="no rows", expected="at least one", remedy="check how the file was written")
    return rows


def _records(config: RowsConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, values) as the source has them."""
    path = Path(config.path)
    if is_function(config.path) and not path.is_file():
        return _checked(config.path, made_rows(config.path, config.options))
    if config.options:
        raise ConfigError(
            f"rows {config.path}",
            got=f"options {config.options}",
            expected="none: a file or a dataset takes none",
            remedy='drop options, or set path to "reasoning_gym:<generator>" or "package.module:function"',
        )
    if path.suffix == ".json" and path.is_file():
        return _json(path)
    if path.suffix in (".jsonl", ".json", ".ndjson") or (path.is_file() and path.suffix != ".parquet"):
        return _jsonl(path)
    return _dataset(path, config)


def _checked(path: str, rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a program, which may fail, and yield what no file can hold."""
    where, expected, remedy = (
        f"rows {path}",
        "rows with texts for keys and values that can be written",
        "change what the function yields",
    )
    try:
        for where, values in rows:
            if not all(isinstance(key, str) for key in values):
                raise TypeError(f"the keys {list(values)}")
            check_texts(values)
            yield where, values
    except ConfigError:
        raise
    except Exception as error:  # a user's function
        raise ConfigError(where, got=first_line(error), expected=expected, remedy=remedy) from None


def _row(where: str, values: Mapping[str, Any], config: RowsConfig) -> dict[str, Any]:
    row = _renamed(where, values, config.columns)
    if config.format is not None:
        row = converted(where, row, config.format)
    answer = row.get("answer")
    if isinstance(answer, list):
        if not answer or any(isinstance(each, list | dict | None) for each in answer):
            raise ConfigError(
                where,
                got=f'"answer" is {answer!r}'[:200],
                expected="a text, or a list of texts that are all right",
                remedy="fix or drop the row",
            )
        row |= {"answer": answer[0], "answers": answer}
    published = config.format is not None or config.path.startswith(GENERATOR)
    template = config.prompt_template or template_of(config.path, config.format, chat=config.chat)
    return asked(where, row, template, chat=config.chat and published)


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A JSON file: one list of objects, alone or as the only value of an object; or JSON lines by that name."""
    try:
        whole = parsed(path.read_bytes(), first=True)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return _jsonl(path)
    except ValueError as error:
        remedy = "fix or drop that part of the file"
        raise ConfigError(f"rows {path}", got=str(error), expected="JSON, UTF-8", remedy=remedy) from None
    if isinstance(whole, dict) and len(whole) == 1:
        [only] = whole.values()
        whole = only if isinstance(only, list) else whole
    if not isinstance(whole, list):
        return _jsonl(path)
    return ((f"{path}[{number}]", _object(f"{path}[{number}]", values)) for number, values in enumerate(whole))


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise ConfigError(
            f"rows {path}",
            got="a folder" if path.is_dir() else "no such file",
            expected="a JSONL file, one object per line",
            remedy=f"check the path (working folder: {Path.cwd()})",
        )
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            values = parsed(line, first=number == 1)
        except ValueError as error:
            raise ConfigError(
                where,
                got=first_line(error),
                expected="one JSON object per line, UTF-8",
                remedy="fix or delete the line",
            ) from None
        yield where, _object(where, values)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of those that are not blank."""
    try:
        with path.open("rb") as lines:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    except OSError as error:
        raise ConfigError(
            f"rows {path}",
            got=first_line(error),
            expected="a file that this process can read",
            remedy="check the file's permissions and its disk",
        ) from None


def _object(where: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        got = f"a {type(values).__name__}"
        raise ConfigError(where, got=got, expected="a JSON object", remedy="fix or delete the line")
    return values


def _dataset(path: Path, config: RowsConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    name, subset, split = config.path, config.subset, config.split
    if name == HUB:
        hub = hub_dataset(config.format)
        name, subset, split = hub.path, subset or hub.subset, hub.split or split
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            f"rows {config.path}",
            got="no such .jsonl file, and the package `datasets` is not installed",
            expected="a .jsonl file, or `datasets` for Parquet files and hub datasets",
            remedy='check the path, or pip install "understudy[data]"',
        ) from None
    try:
        if path.suffix == ".parquet":
            table = datasets.load_dataset("parquet", data_files=str(path), split="train")
        else:
            table = datasets.load_dataset(name, subset, split=split)
        records = [dict(values) for values in islice(table, config.limit)]
    except Exception as error:  # files that people write, read by libraries that raise whatever comes to them
        raise ConfigError(
            f"rows {config.path}",
            got=first_line(error),
            expected="a readable Parquet file or a hub dataset with this split",
            remedy="check path and split",
        ) from None
    for number, values in enumerate(records):
        yield f"{name}[{number}]", values


def _renamed(where: str, values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for name, column in columns.items():
        if column not in values:
            raise ConfigError(
                where,
                got=f"columns {sorted(values)}",
                expected=f'"{column}"',
                remedy=f"change columns.{name}",
            )
    sources = set(columns.values())
    kept = {name: value for name, value in values.items() if name not in sources}
    return kept | {name: values[column] for name, column in columns.items()}

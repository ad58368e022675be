"""Rows of JSONL and Parquet files and hub datasets. Every error names the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from understudy.config import RowsConfig
from understudy.errors import ConfigError


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
    """Every row of ``config.path``, columns renamed. Raises ConfigError for missing, broken or empty sources."""
    path = Path(config.path)
    if path.suffix in (".jsonl", ".json", ".ndjson") or (path.is_file() and path.suffix != ".parquet"):
        raw = _jsonl(path)
    else:
        raw = _dataset(path, config)
    rows = [
        Row(index, where, _renamed(where, values, config.columns))
        for index, (where, values) in enumerate(islice(raw, config.limit))
    ]
    if not rows:
        raise ConfigError(str(path), got="no rows", expected="at least one", remedy="check how the file was written")
    return rows


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise ConfigError(
            f"rows {path}",
            got="a folder" if path.is_dir() else "no such file",
            expected="a JSONL file, one object per line",
            remedy=f"check the path (working folder: {Path.cwd()})",
        )
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                values = json.loads(line.decode("utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ConfigError(
                    where,
                    got=f"{error}",
                    expected="one JSON object per line, UTF-8",
                    remedy="fix or delete the line",
                ) from None
            if not isinstance(values, dict):
                raise ConfigError(
                    where,
                    got=f"a {type(values).__name__}",
                    expected="a JSON object",
                    remedy="fix or delete the line",
                )
            yield where, values


def _dataset(path: Path, config: RowsConfig) -> Iterator[tuple[str, dict[str, Any]]]:
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
            table = datasets.load_dataset(config.path, config.subset, split=config.split)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"rows {config.path}",
            got=str(error).strip().splitlines()[0],
            expected="a readable Parquet file or a hub dataset with this split",
            remedy="check path and split",
        ) from None
    for number, values in enumerate(table):
        yield f"{config.path}[{number}]", dict(values)


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

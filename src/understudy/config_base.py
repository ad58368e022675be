"""What sections of the configuration are made of, and TOML in and out of trees."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from understudy.errors import ConfigError


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


def read_toml(path: Path) -> dict[str, Any]:
    """A file's tree. Raises ConfigError for a missing or malformed one."""
    if not path.is_file():
        raise ConfigError(
            f"configuration {path}",
            got="a folder" if path.is_dir() else "no such file",
            expected="a TOML file",
            remedy=f"check the path (working folder: {Path.cwd()}); README.md shows a complete example",
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"configuration {path}",
            got=str(error),
            expected="valid TOML",
            remedy='mind quotes around text and [section] headers, e.g. model = "checkpoints/student"',
        ) from None


def toml_value(text: str) -> object:
    """An override's value: TOML where it is TOML, else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # bare words are text, so that --student.model Qwen/Qwen3-8B-Base needs no quotes


def set_dotted(tree: dict[str, Any], key: str, value: object) -> None:
    """Put ``value`` at a.b.c, making the tables on the way."""
    *parents, leaf = key.split(".")
    for parent in parents:
        # --student.gradient-checkpointing is well meant; but a [teachers.my-teacher] keeps its name.
        parent = parent if parent in tree else parent.replace("-", "_")
        node = tree.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--{key}", got=f"{parent} = {node!r}", expected="a section", remedy=f"drop --{key}")
        tree = node
    tree[leaf if leaf in tree else leaf.replace("-", "_")] = value

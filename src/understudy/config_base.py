"""What sections of the configuration are made of, and TOML in and out of trees."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from understudy.errors import ConfigError, first_line

_DEEPEST = 32  # tables in tables: several times what any section has, and too few for anything to run out of stack
_LARGEST = 2**63 - 1  # TOML's integers have 64 bits; Python's parser reads larger ones, and other libraries do not
_NAME_BYTES = 255  # of a file's or a folder's name, on every common file system


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


def usable_path(text: str | None) -> str | None:
    """A path as it is. Raises ValueError for one that no file system has: questions about it would raise too."""
    if text is not None and ("\0" in text or any(len(part.encode()) > _NAME_BYTES for part in text.split("/"))):
        raise ValueError(
            f"no file or folder is called so: a name has at most {_NAME_BYTES} bytes, and none of them is 0"
        )
    return text


class ModelConfig(Section):
    """A model that is loaded."""

    model: str
    """Hub id or folder of a causal language model."""
    trust_remote_code: bool = False
    """Run the Python code that the model brings along (auto_map), with your rights. false: a model that transformers
    cannot load without such code is refused, and none of it runs."""

    _usable_model = field_validator("model")(usable_path)


class GradedConfig(Section):
    """What is graded, and by whom."""

    grader: str
    """A grader's name (docs/tasks.md) or "package.module:function"."""
    grader_timeout_seconds: float = Field(default=60.0, ge=0, le=1e6)
    """For one completion. Your own function runs in a process of its own, and the run stops with an error when it takes
    longer. 0: in this process, without a limit. Named graders have limits of their own (docs/tasks.md)."""


def read_toml(path: Path) -> dict[str, Any]:
    """A file's tree. Raises ConfigError for a missing or malformed one."""
    where = f"configuration {path}"
    try:
        if not path.is_file():
            raise ConfigError(
                where,
                got="a folder" if path.is_dir() else "no such file",
                expected="a TOML file",
                remedy=f"check the path (working folder: {Path.cwd()}); README.md shows a complete example",
            )
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin files with a byte order mark
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            where,
            got=first_line(error),
            expected="valid TOML",
            remedy='mind quotes around text and [section] headers, e.g. model = "checkpoints/student"',
        ) from None
    check_values(tree, where)
    return tree


def check_values(tree: object, where: str) -> None:
    """Raise ConfigError for what no key takes, wherever it stands: later stages need not think of it."""
    nodes: list[tuple[str, object, int]] = [("", tree, 0)]
    while nodes:
        name, node, depth = nodes.pop()
        if isinstance(node, dict | list):
            if depth > _DEEPEST:
                remedy = "write plain tables, as README.md shows them"
                raise ConfigError(where, got=f"tables or lists {depth} deep", expected=f"{_DEEPEST}", remedy=remedy)
            items = node.items() if isinstance(node, dict) else enumerate(node)
            nodes += [(f"{name}.{key}".removeprefix("."), value, depth + 1) for key, value in items]
        elif isinstance(node, int) and not -_LARGEST <= node <= _LARGEST:
            got = f"{name} = a number of {node.bit_length()} bits"
            raise ConfigError(where, got=got, expected="at most 64 bits, as TOML has them", remedy=f"change {name}")
        if "\0" in name or (isinstance(node, str) and "\0" in node):
            got = f"{name!r} with the character 0"
            raise ConfigError(where, got=got, expected="text without it", remedy="take \\u0000 out of the file")


def toml_value(text: str) -> object:
    """An override's value: TOML where it is TOML, else the text itself."""
    try:
        tree = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text  # bare words are text, so that --student.model Qwen/Qwen3-8B-Base needs no quotes
    return tree["value"] if len(tree) == 1 else text


def set_dotted(tree: dict[str, Any], key: str, value: object) -> None:
    """Put ``value`` at a.b.c, making the tables on the way."""
    check_values(value, f"--{key}")
    *parents, leaf = key.split(".")
    if len(parents) > _DEEPEST:
        raise ConfigError("--" + key[:100], got=f"{len(parents)} dots", expected="a key", remedy="drop it")
    for parent in parents:
        # --student.gradient-checkpointing is well meant; but a [teachers.my-teacher] keeps its name.
        parent = parent if parent in tree else parent.replace("-", "_")
        node = tree.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--{key}", got=f"{parent} = {node!r}", expected="a section", remedy=f"drop --{key}")
        tree = node
    tree[leaf if leaf in tree else leaf.replace("-", "_")] = value

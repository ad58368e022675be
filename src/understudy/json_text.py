"""JSON from outside: stricter than Python's reader, so that what is read can be written again and means one thing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

_DEEPEST = 100  # lists in lists: far more than any row has, and too few for later stages to run out of stack


def parsed(data: bytes, *, first: bool = False) -> Any:
    """The value that ``data`` (UTF-8) holds. ``first``: at a file's beginning, where a byte order mark may stand.

    Raises ValueError, saying what is wrong, for what is not JSON, and for what Python would read all the same: NaN,
    numbers that no float holds, a key twice in an object, half of a surrogate pair, nesting beyond reason.
    """
    text = data.decode("utf-8-sig" if first else "utf-8")
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"lists or objects more than {_DEEPEST} deep") from None
    if text.count("[") + text.count("{") > _DEEPEST and _depth(value) > _DEEPEST:
        raise ValueError(f"lists or objects more than {_DEEPEST} deep")
    if "\\u" in text:  # nothing else brings them
        check_texts(value)
    return value


def check_texts(value: Any) -> None:
    """Raise ValueError for a text that cannot be written: half of a surrogate pair."""
    for text in _texts(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            shown = text[max(0, error.start - 10) : error.end + 10]
            raise ValueError(f"half of a surrogate pair in {shown!r}, which is no character") from None


def _texts(value: Any) -> Iterator[str]:
    nodes = [value]
    while nodes:
        node = nodes.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict):
            nodes += [*node.keys(), *node.values()]
        elif isinstance(node, list | tuple):
            nodes += node


def _depth(value: Any) -> int:
    deepest, nodes = 0, [(value, 1)]
    while nodes:
        node, depth = nodes.pop()
        if isinstance(node, dict | list):
            deepest = max(deepest, depth)
            nodes += [(child, depth + 1) for child in (node.values() if isinstance(node, dict) else node)]
    return deepest


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name}, which is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]}, which is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return values

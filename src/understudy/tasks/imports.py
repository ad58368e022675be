"""Functions and packages that are named in a configuration, or needed by what is."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

from understudy.errors import ConfigError


def imported(name: str) -> Callable[..., Any]:
    """The function that "package.module:function" names. Raises ImportError, AttributeError or TypeError."""
    module, _, function = name.partition(":")
    found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise TypeError(f"{name} is a {type(found).__name__}, not a function")
    return found


def require(package: str, where: str) -> None:
    """Raise ConfigError where a package of the `graders` extra is missing."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            where,
            got=f"the package `{package.replace('_', '-')}` is not installed",
            expected="the `graders` extra",
            remedy='pip install "understudy[graders]"',
        )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` may have meant."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)

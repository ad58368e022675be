"""Problems that reasoning-gym makes up, and its own marks for answers (`graders` extra). Importing takes seconds."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from understudy.errors import ConfigError
from understudy.tasks.imports import nearest

with warnings.catch_warnings():
    # One of its dependencies leaves a file open as it is imported.
    warnings.simplefilter("ignore", ResourceWarning)
    from reasoning_gym.factory import DATASETS, create_dataset  # pyright: ignore[reportMissingImports]

# "composite" mixes others by objects that a configuration cannot hold.
GENERATORS = tuple(sorted(set(DATASETS) - {"composite"}))


def generated_rows(generator: str, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """{"prompt", "answer", "reasoning_gym": {"generator", "options", "entry"}} per problem, the same every time.

    ``options`` are the generator's own; ``seed`` is 0 and ``size`` 500 unless given. Raises ConfigError for an unknown
    generator or option, and for values that the generator refuses.
    """
    where = f"rows reasoning_gym:{generator}"
    if generator not in GENERATORS:
        raise _unknown(where, "generator", generator, GENERATORS)
    options = {"seed": 0, "size": 500} | dict(options)
    names = [field.name for field in dataclasses.fields(DATASETS[generator][1])]
    for name in options:
        if name not in names:
            raise _unknown(where, "option", name, names)
    try:
        dataset = create_dataset(generator, **options)
        numbers = range(len(dataset))
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            where,
            got=f"options {options}: {error}",
            expected=f"values that the generator takes, for {', '.join(names)}",
            remedy="change options",
        ) from None
    for number in numbers:
        entry = dataset[number]
        source = {"generator": generator, "options": options, "entry": entry}
        yield {"prompt": entry["question"], "answer": entry["answer"], "reasoning_gym": source}


def score(generator: str, options: Mapping[str, Any], entry: Mapping[str, Any], answer: str) -> float:
    """The generator's mark for ``answer`` to the problem ``entry``, from 0 to 1."""
    return float(_dataset(generator, json.dumps(options)).score_answer(answer, dict(entry)))


@lru_cache(maxsize=32)
def _dataset(generator: str, options: str) -> Any:
    return create_dataset(generator, **json.loads(options))


def _unknown(where: str, kind: str, name: str, known: tuple[str, ...] | list[str]) -> ConfigError:
    near = nearest(name, known)
    return ConfigError(
        where,
        got=f"{kind} {name}",
        expected=f"one of {', '.join(known)}",
        remedy=f"did you mean {near}?" if near else f"name one of these {kind}s",
    )

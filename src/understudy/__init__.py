"""On-policy distillation of language models.

Names are loaded when first used, so that ``import understudy`` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from understudy.api import RunResult, distill, evaluate, generate, rl, sft
    from understudy.config import RunConfig
    from understudy.errors import ConfigError, RunError, UnderstudyError
    from understudy.types import (
        Batch,
        HiddenScores,
        LossOutput,
        Prompt,
        Rollout,
        SampledScores,
        ScoredRollout,
        TokenSequence,
        TopkScores,
        TrainingExample,
    )

__version__ = version("understudy")

_HOMES = {
    "understudy.api": ("RunResult", "distill", "evaluate", "generate", "rl", "sft"),
    "understudy.config": ("RunConfig",),
    "understudy.errors": ("ConfigError", "RunError", "UnderstudyError"),
    "understudy.types": (
        "Batch",
        "HiddenScores",
        "LossOutput",
        "Prompt",
        "Rollout",
        "SampledScores",
        "ScoredRollout",
        "TokenSequence",
        "TopkScores",
        "TrainingExample",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Batch",
    "ConfigError",
    "HiddenScores",
    "LossOutput",
    "Prompt",
    "Rollout",
    "RunConfig",
    "RunError",
    "RunResult",
    "SampledScores",
    "ScoredRollout",
    "TokenSequence",
    "TopkScores",
    "TrainingExample",
    "UnderstudyError",
    "distill",
    "evaluate",
    "generate",
    "rl",
    "sft",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'understudy' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

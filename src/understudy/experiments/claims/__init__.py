"""One module per claim, named as its folder in experiments/. What stands from `analyse` on only reads results."""

from __future__ import annotations

from importlib import import_module

from understudy.errors import ConfigError
from understudy.experiments.claim import Claim

# In the article's order of claims, c1 to c13.
NAMES = (
    "c1_cost",
    "c2_dense_signal",
    "c3_one_prompt",
    "c4_recovery",
    "c5_self_training",
    "c6_lora",
    "c7_forking_tokens",
    "c8_prefixes",
    "c9_exposure_bias",
    "c10_mode_seeking",
    "c11_support",
    "c12_estimators",
    "c13_failure_modes",
)


def load_claim(name: str) -> Claim:
    """By its name, one of ``NAMES``."""
    return import_module(f"{__name__}.{name}").CLAIM


def find_names(wanted: str) -> list[str]:
    """The names that "c2", "c2_dense_signal" or "all" stand for. Raises ConfigError for anything else."""
    if wanted == "all":
        return list(NAMES)
    found = [name for name in NAMES if wanted in (name, name.partition("_")[0])]
    if not found:
        raise ConfigError(
            f"experiment {wanted}",
            got="no such claim",
            expected=f"all, or one of {', '.join(NAMES)}",
            remedy="choose one",
        )
    return found

"""The worlds of the experiments: per pipeline its own tasks, teacher and start, trained once and kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from understudy.experiments.cache import Cache
from understudy.worlds import ledger_build
from understudy.worlds.ledger import Ledger, Role

# The shipped world has tables 7; pipelines have tables of their own.
FIRST_TABLES = 101
# Raised when a change of code makes other models from equal settings.
VERSION = 1


@dataclass(frozen=True)
class LedgerModels:
    """How large a scale's models are and how long they learn."""

    teacher: ledger_build.Recipe = ledger_build.RECIPES["teacher"]
    start: ledger_build.Recipe = ledger_build.RECIPES["start"]


@dataclass(frozen=True)
class LedgerWorld:
    """One pipeline's ledger: ``tables`` and the folders of its two models."""

    tables: Ledger
    teacher: Path
    start: Path


def ledger_world(
    cache: Cache,
    pipeline: int,
    models: LedgerModels,
    *,
    start_correction: float = 0.15,
    unseen: tuple[int, ...] = (),
) -> LedgerWorld:
    """The ledger of ``pipeline``: trains what is not in the cache (5 minutes a teacher, 2 a start, on one CPU core)."""
    tables = Ledger(seed=FIRST_TABLES + pipeline)
    # A teacher's corpus has nothing of what makes a start: worlds that differ there share their teacher.
    teacher = _ledger_model(cache, "teacher", tables, models.teacher, pipeline)
    tables = replace(tables, start_correction=start_correction, unseen=unseen)
    return LedgerWorld(tables, teacher, _ledger_model(cache, "start", tables, models.start, pipeline))


def _ledger_model(cache: Cache, role: Role, tables: Ledger, recipe: ledger_build.Recipe, seed: int) -> Path:
    schedule = {name: value for name, value in asdict(recipe).items() if name != "corpus"}  # a text for the model card
    key = {"version": VERSION, "role": role, "tables": asdict(tables), "recipe": schedule, "seed": seed}
    return cache.folder(
        "models",
        key,
        lambda folder: ledger_build.build(folder, role=role, world=tables, recipe=recipe, seed=seed, log=print),
    )


ScaleName = Literal["cpu", "gpu", "smoke"]


@dataclass(frozen=True)
class Scale:
    """How large everything is: the worlds' models, and how many problems decide."""

    name: ScaleName
    ledger: LedgerModels
    num_test: int
    num_validation: int


def _sized(steps: tuple[int, int], widths: tuple[int, int], layers: int = 2) -> LedgerModels:
    """(teacher, start)."""
    teacher, start = ledger_build.RECIPES["teacher"], ledger_build.RECIPES["start"]
    return LedgerModels(
        replace(teacher, steps=steps[0], hidden_size=widths[0], num_layers=layers),
        replace(start, steps=steps[1], hidden_size=widths[1], num_layers=layers),
    )


SCALES: dict[ScaleName, Scale] = {
    "cpu": Scale("cpu", LedgerModels(), num_test=1000, num_validation=500),
    # Wider and deeper models of the same worlds, and ten times the problems.
    "gpu": Scale("gpu", _sized((3000, 1600), (512, 128), layers=4), num_test=10_000, num_validation=2000),
    # Everything in seconds; its results mean nothing.
    "smoke": Scale("smoke", _sized((2, 2), (16, 16)), num_test=8, num_validation=4),
}

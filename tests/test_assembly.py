"""What "auto" becomes: the teacher's dtype and the estimator."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from understudy import assembly
from understudy.assembly import Given, Parts, assemble
from understudy.config import RunConfig
from understudy.costs import CostLedger
from understudy.errors import ConfigError
from understudy.preflight import check_run
from understudy.worlds.ledger_demo import ARMS, arm_config, prepare


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    prepare(folder)
    return folder


def parts_of(config: RunConfig) -> Parts:
    return assemble(config, check_run(config, "distill"), CostLedger(), checkpoint=None, given=Given())


def config_of(world: Path, **objective: object) -> RunConfig:
    config = arm_config(world, ARMS[0])
    assert config.prompts is not None
    return config.model_copy(
        update={
            "prompts": config.prompts.model_copy(update={"limit": 32}),
            "evaluation": config.evaluation.model_copy(update={"tasks": ()}),
            "objective": config.objective.model_copy(update={"estimator": "auto", **objective}),
        }
    )


@pytest.mark.parametrize(("share", "dtype"), [(1e9, "bfloat16"), (0.0, "float32")])
def test_a_large_teacher_is_bfloat16_where_its_error_is_small(world, monkeypatch, caplog, share, dtype):
    monkeypatch.setattr(assembly, "_BF16_MIN_PARAMETERS", 0)
    monkeypatch.setattr(assembly, "fast_bfloat16", lambda device: True)
    monkeypatch.setattr(assembly, "_BF16_MAX_ERROR_SHARE", share)
    with caplog.at_level(logging.INFO, logger="understudy"):
        parts = parts_of(config_of(world))
    assert parts.config.teacher is not None
    assert parts.config.teacher.dtype == dtype
    teacher = parts.page_teachers["default"]
    assert isinstance(teacher, assembly.LocalTeacher)
    assert teacher.model.dtype == getattr(torch, dtype)
    [line] = [record.message for record in caplog.records if "errs by" in record.message]
    error, signal = (float(word) for word in line.replace("nats", "").split() if word.replace(".", "").isdigit())
    # The start is about 1.1 nats a token from its teacher; two precisions of one teacher are far closer.
    assert 0.5 < signal < 2.0
    assert 0.0 < error < 0.2 * signal


def test_an_earlier_self_keeps_the_students_dtype(world, monkeypatch):
    monkeypatch.setattr(assembly, "_BF16_MIN_PARAMETERS", 0)
    monkeypatch.setattr(assembly, "fast_bfloat16", lambda device: True)
    config = config_of(world)
    assert config.teacher is not None
    itself = config.teacher.model_copy(update={"model": config.student.model})
    parts = parts_of(config.model_copy(update={"teacher": itself}))
    assert parts.config.teacher is not None
    assert parts.config.teacher.dtype == parts.config.student.dtype == "float32"


@pytest.mark.parametrize(("discount", "estimator"), [(0.0, "full"), (0.5, "sampled")])
def test_auto_takes_the_full_divergence_where_it_can(world, discount, estimator, caplog):
    with caplog.at_level(logging.INFO, logger="understudy"):
        parts = parts_of(config_of(world, discount=discount))
    assert parts.config.objective.estimator == parts.credit.estimator == estimator
    assert parts.needs.teacher == ("hidden" if estimator == "full" else "sampled")
    assert [line for line in caplog.messages if "auto ->" in line] == [f"objective.estimator: auto -> {estimator}"]


def test_a_teacher_that_cannot_give_enough_is_refused_before_any_model_is_loaded(world, monkeypatch):
    class Plain:
        kinds = frozenset({"sampled"})

    config = config_of(world, estimator="full")
    monkeypatch.setattr(assembly, "load_student", lambda *a, **k: pytest.fail("the student was loaded"))
    given = Given(teachers={"default": Plain()})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"objective.estimator[\s\S]*teachers in this process"):
        assemble(config, check_run(config, "distill"), CostLedger(), checkpoint=None, given=given)

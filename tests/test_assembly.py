"""What "auto" and absent keys become: the teacher's dtype, the estimator, the size of micro-batches."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from understudy import assembly, precision
from understudy.assembly import Given, Parts, assemble
from understudy.backends.loading import default_micro_batch_tokens
from understudy.backends.local import LocalTeacher
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
    monkeypatch.setattr(precision, "_BF16_MIN_PARAMETERS", 0)
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: True)
    monkeypatch.setattr(precision, "_BF16_MAX_ERROR_SHARE", share)
    with caplog.at_level(logging.INFO, logger="understudy"):
        parts = parts_of(config_of(world))
    assert parts.config.teacher is not None
    assert parts.config.teacher.dtype == dtype
    teacher = parts.page_teachers["default"]
    assert isinstance(teacher, LocalTeacher)
    assert teacher.model.dtype == getattr(torch, dtype)
    [line] = [record.message for record in caplog.records if "errs by" in record.message]
    error, signal = (float(word) for word in line.replace("nats", "").split() if word.replace(".", "").isdigit())
    # The start is about 1.1 nats a token from its teacher; two precisions of one teacher are far closer.
    assert 0.5 < signal < 2.0
    assert 0.0 < error < 0.2 * signal


def test_an_earlier_self_keeps_the_students_dtype(world, monkeypatch):
    monkeypatch.setattr(precision, "_BF16_MIN_PARAMETERS", 0)
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: True)
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


def test_the_size_of_micro_batches_fits_the_device(world, monkeypatch):
    """What was decided stands in the run's configuration, and everyone goes by it."""
    config = config_of(world)
    optim = config.optim.model_copy(update={"micro_batch_tokens": None})
    parts = parts_of(config.model_copy(update={"optim": optim}))
    assert parts.config.optim.micro_batch_tokens == parts.batching["micro_batch_tokens"] == 2048
    teacher = parts.page_teachers["default"]
    assert isinstance(teacher, LocalTeacher)
    assert teacher._batch_tokens == 2048
    assert default_micro_batch_tokens(torch.device("cuda")) == 16384
    given = config.optim.model_copy(update={"micro_batch_tokens": 123})
    parts = parts_of(config.model_copy(update={"optim": given}))
    assert parts.config.optim.micro_batch_tokens == parts.batching["micro_batch_tokens"] == 123


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "gradient checkpointing"])
def test_prompts_are_shared_where_the_student_can(world, recompute):
    config = config_of(world)
    student = config.student.model_copy(update={"gradient_checkpointing": recompute})
    assert parts_of(config.model_copy(update={"student": student})).batching["share_prompts"] is not recompute


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_stop_strings_end_rollouts(world, compute_dtype):
    config = config_of(world)
    sampling = config.sampling.model_copy(update={"max_completion_tokens": 24, "group_size": 2})
    student = config.student.model_copy(update={"compute_dtype": compute_dtype})
    config = config.model_copy(update={"sampling": sampling, "student": student})

    def texts(stop: tuple[str, ...]) -> list[tuple[str, str]]:
        parts = parts_of(config.model_copy(update={"sampling": sampling.model_copy(update={"stop": stop})}))
        assert parts.config.sampling.stop == stop
        groups = parts.sampler.sample(parts.prompts[:8], parts.config.sampling, seed=1)
        return [(parts.decode(r.completion_ids), r.finish_reason) for group in groups for r in group]

    free = texts(())
    # Two words that follow each other somewhere
    stop = " ".join(free[0][0].split()[2:4])
    assert sum(stop in text for text, _ in free) >= 1
    for (text, reason), (whole, without) in zip(texts((stop,)), free, strict=True):
        end = whole.find(stop) + len(stop)
        assert text == (whole[:end] if stop in whole else whole)
        assert reason == ("stop" if stop in whole else without)

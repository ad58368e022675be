"""Student, teacher and settings: the healthy ledger world, and pairs that do not suit each other."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from cases import Marker, exchanged_ends, ledger_config, levels, local_teacher, look, only, tiny_config

from understudy.config import RewardConfig
from understudy.doctor.findings import Report
from user import save_model, word_tokenizer, write_rows


def test_the_healthy_pair(healthy: Report):
    for name in ("overlap", "entropy", "support", "accuracy", "positions", "truncation", "optim"):
        assert levels(healthy, f"fit.{name}") == ["pass"], name
    accuracy = only(healthy, "fit.accuracy").numbers["ledger"]
    assert accuracy["teacher"] > 0.9
    assert 0.2 < accuracy["student"] < 0.8
    assert accuracy["problems"] == 32
    assert only(healthy, "fit.support").numbers["impossible"] < 0.12
    assert only(healthy, "fit.overlap").numbers["student_mass"] > 0.9
    entropies = only(healthy, "fit.entropy").numbers
    assert 0 < entropies["teacher"] < entropies["student"] < 0.5
    positions = only(healthy, "fit.positions").numbers
    assert abs(positions["first"]) < 0.1
    assert positions["ended"] > 24


def test_a_teacher_from_another_world(tmp_path: Path):
    """Random weights, drawn wide: each is sure of something else."""
    import torch
    from transformers import AutoModelForCausalLM

    for seed, role in enumerate(("student", "teacher")):
        folder = save_model(tmp_path / role, word_tokenizer(), seed=seed, context=64)
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(60 if parameter.dim() > 1 else 1)
        model.save_pretrained(folder)
    report = look(tiny_config(tmp_path))
    assert levels(report, "fit.support") == ["warn"]
    assert levels(report, "fit.overlap") == ["warn"]
    assert only(report, "fit.support").numbers["impossible"] > 0.2
    assert "understudy generate" in only(report, "fit.support").remedy


def test_a_teacher_that_ends_with_another_token(world: Path):
    teacher = Marker(local_teacher(world / "models" / "teacher"), tokens=exchanged_ends())
    finding = only(look(ledger_config(world), teachers={"default": teacher}), "fit.positions")
    assert finding.level == "warn"
    assert finding.numbers["last"] > 10
    assert "'<eos>': student" in finding.evidence
    assert "stop_token_ids" in finding.remedy


def test_a_teacher_of_few_alternatives_is_held_against_as_few_of_the_student(world: Path):
    """As servers are; this one has the student's weights."""
    teacher: Any = local_teacher(world / "models" / "start")
    teacher.max_topk = 3
    report = look(ledger_config(world), teachers={"default": teacher})
    numbers = only(report, "fit.overlap").numbers
    assert (numbers["k"], numbers["overlap"]) == (3, 1.0)
    assert numbers["student_mass"] == pytest.approx(numbers["teacher_mass"], abs=1e-6)
    assert only(report, "fit.entropy").numbers["gap"] == pytest.approx(0.0, abs=1e-6)


def test_a_cap_below_the_answers(world: Path):
    report = look(ledger_config(world, sampling={"max_completion_tokens": 20}))
    finding = only(report, "fit.truncation")
    assert finding.level == "warn"
    assert finding.numbers["share"] > 0.9
    assert (finding.numbers["completions"], finding.numbers["cap"]) == (32, 20)
    assert finding.remedy.startswith("sampling.max_completion_tokens = 40")
    # Stopping early on purpose is none.
    early = ledger_config(world, objective={"tokens": {"first": 20}})
    assert levels(look(early), "fit.truncation") == ["pass"]


def test_a_student_whose_padding_is_its_end(tmp_path: Path):
    """Random weights end nothing within six tokens."""
    for seed, role in enumerate(("student", "teacher")):
        tokenizer = word_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        save_model(tmp_path / role, tokenizer, seed=seed, context=64)
    finding = only(look(tiny_config(tmp_path)), "fit.truncation")
    assert finding.level == "warn"
    assert "its end token '<|endoftext|>' is also its padding" in finding.evidence
    assert "understudy sft" in finding.remedy


def test_a_teacher_that_is_worse(world: Path):
    config = ledger_config(
        world,
        student={"model": str(world / "models" / "teacher")},
        teacher={"model": str(world / "models" / "start")},
    )
    finding = only(look(config), "fit.accuracy")
    assert finding.level == "warn"
    assert "the teacher does worse than the student" in finding.evidence
    assert "use a teacher that solves the task" in finding.remedy


def test_each_teacher_is_asked_its_own_rows(world: Path, tmp_path: Path):
    """One that cannot do another's task is not at fault for it."""
    lines = [json.loads(line) for line in (world / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    for i, line in enumerate(lines):
        line["teacher"] = "able" if i % 2 else "poor"
    rows = write_rows(tmp_path / "rows.jsonl", lines)
    able, poor = ({"model": str(world / "models" / name)} for name in ("teacher", "start"))
    config = ledger_config(world, teacher=None, teachers={"poor": poor, "able": able}, prompts={"path": str(rows)})
    numbers = only(look(config.model_copy(update={"reward": RewardConfig(grader="ledger")})), "fit.accuracy").numbers
    assert list(numbers) == [f"{of}, teacher {name}" for of in ("training rows", "ledger") for name in ("poor", "able")]
    assert [own["problems"] for own in numbers.values()] == [32] * 4
    for name, own in numbers.items():
        assert own["teacher"] > 0.9 if "able" in name else own["teacher"] == own["student"] < 0.8


def test_a_signal_without_a_teacher(tmp_path: Path):
    for seed, role in enumerate(("student", "teacher")):
        save_model(tmp_path / role, word_tokenizer(), seed=seed, context=64)
    config = tiny_config(tmp_path, objective={"control": "fixed_negative"})
    report = look(config.model_copy(update={"teacher": None}))
    assert report.of("fail") == []
    assert {"resources.memory", "resources.steps", "teachers.sampler"} <= {f.check for f in report.findings}
    assert levels(report, "fit.accuracy") == []


@pytest.mark.parametrize(
    ("changes", "level", "suggested"),
    [
        ({}, "pass", 5e-5 * math.sqrt(128)),
        ({"optim": {"learning_rate": 1e-5}}, "warn", 5e-5 * math.sqrt(128)),
        ({"optim": {"learning_rate": 0.1}}, "warn", 5e-5 * math.sqrt(128)),
        ({"student": {"lora": {"rank": 4}}, "optim": {"learning_rate": 5e-3}}, "pass", 5e-4 * math.sqrt(128)),
        ({"sampling": {"group_size": 2, "groups_per_batch": 3}}, "warn", 5e-5 * math.sqrt(128)),
    ],
    ids=["healthy", "far too low", "far too high", "adapters", "tiny batch"],
)
def test_rates_and_batches(changes: dict[str, Any], level: str, suggested: float, world: Path):
    from understudy.assembly import Given
    from understudy.doctor.case import Case
    from understudy.doctor.fit import optim

    [found] = optim(Case(ledger_config(world, **changes), "distill", Given()))
    assert found.level == level
    assert found.numbers["suggested"] == pytest.approx(suggested)
    assert found.numbers["hidden"] == 32
    if "sampling" in changes:
        assert found.remedy == "sampling.groups_per_batch = 32"
    elif level == "warn":
        assert found.remedy == "optim.learning_rate = 0.0006"


def test_small_batches_of_rows(tmp_path: Path):
    for role in ("student", "teacher"):
        save_model(tmp_path / role, word_tokenizer(), context=64)
    rows = [{"prompt": f"w{i}", "completion": "w2"} for i in range(8)]
    finding = only(look(tiny_config(tmp_path, rows=rows), "sft"), "fit.optim")
    assert (finding.level, finding.remedy) == ("warn", "supervised.batch_size = 64")


def test_the_sampled_estimator_wants_more(world: Path):
    from understudy.assembly import Given
    from understudy.doctor.case import Case
    from understudy.doctor.fit import optim

    [found] = optim(Case(ledger_config(world, objective={"estimator": "sampled"}), "distill", Given()))
    assert found.numbers["suggested_batch"] == 256

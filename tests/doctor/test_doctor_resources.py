"""Disk, memory and time: what is said of a healthy run, and too little of each."""

from __future__ import annotations

import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Marker, Marks, ledger_config, levels, local_teacher, look, only, tiny_config
from safetensors.torch import load_file

from understudy.backends import memory
from understudy.backends.loading import load_student
from understudy.backends.local import LocalSampler, LocalTrainer
from understudy.doctor.catalogue import CHECKS
from understudy.doctor.findings import Report
from user import save_model, word_tokenizer

ROLES = {"student_sampling", "teacher_scoring", "student_training", "weight_sync"}
Usage = namedtuple("Usage", "total used free")


def weights_of(folder: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


def with_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, int(free)))


def test_a_checkpoint_is_weights_and_two_moments(world: Path):
    finding = only(look(ledger_config(world), fast=True), "resources.disk")
    assert finding.level == "pass"
    # Norms and biases are not counted: 0.6% of so small a model.
    assert finding.numbers["checkpoint"] == pytest.approx(12 * weights_of(world / "models" / "start"), rel=0.01)
    assert finding.numbers["checkpoints"] == 2  # after steps 50 and 100; both are kept
    once = ledger_config(world, checkpoints={"every": 10, "keep": 3})
    assert only(look(once, fast=True), "resources.disk").numbers["checkpoints"] == 4


def test_adapters_take_less(world: Path):
    config = ledger_config(world, student={"lora": {"rank": 4}})
    finding = only(look(config, fast=True), "resources.disk")
    # q, k, v, o of 32 x 32 and an MLP of 32 x 80, two layers, rank 4.
    weights = 4 * 2 * (4 * (32 + 32) + 3 * (32 + 80))
    assert finding.numbers["checkpoint"] == 12 * weights


@pytest.mark.parametrize(("free", "level"), [(0.3e6, "fail"), (0.4e6, "warn"), (50.5e6, "warn"), (51e6, "pass")])
def test_too_little_disk(free: float, level: str, world: Path, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint takes 0.34 MB, and 50 MB are left for the rest."""
    with_free(monkeypatch, free)
    report = look(ledger_config(world), fast=True)
    finding = only(report, "resources.disk")
    assert finding.level == level
    assert report.exit_code == (2 if level == "fail" else 0)
    if level != "pass":
        assert "checkpoints.keep = 1" in finding.remedy


def test_checkpoints_that_are_there_take_no_room_twice(world: Path, tmp_path: Path):
    folder = tmp_path / "run" / "checkpoints" / "step_000050"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(bytes(100_000))
    config = ledger_config(world, output_dir=str(tmp_path / "run"))
    numbers = only(look(config, fast=True), "resources.disk").numbers
    assert numbers["needed"] == 2 * numbers["checkpoint"] - 100_000 + 50e6


@pytest.mark.parametrize(("available", "level"), [(1e6, "fail"), (60e6, "warn"), (1e9, "pass")])
def test_too_little_memory(available: float, level: str, world: Path, monkeypatch: pytest.MonkeyPatch):
    from understudy.doctor.case import Case
    from understudy.doctor.resources import memory as check

    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: namedtuple("M", "available")(int(available)))
    from understudy.assembly import Given

    [found] = check(Case(ledger_config(world), "distill", Given()))
    assert found.level == level
    phases = found.numbers["phases"]
    assert set(phases) == {"sampling", "scoring", "training"}
    # Weights, gradients and two moments of the student, and the teacher: all float32.
    sizes = [weights_of(world / "models" / role) for role in ("start", "teacher")]
    assert found.numbers["resident"] == pytest.approx(16 * sizes[0] + 4 * sizes[1], rel=0.01)
    with_reference = ledger_config(world, reference={"model": str(world / "models" / "start")})
    [further] = check(Case(with_reference, "distill", Given()))
    assert further.numbers["resident"] == pytest.approx(20 * sizes[0] + 4 * sizes[1], rel=0.01)


def test_where_memory_is_short_no_weights_are_loaded(world: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: namedtuple("M", "available")(1_000_000))
    monkeypatch.setattr("understudy.assembly.load_student", None)  # whoever calls it ends the test
    report = look(ledger_config(world))
    assert [finding.check for finding in report.of("fail")] == ["resources.memory"]
    with_weights = [check.name for check in CHECKS if check.weights]
    assert report.not_run == dict.fromkeys(with_weights, "see resources.memory")
    assert {finding.check for finding in report.findings} == {check.name for check in CHECKS} - set(with_weights)


def test_memory_that_runs_out_while_loading_is_said_once(world: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    def load(*args: Any, **options: Any) -> Any:
        calls.append("load")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("understudy.assembly.load_student", load)
    report = look(ledger_config(world))
    [finding] = report.of("fail")
    assert finding.evidence == (
        "memory: got CUDA out of memory. Tried to allocate 2.00 GiB.; expected room for the models and a small step"
    )
    assert "student.gradient_checkpointing = true" in finding.remedy
    assert calls == ["load"]
    with_weights = {check.name for check in CHECKS if check.weights}
    assert report.not_run == dict.fromkeys(with_weights - {finding.check}, f"see {finding.check}")
    assert len(report.of("pass")) >= len(CHECKS) - len(with_weights)
    assert report.exit_code == 2


def test_memory_that_runs_out_while_a_teacher_is_probed_hides_nothing_else(world: Path):
    def change(marks: Marks) -> Marks:
        if len(marks) == 1:  # one by one
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return marks

    teacher = Marker(local_teacher(world / "models" / "teacher"), change)
    report = look(ledger_config(world), teachers={"default": teacher})
    assert [finding.check for finding in report.of("fail")] == ["teachers.repeatable"]
    assert "CUDA out of memory." in only(report, "teachers.repeatable").evidence
    assert report.not_run == {}
    assert levels(report, "teachers.sampler") == levels(report, "resources.steps") == ["pass"]


def test_other_errors_of_checks_are_bugs(world: Path):
    def change(marks: Marks) -> Marks:
        raise ZeroDivisionError("a bug")

    teacher = Marker(local_teacher(world / "models" / "teacher"), change)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        look(ledger_config(world), teachers={"default": teacher})


def test_graders_take_their_part_of_a_step(world: Path):
    """16 prompts with 4 completions each; 8 are probed."""

    def slow(prompt: Any, completion: str, finish_reason: Any) -> float:
        time.sleep(0.005)
        return 1.0

    config = ledger_config(world, reward={"grader": "exact_match"}, evaluation={"tasks": []})
    finding = only(look(config, grader=slow), "resources.steps")
    numbers = finding.numbers
    assert f"grading {numbers['seconds']['grading']:.3g}" in finding.evidence
    assert set(numbers["seconds"]) == {*ROLES, "grading"}
    assert 64 * 0.005 <= numbers["seconds"]["grading"] < 64 * 0.05
    assert numbers["step_seconds"] == pytest.approx(sum(numbers["seconds"].values()))


def test_what_a_step_does_once_is_no_more_for_more_prompts(world: Path):
    class Slow(LocalSampler):
        def set_policy_version(self, version: int) -> None:
            time.sleep(0.2)

    config = ledger_config(world, evaluation={"tasks": []})
    model = load_student(config.student)
    sampler, trainer = Slow(model, stop_ids=frozenset({161})), LocalTrainer(model, config.optim)
    seconds = only(look(config, sampler=sampler, trainer=trainer), "resources.steps").numbers["seconds"]
    assert 0.2 <= seconds["weight_sync"] < 0.4


def test_what_a_step_takes(world: Path, healthy: Report):
    finding = only(healthy, "resources.steps")
    assert finding.level == "pass"
    numbers = finding.numbers
    assert (numbers["probed"], numbers["of"]) == (8, 16)
    assert set(numbers["seconds"]) == ROLES
    assert numbers["hours"] == pytest.approx(100 * numbers["step_seconds"] / 3600)
    # 64 sequences of about 94 tokens: 2N for each model that reads, 6N for the one that trains.
    sizes = [weights_of(world / "models" / role) for role in ("start", "teacher")]
    expected = 64 * 94 * (8 * sizes[0] + 2 * sizes[1])
    assert numbers["step_flops"] == pytest.approx(expected, rel=0.1)
    assert not (world / "run").exists()  # nothing is written


def test_the_probe_does_an_update_again_that_does_not_fit(tmp_path: Path):
    class Cramped(LocalTrainer):
        def forward_backward(self, batch: Any, objective: Any) -> Any:
            if len(batch.input_ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().forward_backward(batch, objective)

    for seed, role in enumerate(("student", "teacher")):
        save_model(tmp_path / role, word_tokenizer(), seed=seed, context=64)
    config = tiny_config(tmp_path)
    report = look(config, trainer=Cramped(load_student(config.student), config.optim))
    assert levels(report, "resources.steps") == ["pass"]


@pytest.mark.parametrize("method", ["rl", "sft"])
def test_other_methods_are_timed_too(method: Any, tmp_path: Path):
    for seed, role in enumerate(("student", "teacher")):
        save_model(tmp_path / role, word_tokenizer(), seed=seed, context=64)
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": "w1", "completion": f"w{i}"} for i in range(12)]
    rows = [{k: v for k, v in row.items() if (k == "completion") <= (method == "sft")} for row in rows]
    config = tiny_config(tmp_path, rows=rows, reward={"grader": "exact_match"})
    report = look(config, method)
    assert report.of("fail") == []
    assert levels(report, "resources.steps") == ["pass"]
    roles = {"rl": ROLES - {"teacher_scoring"} | {"grading"}, "sft": {"student_training"}}[method]
    assert set(only(report, "resources.steps").numbers["seconds"]) == roles
    assert levels(report, "teachers.repeatable") == []

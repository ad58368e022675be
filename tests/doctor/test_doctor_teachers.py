"""Teachers that can be trusted, and others: hot, noisy, of another company; brought along and behind servers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cases import Marker, Marks, ledger_config, levels, local_teacher, look, on_cpu, only
from hot_server import Hot

from understudy.backends.local import LocalTeacher
from understudy.doctor.findings import Report
from understudy.doctor.teachers import MAX_FAULT, MAX_NOISE
from understudy.doctor.trial import entropy_of
from understudy.types import ScoreKind, Scores, TokenSequence, TopkScores


def test_a_healthy_teacher_passes(healthy: Report):
    repeatable = only(healthy, "teachers.repeatable")
    assert repeatable.level == "pass"
    assert repeatable.numbers["twice_max"] == 0.0
    assert repeatable.numbers["alone_max"] < 1e-3
    temperature = only(healthy, "teachers.temperature")
    assert temperature.level == "pass"
    assert temperature.numbers["found"] == 1.0
    assert temperature.numbers["error"] < 1e-4
    sampler = only(healthy, "teachers.sampler")
    assert sampler.level == "pass"
    assert sampler.numbers["max"] < 1e-3
    assert sampler.numbers["outside_share"] == 0.0
    mass = only(healthy, "teachers.top_mass")
    assert mass.level == "pass"
    assert 0.95 < mass.numbers["mean"] <= 1 + 1e-6
    assert mass.numbers["apart"] < 1e-4
    assert levels(healthy, "teachers.own") == []


def noisy(size: float) -> Callable[[Marks], Marks]:
    generator = random.Random(0)
    return lambda marks: [[min(0.0, value + generator.uniform(-size, size)) for value in row] for row in marks]


@pytest.mark.parametrize(("size", "level"), [(0.2, "warn"), (2.0, "fail")])
def test_a_teacher_that_says_something_else_each_time(size: float, level: str, world: Path):
    teacher = Marker(local_teacher(world / "models" / "teacher"), noisy(size))
    finding = only(look(ledger_config(world), teachers={"default": teacher}), "teachers.repeatable")
    assert finding.level == level
    assert finding.numbers["twice_mean"] > (MAX_NOISE if level == "warn" else MAX_FAULT)
    assert "one replica" in finding.remedy


def test_a_teacher_whose_marks_depend_on_their_neighbours(world: Path):
    """Every sequence but a batch's first gets another nat."""

    def change(marks: Marks) -> Marks:
        return [[value - (i > 0) for value in row] for i, row in enumerate(marks)]

    teacher = Marker(local_teacher(world / "models" / "teacher"), change)
    finding = only(look(ledger_config(world), teachers={"default": teacher}), "teachers.repeatable")
    assert finding.level == "fail"
    assert finding.numbers["twice_max"] == 0.0
    assert finding.numbers["alone_mean"] == pytest.approx(7 / 8, abs=0.05)


# Temperature


@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_a_teacher_that_is_brought_along_at_another_temperature(temperature: float, world: Path):
    """It says nothing of it; the weights that the configuration names do."""
    teacher = Marker(local_teacher(world / "models" / "teacher", temperature))
    finding = only(look(ledger_config(world), teachers={"default": teacher}), "teachers.temperature")
    assert finding.level == "fail"
    assert finding.numbers["found"] == temperature
    assert finding.numbers["error"] < 1e-3
    assert "sampling.temperature = 1" in finding.remedy


def test_a_teacher_that_says_it_is_hot_is_refused(world: Path):
    teacher = local_teacher(world / "models" / "teacher", 2.0)
    report = look(ledger_config(world), teachers={"default": teacher})
    [finding] = report.of("fail")
    assert "log-probabilities at temperature 2.0, sampling.temperature = 1.0" in finding.evidence
    assert report.exit_code == 2
    assert report.not_run["fit.support"] == f"see {finding.check}"


class Lying(LocalTeacher):
    """Hidden states of one temperature, marks of another."""

    def __init__(self, folder: Path) -> None:
        super().__init__(on_cpu(folder))
        self.hot = local_teacher(folder, 2.0)

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> Marks:
        return self.hot.compute_logprobs(sequences)

    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0) -> list[Scores]:
        scores = super().score(sequences, kind, topk=topk)
        return self.hot.score(sequences, kind) if kind == "sampled" else scores


def test_marks_are_held_against_hidden_states(world: Path):
    finding = only(
        look(ledger_config(world), teachers={"default": Lying(world / "models" / "teacher")}), "teachers.temperature"
    )
    assert finding.level == "fail"
    assert finding.numbers["found"] == 2.0


def test_marks_of_other_weights(world: Path):
    """The student's, where the configuration names the teacher's."""
    teacher = Marker(local_teacher(world / "models" / "start"))
    finding = only(look(ledger_config(world), teachers={"default": teacher}), "teachers.temperature")
    assert finding.level == "warn"
    assert "at no temperature" in finding.evidence


@pytest.fixture(scope="module")
def served(world: Path) -> Iterator[Callable[[float], str]]:
    servers = [Hot(world / "models" / "teacher", temperature) for temperature in (1.0, 2.0)]
    with servers[0], servers[1]:
        yield lambda temperature: next(s.url for s in servers if s.temperature == temperature)


@pytest.mark.parametrize(("temperature", "level"), [(1.0, "pass"), (2.0, "fail")])
def test_a_served_teacher_is_asked_to_write(temperature: float, level: str, world: Path, served: Any):
    config = ledger_config(world, teacher={"url": served(temperature), "model": str(world / "models" / "start")})
    finding = only(look(config), "teachers.temperature")
    assert finding.level == level
    assert finding.numbers["found"] == pytest.approx(temperature, rel=0.01)
    if level == "fail":
        assert "written" in finding.evidence
        assert "marked" in finding.evidence
    else:
        assert finding.numbers["error"] < 1e-3


def test_a_served_teacher_whose_weights_are_at_hand(world: Path, served: Any):
    config = ledger_config(world, teacher={"url": served(2.0), "model": str(world / "models" / "teacher")})
    finding = only(look(config), "teachers.temperature")
    assert finding.level == "fail"
    assert finding.numbers["found"] == 2.0


# Teacher and student


def test_a_teacher_that_is_the_student_marks_nothing(world: Path):
    config = ledger_config(world, teacher={"model": str(world / "models" / "start")})
    finding = only(look(config), "teachers.own")
    assert finding.level == "pass"
    assert abs(finding.numbers["mean"]) < 1e-5
    teacher = Marker(
        local_teacher(world / "models" / "start"), lambda marks: [[v - 0.01 for v in row] for row in marks]
    )
    finding = only(look(config, teachers={"default": teacher}), "teachers.own")
    assert finding.level == "warn"
    assert finding.numbers["mean"] == pytest.approx(0.01, abs=1e-3)


class Untrue:
    """A sampler that claims other log-probabilities than its tokens have."""

    def __init__(self, inner: Any, size: float) -> None:
        self.inner, self.size = inner, size

    def set_policy_version(self, version: int) -> None:
        self.inner.set_policy_version(version)

    def sample(self, prompts: Any, sampling: Any, *, seed: int) -> Any:
        from dataclasses import replace

        groups = self.inner.sample(prompts, sampling, seed=seed)
        return [
            [replace(r, sampler_logprobs=[v - self.size for v in r.sampler_logprobs]) for r in group]
            for group in groups
        ]


@pytest.mark.parametrize(("size", "level"), [(0.05, "warn"), (0.5, "fail")])
def test_a_sampler_of_other_log_probabilities(size: float, level: str, world: Path):
    from understudy.backends.loading import load_student
    from understudy.backends.local import LocalSampler, LocalTrainer

    config = ledger_config(world)
    model = load_student(config.student)
    sampler = Untrue(LocalSampler(model, stop_ids=frozenset({161})), size)
    trainer = LocalTrainer(model, config.optim)
    finding = only(look(config, sampler=sampler, trainer=trainer), "teachers.sampler")
    assert finding.level == level
    assert finding.numbers["mean"] == pytest.approx(size, rel=1e-3)
    assert finding.numbers["outside_share"] == (0.0 if size < 0.09 else 1.0)


class OtherAlternatives(Marker):
    """Alternatives of another temperature than the marks."""

    kinds: frozenset[ScoreKind] = frozenset({"sampled", "topk"})

    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0) -> list[Scores]:
        if kind == "sampled":
            return super().score(sequences, kind)
        hot = LocalTeacher(self.teacher.model, temperature=2.0).score(sequences, "topk", topk=topk)
        marks = self.teacher.compute_logprobs(sequences)
        return [
            TopkScores(own, score.ids, score.logprobs)
            for own, score in zip(marks, hot, strict=True)
            if isinstance(score, TopkScores)
        ]


def test_alternatives_of_another_distribution(world: Path):
    teacher = OtherAlternatives(local_teacher(world / "models" / "teacher"), kinds=frozenset({"sampled", "topk"}))
    finding = only(look(ledger_config(world), teachers={"default": teacher}), "teachers.top_mass")
    assert finding.level == "fail"
    assert finding.numbers["apart"] > MAX_FAULT
    assert "raw_logprobs" in finding.remedy


def test_too_few_alternatives_for_a_topk_objective(world: Path):
    """At temperature 6 the likeliest token is hardly likely."""
    config = ledger_config(world, objective={"estimator": "topk", "topk": 1}, sampling={"temperature": 6.0})
    finding = only(look(config), "teachers.top_mass")
    assert finding.level == "warn"
    assert finding.numbers["k"] == 1
    assert finding.remedy == "objective.topk = 64"


def test_entropy_counts_what_is_left_as_one_outcome():
    from math import log

    assert entropy_of([log(0.5), log(0.5)]) == pytest.approx(log(2))
    assert entropy_of([log(0.5), log(0.25)]) == pytest.approx(0.5 * log(2) + 0.5 * log(4))
    assert entropy_of([0.0]) == 0.0

"""Trackers get every row once, and cost a run nothing when they fail."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import understudy
from understudy import RunConfig
from understudy.errors import GuardStop, ServerUnavailable
from understudy.trackers import TrackedRun, Trackers, fan_out
from user import bpe_tokenizer, metrics, save_model, tree, write_rows

RECORD = {
    "prompt_index": 3,
    "reward": 0.5,
    "completion_ids": [1, 2],
    "sampler_logprobs": [-1.0, -1.0],
    "teacher_logprobs": [-1.5, -2.5],
    "prompt_text": "one\ntwo",
    "completion_text": "<three>",
}
ALARM = {"step": 2, "guard": "length", "action": "warn", "words": "completion_length/mean is 9", "causes": "a loop"}


@dataclass
class Memory:
    """A tracker that remembers, with one thing that goes wrong."""

    last_step: int = -1
    fails_at: int | None = None
    logged: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    texts: list[tuple[int, str, str]] = field(default_factory=list)
    closed: list[bool] = field(default_factory=list)
    runs: list[TrackedRun] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    def __call__(self, run: TrackedRun) -> Memory:
        self.runs.append(run)
        return self

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.threads.add(threading.get_ident())
        if step == self.fails_at:
            raise OSError("no space left on device")
        self.logged.append((step, metrics))

    def log_text(self, step: int, name: str, text: str) -> None:
        self.texts.append((step, name, text))

    def close(self, *, finished: bool) -> None:
        self.closed.append(finished)

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.logged]


@contextmanager
def trackers(
    folder: Path, memories: Mapping[str, Any], *, steps: int = 1, after: int | None = None, **tracking: Any
) -> Iterator[Trackers]:
    folder.mkdir(exist_ok=True)
    sections = {"student": {"model": "m"}, "tracking": {"trackers": list(memories), **tracking}}
    teacher = {"url": "http://10.0.0.1:8000/v1", "api_key_env": "SECRET_OF_MINE"}
    sections["optim"] = {"num_steps": steps}
    config = RunConfig.model_validate({"output_dir": str(folder), "teacher": teacher, **sections})
    with Trackers(config, folder, goes_on_after=after, openers=memories) as opened:
        opened.start([{"step": step, "a": 1.0} for step in range((after or -1) + 1)])
        yield opened


def row(step: int) -> dict[str, Any]:
    return {"step": step, "optim/loss": 1.0 / (step + 1), "note": "text", "flag": True}


def test_rows_and_samples_arrive_once_in_order_from_one_thread(tmp_path: Path) -> None:
    memory = Memory()
    with trackers(tmp_path / "run", {"wandb": memory}, steps=2, project="p", samples=1) as sent:
        for step in range(3):
            sent.log(row(step))
        sent.log_samples(2, [RECORD, RECORD])
        sent.log_alarm(ALARM)
    assert memory.logged == [(0, {"optim/loss": 1.0}), (1, {"optim/loss": 0.5}), (2, {"optim/loss": 1 / 3})]
    facts = "**prompt 3, 2 tokens, reward 0.5, reverse KL 1.000 nats per token**"
    text = f"{facts}\n\n    one\n    two\n\nwritten:\n\n    <three>"
    said = "**step 2, length (warn)**\n\ncompletion_length/mean is 9.\n\nLikely: a loop."
    assert memory.texts == [(2, "rollouts", text), (2, "alarms/length", said)]
    assert memory.closed == [True]
    assert len(memory.threads) == 1
    assert threading.get_ident() not in memory.threads
    [run] = memory.runs
    assert (run.project, run.name, run.folder, run.goes_on_after) == ("p", "run", tmp_path / "run", None)
    assert run.config["student.model"] == "m"
    assert run.config["optim.betas"] == "[0.9, 0.95]"


def test_numbers_that_are_not_finite_are_left_out_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = Memory()
    with trackers(tmp_path / "run", {"wandb": memory}) as sent:
        for step, value in enumerate((1.0, math.nan, math.inf)):
            sent.log({"step": step, "reward/mean": value})
    assert memory.logged == [(0, {"reward/mean": 1.0}), (1, {}), (2, {})]
    assert [record.getMessage() for record in caplog.records] == [
        "step 1: reward/mean is nan; trackers are sent finite numbers only, here and later"
    ]


def test_neither_keys_nor_addresses_are_told_or_stored(tmp_path: Path) -> None:
    memory = Memory()
    with trackers(tmp_path / "run", {"wandb": memory}):
        pass
    assert not [text for text in map(str, memory.runs[0].config.items()) if "10.0.0.1" in text or "SECRET" in text]
    assert (tmp_path / "run" / "tracking.json").read_text() == json.dumps(
        {"run_id": memory.runs[0].id}, indent=2
    ) + "\n"


def test_a_run_that_goes_on_is_the_same_run_without_repeated_steps(tmp_path: Path) -> None:
    folder, first = tmp_path / "run", Memory()
    with trackers(folder, {"mlflow": first}, steps=7) as before:
        for step in range(6):
            before.log(row(step))
    # The run was killed after step 5; its last checkpoint is step 3.
    held, late, new = Memory(last_step=5), Memory(last_step=2), Memory()
    with trackers(folder, {"mlflow": held, "trackio": late, "wandb": new}, steps=7, after=3) as again:
        for step in range(4, 8):
            again.log(row(step))
    assert {m.runs[0].id for m in (first, held, late, new)} == {first.runs[0].id}
    assert held.runs[0].goes_on_after == 3
    assert held.steps == [6, 7]
    assert late.steps == [3, 4, 5, 6, 7]  # it had failed at step 3
    assert new.steps == [0, 1, 2, 3, 4, 5, 6, 7]  # it was not there before
    assert (first.closed, held.closed) == ([False], [True])


def test_one_that_fails_is_dropped_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, sound = Memory(fails_at=1), Memory()
    with trackers(tmp_path / "run", {"wandb": broken, "mlflow": sound}) as sent:
        for step in range(5):
            sent.log(row(step))
            sent.log_samples(step, [RECORD])
    assert (broken.steps, broken.closed) == ([0], [])
    assert (sound.steps, sound.closed) == ([0, 1, 2, 3, 4], [True])
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(
        "tracker wandb is dropped: OSError: no space left on device. The run's own files have everything;"
    )


@pytest.mark.parametrize("error", [RuntimeError("no network"), SystemExit(1), ImportError("No module named 'wandb'")])
def test_one_that_does_not_open(error: BaseException, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(run: TrackedRun) -> Memory:
        raise error

    with trackers(tmp_path / "run", {"wandb": refuse}) as sent:
        sent.log(row(1))
    [record] = caplog.records
    assert ('pip install "understudy[wandb]"' in record.getMessage()) == isinstance(error, ImportError)


def test_one_that_hangs_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fan_out, "FINISHED_SECONDS", 0.2)
    monkeypatch.setattr(fan_out, "MOST_WAITING", 50)
    wake = threading.Event()

    def hang(run: TrackedRun) -> Memory:
        wake.wait(60)
        return Memory()

    start = time.monotonic()
    with trackers(tmp_path / "few", {"wandb": hang}) as few:
        few.log(row(1))
    with trackers(tmp_path / "many", {"mlflow": hang}) as many:
        for step in range(200):
            many.log(row(step))
    assert time.monotonic() - start < 10
    assert [r.getMessage().split(". ")[0] for r in caplog.records] == [
        "tracker wandb is dropped: it does not finish",
        "tracker mlflow is dropped: it is 50 messages behind",
    ]
    wake.set()


def test_a_package_that_is_not_there_and_one_that_is_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))  # without its names
    config = RunConfig.model_validate(
        {"output_dir": "r", "student": {"model": "m"}, "tracking": {"trackers": ["trackio", "wandb"]}}
    )
    with Trackers(config, tmp_path) as sent:
        sent.start()
    told = sorted(record.getMessage() for record in caplog.records)
    assert [text.split(":")[0] for text in told] == ["tracker trackio is dropped", "tracker wandb is dropped"]
    assert 'pip install "understudy[trackio]"' in told[0]


def test_a_ctrl_c_ends_the_waiting_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wake = threading.Event()

    def hang(run: TrackedRun) -> Memory:
        wake.wait(60)
        return Memory()

    start = time.monotonic()
    with trackers(tmp_path / "run", {"wandb": hang}) as sent:
        sent.log(row(1))
        impatient = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        impatient.start()
    assert 0.2 <= time.monotonic() - start < 30
    assert [r.getMessage().split(". ")[0] for r in caplog.records] == [
        "tracker wandb is dropped: it was not waited for"
    ]
    wake.set()


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Stands in for trackio, package and module."""
    (tmp_path / "trackio.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    memory, module = Memory(), ModuleType("fake")
    module.open_run = memory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "understudy.trackers.trackio_tracker", module)
    return memory


def training(folder: Path, **sections: Any) -> RunConfig:
    """Two steps, evaluated before and after, tracked."""
    if not (folder / "model").exists():
        save_model(folder / "model", bpe_tokenizer())
    rows = write_rows(folder / "rows.jsonl", [{"prompt": "1 + 1 =", "answer": "2"}])
    task = {"name": "sums", "path": str(rows), "grader": "last_number", "temperatures": [0.0]}
    base: dict[str, Any] = {"tracking": {"trackers": ["trackio"], "samples": 1}, "evaluation": {"tasks": [task]}}
    model = folder / "model"
    return RunConfig.model_validate(tree(model, model, rows, folder / "run", **{**base, **sections}))


def test_a_training_run_with_a_tracker(memory: Memory, tmp_path: Path) -> None:
    understudy.distill(training(tmp_path), quiet=True)
    stored = metrics(tmp_path / "run")
    # Evaluations are in their rows before these are sent.
    assert memory.logged == [(r["step"], {k: v for k, v in r.items() if k != "step"}) for r in stored]
    assert "eval/sums/greedy" in memory.logged[-1][1]
    assert [(step, name) for step, name, _ in memory.texts] == [(0, "rollouts"), (2, "rollouts")]
    assert memory.closed == [True]
    memory.last_step = 2
    understudy.distill(training(tmp_path, optim={"num_steps": 3}), quiet=True, resume=True)
    assert memory.steps == [0, 1, 2, 3]
    assert memory.runs[0].id == memory.runs[1].id


def test_alarms_are_told_also_those_that_stop_a_run(memory: Memory, tmp_path: Path) -> None:
    guards = {"ratio": {"abs_log_mean": 1e-12, "action": "stop"}}
    config = training(tmp_path, guards=guards, objective={"estimator": "sampled"}, evaluation={"tasks": []})
    with pytest.raises(GuardStop):
        understudy.distill(config, quiet=True)
    [(step, name, text)] = [told for told in memory.texts if told[1] != "rollouts"]
    assert (step, name) == (1, "alarms/ratio")
    assert text.startswith("**step 1, ratio (stop)**\n\nratio/abs_log_mean is ")
    assert (memory.steps, memory.closed) == ([], [False])


def test_a_row_waits_for_the_evaluation_that_a_run_owes(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = understudy.api.evaluate_tasks, [0]

    def fails_once(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise ServerUnavailable("away")
        return own(*arguments)

    monkeypatch.setattr(understudy.api, "evaluate_tasks", fails_once)
    with pytest.raises(ServerUnavailable):
        understudy.distill(training(tmp_path), quiet=True)
    assert (memory.steps, memory.closed) == ([0, 1], [False])
    assert metrics(tmp_path / "run")[-1]["step"] == 2
    memory.last_step = 1
    understudy.distill(training(tmp_path), quiet=True, resume=True)
    assert memory.steps == [0, 1, 2]
    assert "eval/sums/greedy" in memory.logged[-1][1]
    assert memory.closed == [False, True]


def test_the_update_that_a_run_ended_after_is_sent(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **named: Any) -> Any:
        raise ServerUnavailable("away")

    monkeypatch.setattr("understudy.loop.sync_weights", fails)  # after the row, before the end of the step
    with pytest.raises(ServerUnavailable):
        understudy.distill(training(tmp_path), quiet=True)
    assert memory.steps == [0, 1]

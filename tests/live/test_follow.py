"""A run's folder read from outside while it is written."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from understudy.checkpoints import write_atomic
from understudy.errors import ConfigError
from understudy.live.follow import AddedLines, Follower, run_in, title_of


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def add(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """As a run at work holds it."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.toml").write_text("# understudy distill, resolved\n[optim]\nnum_steps = 9\n", encoding="utf-8")
    return folder


def test_half_a_line_waits_for_its_rest(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = AddedLines(path)
    assert reader.read() == ([], True)  # not there yet
    path.write_text('{"step": 1}\n{"st', encoding="utf-8")
    assert reader.read() == ([{"step": 1}], True)
    assert reader.read() == ([], False)
    add(path, 'ep": 2}')
    assert reader.read() == ([], False)
    add(path, "\n")
    assert reader.read() == ([{"step": 2}], False)
    reader.close()


def test_lines_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": \n[1]\n\xff\xfe\n\n{"step": 2}\n')
    reader = AddedLines(path)
    assert reader.read()[0] == [{"step": 1}, {"step": 2}]
    assert reader.broken == 3
    reader.close()


def test_a_file_that_is_replaced_or_cut_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines({"step": 1}, {"step": 2}), encoding="utf-8")
    reader = AddedLines(path)
    reader.read()
    write_atomic(path, lines({"step": 1}, {"step": 9}))  # the same length, another file
    assert reader.read() == ([{"step": 1}, {"step": 9}], True)
    path.write_text(lines({"step": 1}), encoding="utf-8")
    assert reader.read() == ([{"step": 1}], True)
    path.unlink()
    assert reader.read() == ([], True)
    assert reader.read() == ([], True)
    reader.close()


def test_a_run_is_followed_from_its_first_row_to_its_last(run: Path) -> None:
    follower, metrics = Follower(run), run / "metrics.jsonl"
    with held(run):
        seen = follower.look()
        assert (seen.running, seen.note, seen.track.done, seen.track.total) == (True, "starting", 0, 9)
        assert (seen.track.method, seen.sample, seen.alarm) == ("distill", None, None)
        metrics.write_text(lines({"step": 1, "optim/loss": 2.0}), encoding="utf-8")
        (run / "rollouts" / "step_000000.jsonl").write_text(lines({"step": 0, "n": 0}, {"step": 0, "n": 1}))
        add(run / "guards.jsonl", lines({"step": 1, "guard": "length"}, {"step": 1, "guard": "entropy"}))
        seen = follower.look()
        assert (seen.note, seen.track.done, seen.sample) == ("", 1, {"step": 0, "n": 0})
        assert seen.alarm == {"step": 1, "guard": "entropy"}
        assert follower.look().alarm == seen.alarm
        # An evaluation is added to the newest row: the file is another one.
        write_atomic(metrics, lines({"step": 1, "optim/loss": 2.0, "eval/a/t1": 0.5}))
        add(metrics, lines({"step": 2}) + '{"step": ')
        (run / "rollouts" / "step_000010.jsonl").write_text(lines({"step": 10}))
        seen = follower.look()
        assert [p.row for p in seen.track.points] == [{"step": 1, "optim/loss": 2.0, "eval/a/t1": 0.5}, {"step": 2}]
        assert (seen.track.points[-1].at is None, seen.sample) == (False, {"step": 10})
    seen = follower.look()
    assert (seen.running, seen.note) == (False, "stopped after step 2; --resume goes on")
    # --resume: what came after the checkpoint is gone, and the run may be longer.
    (run / "config.toml").write_text("# understudy distill, resolved\n[optim]\nnum_steps = 2\n", encoding="utf-8")
    write_atomic(metrics, lines({"step": 1}))
    write_atomic(run / "guards.jsonl", "")
    with held(run):
        seen = follower.look()
        assert (seen.track.done, seen.alarm) == (1, None)
    add(metrics, "nonsense\n" + lines({"step": 2}))
    seen = follower.look()
    assert (seen.track.total, seen.note) == (2, "finished, 1 unreadable lines left out")
    follower.close()


@pytest.mark.parametrize(("method", "result"), [("generate", "samples.jsonl"), ("eval", "evaluation.json")])
def test_without_steps_the_result_tells_whether_it_is_finished(method: str, result: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f"# understudy {method}, resolved\n", encoding="utf-8")
    follower = Follower(tmp_path)
    with held(tmp_path):
        assert follower.look().note == ""
    assert follower.look().note == f"stopped before {result} was whole"
    (tmp_path / result).write_text("", encoding="utf-8")
    assert follower.look().note == "finished"
    follower.close()


def test_of_an_unknown_command_only_that_it_does_not_run_is_known(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[optim]\nnum_steps = 9\n", encoding="utf-8")
    follower = Follower(tmp_path)
    assert follower.look().note == "not running"
    follower.close()


def test_titles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert title_of(Path("runs/a"), "rl") == "rl  runs/a"
    assert title_of(tmp_path / "runs" / "a", "rl") == "rl  runs/a"
    plan = {"plan": {"cycles": 2, "phases": [{"once": True}, {"once": False}, {"once": False}]}}
    (tmp_path / "pipeline.json").write_text(json.dumps(plan), encoding="utf-8")
    assert title_of(tmp_path / "02-learn", "sft") == "phase 2 of 5:  sft  02-learn"


def test_what_is_watched(run: Path, tmp_path: Path) -> None:
    assert run_in(run) == run
    for folder, got in ((tmp_path / "no", "no such folder"), (run / "rollouts", "a folder without a run")):
        with pytest.raises(ConfigError) as error:
            run_in(folder)
        assert error.value.got == got
    (tmp_path / "pipeline.json").write_text("{}", encoding="utf-8")
    assert run_in(tmp_path) == tmp_path  # before its first phase
    for name in ("01-a", "10-c", "09-b"):
        (tmp_path / name).mkdir()
    assert run_in(tmp_path).name == "10-c"


def test_following_needs_no_torch() -> None:
    code = "import sys, understudy.live.watch; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

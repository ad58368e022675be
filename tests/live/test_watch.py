"""`understudy watch`: from another shell, beside a run, and afterwards."""

from __future__ import annotations

import fcntl
import io
import json
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import pytest
from rich.console import Console

from terminal import Terminal
from understudy.live.watch import watch
from user import bpe_tokenizer, run_cli, save_model, tree, write_rows, write_toml


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def hold(folder: Path) -> IO[str]:
    lock = (folder / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def run_folder(folder: Path, *, steps: int = 3, method: str = "sft") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f"# understudy {method}, resolved\n[optim]\nnum_steps = {steps}\n")
    return folder


def test_a_finished_run_is_shown_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_folder(tmp_path / "run")
    (run / "metrics.jsonl").write_text(lines({"step": 2}, {"step": 3, "optim/loss": 0.5}) + '{"step": 4')
    assert run_cli(monkeypatch, "watch", "run") == 0
    assert capsys.readouterr().out.splitlines() == ["sft  run step 3/3  loss 0.500", "sft  run step 3/3: finished"]


def test_a_run_is_followed_until_it_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, out = run_folder(Path("run")), io.StringIO()
    lock = hold(run)
    thread = threading.Thread(target=watch, args=(run, Console(file=out)), kwargs={"every": 0.01})
    thread.start()
    with (run / "metrics.jsonl").open("a") as file:
        for step in (1, 2):
            file.write(f'{{"step": {step}, "eval/a/t1"')
            file.flush()
            time.sleep(0.05)
            file.write(f": 0.{step}}}\n")
            file.flush()
            time.sleep(0.2)
    assert thread.is_alive()
    lock.close()
    thread.join(timeout=30)
    assert not thread.is_alive()
    first, second, last = out.getvalue().splitlines()
    assert first.startswith("sft  run step 1/3")
    assert first.endswith("  a/t1 0.100")
    assert second.startswith("sft  run step 2/3, ")  # two rows came while it looked: it knows the pace
    assert second.endswith("  a/t1 0.200")
    assert last == "sft  run step 2/3: stopped after step 2; --resume goes on"


def test_a_pipelines_phases_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan, out = Path("plan"), io.StringIO()
    plan.mkdir()
    phases = [{"once": False}, {"once": False}]
    (plan / "pipeline.json").write_text(json.dumps({"plan": {"cycles": 1, "phases": phases}}))
    whole = hold(plan)
    thread = threading.Thread(target=watch, args=(plan, Console(file=out)), kwargs={"every": 0.01})
    thread.start()
    for name, method in (("01-a", "sft"), ("02-b", "rl")):
        time.sleep(0.1)
        run = run_folder(plan / name, steps=1, method=method)
        own = hold(run)
        (run / "metrics.jsonl").write_text(lines({"step": 1, "optim/loss": 0.5}))
        time.sleep(0.2)
        own.close()
    time.sleep(0.1)
    whole.close()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert out.getvalue().splitlines() == [
        "phase 1 of 2:  sft  plan/01-a step 1/1  loss 0.500",
        "phase 2 of 2:  rl  plan/02-b step 1/1  loss 0.500",
        "phase 2 of 2:  rl  plan/02-b step 1/1: finished",
    ]


def test_what_is_no_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli(monkeypatch, "watch", "nowhere") == 2
    assert "no such folder" in capsys.readouterr().err
    run_folder(Path("run"))
    assert run_cli(monkeypatch, "watch", "run", "--every", "0") == 2
    assert "seconds above 0" in capsys.readouterr().err


def test_a_run_and_its_watcher_on_two_terminals(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", bpe_tokenizer())
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i} + 1 ="} for i in range(8)])
    config = tree(model, model, rows, Path("run"), optim={"num_steps": 100000}, rollouts={"every": 5, "per_step": 2})
    write_toml(tmp_path / "run.toml", config)
    command = [sys.executable, "-m", "understudy"]
    run = Terminal([*command, "distill", "run.toml"], folder=tmp_path)
    watcher = None
    try:
        run.read_until(lambda text: "tokens/s" in text and "reverse KL" in text)
        watcher = Terminal([*command, "watch", "run", "--every", "0.1"], folder=tmp_path, columns=70)
        for terminal in (run, watcher):
            terminal.read_until(lambda text: "distill  run" in text and "orange: the teacher" in text)
        run.drain()
        run.press(b"\x03")
        assert run.wait() == 130
        assert watcher.wait() == 0
        assert "stopped after step" in watcher.screen.text
        for terminal in (run, watcher):
            assert terminal.is_sane
            labels = [line.split("  ")[0] for line in terminal.screen.text.split("\n")]
            assert {"reverse KL", "length", "gradient norm"} <= set(labels)
        assert run.screen.text.split("\n")[-2].startswith("stopped after step")
    finally:
        for terminal in (run, watcher):
            if terminal is not None:
                terminal.close()

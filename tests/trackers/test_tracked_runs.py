"""A real run with all trackers: killed in the middle, it goes on, and each of them has every step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from read_back import wandb_log, wandb_losses

from understudy.metrics import read_metrics
from user import bpe_tokenizer, metrics, save_model, tree, write_rows, write_toml

pytestmark = [pytest.mark.trackers, pytest.mark.filterwarnings("default")]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "understudy", "distill", "run.toml", *arguments]


def write_config(folder: Path) -> None:
    model = save_model(folder / "model", bpe_tokenizer())
    teacher = save_model(folder / "teacher", bpe_tokenizer(), seed=1)
    rows = write_rows(folder / "rows.jsonl", [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(8)])
    task = {"name": "sums", "path": str(rows), "grader": "last_number", "temperatures": [0.0]}
    sections = {
        # Steps of some tenths of a second: trackers keep up with them.
        "sampling": {"group_size": 4, "groups_per_batch": 8, "max_completion_tokens": 96, "stop_token_ids": [2]},
        "optim": {"num_steps": 1000},
        "checkpoints": {"every": 4},
        "evaluation": {"tasks": [task], "every": 2},
        "tracking": {"trackers": ["tensorboard", "wandb", "trackio", "mlflow"], "project": "sums"},
        "guards": {"ratio": {"abs_log_mean": 1e-12}},
        "objective": {"estimator": "sampled"},
    }
    write_toml(folder / "run.toml", tree(model, teacher, rows, Path("run"), **sections))


def mlflow_losses(project: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name(project)
    found = client.search_runs([experiment.experiment_id]) if experiment else []
    return [(one.step, one.value) for run in found for one in client.get_metric_history(run.info.run_id, "optim/loss")]


def tensorboard_losses(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("optim/loss")]


def trackio_losses(project: str) -> list[tuple[int, float]]:
    """Read by a process of its own: trackio keeps to the TRACKIO_DIR of its import, which may be another test's."""
    code = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S; "
        "[name] = S.get_runs(sys.argv[1]); print(json.dumps(S.get_logs(sys.argv[1], name)))"
    )
    read = subprocess.run([sys.executable, "-c", code, project], capture_output=True, text=True, check=True)
    rows = json.loads(read.stdout)
    return [(row["step"], row["optim/loss"]) for row in rows if "optim/loss" in row]


def test_a_killed_run_is_whole_in_each_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # that of another test in this process
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    write_config(tmp_path)
    assert mlflow_losses("sums") == []  # its tables are made by one process alone
    run = tmp_path / "run"
    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(command(), cwd=tmp_path, stderr=log, stdout=log, env=os.environ)
        try:
            end, held = time.monotonic() + 240, 0
            while held < 5:  # all of them have some of its steps, then
                assert first.poll() is None, (tmp_path / "first.log").read_text()
                assert time.monotonic() < end, (tmp_path / "first.log").read_text()
                time.sleep(0.5)
                written = sum(path.stat().st_size for path in run.glob("wandb/offline-*/run-*.wandb"))
                # What a block holds is on its disk, and is two or three steps.
                held = min(written // 8192, len(mlflow_losses("sums")))
        finally:
            first.kill()
            first.wait()
    done = [row["step"] for row in read_metrics(run / "metrics.jsonl") if row["step"] % 4 == 0][-1]
    steps = str(done + 6)
    again = subprocess.run(
        command("--resume", "--optim.num_steps", steps), cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert again.returncode == 0, again.stderr
    assert "dropped" not in (tmp_path / "first.log").read_text() + again.stderr
    known = {row["step"]: row["optim/loss"] for row in metrics(run) if "optim/loss" in row}
    assert [*known] == [*range(1, done + 7)]
    for found in (tensorboard_losses(run / "tensorboard"), trackio_losses("sums"), mlflow_losses("sums")):
        assert {step: count for step, count in Counter(step for step, _ in found).items() if count > 1} == {}
        assert_all({step: value for step, value in found if step <= done + 6}, known)
    run_id = json.loads((run / "tracking.json").read_text())["run_id"]
    sessions = [wandb_losses(wandb_log(path)) for path in sorted(run.glob(f"wandb/offline-*/run-{run_id}.wandb"))]
    assert len(sessions) == 2
    assert_all({step: loss for held in sessions for step, loss in held.items() if step <= done + 6}, known)
    assert (run / "guards.jsonl").exists()


def assert_all(found: Mapping[int, float], known: Mapping[int, float]) -> None:
    assert sorted(found) == sorted(known)
    assert found == {step: pytest.approx(loss, rel=1e-6) for step, loss in known.items()}

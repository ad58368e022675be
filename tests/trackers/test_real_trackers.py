"""The real packages, without a network: what was sent is read back. ``make test-trackers`` has them in a venv."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from read_back import wandb_losses, wandb_records

from terminal import Terminal
from understudy import RunConfig
from understudy.trackers import Trackers, fan_out

# The packages warn of many things of their own.
pytestmark = [pytest.mark.trackers, pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take their time to import, too."""
    monkeypatch.setattr(fan_out, "CUT_SECONDS", 120.0)


RECORD = {
    "prompt_index": 3,
    "reward": None,
    "completion_ids": [1],
    "teacher_logprobs": None,
    "prompt_text": "what?",
    "completion_text": "<script>alert(1)</script>",
}
ALARM = {"step": 2, "guard": "length", "action": "warn", "words": "completion_length/mean is 9", "causes": "a loop"}
SAID = "completion_length/mean is 9"


def row(step: int) -> dict[str, float]:
    return {"step": step, "optim/loss": 1 / (step + 1), "eval/a (hard)/t1_pass@2": 0.5, "cost/seconds": float(step)}


def sent_in_two_sessions(name: str, folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Steps 0 to 5; then the run goes on after its checkpoint of step 3, to step 7. The run's id."""
    folder.mkdir()
    sections = {
        "student": {"model": "m"},
        "optim": {"num_steps": 7},
        "tracking": {"trackers": [name], "project": "sums", "samples": 1},
    }
    config = RunConfig.model_validate({"output_dir": str(folder), **sections})

    def session(after: int | None, steps: range) -> None:
        with Trackers(config, folder, goes_on_after=after) as trackers:
            trackers.start([] if after is None else [row(step) for step in range(after + 1)])
            for step in steps:
                trackers.log(row(step))
                if step == 2:
                    trackers.log_samples(step, [RECORD])
                    trackers.log_alarm(ALARM)

    session(None, range(6))
    session(3, range(4, 8))
    assert [r.getMessage() for r in caplog.records if r.name == "understudy"] == []
    return json.loads((folder / "tracking.json").read_text())["run_id"]


def losses(steps: range) -> dict[int, float]:
    return {step: pytest.approx(1 / (step + 1)) for step in steps}


def test_tensorboard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sent_in_two_sessions("tensorboard", tmp_path / "run", caplog)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("optim/loss")
    assert [event.step for event in scalars] == list(range(8))  # 4 and 5 once: the second session's
    assert {event.step: event.value for event in scalars} == losses(range(8))
    assert set(events.Tags()["scalars"]) == {"optim/loss", "eval/a (hard)/t1_pass_2", "cost/seconds"}
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert RECORD["completion_text"] in texts["rollouts/text_summary"]
    assert "| student.model | m |" in texts["config/text_summary"]
    assert SAID in texts["alarms/length/text_summary"]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_id = sent_in_two_sessions("wandb", tmp_path / "run", caplog)
    sessions = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert [folder.name.endswith(f"-{run_id}") for folder in sessions] == [True, True]
    first, second = (wandb_records(folder / f"run-{run_id}.wandb") for folder in sessions)
    assert wandb_losses(first) == losses(range(6))
    assert wandb_losses(second) == losses(range(6, 8))
    [run] = [record.run for record in first if record.HasField("run")][:1]
    assert (run.run_id, run.project, run.display_name) == (run_id, "sums", "run")
    assert json.loads({i.key: i.value_json for i in run.config.update}["student.model"]) == "m"
    [page] = sessions[0].rglob("rollouts_*.html")
    assert "&lt;script&gt;" in page.read_text()
    assert "<script>" not in page.read_text()
    [alarm] = [path for path in sessions[0].rglob("*.html") if path != page]
    assert SAID in alarm.read_text()


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported: nothing has before
    run_id = sent_in_two_sessions("trackio", tmp_path / "run", caplog)
    from trackio.sqlite_storage import SQLiteStorage

    name = f"run-{run_id[:6]}"
    assert SQLiteStorage.get_runs("sums") == [name]
    rows = SQLiteStorage.get_logs("sums", name)
    found = [(entry["step"], entry["optim/loss"]) for entry in rows if "optim/loss" in entry]
    assert [step for step, _ in found] == list(range(8))
    assert dict(found) == losses(range(8))
    [text] = [entry["rollouts"] for entry in rows if "rollouts" in entry]
    assert RECORD["completion_text"] in str(text)
    assert [SAID in str(entry["alarms/length"]) for entry in rows if "alarms/length" in entry] == [True]


@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)  # artifacts of a database go to ./mlruns
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri() if store == "file" else f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run_id = sent_in_two_sessions("mlflow", tmp_path / "run", caplog)
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("sums")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.tags["understudy.run_id"] == run_id
    assert (run.info.status, run.info.run_name, run.data.params["student.model"]) == ("FINISHED", "run", "m")
    history = client.get_metric_history(run.info.run_id, "optim/loss")
    assert [metric.step for metric in history] == list(range(8))
    assert {metric.step: metric.value for metric in history} == losses(range(8))
    assert "eval/a _hard_/t1_pass_at_2" in run.data.metrics
    path = client.download_artifacts(run.info.run_id, "rollouts/step_000002.md", str(tmp_path))
    assert RECORD["completion_text"] in Path(path).read_text()
    path = client.download_artifacts(run.info.run_id, "alarms/length/step_000002.md", str(tmp_path))
    assert SAID in Path(path).read_text()


WITHOUT_A_KEY = """
import logging, time
from pathlib import Path
from understudy import RunConfig
from understudy.trackers import Trackers
logging.basicConfig(format="LOG %(message)s", level=logging.WARNING)
tree = {"output_dir": "run", "student": {"model": "m"}, "tracking": {"trackers": ["wandb"]}}
config = RunConfig.model_validate(tree)
Path("run").mkdir()
with Trackers(config, Path("run")) as trackers:
    trackers.start()
    trackers.log({"step": 1, "optim/loss": 1.0})
"""


def test_wandb_asks_for_no_key_in_the_middle_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a key may be kept
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    terminal = Terminal([sys.executable, "-c", WITHOUT_A_KEY], folder=tmp_path, columns=400)
    try:
        assert terminal.wait(seconds=100) == 0
        told = [line for line in terminal.screen.text.split("\n") if line.startswith("LOG")]
        assert [line.split(":")[0] for line in told] == ["LOG tracker wandb is dropped"]
        assert "No API key configured. Use `wandb login`" in told[0]
        assert terminal.is_sane
    finally:
        terminal.close()

"""The command line: help, keys, overrides, exit codes."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest

from understudy import ConfigError, RunConfig
from understudy.cli_arguments import parse_overrides, smoke_config
from user import metrics, run_cli, save_model, tree, word_tokenizer, write_rows, write_toml

Printed = pytest.CaptureFixture[str]


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", word_tokenizer())
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"w{i}", "answer": "w1"} for i in range(4)])
    return write_toml(tmp_path / "run.toml", tree(tmp_path / "model", tmp_path / "model", rows, tmp_path / "run"))


def test_help_shows_the_file_the_options_and_an_example(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    for command in ("distill", "rl", "sft", "generate", "eval"):
        assert run_cli(monkeypatch, command, "--help") == 0
        text = " ".join(capsys.readouterr().out.split())
        assert f"understudy {command} run.toml" in text
        assert "The TOML file that describes the run." in text
        assert "--optim.learning_rate 1e-4" in text
        assert ("--resume" in text) == (command != "eval")


def test_keys_as_schema(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    assert run_cli(monkeypatch, "keys", "--schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert set(schema["required"]) == {"output_dir", "student"}


def test_keys_as_text(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    assert run_cli(monkeypatch, "keys") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "optim.learning_rate  (float; 1e-05)" in lines
    described = dict(zip(lines[::2], lines[1::2], strict=True))
    assert all(text.startswith("    ") for text in described.values())
    undescribed = [key for key, text in described.items() if not text.strip()]
    assert undescribed == []


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ((), ["RUN"]),
        (("nowhere.toml",), ["nowhere.toml", "no such file"]),
        ((".",), ["a folder"]),
        (("broken.toml",), ["broken.toml", "valid TOML", "line 2"]),
        (("run.toml", "--optim.lr", "1"), ["optim.lr", "learning_rate"]),
        (("run.toml", "--optim.learning_rate"), ["--optim.learning_rate", "no value"]),
        (("run.toml", "optim.learning_rate", "1"), ["optim.learning_rate", "a value without a key"]),
        (("run.toml", "--optim.learning_rate", "fast"), ["optim.learning_rate", "'fast'"]),
        (("run.toml", "--student.model.name", "x"), ["--student.model.name", "a section"]),
    ],
)
def test_bad_arguments(
    arguments: tuple[str, ...],
    fragments: list[str],
    run_toml: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Printed,
) -> None:
    monkeypatch.chdir(run_toml.parent)
    Path("broken.toml").write_text('output_dir = "run"\n[student\n')
    assert run_cli(monkeypatch, "distill", *arguments) == 2
    text = capsys.readouterr().err
    for fragment in fragments:
        assert fragment in text
    assert "Traceback" not in text
    assert not Path("run").exists()


def test_overrides() -> None:
    assert parse_overrides(("--a.b", "1", "--c=x=y", "--d", "--e")) == {"a.b": "1", "c": "x=y", "d": "--e"}
    with pytest.raises(ConfigError, match="--a"):
        parse_overrides(("--a",))


def test_overrides_reach_the_run(run_toml: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--optim.num_steps=1", "--optim.learning-rate", "2e-3", "--output_dir", tmp_path / "other"]
    assert run_cli(monkeypatch, "distill", run_toml, *arguments, "--student.lora.rank", 3, "--prompts.limit", 2) == 0
    stored = RunConfig.from_toml(tmp_path / "other" / "config.toml")
    assert (stored.optim.num_steps, stored.optim.learning_rate, stored.prompts and stored.prompts.limit) == (1, 2e-3, 2)
    assert stored.student.lora is not None
    assert stored.student.lora.rank == 3
    assert [row["optim/learning_rate"] for row in metrics(tmp_path / "other")] == [2e-3]


def test_a_stored_configuration_runs_again_the_same(
    run_toml: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run_cli(monkeypatch, "distill", run_toml) == 0
    again = tmp_path / "again"
    assert run_cli(monkeypatch, "distill", tmp_path / "run" / "config.toml", "--output_dir", again) == 0
    weights = "checkpoints/step_000002/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (again / weights).read_bytes()


def test_smoke(run_toml: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run_cli(monkeypatch, "distill", run_toml, "--smoke", "--optim.num_steps", 500) == 0
    assert not (tmp_path / "run").exists()
    assert [row["step"] for row in metrics(tmp_path / "run-smoke")] == [1, 2]
    config = smoke_config(RunConfig.from_toml(run_toml, {"sampling.max_completion_tokens": 4096}))
    assert config.sampling.max_completion_tokens == 32


def test_smoke_replaces_its_own_folder_and_no_other(
    run_toml: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Printed
) -> None:
    folder = tmp_path / "run-smoke"
    assert run_cli(monkeypatch, "distill", run_toml, "--smoke") == 0
    (folder / "mark").touch()
    assert run_cli(monkeypatch, "distill", run_toml, "--smoke", "--resume") == 0  # continued, not replaced
    assert (folder / "mark").exists()
    with (folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_cli(monkeypatch, "distill", run_toml, "--smoke") == 2
    assert (folder / "mark").exists()
    assert run_cli(monkeypatch, "distill", run_toml, "--smoke", "--optim.learning_rate", "2e-3") == 0
    assert not (folder / "mark").exists()
    assert metrics(folder)[-1]["optim/learning_rate"] == 2e-3
    shutil.rmtree(folder)
    assert run_cli(monkeypatch, "distill", run_toml, "--output_dir", folder, "--optim.num_steps", 3) == 0
    assert run_cli(monkeypatch, "distill", run_toml, "--smoke") == 2  # a real run of that name
    assert len(metrics(folder)) == 3
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.toml").write_text("mine")
    assert run_cli(monkeypatch, "distill", run_toml, "--smoke") == 2
    assert "--resume" in capsys.readouterr().err
    assert (folder / "config.toml").read_text() == "mine"


def test_smoke_raises_no_limit(run_toml: Path) -> None:
    task = {"path": "x", "limit": 3, "max_completion_tokens": 5}
    small: dict[str, object] = {
        "prompts.limit": 2,
        "supervised.batch_size": 3,
        "optim.num_steps": 1,
        "sampling.max_completion_tokens": 6,
        "evaluation.tasks": [task],
    }
    config = RunConfig.from_toml(run_toml, small)
    assert smoke_config(config) == config.model_copy(update={"output_dir": f"{config.output_dir}-smoke"})
    large = {"prompts.limit": 999, "supervised.batch_size": 99, "evaluation.tasks": [{"path": "x", "limit": 99}]}
    config = smoke_config(RunConfig.from_toml(run_toml, large | {"optim.num_steps": 99}))
    assert config.prompts is not None
    limits = (config.prompts.limit, config.supervised.batch_size, config.optim.num_steps)
    assert (*limits, config.evaluation.tasks[0].limit) == (16, 4, 2, 8)
    [long] = smoke_config(
        RunConfig.from_toml(run_toml, {"evaluation.tasks": [{"path": "x", "max_completion_tokens": 99, "samples": 16}]})
    ).evaluation.tasks
    assert (long.limit, long.max_completion_tokens, long.samples) == (8, 32, 2)


def test_a_grader_in_the_working_folder(run_toml: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "house_grader.py").write_text("def grade(prompt, completion, finish_reason):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path)
    assert run_cli(monkeypatch, "rl", "run.toml", "--reward.grader", "house_grader:grade") == 0
    assert metrics(tmp_path / "run")[-1]["reward/mean"] == 0.5


def test_report_again(run_toml: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Printed) -> None:
    assert run_cli(monkeypatch, "distill", run_toml) == 0
    page = tmp_path / "run" / "report.html"
    first = page.read_text()
    page.unlink()
    assert run_cli(monkeypatch, "report", tmp_path / "run") == 0
    assert page.read_text() == first
    assert run_cli(monkeypatch, "report", tmp_path / "nothing") == 2
    assert run_cli(monkeypatch, "report") == 2
    assert "no such folder" in capsys.readouterr().err

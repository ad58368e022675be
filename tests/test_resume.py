"""A run that is killed anywhere and resumed ends, bit for bit, where an undisturbed one ends.

Runs live in processes of their own, forked from a server that has imported everything already; the one that must die
sends itself SIGKILL inside the named function, where no handler and no ``finally`` can help it.
"""

from __future__ import annotations

import fcntl
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import understudy
from understudy import ConfigError, Prompt, RunConfig
from understudy.backends.loading import load_model
from understudy.checkpoints import jsonl, write_sums
from user import (
    amounts,
    assert_same_run,
    interrupt_in,
    metrics,
    owner_of,
    run_cli,
    save_model,
    tree,
    word_tokenizer,
    write_rows,
    write_toml,
)

STEPS = 5
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["understudy.api", "understudy.report", "peft", "user", "test_resume"])


def grade(prompt: Prompt, completion: str, finish_reason: str) -> float:
    """A reward that random models earn now and then."""
    return float(len(completion) % 3 == 0)


def half_of_the_bytes(content: Mapping[str, Any], path: Path) -> None:
    """torch.save, cut short."""
    whole = io.BytesIO()
    ORIGINAL_SAVE(content, whole)
    path.write_bytes(whole.getvalue()[: whole.tell() // 2])


def half_of_the_line(log: Any, row: Mapping[str, Any]) -> None:
    with log.path.open("a") as file:
        file.write(json.dumps(row)[:40])


def half_of_the_file(path: Path, text: str) -> None:
    path.with_name(path.name + ".partial").write_text(text[: len(text) // 2])


def half_of_the_rows(path: Path, rows: Any) -> None:
    half_of_the_file(path, jsonl(rows))


def one_file_of(folder: Path) -> None:
    next(path for path in folder.iterdir() if path.is_file()).unlink()


def nothing(*arguments: object, **keywords: object) -> None:
    pass


ORIGINAL_SAVE = torch.save
# Where it dies: module, function, at which call, and what the function still gets done.
DEATHS: dict[str, tuple[str, str, int, Callable[..., object]]] = {
    "before anything is written": ("understudy.api", "assemble", 1, nothing),
    "in config.toml": ("understudy.runs", "write_atomic", 1, half_of_the_file),
    "in the first evaluation": ("understudy.api", "evaluate_tasks", 1, nothing),
    "before the first checkpoint": ("understudy.updates", "optimizer_step", 2, nothing),
    "between update and log": ("understudy.loop", "sync_weights", 3, nothing),
    "in a metrics line": ("understudy.metrics.MetricsLog", "append", 5, half_of_the_line),
    "between metrics and costs": ("understudy.runs", "write_json", 4, nothing),
    # Calls before it: costs of rows 0 to 2, rollouts of steps 0 and 2.
    "in costs.json": ("understudy.checkpoints", "write_atomic", 6, half_of_the_file),
    "in a step's rollouts": ("understudy.rollout_store", "write_jsonl", 2, half_of_the_rows),
    "in the first checkpoint's state": ("torch", "save", 1, half_of_the_bytes),
    "in the second checkpoint's state": ("torch", "save", 2, half_of_the_bytes),
    "before a checkpoint's rename": ("understudy.checkpoints", "flush_tree", 2, nothing),
    "between rename and cleanup": ("understudy.checkpoints", "list_checkpoints", 2, nothing),
    "in the cleanup": ("understudy.checkpoints.shutil", "rmtree", 1, one_file_of),
    "in a later evaluation": ("understudy.api", "evaluate_tasks", 2, nothing),
    "in the last evaluation": ("understudy.api", "evaluate_tasks", 3, nothing),
    "in the last checkpoint": ("torch", "save", 3, half_of_the_bytes),
    "before the last rollouts": ("understudy.api", "_keep_final_rollouts", 1, nothing),
    "in the last rollouts": ("understudy.rollout_store", "write_jsonl", 4, half_of_the_rows),
    "in the report": ("understudy.report", "write_run_report", 1, nothing),
}


def half_of_the_piece(samples: Any, rows: Any) -> None:
    with (samples.path.parent / "samples.partial.jsonl").open("a", encoding="utf-8") as file:
        file.write(jsonl(rows)[:-20])


GENERATE_DEATHS: dict[str, tuple[str, str, int, Callable[..., object]]] = {
    "before the first piece": ("understudy.api", "sample_rollouts", 1, nothing),
    "in the third piece": ("understudy.api", "sample_rollouts", 3, nothing),
    "in the second piece's rows": ("understudy.samples.SampleFile", "append", 2, half_of_the_piece),
    "in the last piece's rows": ("understudy.samples.SampleFile", "append", 4, half_of_the_piece),
    "before the samples get their name": ("understudy.samples.SampleFile", "finish", 1, nothing),
}


def dying(original: Callable[..., Any], at_call: int, last_words: Callable[..., object]) -> Callable[..., Any]:
    calls = 0

    def function(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call:
            last_words(*arguments, **keywords)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    return function


def work(method: str, config: Mapping[str, Any], death: str | None, resume: bool) -> None:
    torch.set_num_threads(1)
    if death is not None:
        module, name, at_call, last_words = (DEATHS | GENERATE_DEATHS)[death]
        owner = owner_of(module)
        setattr(owner, name, dying(getattr(owner, name), at_call, last_words))
    getattr(understudy, method)(RunConfig.model_validate(config), resume=resume, quiet=True)


def run(method: str, config: Mapping[str, Any], *, death: str | None = None, resume: bool = False) -> None:
    process = forks.Process(target=work, args=(method, config, death, resume))
    process.start()
    process.join(120)
    assert process.exitcode == (-signal.SIGKILL if death else 0)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    save_model(folder / "student", word_tokenizer())
    save_model(folder / "teacher", word_tokenizer(), seed=1)
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": f"w{i}", "completion": f"w{i} w{i + 2}"} for i in range(7)]
    write_rows(folder / "rows.jsonl", rows)
    return folder


def config_for(method: str, material: Path, out: Path, *, lora: bool = False) -> dict[str, Any]:
    """Checkpoints after 2, 4 and 5 steps (one kept but the last), evaluations before and after 3 and 5."""
    config = tree(
        material / "student",
        material / "teacher" if method == "distill" else None,
        material / "rows.jsonl",
        out,
        optim={"learning_rate": 1e-2, "num_steps": STEPS, "schedule": "cosine", "warmup_steps": 1},
        checkpoints={"every": 2, "keep": 1},
        rollouts={"every": 2, "per_step": 3, "topk": 2},
        evaluation={"every": 3, "tasks": [{"path": str(material / "rows.jsonl"), "limit": 3}]},
    )
    if method == "rl":
        config["reward"] = {"grader": "test_resume:grade"}
    if lora:
        config["student"]["lora"] = {"rank": 2, "alpha": 4.0}
    return config


Finished = dict[str, Path]


@pytest.fixture(scope="module")
def undisturbed(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Runs that nothing happened to, by name."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name in ("distill", "rl", "sft", "lora"):
        method = "distill" if name == "lora" else name
        run(method, config_for(method, material, folder / name, lora=name == "lora"))
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("death", DEATHS)
def test_distill_survives(death: str, material: Path, undisturbed: Finished, tmp_path: Path) -> None:
    config = config_for("distill", material, tmp_path / "run")
    run("distill", config, death=death)
    run("distill", config, resume=True)
    assert_same_run(tmp_path / "run", undisturbed["distill"])


@pytest.mark.parametrize(
    ("name", "death"),
    [
        ("rl", "in the second checkpoint's state"),
        ("sft", "in a metrics line"),
        ("lora", "in the second checkpoint's state"),
        ("lora", "before the last rollouts"),
    ],
)
def test_other_methods_survive(name: str, death: str, material: Path, undisturbed: Finished, tmp_path: Path) -> None:
    method = "distill" if name == "lora" else name
    config = config_for(method, material, tmp_path / "run", lora=name == "lora")
    run(method, config, death=death)
    run(method, config, resume=True)
    assert_same_run(tmp_path / "run", undisturbed[name])


@pytest.mark.parametrize("death", GENERATE_DEATHS)
def test_generate_survives(death: str, material: Path, tmp_path: Path) -> None:
    """Four pieces of at most two prompts; the samples are the same, byte for byte."""
    configs = [config_for("distill", material, tmp_path / name) for name in ("whole", "run")]
    for config in configs:
        config["sampling"] |= {"max_batch_rows": 2}
    run("generate", configs[0])
    run("generate", configs[1], death=death)
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    run("generate", configs[1], resume=True)
    names, samples, costs = [], [], []
    for folder in (tmp_path / "whole", tmp_path / "run"):
        names.append(sorted(path.name for path in folder.iterdir()))
        samples.append((folder / "samples.jsonl").read_bytes())
        costs.append(amounts(json.loads((folder / "costs.json").read_text())))
    assert names[0] == names[1] == [".lock", "config.toml", "costs.json", "samples.jsonl"]
    assert samples[0] == samples[1]
    assert samples[0].count(b"\n") == 14
    assert costs[0] == costs[1]


def test_a_run_killed_twice_survives(material: Path, undisturbed: Finished, tmp_path: Path) -> None:
    config = config_for("distill", material, tmp_path / "run")
    run("distill", config, death="in the second checkpoint's state")
    run("distill", config, death="before a checkpoint's rename", resume=True)
    run("distill", config, resume=True)
    assert_same_run(tmp_path / "run", undisturbed["distill"])


def test_more_steps_continue_a_finished_run(material: Path, tmp_path: Path) -> None:
    """Three steps and then two more are five steps: nothing of the first ending stays behind."""
    for name, steps in (("long", STEPS), ("run", 3), ("run", STEPS)):
        config = config_for("distill", material, tmp_path / name)
        config["optim"] |= {"schedule": "constant", "num_steps": steps}
        run("distill", config, resume=(name, steps) == ("run", STEPS))
    assert_same_run(tmp_path / "run", tmp_path / "long")


@pytest.fixture
def finished(undisturbed: Finished, tmp_path: Path) -> Path:
    """A finished run to do things to."""
    return Path(shutil.copytree(undisturbed["distill"], tmp_path / "finished"))


def resume(material: Path, folder: Path, **sections: Any) -> understudy.RunResult:
    config = config_for("distill", material, folder)
    for name, value in sections.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    return understudy.distill(RunConfig.model_validate(config), resume=True, quiet=True)


def test_a_finished_run_is_not_done_again(
    material: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("understudy.api.assemble", lambda *a, **k: pytest.fail("models were loaded"))
    (finished / "report.html").unlink()
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    caplog.set_level("INFO", logger="understudy")
    result = resume(material, finished)
    assert "all 5 steps are done; raise optim.num_steps to go on" in caplog.text
    assert result.metrics == metrics(finished)[-1]
    assert result.student == finished / "checkpoints" / "step_000005"
    assert (finished / "report.html").exists()
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        ("optim", {"learning_rate": 1e-3}, "optim.learning_rate"),
        ("sampling", {"group_size": 3}, "sampling.group_size"),
        ("student", {"lora": {"rank": 2}}, "student.lora.alpha"),
        ("prompts", {"limit": 3}, "prompts.limit"),
        ("optim", {"num_steps": 4}, "optim.num_steps"),
        ("seed", 1, "seed"),
    ],
)
def test_a_changed_experiment_is_refused(
    section: str, values: Any, key: str, material: Path, finished: Path, undisturbed: Finished
) -> None:
    with pytest.raises(ConfigError, match=key) as error:
        resume(material, finished, **{section: values})
    assert "remedy" in str(error.value)
    assert_same_run(finished, undisturbed["distill"])
    resume(material, finished, rollouts={"every": 1}, checkpoints={"keep": 3}, num_threads=2)  # these may change


def test_another_command_is_refused(material: Path, undisturbed: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(undisturbed["sft"], tmp_path / "run"))
    config = config_for("sft", material, folder) | {"reward": {"grader": "test_resume:grade"}}
    with pytest.raises(ConfigError, match=r"command\n.*got: *rl\n.*sft, as the run began"):
        understudy.rl(RunConfig.model_validate(config), resume=True)


def test_a_folder_in_use_is_refused(material: Path, finished: Path) -> None:
    with (finished / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is writing there"):
            resume(material, finished)
    resume(material, finished)


def test_a_folder_is_free_again_after_a_refusal(material: Path, finished: Path) -> None:
    """Even while the caller holds on to the error."""
    with pytest.raises(ConfigError) as kept:
        resume(material, finished, seed=3)
    resume(material, finished)
    assert kept.value.exit_code == 2


def test_a_run_is_not_overwritten(material: Path, finished: Path, undisturbed: Finished) -> None:
    with pytest.raises(ConfigError, match="a run is already there") as error:
        understudy.distill(RunConfig.model_validate(config_for("distill", material, finished)))
    assert "--resume" in error.value.remedy
    assert_same_run(finished, undisturbed["distill"])


def test_a_damaged_checkpoint_is_named(material: Path, finished: Path) -> None:
    path = finished / "checkpoints" / "step_000005" / "trainer_state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"step_000005: not as it was written: trainer_state.pt[\s\S]*copy"):
        resume(material, finished)
    assert path.exists()


@pytest.mark.parametrize(
    ("spoil", "got"),
    [
        (
            lambda state: state["trainer"]["optimizer"]["state"].update({0: {"step": torch.zeros(3)}}),
            "optimizer state 0 of shapes",
        ),
        (lambda state: state.update(trainer={}), "KeyError: 'optimizer'"),
        (lambda state: state["costs"].update(roles=[]), "roles: Input should be a valid dictionary"),
        (lambda state: state.pop("costs"), "Input should be a valid dictionary"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    spoil: Callable[[dict[str, Any]], object], got: str, material: Path, finished: Path
) -> None:
    """One that is whole, and was not written by this run."""
    checkpoint = finished / "checkpoints" / "step_000005"
    state = torch.load(checkpoint / "trainer_state.pt", weights_only=True)
    spoil(state)
    torch.save(state, checkpoint / "trainer_state.pt")
    write_sums(checkpoint)
    config = config_for("distill", material, finished)
    config["optim"]["num_steps"] += 1
    with pytest.raises(ConfigError, match=re.escape(f"checkpoint {checkpoint}")) as refused:
        understudy.distill(RunConfig.model_validate(config), resume=True)
    assert got in refused.value.got


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.pt", "config.json"])
def test_a_damaged_checkpoint_is_passed_over(
    name: str, material: Path, tmp_path: Path, undisturbed: Finished, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on from the one before it, says so, and ends where it would have ended."""
    folder = tmp_path / "run"
    config = config_for("distill", material, folder)
    config["checkpoints"]["keep"] = 2
    run("distill", config)
    path = folder / "checkpoints" / "step_000005" / name
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    caplog.set_level("INFO", logger="understudy")
    resume(material, folder)
    [said] = [message for message in caplog.messages if "is damaged" in message]
    assert said.startswith(f"checkpoint {path.parent} is damaged (not as it was written: {name} (sha256 ")
    assert said.endswith("): going on after step 4 instead")
    assert_same_run(folder, undisturbed["distill"])


def test_a_checkpoint_without_sums_is_passed_over(
    material: Path, tmp_path: Path, undisturbed: Finished, caplog: pytest.LogCaptureFixture
) -> None:
    """The run that wrote it had them; whoever names it as a model needs none."""
    folder = tmp_path / "run"
    config = config_for("distill", material, folder)
    config["checkpoints"]["keep"] = 2
    run("distill", config)
    newest = folder / "checkpoints" / "step_000005"
    (newest / "SHA256SUMS").unlink()
    load_model(str(newest), role="teacher", dtype=torch.float32, device=torch.device("cpu"))
    caplog.set_level("INFO", logger="understudy")
    resume(material, folder)
    said = f"checkpoint {newest} is damaged (without SHA256SUMS): going on after step 4 instead"
    assert said in caplog.messages
    assert_same_run(folder, undisturbed["distill"])


def test_a_damaged_checkpoint_is_no_model(material: Path, finished: Path) -> None:
    """Neither as another run's student nor as its teacher: the weights would load."""
    weights = finished / "checkpoints" / "step_000005" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for role in ("student", "teacher"):
        config = config_for("distill", material, finished.parent / role)
        config[role]["model"] = str(weights.parent)
        with pytest.raises(
            ConfigError, match=rf"{role} model .*step_000005\n.*not as it was written: model.safetensors"
        ):
            understudy.distill(RunConfig.model_validate(config), quiet=True)


def test_a_failing_report_is_no_failing_run(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(folder: Path) -> None:
        raise KeyError("no such column")

    config = RunConfig.model_validate(config_for("distill", material, tmp_path / "run"))
    monkeypatch.setattr("understudy.report.write_run_report", fail)
    result = understudy.distill(config, quiet=True)
    assert result.metrics["step"] == STEPS
    assert "report.html could not be written (KeyError: 'no such column')" in caplog.text


@pytest.mark.parametrize(
    ("place", "at_call", "step"),
    [
        ("understudy.api.evaluate_tasks", 1, 1),
        ("understudy.api.evaluate_tasks", 2, 3),
        ("understudy.loop.sample_rollouts", 2, 2),
        ("understudy.runs.save_checkpoint", 1, 2),
    ],
)
def test_ctrl_c_finishes_the_step(
    place: str,
    at_call: int,
    step: int,
    material: Path,
    undisturbed: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    path = write_toml(tmp_path / "run.toml", config_for("distill", material, folder))
    with monkeypatch.context() as patched:
        interrupt_in(patched, place, at_call=at_call)
        assert run_cli(patched, "distill", path) == 130
    assert f"stopped after step {step}" in (printed := capsys.readouterr().out)
    assert "--resume" in printed
    assert [row["step"] for row in metrics(folder)] == list(range(step + 1))
    assert (folder / "checkpoints" / f"step_{step:06d}" / "trainer_state.pt").exists()
    assert (folder / "report.html").exists()
    assert run_cli(monkeypatch, "distill", path, "--resume") == 0
    assert_same_run(folder, undisturbed["distill"])


def test_ctrl_c_in_the_last_step_changes_nothing(
    material: Path, undisturbed: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_toml(tmp_path / "run.toml", config_for("distill", material, tmp_path / "run"))
    interrupt_in(monkeypatch, "understudy.loop.sample_rollouts", at_call=STEPS)
    assert run_cli(monkeypatch, "distill", path) == 0
    assert_same_run(tmp_path / "run", undisturbed["distill"])


def test_a_second_ctrl_c_stops_at_once(
    material: Path,
    undisturbed: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_toml(tmp_path / "run.toml", config_for("distill", material, tmp_path / "run"))
    with monkeypatch.context() as patched:
        interrupt_in(patched, "understudy.loop.sample_rollouts", at_call=4, times=2)
        assert run_cli(patched, "distill", path) == 130
    assert "interrupted" in capsys.readouterr().err
    assert run_cli(monkeypatch, "distill", path, "--resume") == 0
    assert_same_run(tmp_path / "run", undisturbed["distill"])


@pytest.mark.parametrize("place", ["understudy.api.check_run", "understudy.assembly.load_student"])
def test_ctrl_c_before_the_first_step_leaves_nothing(
    place: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_toml(tmp_path / "run.toml", config_for("distill", material, tmp_path / "run"))
    interrupt_in(monkeypatch, place)
    assert run_cli(monkeypatch, "distill", path) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ctrl_c_at_a_terminal(material: Path, tmp_path: Path) -> None:
    """The real command and a real signal from outside."""
    config = config_for("distill", material, tmp_path / "run")
    config["optim"]["num_steps"] = 100_000
    path = write_toml(tmp_path / "run.toml", config)
    command = [sys.executable, "-m", "understudy", "distill", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "this step is finished and saved first" in err
    assert f"stopped after step {metrics(tmp_path / 'run')[-1]['step']}" in out

"""The demos in miniature, and what their pages say of given numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from understudy.config import RunConfig
from understudy.errors import ConfigError, RunError
from understudy.worlds import assistant_demo, demos, jobs, ledger_demo, ledger_page
from understudy.worlds.jobs import Job, new_folder, run_jobs


def outcome(name: str, t1: float, error: float = 0.01, target: tuple[int, float] | None = None) -> ledger_page.Outcome:
    roles = {
        "student_training": {"tokens": 600_000, "flops": 100e9, "seconds": 10.0},
        "evaluation": {"tokens": 1, "flops": 9e9, "seconds": 9.0},
    }
    return ledger_page.Outcome(name, "", (t1 + 0.1, error), (t1, error), 100, roles, target)


def test_ledger_demo_in_miniature(tmp_path, capsys):
    assert demos.run("ledger", tmp_path / "demo", smoke=True) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "demo"
    page = (folder / "report.html").read_text(encoding="utf-8")
    for arm in ledger_demo.ARMS:
        assert arm.name in printed
        assert arm.description in page
        assert f"understudy {arm.method} {folder / arm.name}.toml" in printed.replace("\n", "")
        rows = [json.loads(line) for line in (folder / f"{arm.name}-smoke" / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1, 2]
    assert ledger_page._LIMITS.split(":")[0] in printed


def test_assistant_demo_in_miniature(tmp_path, capsys):
    assert demos.run("assistant", tmp_path / "demo", smoke=True) == 0
    printed = capsys.readouterr().out
    assert "distilled from the assistant" in printed
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    # Every phase begins where the one before it ended.
    config = RunConfig.from_toml(tmp_path / "demo" / "distill.toml")
    assert config.student.model.endswith("midtrained/checkpoints/step_000002")
    assert config.teacher is not None
    assert config.teacher.model.endswith("assistant/checkpoints/step_000002")


def test_arms_use_equal_samples(tmp_path):
    for arm in ledger_demo.ARMS:
        config = ledger_demo.arm_config(tmp_path, arm)
        if arm.method == "sft":
            per_step = config.supervised.batch_size
        else:
            per_step = config.sampling.group_size * config.sampling.groups_per_batch
        assert per_step == ledger_demo.SAMPLES_PER_STEP
        assert config.optim.num_steps == ledger_demo.NUM_STEPS


def test_sft_pays_for_its_share_of_the_teachers_solutions(tmp_path):
    jobs_ = [Job(name, [], tmp_path / name, 1.0) for name in ("samples", *(arm.name for arm in ledger_demo.ARMS))]
    for job in jobs_:
        job.folder.mkdir()
        rows = [{"step": step, "cost/flops": 10.0 * step, "cost/seconds": 1.0} for step in (0, 50)]
        jobs.write_rows(job.folder / "metrics.jsonl", rows)
        costs = {"roles": {"teacher_sampling": {"tokens": 1, "flops": 1000.0, "seconds": 4.0}}}
        (job.folder / "costs.json").write_text(json.dumps(costs))
    rows = ledger_demo.arm_rows(jobs_)
    assert [row["cost/flops"] for row in rows["sft"]] == [0.0, 500.0 + 500.0]
    assert [row["cost/seconds"] for row in rows["sft"]] == [1.0, 3.0]
    assert [row["cost/flops"] for row in rows["rl"]] == [0.0, 500.0]


def test_verdict_follows_the_numbers():
    start = {"eval/ledger/greedy": 0.5, "eval/ledger/t1": 0.3}
    found = [
        outcome("distill-full", 0.60, target=None),
        outcome("sft", 0.80, target=(50, 40e9)),
        outcome("distill-sampled", 0.59),
        outcome("rl", 0.40),
    ]
    text = ledger_page.verdict(found, start, {"false": 15.0, "inherited": -0.1, "right": -0.2})
    ranking = "sft 80.0%, ahead of distill-full 60.0%, within noise of distill-sampled 59.0%, ahead of rl 40.0%"
    assert ranking in text
    assert "sft reached 70% by step 50 (40 GFLOP)." in text
    assert "distill-full did not reach 70% in 100 steps." in text
    assert "15.0 nats on values that are false in themselves" in text
    assert text.endswith(ledger_page._LIMITS)


def test_table_leaves_evaluation_out_of_the_price():
    row = ledger_page.table_rows([outcome("sft", 0.8, target=(50, 40e9)), outcome("rl", 0.4)])
    assert row[0]["GFLOP"] == "100"
    assert row[0]["seconds"] == "10"
    assert row[0]["T = 1"] == "80.0 ± 1.0"
    assert [r["to 70% at T = 1"] for r in row] == ["50 steps, 40 GFLOP", "not in 100 steps"]


def test_a_demo_never_writes_over_an_earlier_one(tmp_path):
    first = new_folder(tmp_path / "demo")
    (first / "file").write_text("kept")
    assert new_folder(tmp_path / "demo") == tmp_path / "demo-2"
    assert (first / "file").read_text() == "kept"


def test_a_failing_job_stops_the_others_and_shows_its_log(tmp_path):
    broken = Job("broken", ["distill", str(tmp_path / "missing.toml")], tmp_path / "broken", 1.0, 1)
    never = Job("never", ["--version"], tmp_path / "never", 1.0, 1, after=("broken",))
    with pytest.raises(RunError, match=r"(?s)exit code 2.*missing\.toml.*no such file"):
        run_jobs([broken, never], logs=tmp_path / "logs", title="t")
    assert not (tmp_path / "logs" / "never.log").exists()


def test_jobs_wait_for_those_they_name(tmp_path):
    first = Job("first", ["--version"], tmp_path / "a", 1.0)
    second = Job("second", ["--version"], tmp_path / "b", 1.0, after=("first",))
    seconds = run_jobs([second, first], logs=tmp_path / "logs", title="t")
    assert seconds.keys() == {"first", "second"}
    assert (tmp_path / "logs" / "first.log").stat().st_mtime <= (tmp_path / "logs" / "second.log").stat().st_mtime


def test_world_build_ledger_writes_models_and_problems(tmp_path):
    assert demos.build_world("ledger", tmp_path / "world", steps=2) == 0
    for role in ("teacher", "start"):
        assert (tmp_path / "world" / "models" / role / "model.safetensors").is_file()
    prompts = (tmp_path / "world" / "prompts.jsonl").read_text().splitlines()
    assert len(prompts) == ledger_demo.NUM_STEPS * ledger_demo.SAMPLES_PER_STEP
    with pytest.raises(ConfigError, match="a folder with files"):
        demos.build_world("ledger", tmp_path / "world", steps=2)


def test_assistant_plan_names_its_phases():
    assert [assistant_demo.FULL.steps(name) for name in ("assistant", "midtrained", "distill", "samples")] == [
        1500,
        400,
        60,
        0,
    ]
    assert isinstance(assistant_demo.SMOKE, assistant_demo.Plan)


def test_ledger_models_are_copied_whole(tmp_path):
    ledger_demo.prepare(tmp_path)
    names = {path.name for path in Path(tmp_path / "models" / "start").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names


def test_ctrl_c_ends_a_demo_with_130_and_says_where_it_stands(tmp_path, monkeypatch, capsys):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ledger_demo, "run_demo", interrupted)
    assert demos.run("ledger", tmp_path / "demo") == 130
    assert "interrupted" in capsys.readouterr().err

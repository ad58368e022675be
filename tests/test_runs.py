"""The run's folder: who may write, and that nothing is left where nothing was done."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from understudy import ConfigError, RunConfig
from understudy.metrics import MetricsLog, read_metrics
from understudy.runs import RunFolder, flat


def config(path: Path, **values: object) -> RunConfig:
    return RunConfig.model_validate({"output_dir": str(path), "student": {"model": "m"}, **values})


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path / "run"), method="sft"):
        with pytest.raises(ConfigError, match="another process is writing there"):
            RunFolder(config(tmp_path / "run"), method="sft")
        assert (tmp_path / "run").exists()
    assert not (tmp_path / "run").exists()


def test_a_block_that_wrote_keeps_its_folder(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path / "run"), method="sft") as folder:
        folder.write_config(folder.config)
    assert RunConfig.from_toml(tmp_path / "run" / "config.toml") == config(tmp_path / "run")
    assert "understudy sft" in (tmp_path / "run" / "config.toml").read_text().splitlines()[0]
    for method, remedy in (("sft", "--resume"), ("generate", "--resume"), ("eval", "another output_dir")):
        with pytest.raises(ConfigError) as error:
            RunFolder(config(tmp_path / "run"), method=method)
        assert remedy in error.value.remedy
    assert "--resume" not in error.value.remedy  # `eval` has no such option


def test_resume_of_nothing_is_a_start(tmp_path: Path) -> None:
    """A job script may always say --resume."""
    with RunFolder(config(tmp_path / "run"), method="sft", resume=True) as folder:
        assert (folder.first_step, folder.checkpoint, folder.trained) == (0, None, False)


def test_resume_of_another_command_is_refused(tmp_path: Path) -> None:
    """Even before the first checkpoint says whose it is."""
    with RunFolder(config(tmp_path / "run"), method="generate") as folder:
        folder.write_config(folder.config)
    with pytest.raises(ConfigError, match=r"command\n.*got: *distill\n.*generate, as the run began"):
        RunFolder(config(tmp_path / "run"), method="distill", resume=True)


def test_resolved_values_stay(tmp_path: Path) -> None:
    """What "auto" came to mean when the run began holds for its continuation, whatever it would mean today."""
    path = tmp_path / "run"
    with RunFolder(config(path), method="distill") as folder:
        folder.write_config(config(path, objective={"estimator": "full"}, teacher={"model": "t", "dtype": "bfloat16"}))
    asked = config(path, teacher={"model": "t"}, num_threads=3, optim={"num_steps": 7}, rollouts={"per_step": 1})
    with RunFolder(asked, method="distill", resume=True) as folder:
        assert folder.config.objective.estimator == "full"
        assert folder.config.teacher is not None
        assert folder.config.teacher.dtype == "bfloat16"
        assert folder.config.num_threads == 3
        assert folder.config.optim.num_steps == 7
        assert folder.config.rollouts.per_step == 1


def test_flat() -> None:
    tree = flat(config(Path("x"), teachers={"a": {"model": "t"}}, prompts={"path": "p"}))
    assert tree["teachers.a.model"] == "t"
    assert tree["prompts.columns"] == {}
    assert "prompts.limit" not in tree  # None is absence


def test_absence_stays_what_it_was_resolved_to(tmp_path: Path) -> None:
    path = tmp_path / "run"
    resolved = {"objective": {"reward_coef": 0.0}, "sampling": {"stop_token_ids": [3]}}
    with RunFolder(config(path), method="distill") as folder:
        folder.write_config(config(path, **resolved))
    for given in ({}, resolved):
        with RunFolder(config(path, **given), method="distill", resume=True) as folder:
            assert folder.config.objective.reward_coef == 0.0
            assert folder.config.sampling.stop_token_ids == (3,)
    for given in (
        {"objective": {"reward_coef": 1.0}},
        {"sampling": {"stop_token_ids": [3, 4]}},
        {"prompts": {"path": "p"}},
    ):
        with pytest.raises(ConfigError, match="as the run began"):
            RunFolder(config(path, **given), method="distill", resume=True)


def test_memory_bounds_may_change_on_resume(tmp_path):
    """Running out of memory names these two keys as the remedy, so a continued run must accept them."""
    config = RunConfig.model_validate({"output_dir": str(tmp_path / "run"), "student": {"model": "m"}})
    with RunFolder(config, method="distill") as folder:
        folder.write_config(config)
    smaller = config.model_copy(
        update={
            "sampling": config.sampling.model_copy(update={"max_batch_rows": 8}),
            "optim": config.optim.model_copy(update={"micro_batch_tokens": 64, "num_steps": 200}),
        }
    )
    with RunFolder(smaller, method="distill", resume=True) as folder:
        assert folder.config.sampling.max_batch_rows == 8
        assert (folder.config.optim.micro_batch_tokens, folder.config.optim.num_steps) == (64, 200)


def test_amended_rows_keep_their_times(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path / "run"), method="distill") as folder:
        folder.costs.add("student_sampling", tokens=1, flops=1.0, seconds=2.0)
        folder.record(1, {"optim/loss": 0.5})
        folder.costs.add("student_sampling", tokens=1, flops=1.0, seconds=0.5)  # of a step that is under way
        folder.costs.add("evaluation", tokens=1, flops=1.0, seconds=4.0)
        row = folder.amend({"eval/t/greedy": 1.0})
        assert (row["time/student_sampling"], row["time/evaluation"], row["optim/loss"]) == (2.5, 4.0, 0.5)
        assert folder.last_row() == row


def test_the_newest_alarm_is_told_when_a_run_goes_on(tmp_path: Path) -> None:
    with RunFolder(config(tmp_path / "run"), method="distill") as folder:
        assert folder.last_alarm() is None
        for guard in ("entropy", "length"):
            folder.alarms.append({"step": 1, "guard": guard, "rollouts": [{"file": None}]})
        assert folder.last_alarm() == {"step": 1, "guard": "length", "rollouts": [{"file": None}]}


@pytest.mark.parametrize("name", ["truncate_after", "append", "replace_last"])
def test_no_row_is_lost_while_it_is_amended(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after any of the writes, it is there, with what was added or without."""
    with RunFolder(config(tmp_path / "run"), method="distill") as folder:
        folder.record(1, {"optim/loss": 0.5})
        write = getattr(MetricsLog, name)

        def killed(*arguments: Any) -> None:
            write(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(MetricsLog, name, killed)
            folder.amend({"eval/t/greedy": 1.0})
        assert [row["step"] for row in read_metrics(folder.metrics.path)] == [1]


def test_weights_for_a_server_alone_are_no_run(tmp_path: Path) -> None:
    """A crash between the first push and config.toml."""
    (tmp_path / "run" / "sampler_weights" / "a").mkdir(parents=True)
    for resume in (False, True):
        with RunFolder(config(tmp_path / "run"), method="distill", resume=resume) as folder:
            assert folder.first_step == 0

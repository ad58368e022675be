"""Whole runs with roles on servers: the same results as in one process, and the same care when servers fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from serving import listening, load_engine

import understudy
from understudy import ConfigError, RunConfig
from understudy.backends.served import ServedTeacher
from understudy.config import TeacherConfig
from understudy.errors import ServerError, ServerUnavailable
from understudy.rollout_store import read_rollouts
from understudy.serve.app import create_app
from understudy.serve.settings import ServeSettings
from user import bpe_tokenizer, metrics, save_model, tree, write_rows

IMPATIENT = {"patience_seconds": 0.5, "timeout_seconds": 5}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for number, name in enumerate(("student", "teacher", "other")):
        save_model(folder / name, bpe_tokenizer(), seed=number)
    rows = [{"prompt": f"Natalia sold {i} clips", "task": "maths" if i % 2 else "chat"} for i in range(8)]
    write_rows(folder / "rows.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def served(world: Path) -> Iterator[str]:
    """The teacher behind a server that scores every sequence alone."""
    app = create_app(load_engine(world / "teacher"), ServeSettings(max_batch_sequences=1))
    with listening(app) as url:
        yield f"{url}/v1"


def config_of(world: Path, out: Path, teacher: dict[str, Any], **sections: Any) -> RunConfig:
    content = tree(world / "student", world / "teacher", world / "rows.jsonl", out, **sections)
    return RunConfig.model_validate({**content, "teacher": teacher})


def weights(run: Path, step: int = 2) -> torch.Tensor:
    tensors = load_file(run / "checkpoints" / f"step_{step:06d}" / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize(
    "objective",
    [
        {"estimator": "sampled"},
        {"estimator": "topk", "topk": 4},
        {"estimator": "topk", "topk": 4, "topk_set": "student"},
    ],
    ids=["sampled", "topk", "topk of the student"],
)
def test_a_served_teacher_teaches_what_it_would_in_this_process(
    objective: dict[str, Any], world: Path, served: str, tmp_path: Path
) -> None:
    runs = {
        "here": config_of(world, tmp_path / "here", {"model": str(world / "teacher")}, objective=objective),
        "there": config_of(world, tmp_path / "there", {"url": served}, objective=objective),
    }
    for config in runs.values():
        understudy.distill(config, quiet=True)
    start = torch.cat([t.flatten() for _, t in sorted(load_file(world / "student" / "model.safetensors").items())])
    here, there = weights(tmp_path / "here"), weights(tmp_path / "there")
    assert float((here - there).norm()) < 1e-4 * float((here - start).norm())
    [first, second] = [metrics(tmp_path / name)[-1] for name in ("here", "there")]
    assert first["reverse_kl/mean"] == pytest.approx(second["reverse_kl/mean"], abs=1e-5)
    records = read_rollouts(tmp_path / "there" / "rollouts" / "step_000000.jsonl")
    assert records[0]["teacher_topk"] is not None


def test_hidden_states_serve_the_whole_vocabulary(world: Path, served: str, tmp_path: Path) -> None:
    """In bfloat16, which is what is sent."""
    for name, teacher in (("here", {"model": str(world / "teacher")}), ("there", {"url": served})):
        result = understudy.distill(config_of(world, tmp_path / name, teacher), quiet=True)
        assert result.metrics["reverse_kl/full"] > 0
    here, there = (metrics(tmp_path / name) for name in ("here", "there"))
    for one, other in zip(here, there, strict=True):
        assert one["reverse_kl/full"] == pytest.approx(other["reverse_kl/full"], rel=0.05)
    assert 'estimator = "full"' in (tmp_path / "there" / "config.toml").read_text()


def test_marks_are_kept_for_runs_that_ask_again(world: Path, served: str, tmp_path: Path) -> None:
    teacher = {"url": served, "cache": str(tmp_path / "marks.sqlite")}
    objective = {"estimator": "sampled"}
    runs = []
    for name in ("first", "second"):
        config = config_of(world, tmp_path / name, teacher, objective=objective)
        understudy.distill(config, quiet=True)
        runs.append(weights(tmp_path / name))
    assert torch.equal(*runs)
    paid = [json.loads((tmp_path / name / "costs.json").read_text())["roles"] for name in ("first", "second")]
    assert paid[0]["teacher_scoring"]["tokens"] > 0
    assert "teacher_scoring" not in paid[1]


def test_rows_find_their_teacher_by_task(world: Path, served: str, tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            **tree(world / "student", None, world / "rows.jsonl", tmp_path / "run"),
            "teachers": {"large": {"url": served}, "own": {"model": str(world / "other")}},
            "prompts": {"path": str(world / "rows.jsonl"), "teacher_of_task": {"maths": "large", "chat": "own"}},
            "objective": {"estimator": "sampled"},
            "sampling": {"group_size": 1, "groups_per_batch": 8, "max_completion_tokens": 6},
            "rollouts": {"per_step": 8, "topk": 0},
        }
    )
    understudy.distill(config, quiet=True)
    records = read_rollouts(tmp_path / "run" / "rollouts" / "step_000000.jsonl")
    assert {record["task"]: record["teacher"] for record in records} == {"maths": "large", "chat": "own"}


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"url": "http://127.0.0.1:9/v1", "connection": IMPATIENT}, "start it"),
        ({"served_model": "elsewhere"}, "elsewhere"),
        ({"api_key_env": "UNDERSTUDY_NO_SUCH_KEY"}, "UNDERSTUDY_NO_SUCH_KEY"),
    ],
)
def test_what_cannot_work_is_told_before_the_run_begins(
    teacher: dict[str, Any], message: str, world: Path, served: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        understudy.distill(config_of(world, tmp_path / "run", {"url": served, **teacher}), quiet=True)
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_on_the_server_is_refused(world: Path, served: str, tmp_path: Path) -> None:
    save_model(tmp_path / "student", bpe_tokenizer(chat=True), seed=5)
    tokenizer = bpe_tokenizer()
    tokenizer.add_tokens(["<new>"])
    save_model(tmp_path / "student", tokenizer, seed=5)
    content = tree(tmp_path / "student", None, world / "rows.jsonl", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"tokenizer\n  got: .*\n  expected: .*token"):
        understudy.distill(RunConfig.model_validate({**content, "teacher": {"url": served}}), quiet=True)


def test_a_teacher_that_goes_away_leaves_a_run_that_can_go_on(world: Path, tmp_path: Path) -> None:
    """Away after two steps: the last update is in a checkpoint, and the resumed run ends as an undisturbed one."""
    sections: dict[str, Any] = {"objective": {"estimator": "sampled"}, "optim": {"num_steps": 4}}

    def run(name: str, *, until: int | None, resume: bool = False) -> None:
        app = create_app(load_engine(world / "teacher"), ServeSettings(max_batch_sequences=1))
        with listening(app) as url, ExitStack() as stack:
            teacher = {"url": f"{url}/v1", "connection": IMPATIENT}
            config = config_of(world, tmp_path / name, teacher, **sections)
            given = None
            if until is not None:
                assert config.teacher is not None
                given = {"default": Leaving(config.teacher, until)}
                stack.callback(given["default"].close)
            understudy.distill(config, teachers=given, quiet=True, resume=resume)

    class Leaving(ServedTeacher):
        """Away after so many calls."""

        kinds = frozenset({"sampled"})

        def __init__(self, config: TeacherConfig, until: int) -> None:
            super().__init__(config)
            self.left = until

        def score(self, *arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise ServerUnavailable("gone")
            return super().score(*arguments, **options)

    run("whole", until=None)
    with pytest.raises(ServerError, match="gone"):
        run("broken", until=2)
    assert [row["step"] for row in metrics(tmp_path / "broken")] == [1, 2]
    assert (tmp_path / "broken" / "checkpoints" / "step_000002").exists()
    run("broken", until=None, resume=True)
    assert torch.equal(weights(tmp_path / "whole", 4), weights(tmp_path / "broken", 4))

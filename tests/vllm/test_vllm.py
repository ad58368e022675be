"""Real vLLM servers, started here: `make test-vllm`. The loop from TOML, weights pushed both ways, servers killed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import VllmServer

import understudy
from fault_proxy import Schedule, faulty
from understudy import ConfigError, RunConfig
from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import load_model
from understudy.backends.local import LocalTeacher
from understudy.backends.vllm import VllmTeacher
from understudy.config_served import ServerConfig
from understudy.errors import ServerError
from understudy.rollout_store import read_rollouts
from understudy.tokenization import load_text
from understudy.types import TokenSequence, TopkScores
from user import metrics, tree, write_toml

pytestmark = pytest.mark.vllm

STEPS = 30
EXACT = 1e-4  # nats: float32 on both sides, in batches of other shapes


def sequences(count: int) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 300, (length,), generator=generator).tolist()

    return [TokenSequence(ids(5 + i % 7), ids(1 + i % 11)) for i in range(count)]


def local_teacher(folder: Path) -> LocalTeacher:
    model = load_model(str(folder), role="teacher", dtype=torch.float32, device=torch.device("cpu"))
    return LocalTeacher(LanguageModel(model.requires_grad_(False)))


def test_marks_are_those_of_the_model(world: Path, teacher: VllmServer) -> None:
    served = VllmTeacher(ServerConfig(url=teacher.url))
    try:
        served.check(longest=100, topk=64)
        assert served.vocabulary(load_text(str(world / "teacher"), "teacher").tokenizer)
        asked, own = sequences(40), local_teacher(world / "teacher")
        for one, other in zip(served.compute_logprobs(asked), own.compute_logprobs(asked), strict=True):
            assert one == pytest.approx(other, abs=EXACT)
        for one, other in zip(served.score(asked, "topk", topk=8), own.score(asked, "topk", topk=8), strict=True):
            assert isinstance(one, TopkScores)
            assert isinstance(other, TopkScores)
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=EXACT, rtol=0)
        assert served.identity() == served.identity()
    finally:
        served.close()


def toml(world: Path, out: Path, writer: VllmServer, marker: VllmServer, **sections: Any) -> Path:
    content = tree(
        world / "student",
        None,
        world / "rows.jsonl",
        out,
        sampling={"group_size": 4, "groups_per_batch": 8, "max_completion_tokens": 16},
        optim={"learning_rate": 3e-3, "num_steps": STEPS},
        rollouts={"per_step": 2, "topk": 4},
        checkpoints={"every": 100},
    )
    content |= {"teacher": {"url": marker.url}, "sampler": {"url": writer.url, "served_model": "student"}}
    for name, value in sections.items():
        content[name] = {**content.get(name, {}), **value}
    return write_toml(out.with_suffix(".toml"), content)


def distill(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "understudy", "distill", str(file), *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=900)


def assert_learned(out: Path, *, steps: int = STEPS) -> list[dict[str, Any]]:
    """Reverse KL fell by at least 40%, and at every step sampler and trainer agreed."""
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    first, last = (sum(row["reverse_kl/mean"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last < 0.6 * first, (first, last)
    return rows


@pytest.mark.parametrize("cache", ["reset", "salt"])
def test_the_loop_on_two_servers(
    cache: str, world: Path, student: VllmServer, teacher: VllmServer, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = distill(toml(world, out, student, teacher, sampler={"cache": cache}))
    assert done.returncode == 0, done.stderr[-4000:]
    rows = assert_learned(out)
    assert max(row["ratio/abs_log_max"] for row in rows) < EXACT
    assert not (out / "sampler_weights").exists() or not list((out / "sampler_weights").iterdir())


def test_the_loop_with_adapters(world: Path, adapted: VllmServer, teacher: VllmServer, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # Slower than all weights: twice the steps.
    optim = {"learning_rate": 2e-2, "num_steps": 2 * STEPS}
    done = distill(toml(world, out, adapted, teacher, student={"lora": {"rank": 8, "alpha": 8}}, optim=optim))
    assert done.returncode == 0, done.stderr[-4000:]
    rows = assert_learned(out, steps=2 * STEPS)
    assert max(row["ratio/abs_log_max"] for row in rows) < EXACT


def test_sampling_ahead(world: Path, student: VllmServer, teacher: VllmServer, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = distill(toml(world, out, student, teacher, sampling={"max_policy_lag": 1}))
    assert done.returncode == 0, done.stderr[-4000:]
    rows = assert_learned(out)
    assert max(row.get("policy_lag/max", 0) for row in rows) == 1
    # Weights one update older wrote: the first step's are its own.
    assert rows[0]["ratio/abs_log_max"] < EXACT < rows[-1]["ratio/abs_log_max"]


def when(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def rows_so_far(out: Path) -> int:
    file = out / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize("victim", ["student", "teacher"])
def test_a_run_waits_for_a_server_that_was_killed(
    victim: str, world: Path, student: VllmServer, teacher: VllmServer, tmp_path: Path
) -> None:
    """kill -9 in the middle; the sampler comes back with the weights it was started with."""
    out, server = tmp_path / "run", {"student": student, "teacher": teacher}[victim]
    file = toml(world, out, student, teacher)
    words = [sys.executable, "-m", "understudy", "distill", str(file)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        when(lambda: rows_so_far(out) >= 8 or run.poll() is not None)
        server.kill()
        before = rows_so_far(out)
        time.sleep(3)
        assert run.poll() is None
        assert rows_so_far(out) <= before + 1
        server.start()
        assert run.stderr is not None
        errors = run.stderr.read()
    assert run.returncode == 0, errors[-4000:]
    rows = assert_learned(out)
    assert max(row["ratio/abs_log_max"] for row in rows) < EXACT


@pytest.mark.parametrize("victim", ["student", "teacher"])
def test_a_run_ends_with_its_state_when_a_server_stays_away(
    victim: str, world: Path, student: VllmServer, teacher: VllmServer, tmp_path: Path
) -> None:
    out, server = tmp_path / "run", {"student": student, "teacher": teacher}[victim]
    patience = {"connection": {"patience_seconds": 3, "timeout_seconds": 20}}
    file = toml(world, out, student, teacher, teacher=patience, sampler=patience)
    words = [sys.executable, "-m", "understudy", "distill", str(file)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        when(lambda: rows_so_far(out) >= 8 or run.poll() is not None)
        server.kill()
        assert run.stderr is not None
        errors = run.stderr.read()
    assert run.returncode == 1, errors[-4000:]
    assert "connection.patience_seconds" in errors
    done = rows_so_far(out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step_{done:06d}"]
    server.start()
    resumed = distill(file, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert_learned(out)


@pytest.mark.parametrize("seed", range(8))
def test_a_network_that_fails_changes_no_mark(
    seed: int, world: Path, student: VllmServer, teacher: VllmServer, tmp_path: Path
) -> None:
    """Every mark of every step that was trained on is the model's; else the run stops with that step's checkpoint."""
    out, steps = tmp_path / "run", 6
    connection = {"request_tokens": 100, "max_concurrency": 4, "timeout_seconds": 20, "patience_seconds": 5}
    schedules = [Schedule(2 * seed + i, share=0.03 + 0.05 * (seed % 4)) for i in range(2)]
    with faulty(student.url, schedules[0]) as written, faulty(teacher.url, schedules[1]) as marked:
        sections = {
            "sampler": {"url": f"{written}/v1", "connection": connection},
            "teacher": {"url": f"{marked}/v1", "connection": connection},
            "rollouts": {"per_step": 32, "topk": 0, "every": 1},
            "optim": {"num_steps": steps},
            "objective": {"estimator": "sampled"},
        }
        config = RunConfig.from_toml(toml(world, out, student, teacher, **sections))
        try:
            understudy.distill(config, quiet=True)
            done = steps
        except ConfigError:
            assert not out.exists()
            return
        except ServerError:
            done = rows_so_far(out)
            saved = [f"step_{done:06d}"] if done else []
            assert [path.name for path in (out / "checkpoints").glob("*")] == saved
    rows, own = metrics(out) if done else [], local_teacher(world / "teacher")
    assert len(rows) == done
    for step, row in enumerate(rows):
        assert row["ratio/abs_log_max"] < EXACT
        records = read_rollouts(out / "rollouts" / f"step_{step:06d}.jsonl")
        assert len(records) == 32
        asked = [TokenSequence(record["prompt_ids"], record["completion_ids"]) for record in records]
        for record, expected in zip(records, own.compute_logprobs(asked), strict=True):
            assert record["teacher_logprobs"] == pytest.approx(expected, abs=EXACT)
    print(f"{done} steps, {sum(sum(s.done.values()) - s.done[''] for s in schedules)} faults")
    assert any(schedule.done.total() > schedule.done[""] for schedule in schedules)


def test_a_server_that_takes_no_weights_is_refused(world: Path, teacher: VllmServer, tmp_path: Path) -> None:
    """Adapters, of a server without them: exit code 2, and the command that starts one that would do."""
    student = {"lora": {"rank": 8}}
    file = toml(world, tmp_path / "run", teacher, teacher, student=student, sampler={"served_model": "teacher"})
    done = distill(file)
    assert done.returncode == 2
    assert "--enable-lora" in done.stderr
    assert not (tmp_path / "run").exists()
    assert RunConfig.from_toml(file).sampler is not None

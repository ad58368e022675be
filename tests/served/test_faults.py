"""Whole runs behind a network that fails by schedule: the undisturbed run's weights bit for bit, or a clear stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_vllm import FakeVllm
from safetensors.torch import load_file
from serving import listening, load_engine

import understudy
from fault_proxy import FAULTS, Schedule, faulty
from understudy import ConfigError, RunConfig
from understudy.backends import http_retry
from understudy.errors import ServerError
from understudy.serve.app import create_app
from understudy.serve.settings import ServeSettings
from user import bpe_tokenizer, metrics, save_model, tree, write_rows

STEPS = 3
# Small requests, so that there are many to spoil; soon given up, so that stops are quick.
CONNECTION = {"request_tokens": 24, "max_concurrency": 3, "timeout_seconds": 1.0}
OBJECTIVES = {
    "vllm": {"estimator": "sampled"},
    "understudy": {"estimator": "full"},  # hidden states: binary replies
    "chosen": {"estimator": "topk", "topk": 4, "topk_set": "student"},
    "sampler": {"estimator": "sampled"},
}
APIS = tuple(OBJECTIVES)


@pytest.fixture(autouse=True)
def soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses for the servers of this test."""
    monkeypatch.setattr(http_retry, "FIRST_SECONDS", 0.02)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for number, name in enumerate(("student", "teacher")):
        save_model(folder / name, bpe_tokenizer(), seed=number)
    write_rows(folder / "rows.jsonl", [{"prompt": f"sold {i} clips"} for i in range(6)])
    return folder


@pytest.fixture(scope="module")
def served(world: Path) -> Iterator[str]:
    """Every sequence alone: a reply does not depend on what else is asked."""
    with listening(create_app(load_engine(world / "teacher"), ServeSettings(max_batch_sequences=1))) as url:
        yield url


def run(world: Path, out: Path, url: str, api: str, *, patience: float = 3.0, resume: bool = False) -> None:
    """``api``: what the teacher at ``url`` speaks ("chosen": ours, asked for the student's own alternatives); or
    "sampler": the student's completions come from there."""
    content = tree(
        world / "student",
        None,
        world / "rows.jsonl",
        out,
        objective=OBJECTIVES[api],
        optim={"num_steps": STEPS},
        rollouts={"per_step": 1, "topk": 2},
    )
    server = {"url": f"{url}/v1", "connection": {**CONNECTION, "patience_seconds": patience}}
    if api == "sampler":
        content |= {"teacher": {"model": str(world / "teacher")}, "sampler": server}
    else:
        content["teacher"] = {**server, "api": "vllm" if api == "vllm" else "understudy"}
    understudy.distill(RunConfig.model_validate(content), quiet=True, resume=resume)


def weights(run: Path) -> torch.Tensor:
    tensors = load_file(run / "checkpoints" / f"step_{STEPS:06d}" / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def writing(world: Path) -> Iterator[str]:
    """A sampler: equal seeds, equal completions, whatever else it writes."""
    server = FakeVllm(world / "student")
    server.caches = False
    with server:
        yield server.url.removesuffix("/v1")


@pytest.fixture(scope="module")
def urls(served: str, writing: str) -> dict[str, str]:
    return {api: writing if api == "sampler" else served for api in APIS}


@pytest.fixture(scope="module")
def undisturbed(world: Path, urls: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    for api in APIS:
        run(world, folder / api, urls[api], api)
    return {api: weights(folder / api) for api in APIS}


def disturbed(
    world: Path, out: Path, served: str, api: str, schedule: Schedule, expected: torch.Tensor, patience: float = 3.0
) -> str:
    """What became of one run: "equal" or why it stopped. Anything else fails."""
    with faulty(served, schedule) as url:
        try:
            run(world, out, url, api, patience=patience)
        except ConfigError:  # the server was looked at before the run began: nothing is there
            assert not out.exists()
            return "refused"
        except ServerError as error:
            who = str(error)
            steps = [row["step"] for row in metrics(out)] if (out / "metrics.jsonl").exists() else []
            saved = [f"step_{steps[-1]:06d}"] if steps else []
            assert "'default'" in who or "sampler" in who
            assert [path.name for path in sorted((out / "checkpoints").glob("*"))][-1:] == saved
        else:
            assert torch.equal(weights(out), expected)
            return "equal"
    # What was saved goes on to the same end, once the network is well.
    run(world, out, served, api, resume=True)
    assert torch.equal(weights(out), expected)
    return "stopped"


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault(
    fault: str, api: str, world: Path, urls: dict[str, str], undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Each alone, often enough to meet it."""
    for seed in range(1, 6):
        schedule = Schedule(seed, share=0.25, faults=(fault,))
        end = disturbed(world, tmp_path / f"{seed}", urls[api], api, schedule, undisturbed[api])
        assert schedule.done[fault] > 0
        if end != "refused":  # one that met the checks before the run says little about the run
            return
    raise AssertionError(f"{fault}: no run began")


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
def test_hundreds_of_schedules(
    api: str, world: Path, urls: dict[str, str], undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ends: Counter[str] = Counter()
    for seed in range(100):
        schedule = Schedule(seed, share=0.02 + 0.1 * (seed % 4))
        # With little patience many stop; with more, most get through.
        patience = 3.0 if seed % 2 else 0.1
        ends[disturbed(world, tmp_path / str(seed), urls[api], api, schedule, undisturbed[api], patience)] += 1
    print(dict(ends))
    assert ends["equal"] > 30
    assert ends["stopped"] >= 5

"""Whole runs whose student writes on a server: in turn, ahead of training, through adapters, and when it moves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import trained_by_hand, weights
from fake_vllm import FakeVllm, load
from serving import listening, load_engine

import understudy
from understudy import RunConfig, updates
from understudy.backends.loading import load_student
from understudy.backends.local import LocalSampler, LocalTrainer
from understudy.backends.vllm_check import NO_ADAPTER
from understudy.config import SamplingConfig
from understudy.errors import RunError, ServerUnavailable
from understudy.preflight import check_run
from understudy.rollout_store import read_rollouts
from understudy.serve.app import create_app
from understudy.serve.settings import ServeSettings
from understudy.types import Prompt, Rollout
from user import bpe_tokenizer, metrics, run_cli, save_model, tree, without_times, write_rows, write_toml

# peft asks transformers the old way.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

STEPS, GROUPS, SIZE, TOKENS = 4, 2, 2, 6
SAME = 1e-4  # nats: float32 in other orders of summation
# Updates that show: the second step's log-probabilities move by more than ten times SAME.
OPTIM = {"learning_rate": 5e-3, "warmup_steps": 2, "num_steps": STEPS}
IMPATIENT = {"patience_seconds": 0.5, "timeout_seconds": 5}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for number, name in enumerate(("student", "teacher")):
        save_model(folder / name, bpe_tokenizer(), seed=number)
    write_rows(folder / "rows.jsonl", [{"prompt": f"Natalia sold {i} clips"} for i in range(7)])
    return folder


@pytest.fixture
def writer(world: Path) -> Iterator[FakeVllm]:
    """Equal seeds, equal completions, whatever else it writes."""
    server = FakeVllm(world / "student", lora=True)
    server.caches = False
    with server:
        yield server


def content_of(
    world: Path, out: Path, url: str | None, teacher: dict[str, Any] | None = None, **sections: Any
) -> dict[str, Any]:
    """Every step's rollouts and checkpoint are kept."""
    base: dict[str, Any] = {
        "objective": {"estimator": "sampled"},
        "sampling": {"group_size": SIZE, "groups_per_batch": GROUPS, "max_completion_tokens": TOKENS},
        "optim": OPTIM,
        "checkpoints": {"every": 1, "keep": STEPS},
        "rollouts": {"every": 1, "per_step": SIZE * GROUPS, "topk": 2},
    }
    if url is not None:
        base["sampler"] = {"url": url, "connection": IMPATIENT, "probe_sequences": 2}
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    content = tree(world / "student", world / "teacher", world / "rows.jsonl", out, **base)
    return {**content, "teacher": {**content["teacher"], **(teacher or {})}}


def config_of(
    world: Path, out: Path, url: str | None, teacher: dict[str, Any] | None = None, **sections: Any
) -> RunConfig:
    return RunConfig.model_validate(content_of(world, out, url, teacher, **sections))


def stored(run: Path, step: int) -> list[dict[str, Any]]:
    return read_rollouts(run / "rollouts" / f"step_{step:06d}.jsonl")


def asked_to_write(server: FakeVllm) -> list[dict[str, Any]]:
    """Requests for completions, without those of comparisons after a push."""
    return [body for body in server.bodies("/v1/completions") if body.get("n") == SIZE]


def before_update(monkeypatch: pytest.MonkeyPatch, then: Callable[[int], None]) -> None:
    """``then``: called with the number of each update just before it is made."""
    own, numbers = updates.optimizer_step, iter(range(STEPS + 1))

    def optimizer_step(*arguments: Any, **options: Any) -> Any:
        then(next(numbers))
        return own(*arguments, **options)

    monkeypatch.setattr("understudy.updates.optimizer_step", optimizer_step)


@torch.no_grad()
def assert_written_by_the_weights_on_their_stamp(world: Path, run: Path) -> None:
    """The log-probabilities of every stored completion are those of the checkpoint that its stamp names."""
    models: dict[int, Any] = {}
    for step in range(STEPS + 1):
        for record in stored(run, step):
            version = record["policy_version_start"]
            assert record["policy_version_end"] == version
            if version not in models:
                folder = run / "checkpoints" / f"step_{version:06d}" if version else world / "student"
                models[version] = load(folder)
            prompt, ids = record["prompt_ids"], record["completion_ids"]
            table = models[version](torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = table.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
            assert record["sampler_logprobs"] == pytest.approx(expected, abs=2e-5), (step, version)


def test_without_lag_steps_are_made_in_turn(world: Path, writer: FakeVllm, tmp_path: Path) -> None:
    config = config_of(world, tmp_path / "run", writer.url, sampling={"max_policy_lag": 0})
    understudy.distill(config, quiet=True)
    # Weights go out, then a step is written; after the last step, what pages show of it.
    events = [
        "push" if path == "/collective_rpc" else "write" if body.get("n") == SIZE else "" for path, body in _of(writer)
    ]
    assert "".join(event[:1] for event in events) == ("p" + "w" * GROUPS) * (STEPS + 1)

    rows = metrics(tmp_path / "run")
    assert not [name for row in rows for name in row if name.startswith("policy_lag/")]
    assert max(row["ratio/abs_log_max"] for row in rows) < SAME
    for step in range(STEPS + 1):
        assert {record["policy_version_start"] for record in stored(tmp_path / "run", step)} == {step}
    assert_written_by_the_weights_on_their_stamp(world, tmp_path / "run")

    expected = trained_by_hand(config.model_copy(update={"output_dir": str(tmp_path / "o")}), tmp_path / "by hand")
    assert torch.equal(weights(tmp_path / "run", STEPS), expected)


def _of(server: FakeVllm) -> list[tuple[str, Any]]:
    return [(path, body) for path, body in server.asked if path in ("/collective_rpc", "/v1/completions")]


@pytest.mark.parametrize("lag", [1, 2])
def test_with_a_lag_each_step_is_written_by_weights_so_many_updates_old(
    lag: int, world: Path, writer: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No update is made before the steps that may be under way are: how old they are is then no matter of luck."""
    waited = []

    def wait_for_writing(update: int) -> None:
        end, requests = time.monotonic() + 20, GROUPS * min(update + lag + 1, STEPS)
        while len(asked_to_write(writer)) < requests:
            assert time.monotonic() < end, "the next steps are not written while one trains"
            time.sleep(0.002)
        waited.append(update)

    config = config_of(world, tmp_path / "run", writer.url, sampling={"max_policy_lag": lag})
    with monkeypatch.context() as patched:
        before_update(patched, wait_for_writing)
        understudy.distill(config, quiet=True)
    assert waited == list(range(STEPS))

    rows, ages = metrics(tmp_path / "run"), [min(step, lag) for step in range(STEPS)]
    assert [row["policy_lag/max"] for row in rows] == ages
    assert [row["policy_lag/mean"] for row in rows] == ages
    assert {row[f"policy_lag/{what}_share"] for row in rows for what in ("corrected", "dropped")} == {0.0}
    assert rows[0]["ratio/abs_log_max"] < SAME
    assert min(row["ratio/abs_log_max"] for row in rows[1:]) > 10 * SAME
    for step, age in enumerate(ages):
        assert {record["policy_version_start"] for record in stored(tmp_path / "run", step)} == {step - age}
    assert {record["policy_version_start"] for record in stored(tmp_path / "run", STEPS)} == {STEPS}
    assert_written_by_the_weights_on_their_stamp(world, tmp_path / "run")

    elsewhere = config.model_copy(update={"output_dir": str(tmp_path / "o")})
    assert torch.equal(weights(tmp_path / "run", STEPS), trained_by_hand(elsewhere, tmp_path / "by hand", lag=lag))


@pytest.mark.parametrize("lag", [1, 2])
def test_stamps_are_true_and_within_the_lag_whoever_is_faster(
    lag: int, world: Path, writer: FakeVllm, tmp_path: Path
) -> None:
    config = config_of(world, tmp_path / "run", writer.url, sampling={"max_policy_lag": lag})
    understudy.distill(config, quiet=True)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(0 <= row["policy_lag/mean"] == row["policy_lag/max"] <= lag for row in rows)
    for step, row in enumerate(rows):
        assert {step - r["policy_version_start"] for r in stored(tmp_path / "run", step)} == {row["policy_lag/max"]}
    assert_written_by_the_weights_on_their_stamp(world, tmp_path / "run")


class Behind(LocalSampler):
    """Says of each batch's first group that older weights began it."""

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, seed: int) -> list[list[Rollout]]:
        first, *others = super().sample(prompts, sampling, seed=seed)
        return [[replace(r, policy_version_start=max(0, r.policy_version_start - 1)) for r in first], *others]


def distill_behind(config: RunConfig) -> None:
    checked = check_run(config, "distill")
    student = load_student(config.student, vocab_size=checked.vocab_size, seed=config.seed)
    trainer = LocalTrainer(student, config.optim)
    understudy.distill(config, sampler=Behind(student, stop_ids=checked.stop_ids), trainer=trainer, quiet=True)


def test_stale_completions_where_nothing_corrects_for_them(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="up to 1 updates old"):
        distill_behind(config_of(world, tmp_path / "run", None))
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1]


def test_stale_completions_of_a_sampler_of_ones_own(world: Path, tmp_path: Path) -> None:
    config = config_of(world, tmp_path / "run", None, sampling={"stale": "drop"})
    distill_behind(config)
    first, *rows = metrics(tmp_path / "run")
    assert not [name for name in first if name.startswith("policy_lag/")]
    for row in rows:
        assert (row["policy_lag/corrected_share"], row["policy_lag/dropped_share"]) == (0.0, 1 / GROUPS)
        assert (row["policy_lag/mean"], row["policy_lag/max"]) == (1 / GROUPS, 1.0)
    for step, row in enumerate([first, *rows]):
        records = stored(tmp_path / "run", step)
        assert len(records) == SIZE * (GROUPS - 1 if step else GROUPS)
        assert row["tokens/trained"] == sum(len(record["completion_ids"]) for record in records)
        assert {record["policy_version_start"] for record in records} == {step}

    fresh = config.model_copy(update={"output_dir": str(tmp_path / "o")})
    expected = trained_by_hand(fresh, tmp_path / "by hand", kept=lambda step, place, _: not step or place > 0)
    assert torch.equal(weights(tmp_path / "run", STEPS), expected)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_file_and_the_command_line(
    kind: str, world: Path, writer: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every push is compared, arrives, and takes the place of the one before."""
    content = content_of(world, tmp_path / "run", writer.url)
    if kind == "lora":
        content["student"]["lora"] = {"rank": 4, "alpha": 8.0}
    folders: list[list[str]] = []

    def look(reply: dict[str, Any]) -> dict[str, Any]:
        folders.append(sorted(path.name for path in (tmp_path / "run" / "sampler_weights").iterdir()))
        return reply

    writer.mangle = look
    assert run_cli(monkeypatch, "distill", write_toml(tmp_path / "run.toml", content)) == 0

    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert max(row["ratio/abs_log_max"] for row in rows) < SAME
    # One folder while the server writes: that of the weights it writes with, each of one version more.
    assert {len(names) for names in folders} == {1}
    assert [int(name.rpartition("-")[2]) for name in dict.fromkeys(names[0] for names in folders)] == [
        *range(STEPS + 1)
    ]
    assert not (tmp_path / "run" / "sampler_weights").exists()
    # The first version writes what it is compared on; the marks of it come by scoring, or token by token.
    if kind == "full":
        assert writer.count("/collective_rpc") == STEPS + 1
        assert sum("prompt_logprobs" in body for body in writer.bodies("/v1/completions")) >= STEPS + 1
    else:
        assert writer.count("/collective_rpc") == 0
        names = [b["lora_name"] for b in writer.bodies("/v1/load_lora_adapter") if b["lora_name"] != NO_ADAPTER]
        assert names == list(dict.fromkeys(names[0] for names in folders))
        forced = [body["model"] for body in writer.bodies("/v1/completions") if "allowed_token_ids" in body]
        assert list(dict.fromkeys(forced)) == names
        assert {body["model"] for body in asked_to_write(writer)} == set(names)
        assert writer.engine.adapters == {}
        assert (tmp_path / "run" / "checkpoints" / f"step_{STEPS:06d}" / "adapter_model.safetensors").exists()


def test_a_run_goes_on_when_its_servers_have_moved(
    world: Path, writer: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler's server dies after two updates; sampler and teacher then stand at other addresses."""
    broken = tmp_path / "broken"

    def at(teacher: str) -> dict[str, Any]:
        return {"url": f"{teacher}/v1", "connection": IMPATIENT}

    with ExitStack() as stack:
        before, after = (
            stack.enter_context(
                listening(create_app(load_engine(world / "teacher"), ServeSettings(max_batch_sequences=1)))
            )
            for _ in range(2)
        )
        whole = config_of(world, tmp_path / "whole", writer.url, at(before))
        understudy.distill(whole, quiet=True)

        with FakeVllm(world / "student") as dying, monkeypatch.context() as patched:
            dying.engine.caches = False
            before_update(patched, lambda update: dying.stop() if update == 1 else None)
            with pytest.raises(ServerUnavailable, match=r"server 'sampler' at .*no connection"):
                understudy.distill(config_of(world, broken, dying.url, at(before)), quiet=True)
        assert [row["step"] for row in metrics(broken)] == [1, 2]
        assert sorted(path.name for path in (broken / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
        assert not (broken / "sampler_weights").exists()

        pushed = writer.count("/collective_rpc")
        result = understudy.distill(config_of(world, broken, writer.url, at(after)), resume=True, quiet=True)
    assert result.folder == broken
    assert writer.count("/collective_rpc") - pushed == STEPS - 2 + 1
    for step in range(1, STEPS + 1):
        assert torch.equal(weights(broken, step), weights(tmp_path / "whole", step))
    for step in range(STEPS + 1):
        assert stored(broken, step) == stored(tmp_path / "whole", step)
    assert [*map(without_times, metrics(broken))] == [*map(without_times, metrics(tmp_path / "whole"))]
    kept = RunConfig.from_toml(broken / "config.toml")
    assert kept.sampler is not None
    assert kept.teacher is not None
    assert (kept.sampler.url, kept.teacher.url) == (writer.url, f"{after}/v1")

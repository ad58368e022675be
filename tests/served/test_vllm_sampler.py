"""The sampler on a vLLM server: whose weights write, what becomes of a server that restarts, what a reply must hold."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVllm

from tiny import EOS, prompt_of, tiny_model, trainer_of
from understudy.backends.loading import load_student
from understudy.backends.local import LocalTrainer
from understudy.backends.vllm_sampler import VllmSampler
from understudy.batching import micro_batches
from understudy.config import LoraConfig, OptimConfig, SamplingConfig, StudentConfig
from understudy.config_served import ConnectionConfig, SamplerServerConfig
from understudy.errors import ConfigError, RunError, ServerError, ServerUnavailable
from understudy.objectives import CrossEntropy
from understudy.types import Rollout, TokenSequence, TrainingExample

# peft asks transformers the old way.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

PROMPTS = [prompt_of(ids, i) for i, ids in enumerate([[1, 2, 3], [4], [5, 4, 3, 2, 1, 5, 3]])]
SAMPLING = SamplingConfig(group_size=3, max_completion_tokens=6)
FULL = ["/pause", "/update_weight_version", "/collective_rpc", "/reset_prefix_cache", "/weight_info"]
FULL += ["/update_weight_version", "/resume"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every server begins with."""
    folder = tmp_path_factory.mktemp("start")
    tiny_model(seed=5, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def server(start: Path) -> Iterator[FakeVllm]:
    with FakeVllm(start, lora=True) as server:
        yield server


@pytest.fixture
def make(tmp_path: Path, server: FakeVllm) -> Iterator[Callable[..., VllmSampler]]:
    """Samplers on the server, closed in the end."""
    made = []

    def make(trainer: Any, *, stop_ids: Sequence[int] = (EOS,), patience: float = 20.0, **options: Any) -> VllmSampler:
        names = ("ends", "probe", "lora_rank", "temperature")
        extra = {name: options.pop(name) for name in names if name in options}
        config = {
            "url": server.url,
            "probe_sequences": 2,
            "connection": ConnectionConfig(patience_seconds=patience),
            **options,
        }
        made.append(
            VllmSampler(
                SamplerServerConfig(**config),
                trainer,
                output_dir=tmp_path / "run",
                model="models/student",
                vocab_size=6,
                stop_ids=frozenset(stop_ids),
                **extra,
            )
        )
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()


def full_trainer(seed: int = 6) -> LocalTrainer:
    """Other weights than the server begins with."""
    return trainer_of(tiny_model(seed=seed, dtype=torch.float32))


def lora_trainer(start: Path) -> LocalTrainer:
    student = StudentConfig(model=str(start), device="cpu", dtype="float32", lora=LoraConfig(rank=2))
    trainer = LocalTrainer(load_student(student), OptimConfig())
    step(trainer)
    return trainer


def step(trainer: LocalTrainer) -> None:
    """An update that shows: log-probabilities move by tenths of a nat."""
    examples = [TrainingExample([1, 2], [3, EOS], [True, True]), TrainingExample([4], [5, 5, 1], [True] * 3)]
    for batch in micro_batches(examples, micro_batch_tokens=99):
        trainer.forward_backward(batch, CrossEntropy())
    trainer.optimizer_step(learning_rate=0.1, divisor=5)


def gap(trainer: Any, groups: list[list[Rollout]]) -> float:
    """The largest difference between the sampler's log-probabilities and the trainer's."""
    rollouts = [rollout for group in groups for rollout in group]
    marks = trainer.compute_logprobs([TokenSequence(r.prompt.prompt_ids, r.completion_ids) for r in rollouts])
    rows = zip(rollouts, marks, strict=True)
    return max(abs(p - q) for r, own in rows for p, q in zip(r.sampler_logprobs, own, strict=True))


def written(groups: list[list[Rollout]]) -> list[list[list[int]]]:
    return [[list(r.completion_ids) for r in group] for group in groups]


def versions(groups: list[list[Rollout]]) -> set[int]:
    return {v for group in groups for r in group for v in (r.policy_version_start, r.policy_version_end)}


# Weights


@pytest.mark.parametrize("cache", ["reset", "salt"])
def test_every_push_of_whole_weights_arrives(server: FakeVllm, make: Any, tmp_path: Path, cache: str) -> None:
    trainer = full_trainer()
    sampler = make(trainer, cache=cache)
    sampler.set_policy_version(4)
    for version in (4, 5, 6):
        groups = sampler.sample(PROMPTS, SAMPLING, seed=version)
        assert gap(trainer, groups) < 1e-5
        assert versions(groups) == {version}
        assert server.engine.weight_version.endswith(f"-{version}")
        assert [path.name for path in (tmp_path / "run/sampler_weights").iterdir()] == [server.engine.weight_version]
        assert sampler.last_mismatch.max < 1e-5
        step(trainer)
        assert gap(trainer, groups) > 0.1
        sampler.set_policy_version(version + 1)
    pushes = [path for path in server.paths() if path in FULL[:4] + FULL[5:]]
    expected = [path for path in FULL if path != "/weight_info" and (cache == "reset" or "cache" not in path)]
    assert pushes == expected * 4
    salts = {body.get("cache_salt") for body in server.bodies("/v1/completions")}
    assert len(salts) == (4 if cache == "salt" else 1)


def test_every_push_of_adapters_arrives(server: FakeVllm, make: Any, start: Path, tmp_path: Path) -> None:
    trainer = lora_trainer(start)
    sampler = make(trainer, lora_rank=2)
    for version in (0, 1, 2):
        sampler.set_policy_version(version)
        groups = sampler.sample(PROMPTS, SAMPLING, seed=version)
        assert gap(trainer, groups) < 1e-5
        assert versions(groups) == {version}
        [name] = server.engine.adapters  # the older one has been unloaded
        assert name.endswith(f"-{version}")
        [folder] = (tmp_path / "run/sampler_weights").iterdir()
        assert server.engine.adapters[name][0] == str(folder)
        step(trainer)
        assert gap(trainer, groups) > 0.1
    assert "/pause" not in server.paths()
    sampler.close()
    assert not server.engine.adapters
    assert not (tmp_path / "run/sampler_weights").exists()


def test_a_version_that_is_there_is_not_sent_again(server: FakeVllm, make: Any) -> None:
    sampler = make(full_trainer())
    for _ in range(2):
        sampler.set_policy_version(3)
        sampler.sample(PROMPTS, SAMPLING, seed=0)
    assert server.count("/collective_rpc") == 1


@pytest.mark.parametrize("given", [[TokenSequence([1, 2, 3], [4, 5])], [TokenSequence([1, 2, 3], [])]])
def test_given_sequences_are_compared_as_soon_as_weights_are_sent(
    server: FakeVllm, make: Any, given: list[TokenSequence]
) -> None:
    """Prompts alone are continued by the server."""
    sampler = make(full_trainer(), probe=lambda: given)
    sampler.set_policy_version(0)
    assert sampler.last_mismatch.max < 1e-5
    assert all(body["prompt"][:3] == [1, 2, 3] for body in server.bodies("/v1/completions"))


@pytest.mark.parametrize("cache", ["reset", "salt"])
def test_keys_and_values_of_older_weights_are_noticed(server: FakeVllm, make: Any, cache: str) -> None:
    """Prompt scores are computed from nothing and look right; what is written after a cached prefix does not."""
    server.keeps_cache = True
    trainer = full_trainer()
    sampler = make(trainer, cache=cache)
    sampler.sample(PROMPTS, SAMPLING, seed=0)
    step(trainer)
    if cache == "salt":
        sampler.set_policy_version(1)
        assert gap(trainer, sampler.sample(PROMPTS, SAMPLING, seed=1)) < 1e-5
        return
    with pytest.raises(RunError, match="prefix cache that was not reset") as error:
        sampler.set_policy_version(1)
    assert "version 1" in str(error.value)
    assert sampler.last_mismatch.weights_max < 1e-5
    assert sampler.last_mismatch.cache_mean > 0.05


def test_weights_that_did_not_arrive_are_noticed(server: FakeVllm, make: Any) -> None:
    server.canned["/collective_rpc"] = (200, {"results": [None]})
    sampler = make(full_trainer())
    with pytest.raises(RunError, match=r"differ from the trainer's by \d\.\d+ nats a token.*0\.05.*--dtype"):
        sampler.sample(PROMPTS, SAMPLING, seed=0)
    assert sampler.last_mismatch.mean == sampler.last_mismatch.weights_mean > 0.05


def test_a_mismatch_within_the_limit_is_let_pass_and_kept(server: FakeVllm, make: Any) -> None:
    server.canned["/collective_rpc"] = (200, {"results": [None]})
    sampler = make(full_trainer(), max_mismatch=50.0)
    groups = sampler.sample(PROMPTS, SAMPLING, seed=0)
    assert gap(full_trainer(seed=5), groups) < 1e-5  # the weights it began with
    assert sampler.last_mismatch.mean > 0.05


@pytest.mark.parametrize(
    ("status", "reply", "message"),
    [
        (500, {"error": {"message": "Cannot find any weights"}}, "Cannot find any weights"),
        (200, {"results": ["boom"]}, "boom"),
    ],
)
def test_a_failed_load_resumes_the_server(
    server: FakeVllm, make: Any, tmp_path: Path, status: int, reply: Any, message: str
) -> None:
    trainer = full_trainer()
    sampler = make(trainer)
    sampler.sample(PROMPTS, SAMPLING, seed=0)
    [old] = (tmp_path / "run/sampler_weights").iterdir()
    server.canned["/collective_rpc"] = (status, reply)
    step(trainer)
    with pytest.raises(ServerError, match=f"(?s){message}.*can the server read that.*weights_dir") as error:
        sampler.set_policy_version(1)
    assert not isinstance(error.value, ServerUnavailable)
    assert server.engine.running.is_set()
    assert server.engine.weight_version.endswith("-1-loading")  # what it holds now nobody knows
    assert old.exists()
    del server.canned["/collective_rpc"]
    sampler.set_policy_version(1)
    assert gap(trainer, sampler.sample(PROMPTS, SAMPLING, seed=1)) < 1e-5
    assert not old.exists()


def test_an_adapter_that_cannot_be_loaded(server: FakeVllm, make: Any, start: Path) -> None:
    message = "LoRA rank 32 is greater than max_lora_rank 16"
    sampler = make(lora_trainer(start), lora_rank=2)
    sampler.check()
    server.canned["/v1/load_lora_adapter"] = (500, {"error": {"message": message}})
    with pytest.raises(ServerError, match=message):
        sampler.set_policy_version(0)


def test_a_server_that_was_started_without_adapters(server: FakeVllm, make: Any, start: Path) -> None:
    """It has the route, and fails at every adapter."""
    server.canned["/v1/load_lora_adapter"] = (500, {"error": {"message": "LoRA is not enabled"}})
    with pytest.raises(ConfigError, match="--enable-lora"):
        make(lora_trainer(start), lora_rank=2).check()


def test_an_answer_to_a_load_that_was_lost_on_its_way(server: FakeVllm, make: Any, start: Path) -> None:
    def load_first() -> None:
        body = server.asked[-1][1]
        server.engine.load_adapter(body["lora_name"], body["lora_path"])

    server.at["/v1/load_lora_adapter", 2] = load_first  # the first one asks whether the route is there
    trainer = lora_trainer(start)
    sampler = make(trainer, lora_rank=2)
    assert gap(trainer, sampler.sample(PROMPTS, SAMPLING, seed=0)) < 1e-5
    assert server.count("/v1/load_lora_adapter") == 2


class HalfTrainer:
    """Saves as ``save`` says."""

    def __init__(self, save: Callable[[Path], None]) -> None:
        self.save_pretrained = save

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        return []


def test_folders_are_whole_or_not_there(make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run/sampler_weights"
    seen = []

    def save(target: Path) -> None:
        seen.append(target.name)
        (target / "half").write_text("")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left on device"):
        make(HalfTrainer(save)).set_policy_version(0)
    assert [path.name for path in folder.iterdir()] == seen
    assert seen[0].endswith("-0.partial")
    with pytest.raises(RunError, match=r"wrote \['half'\]; expected config\.json among them"):
        make(HalfTrainer(lambda target: (target / "half").write_text(""))).set_policy_version(0)
    assert all(path.name.endswith(".partial") for path in folder.iterdir())


def test_what_a_killed_process_left_in_the_run_goes(make: Any, tmp_path: Path) -> None:
    left = tmp_path / "run/sampler_weights/understudy-0-17"
    left.mkdir(parents=True)
    elsewhere = tmp_path / "shared/understudy-0-17"
    elsewhere.mkdir(parents=True)
    make(full_trainer()).set_policy_version(0)
    make(full_trainer(), weights_dir=str(tmp_path / "shared")).set_policy_version(0)
    assert not left.exists()
    assert elsewhere.exists()  # it may be another run's


# Restarts and rivals


def undisturbed(start: Path, tmp_path: Path, trainer: Any) -> list[list[list[int]]]:
    """What a server that stays up writes."""
    with FakeVllm(start) as server:
        config = SamplerServerConfig(url=server.url)
        options: dict[str, Any] = {"model": "m", "vocab_size": 6, "stop_ids": frozenset({EOS})}
        with VllmSampler(config, trainer, output_dir=tmp_path / "other", **options) as sampler:
            return written(sampler.sample(PROMPTS, SAMPLING, seed=3))


@pytest.mark.parametrize("lora", [False, True])
def test_what_a_server_wrote_with_its_old_weights_is_written_anew(
    server: FakeVllm, make: Any, start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, lora: bool
) -> None:
    """It dies at the second prompt of a batch. The trainer has moved on by then; the rollouts are of the version."""
    trainer = lora_trainer(start) if lora else full_trainer()
    sampler = make(trainer, **({"lora_rank": 2} if lora else {}))
    sampler.sample(PROMPTS, SAMPLING, seed=1)
    step(trainer)
    sampler.set_policy_version(1)
    frozen = lora_trainer(start) if lora else full_trainer()
    step(frozen)
    step(trainer)
    expected = None if lora else undisturbed(start, tmp_path, frozen)
    server.at["/v1/completions", server.count("/v1/completions") + 2] = server.die
    with caplog.at_level(logging.WARNING, logger="understudy"):
        groups = sampler.sample(PROMPTS, SAMPLING, seed=3)
    assert server.starts == 2
    assert gap(frozen, groups) < 1e-5
    assert gap(trainer, groups) > 0.01
    assert versions(groups) == {1}
    assert lora or written(groups) == expected
    assert "what it wrote is dropped" in caplog.text


def test_a_server_that_restarted_between_two_calls(server: FakeVllm, make: Any) -> None:
    trainer = full_trainer()
    sampler = make(trainer)
    first = sampler.sample(PROMPTS, SAMPLING, seed=1)
    server.at["/weight_info", server.count("/weight_info") + 1] = server.die
    again = sampler.sample(PROMPTS, SAMPLING, seed=1)
    assert written(again) == written(first)
    assert gap(trainer, again) < 1e-5
    assert server.starts == 2


@pytest.mark.parametrize("step_of_push", range(1, 9))
def test_a_server_that_dies_in_a_push_is_sent_the_weights_again(server: FakeVllm, make: Any, step_of_push: int) -> None:
    """At each of its calls: above all, the label is never put on weights that came back with a restart."""
    trainer = full_trainer()
    sampler = make(trainer)
    sampler.check()
    calls = ["/health", *FULL][step_of_push - 1 :]
    path = calls[0]
    earlier = ["/weight_info", "/health", *FULL][:step_of_push].count(path)  # since the check
    server.at[path, server.count(path) + earlier + 1] = server.die
    groups = sampler.sample(PROMPTS, SAMPLING, seed=1)
    assert server.starts == 2
    assert gap(trainer, groups) < 1e-5
    assert server.engine.running.is_set()


def test_a_server_that_dies_while_it_is_compared(server: FakeVllm, make: Any) -> None:
    trainer = full_trainer()
    sampler = make(trainer)
    server.at["/v1/completions", 5] = server.die
    assert gap(trainer, sampler.sample(PROMPTS, SAMPLING, seed=1)) < 1e-5
    assert server.starts == 2


def test_a_server_that_stays_away(server: FakeVllm, make: Any) -> None:
    sampler = make(full_trainer(), patience=0.3)
    sampler.sample(PROMPTS, SAMPLING, seed=1)
    server.stop()
    with pytest.raises(ServerUnavailable, match="sampler"):
        sampler.sample(PROMPTS, SAMPLING, seed=2)
    with pytest.raises(ServerUnavailable, match="sampler"):
        sampler.set_policy_version(1)


def test_weights_of_another_run_are_noticed(server: FakeVllm, make: Any, tmp_path: Path) -> None:
    """They arrive while a batch is written, under the same version number."""
    trainer, other = full_trainer(), full_trainer(seed=7)
    sampler = make(trainer)
    rival = make(other, weights_dir=str(tmp_path / "rival"))
    first = sampler.sample(PROMPTS, SAMPLING, seed=1)
    assert gap(other, rival.sample(PROMPTS, SAMPLING, seed=1)) < 1e-5
    again = sampler.sample(PROMPTS, SAMPLING, seed=1)
    assert written(again) == written(first)
    assert gap(trainer, again) < 1e-5

    def take_over() -> None:
        server.engine.model, server.engine.weight_version = other.model.model, "understudy-0-0"
        server.engine.cache.clear()

    server.at["/v1/completions", server.count("/v1/completions") + 2] = take_over
    assert gap(trainer, sampler.sample(PROMPTS, SAMPLING, seed=1)) < 1e-5
    for n in range(1, 200):
        server.at["/v1/completions", server.count("/v1/completions") + n] = take_over
    with pytest.raises(ServerUnavailable, match="3 times"):
        sampler.sample(PROMPTS, SAMPLING, seed=1)


def test_adapters_of_two_runs_get_along(server: FakeVllm, make: Any, start: Path, tmp_path: Path) -> None:
    trainers = [lora_trainer(start), lora_trainer(start)]
    step(trainers[1])
    samplers = [make(t, lora_rank=2, weights_dir=str(tmp_path / f"run{i}")) for i, t in enumerate(trainers)]
    for _ in range(2):
        for trainer, sampler in zip(trainers, samplers, strict=True):
            assert gap(trainer, sampler.sample(PROMPTS, SAMPLING, seed=1)) < 1e-5
    assert len(server.engine.adapters) == 2


def test_a_push_waits_for_the_batch_that_is_being_written(server: FakeVllm, make: Any) -> None:
    trainer = full_trainer()
    sampler = make(trainer)
    sampler.sample(PROMPTS, SAMPLING, seed=1)
    old = full_trainer()
    step(trainer)
    pushing = threading.Thread(target=lambda: sampler.set_policy_version(1))
    server.at["/v1/completions", server.count("/v1/completions") + 1] = pushing.start
    groups = sampler.sample(PROMPTS, SAMPLING, seed=2)
    pushing.join()
    assert gap(old, groups) < 1e-5
    assert versions(groups) == {0}
    groups = sampler.sample(PROMPTS, SAMPLING, seed=2)
    assert gap(trainer, groups) < 1e-5
    assert versions(groups) == {1}
    # Once the pause had begun, nothing was written until it was over.
    paths = server.paths()
    assert "/v1/completions" not in paths[len(paths) - paths[::-1].index("/pause") : -paths[::-1].index("/resume")]


# Sampling


def test_a_rollout_depends_on_its_identity_alone(make: Any) -> None:
    sampler = make(full_trainer(), stop_ids=[])
    together = sampler.sample(PROMPTS, SAMPLING, seed=1)
    assert len({tuple(ids) for ids in written(together)[1]}) > 1
    for prompt, group in zip(PROMPTS, together, strict=True):
        assert [r.prompt for r in group] == [prompt] * 3
        assert written(sampler.sample([prompt], SAMPLING, seed=1)) == written([group])
        one = SAMPLING.model_copy(update={"group_size": 1})
        assert written(sampler.sample([prompt], one, seed=1)) == written([group[:1]])
    assert written(sampler.sample(PROMPTS, SAMPLING, seed=2)) != written(together)
    assert sampler.sample([], SAMPLING, seed=1) == []


def test_a_prompt_asked_twice_gets_further_samples(make: Any) -> None:
    sampler = make(full_trainer(), stop_ids=[])
    first, _, second = sampler.sample([PROMPTS[0], PROMPTS[1], PROMPTS[0]], SAMPLING, seed=1)
    [six] = sampler.sample([PROMPTS[0]], SAMPLING.model_copy(update={"group_size": 6}), seed=1)
    assert written([first + second]) == written([six])
    assert written([first]) != written([second])


def test_finish_reasons(make: Any) -> None:
    sampling = SAMPLING.model_copy(update={"group_size": 16})
    rollouts = [r for group in make(full_trainer(seed=5)).sample(PROMPTS, sampling, seed=1) for r in group]
    for r in rollouts:
        assert EOS not in r.completion_ids[:-1]
        assert r.finish_reason == ("stop" if r.completion_ids[-1] == EOS else "length")
        assert r.finish_reason == "stop" or len(r.completion_ids) == 6
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}


def test_without_stop_ids_everything_is_cut(make: Any) -> None:
    [group] = make(full_trainer(seed=5), stop_ids=[]).sample(PROMPTS[:1], SAMPLING, seed=1)
    assert [(len(r.completion_ids), r.finish_reason) for r in group] == [(6, "length")] * 3


def test_greedy_completions_are_all_the_same(server: FakeVllm, make: Any) -> None:
    """vLLM refuses to write several."""
    trainer = full_trainer()
    groups = make(trainer).sample(PROMPTS, SAMPLING.model_copy(update={"temperature": 0.0}), seed=1)
    assert all(len(group) == 3 and group.count(group[0]) == 3 for group in groups)
    ids = list(groups[0][0].completion_ids)
    best = trainer.model.model(input_ids=torch.tensor([[*PROMPTS[0].prompt_ids, *ids]])).logits[0].argmax(-1)
    assert ids == best[2:-1].tolist()
    assert gap(trainer, groups) < 1e-5  # at temperature 1


def test_nothing_is_left_to_the_servers_defaults(server: FakeVllm, make: Any) -> None:
    sampling = SAMPLING.model_copy(update={"temperature": 0.6, "top_p": 0.9, "top_k": 2})
    make(full_trainer(), stop_ids=[3, EOS]).sample(PROMPTS, sampling, seed=1)
    body = server.bodies("/v1/completions")[-1]
    del body["prompt"], body["seed"]
    assert body == {
        "model": "student",
        "n": 3,
        "max_tokens": 6,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 2,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": [],
        "stop_token_ids": [EOS, 3],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
    }


def text(ids: Sequence[int]) -> str:
    return "".join("abcdef"[i] for i in ids)


def first_stop(ids: Sequence[int], stop: str) -> list[int]:
    """Up to the token that completes it."""
    return next((list(ids[:n]) for n in range(1, len(ids) + 1) if stop in text(ids[:n])), list(ids))


@pytest.mark.parametrize(
    ("reading", "requests"),
    [(text, 3), (lambda ids: "", 3), (lambda ids: text(ids) + "cc" * (len(ids) % 4 == 3), 3 + 9)],
    ids=["as the run", "misses them", "sees some that are none"],
)
def test_stop_strings(server: FakeVllm, make: Any, reading: Callable[[Sequence[int]], str], requests: int) -> None:
    """A completion ends with the token that completes one by the run's own reading, whatever the server's."""
    trainer = full_trainer()
    whole = make(trainer, stop_ids=[]).sample(PROMPTS, SAMPLING.model_copy(update={"max_completion_tokens": 8}), seed=1)
    sampler = make(trainer, stop_ids=[], ends=lambda ids: "cc" in text(ids))
    server.decode = reading
    sampling = SAMPLING.model_copy(update={"max_completion_tokens": 8, "stop": ("cc",)})
    sampler.set_policy_version(0)
    before = server.count("/v1/completions")
    groups = sampler.sample(PROMPTS, sampling, seed=1)
    for r in (r for group in groups for r in group):
        assert r.finish_reason == ("stop" if "cc" in text(r.completion_ids) else "length")
        assert r.finish_reason == "stop" or len(r.completion_ids) == 8
        assert list(r.completion_ids) == first_stop(r.completion_ids, "cc")
    assert gap(trainer, groups) < 1e-5
    if requests == 3:
        expected = [[first_stop(ids, "cc") for ids in group] for group in written(whole)]
        assert written(groups) == expected
        assert {r.finish_reason for group in groups for r in group} == {"stop", "length"}
    assert server.count("/v1/completions") - before >= requests


def test_completions_that_fill_the_context(start: Path, tmp_path: Path) -> None:
    trainer = full_trainer()
    with FakeVllm(start, max_model_len=9) as server:
        options: dict[str, Any] = {"model": "m", "vocab_size": 6, "stop_ids": frozenset()}
        with VllmSampler(SamplerServerConfig(url=server.url), trainer, output_dir=tmp_path, **options) as sampler:
            sampling = SAMPLING.model_copy(update={"max_completion_tokens": 2})
            assert sampler.check(longest=9).max_model_len == 9
            for version in range(2):
                sampler.set_policy_version(version)
                assert gap(trainer, sampler.sample(PROMPTS, sampling, seed=version)) < 1e-5
                step(trainer)
            sampler.set_policy_version(2)
            with pytest.raises(ServerError, match=r"prompt 2.*maximum context length is 9"):
                sampler.sample(PROMPTS, SAMPLING, seed=1)


@pytest.mark.parametrize("mangled", ["completions", "scores"])
def test_malformed_replies_are_refused(
    server: FakeVllm, make: Any, monkeypatch: pytest.MonkeyPatch, mangled: str
) -> None:
    monkeypatch.setattr("understudy.backends.http.BAD_REPLIES", 0)  # a retry gives the same
    sampler = make(full_trainer(), probe=lambda: [TokenSequence([1], [2, 3])])
    if mangled == "scores":
        monkeypatch.setattr("fake_vllm.Engine.score", lambda *_: [None, None, None])
        with pytest.raises(ServerError, match=r"'sampler'.*\(probe \d\).*prompt token \d at position 1: got"):
            sampler.set_policy_version(0)
        return
    sampler.set_policy_version(0)
    server.mangle = lambda reply: {"choices": reply["choices"][:2]}
    with pytest.raises(ServerError, match=r"'sampler'.*\(prompt 0\).*choices \[0, 1\]; expected 0 to 2, each once"):
        sampler.sample(PROMPTS[:1], SAMPLING, seed=1)


# Before the run begins


def test_check_finds_the_model(server: FakeVllm, make: Any) -> None:
    served = make(full_trainer()).check(longest=64)
    assert (served.model, served.max_model_len) == ("student", 64)
    server.canned["/v1/models"] = (200, {"data": [{"id": i, "max_model_len": 9} for i in ("a", "b")]})
    assert make(full_trainer(), served_model="b").check().model == "b"


def refusal(sampler: VllmSampler, **options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        sampler.check(**options)
    return error.value


def test_check_says_what_is_missing_and_how_to_start_the_server(server: FakeVllm, make: Any, start: Path) -> None:
    port = server.port
    sampler = make(full_trainer())
    error = refusal(sampler, longest=65)
    assert (error.got, error.expected) == ("max_model_len 64", "at least 65, for prompt and completion")
    command = f"vllm serve models/student --served-model-name student --port {port}"
    assert error.remedy.endswith(f"VLLM_SERVER_DEV_MODE=1 {command} --max-model-len 65")
    for cards, got in ([{"id": "a"}, {"id": "b"}], "models a, b"), ([{"id": "a"}], "a model a without max_model_len"):
        server.canned["/v1/models"] = (200, {"data": cards})
        assert refusal(sampler).got == got
    assert refusal(make(full_trainer(), served_model="c")).expected == "c"
    server.canned["/v1/models"] = (200, {"data": 3})
    server.canned["/v1/models"] = (401, {"error": "Unauthorized"})
    assert "401" in refusal(sampler).got
    del server.canned["/v1/models"]
    server.canned["/weight_info"] = server.canned["/v1/load_lora_adapter"] = (404, {"detail": "Not Found"})
    error = refusal(sampler)
    assert error.got == "no route /weight_info"
    assert error.remedy.endswith(f"VLLM_SERVER_DEV_MODE=1 {command}")
    error = refusal(make(full_trainer(), lora_rank=20))
    assert error.got == "no route /v1/load_lora_adapter"
    assert error.remedy.endswith(f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True {command} --enable-lora --max-lora-rank 32")


def test_check_says_that_nobody_is_there(server: FakeVllm, make: Any) -> None:
    sampler = make(full_trainer(), patience=0)
    server.stop()
    error = refusal(sampler, longest=99)
    assert "no connection" in error.got
    assert "vllm serve models/student" in error.remedy


def test_what_cannot_work_is_refused_at_once(make: Any) -> None:
    for options, where in [
        ({"temperature": 0.7}, "sampling.temperature"),
        ({"url": None}, "sampler.url"),
        ({"api": "sglang"}, "sampler.api"),
        ({"push": "lora"}, "sampler.push"),
        ({"push": "full", "lora_rank": 4}, "sampler.push"),
        ({"api_key_env": "NO_SUCH_VARIABLE_HERE"}, "api_key_env"),
    ]:
        with pytest.raises(ConfigError) as error:
            make(full_trainer(), **options)
        assert error.value.where.startswith(where)

"""The Python API with parts of the caller's own, and what it promises about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import understudy
from understudy import ConfigError, Prompt, Rollout, RunConfig, SampledScores, TokenSequence
from understudy.backends.loading import load_student
from understudy.backends.local import LocalTrainer
from understudy.config import OptimConfig, StudentConfig
from user import metrics, save_model, tree, word_tokenizer, write_rows


class Scribe:
    """A sampler that always writes the same words."""

    def __init__(self) -> None:
        self.versions: list[int] = []

    def set_policy_version(self, version: int) -> None:
        self.versions.append(version)

    def sample(self, prompts: Sequence[Prompt], sampling: Any, *, seed: int) -> list[list[Rollout]]:
        version = self.versions[-1]
        return [[Rollout(p, [5, 6, 0], [-1.0] * 3, "stop", version, version)] * sampling.group_size for p in prompts]


class Critic:
    """A teacher that likes token 6 and gives log-probabilities only, as a remote one does."""

    kinds = frozenset({"sampled"})

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        return [[-0.5 if token == 6 else -3.0 for token in s.completion_ids] for s in sequences]

    def score(self, sequences: Sequence[TokenSequence], kind: str, *, topk: int = 0) -> list[SampledScores]:
        assert kind == "sampled"
        return [SampledScores(row) for row in self.compute_logprobs(sequences)]


class Notebook:
    """A trainer that only takes notes."""

    def __init__(self) -> None:
        self.advantages: list[list[float]] = []
        self.steps = 0

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        return [[-1.0] * len(s.completion_ids) for s in sequences]

    def forward_backward(self, batch: understudy.Batch, objective: object) -> understudy.LossOutput:
        assert batch.advantages is not None
        self.advantages.append(batch.advantages.tolist())
        return understudy.LossOutput(torch.tensor(1.5), {})

    def optimizer_step(self, *, learning_rate: float, num_tokens: int) -> Mapping[str, float]:
        self.steps += 1
        return {"grad_norm": learning_rate * num_tokens}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]

    def save_pretrained(self, folder: Path) -> None:
        (folder / "notes.txt").write_text(str(self.steps))


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    save_model(tmp_path / "model", word_tokenizer())
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"w{i}", "answer": "w4 w5"} for i in range(4)])
    return tree(tmp_path / "model", tmp_path / "model", rows, tmp_path / "run", optim={"learning_rate": 0.5})


def test_every_part_can_be_brought_along(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are read; advantages are teacher minus sampler; the checkpoint is the trainer's own."""
    monkeypatch.setattr("understudy.assembly.load_student", lambda *a, **k: pytest.fail("weights were read"))
    sampler, trainer = Scribe(), Notebook()
    parts: Any = {"sampler": sampler, "teachers": {"default": Critic()}, "trainer": trainer}
    result = understudy.distill(RunConfig.model_validate(config), **parts, quiet=True)
    assert trainer.advantages == [[-2.0, 0.5, -2.0] * 4] * 2
    assert sampler.versions == [0, 1, 2]
    assert result.metrics["reverse_kl/mean"] == pytest.approx(3.5 / 3)
    assert result.metrics["loss"] == pytest.approx(1.5 / 12)
    assert result.metrics["grad_norm"] == pytest.approx(0.5 * 12)
    assert (result.student / "notes.txt").read_text() == "2"  # type: ignore[operator]
    config["optim"]["num_steps"] = 3
    parts["trainer"] = Notebook()
    result = understudy.distill(RunConfig.model_validate(config), **parts, quiet=True, resume=True)
    assert parts["trainer"].steps == 3
    assert [row["step"] for row in metrics(result.folder)] == [1, 2, 3]


def test_a_grader_needs_no_reward_section(config: dict[str, Any]) -> None:
    def grade(prompt: Prompt, completion: str, finish_reason: str) -> float:
        assert completion == "w4 w5"  # the end token is left out
        return 0.25

    trainer = Notebook()
    parts: Any = {"sampler": Scribe(), "trainer": trainer}
    result = understudy.rl(RunConfig.model_validate(config), rewards=grade, **parts, quiet=True)
    assert result.metrics["reward/mean"] == 0.25
    assert trainer.advantages == [[0.0] * 12] * 2  # a group that agrees teaches nothing


def test_a_trainer_without_its_sampler_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a Notebook without a sampler"):
        understudy.distill(RunConfig.model_validate(config), trainer=Notebook())  # type: ignore[arg-type]
    assert not Path(config["output_dir"]).exists()


def test_a_local_trainer_shares_its_weights_with_the_sampler(config: dict[str, Any]) -> None:
    """The caller's own model object: what it writes is what it has learnt, so every importance ratio is near 1."""
    model = load_student(StudentConfig(model=config["student"]["model"], device="cpu"))
    config["objective"] = {"estimator": "sampled"}
    trainer = LocalTrainer(model, OptimConfig(), temperature=1.0)
    understudy.distill(RunConfig.model_validate(config), trainer=trainer, quiet=True)
    for row in metrics(Path(config["output_dir"])):
        assert row["ratio/abs_log_max"] < 1e-4


def test_teachers_must_cover_the_rows(config: dict[str, Any]) -> None:
    teachers: Any = {"maths": Critic()}
    with pytest.raises(ConfigError, match=r"got: *maths\n.*default"):
        understudy.distill(RunConfig.model_validate(config), teachers=teachers)


def test_full_needs_a_teacher_in_process(config: dict[str, Any]) -> None:
    config["objective"] = {"estimator": "full"}
    teachers: Any = {"default": Critic()}
    with pytest.raises(ConfigError, match=r"objective.estimator[\s\S]*sampled"):
        understudy.distill(RunConfig.model_validate(config), teachers=teachers)
    assert not Path(config["output_dir"]).exists()


def test_configuration_that_names_the_section_of_another_command(config: dict[str, Any]) -> None:
    """One tree for all commands: `rl` and `sft` take no notice of [teacher]."""
    config["reward"] = {"grader": "exact_match"}
    config["teacher"]["model"] = "/no/such/teacher"
    result = understudy.rl(RunConfig.model_validate(config), quiet=True)
    assert "reverse_kl/mean" not in result.metrics
    assert "reward/mean" in result.metrics

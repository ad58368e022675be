"""The Python API with parts of the caller's own, and what it promises about them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import understudy
from understudy import ConfigError, Prompt, Rollout, RunConfig, SampledScores, TokenSequence, assembly, precision
from understudy.backends.loading import load_model, load_student
from understudy.backends.local import LocalTeacher, LocalTrainer
from understudy.config import OptimConfig, StudentConfig
from understudy.next_tokens import next_tokens_of
from understudy.rollout_store import read_rollouts
from user import amounts, metrics, save_model, tree, without_times, word_tokenizer, write_rows

# peft asks transformers the old way
peft_warns = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


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

    def optimizer_step(self, *, learning_rate: float, divisor: int) -> Mapping[str, float]:
        self.steps += 1
        return {"grad_norm": learning_rate * divisor}

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
    Path(config["student"]["model"], "model.safetensors").unlink()  # a tokenizer and sizes are enough
    sampler, trainer = Scribe(), Notebook()
    parts: Any = {"sampler": sampler, "teachers": {"default": Critic()}, "trainer": trainer}
    result = understudy.distill(RunConfig.model_validate(config), **parts, quiet=True)
    assert trainer.advantages == [[-2.0, 0.5, -2.0] * 4] * 2
    assert sampler.versions == [0, 1, 2]
    assert result.metrics["reverse_kl/mean"] == pytest.approx(3.5 / 3)
    assert result.metrics["optim/loss"] == pytest.approx(1.5 / 12)
    assert result.metrics["optim/grad_norm"] == pytest.approx(0.5 * 12)
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


@peft_warns
@pytest.mark.parametrize(
    ("method", "sections"),
    [
        ("distill", {"objective": {"estimator": "full"}}),
        ("distill", {"objective": {"estimator": "sampled"}}),
        ("distill", {"student": {"lora": {"rank": 2, "alpha": 4.0}}}),
        ("rl", {"reward": {"grader": "exact_match"}}),
    ],
    ids=["full", "sampled", "lora", "rl"],
)
def test_what_pages_show_of_rollouts_changes_and_costs_nothing(
    method: str, sections: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    """Entropies are the models' own; weights, metrics and costs are those of a run that keeps no rollouts."""
    sections = {name: config.get(name, {}) | values for name, values in sections.items()}
    save_model(tmp_path / "teacher", word_tokenizer(), seed=1)
    config = config | sections | {"teacher": {"model": str(tmp_path / "teacher")}}
    folders = {per_step: tmp_path / f"run{per_step}" for per_step in (0, 3)}
    for per_step, folder in folders.items():
        own = config | {"output_dir": str(folder), "rollouts": {"every": 1, "per_step": per_step, "topk": 2}}
        getattr(understudy, method)(RunConfig.model_validate(own), quiet=True)
    plain, kept = folders.values()
    assert [without_times(row) for row in metrics(kept)] == [without_times(row) for row in metrics(plain)]
    costs = [amounts(json.loads((folder / "costs.json").read_text())) for folder in (plain, kept)]
    assert costs[0] == costs[1]
    weights = next((plain / "checkpoints" / "step_000002").glob("*.safetensors"))
    assert weights.read_bytes() == (kept / weights.relative_to(plain)).read_bytes()

    records = read_rollouts(kept / "rollouts" / "step_000000.jsonl")
    written = [TokenSequence(record["prompt_ids"], record["completion_ids"]) for record in records]
    entropies = {
        name: [found.entropy for found in next_tokens_of(LocalTeacher(model), written, topk=0)[1]]
        for name, path in (("student", config["student"]["model"]), ("teacher", str(tmp_path / "teacher")))
        for model in [load_student(StudentConfig(model=path, device="cpu"))]
    }
    assert len(records) == 3
    for record, student, teacher in zip(records, entropies["student"], entropies["teacher"], strict=True):
        assert record["student_entropy"] == pytest.approx(student, abs=1e-5)
        known = method == "distill" and config.get("objective", {}).get("estimator") != "sampled"
        assert record["teacher_entropy"] == (pytest.approx(teacher, abs=1e-5) if known else None)
        assert [len(ids) for ids in record["student_topk"]["ids"]] == [2] * len(student)
        # The importance ratio of a policy with itself.
        assert record["trainer_logprobs"] == pytest.approx(record["sampler_logprobs"], abs=1e-4)


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


@pytest.fixture
def adapters(config: dict[str, Any], tmp_path: Path) -> Path:
    """A folder as peft writes it: adapters that name their base."""
    from understudy.config import LoraConfig

    base = StudentConfig(model=config["student"]["model"], device="cpu", lora=LoraConfig(rank=2))
    load_student(base).model.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters"


@peft_warns
def test_adapters_on_adapters_are_refused(
    config: dict[str, Any], adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft would write the new ones alone, against the first base."""
    monkeypatch.setattr(assembly, "load_student", lambda *a, **k: pytest.fail("weights were read"))
    config["student"] |= {"model": str(adapters), "lora": {"rank": 2}}
    with pytest.raises(ConfigError, match=r"student.lora[\s\S]*merge_and_unload"):
        understudy.distill(RunConfig.model_validate(config))
    assert not Path(config["output_dir"]).exists()


def test_float16_is_no_dtype_to_train_in(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "load_student", lambda *a, **k: pytest.fail("weights were read"))
    config["student"]["dtype"] = "float16"
    with pytest.raises(ConfigError, match=r'student.dtype[\s\S]*remedy: *use "bfloat16" or "float32"'):
        understudy.distill(RunConfig.model_validate(config))


@peft_warns
@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_without_a_master_copy_is_warned_of(
    config: dict[str, Any], caplog: pytest.LogCaptureFixture, lora: bool
) -> None:
    config["student"] |= {"dtype": "bfloat16"} | ({"lora": {"rank": 2}} if lora else {})
    with caplog.at_level(logging.WARNING):
        understudy.distill(RunConfig.model_validate(config), quiet=True)
    assert ("no float32 master copy" in caplog.text) != lora


def test_what_auto_became_is_logged_and_stored(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        result = understudy.distill(RunConfig.model_validate(config), quiet=True)
    assert f"student {config['student']['model']}: float32 on cpu" in caplog.messages
    assert f"teacher {config['teacher']['model']}: float32 on cpu" in caplog.messages
    stored = RunConfig.from_toml(result.folder / "config.toml")
    assert stored.sampling.stop_token_ids == (0,)
    assert stored.objective.reward_coef == 0.0
    assert stored.student.dtype == "float32"
    config["optim"]["num_steps"] = 3
    understudy.distill(RunConfig.model_validate(config), quiet=True, resume=True)  # still says nothing of either


def test_dropped_stop_ids_do_not_come_back_as_others(config: dict[str, Any]) -> None:
    """Absent means what was resolved when the run began; here it would now mean the model's own."""
    config["sampling"]["stop_token_ids"] = [0, 3]
    understudy.distill(RunConfig.model_validate(config), quiet=True)
    del config["sampling"]["stop_token_ids"]
    config["optim"]["num_steps"] = 3
    with pytest.raises(ConfigError, match=r"sampling.stop_token_ids\n.*\[0\]\n.*\[0, 3\], as the run began"):
        understudy.distill(RunConfig.model_validate(config), quiet=True, resume=True)


def test_a_teacher_marks_at_the_sampling_temperature(config: dict[str, Any]) -> None:
    config["sampling"]["temperature"] = 0.7
    with pytest.raises(ConfigError, match=r"teacher 'default'[\s\S]*temperature 1.0[\s\S]*sampling.temperature = 1"):
        understudy.distill(RunConfig.model_validate(config), teachers={"default": Critic()})  # type: ignore[dict-item]
    informed: Any = Critic()
    informed.temperature = 0.7
    understudy.distill(RunConfig.model_validate(config), teachers={"default": informed}, quiet=True)


@peft_warns
@pytest.mark.parametrize("lora", [False, True])
def test_an_earlier_self_gets_the_students_dtype(
    config: dict[str, Any], lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also under adapters, also where memory is short, and without another copy being read on the way."""
    read: list[torch.dtype] = []

    def spy(model: str, *, dtype: torch.dtype, **options: Any) -> Any:
        read.append(dtype)
        return load_model(model, dtype=dtype, **options)

    monkeypatch.setattr(precision, "load_model", spy)
    monkeypatch.setattr(precision, "_too_large_to_compare", lambda *a: True)
    config["student"] |= {"dtype": "float64"} | ({"lora": {"rank": 2}} if lora else {})
    result = understudy.distill(RunConfig.model_validate(config), quiet=True)
    stored = RunConfig.from_toml(result.folder / "config.toml").teacher
    assert stored is not None
    assert stored.dtype == "float64"
    assert read == [torch.float64]


def test_packing_is_tried_out_first(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config["optim"]["packing"] = True
    understudy.distill(RunConfig.model_validate(config), quiet=True)
    config["output_dir"] += "-2"
    hidden = assembly.LanguageModel.hidden

    def deaf(model: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
        return hidden(model, input_ids, **{name: v for name, v in inputs.items() if name != "position_ids"})

    monkeypatch.setattr(assembly.LanguageModel, "hidden", deaf)
    with pytest.raises(ConfigError, match=r"optim.packing[\s\S]*optim.packing = false"):
        understudy.distill(RunConfig.model_validate(config), quiet=True)
    assert not Path(config["output_dir"]).exists()
    config["optim"]["packing"] = False
    understudy.distill(RunConfig.model_validate(config), quiet=True)


@peft_warns
def test_adapters_bring_their_own_tokenizer(config: dict[str, Any], adapters: Path) -> None:
    from understudy.tokenization import load_text

    plain = load_text(str(adapters), "student")
    assert plain.name == str(adapters)
    assert plain.tokenizer.chat_template is None
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(adapters)
    own = load_text(str(adapters), "student")
    assert own.tokenizer.chat_template == tokenizer.chat_template
    assert (own.name, own.vocab, own.vocab_width) == (str(adapters), plain.vocab, plain.vocab_width)
    assert (own.end_ids, own.context_length) == (plain.end_ids, plain.context_length)
    (adapters / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer files beside the adapters"):
        load_text(str(adapters), "student")

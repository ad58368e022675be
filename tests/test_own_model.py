"""Models and rows of a user's own: every command, several architectures, and what comes out of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import understudy
from understudy import RunConfig
from user import (
    ARCHITECTURES,
    CHATML,
    TEXT,
    bpe_tokenizer,
    metrics,
    run_cli,
    save_model,
    tree,
    write_rows,
    write_toml,
)

QUESTIONS = [{"question": TEXT[i % 3] + f" {i}?", "answer": f"It is so.\n#### {i}"} for i in range(6)]
COLUMNS = {"prompt": "question", "answer": "answer"}
DATA = os.environ.get("UNDERSTUDY_DATA")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<architecture> and <architecture>-teacher; chat, chat-teacher: a Qwen3 with a ChatML template."""
    folder = tmp_path_factory.mktemp("models")
    for name in ARCHITECTURES:
        save_model(folder / name, bpe_tokenizer(), architecture=name)
        save_model(folder / f"{name}-teacher", bpe_tokenizer(), architecture=name, seed=1, hidden=24)
    save_model(folder / "chat", bpe_tokenizer(chat=True))
    save_model(folder / "chat-teacher", bpe_tokenizer(chat=True), seed=1)
    return folder


def config_for(models: Path, name: str, tmp_path: Path, **sections: Any) -> dict[str, Any]:
    rows = write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    config = tree(models / name, models / f"{name}-teacher", rows, tmp_path / "run", **sections)
    config["prompts"].setdefault("columns", COLUMNS)
    return config


def distilled(config: dict[str, Any]) -> understudy.RunResult:
    return understudy.distill(RunConfig.model_validate(config), quiet=True)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("packing", [False, True])
def test_every_command_on_every_architecture(
    name: str,
    packing: bool,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_for(models, name, tmp_path, optim={"packing": packing}, reward={"grader": "last_number"})
    config["evaluation"] = {
        "tasks": [{"path": config["prompts"]["path"], "columns": COLUMNS, "grader": "last_number", "limit": 2}]
    }
    path = write_toml(tmp_path / "run.toml", config)
    assert run_cli(monkeypatch, "distill", path) == 0
    student = tmp_path / "run" / "checkpoints" / "step_000002"
    assert f"student  {student}" in capsys.readouterr().out
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"eval/eval/greedy", "eval/eval/t1"} <= rows[0].keys() & rows[2].keys()
    assert rows[1]["reverse_kl/full"] > 0
    # Cached decoding and a full pass differ by float32's rounding only, whatever the architecture's attention.
    [record, *_] = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000000.jsonl").read_text().splitlines()]
    assert record["trainer_logprobs"] == pytest.approx(record["sampler_logprobs"], abs=1e-4)
    # The checkpoint is an ordinary model folder, trained, tokenizer included, and goes into the next command.
    after, before = weights_of(student), weights_of(models / name)
    assert after.keys() == before.keys()
    assert sum(not torch.equal(after[key], before[key]) for key in after) > len(after) / 2
    assert AutoTokenizer.from_pretrained(student).get_vocab() == bpe_tokenizer().get_vocab()
    again = ["--student.model", student, "--output_dir"]
    assert run_cli(monkeypatch, "eval", path, *again, tmp_path / "eval") == 0
    assert json.loads((tmp_path / "eval" / "evaluation.json").read_text()) == {
        key: value for key, value in rows[2].items() if key.startswith("eval/")
    }
    if not packing:
        assert run_cli(monkeypatch, "rl", path, *again, tmp_path / "rl") == 0
        assert metrics(tmp_path / "rl")[1].keys() >= {"reward/mean", "ratio/mean"}
        assert run_cli(monkeypatch, "generate", path, "--output_dir", tmp_path / "generated") == 0
    else:
        write_rows(tmp_path / "samples.jsonl", [{"prompt": row["question"], "completion": "72"} for row in QUESTIONS])
    samples = tmp_path / ("samples.jsonl" if packing else "generated/samples.jsonl")
    arguments = ["--prompts.path", samples, "--prompts.columns", "{}", "--prompts.limit", "4"]
    assert run_cli(monkeypatch, "sft", path, *again, tmp_path / "sft", *arguments) == 0
    assert metrics(tmp_path / "sft")[2]["optim/loss"] < metrics(tmp_path / "sft")[1]["optim/loss"]


def test_packing_changes_no_number(models: Path, tmp_path: Path) -> None:
    """Rows of several sequences, sliding windows shorter than they are: the same losses to rounding."""
    losses = []
    for packing in (False, True):
        config = config_for(models, "gemma3", tmp_path, optim={"packing": packing})
        config["student"]["dtype"] = config["teacher"]["dtype"] = "float64"
        config["output_dir"] = str(tmp_path / f"packing-{packing}")
        distilled(config)
        losses.append([(row["optim/loss"], row["optim/grad_norm"]) for row in metrics(Path(config["output_dir"]))])
    for one, other in zip(*losses, strict=True):
        # transformers' norms round to float32 whatever the model's dtype: half a step is 6e-8 of a number.
        assert one == pytest.approx(other, rel=1e-7)


def test_generated_samples_are_rows_for_sft(models: Path, tmp_path: Path) -> None:
    config = config_for(models, "qwen3", tmp_path, sampling={"group_size": 3, "temperature": 0.7, "top_p": 0.9})
    result = understudy.generate(RunConfig.model_validate(config))
    rows = [json.loads(line) for line in (result.folder / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * len(QUESTIONS) == result.metrics["samples"]
    assert {row["prompt"] for row in rows} == {row["question"] for row in QUESTIONS}
    assert all(row.keys() == {"prompt", "answer", "completion", "finish_reason"} for row in rows)
    costs = json.loads((result.folder / "costs.json").read_text())["roles"]["teacher_sampling"]
    assert costs["tokens"] > len(rows)
    assert costs["flops"] > 0


def test_conversations(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instruction set with messages, distilled and fine-tuned on."""
    user = [{"role": "user", "content": row["question"]} for row in QUESTIONS]
    write_rows(tmp_path / "ask.jsonl", [{"messages": [message]} for message in user])
    write_rows(tmp_path / "told.jsonl", [{"messages": [m, {"role": "assistant", "content": "72"}]} for m in user])
    config = tree(models / "chat", models / "chat-teacher", tmp_path / "ask.jsonl", tmp_path / "run")
    config["prompts"]["system_prompt"] = "Be brief."
    path = write_toml(tmp_path / "run.toml", config)
    assert run_cli(monkeypatch, "distill", path) == 0
    [first, *_] = (tmp_path / "run/rollouts/step_000000.jsonl").read_text().splitlines()
    tokenizer = bpe_tokenizer(chat=True)
    read = tokenizer.decode(json.loads(first)["prompt_ids"])
    assert read.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert read.endswith("?<|im_end|>\n<|im_start|>assistant\n")
    arguments = ["--prompts.path", tmp_path / "told.jsonl", "--output_dir", tmp_path / "sft"]
    assert run_cli(monkeypatch, "sft", path, *arguments) == 0
    # Of each row "7", "2" and <|im_end|> train, and not the newline that the template writes after it.
    assert metrics(tmp_path / "sft")[1]["tokens/trained"] == 4 * 3


def test_a_teacher_with_its_own_template(models: Path, tmp_path: Path) -> None:
    other = CHATML.replace("{{ m.role }}\n", "{{ m.role }}: ").replace("assistant\n", "assistant: ")
    save_model(tmp_path / "teacher", bpe_tokenizer(chat=True, chat_template=other), seed=1)
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "May?"}]}])
    distilled(tree(models / "chat", tmp_path / "teacher", rows, tmp_path / "run"))
    record = json.loads((tmp_path / "run/rollouts/step_000000.jsonl").read_text().splitlines()[0])
    tokenizer = bpe_tokenizer(chat=True)
    assert tokenizer.decode(record["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(record["teacher_prompt_ids"]).endswith("<|im_start|>assistant: ")


def test_two_teachers_routed_by_row(models: Path, tmp_path: Path) -> None:
    """Each row is marked by the teacher it names: the recorded marks are that model's own log-probabilities."""
    named = [{"prompt": row["question"], "teacher": ("one", "two.5")[i % 2]} for i, row in enumerate(QUESTIONS)]
    config = tree(models / "qwen3", None, write_rows(tmp_path / "rows.jsonl", named), tmp_path / "run")
    paths = {"one": models / "qwen3-teacher", "two.5": models / "llama-teacher"}
    config["teachers"] = {name: {"model": str(path)} for name, path in paths.items()}
    config["prompts"]["shuffle"] = False
    config["rollouts"] = {"per_step": 4, "every": 1}
    distilled(config)
    lines = (tmp_path / "run/rollouts/step_000000.jsonl").read_text().splitlines()
    seen = set()
    for record in map(json.loads, lines):
        teacher = AutoModelForCausalLM.from_pretrained(paths[record["teacher"]])
        ids = record["prompt_ids"] + record["completion_ids"]
        with torch.no_grad():
            logprobs = teacher(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(record["prompt_ids"]) - 1
        marks = [float(logprobs[start + t, token]) for t, token in enumerate(record["completion_ids"])]
        assert record["teacher_logprobs"] == pytest.approx(marks, abs=1e-5)
        seen.add(record["teacher"])
    assert seen == paths.keys()
    # A teacher's name may hold a dot, and a run with such a one resumes.
    config["optim"]["num_steps"] = 3
    result = understudy.distill(RunConfig.model_validate(config), resume=True, quiet=True)
    assert result.metrics["step"] == 3


def test_a_teacher_that_knows_more(models: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "May?", "teacher_prompt": "The answer is 72. May?"}]
    config = tree(models / "qwen3", models / "qwen3-teacher", write_rows(tmp_path / "r.jsonl", rows), tmp_path / "run")
    distilled(config)
    record = json.loads((tmp_path / "run/rollouts/step_000000.jsonl").read_text().splitlines()[0])
    tokenizer = bpe_tokenizer()
    assert tokenizer.decode(record["prompt_ids"]) == "May?"
    assert tokenizer.decode(record["teacher_prompt_ids"]) == "The answer is 72. May?"


def test_stop_token_ids(models: Path, tmp_path: Path) -> None:
    """Every byte but one ends a completion: nearly all are one token long, and none goes on after a stop."""
    config = config_for(models, "qwen3", tmp_path, sampling={"stop_token_ids": [*range(299)]})
    distilled(config)
    for row in metrics(tmp_path / "run")[1:]:
        assert row["completion_length/mean"] < 1.5


@pytest.mark.parametrize(("student", "teacher"), [(300, 320), (320, 300)])
def test_padded_vocabularies(student: int, teacher: int, tmp_path: Path, models: Path) -> None:
    """Rows beyond the tokenizer's ids mean nothing: they are never written, and never move."""
    tokenizer = bpe_tokenizer()
    save_model(tmp_path / "student", tokenizer, width=student)
    save_model(tmp_path / "teacher", tokenizer, width=teacher, seed=1)
    config = config_for(models, "qwen3", tmp_path, optim={"learning_rate": 0.01, "num_steps": 3})
    config["student"]["model"], config["teacher"]["model"] = str(tmp_path / "student"), str(tmp_path / "teacher")
    folder = distilled(config).student
    assert folder is not None
    before, after = (weights_of(path)["model.embed_tokens.weight"] for path in (tmp_path / "student", folder))
    assert after.shape == (student, 16)
    assert torch.equal(before[300:], after[300:])
    assert not torch.equal(before[:300], after[:300])


def test_a_bfloat16_student_stays_one(models: Path, tmp_path: Path) -> None:
    config = config_for(models, "qwen3", tmp_path, optim={"learning_rate": 0.01})
    config["student"]["dtype"] = "bfloat16"
    result = distilled(config)
    assert result.student is not None
    assert {tensor.dtype for tensor in weights_of(result.student).values()} == {torch.bfloat16}
    assert 0.9 < metrics(tmp_path / "run")[1].get("ratio/mean", 1.0) < 1.1


# peft asks transformers by a name that has become deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_a_plain_peft_folder(models: Path, tmp_path: Path) -> None:
    config = config_for(models, "qwen3", tmp_path, optim={"learning_rate": 0.01})
    config["student"]["lora"] = {"rank": 2, "alpha": 4.0}
    folder = distilled(config).student
    assert folder is not None
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    assert not (folder / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(models / "qwen3")
    adapted = PeftModel.from_pretrained(base, str(folder))
    ids = torch.tensor([bpe_tokenizer()("How many clips?")["input_ids"]])
    with torch.no_grad(), adapted.disable_adapter():
        plain = adapted(ids).logits
    with torch.no_grad():
        assert not torch.allclose(adapted(ids).logits, plain, atol=1e-4)
    # The folder serves as a model of its own: it says which base it belongs to.
    task = {"path": config["prompts"]["path"], "columns": COLUMNS, "grader": "last_number"}
    chained = config | {"output_dir": str(tmp_path / "eval"), "evaluation": {"tasks": [task]}}
    chained["student"] = {"model": str(folder)}
    assert "eval/eval/greedy" in understudy.evaluate(RunConfig.model_validate(chained)).metrics


def test_gradient_checkpointing_recomputes_and_changes_nothing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer's feed-forward runs once more for every pass with a gradient; dropout stays off."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    forward = Qwen3MLP.forward
    calls: list[bool] = []

    def counted(self: Any, *arguments: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        assert not self.training
        return forward(self, *arguments)

    save_model(tmp_path / "student", bpe_tokenizer(), dropout=0.5)
    monkeypatch.setattr(Qwen3MLP, "forward", counted)
    counts, rows = [], []
    for checkpointing in (False, True):
        # Groups of one: prompts that are shared would take two passes, and checkpointing rules that out.
        config = config_for(models, "qwen3", tmp_path, sampling={"group_size": 1})
        config["output_dir"] = str(tmp_path / f"run-{checkpointing}")
        config["student"] |= {"model": str(tmp_path / "student"), "gradient_checkpointing": checkpointing}
        calls.clear()
        distilled(config)
        counts.append(calls.count(True))
        rows.append([row["optim/loss"] for row in metrics(Path(config["output_dir"]))])
    assert counts[1] == 2 * counts[0] == 2 * (2 * 2)  # two layers, two steps of one micro-batch
    assert rows[0] == rows[1]


def test_ten_thousand_rows_are_read(models: Path, tmp_path: Path) -> None:
    from understudy.preflight import check_run

    rows = [{"question": f"{TEXT[i % 3]} {i}", "answer": str(i)} for i in range(10_000)]
    config = config_for(models, "qwen3", tmp_path, reward={"grader": "last_number"})
    write_rows(tmp_path / "questions.jsonl", rows)
    assert len(check_run(RunConfig.model_validate(config), "distill").prompts) == 10_000


@pytest.mark.skipif(DATA is None or not Path(DATA).is_dir(), reason="UNDERSTUDY_DATA names no folder of data sets")
def test_grade_school_problems(tmp_path: Path) -> None:
    assert DATA is not None
    save_model(tmp_path / "student", bpe_tokenizer(), context=2048)
    save_model(tmp_path / "teacher", bpe_tokenizer(), seed=1, context=2048)
    rows = Path(DATA) / "gsm8k" / "train.jsonl"
    config = tree(tmp_path / "student", tmp_path / "teacher", rows, tmp_path / "run", reward={"grader": "last_number"})
    config["prompts"]["columns"] = COLUMNS
    assert distilled(config).metrics["step"] == 2

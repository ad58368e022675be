"""A run's student as a folder for others: what loads there was trained, and the card's numbers are the run's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import understudy
from understudy import ConfigError, RunConfig
from understudy.export import export
from understudy.model_card import base_on_hub
from user import bpe_tokenizer, metrics, run_cli, save_model, tree, write_rows

# peft asks transformers the old way.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LORA = {"rank": 2, "alpha": 4.0}
SIZES = {"checkpoints": {"every": 1, "keep": 9}, "optim": {"learning_rate": 1e-2, "num_steps": 3}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all weights and of adapters, each three steps with evaluations, and one that was only graded."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_model(folder / "model", bpe_tokenizer(chat=True))
    teacher = save_model(folder / "teacher", bpe_tokenizer(chat=True), seed=1)
    half = save_model(folder / "half", bpe_tokenizer(chat=True), dtype=torch.bfloat16)
    rows = write_rows(folder / "rows.jsonl", [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(4)])
    task = {"name": "sums", "path": str(rows), "grader": "last_number", "temperatures": [0.0, 1.0]}
    sections: dict[str, Any] = {"evaluation": {"tasks": [task], "every": 1}, **SIZES}
    plain = tree(model, teacher, rows, folder / "plain", **sections)
    understudy.distill(RunConfig.model_validate(plain), quiet=True)
    lora = tree(half, teacher, rows, folder / "lora", **sections, guards={"ratio": {"abs_log_mean": 1e-12}})
    lora["student"] |= {"lora": LORA, "dtype": "float32"}
    lora |= {"objective": {"estimator": "sampled"}, "sampling": {**lora["sampling"], "stop_token_ids": [0, 2]}}
    understudy.distill(RunConfig.model_validate(lora), quiet=True)
    graded = tree(folder / "plain/checkpoints/step_000003", None, rows, folder / "graded", **sections)
    understudy.evaluate(RunConfig.model_validate(graded), quiet=True)
    return folder


def card(out: Path) -> ModelCard:
    return ModelCard.load(out / "README.md")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def logits(model: Any, out: Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(out)("Natalia sold clips", return_tensors="pt").input_ids
    with torch.no_grad():
        return model(ids).logits


def test_all_weights(runs: Path, tmp_path: Path) -> None:
    out = export(runs / "plain", tmp_path / "out" / "student")
    checkpoint = runs / "plain" / "checkpoints" / "step_000003"
    assert (out / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert names(out) - {name for name in names(out) if name.startswith("curves/")} == {
        *("README.md", "costs.json", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    known = logits(AutoModelForCausalLM.from_pretrained(checkpoint), checkpoint)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out), out), known)
    assert json.loads((out / "costs.json").read_text()) == json.loads((runs / "plain" / "costs.json").read_text())
    for path in out.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert str(runs) not in path.read_text(encoding="utf-8"), path
    assert [path.name for path in out.parent.iterdir()] == ["student"]


def test_the_card_has_the_runs_numbers(runs: Path, tmp_path: Path) -> None:
    out = export(runs / "plain", tmp_path / "student", evaluations=(runs / "graded",))
    rows, said = metrics(runs / "plain"), card(out)
    assert said.data.library_name == "transformers"
    assert said.data.pipeline_tag == "text-generation"
    assert said.data.tags == ["understudy", "on-policy-distillation"]
    assert (said.data.license, said.data.base_model) == (None, None)  # not ours to say
    for name, key in (("greedy", "eval/sums/greedy"), ("sampled at T = 1", "eval/sums/t1")):
        before, after = (f"{row[key]:.4f} ± {row[f'{key}_se']:.4f}" for row in (rows[0], rows[-1]))
        assert f"| sums, {name} | {before} | {after} | 0 and 3 |" in said.text
    gap = "| Reverse KL, full vocabulary | nats per token | {:.4g} | {:.4g} |"
    assert gap.format(rows[1]["reverse_kl/full"], rows[3]["reverse_kl/full"]) in said.text
    graded = json.loads((runs / "graded" / "evaluation.json").read_text())
    apart = said.text.split("Evaluated separately (graded):")[1]
    assert f"| sums, greedy | {graded['eval/sums/greedy']:.4f} ± {graded['eval/sums/greedy_se']:.4f} |" in apart
    tokens = json.loads((out / "costs.json").read_text())["roles"]["student_sampling"]["tokens"]
    assert f"| student sampling | {tokens:,.0f} |" in said.text
    assert "alarms" not in said.text
    assert "learning rate | 0.01, constant" in said.text


def test_curves_stand_alone(runs: Path, tmp_path: Path) -> None:
    out = export(runs / "plain", tmp_path / "student")
    shown = [line.split("(")[1][:-1] for line in card(out).text.splitlines() if line.startswith("![")]
    assert {*shown} == {name for name in names(out) if name.startswith("curves/")}
    assert {"curves/evaluation_sums.svg", "curves/reverse_kl_full.svg"} <= {*shown}
    for name in shown:
        root = ElementTree.parse(out / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root[0].attrib == {"width": "100%", "height": "100%", "fill": "#fff"}


def test_an_earlier_step_has_its_own_numbers(runs: Path, tmp_path: Path) -> None:
    out = export(runs / "plain", tmp_path / "student", step=1)
    row, said = metrics(runs / "plain")[1], card(out).text
    assert row["step"] == 1
    assert "after 1 optimizer steps" in said
    assert f"| {row['eval/sums/greedy']:.4f} ± {row['eval/sums/greedy_se']:.4f} | 0 and 1 |" in said
    assert json.loads((out / "costs.json").read_text())["total_without_evaluation"]["flops"] == row["cost/flops"]


def test_adapters_name_a_base_that_others_have(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a base model in a folder of this machine"):
        export(runs / "lora", tmp_path / "adapters")
    out = export(runs / "lora", tmp_path / "adapters", base_model="owner/base")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/base"
    checkpoint = runs / "lora" / "checkpoints" / "step_000003"
    adapters = load_file(out / "adapter_model.safetensors")
    for name, value in load_file(checkpoint / "adapter_model.safetensors").items():
        assert torch.equal(adapters[name], value)
    said = card(out)
    assert (said.data.library_name, said.data.base_model) == ("peft", "owner/base")
    assert said.data.to_dict()["base_model_relation"] == "adapter"
    assert "AutoPeftModelForCausalLM" in said.text
    assert "| adapters | rank 2, alpha 4 |" in said.text
    [alarm] = [json.loads(line) for line in (runs / "lora" / "guards.jsonl").read_text().splitlines()]
    assert f"| 1 | ratio | warn | {alarm['words']} |" in said.text


def test_merged_adapters_answer_as_the_adapters_do(runs: Path, tmp_path: Path) -> None:
    out = export(runs / "lora", tmp_path / "merged", merge=True)
    assert "adapter_config.json" not in names(out)
    checkpoint = runs / "lora" / "checkpoints" / "step_000003"
    own = AutoPeftModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == torch.bfloat16  # as the base is
    start = load_file(runs / "half" / "model.safetensors")
    weights = {name: value.to(torch.bfloat16) for name, value in own.state_dict().items()}
    for name, value in merged.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert not torch.equal(start["model.layers.0.mlp.up_proj.weight"], weights["model.layers.0.mlp.up_proj.weight"])
    # It ends where it has learnt to end, and says so.
    assert GenerationConfig.from_pretrained(out).eos_token_id == [0, 2]
    assert "Completions end at token 0, 2" in card(out).text
    assert card(out).data.library_name == "transformers"


def nothing(run: Path) -> None:
    pass


def damaged(run: Path) -> None:
    path = run / "checkpoints" / "step_000003" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "arguments", "got"),
    [
        (nothing, {"step": 7}, "no checkpoint of step 7"),
        (nothing, {"merge": True}, "a checkpoint of whole weights"),
        (nothing, {"evaluations": (Path("nowhere"),)}, "No such file"),
        (lambda run: shutil.rmtree(run / "checkpoints"), {}, "no checkpoint"),
        (lambda run: (run / "config.toml").unlink(), {}, "a folder without config.toml"),
        (damaged, {}, "not as it was written: model.safetensors"),
    ],
)
def test_what_cannot_be_exported(
    spoil: Callable[[Path], Any], arguments: dict[str, Any], got: str, runs: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs / "plain", tmp_path / "run"))
    spoil(run)
    with pytest.raises(ConfigError) as error:
        export(run, tmp_path / "out", **arguments)
    assert got in error.value.got
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_evaluation_of_another_checkpoint_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"an evaluation of .*step_000003"):
        export(runs / "plain", tmp_path / "out", step=2, evaluations=(runs / "graded",))


def test_the_command(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "export", runs / "lora", tmp_path / "out", "--merge", "--step", "2") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert "after 2 optimizer steps" in card(tmp_path / "out").text
    assert run_cli(monkeypatch, "export", runs / "lora", tmp_path / "out", "--merge") == 2
    assert "a folder that is not empty" in capsys.readouterr().err


def test_the_base_is_looked_for_through_the_runs_that_made_it(tmp_path: Path) -> None:
    def began(name: str, model: str) -> Path:
        (tmp_path / name / "checkpoints" / "step_000009").mkdir(parents=True)
        (tmp_path / name / "config.toml").write_text(f'[student]\nmodel = "{model}"\n', encoding="utf-8")
        return tmp_path / name / "checkpoints" / "step_000009"

    second = began("second", str(began("first", "owner/base")))
    assert base_on_hub(second.parent.parent) == "owner/base"
    began("third", str(tmp_path))
    assert base_on_hub(tmp_path / "third") is None

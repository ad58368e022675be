"""Recipes for large models, run in miniature on stand-ins: small models and a few rows in place of the hub's."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from understudy import api
from understudy.cli_arguments import smoke_config
from understudy.config import RunConfig
from understudy.config_pipeline import PipelineConfig
from understudy.pipeline import pipeline
from user import bpe_tokenizer, metrics, save_model, write_rows, write_toml

# peft asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

DATA = os.environ.get("UNDERSTUDY_DATA")
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
METHODS: dict[str, Callable[..., api.RunResult]] = {
    "generate": api.generate,
    "sft": api.sft,
    "distill": api.distill,
    "rl": api.rl,
}
SINGLE = {
    "maths/generate.toml": "generate",
    "maths/sft.toml": "sft",
    "maths/distill.toml": "distill",
    "maths/lora-32.toml": "distill",
    "maths/lora-128.toml": "distill",
    "maths/rl.toml": "rl",
    "one-prompt/run.toml": "distill",
    "gsm8k/run.toml": "distill",
    "assistant/distill.toml": "distill",
}
_CHAT = [{"role": "user", "content": "May?"}, {"role": "assistant", "content": "April 72."}]
# The records that the hub's datasets hold.
HUB: dict[str, dict[str, Any]] = {
    "deepmath": {"question": "What is 48 / 2?", "final_answer": "24", "r1_solution_1": "..."},
    "aime24": {"problem": "What is 48 + 24?", "answer": "72"},
    "tulu3": {"messages": _CHAT, "source": "x"},
    "ifeval": {"prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
}
FILES: dict[str, dict[str, Any]] = {
    "data/gsm8k/train.jsonl": {"question": "What is 48 / 2?", "answer": "#### 24"},
    "data/gsm8k/test.jsonl": {"question": "What is 48 + 2?", "answer": "#### 50"},
    "data/documents.jsonl": {"text": "Natalia sold 48 clips in April, and half as many in May. " * 4},
    "data/questions.jsonl": {"messages": _CHAT[:1], "answer": "April"},
    "runs/maths-samples/samples.jsonl": {
        "messages": _CHAT[:1],
        "completion": "24",
        "answer": "24",
        "finish_reason": "stop",
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("stand-in"), bpe_tokenizer(chat=True), context=512)


def stand_in(node: Any, model: Path, folder: Path) -> Any:
    """A recipe's table with stand-ins for what is large or far away: models, rows, their end tokens and lengths."""
    if isinstance(node, list):
        return [stand_in(item, model, folder) for item in node]
    if not isinstance(node, dict):
        return node
    changed = {key: stand_in(value, model, folder) for key, value in node.items() if key != "stop_token_ids"}
    if "model" in changed and not changed["model"].startswith("@"):
        changed["model"] = str(model)
    if "path" in changed and not changed["path"].startswith("@"):
        name, rows = changed["path"], folder / "rows"
        record = HUB[changed["format"]] if name == "hub" else FILES[name]
        rows.mkdir(exist_ok=True)
        changed["path"] = str(
            write_rows(rows / f"{(changed.get('format') or name).replace('/', '-')}.jsonl", [record] * 8)
        )
    if "max_completion_tokens" in changed:
        changed["max_completion_tokens"] = 8
    if "max_tokens" in changed:
        changed["max_tokens"] = 128
    if "dtype" in changed:
        changed["dtype"] = "float32"
    if "device" in changed:
        changed["device"] = "cpu"
    if "samples" in changed:
        changed["samples"] = 2
    return changed


@pytest.mark.parametrize("name", SINGLE)
def test_a_recipe_runs_in_miniature(name: str, model: Path, tmp_path: Path) -> None:
    tree = stand_in(tomllib.loads((RECIPES / name).read_text(encoding="utf-8")), model, tmp_path)
    config = smoke_config(RunConfig.model_validate(tree | {"output_dir": str(tmp_path / "run")}))
    method = SINGLE[name]
    result = METHODS[method](config, quiet=True)
    if method == "generate":
        assert result.metrics["samples"] == 8 * config.sampling.group_size
        return
    rows = metrics(result.folder)
    assert [row["step"] for row in rows] == [0, 1, 2]
    [task] = config.evaluation.tasks
    decoding = "t1" if task.temperatures == (1.0,) else "greedy"
    assert f"eval/{task.name}/{decoding}" in rows[-1]
    assert result.student is not None
    assert (result.student / "adapter_config.json").exists() == (config.student.lora is not None)


def test_the_assistant_plan_runs_in_miniature(model: Path, tmp_path: Path) -> None:
    tree = stand_in(tomllib.loads((RECIPES / "assistant/plan.toml").read_text(encoding="utf-8")), model, tmp_path)
    path = write_toml(tmp_path / "plan.toml", tree | {"output_dir": str(tmp_path / "run")})
    plan = PipelineConfig.from_toml(path).in_miniature(smoke_config)
    result = pipeline(plan, quiet=True)
    assert [record.name for record in result.phases] == ["answers", "documents", "behaviour"]
    final = result.phases[-1].final
    assert {"eval/ifeval/greedy", "eval/knowledge/greedy", "eval/ifeval/greedy_prompt_loose"} <= final.keys()


def test_adapters_of_the_recipes_differ_in_rank_alone() -> None:
    one, other = (
        tomllib.loads((RECIPES / f"maths/lora-{rank}.toml").read_text(encoding="utf-8")) for rank in (32, 128)
    )
    assert (one["student"].pop("lora"), other["student"].pop("lora")) == ({"rank": 32}, {"rank": 128})
    assert {**one, "output_dir": ""} == {**other, "output_dir": ""}


@pytest.mark.skipif(DATA is None or not Path(DATA).is_dir(), reason="UNDERSTUDY_DATA names no folder of data sets")
@pytest.mark.parametrize("method", ["sft", "rl", "distill"])
def test_methods_on_grade_school_problems(method: str, model: Path, tmp_path: Path) -> None:
    """Plumbing: real rows, a model of random weights."""
    assert DATA is not None
    rows: dict[str, Any] = {"path": f"{DATA}/gsm8k/train.jsonl", "limit": 64, "over_long": "skip"}
    if method == "sft":
        rows["columns"] = {"prompt": "question", "completion": "answer"}
    else:
        rows["format"] = "gsm8k"
    task = {"name": "gsm8k", "path": f"{DATA}/gsm8k/test.jsonl", "format": "gsm8k", "grader": "math"}
    tree = {
        "output_dir": str(tmp_path / "run"),
        "student": {"model": str(model)},
        "teacher": {"model": str(save_model(tmp_path / "teacher", bpe_tokenizer(chat=True), seed=1, context=512))},
        "prompts": rows,
        "reward": {"grader": "math"},
        "evaluation": {"tasks": [task | {"temperatures": [1.0], "samples": 2, "over_long": "skip"}]},
    }
    config = smoke_config(RunConfig.model_validate(tree))
    final = metrics(METHODS[method](config, quiet=True).folder)[-1]
    assert final["step"] == 2
    assert 0 <= final["eval/gsm8k/t1"] <= final["eval/gsm8k/t1_pass@2"] <= 1
    assert final["optim/grad_norm"] > 0 or method == "rl"  # a random model earns nothing

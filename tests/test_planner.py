"""Predicted costs: the article's table, numbers worked out by hand, a run's own ledger, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

import understudy
from understudy import ConfigError, RunConfig, flops
from understudy.config_plan import GPUS, PlanConfig, ShapeConfig, load_plan
from understudy.flops import KNOWN_SHAPES, ModelShape, Update
from understudy.planner import Prediction, gpus_for, predict
from user import run_cli, save_model, tree, word_tokenizer, write_rows, write_toml

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"hidden": 8, "layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 4, "intermediate": 16, "vocab": 50}
OPD = {
    "kind": "distill",
    "steps": 10,
    "prompts_per_step": 4,
    "group_size": 2,
    "prompt_tokens": 5,
    "completion_tokens": 20,
}


def plan_of(**sections: Any) -> PlanConfig:
    base = {"student": {"shape": SHAPE}, "teacher": {"shape": SHAPE | {"layers": 6}}, "methods": {"opd": OPD}}
    return PlanConfig.model_validate(base | sections)


def roles(prediction: Prediction, name: str) -> dict[str, tuple[float, float | None]]:
    return {role: (cost.flops, cost.exact_flops) for role, cost in prediction.methods[name].roles.items()}


# The article


def test_the_articles_table() -> None:
    plan = load_plan(ROOT / "recipes" / "article-costs" / "plan.toml")
    prediction = predict(plan)
    published = {
        "sft-400k": (8.5e20, 3.8e20),
        "sft-2m": (3.4e21, 1.5e21),
        "on-policy-distillation": (8.4e19, 8.2e19),
    }
    assert set(prediction.methods) == set(published)
    for name, (teacher, student) in published.items():
        method = prediction.methods[name]
        assert method.of_student() == pytest.approx(student, rel=0.01)
        assert method.flops - method.of_student() == pytest.approx(teacher, rel=0.01)
        assert method.exact_flops is None  # nothing but the numbers of weights is known
    ratios = prediction.ratios("sft-2m")["on-policy-distillation"]
    assert ratios["completions exist"] == pytest.approx(1.5e21 / (8.4e19 + 8.2e19), rel=0.01)  # "9x"
    assert ratios["teacher free"] == pytest.approx(1.5e21 / 8.2e19, rel=0.01)  # "18x", said of GPU hours
    assert ratios["all in"] == pytest.approx((1.5e21 + 3.4e21) / (8.4e19 + 8.2e19), rel=0.01)  # "30x"
    assert [round(ratio) for ratio in ratios.values()] == [9, 18, 30]
    # 8N for a token that is sampled and trained on, 2N for one that is scored.
    tokens = 150 * 512 * 4 * 4170
    opd = prediction.methods["on-policy-distillation"]
    assert opd.of_student() == 8 * 8e9 * tokens
    assert opd.roles["teacher_scoring"].flops == pytest.approx(2 * 32.8e9 * tokens)
    # What does not follow: one length for both would make the teacher 1.37 times as expensive, not 2.24.
    sft = prediction.methods["sft-400k"]
    assert sft.roles["teacher_sampling"].tokens / sft.roles["student_training"].tokens == pytest.approx(1.65, abs=0.01)
    follows = (2 * 32.8e9) / (6 * 8e9)
    assert (round(follows, 2), round(8.5e20 / 3.8e20, 2)) == (1.37, 2.24)
    assert prediction.methods["sft-2m"].flops == pytest.approx(4 * sft.flops)


@pytest.mark.parametrize("page", ["docs/costs.md", "recipes/article-costs/README.md"])
def test_pages_show_what_commands_print(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    if plan := re.search(r"^```toml\n(# plan.toml\n.*?)^```$", text, re.MULTILINE | re.DOTALL):
        (tmp_path / "plan.toml").write_text(plan[1], encoding="utf-8")
    monkeypatch.chdir(tmp_path if plan else ROOT)
    shown = re.findall(r"^\$ understudy (cost .*)\n```\n\n```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert shown
    for command, output in shown:
        assert run_cli(monkeypatch, *command.split()) == 0
        assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == output.splitlines()


# By hand


def test_roles_by_hand() -> None:
    prediction = predict(plan_of(methods={"opd": OPD, "rl": OPD | {"kind": "rl"}, "sft": OPD | {"kind": "sft"}}))
    student, teacher = ModelShape(**SHAPE), ModelShape(**SHAPE | {"layers": 6})
    tokens, groups, lengths = 10 * 4 * 2 * 25, 40, [20, 20]
    written = flops.sampling(student, 5, lengths).total * groups
    # Behind a shared prompt 45 tokens go through the model, of 50: just enough to share it.
    trained = flops.training(student, 5, lengths, Update()).total * groups
    sampled = (2 * student.active_weights * tokens, written)
    updated = (6 * student.active_weights * tokens, trained)
    assert roles(prediction, "opd") == {
        "student_sampling": sampled,
        "teacher_scoring": (2 * teacher.active_weights * tokens, flops.scoring(teacher, 5, lengths).total * groups),
        "student_training": updated,
    }
    assert roles(prediction, "rl") == {"student_sampling": sampled, "student_training": updated}
    assert roles(prediction, "sft") == {
        "teacher_sampling": (2 * teacher.active_weights * tokens, flops.sampling(teacher, 5, lengths).total * groups),
        "student_training": updated,
    }
    assert all(cost.tokens == tokens for method in prediction.methods.values() for cost in method.roles.values())


def test_options_of_methods() -> None:
    methods = {
        "plain": OPD,
        "full": OPD | {"estimator": "full"},
        "topk": OPD | {"estimator": "topk"},
        "short": OPD | {"prompt_tokens": 1},
        "rows": OPD | {"kind": "sft", "teacher_completion_tokens": 0},
        "picked": OPD | {"kind": "sft", "teacher_completion_tokens": 60},
    }
    prediction = predict(plan_of(methods=methods))
    plain = roles(prediction, "plain")
    head = 2 * 8 * 50 * 10 * 4 * 2 * 20  # of the teacher, at every completion token
    assert roles(prediction, "full")["student_training"][1] == plain["student_training"][1] + head  # type: ignore[operator]
    assert roles(prediction, "topk")["teacher_scoring"][1] == plain["teacher_scoring"][1] + head  # type: ignore[operator]
    student = ModelShape(**SHAPE)
    apart = flops.training(student, 1, [20, 20], Update(), shared=False).total * 40
    assert roles(prediction, "short")["student_training"][1] == apart  # too little to share
    assert list(roles(prediction, "rows")) == ["student_training"]
    assert prediction.methods["picked"].roles["teacher_sampling"].tokens == 80 * 65
    assert prediction.methods["picked"].roles["student_training"].tokens == 80 * 25


def test_hours_and_money() -> None:
    hardware = {"gpu": "mine", "tflops": 2.0, "memory_gb": 1.0, "count": 4, "price": 3.0}
    use = {"sampling": 0.1, "scoring": 0.5, "training": 0.25}
    plan = plan_of(
        student={"parameters": 1e9},
        teacher={"parameters": 2e9},
        methods={"opd": OPD},
        hardware=hardware | {"utilisation": use},
    )
    opd = predict(plan).methods["opd"]
    tokens = 2000
    by_hand = {
        "student_sampling": 2e9 * tokens / (2e12 * 0.1) / 3600,
        "teacher_scoring": 4e9 * tokens / (2e12 * 0.5) / 3600,
        "student_training": 6e9 * tokens / (2e12 * 0.25) / 3600,
    }
    assert {role: cost.gpu_hours for role, cost in opd.roles.items()} == pytest.approx(by_hand)
    assert opd.gpu_hours == pytest.approx(sum(by_hand.values()))
    assert opd.money == pytest.approx(3 * opd.gpu_hours)
    assert predict(plan_of()).methods["opd"].money is None
    # With a shape it is the exact count that takes time.
    exact = predict(plan_of(hardware=hardware | {"utilisation": use})).methods["opd"].roles["teacher_scoring"]
    assert exact.gpu_hours == pytest.approx((exact.exact_flops or 0) / (2e12 * 0.5) / 3600)


def test_memory_by_hand() -> None:
    shape = ModelShape(**SHAPE)
    weights, teacher = shape.parameters, ModelShape(**SHAPE | {"layers": 6}).parameters
    hardware = {"gpu": "mine", "tflops": 1.0, "memory_gb": 1e-6, "rows_at_once": 3, "micro_batch_tokens": 60}
    numbers = 4 * 8 + 2 * 8 + 2 * 4 + 4 * 16  # a token leaves these in a layer
    plan = plan_of(hardware=hardware)
    memory = predict(plan).memory
    assert list(memory) == ["student_sampling", "teacher_scoring", "student_training"]
    assert memory["student_sampling"].weights == 2 * weights
    assert memory["student_sampling"].cache == 2 * 3 * (2 * 3 * 4 * 25)
    assert memory["teacher_scoring"].weights == 2 * teacher
    assert memory["teacher_scoring"].activations == 2 * 60 * numbers
    training = memory["student_training"]
    assert (training.weights, training.gradients, training.optimizer) == (4 * weights, 4 * weights, 8 * weights)
    assert training.activations == 2 * 60 * 3 * numbers
    assert training.total == 16 * weights + 360 * numbers
    assert gpus_for(training, plan) == -(-(16 * weights + 360 * numbers) // 1000)

    lora = {"shape": SHAPE, "lora": {"rank": 2}, "gradient_checkpointing": True}
    adapted = predict(plan_of(student=lora, hardware=hardware)).memory["student_training"]
    adapters = flops.adapter_weights(shape, Update(rank=2))
    assert adapters == 3 * 2 * ((8 + 8) + 2 * (8 + 4) + (8 + 8) + 3 * (8 + 16))
    assert adapted.weights == 2 * weights + 4 * adapters
    assert (adapted.gradients, adapted.optimizer) == (4 * adapters, 8 * adapters)
    assert adapted.activations == 2 * 60 * (3 * 8 + numbers)
    unknown = predict(plan_of(student={"parameters": 7.0}, methods={"rl": OPD | {"kind": "rl"}})).memory
    assert (unknown["student_sampling"].cache, unknown["student_training"].activations) == (None, None)


def test_adapters_train_little_and_pass_much_on() -> None:
    lora = {"shape": SHAPE, "lora": {"rank": 2}}
    adapted = predict(plan_of(student=lora))
    shape, adapters = ModelShape(**SHAPE), flops.adapter_weights(ModelShape(**SHAPE), Update(rank=2))
    training = adapted.methods["opd"].roles["student_training"]
    assert training.flops == (4 * (shape.active_weights + adapters) + 2 * adapters) * 2000
    assert training.exact_flops == flops.training(shape, 5, [20, 20], Update(rank=2)).total * 40
    experts = SHAPE | {"dense_layers": 0, "experts": 4, "active_experts": 2, "expert_intermediate": 6}
    assert "adapters on experts" in predict(plan_of(student={"shape": experts, "lora": {}})).warnings[0]


def test_gpus_and_shapes() -> None:
    assert GPUS["H100"] == (989.4, 80.0)
    page = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8")
    assert all(f"| {name} | {tflops:,g} | {memory:g} |" in page for name, (tflops, memory) in GPUS.items())
    assert [field.name for field in fields(ModelShape)] == list(ShapeConfig.model_fields)
    plan = plan_of(student={"model": "Qwen/Qwen3-8B-Base"}, teacher={"model": "Qwen/Qwen3-32B"})
    prediction = predict(plan)
    assert prediction.student.parameters == pytest.approx(8.19e9, rel=1e-3)
    assert prediction.teacher is not None
    assert prediction.teacher.parameters == pytest.approx(32.8e9, rel=2e-3)
    assert prediction.teacher.shape == KNOWN_SHAPES["Qwen/Qwen3-32B"]


# Runs


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Student, teacher, and rows whose prompts are four tokens long."""
    tokenizer = word_tokenizer()
    rows = [{"prompt": f"w{i} w{i + 1} w{i + 2} w{i + 3}", "answer": "w1"} for i in range(1, 9)]
    return (
        save_model(tmp_path / "student", tokenizer),
        save_model(tmp_path / "teacher", tokenizer, seed=1, hidden=32),
        write_rows(tmp_path / "rows.jsonl", rows),
    )


def test_a_run_is_predicted_to_the_flop(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    sections = {"objective": {"estimator": "sampled"}, "sampling": {"stop_token_ids": [59]}}  # a word it does not use
    content = tree(*models, tmp_path / "run", **sections)
    folder = understudy.distill(RunConfig.from_tree(content, "run"), quiet=True).folder
    spent = json.loads((folder / "costs.json").read_text(encoding="utf-8"))["roles"]
    assert spent["student_sampling"]["tokens"] == 2 * 4 * (4 + 6)  # none ended early
    plan = load_plan(write_toml(tmp_path / "run.toml", content))
    assert plan.methods["distill"].prompt_tokens == 4
    assert plan.assumptions[0].endswith(
        "rows.jsonl (8 rows), by the student's tokenizer, without what a chat template adds"
    )
    predicted = predict(plan).methods["distill"].roles
    assert list(predicted) == ["student_sampling", "teacher_scoring", "student_training"]
    for role, cost in predicted.items():
        assert (cost.tokens, cost.flops, cost.exact_flops) == tuple(
            spent[role][name] for name in ("tokens", "flops", "exact_flops")
        )


def test_runs_of_other_kinds(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    student, teacher, rows = models
    both = load_plan(write_toml(tmp_path / "a.toml", tree(student, teacher, rows, tmp_path / "a")))
    assert {name: method.kind for name, method in both.methods.items()} == {
        "distill": "distill",
        "rl": "rl",
        "sft": "sft",
    }
    assert both.methods["distill"].estimator == "full"  # what auto becomes in process
    assert {method.sequences for method in both.methods.values()} == {8}
    assert any("the cap: an upper bound" in line for line in both.assumptions)
    rl = load_plan(write_toml(tmp_path / "b.toml", tree(student, None, rows, tmp_path / "b", reward={"grader": "x"})))
    assert list(rl.methods) == ["rl"]
    pairs = [{"prompt": "w1 w2", "completion": "w3 w4 w5"}, {"prompt": "w1 w2 w3 w4", "completion": "w5"}]
    sft = load_plan(
        write_toml(tmp_path / "c.toml", tree(student, None, write_rows(tmp_path / "p.jsonl", pairs), tmp_path / "c"))
    )
    [method] = sft.methods.values()
    assert (method.kind, method.prompt_tokens, method.completion_tokens) == ("sft", 3, 2)
    assert (method.prompts_per_step, method.group_size) == (4, 1)
    assert list(predict(sft).methods["sft"].roles) == ["student_training"]


def test_lengths_and_hardware_from_the_command_line(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    content = tree(*models, tmp_path / "run")
    content["student"] |= {"lora": {"rank": 4}, "gradient_checkpointing": True}
    overrides = {"hardware.gpu": "A100", "hardware.price": "1.5", "student.lora.rank": "2", "prompts.path": "gone"}
    plan = load_plan(write_toml(tmp_path / "run.toml", content), overrides, prompt_tokens=7, completion_tokens=3)
    assert {(m.prompt_tokens, m.completion_tokens) for m in plan.methods.values()} == {(7, 3)}
    assert (plan.hardware.gpu, plan.hardware.price, plan.hardware.rows_at_once) == ("A100", 1.5, 256)
    assert plan.student.lora is not None
    assert (plan.student.lora.rank, plan.student.gradient_checkpointing) == (2, True)
    assert plan.assumptions == ("evaluations are left out",)
    stated = load_plan(tmp_path / "run.toml", {"prompts.path": "gone"})
    assert stated.methods["rl"].prompt_tokens == 200
    assert stated.assumptions[0].startswith("prompts of 200 tokens, because gone is no file here")
    other = {"student": {"shape": SHAPE}, "methods": {"a": OPD | {"kind": "rl"}}}
    longer = load_plan(write_toml(tmp_path / "plan.toml", other), {"hardware.gpu": "B200"}, completion_tokens=99)
    assert (longer.methods["a"].prompt_tokens, longer.methods["a"].completion_tokens) == (5, 99)
    assert longer.hardware.gpu == "B200"


def test_characters_stand_for_tokens_without_a_tokenizer(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "x" * 400}]}] * 2)
    content = tree(Path("Qwen/Qwen3-0.6B"), Path("Qwen/Qwen3-8B"), rows, tmp_path / "run")
    plan = load_plan(write_toml(tmp_path / "run.toml", content))
    assert plan.methods["distill"].prompt_tokens == 100
    assert "at 4 characters a token" in plan.assumptions[0]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/run.toml")), ids=lambda path: path.parent.name)
def test_recipes_can_be_priced(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    run = RunConfig.from_toml(path)
    named = {"student": run.student} | ({"teacher": run.teacher} if run.teacher else {})
    unknown = [role for role, model in named.items() if model.model not in KNOWN_SHAPES]  # folders that are yet to be
    own = [part for role in unknown for part in (f"--{role}.model", "Qwen/Qwen3-8B")]
    assert run_cli(monkeypatch, "cost", path, *own, "--completion-tokens", 300, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["methods"]
    assert all(method["exact_flops"] > 0 and method["gpu_hours"] > 0 for method in content["methods"].values())


# The page and what is refused


def test_pages_name_every_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {"opd": OPD, "sft": OPD | {"kind": "sft"}}
    student, teacher = {"model": "Qwen/Qwen3-8B"}, {"parameters": 32.8e9}
    content = {"student": student, "teacher": teacher, "methods": methods, "baseline": "sft", "assumptions": ["so"]}
    path = write_toml(tmp_path / "plan.toml", content)
    assert run_cli(monkeypatch, "cost", path, "--hardware.price", 2, "--hardware.count", 8) == 0
    shown = capsys.readouterr().out
    prediction = predict(load_plan(path))
    training = prediction.methods["opd"].roles["student_training"]
    for number in (training.flops, training.exact_flops):
        assert f"{number:.2e}".replace("e+", "e") in shown
    assert "8.19B weights, 7.57B of them multiplied with each token" in shown
    assert f"{prediction.ratios('sft')['opd']['all in']:.1f}×" in shown
    assert shown.rstrip().endswith("Assumed:\n- so")
    assert "money" in shown
    assert run_cli(monkeypatch, "cost", path, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["methods"]["opd"]["roles"]["student_training"]["exact_flops"] == training.exact_flops
    assert content["memory_bytes"]["student_training"]["optimizer"] == 8 * prediction.student.parameters
    assert content["methods"]["opd"]["exact_flops"] is None  # the teacher's is not known


def test_architectures_without_a_shape_fall_back_and_say_so(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    extra = {"num_key_value_heads": 1, "vocab_size": 50, "layer_types": ["conv", "full_attention"]}
    config = CONFIG_MAPPING["lfm2"](**sizes, **extra, block_auto_adjust_ff_dim=False)
    config.save_pretrained(tmp_path / "hybrid")
    prediction = predict(plan_of(student={"model": str(tmp_path / "hybrid")}, methods={"rl": OPD | {"kind": "rl"}}))
    assert prediction.student.shape is None
    assert "(lfm2): its products are not known" in prediction.warnings[0]
    role = prediction.methods["rl"].roles["student_sampling"]
    assert (role.flops, role.exact_flops) == (2 * prediction.student.active * 2000, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": {"opd": OPD | {"stepz": 3}}}, "did you mean methods.<name>.steps"),
        ({"hardwear": {"gpu": "H100"}}, "did you mean hardware"),
        ({"student": {"shape": SHAPE | {"hiden": 3}}}, "did you mean student.shape.hidden"),
        ({"student": {"parameters": 8e9, "model": "Qwen/Qwen3-8B"}}, "one of model, shape and parameters"),
        ({"student": {}}, "got none"),
        ({"hardware": {"gpu": "H1000"}}, "needs tflops and memory_gb; known are A100"),
        ({"teacher": None}, "methods.opd needs a [teacher]"),
        ({"baseline": "sft"}, "baseline 'sft' is no method; there are opd"),
        ({"methods": {"opd": OPD | {"kind": "distil"}}}, 'did you mean "distill"?'),
        ({"methods": {}}, "at least 1 item"),
        ({"phases": []}, "a pipeline of several phases"),
        ({"hardware": {"utilisation": {"sampling": 1.5}}}, "less than or equal to 1"),
        ({"methods": [OPD]}, "plan.toml: methods"),
        ({"methods": {"sft": 3}}, "plan.toml: methods.sft"),
    ],
)
def test_bad_plans_are_refused(
    change: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    content = {"student": {"shape": SHAPE}, "teacher": {"shape": SHAPE}, "methods": {"opd": OPD}} | change
    path = write_toml(tmp_path / "plan.toml", {name: value for name, value in content.items() if value is not None})
    for lengths in ([], ["--prompt-tokens", 7, "--completion-tokens", 3]):
        assert run_cli(monkeypatch, "cost", path, *lengths) == 2
        message = capsys.readouterr().err
        assert said in message
        assert message.count("remedy:") == 1


def test_a_model_out_of_reach_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import AutoConfig

    def unreachable(name: str, **options: bool) -> None:
        raise OSError(f"cannot connect for {name}\nand more")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ConfigError) as raised:
        predict(plan_of(teacher={"model": "someone/else"}))
    assert raised.value.where == "teacher model someone/else"
    assert raised.value.got == "cannot connect for someone/else"
    assert "--teacher.model Qwen/Qwen3-8B" in raised.value.remedy
    assert "[teacher.shape]" in raised.value.remedy


def test_bad_arguments_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = write_toml(tmp_path / "plan.toml", {"student": {"shape": SHAPE}, "methods": {"a": OPD | {"kind": "rl"}}})
    assert run_cli(monkeypatch, "cost", path, "--prompt-tokens", 0) == 2
    assert run_cli(monkeypatch, "cost", path, "--hardware.gpus", 3) == 2
    assert "did you mean hardware.gpu" in capsys.readouterr().err
    assert run_cli(monkeypatch, "cost", tmp_path / "none.toml") == 2


def test_hardware_of_a_run_is_a_table(
    models: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = write_toml(tmp_path / "run.toml", tree(*models, tmp_path / "run"))
    assert run_cli(monkeypatch, "cost", path, "--hardware", "H200") == 2
    assert "run.toml: hardware\n" in capsys.readouterr().err

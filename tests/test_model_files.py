"""Folders of models: formats that are programs, code that comes along, files that are broken."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from understudy import ConfigError, RunConfig
from understudy.backends.loading import load_model, load_student, meta_shape
from understudy.config import LoraConfig, StudentConfig
from understudy.model_files import adapter_base, check_sizes, check_weights
from understudy.preflight import check_run
from understudy.tokenization import load_text
from user import run_cli, save_model, tree, word_tokenizer, write_rows, write_toml

CPU = torch.device("cpu")


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "m", word_tokenizer())


def pickled(folder: Path, mark: Path, name: str = "pytorch_model.bin") -> None:
    """The weights as a pickle that would leave a mark, in place of safetensors."""
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(mark)))


# Formats


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_and_not_read(name: str, folder: Path, tmp_path: Path) -> None:
    pickled(folder, tmp_path / "mark", name)
    with pytest.raises(ConfigError) as refused:
        load_model(str(folder), role="teacher", dtype=torch.float32, device=CPU)
    assert refused.value.where == f"teacher model {folder}"
    assert refused.value.got == f"weights in {name}: a pickle, which can run code when it is read"
    assert "safetensors" in refused.value.expected
    assert "use_safetensors=False" in refused.value.remedy
    assert not (tmp_path / "mark").exists()


def test_a_pickle_by_the_name_of_safetensors(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    with pytest.raises(ConfigError, match=r"student model[\s\S]*remedy"):
        load_student(StudentConfig(model=str(folder), device="cpu"))
    assert not (tmp_path / "mark").exists()


def test_weights_of_torch_are_not_read_either(folder: Path) -> None:
    """Even where torch could read them without running anything: one format, one rule."""
    model = load_model(str(folder), role="student", dtype=torch.float32, device=CPU)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model.bin: a pickle"):
        load_model(str(folder), role="student", dtype=torch.float32, device=CPU)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_too(folder: Path, tmp_path: Path) -> None:
    adapted = load_student(StudentConfig(model=str(folder), device="cpu", lora=LoraConfig(rank=2)))
    adapted.model.save_pretrained(tmp_path / "adapters")
    (tmp_path / "adapters" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapters" / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    with pytest.raises(ConfigError, match=r"adapter_model.bin: a pickle"):
        load_model(str(tmp_path / "adapters"), role="student", dtype=torch.float32, device=CPU)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("role", ["student", "teacher", "reference"])
def test_a_run_is_refused_before_anything_is_read(
    role: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    pickled(bad, tmp_path / "mark")
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1"}])
    content = tree(folder, folder, rows, tmp_path / "run", objective={"anchor_coef": 0.1})
    content["reference"] = {"model": str(folder)}
    content[role]["model"] = str(bad)
    assert run_cli(monkeypatch, "distill", write_toml(tmp_path / "run.toml", content)) == 2
    said = capsys.readouterr().err
    for part in (f"{role} model {bad}", "got: ", "a pickle, which can run code", "expected: ", "remedy: "):
        assert part in said
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "mark").exists()


def test_a_served_teacher_needs_no_weights(folder: Path, tmp_path: Path) -> None:
    """Its tokenizer alone is read here."""
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    (bad / "model.safetensors").unlink()
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1"}])
    content = tree(folder, bad, rows, tmp_path / "run", objective={"estimator": "sampled"})
    content["teacher"]["url"] = "http://127.0.0.1:9/v1"
    check_run(RunConfig.model_validate(content), "distill")


def test_a_hub_id_is_left_to_the_library() -> None:
    check_weights("somebody/some-model", "student")


# Code


MODEL_CODE = """
import os
os.makedirs(os.environ["MARK"], exist_ok=True)
from transformers import Qwen3Config, Qwen3ForCausalLM
class OwnConfig(Qwen3Config):
    model_type = "own_architecture"
class OwnModel(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of an architecture that only its own file knows; where that runs, it makes a folder."""
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own_architecture", "auto_map": names}))
    (folder / "own_code.py").write_text(MODEL_CODE)
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    # Where transformers copies such code to.
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return folder


def test_a_models_own_code_is_not_run(with_code: Path, tmp_path: Path) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: load_text(str(with_code), "student"),
        lambda: meta_shape(str(with_code), role="student"),
        lambda: load_model(str(with_code), role="student", dtype=torch.float32, device=CPU),
    ]
    for attempt in attempts:
        with pytest.raises(ConfigError) as refused:
            attempt()
        assert refused.value.where == f"student model {with_code}"
        assert refused.value.got == "a model that brings Python code of its own (auto_map), which was not run"
        assert refused.value.expected == "a model that transformers knows, or your word that this code may run"
        assert "student.trust_remote_code = true" in refused.value.remedy
    assert not (tmp_path / "mark").exists()


def test_a_run_of_such_a_model_is_refused(
    with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody is asked at the terminal either."""
    plain = save_model(tmp_path / "plain", word_tokenizer())
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1"}])
    for role in ("student", "teacher"):
        content = tree(plain, plain, rows, tmp_path / "run")
        content[role]["model"] = str(with_code)
        assert run_cli(monkeypatch, "distill", write_toml(tmp_path / "run.toml", content)) == 2
        captured = capsys.readouterr()
        assert f"{role}.trust_remote_code = true" in captured.err
        assert "[y/N]" not in captured.out + captured.err
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")
def test_code_runs_where_the_configuration_says_so(with_code: Path, tmp_path: Path) -> None:
    plain = save_model(tmp_path / "plain", word_tokenizer())
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1"}])
    content = tree(plain, with_code, rows, tmp_path / "run")
    content["teacher"]["trust_remote_code"] = True
    config = RunConfig.model_validate(content)
    checked = check_run(config, "distill")
    assert (tmp_path / "mark").exists()
    assert checked.teachers["default"].vocab_width == 61
    model = load_model(str(with_code), role="teacher", dtype=torch.float32, device=CPU, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert meta_shape(str(with_code), role="teacher", trust_remote_code=True) == meta_shape(str(plain), role="teacher")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("asked", ["text", "prompt"])
def test_score_runs_the_code_of_roles_that_are_trusted(
    asked: str, with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = save_model(tmp_path / "plain", word_tokenizer())
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1", "completion": "w2"}])
    page = tmp_path / "page.html"
    source = ["--text", rows] if asked == "text" else ["--prompt", "w1", "--samples", 1, "--max-completion-tokens", 2]
    base = ["score", *source, "--output", page]
    for role, models in (
        ("student", ["--student", with_code, "--teacher", plain]),
        ("teacher", ["--student", plain, "--teacher", with_code]),
    ):
        other = {"student": "teacher", "teacher": "student"}[role]
        for trusted in ([], ["--trust-remote-code", other]):
            assert run_cli(monkeypatch, *base, *models, *trusted) == 2
            assert f"score --trust-remote-code {role}" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "mark").exists()
        assert not page.exists()
    assert run_cli(monkeypatch, *base, *models, "--trust-remote-code", "teacher") == 0
    assert (tmp_path / "mark").exists()
    assert page.exists()


def test_nobody_is_trusted_by_default() -> None:
    config = RunConfig.model_validate(
        {
            "output_dir": "run",
            "student": {"model": "a"},
            "teacher": {"model": "b"},
            "teachers": {"c": {"model": "c"}},
            "reference": {"model": "d"},
        }
    )
    roles = [config.student, config.teacher, config.teachers["c"], config.reference]
    assert [role.trust_remote_code for role in roles if role] == [False] * 4


# Files


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("{", "Expecting property name"),
        ("[]", "a list"),
        ("", "Expecting value"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        ('{"base_model_name_or_path": null}', "base_model_name_or_path = None"),
        ('{"base_model_name_or_path": 3}', "base_model_name_or_path = 3"),
        ("{}", "base_model_name_or_path = None"),
    ],
)
def test_adapters_that_name_no_base(text: str, got: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigError) as refused:
        adapter_base(tmp_path)
    assert refused.value.got.startswith(got)
    assert "adapter" in refused.value.where


def test_adapters_on_themselves(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ConfigError, match="which are adapters too"):
        load_text(str(tmp_path), "student")


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 10**9}, {"text_config": {"n_layer": 20_000}}, {"num_layers": -5}]
)
def test_more_layers_than_anything_has(change: dict[str, Any], folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    check_sizes(folder, "student")
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=r"at most 10000 layers"):
        load_text(str(folder), "student")


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"vocab_size": "many"}, None),
        ({"eos_token_id": "<|im_end|>"}, None),
        ({"eos_token_id": [0, -1]}, "eos_token_id = [0, -1], where whole numbers belong"),
        ({"max_position_embeddings": 12.5}, None),
        ({"model_type": "no_such_type"}, None),
    ],
)
def test_values_of_another_kind(change: dict[str, Any], got: str | None, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError) as refused:
        load_text(str(folder), "student")
    assert refused.value.where.startswith(f"student model {folder}")
    assert got is None or refused.value.got == got


def test_a_tokenizer_that_fails_on_its_first_text(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "none"}))
    with pytest.raises(ConfigError, match="not supported between instances of 'int' and 'str'") as refused:
        load_text(str(folder), "student")
    assert refused.value.where.startswith(f"student model {folder}")

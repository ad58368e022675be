"""What the package may not do: read pickles, run code that a model brings, take weights from other files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import understudy

SOURCE = Path(understudy.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for name in ("benchmarks", "recipes") for path in (ROOT / name).rglob("*.py"))
# Requests of this process to its own helper: nobody else writes there.
MAY_UNPICKLE = {"tasks/bounded.py"}
# A class of transformers' own on a folder that the experiment itself wrote; its results hang on the file's hash.
OWN_FOLDERS = {"experiments/claims/c5_self_training.py"}
CONFIGS = {"AutoConfig", "AutoTokenizer"}
MODELS = {"AutoModelForCausalLM", "AutoModel"}


def named(path: Path) -> str:
    return path.relative_to(SOURCE if path.is_relative_to(SOURCE) else ROOT).as_posix()


def calls(path: Path) -> Iterator[tuple[str, dict[str, ast.expr], int]]:
    """(dotted name, keywords, line) of every call."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg or "**": keyword.value for keyword in node.keywords}
            yield ast.unparse(node.func), keywords, node.lineno


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=named)
def test_pickles_are_not_read(path: Path) -> None:
    for name, keywords, line in calls(path):
        where = f"{named(path)}:{line}"
        if name == "torch.load":
            assert is_true(keywords.get("weights_only")), where
        module, _, function = name.rpartition(".")
        if function in ("load", "loads", "Unpickler") and module.rpartition(".")[2] in (
            "pickle",
            "cloudpickle",
            "dill",
            "joblib",
        ):
            assert named(path) in MAY_UNPICKLE, where
        assert not is_true(keywords.get("allow_pickle")), where
        assert function not in ("read_pickle", "load_pickle"), where
        assert name not in ("shelve.open", "marshal.loads", "marshal.load", "eval", "exec"), where


@pytest.mark.parametrize("path", FILES, ids=named)
def test_models_are_loaded_without_their_code(path: Path) -> None:
    """Every call says whether code may run, by a value that comes from the configuration and is false by default."""
    for name, keywords, line in calls(path):
        where = f"{named(path)}:{line}"
        owner, _, function = name.rpartition(".")
        assert not is_true(keywords.get("trust_remote_code")), where
        if function not in ("from_pretrained", "from_config") or named(path) in OWN_FOLDERS:
            continue
        known = owner in CONFIGS | MODELS | {"GenerationConfig", "_peft().PeftModel", "peft.PeftModel"}
        assert known, f"{where}: say here what {name} may run"
        if owner in CONFIGS | MODELS:
            assert "trust_remote_code" in keywords, where
        if owner in MODELS and function == "from_pretrained":
            assert is_true(keywords.get("use_safetensors")), where


def test_the_scan_sees_calls(tmp_path: Path) -> None:
    """It would find what it looks for."""
    path = tmp_path / "m.py"
    path.write_text("import torch\ntorch.load('x', weights_only=False)\nAutoModel.from_pretrained('x')\n")
    assert [(name, sorted(keywords)) for name, keywords, _ in calls(path)] == [
        ("torch.load", ["weights_only"]),
        ("AutoModel.from_pretrained", []),
    ]
    assert len(FILES) > 100
    found = {name for path in FILES for name, _, _ in calls(path)}
    assert {"torch.load", "AutoModelForCausalLM.from_pretrained", "AutoTokenizer.from_pretrained"} <= found

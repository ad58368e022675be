"""Folders -> models: what is refused instead of being trained on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from understudy import ConfigError
from understudy.backends.loading import load_model, load_student, pick_device
from understudy.config import LoraConfig, StudentConfig
from user import save_model, word_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "m", word_tokenizer())


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    """transformers fills gaps with random numbers and a warning; a run must not start from those."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"teacher model[\s\S]*without model.layers.1.mlp.up_proj.weight"):
        load_model(str(folder), role="teacher", dtype=torch.float32, device=torch.device("cpu"))


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"student model[\s\S]*remedy"):
        load_student(StudentConfig(model=str(folder), device="cpu"))


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:99", ""):
        with pytest.raises(ConfigError, match="present on this machine"):
            pick_device(name)


def test_adapters_stay_below_the_head(folder: Path) -> None:
    config = StudentConfig(model=str(folder), device="cpu", lora=LoraConfig(target_modules=("lm_head",)))
    with pytest.raises(ConfigError, match=r"student.lora.target_modules"):
        load_student(config)


def test_adapters_that_fit_no_layer(folder: Path) -> None:
    config = StudentConfig(model=str(folder), device="cpu", lora=LoraConfig(target_modules=("query",)))
    with pytest.raises(ConfigError, match=r"student.lora.target_modules[\s\S]*query"):
        load_student(config)


def test_adapters_without_peft(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"understudy\[lora\]"):
        load_student(StudentConfig(model=str(folder), device="cpu", lora=LoraConfig()))

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from servers import VllmServer
from transformers import Qwen3Config, Qwen3ForCausalLM

from user import bpe_tokenizer, write_rows


def make_checkpoint(folder: Path, seed: int) -> Path:
    """A random Qwen3 in sizes that vLLM's kernels have, drawn wide: next-token distributions far from uniform."""
    tokenizer = bpe_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student, teacher and prompts."""
    folder = tmp_path_factory.mktemp("world")
    make_checkpoint(folder / "student", 0)
    make_checkpoint(folder / "teacher", 1)
    write_rows(folder / "rows.jsonl", [{"prompt": f"What is {i} plus {j}?"} for i in range(8) for j in range(8)])
    assert json.loads((folder / "student" / "config.json").read_text())["model_type"] == "qwen3"
    return folder


@pytest.fixture(scope="session")
def teacher(world: Path) -> Iterator[VllmServer]:
    with VllmServer(world / "teacher", "teacher", world / "teacher.log") as server:
        yield server


@pytest.fixture(scope="session")
def student(world: Path) -> Iterator[VllmServer]:
    """Takes whole weights."""
    with VllmServer(world / "student", "student", world / "student.log") as server:
        yield server


@pytest.fixture(scope="module")
def adapted(world: Path) -> Iterator[VllmServer]:
    """Takes adapters. It cannot be asked for a prompt's log-probabilities: on a CPU, 0.32 dies of that."""
    options = ("--enable-lora", "--max-lora-rank", "8")
    with VllmServer(world / "student", "student", world / "adapted.log", *options) as server:
        yield server

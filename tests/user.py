"""What a user has at hand: small model folders, rows, a TOML file, the command line. Shared by the tests."""

from __future__ import annotations

import importlib
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from understudy import RunConfig, cli

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "How many clips did Natalia sell altogether in April and May? The answer is 72.",
    "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting.",
)
WORDS = (END, *(f"w{i}" for i in range(60)))

ARCHITECTURES: Mapping[str, Any] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    # Windows shorter than the texts, so that the sliding layers do slide.
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
}


def bpe_tokenizer(*, chat: bool = False, chat_template: str = CHATML, end: str | None = None) -> Any:
    """A byte-level BPE of 300 tokens, trained on the spot; every text can be written in it."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = BpeTrainer(
        vocab_size=300, special_tokens=[END, START, STOP], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end or (STOP if chat else END))
    if chat:
        tokenizer.chat_template = chat_template
    return tokenizer


def word_tokenizer(words: Sequence[str] = WORDS) -> Any:
    """One id per word; the first ends a text."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=words[0])


def save_model(
    folder: Path,
    tokenizer: Any,
    *,
    architecture: str = "qwen3",
    seed: int = 0,
    width: int | None = None,
    context: int = 512,
    dtype: torch.dtype = torch.float32,
    hidden: int = 16,
    dropout: float = 0.0,
) -> Path:
    """A random model of two layers beside its tokenizer. ``width``: rows of the embedding, padding included."""
    config_type, model_type, extra = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = config_type(
        vocab_size=width or len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        attention_dropout=dropout,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        **extra,
    )
    model_type(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tree(student: Path, teacher: Path | None, rows: Path, out: Path, **sections: Any) -> dict[str, Any]:
    """A configuration of two tiny steps; ``sections`` are laid over it, one level deep."""
    base: dict[str, Any] = {
        "output_dir": str(out),
        "num_threads": 1,
        "student": {"model": str(student), "device": "cpu"},
        "prompts": {"path": str(rows)},
        "sampling": {"group_size": 2, "groups_per_batch": 2, "max_completion_tokens": 6},
        "supervised": {"batch_size": 4},
        "optim": {"learning_rate": 1e-3, "num_steps": 2},
        "rollouts": {"per_step": 2, "topk": 2},
    }
    if teacher is not None:
        base["teacher"] = {"model": str(teacher)}
    for name, value in sections.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
    return base


def write_toml(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(dict(content)), encoding="utf-8")
    return path


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of ``understudy ...``, run in this process."""
    monkeypatch.setattr(sys, "argv", ["understudy", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    assert isinstance(code, int)
    return code


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in row.items() if not name.startswith("time/") and name != "cost/seconds"}


def amounts(costs: Mapping[str, Any]) -> dict[str, Any]:
    return {role: (entry["tokens"], entry["flops"]) for role, entry in costs["roles"].items()}


def assert_same(one: Any, other: Any) -> None:
    """Equality of nested states, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


def assert_same_run(folder: Path, expected: Path, *, steps: int = 5) -> None:
    """Same weights, optimizer, metrics, rollouts and costs; and nothing half-written is left."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert names == {path.relative_to(expected).as_posix() for path in expected.rglob("*")}
    last = f"checkpoints/step_{steps:06d}"
    weights = [name for name in names if name.startswith(last) and name.endswith(".safetensors")]
    assert len(weights) == 1
    for name in [*weights, *(name for name in names if name.startswith("rollouts/"))]:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    states = [torch.load(f / last / "trainer_state.pt", weights_only=True) for f in (folder, expected)]
    assert_same(states[0]["trainer"], states[1]["trainer"])
    assert states[0]["step"] == steps
    assert amounts(states[0]["costs"]) == amounts(states[1]["costs"])
    assert [*map(without_times, metrics(folder))] == [*map(without_times, metrics(expected))]
    assert [row["step"] for row in metrics(folder)] == list(range(steps + 1))
    costs = [json.loads((f / "costs.json").read_text()) for f in (folder, expected)]
    assert amounts(costs[0]) == amounts(costs[1])
    configs = [RunConfig.from_toml(f / "config.toml", {"output_dir": "run"}) for f in (folder, expected)]
    assert configs[0] == configs[1]


def interrupt_in(monkeypatch: pytest.MonkeyPatch, name: str, *, at_call: int = 1, times: int = 1) -> None:
    """Ctrl-C while ``name`` is at work."""
    module, _, attribute = name.rpartition(".")
    original = getattr(importlib.import_module(module), attribute)
    calls = 0

    def function(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return original(*arguments, **keywords)

    monkeypatch.setattr(name, function)


def owner_of(name: str) -> Any:
    """A module, or an attribute of one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(parent), attribute)

"""Folders of models as disks, downloads and strangers leave them: loaded and used, or refused; nothing in them runs."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fuzzing import NUMBERS, TEXTS, broken_bytes, forms, fuzz, outcome
from hypothesis import strategies as st

from understudy.backends.loading import load_student, meta_shape
from understudy.backends.local import LocalSampler
from understudy.config import LoraConfig, SamplingConfig, StudentConfig
from understudy.rollouts import sample_rollouts
from understudy.tokenization import load_text, resolve_stop_ids
from understudy.types import Prompt
from user import bpe_tokenizer, save_model

USED = (".json", ".safetensors", ".jinja")
CONFIG_KEYS = (
    "model_type",
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "dtype",
    "rope_parameters",
    "layer_types",
    "tie_word_embeddings",
    "hidden_act",
    "auto_map",
    "quantization_config",
    "text_config",
    "sliding_window",
    "rms_norm_eps",
    "attention_dropout",
    "tokenizer_class",
    "added_tokens_decoder",
    "chat_template",
    "extra_special_tokens",
    "eos_token",
    "peft_type",
    "base_model_name_or_path",
    "r",
    "target_modules",
    "lora_alpha",
    "version",
    "model",
    "pre_tokenizer",
    "decoder",
    "added_tokens",
)
ODD = st.one_of(
    st.sampled_from(
        [*NUMBERS, *TEXTS, None, True, [], {}, [[]], "llama", "qwen3", "gpt2", "bert", "PreTrainedTokenizer"]
    ),
    st.sampled_from(
        [{"AutoConfig": "evil.Config"}, {"rope_type": "yarn"}, ["full_attention"], [1, "a"], {"0": {}}, 64, 7]
    ),
    st.integers(-3, 400),
    st.text(max_size=10),
)


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and adapters on it."""
    folder = tmp_path_factory.mktemp("good")
    save_model(folder / "model", bpe_tokenizer(chat=True))
    lora = LoraConfig(rank=2)
    adapted = load_student(StudentConfig(model=str(folder / "model"), device="cpu", lora=lora))
    adapted.model.save_pretrained(folder / "adapters")
    return folder


def use(folder: Path) -> None:
    """What a run does with a model: texts, sizes, weights, a completion."""
    text = load_text(str(folder), "student")
    stop_ids = resolve_stop_ids(text, {}, None)
    ids = text.encode("How many?")
    meta_shape(str(folder), role="teacher")
    model = load_student(StudentConfig(model=str(folder), device="cpu"), vocab_size=text.vocab_width)
    prompt = Prompt(0, [token for token in ids if token < text.vocab_width] or [0], "How many?")
    sampling = SamplingConfig(group_size=2, max_completion_tokens=3)
    [group] = sample_rollouts(LocalSampler(model, stop_ids=stop_ids), [prompt], sampling, seed=0)
    text.tokens(group[0].completion_ids)


@st.composite
def damage(draw: st.DrawFn, contents: dict[str, bytes]) -> dict[str, bytes | None]:
    """New contents of some files; None: the file is not there."""
    changes: dict[str, bytes | None] = {}
    for name in draw(st.lists(st.sampled_from(sorted(contents)), min_size=1, max_size=2, unique=True)):
        data = contents[name]
        of_format = {
            ".json": lambda data=data: changed_json(draw, json.loads(data)),
            ".jsonl": lambda data=data: changed_line(draw, data),
            ".safetensors": lambda data=data: changed_tensors(draw, data),
        }.get(Path(name).suffix)
        kinds = ["gone", "empty", "pickle", *["bytes"] * 3, *(["format"] * 5 if of_format else [])]
        kind = draw(st.sampled_from(kinds))
        if of_format and kind == "format":
            changes[name] = of_format()
        elif kind == "bytes":
            changes[name] = draw(broken_bytes(st.just(data)))
        else:
            changes[name] = {"gone": None, "empty": b"", "pickle": b"PICKLE"}[kind]
    return changes


def changed_line(draw: st.DrawFn, data: bytes) -> bytes:
    """JSON lines: one of them with other values."""
    lines = data.splitlines(keepends=True)
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = changed_json(draw, json.loads(lines[at])) + b"\n"
    return b"".join(lines)


def changed_tensors(draw: st.DrawFn, data: bytes) -> bytes:
    """safetensors: another header, other numbers, or none."""
    kind = draw(st.sampled_from(["header", "header", "body", "nan"]))
    if kind == "header":
        return changed_header(draw, data)
    return flipped_body(draw, data) if kind == "body" else data[:-400] + b"\xff" * 400


def changed_json(draw: st.DrawFn, content: Any) -> bytes:
    """A few keys and places in lists, nested ones among them, with other values or none."""
    for _ in range(draw(st.integers(1, 3))):
        change_node(draw, content, ODD, CONFIG_KEYS)
    return json.dumps(content).encode()


def change_node(draw: st.DrawFn, node: Any, values: st.SearchStrategy[Any], keys: Sequence[str]) -> None:
    """Somewhere in ``node``: another value, or nothing where one was, or one of ``keys`` where none was."""
    while isinstance(node, dict | list) and node:
        names = [*node, *keys] if isinstance(node, dict) else range(len(node))
        key = draw(st.sampled_from(names))
        child = node.get(key) if isinstance(node, dict) else node[key]
        if isinstance(child, dict | list) and child and draw(st.integers(0, 2)):
            node = child
        elif child is not None and draw(st.integers(0, 2)) == 0:
            del node[key]
            return
        else:
            node[key] = copy.deepcopy(draw(values))  # the next change may be inside it
            return


def changed_header(draw: st.DrawFn, data: bytes) -> bytes:
    """safetensors: eight bytes of length, a JSON header, the numbers."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "drop", "length", "metadata"]))
    if field == "name":
        header[draw(st.sampled_from(["x", "model.embed_tokens.weight", ""]))] = header.pop(name)
    elif field == "drop":
        del header[name]
    elif field == "metadata":
        header["__metadata__"] = draw(st.sampled_from([{}, {"format": "tf"}, {"format": "np"}, 3, None]))
    elif field != "length":
        header[name][field] = draw(
            st.one_of(
                ODD,
                st.sampled_from(["F16", "I64", "BF16", "F8_E4M3", "BOOL", [1], [0, 4], [300, 16], [16, 300], [4, 0]]),
            )
        )
    text = json.dumps(header).encode()
    size = len(text) if field != "length" else draw(st.sampled_from([0, 1, length - 1, length + 1, 2**40, 2**63]))
    return struct.pack("<Q", size) + text + body


def flipped_body(draw: st.DrawFn, data: bytes) -> bytes:
    start = 8 + struct.unpack("<Q", data[:8])[0]
    changed = bytearray(data)
    for place in draw(st.lists(st.integers(start, len(data) - 1), min_size=1, max_size=40)):
        changed[place] ^= draw(st.integers(1, 255))
    return bytes(changed)


def damaged(source: Path, folder: Path, changes: dict[str, bytes | None], mark: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(source, folder)
    for name, data in changes.items():
        if data is None:
            (folder / name).unlink()
        elif data == b"PICKLE":
            (folder / name).write_bytes(pickle.dumps(Trap(mark)))
        else:
            (folder / name).write_bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["model", "adapters"])
@forms(30, 1_000)
def test_folders(cases: int, long: bool, kind: str, good: Path, tmp_path: Path) -> None:
    source = good / kind
    contents = {path.name: path.read_bytes() for path in source.iterdir() if path.suffix in USED}
    folder, mark = tmp_path / "folder", tmp_path / "mark"

    def body(changes: dict[str, bytes | None]) -> None:
        damaged(source, folder, changes, mark)
        outcome(f"folders: {kind}", lambda: use(folder))
        assert not mark.exists(), "something in the folder was run"

    fuzz(damage(contents), body, cases, long=long)

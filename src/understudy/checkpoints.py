"""Checkpoints that are either whole or not there.

A checkpoint is written beside its final place, flushed to disk, and renamed; a crash leaves at most a ``.partial``
folder,
which the next run removes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from understudy.backends.protocols import Trainer

_NAME = re.compile(r"step_(\d{6,})")
STATE_FILE = "trainer_state.pt"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps lives."""
    return folder / f"step_{step:06d}"


def save_checkpoint(
    folder: Path, step: int, trainer: Trainer, tokenizer: Any, extra: Mapping[str, Any], *, keep: int
) -> Path:
    """Write ``step_NNNNNN`` (a folder that transformers or peft loads, plus trainer state), then drop old ones."""
    import torch

    final = checkpoint_path(folder, step)
    partial = final.with_suffix(".partial")
    for stale in (partial, final):
        if stale.exists():
            shutil.rmtree(stale)
    partial.mkdir(parents=True)
    trainer.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    torch.save({"step": step, "trainer": trainer.state_dict(), **extra}, partial / STATE_FILE)
    flush_tree(partial)
    partial.rename(final)
    flush(folder)
    for _, old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The state saved beside the weights."""
    import torch

    return torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of whole checkpoints, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else []:
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found)


def remove_partial(folder: Path) -> None:
    """Delete what a crash left half-written."""
    for path in folder.glob("*.partial") if folder.is_dir() else []:
        shutil.rmtree(path)


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content so that a reader (or a crash) sees the old or the new one, never half."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, content: Any) -> None:
    """``write_atomic`` for JSON; NaN and infinity are refused."""
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def flush_tree(folder: Path) -> None:
    """Force every file of a folder, and the folder's own entries, to disk."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

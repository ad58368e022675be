"""Checkpoints that are either whole or not there.

A checkpoint is written beside its final place, flushed to disk, and renamed; a crash leaves at most a ``.partial``
folder, which the next run removes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.errors import ConfigError, first_line

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
        # Renamed first: a folder that is still called step_... is whole, even if a crash interrupts the removal.
        shutil.rmtree(old.rename(old.with_suffix(".partial")))
    return final


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The state saved beside the weights. Raises ConfigError when it cannot be read."""
    import torch

    path = checkpoint / STATE_FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"a {type(state).__name__}")
        return state
    except Exception as error:  # of a damaged file torch's reader raises whatever comes to it
        raise ConfigError(
            f"checkpoint {path}",
            got=first_line(error),
            expected="the state that the run saved there",
            remedy=f"remove {checkpoint}: --resume then goes on from the checkpoint before it",
        ) from None


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
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


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


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """``write_atomic`` for rows, one JSON object per line; NaN and infinity are refused."""
    write_atomic(path, jsonl(rows))


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as the text of a JSONL file."""
    return "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)


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

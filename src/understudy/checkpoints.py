"""Checkpoints that are either whole or not there.

A checkpoint is written beside its final place, flushed to disk, and renamed; a crash leaves at most a ``.partial``
folder, which the next run removes. ``SHA256SUMS`` tells what a disk has changed since.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.errors import ConfigError, RunError, UnderstudyError, first_line

if TYPE_CHECKING:
    from understudy.backends.protocols import Trainer

_NAME = re.compile(r"step_(\d{6,})")
_SUM = re.compile(r"([0-9a-f]{64})  (.+)")
STATE_FILE = "trainer_state.pt"
SUMS_FILE = "SHA256SUMS"
_DAMAGED = ".damaged"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps lives."""
    return folder / f"step_{step:06d}"


def save_checkpoint(
    folder: Path, step: int, trainer: Trainer, tokenizer: Any, extra: Mapping[str, Any], *, keep: int
) -> Path:
    """Write ``step_NNNNNN`` (a folder that transformers or peft loads, plus trainer state), then drop old ones.

    Raises RunError when it cannot be written; what was there before is still there.
    """
    final = checkpoint_path(folder, step)
    partial = final.with_suffix(".partial")
    try:
        for stale in (partial, final):
            if stale.exists():
                shutil.rmtree(stale)
        partial.mkdir(parents=True)
        _write(partial, trainer, tokenizer, {"step": step, **extra})
        partial.rename(final)
        flush(folder)
    except UnderstudyError:
        raise
    except Exception as error:  # the libraries that write the files have each an error of their own for a full disk
        failure = not_written(final, error)
        shutil.rmtree(partial, ignore_errors=True)  # the room it takes is needed
        raise failure from error
    with writing(folder):
        for old in [path for _, path in list_checkpoints(folder)[:-keep]] + list(folder.glob(f"*{_DAMAGED}")):
            # Renamed first: a folder that is still called step_... is whole, even if a crash interrupts the removal.
            shutil.rmtree(old.rename(old.with_suffix(".partial")))
    return final


def _write(folder: Path, trainer: Trainer, tokenizer: Any, state: Mapping[str, Any]) -> None:
    import torch

    trainer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save({**state, "trainer": trainer.state_dict()}, folder / STATE_FILE)
    write_sums(folder)
    flush_tree(folder)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The state saved beside the weights. Raises ConfigError when a file of the checkpoint is not as it was written, or
    the state cannot be read."""
    import torch

    got = damage(checkpoint)
    if got is None:
        try:
            state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
            whole = isinstance(state, dict) and {"step", "trainer"} <= state.keys()
            if whole and isinstance(state.get("method"), str | None):
                return state
            got = f"{STATE_FILE} without a run's state"
        except Exception as error:  # sums that somebody made anew say nothing about the content
            got = f"{STATE_FILE}: {first_line(error)}"
    raise ConfigError(
        f"checkpoint {checkpoint}",
        got=got,
        expected="the files that the run saved there",
        remedy=f"put it back from a copy; or remove {checkpoint}, and --resume goes on from the one before it",
    )


def newest_state(folder: Path) -> tuple[int, Path | None, dict[str, Any], dict[Path, str]]:
    """(step, checkpoint, state, damaged ones with what is wrong) of the newest checkpoint that is as it was written;
    (0, None, {}, {}) where there never was one. Raises ConfigError when all that are there are damaged."""
    damaged: dict[Path, str] = {}
    for step, path in reversed(list_checkpoints(folder)):
        try:
            return step, path, load_state(path), damaged
        except ConfigError as error:
            damaged[path] = error.got
    if not damaged:
        return 0, None, {}, {}
    raise ConfigError(
        f"checkpoints in {folder}",
        got="; ".join(f"{path.name}: {what}" for path, what in damaged.items()),
        expected="one that is as it was written",
        remedy="put one back from a copy, or start anew in another output_dir",
    )


def set_aside(checkpoint: Path) -> None:
    """Take a damaged checkpoint out of the list. It is there to be looked at until the next one is written."""
    aside = checkpoint.with_suffix(_DAMAGED)
    if aside.exists():
        shutil.rmtree(aside)
    checkpoint.rename(aside)


def write_sums(folder: Path) -> None:
    """``SHA256SUMS`` of all files in ``folder``, as ``sha256sum --check`` reads it. The state's comes last: where it is
    missing, the list has lost its end."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = sorted({*files} - {SUMS_FILE}, key=lambda name: (name == STATE_FILE, name))
    write_atomic(folder / SUMS_FILE, "".join(f"{sum_}  {name}\n" for name, sum_ in _sums(folder, names).items()))


def damage(folder: Path, *, only: str = "") -> str | None:
    """What is wrong with a checkpoint's ``SHA256SUMS``, or with files that it lists: missing, or not as they were
    written. None: nothing. ``only``: of files whose names end so."""
    path = folder / SUMS_FILE
    if not path.is_file():
        return f"without {SUMS_FILE}"
    lines = path.read_bytes().decode("utf-8", "replace").splitlines(keepends=True)
    found = [_SUM.fullmatch(line.removesuffix("\n")) for line in lines if line.endswith("\n")]
    listed = {match[2]: match[1] for match in found if match}
    if len(listed) < len(lines) or STATE_FILE not in listed:
        return f"{SUMS_FILE} is damaged"
    names = [name for name in listed if name.endswith(only)]
    if missing := [name for name in names if not (folder / name).is_file()]:
        return f"without {', '.join(missing)}"
    try:
        sums = _sums(folder, names)
    except OSError as error:
        return str(error)
    changed = [
        f"{name} (sha256 {sums[name][:12]}, was {listed[name][:12]})" for name in names if sums[name] != listed[name]
    ]
    return f"not as it was written: {', '.join(changed)}" if changed else None


def _sums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    def sum_of(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    names = list(names)
    with ThreadPoolExecutor() as workers:  # hashing lets other threads run
        return dict(zip(names, workers.map(sum_of, names), strict=True))


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


def not_written(path: Path, error: BaseException) -> RunError:
    """What to raise where ``path`` could not be written. Not every library says why: what room there is tells more."""
    free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free
    return RunError(
        f"{path} could not be written: {first_line(error)} ({free / 2**20:.1f} MiB free)\nWhat was written before is "
        "whole. Make room, or make the folder writable, and the same command with --resume goes on from the last "
        "checkpoint"
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError in the block, a full disk among them, as RunError."""
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from error


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content so that a reader (or a crash) sees the old or the new one, never half. Raises RunError
    when it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)  # the room it takes is needed
            raise


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

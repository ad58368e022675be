"""Checkpoints and atomic files."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from understudy.checkpoints import (
    checkpoint_path,
    damage,
    list_checkpoints,
    load_state,
    newest_state,
    remove_partial,
    save_checkpoint,
    set_aside,
    write_atomic,
    write_json,
    write_jsonl,
    write_sums,
)
from understudy.errors import ConfigError, RunError


class Named:
    """Saves its name; stands for the trainer and the tokenizer."""

    def __init__(self, name: str) -> None:
        self.name = name

    def save_pretrained(self, folder: Path) -> None:
        (folder / self.name).write_text(self.name)

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    trainer: Any = Named("weights")
    for step in (5, 10, 1_000_000, 1_000_005):
        save_checkpoint(tmp_path, step, trainer, Named("words"), {"costs": step}, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1_000_000, 1_000_005]
    [_, (_, newest)] = list_checkpoints(tmp_path)
    assert {path.name for path in newest.iterdir()} == {"weights", "words", "trainer_state.pt", "SHA256SUMS"}
    assert load_state(newest) == {"step": 1_000_005, "trainer": {"name": "weights"}, "costs": 1_000_005}
    assert {path.name for path in tmp_path.iterdir()} == {"step_1000000", "step_1000005"}


@pytest.mark.parametrize("state", [[1, 2], {"step": 1}, {"step": 1, "trainer": {}, "method": torch.zeros(2)}])
def test_a_state_that_is_no_runs(state: Any, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "trainer_state.pt")
    write_sums(tmp_path)
    with pytest.raises(ConfigError, match=r"trainer_state\.pt without a run's state"):
        load_state(tmp_path)


def test_old_ones_that_cannot_be_removed_are_an_error_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(f"not permitted: {path}")

    trainer: Any = Named("weights")
    save_checkpoint(tmp_path, 1, trainer, Named("words"), {}, keep=1)
    monkeypatch.setattr("shutil.rmtree", refused)
    with pytest.raises(RunError, match=r"not permitted: .*step_000001\.partial"):
        save_checkpoint(tmp_path, 2, trainer, Named("words"), {}, keep=1)
    assert newest_state(tmp_path)[0] == 2


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    for name in ("step_000004", "step_000006.partial", "step_x", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "costs.json.partial").write_text("{")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4]
    remove_partial(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step_000004", "step_x", "other"}
    assert list_checkpoints(tmp_path / "nowhere") == []
    remove_partial(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == '{\n  "a": 1\n}\n'


def test_rows_are_written_all_or_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": "é\u2028"}, {"a": 2}])
    assert path.read_text(encoding="utf-8") == '{"a": "é\u2028"}\n{"a": 2}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_jsonl(path, [{"a": 3}, {"a": float("inf")}])
    assert path.read_text(encoding="utf-8").count("\n") == 2


# Integrity


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Checkpoints 2 and 4."""
    trainer: Any = Named("model.safetensors")
    for step in (2, 4):
        save_checkpoint(tmp_path, step, trainer, Named("tokenizer.json"), {"costs": step}, keep=2)
    return tmp_path


def newest(folder: Path) -> Path:
    return checkpoint_path(folder, 4)


def test_sums_are_what_sha256sum_checks(saved: Path) -> None:
    names = ["model.safetensors", "tokenizer.json", "trainer_state.pt"]
    sums = [hashlib.sha256((newest(saved) / name).read_bytes()).hexdigest() for name in names]
    assert (newest(saved) / "SHA256SUMS").read_text() == "".join(
        f"{s}  {n}\n" for s, n in zip(sums, names, strict=True)
    )
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=newest(saved), check=True)
    assert damage(newest(saved)) is None
    write_sums(newest(saved))  # again: the list is none of its own files
    assert damage(newest(saved)) is None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "trainer_state.pt"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [(flip, "not as it was written: {} "), (cut, "not as it was written: {} "), (Path.unlink, "without {}")],
)
def test_damage_is_found_and_the_one_before_is_taken(
    spoil: Callable[[Path], None], said: str, name: str, saved: Path
) -> None:
    spoil(newest(saved) / name)
    assert (damage(newest(saved)) or "").startswith(said.format(name))
    assert damage(newest(saved), only=".safetensors") == (
        damage(newest(saved)) if name.endswith(".safetensors") else None
    )
    step, path, state, damaged = newest_state(saved)
    assert (step, path, state["costs"]) == (2, checkpoint_path(saved, 2), 2)
    assert damaged == {newest(saved): damage(newest(saved))}
    with pytest.raises(ConfigError, match=name):
        load_state(newest(saved))


def test_a_damaged_list_of_sums(saved: Path) -> None:
    path = newest(saved) / "SHA256SUMS"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert damage(newest(saved)) == "SHA256SUMS is damaged"
    for position in range(len(whole)):
        for bit in (1, 16, 128):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
            assert damage(newest(saved)) is not None


def test_without_sums_a_checkpoint_is_damaged(saved: Path) -> None:
    (newest(saved) / "SHA256SUMS").unlink()
    step, path, state, damaged = newest_state(saved)
    assert (step, path, state["costs"]) == (2, checkpoint_path(saved, 2), 2)
    assert damaged == {newest(saved): "without SHA256SUMS"}


def test_with_sums_made_anew_the_state_is_still_looked_at(saved: Path) -> None:
    content = (newest(saved) / "trainer_state.pt").read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        (newest(saved) / "trainer_state.pt").write_bytes(content[:length])
        write_sums(newest(saved))
        assert newest_state(saved)[0] == 2


def test_all_damaged_is_an_error(saved: Path) -> None:
    flip(newest(saved) / "model.safetensors")
    (checkpoint_path(saved, 2) / "trainer_state.pt").unlink()
    with pytest.raises(ConfigError) as error:
        newest_state(saved)
    assert "step_000004: not as it was written: model.safetensors" in error.value.got
    assert "step_000002: without trainer_state.pt" in error.value.got
    assert newest_state(saved / "nowhere") == (0, None, {}, {})


def test_what_was_set_aside_goes_with_the_next_save(saved: Path) -> None:
    set_aside(newest(saved))
    set_aside(newest(saved).parent / "step_000002")
    assert list_checkpoints(saved) == []
    assert {path.name for path in saved.iterdir()} == {"step_000002.damaged", "step_000004.damaged"}
    trainer: Any = Named("weights")
    save_checkpoint(saved, 4, trainer, Named("words"), {}, keep=2)
    assert {path.name for path in saved.iterdir()} == {"step_000004"}


def test_other_files_may_be_added(saved: Path) -> None:
    (newest(saved) / "README.md").write_text("mine")
    assert damage(newest(saved)) is None


# Disks that are full


class Full(Named):
    """Fails as the libraries do that write for it."""

    def __init__(self, error: Exception) -> None:
        super().__init__("weights")
        self.error = error

    def save_pretrained(self, folder: Path) -> None:
        super().save_pretrained(folder)
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_others(error: Exception, saved: Path) -> None:
    trainer: Any = Full(error)
    with pytest.raises(
        RunError, match=r"step_000006 could not be written: .*\nWhat was written before is whole"
    ) as raised:
        save_checkpoint(saved, 6, trainer, Named("words"), {}, keep=2)
    assert str(error) in str(raised.value)
    assert "--resume" in str(raised.value)
    # The half that was written is gone: its room is needed.
    assert {path.name for path in saved.iterdir()} == {"step_000002", "step_000004"}
    assert newest_state(saved)[0] == 4


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    """/dev/full says "No space left on device" to whoever writes there."""
    path = tmp_path / "costs.json"
    write_json(path, {"a": 1})
    (tmp_path / "costs.json.partial").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"costs.json could not be written: \[Errno 28\] No space left on device"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}

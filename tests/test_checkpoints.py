"""Checkpoints and atomic files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from understudy.checkpoints import (
    list_checkpoints,
    load_state,
    remove_partial,
    save_checkpoint,
    write_atomic,
    write_json,
    write_jsonl,
)


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
    assert {path.name for path in newest.iterdir()} == {"weights", "words", "trainer_state.pt"}
    assert load_state(newest) == {"step": 1_000_005, "trainer": {"name": "weights"}, "costs": 1_000_005}
    assert {path.name for path in tmp_path.iterdir()} == {"step_1000000", "step_1000005"}


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

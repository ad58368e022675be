"""Damaged checkpoints, full disks, deadlines, second processes, clocks and memory, each with real processes.

The module of the same name in this folder says what happens in each; `benchmarks/reliability.py` runs them oftener.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import scenarios
from starved import out_of_memory

pytestmark = pytest.mark.slow


def test_damaged_checkpoints(tmp_path: Path) -> None:
    found = scenarios.damaged_checkpoints(tmp_path, looked_at=300, resumed=6)
    assert all((kind["found"], kind["tried"], kind["resumed"]) == (100, 100, 2) for kind in found.values())


def test_disks_without_room(tmp_path: Path) -> None:
    """The first limit is below a checkpoint's weights, the second below its state, the third below a report."""
    found = scenarios.limited_files(tmp_path, limits=[8192, 50_000, 90_000])
    assert found["exit_codes"] == {"0": 1, "1": 2}
    assert found["not_written"] == {"checkpoints/step_NNNNNN": 2}


def test_disks_of_ones_own(tmp_path: Path) -> None:
    if not scenarios.can_mount(tmp_path / "try"):
        pytest.skip("needs the right to mount a file system; test_disks_without_room does without")
    assert scenarios.full_disk(tmp_path / "full", trials=8)["exit_codes"].keys() <= {"0", "1", "2"}
    assert scenarios.read_only(tmp_path / "read-only") == {"exit_codes": [2, 2]}


def test_deadlines(tmp_path: Path) -> None:
    found = scenarios.deadline(tmp_path, places=list(scenarios.SLOW_PLACES))["places"]
    # The step that a process was in when it was told to stop is left out, unless its update had begun.
    assert {place: one["saved_after_step"] for place, one in found.items()} == {
        "loading": 0,
        "first evaluation": 0,
        "sampling, first step": 0,
        "sampling": 3,
        "scoring": 3,
        "forward and backward": 3,
        "update": 4,
        "rollouts write": 2,
        "metrics write": 3,
        "evaluation": 3,
        "checkpoint write": 4,
    }


def test_two_processes(tmp_path: Path) -> None:
    assert scenarios.two_processes(tmp_path, pairs=6)["refused"] >= 3


def test_clock_jumps(tmp_path: Path) -> None:
    assert scenarios.clock_jumps(tmp_path, trials=3) == {"trials": 3}


def test_memory_that_is_not_there(tmp_path: Path) -> None:
    sizes = out_of_memory(tmp_path)["micro_batch_tokens"]
    assert sizes == [32768 // 2**i for i in range(len(sizes))]

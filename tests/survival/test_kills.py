"""Jobs that are killed anywhere and resumed end where undisturbed ones end: at least a hundred kills, over all
phases."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from jobs import PHASES, assert_same
from kills import Pace, _missing, kill_all, undisturbed
from scenarios import make_jobs

from user import metrics, write_rows


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    found = kill_all(tmp_path / "kills", per_phase=10, seed=1)
    assert found["differences"] == []
    assert found["equal"] == found["kills"] >= 100
    assert all(found["phases"][name]["kills"] >= 10 for name in PHASES)
    # What was resumed dies too.
    assert sum(phase["of_resumed"] for phase in found["phases"].values()) >= 20


@pytest.mark.slow
def test_the_comparison_sees_what_is_wrong(tmp_path: Path) -> None:
    """A harness that finds nothing would be worth nothing."""
    (tmp_path / "material").mkdir()
    job = make_jobs(tmp_path / "material")[0]
    pace: Pace = undisturbed(job, tmp_path / "whole")
    assert _missing([], [job], 1) == job.phases

    def copy(name: str) -> Path:
        return Path(shutil.copytree(pace.folder, tmp_path / name))

    assert_same(job, copy("same"), pace.folder)
    bit = copy("bit") / "run" / "checkpoints" / "step_000006" / "model.safetensors"
    content = bytearray(bit.read_bytes())
    content[-1] ^= 1
    bit.write_bytes(content)
    rows = metrics(pace.folder / "run")
    for name, changed in {
        "gap": rows[:3] + rows[4:],
        "duplicate": [*rows[:3], rows[2], *rows[3:]],
        "another": [*rows[:3], rows[3] | {"optim/loss": rows[3]["optim/loss"] + 1e-7}, *rows[4:]],
    }.items():
        write_rows(copy(name) / "run" / "metrics.jsonl", changed)
    next((copy("rollouts") / "run" / "rollouts").iterdir()).unlink()
    (copy("left") / "run" / "costs.json.partial").touch()
    for name in ("bit", "gap", "duplicate", "another", "rollouts", "left"):
        with pytest.raises(AssertionError):
            assert_same(job, tmp_path / name, pace.folder)

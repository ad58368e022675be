"""Where a run ran, and what the doctor found before it: kept with it, over continuations too."""

from __future__ import annotations

import json
import platform
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import understudy
from understudy import RunConfig
from understudy.environment import PACKAGES, environment
from user import interrupt_in, save_model, tree, word_tokenizer, write_rows


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_it_is_this_one() -> None:
    found = environment()
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == version("torch")
    assert set(found["packages"]) <= set(PACKAGES)
    assert found["threads"] == torch.get_num_threads()
    assert found["devices"] == []
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(found["started"])).total_seconds()) < 60


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Two steps whose rows leave the doctor something to say: all of them are the same."""
    model = save_model(tmp_path / "model", word_tokenizer())
    lines = write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1 w2"}] * 4)
    content = tree(model, model, lines, tmp_path / "run", checkpoints={"every": 1}, optim={"num_steps": 3})
    return RunConfig.model_validate(content)


def test_every_start_of_a_run_is_kept_once(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(config.output_dir)
    with monkeypatch.context() as patch:
        interrupt_in(patch, "understudy.loop.sync_weights", at_call=2)
        assert understudy.distill(config, quiet=True).interrupted_at == 2
    first = rows(folder / "environment.jsonl")
    assert [(row["step"], row["method"]) for row in first] == [(0, "distill")]
    checks = rows(folder / "doctor.jsonl")
    assert {row["step"] for row in checks} == {0}
    assert {row["level"] for row in checks} <= {"pass", "warn"}
    assert set(checks[0]) == {"step", "check", "level", "evidence", "why", "remedy"}
    # Its last start left nothing: it goes on after step 2 once more.
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("understudy.api.on_policy_loop", stop_at_once)
            with pytest.raises(RuntimeError, match="at once"):
                understudy.distill(config, resume=True, quiet=True)
    understudy.distill(config, resume=True, quiet=True)
    assert [row["step"] for row in rows(folder / "environment.jsonl")] == [0, 2]
    assert rows(folder / "environment.jsonl")[0] == first[0]
    again = [row for row in rows(folder / "doctor.jsonl") if row["step"] == 2]
    assert [row["check"] for row in again] == [row["check"] for row in checks]


def stop_at_once(*_: object) -> None:
    raise RuntimeError("at once")

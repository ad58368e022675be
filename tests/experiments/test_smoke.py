"""Every claim from its search to its page, in miniature, through the processes that real ones run in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from understudy.experiments import command
from understudy.experiments.claims import NAMES


def _run(wanted: str, folder: Path, pipelines: int) -> int:
    return command.run(
        wanted, pipelines=pipelines, scale="smoke", output=folder / "out", cache=folder / "cache", slots=2
    )


def _check(folder: Path, name: str, pipelines: int) -> None:
    content = json.loads((folder / "out" / name / "results.json").read_text())
    assert len(content["records"]) == pipelines
    assert content["finding"]["verdict"] in ("holds", "direction only", "does not hold here")
    readme = (folder / "out" / name / "README.md").read_text()
    assert f"**Verdict: {content['finding']['verdict']}.**" in readme
    assert content["finding"]["text"] in readme
    assert content["code"] in (folder / "out" / name / "report.html").read_text()
    assert f"]({name}/README.md)" in (folder / "out" / "README.md").read_text()


def test_a_claim_that_trains_nothing_runs_and_is_kept(tmp_path):
    assert _run("c7", tmp_path, pipelines=2) == 0
    _check(tmp_path, "c7_forking_tokens", 2)
    made = (tmp_path / "out" / "c7_forking_tokens" / "results.json").stat().st_mtime_ns
    before = sorted((tmp_path / "cache" / "records").glob("*/record.json"))
    assert _run("c7", tmp_path, pipelines=2) == 0
    assert sorted((tmp_path / "cache" / "records").glob("*/record.json")) == before
    assert (tmp_path / "out" / "c7_forking_tokens" / "results.json").stat().st_mtime_ns >= made


@pytest.mark.slow
def test_every_claim_runs(tmp_path):
    assert _run("all", tmp_path, pipelines=2) == 0
    for name in NAMES:
        _check(tmp_path, name, 2)

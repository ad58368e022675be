"""Claims run in processes, keep what is done, and say what failed."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from understudy.checkpoints import write_json
from understudy.errors import ConfigError, RunError
from understudy.experiments import claims, command, results, runner
from understudy.experiments.board import Board, newest_line
from understudy.experiments.claim import Claim, Estimate, Finding, column
from understudy.experiments.runner import Task, run_claims
from understudy.experiments.search import Search


@dataclass(frozen=True)
class Settings:
    gain: float = 1.0


def _search(lab, settings, arm):
    _count(lab.cache.root, f"search {arm}")
    return Search([(0.1, 0.2), (0.3, 0.9), (0.5, 0.4)])


def _pipeline(lab, settings, rates):
    _count(lab.cache.root, f"pipeline {lab.pipeline}")
    if (lab.cache.root / "fail").exists() and lab.pipeline == 1:
        raise ValueError("no such luck")
    return {"gain": settings.gain * (1 + 0.1 * lab.pipeline), "rate": rates["only"]}


def _count(root: Path, what: str) -> None:
    with (root / "calls").open("a") as calls:
        calls.write(what + "\n")


def _analyse(records):
    gain = Estimate.of(column(records, "gain"))
    holds = gain.low > 0
    return Finding(
        "holds" if holds else "does not hold here",
        ours=f"gain {gain.show()}",
        text=f"The gain is {gain.show()}.",
        numbers={"gain": gain.mean},
        table=[{"arm": "only", "gain": gain.show()}],
    )


CLAIM = Claim(
    "c2_dense_signal",
    "A stand-in",
    "It gains.",
    "None.",
    {"cpu": Settings(), "gpu": Settings(2.0), "smoke": Settings(0.5)},
    _search,
    _pipeline,
    _analyse,
    ("only",),
)


class _Inline:
    """A worker without a process."""

    def __init__(self):
        self.task: Task | None = None
        self.started = 0.0

    def begin(self, task: Task) -> None:
        self.task, self.started = task, time.monotonic()

    def take(self):
        task, self.task = self.task, None
        assert task is not None
        try:
            return task, runner.perform(task)
        except ValueError as error:
            raise RunError(f"{task.name} failed: {error}") from None

    def end(self):
        pass


@pytest.fixture
def inline(monkeypatch):
    """The stand-in claim, in this process."""
    for module in (runner, results, command):
        monkeypatch.setattr(module, "load_claim", lambda name: CLAIM)
    monkeypatch.setattr(runner, "_Worker", _Inline)
    monkeypatch.setattr(runner, "_answered", lambda workers: [worker for worker in workers if worker.task])


def _calls(cache: Path) -> list[str]:
    return sorted((cache / "calls").read_text().splitlines())


def _run(cache: Path, pipelines: int = 3):
    return dict(run_claims([CLAIM.name], pipelines=pipelines, scale="smoke", cache=cache, slots=2))


def test_pipelines_follow_the_search_and_are_run_once(inline, tmp_path):
    (found,) = _run(tmp_path).values()
    assert found.searches["only"].chosen == 0.3
    assert found.records == [{"gain": pytest.approx(0.5 * (1 + 0.1 * n)), "rate": 0.3} for n in range(3)]
    assert _calls(tmp_path) == ["pipeline 0", "pipeline 1", "pipeline 2", "search only"]
    assert _run(tmp_path)[CLAIM.name].records == found.records
    assert len(_calls(tmp_path)) == 4  # nothing again
    _run(tmp_path, pipelines=4)
    assert _calls(tmp_path).count("pipeline 3") == 1
    assert len(_calls(tmp_path)) == 5


def test_after_a_failure_the_finished_parts_stay(inline, tmp_path):
    tmp_path.joinpath("fail").touch()
    with pytest.raises(RunError, match=r"pipeline 2 failed: no such luck"):
        _run(tmp_path)
    tmp_path.joinpath("fail").unlink()
    assert len(_run(tmp_path)[CLAIM.name].records) == 3
    assert _calls(tmp_path).count("search only") == 1
    assert _calls(tmp_path).count("pipeline 0") == 1
    assert _calls(tmp_path).count("pipeline 1") == 2


def test_results_stay_until_code_or_settings_change(inline, tmp_path, capsys):
    def experiment(pipelines: int = 3) -> int:
        return command.run(
            "c2", pipelines=pipelines, scale="smoke", output=tmp_path / "out", cache=tmp_path / "cache", slots=1
        )

    (tmp_path / "cache").mkdir()
    assert experiment() == 0
    content = results.stored(tmp_path / "out", CLAIM.name)
    assert content is not None
    assert content["searches"] == {"only": [[0.1, 0.2], [0.3, 0.9], [0.5, 0.4]]}
    assert [record["gain"] for record in content["records"]] == [0.5, 0.55, 0.6]
    readme = (tmp_path / "out" / CLAIM.name / "README.md").read_text()
    assert "**Verdict: holds.** The gain is 0.550 [0.426, 0.674]." in readme
    assert "| only | 0.550 [0.426, 0.674] |" in readme
    assert "gain 0.550" in (tmp_path / "out" / "README.md").read_text()
    assert "holds" in (tmp_path / "out" / CLAIM.name / "report.html").read_text()
    assert "C2: a stand-in: holds" in capsys.readouterr().out

    # The committed results are enough: with another cache nothing runs.
    (tmp_path / "cache" / "calls").unlink()
    experiment()
    assert not (tmp_path / "cache" / "calls").exists()
    experiment(pipelines=4)
    assert _calls(tmp_path / "cache") == ["pipeline 3"]
    changed = {**content, "code": "0" * 16}
    write_json(tmp_path / "out" / CLAIM.name / "results.json", changed)
    assert not results.is_current(changed, CLAIM.name, "smoke", 3)
    assert not results.is_current(content, CLAIM.name, "cpu", 3)
    assert not results.is_current(None, CLAIM.name, "smoke", 3)
    assert results.is_current(content, CLAIM.name, "smoke", 3)


def test_a_readme_keeps_what_was_written_by_hand(inline, tmp_path):
    folder = tmp_path / "out" / CLAIM.name
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"# Mine\n\nRule.\n\n{results.BEGIN}\nearlier\n{results.END}\n\nAfter.\n")
    command.run("c2", pipelines=2, scale="smoke", output=tmp_path / "out", cache=tmp_path / "cache", slots=1)
    text = (folder / "README.md").read_text()
    assert text.startswith("# Mine\n\nRule.\n\n<!-- results -->\n\n## Results")
    assert text.endswith("<!-- /results -->\n\nAfter.\n")
    assert "earlier" not in text


def test_unknown_claims_and_numbers_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match="no such claim"):
        claims.find_names("c14")
    assert claims.find_names("c1") == ["c1_cost"]
    assert claims.find_names("c13_failure_modes") == ["c13_failure_modes"]
    assert claims.find_names("all") == list(claims.NAMES)
    with pytest.raises(ConfigError, match="--pipelines"):
        command.run("c2", pipelines=0, scale="smoke", output=tmp_path, cache=tmp_path, slots=1)


def test_the_board_tells_how_far_and_how_long(tmp_path):
    board = Board({"c1": 3, "c2": 1})
    assert "0 of 4 parts" in board.header(2)
    assert "estimating" in board.header(2)
    board.done("c1", 120)
    board.done("c1", 240)
    # One more of c1 at 180 s and one of c2, of which nothing is known but the others' mean: 360 s on two slots.
    assert "2 of 4 parts" in board.header(2)
    assert "about 3 min left" in board.header(2)
    log = tmp_path / "log"
    assert newest_line(log) == ""
    log.write_text("first\nnewest\n\n")
    assert newest_line(log) == "newest"


def test_records_are_json():
    assert json.loads(json.dumps(results._rounded({"a": (1.23456789, [2, None])}))) == {"a": [1.23457, [2, None]]}
    numbers = {"gain": Estimate.of([0.5]), "by arm": {"a": [0.1234567, "b"]}}
    plain = {"gain": {"mean": 0.5, "low": None, "high": None}, "by arm": {"a": [0.123457, "b"]}}
    assert results._plain(numbers) == plain

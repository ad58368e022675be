"""A pipeline's evaluations on one axis: where each stands, which belong to the course, what was forgotten."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from understudy.report.pipeline_report import pipeline_curves, write_pipeline_report
from understudy.report.timeline import Timeline, timeline_of

NEW, OLD = "eval/new/greedy", "eval/old/t1"


def phase(number: int, name: str, before: str, after: str, values: Sequence[float], **changes: Any) -> dict[str, Any]:
    """A phase of 10 steps. ``values``: of OLD, at its start and its end."""
    start, final = ({OLD: value, f"{OLD}_se": 0.01, NEW: 0.5, f"{NEW}_se": 0.01} for value in values)
    made = {
        "name": name,
        "cycle": 1,
        "method": "sft",
        "folder": f"{number:02d}-{name}",
        "began_with": before,
        "output": after,
        "steps": 10,
        "flops": 1e9,
        "seconds": 2.0,
        "start": start,
        "final": final,
        "gates": [],
        "outcome": "kept",
    }
    return made | changes


def write(folder: Path, *phases: dict[str, Any]) -> Path:
    """The pipeline's folder; its second phase was evaluated half way."""
    plan = {"start": "s0", "cycles": 1, "phases": [{"name": one["name"]} for one in phases]}
    (folder / phases[1]["folder"]).mkdir(parents=True)
    state = {"plan": plan, "phases": phases}
    (folder / "pipeline.json").write_text(json.dumps(state), encoding="utf-8")
    rows = [{"step": 0, OLD: 0.9}, {"step": 5, OLD: 0.4, f"{OLD}_se": 0.01}, {"step": 7}, {"step": 10, OLD: 0.2}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / phases[1]["folder"] / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def read(folder: Path) -> Timeline:
    state = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
    return timeline_of(folder, state, [NEW, OLD])


def course(timeline: Timeline, metric: str = OLD) -> list[tuple[float, str, float]]:
    return [(point.x, point.words, point.row[metric]) for point in timeline.courses[metric]]


def forgetful(folder: Path) -> Path:
    return write(
        folder,
        phase(1, "assistant", "s0", "s1", (0.1, 0.9)),
        phase(2, "documents", "s1", "s2", (0.9, 0.2)),
        phase(3, "behaviour", "s2", "s3", (0.2, 0.9)),
    )


def test_every_evaluation_stands_where_its_steps_are(tmp_path: Path) -> None:
    timeline = read(forgetful(tmp_path))
    assert [(region.start, region.end, region.name) for region in timeline.regions] == [
        (0, 1, "assistant"),
        (1, 2, "documents"),
        (2, 3, "behaviour"),
    ]
    assert course(timeline) == [
        (0, "before phase 1, assistant", 0.1),
        (1, "after phase 1, assistant", 0.9),
        (1.5, "in phase 2, documents, step 5", 0.4),
        (2, "after phase 2, documents", 0.2),
        (3, "after phase 3, behaviour", 0.9),
    ]


def test_the_page_says_what_was_forgotten_and_recovered(tmp_path: Path) -> None:
    html = write_pipeline_report(forgetful(tmp_path)).read_text(encoding="utf-8")
    assert "forgotten: 90.0 % → 20.0 % after phase 2, documents; recovered: 90.0 %" in html
    assert html.count("forgotten") == 1  # the other metric did not change
    titles = [curve.title for curve in pipeline_curves(tmp_path)]
    assert titles == ["All evaluations", "old", "new"]
    assert [curve.wide for curve in pipeline_curves(tmp_path)] == [True, False, False]


def test_means_that_are_no_shares_are_not_percentages(tmp_path: Path) -> None:
    """A grader's points: one value beyond 1, half way, and none is a share."""
    first, second = phase(1, "a", "s0", "s1", (0.5, 0.9)), phase(2, "b", "s1", "s2", (0.9, 0.2))
    folder = write(tmp_path, first, second)
    with (folder / "02-b" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 6, OLD: 3.0, f"{OLD}_se": 0.5}) + "\n")
    html = write_pipeline_report(folder).read_text(encoding="utf-8")
    assert "0.5 ± 0.01 → 0.2 ± 0.01" in html  # the headline
    assert "forgotten: 3 → 0.2 after phase 2, b" in html
    assert "<td>0.9 ± 0.01 → 0.2 ± 0.01</td>" in html
    assert "300.0 %" not in html
    assert "50.0 % ± 1.0" in html  # the other task's are shares


def test_what_was_only_partly_recovered_or_not_at_all_is_called_so(tmp_path: Path) -> None:
    first, second = phase(1, "a", "s0", "s1", (0.1, 0.9)), phase(2, "b", "s1", "s2", (0.9, 0.2))
    page = write_pipeline_report(write(tmp_path / "p", first, second, phase(3, "c", "s2", "s3", (0.2, 0.5))))
    assert "after phase 2, b; partly recovered: 50.0 %" in page.read_text(encoding="utf-8")
    page = write_pipeline_report(write(tmp_path / "q", first, second))
    assert "→ 20.0 % after phase 2, b</small>" in page.read_text(encoding="utf-8")


def test_a_phase_that_was_rolled_back_stands_beside_the_course(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        phase(1, "assistant", "s0", "s1", (0.1, 0.9)),
        phase(2, "documents", "s1", "s2", (0.9, 0.2), outcome="rolled_back"),
        phase(3, "behaviour", "s1", "s3", (0.9, 0.95)),
    )
    timeline = read(folder)
    assert [(x, value) for x, _, value in course(timeline)] == [(0, 0.1), (1, 0.9), (2, 0.9), (3, 0.95)]
    [aside] = timeline.aside[OLD]
    assert [(point.x, point.row[OLD]) for point in aside] == [(1, 0.9), (1.5, 0.4), (2, 0.2)]
    curves = {curve.title: curve for curve in pipeline_curves(folder)}
    assert [line.name for line in curves["old"].lines] == ["T = 1", "T = 1, rolled back: documents"]
    assert "forgotten" not in write_pipeline_report(folder).read_text(encoding="utf-8")


def test_evaluations_of_another_model_are_no_part_of_the_course(tmp_path: Path) -> None:
    checked = {"method": "eval", "output": "", "steps": 0}
    folder = write(
        tmp_path,
        phase(1, "assistant", "s0", "s1", (0.1, 0.9)),
        phase(2, "other", "s0", "", (0.7, 0.7), **checked),
        phase(3, "check", "s1", "", (0.8, 0.8), **checked),
    )
    assert [(x, value) for x, _, value in course(read(folder))] == [(0, 0.1), (1, 0.9), (2.5, 0.8)]

"""What pages of runs show, as data: curves and their bands, findings, prices, rollouts over time, runs side by side."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from test_report import make_rollout
from understudy.report import cost_panel, curves, findings, write_run_report
from understudy.report.chart_shapes import NORMAL
from understudy.report.charts import Mark, Region, Series, line_chart
from understudy.report.curves import Curve, compared_curves, cost_curves, noise_band, part_curves, run_curves
from understudy.report.paper import write_figures, write_metrics_csv
from understudy.report.run_comparison import config_differences, load_runs, write_run_comparison
from understudy.report.run_data import load_run
from understudy.report.run_report import environment_rows, rollouts_over_time
from user import run_cli

Row = dict[str, Any]


def write_run(
    folder: Path,
    rows: Sequence[Row] = (),
    *,
    config: Mapping[str, Any] | None = None,
    rollouts: Mapping[int, Sequence[int]] = {},
    **files: Sequence[Row],
) -> Path:
    """A run's folder. ``rollouts``: prompts answered, by step; ``files``: rows of further .jsonl files."""
    (folder / "rollouts").mkdir(parents=True)
    for name, own in {"metrics": rows, **files}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
    tree = config if config is not None else {"seed": 0, "output_dir": str(folder)}
    (folder / "config.toml").write_text(tomli_w.dumps(dict(tree)), encoding="utf-8")
    role = {"tokens": 100, "flops": 3e9, "seconds": 2.0}
    costs = {"roles": {"student_sampling": role, "student_training": role | {"flops": 9e9}, "evaluation": role}}
    (folder / "costs.json").write_text(json.dumps(costs), encoding="utf-8")
    for step, prompts in rollouts.items():
        text = "\n".join(json.dumps(make_rollout(["a", "b"], step=step, prompt_index=prompt)) for prompt in prompts)
        (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text(text, encoding="utf-8")
    return folder


def by_title(found: Sequence[Curve]) -> dict[str, Curve]:
    return {curve.title: curve for curve in found}


# --- curves


ROWS: list[Row] = [
    {
        "step": step,
        "reverse_kl/mean": 1.0 / (step + 1),
        "reverse_kl/mean_se": 0.01,
        "optim/grad_norm": 1.0 + step % 2,
        "optim/learning_rate": 1e-4 * step,
        "ratio/tail_share": 0.01,
        "by_task/sums/reverse_kl/mean": 0.5,
        "by_task/sums/reverse_kl/mean_se": 0.05,
        "by_task/a/b/reverse_kl/mean": 0.25,
        "by_teacher/one/reverse_kl/mean": 0.5,
        "cost/flops": 1e9 * step,
        "cost/seconds": 2.0 * step,
        "eval/sums/greedy": 0.1 * step,
        "eval/sums/greedy_se": 0.02,
        "odd/one": 3.0,
    }
    for step in range(9)
]


def test_bands_are_standard_errors_where_known_and_noise_where_not() -> None:
    found, used = run_curves(ROWS)
    titles = by_title(found)
    assert titles["Reverse KL"].band == curves.ERROR
    assert titles["Reverse KL"].lines[0].errors == [0.01] * 9
    # Neighbours differ by 1: the noise of independent draws is sqrt(1/2).
    norm = titles["Gradient norm"]
    assert norm.band == curves.NOISE
    assert norm.lines[0].band is not None
    assert norm.lines[0].band[4] == pytest.approx((1 - math.sqrt(0.5), 1 + math.sqrt(0.5)))
    assert titles["Learning rate"].band == ""
    assert titles["Mismatch: tails of the ratio w"].percent
    assert {"eval/sums/greedy", "reverse_kl/mean_se", "by_task/a/b/reverse_kl/mean"} <= used
    assert "odd/one" not in used


def test_noise_ignores_a_trend_and_what_is_not_finite() -> None:
    straight = noise_band([float(i) for i in range(20)])
    assert straight[10] == pytest.approx((10 - math.sqrt(0.5), 10 + math.sqrt(0.5)))  # the step itself, at most
    assert noise_band([1.0, 2.0, 1.0]) == [None] * 3
    broken = noise_band([1.0, math.nan, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert broken[1] is None
    assert broken[3] == (1.0, 1.0)
    low = noise_band([0.0, 1.0] * 5)[0]
    assert low is not None
    assert low[0] == 0.0  # what is never negative has no negative band


def test_a_line_for_each_task_and_teacher_where_there_are_several() -> None:
    assert curves.parts_of(ROWS) == {"task": ["sums", "a/b"]}
    [curve] = part_curves(ROWS)
    assert (curve.title, [line.name for line in curve.lines]) == ("Reverse KL by task", ["sums", "a/b"])
    many = [{"step": 1, **{f"by_teacher/t{i}/entropy/sampled": 1.0 for i in range(20)}}]
    assert len(curves.parts_of(many)["teacher"]) == curves.MOST_LINES


def test_accuracy_by_compute_and_time() -> None:
    found = by_title(cost_curves({"a": ROWS}))
    assert list(found) == ["Accuracy by compute: sums, greedy", "Accuracy by time: sums, greedy"]
    assert found["Accuracy by compute: sums, greedy"].lines[0].points[2] == (2e9, pytest.approx(0.2))
    assert found["Accuracy by time: sums, greedy"].lines[0].points[2] == (4.0, pytest.approx(0.2))


def test_several_runs_share_charts_and_keep_their_colours() -> None:
    other = [{"step": step, "optim/grad_norm": 2.0, "eval/sums/greedy": 3.0} for step in range(3)]
    found = by_title(compared_curves({"a": ROWS, "b": other}))
    assert [line.name for line in found["Gradient norm"].lines] == ["a", "b"]
    assert [len(line.points) for line in found["Reverse KL: sampled tokens"].lines] == [9, 0]
    assert "Reverse KL: task sums" in found
    # Some value is no share.
    assert (found["Accuracy: sums, greedy"].percent, found["Accuracy: sums, greedy"].unit) == (False, "mean reward")


def test_a_band_ends_where_uncertainty_is_not_known_and_stays_where_it_is_nothing() -> None:
    points = [(float(x), 1.0) for x in range(5)]
    svg = line_chart([Series("a", points, [0.1, 0.0, None, 0.1, 0.1])], title="t", x_label="x", y_label="y")
    assert svg.count('class="band"') == 2
    assert line_chart([Series("a", points, [0.0] * 5)], title="t", x_label="x", y_label="y").count('"band"') == 0


def test_marks_and_regions_are_drawn_and_read_out() -> None:
    points = [(float(x), 1.0 + x) for x in range(5)]
    marks = [Mark(2.0, "1", "guard ratio"), Mark(2.0, "2", "a <b>", "doctor"), Mark(-1.0, "3", "before")]
    svg = line_chart([Series("a", points)], title="t", x_label="step", y_label="y", marks=marks)
    assert "◇▲1,2" in svg
    assert "Marked: 1 guard ratio; 2 a &lt;b&gt;; 3 before." in svg
    assert f'd="M{NORMAL.left} {NORMAL.top}V{NORMAL.bottom}"' in svg  # the axis begins there
    found = re.search(r'data-chart="([^"]*)"', svg)
    assert found
    assert json.loads(unescape(found[1]))["marks"] == [[3, "1 guard ratio"], [3, "2 a <b>"], [0, "3 before"]]
    regions = [Region(0, 2, "first"), Region(2, 4, "second")]
    svg = line_chart([Series("a", points)], title="t", x_label="", y_label="y", regions=regions, x_words={0.0: "begin"})
    assert ">1 first<" in svg
    assert ">2 second<" in svg
    assert "&quot;x&quot;: [&quot;begin&quot;" in svg


# --- costs


def test_costs_have_shares_and_a_total_without_evaluation(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "a"))
    rows = {row["Role"]: row for row in cost_panel.cost_rows(run.costs)}
    assert rows["student training"]["Compute"] == "9 GFLOP (75%)"
    assert rows["evaluation"]["Compute"] == "3 GFLOP"
    assert rows["total without evaluation"]["Time"] == "4.0 s"
    compute, time = cost_panel.cost_bars({"a": run.costs})
    assert compute.bars == (("a", (("student_sampling", 3e9), ("student_training", 9e9))),)
    svg = cost_panel.bars_svg(compute)
    assert "a: 12 GFLOP; student sampling 3 GFLOP, student training 9 GFLOP." in svg
    assert time.title == "Time by role"
    assert cost_panel.cost_bars({"a": {}}) == []


def test_the_price_of_an_accuracy_is_that_of_the_first_evaluation_that_shows_it() -> None:
    slow = [{**row, "eval/sums/greedy": row["eval/sums/greedy"] / 2} for row in ROWS]
    rows = {row["At least"]: row for row in cost_panel.reach_rows({"a": ROWS, "slow": slow})}
    assert rows["40.0 %"]["a"] == "4 GFLOP, 8.0 s (step 4)"
    assert rows["40.0 %"]["slow"] == "8 GFLOP, 16.0 s (step 8)"
    assert rows["80.0 %"]["slow"] == "not reached"
    # One evaluation jumps over several levels: the highest is listed.
    jump: list[Row] = [{"step": 0, "eval/t/greedy": 0.0}, {"step": 5, "eval/t/greedy": 1.0, "cost/flops": 7.0}]
    assert [row["At least"] for row in cost_panel.reach_rows({"a": jump})] == ["100.0 %"]
    assert cost_panel.reach_rows({"a": [{"step": 0, "eval/t/greedy": 0.5}]}) == []


# --- findings


ALARM = {
    "step": 7,
    "guard": "length",
    "action": "warn",
    "words": "too long",
    "causes": "a cause",
    "rollouts": [
        {"file": "rollouts/step_000006.jsonl", "index": 1, "prompt_index": 3},
        {"file": None, "index": 40, "prompt_index": 9},
    ],
}
CHECKS = [
    {"step": 0, "check": "data.rows", "level": "pass", "evidence": "fine", "why": "", "remedy": ""},
    {"step": 0, "check": "data.duplicates", "level": "warn", "evidence": "twice\nw0", "why": "", "remedy": "drop them"},
]


def test_findings_stand_at_their_steps_and_lead_to_rollouts(tmp_path: Path) -> None:
    stored = {0: [1, 2], 6: [5, 3], 12: [1, 2], 18: [1, 2], 24: [1, 2]}
    run = load_run(write_run(tmp_path / "a", ROWS, rollouts=stored, guards=[ALARM], doctor=CHECKS))
    doctor, guard = findings.run_events(run)
    assert (doctor.number, doctor.name, doctor.words, doctor.advice) == (1, "data.duplicates", "twice", "drop them")
    assert (doctor.when, guard.when, guard.advice) == ("before 1", "7", "Likely: a cause")
    assert [link.target for link in guard.links] == ["rollout-6-1", ""]
    assert guard.mark == Mark(7, "2", "guard length (warn): too long", "guard")
    assert findings.doctor_summary(run) == "The doctor's checks before the run: 1 passed, 1 warned."
    html = write_run_report(tmp_path / "a").read_text(encoding="utf-8")
    targets = set(re.findall(r'href="#([^"]+)"', html))
    assert {"rollout-0-0", "rollout-6-1", "findings", "curves"} <= targets
    assert targets <= set(re.findall(r' id="([^"]+)"', html))  # every link on the page leads somewhere on it
    assert "prompt 9, not stored" in html


def test_an_alarm_without_a_stored_rollout_leads_to_the_nearest_step(tmp_path: Path) -> None:
    stored = {step: [step] for step in (0, 6, 12, 18, 24)}
    run = load_run(write_run(tmp_path / "a", ROWS, rollouts=stored, guards=[ALARM | {"rollouts": []}]))
    [event] = findings.run_events(run)
    assert [(link.words, link.target) for link in event.links] == [("what the student wrote at step 6", "rollout-6-0")]
    html = write_run_report(tmp_path / "a").read_text(encoding="utf-8")
    assert 'id="rollout-6-0"' in html


def test_a_run_without_findings_says_that_it_was_looked_at(tmp_path: Path) -> None:
    html = write_run_report(write_run(tmp_path / "a", ROWS, doctor=CHECKS[:1])).read_text(encoding="utf-8")
    assert "1 passed, 0 warned" in html
    assert "No alarm of a guard." in html


# --- rollouts over time


def test_one_prompt_is_shown_at_the_first_a_middle_and_the_last_step(tmp_path: Path) -> None:
    stored = {0: [1, 2], 4: [8, 9], 6: [7, 9], 8: [2, 9], 12: [1, 2]}
    run = load_run(write_run(tmp_path / "a", rollouts=stored))
    assert run.over_time == (0, 8, 12)  # the step near the middle that answers one of the first prompts
    groups = [[(place[0], row["prompt_index"]) for place, row in group] for group in rollouts_over_time(run)]
    assert groups == [[(0, 2), (8, 2), (12, 2)], [(0, 1), (12, 1)]]


def test_a_middle_step_of_other_prompts_stands_alone(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "a", rollouts={0: [1], 5: [7, 8, 9], 10: [1]}))
    groups = [[(place[0], row["prompt_index"]) for place, row in group] for group in rollouts_over_time(run)]
    assert groups == [[(0, 1), (10, 1)], [(5, 7)], [(5, 8)]]
    html = write_run_report(tmp_path / "a").read_text(encoding="utf-8")
    assert "Those of step 5 are of other prompts" in html
    assert f"understudy score {tmp_path / 'a'}" in html


def test_environments_have_a_column_for_each_start() -> None:
    starts = [{"step": 0, "python": "3.11", "packages": {"torch": "2"}, "devices": []}, {"step": 4, "python": "3.12"}]
    assert environment_rows(starts) == [
        {"What": "python", "From step 0": "3.11", "From step 4": "3.12"},
        {"What": "devices", "From step 0": "CPU", "From step 4": "–"},
        {"What": "torch", "From step 0": "2", "From step 4": "–"},
    ]


# --- several runs


def two_runs(folder: Path) -> tuple[Path, Path]:
    config = {"seed": 0, "output_dir": "x", "optim": {"learning_rate": 0.1}, "teacher": {"api_key": "hush"}}
    other = {"seed": 0, "output_dir": "y", "optim": {"learning_rate": 0.2, "warmup": 3}, "teacher": {"api_key": "shh"}}
    a = write_run(folder / "one" / "run", ROWS, config=config, rollouts={0: [1], 8: [1, 2]}, guards=[ALARM])
    b = write_run(folder / "two" / "run", ROWS[:5], config=other, rollouts={0: [1], 4: [2, 3]})
    write_run_report(a)
    return a, b


def test_only_what_differs_is_a_difference() -> None:
    trees = {"a": {"seed": 0, "output_dir": "x", "api_key": "1"}, "b": {"seed": 1, "output_dir": "y", "api_key": "2"}}
    assert config_differences(trees | {"c": {"seed": 0}}) == [
        {"Key": "seed", "a": "0", "b": "1", "c": "0"},
        {"Key": "api_key", "a": "(hidden)", "b": "(hidden)", "c": "–"},
    ]


def test_the_page_of_two_runs(tmp_path: Path) -> None:
    page = write_run_comparison(two_runs(tmp_path), tmp_path / "both.html")
    html = page.read_text(encoding="utf-8")
    assert "one/run · two/run" in html  # folders of one name need their parents'
    assert '<a href="one/run/report.html">one/run</a>' in html
    assert '<th scope="row">two/run</th>' in html  # it has no page of its own
    assert "0.0 % ± 2.0 → 80.0 % ± 2.0" in html
    assert "<td>0.1</td><td>0.2</td>" in html.replace(' class="num"', "")
    assert "hush" not in html
    assert "▲ 1.1" in html
    assert "Prompt 2, task ledger, expected answer 5" in html  # the one that both answered last
    assert html.count("step 8</h4>") == html.count("step 4</h4>") == 1


def test_runs_are_named_by_as_much_of_their_path_as_tells_them_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("p/a", "q/a", "q/b")]
    assert list(load_runs(runs)) == ["p/a", "q/a", "q/b"]
    assert list(load_runs(runs[1:])) == ["a", "b"]
    with pytest.raises(ValueError, match="each once"):
        load_runs([runs[0], runs[0]])


# --- the command


def test_the_command_writes_pages_figures_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = two_runs(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run_cli(monkeypatch, "report", a) == 0
    assert capsys.readouterr().out.split() == [str(a / "report.html")]
    assert run_cli(monkeypatch, "report", a, b, "--figures", "figures", "--csv", "all.csv") == 0
    assert Path("comparison.html").exists()
    lines = Path("all.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "run,step,metric,value,standard_error"
    assert "one/run,2,reverse_kl/mean,0.3333333333333333,0.01" in lines
    assert not any("_se," in line for line in lines[1:])
    figures = {path.name for path in Path("figures").iterdir()}
    assert {f"gradient-norm.{ending}" for ending in ("svg", "png", "csv")} <= figures
    assert len(figures) % 3 == 0
    svg = Path("figures/gradient-norm.svg").read_text(encoding="utf-8")
    assert ">Gradient norm</text>" in svg  # text, not outlines
    assert Path("figures/gradient-norm.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = Path("figures/reverse-kl-sampled-tokens.csv").read_text(encoding="utf-8").splitlines()
    assert table[:2] == ["series,x,place,y,low,high", "one/run,0,,1.0,0.99,1.01"]
    # The same files again, to the byte.
    first = svg, Path("figures/gradient-norm.png").read_bytes()
    assert run_cli(monkeypatch, "report", a, b, "--output", "again.html", "--figures", "figures") == 0
    second = (
        Path("figures/gradient-norm.svg").read_text(encoding="utf-8"),
        Path("figures/gradient-norm.png").read_bytes(),
    )
    assert first == second


def test_tables_keep_every_digit(tmp_path: Path) -> None:
    points = [(1234567890123.0, 0.1), (1234569999999.0, 1 / 3), (0.1234567890123, 2.0)]
    [_, _, table] = write_figures([Curve("By compute", "", (Series("a", points),))], tmp_path)
    assert table.read_text(encoding="utf-8").splitlines()[1:] == [
        "a,1234567890123,,0.1,,",
        "a,1234569999999,,0.3333333333333333,,",
        "a,0.1234567890123,,2.0,,",
    ]
    rows = [{"step": step, "reward/mean": 0.5} for step in (1_000_000, 12_345_678)]
    assert write_metrics_csv({"a": rows}, tmp_path / "all.csv").read_text(encoding="utf-8").splitlines()[1:] == [
        "a,1000000,reward/mean,0.5,",
        "a,12345678,reward/mean,0.5,",
    ]


def test_the_command_refuses_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = two_runs(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "pipeline.json").write_text("{}", encoding="utf-8")
    for arguments, words in (
        ([], "no folder"),
        ([tmp_path / "nowhere"], "no such folder"),
        ([a, a], "every run once"),
        ([a, "pipe"], "a pipeline beside other folders"),
        ([a, b, "--output", "no/such.html"], "a folder that does not exist"),
        ([a, "--csv", "pipe"], "a folder"),
        ([a, "--figures", a / "config.toml"], "expected: a folder"),
    ):
        assert run_cli(monkeypatch, "report", *arguments) == 2, arguments
        assert words in re.sub(r"\s+", " ", capsys.readouterr().err), arguments
    monkeypatch.setattr("understudy.cli_report.find_spec", lambda name: None)
    assert run_cli(monkeypatch, "report", a, "--figures", "f") == 2
    assert "understudy[figures]" in capsys.readouterr().err
    assert not Path("comparison.html").exists()
    assert not Path("f").exists()

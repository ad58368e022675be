"""Reports: the values behind the pixels, the escaping, and pages from complete and from incomplete runs."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from understudy.report import (
    Arm,
    RolloutPair,
    Series,
    line_chart,
    token_spans,
    write_comparison,
    write_run_report,
)
from understudy.report import formatting as fmt
from understudy.report.chart_shapes import NORMAL
from understudy.report.charts import MAX_POINTS
from understudy.report.curves import carried_costs
from understudy.report.page import choose_scale, grid, points, series
from understudy.report.run_data import flatten, merge_by_step, read_jsonl
from understudy.report.scales import log_x_axis, nice_ticks
from understudy.report.token_text import align
from understudy.report.tokens import LEVELS, colour_level, reverse_kl, visible_text
from understudy.report.worst_tokens import worst_tokens


def make_rollout(tokens: list[str], text: str | None = None, **changes: Any) -> dict[str, Any]:
    """A stored rollout: the student is sure of every token, the teacher likes each half a nat less."""
    length = len(tokens)
    rollout: dict[str, Any] = {
        "schema_version": 1,
        "step": 0,
        "prompt_index": 17,
        "sample_index": 0,
        "task": "ledger",
        "teacher": "default",
        "prompt_text": "start 3 ; op17 4",
        "prompt_ids": [1, 2],
        "answer": "5",
        "completion_text": " ".join(tokens) if text is None else text,
        "completion_ids": list(range(100, 100 + length)),
        "completion_tokens": tokens,
        "finish_reason": "stop",
        "reward": 1.0,
        "policy_version_start": 0,
        "policy_version_end": 0,
        "sampler_logprobs": [0.0] * length,
        "trainer_logprobs": None,
        "teacher_logprobs": [-0.5 * i for i in range(length)],
        "advantages": None,
        "loss_mask": [True] * length,
        "teacher_topk": None,
        "metadata": {},
    }
    return rollout | changes


class TokenParser(HTMLParser):
    """Collects what a browser would see: attributes of the container, and class and text of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.data: dict[str, str] = {}
        self.tokens: list[tuple[str, str]] = []
        self.open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "tokens" in values.get("class", "").split():
            self.data = values
        elif tag == "b":
            self.tokens.append((values.get("class", ""), ""))
            self.open = True

    def handle_endtag(self, tag: str) -> None:
        self.open = self.open and tag != "b"

    def handle_data(self, data: str) -> None:
        if self.open:
            css, text = self.tokens[-1]
            self.tokens[-1] = (css, text + data)


def parse(markup: str) -> TokenParser:
    parser = TokenParser()
    parser.feed(markup)
    return parser


# --- tokens


@pytest.mark.parametrize(
    ("value", "level"),
    [(0.0, 0), (2.0, LEVELS), (-2.0, -LEVELS), (50.0, LEVELS), (1.0, LEVELS // 2), (None, 0)],
)
def test_colour_is_reverse_kl_over_scale_clipped(value: float | None, level: int) -> None:
    assert colour_level(value, 2.0) == level


def test_infinite_reverse_kl_takes_the_last_shade() -> None:
    rollout = make_rollout(["a"], teacher_logprobs=[-math.inf])
    assert reverse_kl(rollout) == [math.inf]
    assert parse(token_spans(rollout, scale=2.0)).tokens[0][0] == f"p{LEVELS}"


def test_sign_positive_means_the_teacher_dislikes_the_token() -> None:
    rollout = make_rollout(["a", "b"], sampler_logprobs=[-1.0, -3.0], teacher_logprobs=[-3.0, -1.0])
    assert reverse_kl(rollout) == [2.0, -2.0]
    assert [css for css, _ in parse(token_spans(rollout, scale=2.0)).tokens] == [f"p{LEVELS}", f"n{LEVELS}"]


def test_tokens_are_escaped() -> None:
    evil = ["<script>", "alert('x')", '"&amp;']
    topk = {"ids": [[1]] * 3, "tokens": [["</p><script>'"]] * 3, "logprobs": [[-0.1]] * 3}
    spans = token_spans(make_rollout(evil, teacher_topk=topk), scale=1.0, notes={0: "'><script>"})
    assert "<script" not in spans
    parsed = parse(spans)
    assert [text for _, text in parsed.tokens][:3] == evil
    form = json.loads(parsed.data["data-credit"])
    assert form["texts"] == [*evil, "</p><script>'"]
    assert form["notes"] == [{"0": "'><script>"}]


def test_tooltip_data_holds_every_number() -> None:
    topk = {
        "ids": [[7, 8]] * 2,
        "tokens": [["yes", "no"]] * 2,
        "logprobs": [[-0.1054, -2.3026], [0.0, -20.0]],
    }
    rollout = make_rollout(
        ["a", "b"],
        sampler_logprobs=[-0.5, -0.0001],
        teacher_logprobs=[-1.25, None],
        teacher_topk=topk,
        loss_mask=[True, False],
    )
    data = parse(token_spans(rollout, scale=1.0, notes={1: "false step"})).data
    form = json.loads(data["data-credit"])
    # The numbers themselves: test_score_page.py.
    assert (form["texts"], form["ids"], form["lengths"]) == (["a", "b", "yes", "no"], [100, 101, 7, 8], [2])
    assert {"student", "teacher", "trains", "best_count"} <= set(form["columns"])
    # An alternative with probability exp(-20) would print as 0.0 % and is left out.
    assert form["columns"]["best_token"][2] == 3
    assert form["notes"] == [{"1": "false step"}]


def test_notes_underline_their_tokens_and_name_themselves() -> None:
    notes = {0: "false step", 1: "inherited error", 2: "something else"}
    spans = token_spans(make_rollout(["a", "b", "c"], teacher_logprobs=None), scale=1.0, notes=notes)
    assert [css for css, _ in parse(spans).tokens][:3] == ["u1", "u2", "u3"]
    assert "Underlined:" in spans


def test_invisible_tokens_are_made_visible() -> None:
    assert visible_text(" ") == "␣"
    assert visible_text("") == "∅"
    assert visible_text("\n\n") == "↵↵\n"
    assert visible_text("x\n") == "x↵\n"
    assert visible_text(" the") == " the"
    assert visible_text("\x00\u202e") == "⟨U+0000⟩⟨U+202E⟩"


def test_tokens_without_spaces_read_as_separate_words() -> None:
    assert align(["a", "op17", "<end>"], "a op17").gaps == ["", " ", " "]
    assert align(["un", "believ", "able", "cat"], "unbelievable cat").gaps == ["", "", "", " "]
    assert align(["a", "b"], "").gaps == ["", " "]
    spans = token_spans(make_rollout(["a", "op17"]), scale=1.0)
    assert re.sub(r"<[^>]*>", "", spans) == "a op17"


def test_tokens_with_their_own_spaces_are_only_joined() -> None:
    tokens = ["The", " cat", "\n", "\ufffd", " sat"]
    assert align(tokens, "The cat\n🙂 sat").gaps == [""] * 5


def test_one_tab_stop_per_rollout() -> None:
    assert token_spans(make_rollout(["a", "b", "c"]), scale=1.0).count("tabindex") == 1


def test_long_rollouts_are_cut_and_say_so() -> None:
    spans = token_spans(make_rollout(["a"] * 30), scale=1.0, max_tokens=10)
    assert len(parse(spans).tokens) == 10
    assert "20 further tokens" in spans


@pytest.mark.parametrize(
    "changes", [{"teacher_logprobs": None}, {"sampler_logprobs": None}, {"completion_tokens": None}]
)
def test_rollouts_without_some_lists_still_show(changes: dict[str, Any]) -> None:
    assert len(parse(token_spans(make_rollout(["a", "b"], **changes), scale=1.0)).tokens) == 2


def test_empty_rollout_and_bad_scale() -> None:
    assert "no tokens" in token_spans(make_rollout([]), scale=1.0)
    with pytest.raises(ValueError, match="scale: got 0"):
        token_spans(make_rollout(["a"]), scale=0)


def test_scale_ignores_outliers() -> None:
    usual = make_rollout(["a"] * 100, teacher_logprobs=[-0.9] * 99 + [-40.0])
    assert choose_scale([usual]) == 1.0
    assert choose_scale([]) == 2.0


def test_worst_tokens_are_ranked_with_context() -> None:
    topk = {"ids": [[1]] * 4, "tokens": [[" best"]] * 4, "logprobs": [[math.log(0.5)]] * 4}
    rows = worst_tokens([make_rollout(["a", "b", "c", "d"], teacher_topk=topk)], count=2)
    assert [row["token"] for row in rows] == ["d", "c"]
    assert rows[1]["before"] == "a b "
    assert rows[1]["after"] == " d"
    assert rows[1]["reverse_kl"] == "1.00"
    assert (rows[1]["student"], rows[1]["teacher"]) == ("100.0 %", "36.8 %")
    assert rows[1]["choice"] == "␣best (50.0 %)"


# --- charts and numbers


def test_chart_places_known_points() -> None:
    svg = line_chart([Series("a", [(0, 0), (5, 50), (10, 100)])], title="t", x_label="x", y_label="y")
    middle_x, middle_y = (NORMAL.left + NORMAL.right) // 2, (NORMAL.top + NORMAL.bottom) // 2
    path = f"M{NORMAL.left} {NORMAL.bottom}L{middle_x} {middle_y}L{NORMAL.right} {NORMAL.top}"
    assert f'd="{path}"' in svg


def readings(svg: str) -> dict[str, Any]:
    """What the page's script reads out of a chart."""
    found = re.search(r'data-chart="([^"]*)"', svg)
    assert found
    return json.loads(unescape(found[1]))


def test_chart_readings_legend_and_bands() -> None:
    points = [(0.0, 0.25), (10.0, 0.5)]
    series = [Series("greedy <1>", points, [0.02, 0.03]), Series("t1", points)]
    svg = line_chart(series, title="t", x_label="x", y_label="y", percent=True, references=[("teacher", 0.9)])
    found = readings(svg)
    assert (found["x"], found["label"], found["references"]) == (["0", "10"], "x", ["teacher: 90.0 %"])
    assert [(row["name"], row["values"][1]) for row in found["rows"]] == [
        ("greedy <1>", "50.0 % ± 3.0"),
        ("t1", "50.0 %"),
    ]
    assert svg.count('class="band"') == 1
    assert "var(--series-3," in svg
    assert "<1>" not in svg


def test_chart_counts_values_that_are_not_finite() -> None:
    svg = line_chart([Series("a", [(0, 1), (1, math.nan), (2, 2)])], title="t", x_label="x", y_label="y")
    assert "1 values not finite" in svg
    assert "nan" not in svg
    assert "no values" in line_chart([], title="t", x_label="x", y_label="y")


ROUNDING = [(1e40, 0.3), (1e40 + 1e24, 0.1 + 0.2)]  # nothing else lies between them


@pytest.mark.parametrize(
    "points", [[(3.0, 0.0)], [(0.0, 5.0), (1.0, 5.0)], [(0.0, -2.0), (1.0, -1.0)], [(0.0, 0.0)], ROUNDING]
)
@pytest.mark.parametrize("log_x", [False, True])
def test_chart_survives_degenerate_ranges(points: list[tuple[float, float]], log_x: bool) -> None:
    svg = line_chart([Series("a", points)], title="t", x_label="x", y_label="y", log_x=log_x)
    assert "nan" not in svg
    assert "inf" not in svg


def test_long_series_keep_their_spikes() -> None:
    points = [(float(i), 1000.0 if i == 777 else 1.0) for i in range(5000)]
    svg = line_chart([Series("a", points)], title="t", x_label="x", y_label="y")
    found = readings(svg)
    assert len(found["x"]) <= MAX_POINTS
    assert found["rows"][0]["values"][found["x"].index("777")] == "1,000"


def test_log_axis_gives_zero_its_own_place() -> None:
    axis = log_x_axis([0.0, 1e3, 1e5], 0.0, 226.0)
    assert axis.place(0.0) == 0.0
    assert [axis.place(x) for x in (1e3, 1e4, 1e5)] == pytest.approx([26.0, 126.0, 226.0])


def test_ticks_cover_the_data() -> None:
    assert nice_ticks(0.0, 0.93) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(-1.0, 1.0, 4) == [-1.0, -0.5, 0.0, 0.5, 1.0]


def test_magnitudes_that_no_axis_has() -> None:
    rows = [{"step": step, "loss": value} for step, value in enumerate((5e-324, 1e308, -1e308, 10**200, 0.5))]
    assert points(rows, "loss") == [(0.0, 0.0), (1.0, math.inf), (2.0, -math.inf), (3.0, math.inf), (4.0, 0.5)]
    assert "3 values not finite" in line_chart([series(rows, "loss", "a")], title="t", x_label="x", y_label="y")


def test_human_numbers() -> None:
    assert fmt.flops(1.25e15) == "1.25 PFLOP"
    assert fmt.flops(0) == "0 FLOP"
    assert fmt.duration(245) == "4 min 05 s"
    assert fmt.duration(7380) == "2 h 03 min"
    assert fmt.percent(0.4204, 0.016) == "42.0 % ± 1.6"
    assert fmt.number(2e-5) == "2×10⁻⁵"
    assert fmt.number(-1234567) == "−1,234,567"
    assert fmt.number(math.nan) == "not a number"


# --- reading runs


def test_later_rows_of_a_step_win_and_steps_are_sorted() -> None:
    rows = [{"step": 2, "loss": 1.0}, {"step": 0, "loss": 3.0}, {"step": 2, "loss": 0.5}, {"loss": 9.0}]
    assert merge_by_step(rows) == ({"step": 0, "loss": 3.0}, {"step": 2, "loss": 0.5})


def test_half_a_line_is_reported_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "lo')
    assert read_jsonl(path) == ([{"step": 0}], "metrics.jsonl: 1 unreadable lines left out")


def test_secrets_in_a_configuration_stay_hidden() -> None:
    config = {"teacher": {"api_key": "x", "token": "y"}, "sampling": {"max_completion_tokens": 64}}
    assert dict(flatten(config)) == {
        "teacher.api_key": "(hidden)",
        "teacher.token": "(hidden)",
        "sampling.max_completion_tokens": "64",
    }


def test_cost_is_carried_forward() -> None:
    rows = carried_costs([{"step": 0}, {"step": 1, "cost/flops": 5.0}, {"step": 2}])
    assert [row["cost/flops"] for row in rows] == [0.0, 5.0, 5.0]


def test_grid_fills_missing_cells_and_finds_numbers() -> None:
    table = grid([{"Arm": "a", "Greedy": "88.4 % ± 1.6"}, {"Arm": "b", "Note": "cut"}])
    assert table is not None
    assert table.columns == ("Arm", "Greedy", "Note")
    assert table.rows[1]["Greedy"] == "–"
    assert table.numeric == {"Greedy"}


# --- pages


def make_run(folder: Path) -> Path:
    """A complete run directory with two evaluations and rollouts of the first and the last step."""
    (folder / "rollouts").mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {"step": 0, "eval/ledger/greedy": 0.123, "eval/ledger/greedy_se": 0.011, "eval/ledger/t1": 0.1},
        {
            "step": 1,
            "reverse_kl/mean": 0.876,
            "optim/loss": 1.5,
            "time/sampling": 2.0,
            "odd/metric": 4.0,
            "cost/flops": 1e12,
        },
        {
            "step": 2,
            "reverse_kl/mean": 0.043,
            "optim/loss": float("nan"),
            "cost/flops": 2.5e12,
            "eval/ledger/greedy": 0.789,
            "eval/ledger/greedy_se": 0.013,
        },
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "config.toml").write_text('seed = 3\n[student]\nmodel = "tiny"\n[teacher]\napi_key = "hush"\n')
    role = {"tokens": 1500, "flops": 2.5e12, "seconds": 90}
    (folder / "costs.json").write_text(json.dumps({"roles": {"student_sampling": role, "evaluation": role}}))
    for step in (0, 2):
        lines = [json.dumps(make_rollout(["a", f"word{step}"], step=step, prompt_index=i)) for i in range(3)]
        (folder / f"rollouts/step_{step:06d}.jsonl").write_text("\n".join(lines))
    return folder


def assert_self_contained(html: str) -> None:
    assert not re.search(r"<(link|img|iframe|object|embed)\b|@import|url\(", html)
    without = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert re.findall(r"(?:src|href)\s*=\s*(?!\"#)", without) == []
    assert "<script src" not in html


def test_run_report_shows_the_numbers(tmp_path: Path) -> None:
    path = write_run_report(make_run(tmp_path / "ledger-run"))
    assert path == tmp_path / "ledger-run" / "report.html"
    html = path.read_text(encoding="utf-8")
    for text in (
        "ledger-run",
        "12.3 % ± 1.1 → 78.9 % ± 1.3",
        "0.876 → 0.043",
        "2.5 TFLOP",
        "student sampling",
        "1 min 30 s",
        "word0</b>",
        "word2</b>",
        "odd/metric",
        "1 values not finite",
        "Prompt 2, task ledger, expected answer 5",
    ):
        assert text in html, text
    assert "hush" not in html
    assert "Not in this run" not in html
    assert_self_contained(html)


def test_run_report_of_an_empty_directory_says_what_is_missing(tmp_path: Path) -> None:
    html = write_run_report(tmp_path, tmp_path / "elsewhere" / "page.html").read_text(encoding="utf-8")
    for name in ("metrics.jsonl", "config.toml", "costs.json", "rollouts/"):
        assert f"<li>{name}: no s" in html, name
    assert "<h2>" not in html


def test_run_report_survives_broken_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.toml").write_text("not toml [")
    (run / "costs.json").write_text("[1]")
    (run / "rollouts/step_000002.jsonl").write_text("")
    html = write_run_report(run).read_text(encoding="utf-8")
    assert "config.toml: not readable" in html
    assert "costs.json: not readable" in html
    assert "step_000002.jsonl: the file is empty" in html
    assert "word0</b>" in html


@pytest.mark.parametrize(
    "change",
    [
        {"teacher_logprobs": 3},
        {"advantages": [" "]},
        {"trainer_logprobs": "x"},
        {"student_entropy": 1.0},
        {"student_topk": {"ids": [[-1]], "tokens": [["a"]], "logprobs": [[0.0]]}},
        {"completion_ids": [2**32]},
        {"task": []},
        {"reward": "high"},
        {"completion_tokens": [1]},
        {"loss_mask": "x"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_stored_rollouts_of_another_form_are_left_out(change: dict[str, Any], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run / "rollouts" / "step_000002.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | change), *rest]) + "\n")
    assert "rollouts/step_000002.jsonl: 1 unreadable lines left out" in write_run_report(run).read_text()


def test_run_report_refuses_a_path_that_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a directory"):
        write_run_report(tmp_path / "nowhere")


def test_comparison_page(tmp_path: Path) -> None:
    def rows(last: float) -> list[dict[str, Any]]:
        return [
            {"step": 0, "eval/ledger/greedy": 0.2, "eval/ledger/t1": 0.1},
            {"step": 9, "eval/ledger/greedy": last, "eval/ledger/t1": 0.4, "cost/flops": 1e12},
        ]

    arms = [
        Arm("distilled", rows(0.9), "marks for every token"),
        Arm("imitated", rows(0.6)),
        Arm("the teacher", [{"step": 0, "eval/ledger/greedy": 0.95}], reference=True),
    ]
    pair = RolloutPair(make_rollout(["a", "wrong"]), make_rollout(["a", "right"]), {1: "false step"})
    page = write_comparison(
        arms,
        tmp_path / "index.html",
        title="Arms <compared>",
        intro="First.\n\nSecond.",
        table=[{"Arm": "distilled", "Greedy": "90.0 %"}],
        verdict="It works.",
        commands=[("Run it", "understudy distill run.toml && echo 'done'")],
        before_after=[pair],
        footnotes=["A note."],
    ).read_text(encoding="utf-8")
    assert page.index("It works.") < page.index("First.") < page.index("<h2>Results") < page.index("<h2>Curves")
    # Greedy and T = 1, each against steps and against compute.
    assert page.count('<svg class="chart"') == 4
    assert page.count("the teacher: 95.0 %") == 2
    assert "Arms &lt;compared&gt;" in page
    assert "understudy distill run.toml &amp;&amp; echo &#39;done&#39;" in page
    assert ">wrong</b>" in page
    assert "A note." in page
    assert_self_contained(page)


def test_comparison_refuses_two_arms_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every name once"):
        write_comparison(
            [Arm("a", []), Arm("a", [])],
            tmp_path / "x.html",
            title="",
            intro="",
            table=[],
            verdict="",
            commands=[],
        )


def test_two_hundred_rollouts_stay_below_two_megabytes(tmp_path: Path) -> None:
    words = [" the", " sum", "12", "\n", " therefore", "=", " of", " is"]
    tokens = [words[i * 5 % 8] for i in range(256)]
    values = [-0.137 * (i % 11) for i in range(256)]
    rollout = make_rollout(
        tokens,
        "".join(tokens),
        sampler_logprobs=values,
        teacher_logprobs=values[::-1],
        completion_ids=[31415] * 256,
    )
    path = write_comparison(
        [],
        tmp_path / "big.html",
        title="big",
        intro="",
        table=[],
        verdict="",
        commands=[],
        before_after=[RolloutPair(rollout, rollout)] * 100,
    )
    assert path.stat().st_size < 2_000_000
    assert path.read_text(encoding="utf-8").count(" therefore</b>") >= 200

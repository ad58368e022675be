import pytest

from understudy.experiments.claims.c3_one_prompt import Settings, analyse


def measured(t1: float, **more: float) -> dict[str, float | None]:
    return {"t1": t1, "greedy": t1 / 2, "recovery": 0.5, "facts": None, **more}


def record(one: list[float], *, many: float, control: float = 0.4) -> dict:
    costs = {"flops": 2e9, "teacher_sampling": 1e9}

    def runs(*scores: float) -> list[dict]:
        return [measured(score, own=0.9, **costs) for score in scores]

    return {
        "start": measured(0.3),
        "teacher": measured(1.0),
        "statements": [4, 5],
        "arms": {
            "one-prompt": runs(*one),
            "one-prompt-rl": runs(control),
            "one-prompt-sft": runs(control, control),
            "256-prompts": [measured(many, **costs)],
            "64-prompts": [measured(many - 0.1, **costs)],
        },
    }


def test_it_holds_where_four_fifths_of_the_gap_are_closed() -> None:
    finding = analyse([record([0.88, 0.92], many=0.95)] * 3)
    assert finding.verdict == "holds"
    # (0.9 - 0.3) / (1.0 - 0.3) and (0.9 - 0.3) / (0.95 - 0.3)
    assert finding.numbers["share_of_gap"].mean == pytest.approx(6 / 7)
    assert finding.numbers["share_of_gain"].mean == pytest.approx(12 / 13)
    # (0.95 - 0.3) / (1.0 - 0.3)
    assert finding.numbers["share_of_gap_256_prompts"].mean == pytest.approx(13 / 14)
    assert "is the limit" not in finding.text
    # Halved, all shares stay and the gain does not.
    assert finding.numbers["greedy"]["share_of_gap"].mean == pytest.approx(6 / 7)
    assert finding.numbers["greedy"]["gain"].mean == pytest.approx(0.3)
    # RL ran on the first problem alone, SFT on both.
    assert finding.numbers["lead_over_rl"].mean == pytest.approx(0.88 - 0.4)
    assert finding.numbers["lead_over_sft"].mean == pytest.approx(0.90 - 0.4)
    assert finding.numbers["64_minus_256_prompts"].mean == pytest.approx(-0.1)
    assert finding.numbers["spread_within"] == pytest.approx(0.02 * 2**0.5)
    assert finding.numbers["spread_between"] == pytest.approx(0, abs=1e-12)
    assert (finding.numbers["lowest"], finding.numbers["highest"]) == (0.88, 0.92)


def test_more_than_half_of_what_many_problems_give_is_the_direction() -> None:
    finding = analyse([record([0.65], many=0.9), record([0.66], many=0.9), record([0.67], many=0.9)])
    assert finding.verdict == "direction only"
    # 0.35, 0.36 and 0.37 of 0.6: mean 0.6, standard error 0.01 / 0.6 / sqrt(3), and t = 4.303 for two degrees.
    share = finding.numbers["share_of_gain"]
    assert share.mean == pytest.approx(0.6)
    assert share.low == pytest.approx(0.6 - 4.303 * 0.009623, abs=1e-4)
    assert finding.numbers["gain"].mean == pytest.approx(0.36)


@pytest.mark.parametrize("one", [[0.45], [0.2]])
def test_less_is_not_the_claim(one: list[float]) -> None:
    finding = analyse([record(one, many=0.9)] * 3)
    assert finding.verdict == "does not hold here"


@pytest.mark.parametrize(("many", "limit"), [(0.9, "so that the one problem is"), (0.8, "5,120 solutions is")])
def test_the_control_says_what_the_limit_is(many: float, limit: str) -> None:
    # 6 / 7 of the gap is above 0.8, 5 / 7 is not.
    assert f"{limit} the limit" in analyse([record([0.6], many=many)] * 3).text


def test_a_share_of_no_gain_counts_as_nothing() -> None:
    finding = analyse([record([0.4], many=0.25)] * 3)
    assert finding.numbers["share_of_gain"].mean == 0
    assert finding.verdict == "does not hold here"


def test_pipelines_that_disagree_decide_nothing() -> None:
    finding = analyse([record([0.9], many=0.9), record([0.4], many=0.9), record([0.9], many=0.9)])
    assert finding.verdict == "does not hold here"


def test_the_table_has_a_row_per_arm_and_shows_missing_shares_as_a_dash() -> None:
    table = {row["arm"]: row for row in analyse([record([0.88, 0.92], many=0.95)] * 2).table}
    assert len({tuple(row) for row in table.values()}) == 1
    assert table["one-prompt"]["runs"] == "4"
    assert table["one-prompt"]["accuracy"] == "0.900"
    assert table["one-prompt"]["lowest to highest"] == "0.880 to 0.920"
    assert table["one-prompt"]["facts"] == "–"
    assert table["256-prompts"]["on its own problem"] == "–"
    assert table["one-prompt-sft"]["GFLOP"] == "2"


def test_how_many_runs_an_arm_makes() -> None:
    arms = ("one-prompt", "one-prompt-rl", "one-prompt-sft", "256-prompts")
    assert [Settings().num_prompts(arm) for arm in arms] == [5, 2, 2, 1]

"""C2's analysis on records made by hand."""

from __future__ import annotations

import math

import pytest

from understudy.experiments.claims.c2_dense_signal import ARMS, analyse


def record(distill_steps: float, *, rl_end: float = 0.8, control: float = 0.2) -> dict:
    """RL ends at ``rl_end`` = 0.8: the level is 0.76, halfway between its measurements at 80 (0.72) and 160, so at 120.
    Distillation is a straight line from the start's 0.2 that reaches the level at ``distill_steps``."""

    def entry(accuracy: list, flops: float) -> dict:
        return {"accuracy": accuracy, "flops": flops, "greedy": 0.5, "recovery": None, "facts": 0.9}

    own = [[0, 0.2], [40, 0.2 + 0.56 * 40 / distill_steps]]
    flat = [[0, 0.2], [40, control]]
    arms = {
        "rl": entry([[0, 0.2], [80, rl_end - 0.08], [160, rl_end]], 1600.0),
        "distill": entry(own, 500.0),
        "distill-sampled": entry([[0, 0.2], [40, 0.6]], 500.0),
        "sft": entry([[0, 0.2], [20, 0.76], [40, 0.78]], 300.0),
        "shuffled-teacher": entry(flat, 500.0),
        "teacher-free": entry(flat, 400.0),
    }
    assert set(arms) == set(ARMS)
    return {"arms": arms, "samples_flops": 2e9}


def test_holds_if_steps_are_seven_times_fewer() -> None:
    # 120 / 12 and 120 / 13.3...: the geometric mean is sqrt(10 * 9).
    finding = analyse([record(12), record(40 / 3)])
    assert finding.verdict == "holds"
    assert finding.numbers["steps: rl / distill"].mean == pytest.approx(math.sqrt(90))
    # RL 1600 * 120 / 160 = 1200; distillation 12.5 a step: 150 and 166.7.
    assert finding.numbers["flops: rl / distill"].mean == pytest.approx(math.sqrt(1200 / 150 * 1200 / (500 / 3)))
    assert finding.numbers["flops: rl / (rl and distill)"].mean == pytest.approx(
        math.sqrt(1200 / 1750 * 1200 / (1600 + 500 / 3))
    )
    assert finding.numbers["steps: rl / sft"].mean == pytest.approx(6)
    assert finding.numbers["rl_gain"].mean == pytest.approx(0.6)
    assert finding.numbers["distill-sampled - teacher-free"].mean == pytest.approx(0.4)


def test_direction_only_if_steps_are_fewer() -> None:
    finding = analyse([record(30), record(30)])
    assert finding.verdict == "direction only"
    assert finding.numbers["steps: rl / distill"].mean == pytest.approx(4)


def test_a_run_that_never_reaches_the_level_counts_as_one() -> None:
    # Three ratios of 10 and two of 1.
    finding = analyse([record(12)] * 3 + [record(50)] * 2)
    assert finding.numbers["steps: rl / distill"].mean == pytest.approx(10**0.6)
    assert finding.numbers["level reached"]["distill"] == 3
    assert finding.numbers["level reached"]["distill-sampled"] == 0
    # The interval reaches below 1: log10 0.6 - 2.776 * sqrt(0.3 / 5) = -0.08.
    assert finding.verdict == "does not hold here"
    row = next(row for row in finding.table if row["arm"] == "distill")
    assert row["steps to the level"] == "12; not in 40 steps in 2 of 5"


def test_a_run_that_never_reaches_the_level_counts_with_its_whole_cost_if_rl_is_cheaper() -> None:
    # RL is at 0.76 after 10 of its 160 steps: 100 of 1600 FLOPs. The arm's whole run: 40 steps, 500 FLOPs.
    quick = record(50)
    quick["arms"]["rl"]["accuracy"] = [[0, 0.2], [10, 0.76], [160, 0.8]]
    finding = analyse([quick] * 2)
    assert finding.numbers["steps: rl / distill"].mean == pytest.approx(10 / 40)
    assert finding.numbers["flops: rl / distill"].mean == pytest.approx(100 / 500)
    assert finding.numbers["flops: rl / (rl and distill)"].mean == pytest.approx(100 / 2100)
    # SFT does reach it, at 20.
    assert finding.numbers["steps: rl / sft"].mean == pytest.approx(10 / 20)


def test_does_not_hold_if_a_control_does_as_well() -> None:
    assert analyse([record(12, control=0.6), record(13, control=0.6)]).verdict == "does not hold here"


def test_does_not_hold_if_rl_taught_nothing() -> None:
    finding = analyse([record(12, rl_end=0.2), record(12, rl_end=0.2)])
    assert finding.verdict == "does not hold here"
    assert "nothing to match" in finding.text
    assert finding.numbers["steps: rl / distill"].mean == 1

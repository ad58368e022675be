"""C7's scores on one solution made by hand, and its analysis on records made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from understudy.experiments.claims.c7_forking_tokens import (
    SCORES,
    Marked,
    analyse,
    auc,
    aucs,
    kind_of,
    largest,
    means,
    notes,
    other_tokens,
)
from understudy.types import Prompt, Rollout, ScoredRollout
from understudy.worlds.ledger import Ledger

TABLES = Ledger(num_items=4, num_ops=3)


def wrong_solution() -> Marked:
    """A false first value, repeated at the statement, then two operations that follow from it."""
    tables = TABLES.tables
    right = int(tables[0, 4])
    wrong = (right + 1) % 10
    third = int(tables[1, wrong])
    text = f"a op1 {wrong} b @ {wrong} c op2 {third} d op3 {tables[2, third]}"
    prompt = f"4 | a op1 b @{right} c op2 d op3 =>"
    penalty = [0.0] * 13
    penalty[2], penalty[5], penalty[8], penalty[11] = 5.0, 9.0, -0.1, 0.3
    rollout = Rollout(Prompt(0, [0], prompt), [0] * 13, [0.0] * 13, "stop", 0, 0)
    scores = dict.fromkeys(SCORES, penalty) | {"position": [float(t) for t in range(13)]}
    return Marked(ScoredRollout(rollout, None, None), text, TABLES.diagnose(prompt, text), scores)


def test_auc_counts_pairs_and_half_of_ties() -> None:
    # 2 beats 1 and ties with 2, 3 beats both: 3.5 of 4.
    assert auc([2.0, 3.0], [1.0, 2.0]) == pytest.approx(0.875)
    assert auc([], [1.0]) is None
    assert auc([1.0], []) is None


def test_one_solution() -> None:
    one = wrong_solution()
    kinds = [kind_of(step, one.first_wrong) for step in one.steps]
    assert kinds == ["first false", "statement not followed", "consistent", "consistent"]
    assert notes(one.steps) == {"2": "false step", "5": "false step", "8": "inherited error", "11": "inherited error"}
    assert other_tokens(one) == [0, 1, 3, 4, 6, 7, 9, 10, 12]
    false = aucs([one], lambda step, _: step.false_in_itself)
    assert false["penalty"] == 1.0
    assert false["position"] == 1.0  # early values are the false ones: the direction that does better
    # 5 against 9, -0.1 and 0.3.
    assert aucs([one], lambda step, own: step is own.first_wrong)["penalty"] == pytest.approx(2 / 3)
    # The zeros of nine other tokens are negatives, too: all are below 5 and 9.
    assert aucs([one], lambda step, _: step.false_in_itself, all_tokens=True)["penalty"] == 1.0
    assert largest([one], "penalty") == {"first": 0.0, "false": 1.0}
    found = means([(one, 8), (one, 11), (one, 2)])
    assert found["count"] == 3
    assert found["penalty"] == pytest.approx(5.2 / 3)
    assert found["above_zero"] == pytest.approx(5.3)
    assert found["within_half_a_nat"] == pytest.approx(2 / 3)


def test_a_false_value_that_is_right_by_luck_counts_as_false() -> None:
    tables = TABLES.tables
    right = int(tables[0, 4])
    wrong = (right + 1) % 10
    true = int(tables[1, right])
    assert true != tables[1, wrong]
    # The third value does not follow from the stated one, which was not followed, but is the true one.
    prompt = f"4 | a op1 b @{right} c op2 d op3 =>"
    steps = TABLES.diagnose(prompt, f"a op1 {wrong} b @ {wrong} c op2 {true} d op3 {tables[2, true]}")
    kinds = [kind_of(step, steps[0]) for step in steps]
    assert kinds == ["first false", "statement not followed", "false, but right by luck", "right"]
    assert notes(steps) == {"2": "false step", "5": "false step", "8": "false step"}
    one = replace(wrong_solution(), steps=steps)
    assert largest([one], "penalty")["false"] == 1.0
    # 5, 9 and -0.1 against the 0.3 of the one right value.
    assert aucs([one], lambda step, _: step.false_in_itself)["penalty"] == pytest.approx(2 / 3)


def record(*, surprise: float = 0.8, consistent: float = -0.1, first: float = 12.0) -> dict[str, Any]:
    """The penalty's AUC is 0.95, the other baselines' are 0.7."""

    def kind(penalty: float, above: float) -> dict[str, Any]:
        others = dict.fromkeys(("surprise", "entropy", "position", "reverse_kl"), 1.0)
        return {"count": 10, "penalty": penalty, **others, "above_zero": above, "within_half_a_nat": 0.5}

    areas = dict.fromkeys(SCORES, 0.7) | {"penalty": 0.95, "surprise": surprise}
    return {
        "solutions": 20,
        "with_an_error": 10,
        "right_at_the_end": 8,
        "auc": {what: dict(areas) for what in ("false", "first", "false, all tokens")},
        "kinds": {
            "first false": kind(first, 60.0),
            "later false": kind(13.0, 15.0),
            "false, but right by luck": kind(13.0, 5.0),
            "consistent": kind(consistent, 5.0),
            "right": kind(0.0, 10.0),
        },
        "final": kind(consistent, 1.0),
        "other_tokens": kind(0.1, 5.0),
        "largest": {name: {"first": 0.25, "false": 0.75} for name in SCORES},
        "by_distance": {
            "right": [[-1, 0.0, 9], [1, 2.0, 3]],
            "consistent": [[1, -0.1, 4]],
            "false in itself": [[0, first, 10]],
        },
    }


def test_holds() -> None:
    finding = analyse([record(), record()])
    assert finding.verdict == "holds"
    assert finding.numbers["AUC lead, false"]["surprise"].mean == pytest.approx(0.15)
    assert finding.numbers["AUC lead, false"]["entropy"].mean == pytest.approx(0.25)
    assert finding.numbers["penalty, first false - consistent"].mean == pytest.approx(12.1)
    # 80 of 60 + 15 + 5 + 5 + 10 + 5, the first three of them on false values.
    assert finding.numbers["share of penalty on false values"].mean == pytest.approx(0.8)
    assert finding.numbers["largest is the first"].mean == pytest.approx(0.25)
    assert finding.charts[0].series[2].points == [(-1, 0.0), (1, 2.0)]


def test_direction_only_if_a_baseline_is_as_good_or_consistent_values_are_punished() -> None:
    assert analyse([record(surprise=0.96), record(surprise=0.96)]).verdict == "direction only"
    assert analyse([record(consistent=0.6), record(consistent=0.6)]).verdict == "direction only"


def test_does_not_hold_if_first_errors_are_not_punished_more() -> None:
    assert analyse([record(first=-0.2), record(first=-0.2)]).verdict == "does not hold here"


def test_without_errors_nothing_is_judged() -> None:
    empty = record() | {"kinds": {}, "final": {"penalty": None}}
    assert analyse([record(), empty]).ours == "not judged"

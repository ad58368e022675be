"""C10's analysis on records made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from understudy.experiments.claims.c10_mode_seeking import ARMS, analyse, commoner, mean_entropy


def record(
    *, left: float = 0.6, route: float = 0.67, tokens: float = 0.15, whole: float = 0.1, whole_left: float = 0.98
) -> dict[str, Any]:
    """``left``, ``route`` and ``tokens`` are those of the reverse KL, ``whole`` and ``whole_left`` route entropy and
    left share of "whole solution"; others go left in 60% of cases, with route entropy 0.67 and token entropy 0.2."""

    def model(**own: float | None) -> dict[str, Any]:
        usual = {"route_entropy": 0.67, "token_entropy": 0.2, "left": 0.6, "right": 0.4, "greedy": 0.95}
        passes = {"pass@1": 0.9, "pass@2": 0.95, "pass@4": 0.97, "pass@8": 0.99}
        return {**usual, **passes, "right_left": 0.95, "right_right": 0.85, **own}

    models = {name: model() for name in ("teacher", "start", *ARMS)}
    models["reverse KL"] = model(left=left, right=1 - left, route_entropy=route, token_entropy=tokens)
    models["whole solution"] = model(left=whole_left, right=1 - whole_left, route_entropy=whole, right_right=None)
    models["whole solution"]["pass@8"] = 0.96
    return {
        "models": models,
        "curves": {arm: {"accuracy": [[0, 0.3], [40, 0.9]], "left": [[0, 0.5], [40, 0.6]]} for arm in ARMS},
    }


def test_entropy_of_distributions() -> None:
    uniform, certain = torch.full((4,), 0.25).log(), torch.tensor([0.0, -200.0, -200.0, -200.0])
    assert mean_entropy(torch.stack([uniform, certain])) == pytest.approx(math.log(4) / 2)


def test_the_commoner_route_may_be_either() -> None:
    assert commoner(record(left=0.3), "reverse KL") == pytest.approx(0.7)


def test_holds_if_one_route_dominates_in_both_forms() -> None:
    finding = analyse([record(left=0.95, route=0.2)] * 2)
    assert finding.verdict == "holds"
    assert finding.numbers["route entropy, reverse - forward KL"].mean == pytest.approx(-0.47)
    assert finding.numbers["token entropy, reverse - forward KL"].mean == pytest.approx(-0.05)
    assert finding.numbers["commoner route, reverse KL"].mean == pytest.approx(0.95)


def test_direction_only_if_it_dominates_over_whole_solutions_alone() -> None:
    finding = analyse([record()] * 2)
    assert finding.verdict == "direction only"
    assert finding.numbers["route entropy, whole solution - forward KL"].mean == pytest.approx(-0.57)
    assert finding.numbers["commoner route, whole solution"].mean == pytest.approx(0.98)
    assert finding.numbers["pass@8, whole solution - sampled"].mean == pytest.approx(-0.03)
    rows = {row["arm"]: row for row in finding.table}
    assert rows["whole solution"]["right of those that go right"] == "none written"


def test_does_not_hold_if_no_route_dominates_over_whole_solutions() -> None:
    # The entropy of tokens falls here, and a route dominates token by token: neither is enough.
    assert analyse([record(left=0.95, route=0.2, whole_left=0.85)] * 2).verdict == "does not hold here"
    assert analyse([record(whole=0.67), record(whole=0.7)]).verdict == "does not hold here"


def test_the_explanation_also_asks_for_the_route_known_better() -> None:
    borne_out = analyse([record()] * 2)
    assert borne_out.numbers["route entropy, whole solution - sampled"].mean == pytest.approx(-0.57)
    assert borne_out.numbers["P(left), whole solution - sampled"].mean == pytest.approx(0.38)
    assert "it is borne out" in borne_out.text
    right = analyse([record(whole_left=0.02)] * 2)
    assert right.verdict == "direction only"
    assert right.numbers["P(left), whole solution - sampled"].mean == pytest.approx(-0.58)
    assert "it is not borne out" in right.text

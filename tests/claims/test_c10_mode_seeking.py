"""C10's analysis on records made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from understudy.experiments.claims.c10_mode_seeking import ARMS, analyse, commoner, mean_entropy


def record(*, left: float = 0.6, route: float = 0.67, tokens: float = 0.15, whole: float = 0.1) -> dict[str, Any]:
    """``left``, ``route`` and ``tokens`` are those of the reverse KL; others go left in 60% of cases, with route
    entropy 0.67 and token entropy 0.2. ``whole``: the route entropy of "whole solution", which never goes right."""

    def model(**own: float | None) -> dict[str, Any]:
        usual = {"route_entropy": 0.67, "token_entropy": 0.2, "left": 0.6, "right": 0.4, "greedy": 0.95}
        passes = {"pass@1": 0.9, "pass@2": 0.95, "pass@4": 0.97, "pass@8": 0.99}
        return {**usual, **passes, "right_left": 0.95, "right_right": 0.85, **own}

    models = {name: model() for name in ("teacher", "start", *ARMS)}
    models["reverse KL"] = model(left=left, right=1 - left, route_entropy=route, token_entropy=tokens)
    models["whole solution"] = model(left=1.0, right=0.0, route_entropy=whole, right_right=None)
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


def test_holds_if_one_route_dominates() -> None:
    finding = analyse([record(left=0.95, route=0.2)] * 2)
    assert finding.verdict == "holds"
    assert finding.numbers["route entropy, reverse - forward KL"].mean == pytest.approx(-0.47)
    assert finding.numbers["token entropy, reverse - forward KL"].mean == pytest.approx(-0.05)
    assert finding.numbers["commoner route, reverse KL"].mean == pytest.approx(0.95)


def test_direction_only_if_entropy_falls_and_the_routes_stay() -> None:
    finding = analyse([record()] * 2)
    assert finding.verdict == "direction only"
    assert finding.numbers["route entropy, whole solution - sampled"].mean == pytest.approx(-0.57)
    assert finding.numbers["pass@8, whole solution - sampled"].mean == pytest.approx(-0.03)
    assert "It does:" in finding.text
    rows = {row["arm"]: row for row in finding.table}
    assert rows["whole solution"]["right of those that go right"] == "none written"


def test_does_not_hold_if_no_entropy_falls() -> None:
    finding = analyse([record(tokens=0.2, whole=0.67), record(tokens=0.25, whole=0.7)])
    assert finding.verdict == "does not hold here"
    assert "It does not do so clearly:" in finding.text

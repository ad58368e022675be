"""C8's analysis on records made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from understudy.experiments.claims.c8_prefixes import ARMS, Settings, analyse, matched
from understudy.worlds.ledger import Ledger


def record(
    *, whole: float = 0.7, first: float = 0.65, last: float = 0.3, stop_steps: float = 0.65, stop_flops: float = 0.7
) -> dict[str, Any]:
    """The start has 0.2, of whose eight items' faults a quarter each lie in the first two and the last two."""

    def entry(t1: float, step: int = 40, flops: float = 100.0, tokens: float = 55.0) -> dict[str, Any]:
        habits = {"greedy": t1 / 2, "recovery": 0.5, "facts": None}
        by_item = {"right": [0.5] * 8, "faults": [0.1] * 8}
        return {"t1": t1, **habits, **by_item, "step": step, "flops": flops, "tokens": tokens}

    stop_25 = {"steps": entry(stop_steps, 40, 57, 14), "flops": entry(stop_flops, 70, 99, 25)}
    stop_50 = {"steps": entry(0.66, 40, 72, 28), "flops": entry(0.7, 55, 99, 38), "tokens": entry(0.72, 80, 144, 55)}
    arms = {"first-25": first, "first-50": 0.68, "last-50": 0.5, "last-25": last, "whole": whole}
    return {
        "start": entry(0.2),
        "arms": {arm: entry(t1) for arm, t1 in arms.items()},
        "stops": {"stop-25": stop_25 | {"tokens": entry(0.75, 155, 220, 54)}, "stop-50": stop_50},
    }


def test_holds_if_the_first_part_carries_the_gain() -> None:
    finding = analyse([record()] * 2)
    assert finding.verdict == "holds"
    assert finding.numbers["gain"].mean == pytest.approx(0.5)
    assert finding.numbers["first-25 - last-25"].mean == pytest.approx(0.35)
    # 0.45 kept, 0.8 * 0.5 asked for.
    assert finding.numbers["gain of stop-25 - 0.8 gain of whole"].mean == pytest.approx(0.05)
    assert finding.numbers["stop-25 - whole, equal flops"].mean == pytest.approx(0)
    # Halved, all four numbers halve.
    greedy = finding.numbers["greedy"]
    assert greedy["gain"].mean == pytest.approx(0.25)
    assert greedy["first-25 - last-25"].mean == pytest.approx(0.175)
    assert greedy["gain of stop-25 - 0.8 gain of whole"].mean == pytest.approx(0.025)
    assert greedy["stop-25 - whole, equal flops"].mean == pytest.approx(0)
    assert finding.numbers["shares of the gain"]["first-25"] == pytest.approx(0.9)
    assert finding.numbers["shares of the gain"]["last-25"] == pytest.approx(0.2)
    assert finding.numbers["differences to whole"]["stop-25, equal tokens"].mean == pytest.approx(0.05)
    assert "57% of the FLOPs" in finding.text
    assert "faults 25% lie in the first quarter of the items, 25% in the last" in finding.text


@pytest.mark.parametrize(
    "changed",
    [
        {"stop_steps": 0.5},  # first beats last, but 0.3 is less than 0.4
        {"stop_flops": 0.6},  # kept, but the same FLOPs buy more with whole solutions
        {"last": 0.66},  # prefixes are enough, and suffixes too
    ],
)
def test_direction_only_if_one_part_fails(changed: dict[str, float]) -> None:
    assert analyse([record(**changed)] * 2).verdict == "direction only"


@pytest.mark.parametrize(
    "changed",
    [{"last": 0.66, "stop_steps": 0.5}, {"last": 0.66, "stop_flops": 0.6}, {"whole": 0.2}],
)
def test_does_not_hold_otherwise(changed: dict[str, float]) -> None:
    assert analyse([record(**changed)] * 2).verdict == "does not hold here"


def test_an_uncertain_order_is_no_order() -> None:
    # first - last: 0.35 and -0.05.
    records = [record(stop_steps=0.5), record(last=0.7, stop_steps=0.5)]
    assert analyse(records).verdict == "does not hold here"


def test_a_loss_within_the_margin_is_none() -> None:
    assert analyse([record(stop_flops=0.685)] * 2).verdict == "holds"
    assert analyse([record(stop_flops=0.675)] * 2).verdict == "direction only"


def test_an_uncertain_price_does_not_pass() -> None:
    # stop - whole at equal FLOPs: 0.05 and -0.05.
    finding = analyse([record(stop_flops=0.75), record(stop_flops=0.65)])
    assert finding.numbers["stop-25 - whole, equal flops"].mean == pytest.approx(0)
    assert finding.verdict == "direction only"


def test_the_chart_sets_early_stops_at_their_mean_price() -> None:
    cheap, dear = record(), record()
    dear["stops"]["stop-25"]["steps"] |= {"flops": 59.0, "t1": 0.69}
    line = analyse([cheap, dear]).charts[1].series[1]
    assert line.name == "stop-25"
    assert line.points[:2] == [(0.0, pytest.approx(0.2)), (pytest.approx(0.58), pytest.approx(0.67))]


def test_each_budget_of_an_early_stop_is_an_arm() -> None:
    stops = {f"stop-{share}-{budget}" for share in (25, 50) for budget in ("steps", "flops", "tokens")}
    assert set(ARMS) == stops | {"whole", "first-25", "first-50", "last-50", "last-25"}
    assert len(ARMS) == 11


def test_matched_steps() -> None:
    bench: Any = SimpleNamespace(world=SimpleNamespace(tables=Ledger()))
    # 14 of 55 tokens behind 39: 40 * 94 / 53 = 70.9 and 40 * 55 / 14 = 157.1.
    assert matched(bench, Settings(), "stop-25") == {"steps": 40, "flops": 70, "tokens": 155}
    # 28: 40 * 94 / 67 = 56.1 and 40 * 55 / 28 = 78.6.
    assert matched(bench, Settings(), "stop-50") == {"steps": 40, "flops": 55, "tokens": 80}

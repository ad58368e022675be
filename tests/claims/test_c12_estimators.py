"""C12's measures on gradients made by hand, and its analysis on records made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from understudy.experiments.claims.c12_estimators import ARMS, analyse, compare, expected_product


def test_products_leave_out_a_batch_with_itself() -> None:
    # (1, 0) and (3, 0): of the four products only 1 * 3 and 3 * 1 count.
    draws = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert expected_product(draws, draws) == pytest.approx(3.0)
    # Three draws against others: (1*5 + 1*6 + 2*4 + 2*6 + 3*4 + 3*5) / 6.
    left, right = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0], [5.0], [6.0]])
    assert expected_product(left, right) == pytest.approx(58 / 6)


def test_comparison_with_the_full_gradient() -> None:
    found = compare(torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [2.0]]))
    assert found == pytest.approx(
        {"signal": 3.0, "noise": 2.0, "full_signal": 4.0, "overlap": 4.0, "bias": -1.0, "batch_cosine": 1.0}
    )


def record(*, discount: float = 0.5, noise: float = 16.0, baseline: float = 12.0, bias: float = 0.0) -> dict[str, Any]:
    """Signal 2 throughout; ``noise`` is that of sampled, ``baseline`` the baseline's, and full's is 2. ``discount``:
    the last accuracy of both discounts, where sampled has 0.6. ``bias``: of sampled."""
    noises = dict.fromkeys(ARMS, 2.0) | {"sampled": noise, "baseline": baseline}
    noises |= {"discount 0.5": 32.0, "discount 1": 400.0}
    last = dict.fromkeys(ARMS, 0.7) | {"sampled": 0.6, "discount 0.5": discount, "discount 1": discount}

    def gradient(arm: str) -> dict[str, float]:
        own = bias if arm == "sampled" else 0.0
        fixed = {"signal": 2.0, "full_signal": 2.0, "overlap": 1.8, "batch_cosine": 0.5}
        return {**fixed, "noise": noises[arm], "bias": own}

    return {
        "gradients": {arm: gradient(arm) for arm in ARMS},
        "arms": {arm: {"accuracy": [[0, 0.3], [40, last[arm]]], "flops": 1e9} for arm in ARMS},
    }


def test_holds() -> None:
    finding = analyse([record(), record()])
    assert finding.verdict == "holds"
    assert finding.numbers["SNR"]["sampled"].mean == pytest.approx(0.125)
    assert finding.numbers["SNR ratio"]["full / sampled"].mean == pytest.approx(8.0)
    assert finding.numbers["SNR ratio"]["baseline / sampled"].mean == pytest.approx(4 / 3)
    assert finding.numbers["SNR ratio"]["discount 1 / sampled"].mean == pytest.approx(0.04)
    assert finding.numbers["accuracy - sampled"]["discount 1"].mean == pytest.approx(-0.1)
    row = {row["arm"]: row for row in finding.table}["sampled"]
    assert row["noise / that of full"] == "8.0"
    assert row["cosine of the expected gradient with that of full"] == "0.90"


def test_ratios_are_geometric_means() -> None:
    finding = analyse([record(noise=4.0), record(noise=16.0)])
    assert finding.numbers["SNR ratio"]["full / sampled"].mean == pytest.approx(4.0)


def test_direction_only_with_a_bias_or_a_useless_baseline() -> None:
    assert analyse([record(bias=0.2)] * 2).verdict == "direction only"
    assert analyse([record(baseline=17.0)] * 2).verdict == "direction only"


def test_direction_only_if_a_gain_of_a_discount_is_not_ruled_out() -> None:
    # Differences -0.01 and 0.02: 0.005 with an interval far above 0.03.
    finding = analyse([record(discount=0.59), record(discount=0.62)])
    assert finding.numbers["accuracy - sampled"]["discount 1"].high == pytest.approx(0.005 + 12.706 * 0.015, abs=1e-4)
    assert finding.verdict == "direction only"


def test_does_not_hold_if_sampled_is_as_quiet_or_a_discount_helps() -> None:
    assert analyse([record(noise=2.0)] * 2).verdict == "does not hold here"
    assert analyse([record(discount=0.65)] * 2).verdict == "does not hold here"


def test_a_signal_that_noise_has_drowned_counts_as_the_lowest() -> None:
    drowned = record()
    drowned["gradients"]["discount 1"]["signal"] = -3.0
    finding = analyse([drowned, drowned])
    assert finding.numbers["SNR"]["discount 1"].mean == pytest.approx(1e-3)
    assert {row["arm"]: row for row in finding.table}["discount 1"][
        "cosine of the expected gradient with that of full"
    ] == "unknown"

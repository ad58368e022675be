import math
from typing import Any

import pytest

from understudy.experiments.claims.c5_self_training import ARMS, BACK, PRACTICAL, SELF_RATES, analyse


def state(kl: float, instructions: float, old: float = 1.0) -> dict[str, Any]:
    shares = {"instructions": instructions, "old": old}
    return {"kl": kl, "scores": {task: {"greedy": share, "t1": share} for task, share in shares.items()}}


def records(lost: float = 0.05) -> list[dict[str, Any]]:
    """Three pipelines. Fine-tuning: KL is the squared rate, and ``lost`` of the instructions go. Distillation: none go,
    KL is a hundredth of that. Way back: KL of 2 is halved."""
    made = []
    for shift in (0.0, 0.001, 0.002):
        arms = {
            arm: [
                [rate, state(rate**2 / 100, 0.99) if "distill" in arm else state(rate**2, 0.99 - lost - shift)]
                for rate in SELF_RATES
            ]
            for arm in ARMS
        }
        made.append(
            {
                "start": state(0.0, 0.99),
                "arms": arms,
                "decayed": state(1e-6, 0.98),
                "spoiled": {"noise": 0.2, **state(2.0, 0.5)},
                "back": {arm: [[rate, state(1.0, 0.9)] for rate in PRACTICAL] for arm in BACK},
            }
        )
    return made


def test_all_five_conditions_hold() -> None:
    finding = analyse(records())
    assert finding.verdict == "holds"
    numbers = finding.numbers
    assert numbers["slopes"]["sft, fresh"].mean == pytest.approx(2.0)
    assert numbers["instructions_changed"]["sft, fresh"]["0.001"].mean == pytest.approx(-0.051)
    assert numbers["instructions_changed"]["distill, full"]["0.0003"].mean == pytest.approx(0.0)
    assert numbers["log_kl_distill_over_sft"]["0.003"].mean == pytest.approx(-math.log(100))
    assert numbers["log_kl_back"]["distill, full"]["0.001"].mean == pytest.approx(-math.log(2))
    assert numbers["decayed_changed"].mean == pytest.approx(-0.01)
    assert (
        "with sampled tokens +0.0 [+0.0, +0.0]. From a spoiled start full distillation multiplies KL by 0.5 [0.5, 0.5]"
        in finding.ours
    )


def test_drift_without_a_loss_of_behaviour_is_the_direction() -> None:
    finding = analyse(records(lost=0.0))
    # -0, -.001, -.002: mean -.001, error .001 / sqrt(3), t of two degrees 4.303: the interval reaches above 0.
    assert finding.numbers["instructions_changed"]["sft, fresh"]["0.001"].high == pytest.approx(
        -0.001 + 4.303 * 0.001 / math.sqrt(3), abs=1e-6
    )
    assert finding.verdict == "direction only"
    assert "fine-tuning loses behaviour" in finding.text


def test_without_a_way_back_it_does_not_hold() -> None:
    changed = records()
    for record in changed:
        record["back"]["distill, full"] = [[rate, state(3.0, 0.4)] for rate in PRACTICAL]
    finding = analyse(changed)
    assert finding.verdict == "does not hold here"
    assert [name for name, met in finding.numbers["conditions"].items() if not met] == ["it comes back"]


def test_a_divergence_of_zero_counts_as_the_floor() -> None:
    changed = records()
    for record in changed:
        record["arms"]["distill, full"] = [[rate, state(0.0, 0.99)] for rate in SELF_RATES]
    finding = analyse(changed)
    # 1e-9 / 1e-6
    assert finding.numbers["log_kl_distill_over_sft"]["0.001"].mean == pytest.approx(math.log(1e-3))
    assert finding.verdict == "holds"


def test_every_run_has_a_row() -> None:
    table = analyse(records()).table
    assert len(table) == 1 + 4 * 3 + 1 + 1 + 3 * 2
    assert table[1] == {
        "arm": "sft, fresh",
        "rate": "0.0003",
        "instructions, T = 1 / greedy": "93.9 / 93.9",
        "old facts, T = 1 / greedy": "100.0 / 100.0",
        "KL(start, student)": "9e-08",
    }

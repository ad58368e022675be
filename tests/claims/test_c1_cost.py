"""C1's rule on records made by hand. Start 0.35, teacher 1.0: half-way is 0.65, two thirds of the way 0.75."""

import json
import math
from typing import Any

import pytest

from understudy.experiments.claims import c1_cost
from understudy.experiments.claims.c1_cost import CLAIM, analyse
from understudy.report.charts import line_chart

SFT_STEPS = range(50, 501, 50)


def arm(accuracy: list[tuple[int, float]], per_step: float, sampling: float = 0.0) -> dict[str, Any]:
    accuracy = [(0, 0.35), *accuracy]
    return {
        "accuracy": accuracy,
        "flops": [(step, per_step * step) for step, _ in accuracy],
        "teacher_sampling": [(step, sampling * step) for step, _ in accuracy],
        "final": measured(accuracy[-1][1]),
    }


def measured(accuracy: float) -> dict[str, Any]:
    return {"t1": accuracy, "greedy": accuracy, "recovery": None, "facts": 0.9}


def dose(sft: float, distill: float) -> dict[str, Any]:
    return {
        name: measured(value) for name, value in {"teacher": 1, "start": 0.35, "sft": sft, "distill": distill}.items()
    }


def records(**changed: dict[str, Any]) -> list[dict[str, Any]]:
    """Three pipelines in which distillation reaches half-way at step 10 for 80, 100 and 125 FLOPs. SFT's accuracy is
    0.65 + 0.1 ln(step / 250), at 4 FLOPs and 2 for the teacher a step; its last point is off by -0.01, 0 and 0.01."""
    made = []
    for number, (flops, off) in enumerate([(8.0, -0.01), (10.0, 0.0), (12.5, 0.01)]):
        sft = [(step, 0.65 + 0.1 * math.log(step / 250) + off * (step == 500)) for step in SFT_STEPS]
        arms = {
            "sft": arm(sft, 4.0, 2.0),
            "distill": arm([(10, 0.65), (20, 0.95)], flops),
            "distill-sampled": arm([(20, 0.65), (40, 0.7)], 10.0),
            "rl": arm([(100, 0.65), (200, 0.7)], 3.0),
            "sft-fixed": arm([(50, 0.5), (100, 0.4)], 4.0),
            "distill-fixed": arm([(50, 0.7), (100, 0.6)], 10.0),
        }
        doses = {"corrects 15%": dose(0.5, 0.8)}
        if number == 0:
            doses |= {"corrects 0%": dose(0.4, 0.3), "corrects 30%": dose(0.6, 0.7), "teacher slips": dose(0.7, 0.75)}
        made.append({"teacher": measured(1.0), "start": measured(0.35), "arms": arms | changed, "doses": doses})
    return json.loads(json.dumps(made))


def test_holds():
    finding = analyse(records())
    assert finding.verdict == "holds"
    # 1000 FLOPs over 80, 100 and 125: ratios 12.5, 10 and 8. Their logarithms deviate by ln 1.25 = 0.2231; with
    # t = 4.303 the interval reaches 0.2231 / sqrt(3) * 4.303 = 0.5544 to either side.
    ratio = finding.numbers["sft_flops"]
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx(
        (10.0, 10 * math.exp(-0.5544), 10 * math.exp(0.5544)), rel=1e-3
    )
    assert finding.numbers["rl_flops"].mean == pytest.approx(3.0)
    assert finding.numbers["sft/distill, half-way, flops with teacher sampling"].startswith("15.0 ")
    assert finding.numbers["sft/distill, half-way, steps"].startswith("25.0 ")
    assert finding.numbers["sft/distill-sampled, half-way, flops"].startswith("5.0 ")
    assert finding.numbers["forecast_error"].mean == pytest.approx(0.0, abs=1e-9)
    assert finding.numbers["r2"].low > 0.98
    assert finding.numbers["fixed_lead"].mean == pytest.approx(0.1)  # 0.6 at the end against 0.5 at best
    leads = finding.numbers["leads"]
    assert {name: round(lead.mean, 6) for name, lead in leads.items()} == {
        "corrects 0%": -0.1,
        "corrects 15%": 0.3,
        "corrects 30%": 0.1,
        "teacher slips": 0.05,
    }
    assert list(leads) == ["corrects 0%", "corrects 15%", "corrects 30%", "teacher slips"]


def test_a_rival_that_never_gets_there_gives_a_bound():
    """SFT ends at 0.62 after 2000 FLOPs: 25, 20 and 16 times distillation's, at least."""
    low = arm([(step, 0.55 + 0.1 * math.log(step / 250)) for step in SFT_STEPS], 4.0)
    finding = analyse(records(sft=low))
    assert finding.numbers["sft_flops"].mean == pytest.approx(20.0)
    assert "at least 20.0" in finding.text
    assert "3 of 3 are bounds" in finding.text
    row = next(row for row in finding.table if row["arm"] == "sft")
    assert row["steps to half-way"] == "> 500"


def test_direction_only_where_rl_is_cheaper():
    finding = analyse(records(rl=arm([(100, 0.65), (200, 0.7)], 0.5)))
    assert finding.verdict == "direction only"
    assert finding.numbers["rl_flops"].mean == pytest.approx(0.5)


def test_direction_only_where_sft_is_not_log_linear():
    """A straight line in steps, from 0.43 to 0.79: half-way at 325 steps, 1300 FLOPs."""
    straight = arm([(step, 0.39 + 0.0008 * step) for step in SFT_STEPS], 4.0)
    finding = analyse(records(sft=straight))
    assert finding.verdict == "direction only"
    assert finding.numbers["sft_flops"].mean == pytest.approx(13.0)
    assert "not log-linear" in finding.text


@pytest.mark.parametrize(
    "changed",
    [
        {"sft": arm([(step, 0.65 + 0.1 * math.log(step / 250)) for step in SFT_STEPS], 0.4)},  # as cheap: ratio 1
        {"distill": arm([(10, 0.4), (20, 0.5)], 10.0)},  # never there
    ],
)
def test_does_not_hold(changed: dict[str, Any]):
    assert analyse(records(**changed)).verdict == "does not hold here"


def test_a_level_that_distillation_misses_has_no_ratio():
    finding = analyse(records(distill=arm([(10, 0.4), (20, 0.5)], 10.0)))
    assert finding.numbers["sft/distill, half-way, flops"] == "unknown"
    assert math.isnan(finding.numbers["sft_flops"].mean)


def test_models_that_know_nothing_and_a_single_pipeline():
    """Accuracy 0 everywhere, the teacher's too: no level lies above the start."""
    nothing = {"accuracy": [[0, 0.0], [1, 0.0], [2, 0.0], [3, 0.0], [4, 0.0]]}
    nothing |= {"flops": nothing["accuracy"], "teacher_sampling": nothing["accuracy"], "final": measured(0.0)}
    record = {"teacher": measured(0.0), "start": measured(0.0), "arms": dict.fromkeys(c1_cost.ARMS, nothing)}
    assert analyse([record | {"doses": {"corrects 15%": dose(0.0, 0.0)}}]).verdict == "does not hold here"


def test_charts_can_be_drawn():
    for chart in analyse(records()).charts:
        assert "<svg" in line_chart(chart.series, **chart.options)


def test_settings_keep_models_where_variants_and_c9_look():
    for settings in CLAIM.settings.values():
        for length in (settings.sft, settings.distill, settings.rl, settings.fixed):
            assert length.steps % length.searched == 0
            assert length.steps % length.every == 0

import copy
from typing import Any

import pytest

from understudy.experiments.claim import Finding
from understudy.experiments.claims.c4_recovery import RECOVERED, analyse

ALONE = "100% documents"


def scores(instructions: float, new: float, old: float = 1.0) -> dict[str, dict[str, float]]:
    shares = {"instructions": instructions, "new": new, "old": old}
    return {task: {"greedy": share, "t1": share} for task, share in shares.items()}


def run(instructions: float, new: float, old: float = 1.0) -> dict[str, Any]:
    curve = [[0, 0.3], [20, instructions]]
    return {
        "scores": scores(instructions, new, old),
        "curves": {"instructions": curve, "new": curve},
        "trained_tokens": 1000,
        "flops": {"student_training": 2e9, "evaluation": 5e9},
    }


def phases(names: list[str], instructions: float) -> list[dict[str, Any]]:
    after = {"instructions": instructions, "round 1": 0.2, "round 2": 0.4, "old": 0.5}
    return [{"phase": name, "scores": after} for name in names]


def records() -> list[dict[str, Any]]:
    """Two pipelines as the article has it; the second is lower by 0.01 in all that is not the original."""
    made = []
    for shift in (0.0, 0.01):
        mixed = {
            ALONE: run(0.45 - shift, 0.43 - shift),
            "70% documents": run(0.80 - shift, 0.36 - shift),
            "70% documents, few chats": run(0.70 - shift, 0.36 - shift),
            "30% documents": run(0.82 - shift, 0.30 - shift),
            "0% documents": run(0.80 - shift, 0.02),
        }
        made.append(
            {
                "original": scores(0.99, 0.02),
                "mixes": mixed,
                "lora": run(0.55 - shift, 0.33 - shift),
                "recovered": {
                    name: {"distill": run(0.99, 0.42 - shift), "sft": run(0.97, 0.40 - shift)} for name in RECOVERED
                },
                "samples_flops": 1e9,
                "rounds": {
                    "with recovery": phases(["start", "documents 1", "recovery 1"], 0.9),
                    "without recovery": phases(["start", "documents 1"], 0.3),
                },
            }
        )
    # A shift in the mixture but not in what was recovered from it would widen the intervals of facts.
    for record in made:
        for name in RECOVERED:
            record["recovered"][name]["distill"]["scores"]["new"] = dict(record["mixes"][name]["scores"]["new"])
    return made


def test_all_six_conditions_hold() -> None:
    finding = analyse(records())
    assert finding.verdict == "holds"
    numbers = finding.numbers
    # .45 - .99 and .44 - .99; of two values t is 12.706, so the interval reaches 12.706 * .005.
    assert numbers["lost"].mean == pytest.approx(-0.545)
    assert numbers["lost"].high == pytest.approx(-0.545 + 12.706 * 0.005, abs=1e-5)
    assert numbers["recovered"][ALONE].mean == pytest.approx(0.0)
    assert numbers["kept"][ALONE].mean == pytest.approx(0.0)
    # .99 - .80 and .99 - .79; then .36 - .02 and .35 - .02, which distillation leaves as they are
    assert numbers["raised"]["70% documents"].mean == pytest.approx(0.195)
    assert numbers["taught"]["70% documents"].mean == pytest.approx(0.335)
    assert numbers["taught"]["70% documents"].low == pytest.approx(0.335 - 12.706 * 0.005, abs=1e-5)
    assert numbers["knows_more"] == numbers["taught"]
    assert "All six conditions are met." in finding.text
    assert numbers["distill_minus_sft"]["70% documents"]["instructions"].mean == pytest.approx(0.02)
    # .36 - .40 and .35 - .39
    assert numbers["distill_minus_sft"]["70% documents"]["new"].mean == pytest.approx(-0.04)
    assert numbers["adapters_minus_full"]["new"].mean == pytest.approx(-0.10)
    assert numbers["rounds"]["with recovery"]["new facts"].mean == pytest.approx(0.3)


def failed(finding: Finding) -> list[str]:
    return [name for name, met in finding.numbers["conditions"].items() if not met]


def test_a_mixture_within_the_margin_of_recovery_keeps_all() -> None:
    changed = records()
    for record in changed:
        record["mixes"]["30% documents"] = run(0.975, 0.3)
    finding = analyse(changed)
    # 1.5 points lower in both pipelines: surely below 0, but distillation may fall short by 2.
    assert finding.numbers["mixtures"]["30% documents"].high == pytest.approx(-0.015)
    assert finding.verdict == "direction only"
    assert failed(finding) == ["no mixture keeps all"]


def test_recovery_must_raise_what_the_mixture_left() -> None:
    changed = records()
    for record in changed:
        record["mixes"]["70% documents"]["scores"]["instructions"] = {"greedy": 0.985, "t1": 0.985}
        record["recovered"]["70% documents"]["distill"]["scores"]["instructions"] = {"greedy": 0.98, "t1": 0.98}
    finding = analyse(changed)
    assert finding.numbers["recovered"]["70% documents"].low == pytest.approx(-0.01)
    assert finding.numbers["raised"]["70% documents"].mean == pytest.approx(-0.005)
    assert finding.verdict == "direction only"
    assert failed(finding) == ["recovered", "no mixture keeps all"]


def test_eight_points_of_new_facts_are_not_taught() -> None:
    changed = records()
    for record in changed:
        for model in (record["mixes"]["70% documents"], record["recovered"]["70% documents"]["distill"]):
            model["scores"]["new"] = {"greedy": 0.10, "t1": 0.10}
    finding = analyse(changed)
    assert finding.numbers["taught"]["70% documents"].low == pytest.approx(0.08)
    assert finding.verdict == "direction only"
    assert failed(finding) == ["taught"]


def test_facts_that_were_never_taught_leave_no_direction() -> None:
    changed = records()
    for record in changed:
        for name in RECOVERED:
            for model in (record["mixes"][name], record["recovered"][name]["distill"]):
                model["scores"]["new"] = {"greedy": 0.02, "t1": 0.02}
    finding = analyse(changed)
    assert finding.verdict == "does not hold here"
    assert failed(finding) == ["taught", "knows more"]


def test_facts_that_fall_by_six_points_are_not_kept() -> None:
    changed = records()
    for record in changed:
        before = record["mixes"][ALONE]["scores"]["new"]["greedy"]
        record["recovered"][ALONE]["distill"]["scores"]["new"] = {"greedy": before - 0.06, "t1": before}
    finding = analyse(changed)
    assert finding.verdict == "direction only"
    assert finding.numbers["kept"][ALONE].low == pytest.approx(-0.06)


def test_behaviour_that_documents_do_not_cost_is_no_case_of_the_claim() -> None:
    changed = copy.deepcopy(records())
    for record in changed:
        record["mixes"][ALONE] = run(0.95, 0.43)
    assert analyse(changed).verdict == "does not hold here"


def test_the_table_and_the_charts() -> None:
    finding = analyse(records())
    by_name = {row["model"]: row for row in finding.table}
    assert by_name["the earlier self"]["instructions, greedy / T = 1"] == "99.0 / 99.0"
    assert by_name[f"{ALONE}, then distillation"]["GFLOP"] == "2.0"
    assert by_name[f"{ALONE}, then fine-tuning"]["GFLOP"] == "2.0, 3.0 with sampling"
    rounds = next(chart for chart in finding.charts if chart.name == "rounds")
    line = next(series for series in rounds.series if series.name == "new facts, with recovery")
    assert line.points == [(0.0, pytest.approx(0.3)), (1.0, pytest.approx(0.3)), (1.5, pytest.approx(0.3))]

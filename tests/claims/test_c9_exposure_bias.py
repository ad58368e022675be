"""C9's rule on records made by hand, and its distances on models with random weights."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from understudy.backends.language_model import LanguageModel
from understudy.experiments.claims import c1_cost, c9_exposure_bias
from understudy.experiments.claims.c9_exposure_bias import CLAIM, analyse, forced
from understudy.report.charts import line_chart
from understudy.types import TokenSequence
from understudy.worlds.ledger import Ledger
from understudy.worlds.models import build_qwen3


def student(slope: float, nll: float, kl_teacher: float, kl_own: float, t1: float = 0.5) -> dict[str, Any]:
    def states(kl: float) -> dict[str, Any]:
        return {"nll": nll, "teacher_nll": 0.01, "kl": kl, "kl_items": [kl] * 17 + [None]}

    return {
        "t1": t1,
        "greedy": t1,
        "recovery": t1,
        "facts": 0.9,
        "items": [0.9 + slope * place for place in range(18)],
        "teacher_forced": states(kl_teacher),
        "student_forced": states(kl_own),
    }


def records(**changed: dict[str, Any]) -> list[dict[str, Any]]:
    """Three pipelines. Distillation (NLL 0.10) is matched by SFT after 200 steps (0.09), not by 100 (0.12). The slopes
    of that SFT are -0.03, -0.02 and -0.01."""
    made = []
    for slope in (-0.03, -0.02, -0.01):
        students = {
            "start": student(-0.03, 0.3, 0.1, 0.5, t1=0.3),
            "sft 100": student(-0.03, 0.12, 0.1, 0.5, t1=0.4),
            "sft 200": student(slope, 0.09, 0.1, 0.8, t1=0.5),
            "sft 300": student(slope, 0.05, 0.05, 0.8, t1=0.6),
            "distill": student(0.0, 0.10, 0.1, 0.2, t1=0.8),
        }
        made.append({"teacher": student(0.0, 0.0, 0.0, 0.0), "students": students | changed})
    return json.loads(json.dumps(made))


def test_holds():
    # -0.02 +- 4.303 * 0.01 / sqrt(3) = -0.02 +- 0.0248 would reach 0: slopes nearer to each other.
    made = records()
    for record, slope in zip(made, (-0.021, -0.02, -0.019), strict=True):
        record["students"]["sft 200"] = student(slope, 0.09, 0.1, 0.8)
    finding = analyse(made)
    assert finding.verdict == "holds"
    assert finding.numbers["matched"] == ["sft 200"] * 3
    difference = finding.numbers["slope, distill - matched"]
    reach = 4.303 * 0.001 / math.sqrt(3)
    assert (difference.mean, difference.low, difference.high) == pytest.approx(
        (0.02, 0.02 - reach, 0.02 + reach), rel=1e-3
    )
    # Exposure ratios 8 and 2.
    assert finding.numbers["log exposure ratio, matched"].mean == pytest.approx(math.log(8))
    assert finding.numbers["log exposure ratio, distill - matched"].mean == pytest.approx(math.log(1 / 4))
    assert "exposure ratio 8.0 against 2.0" in finding.ours
    assert finding.numbers["accuracy, distill - matched"].mean == pytest.approx(0.3)
    assert finding.numbers["accuracy, distill - last"].mean == pytest.approx(0.2)


def test_does_not_hold_where_slopes_vary_too_much():
    finding = analyse(records())
    assert finding.numbers["slope, distill - matched"].low == pytest.approx(0.02 - 0.0248, abs=1e-4)
    assert finding.verdict == "does not hold here"


@pytest.mark.parametrize(
    "changed",
    [
        {"sft 200": student(-0.02, 0.09, 0.1, 0.2)},  # no nearer to the teacher on its own states
        {"sft 200": student(-0.02, 0.09, 0.1, 0.8), "distill": student(-0.01, 0.10, 0.1, 0.2)},  # falls too
        {"sft 200": student(-0.02, 0.20, 0.1, 0.8), "sft 300": student(-0.02, 0.2, 0.1, 0.8)},  # no match in NLL
    ],
)
def test_direction_only(changed: dict[str, Any]):
    assert analyse(records(**changed)).verdict == "direction only"


def test_without_a_match_the_last_checkpoint_stands_in():
    late = student(-0.02, 0.2, 0.1, 0.8)
    finding = analyse(records(**{"sft 100": late, "sft 200": late, "sft 300": student(-0.04, 0.2, 0.1, 0.8)}))
    assert finding.numbers["matched"] == [None] * 3
    assert finding.numbers["slope, matched"].mean == pytest.approx(-0.04)


def test_does_not_hold_where_distillation_falls_as_fast():
    changed = {"sft 200": student(-0.02, 0.09, 0.1, 0.8), "distill": student(-0.02, 0.10, 0.1, 0.2)}
    assert analyse(records(**changed)).verdict == "does not hold here"


def test_charts_can_be_drawn_and_a_single_pipeline_decides_nothing():
    finding = analyse(records()[:1])
    assert finding.verdict == "does not hold here"
    for chart in finding.charts:
        assert "<svg" in line_chart(chart.series, **chart.options)


def test_checkpoints_are_ordered_by_steps():
    steps = ("sft 1000", "sft 200", "start", "distill")
    assert c9_exposure_bias._sft({"students": dict.fromkeys(steps)}) == ["sft 200", "sft 1000"]


def test_distances_are_those_of_whole_distributions():
    world = Ledger(num_items=4)
    student_model, teacher = (
        build_qwen3(world.tokenizer(), hidden_size=16, num_layers=1, num_heads=2, seed=seed) for seed in (0, 1)
    )
    sequences = [TokenSequence([1, 2, 3], [4, 5, 6, 7]), TokenSequence([8, 9], [3, 2])]
    found = forced(LanguageModel(student_model), LanguageModel(teacher), sequences, 4)
    own_nll, kl = [], []
    for sequence in sequences:
        ids = torch.tensor([[*sequence.prompt_ids, *sequence.completion_ids]])
        with torch.no_grad():
            log_p, log_q = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (student_model, teacher))
        first = len(sequence.prompt_ids) - 1  # the position that predicts the first token of the completion
        for place, token in enumerate(sequence.completion_ids):
            p, q = log_p[first + place], log_q[first + place]
            own_nll.append(-float(p[token]))
            kl.append(float((p.exp() * (p - q)).sum()))
    assert found["nll"] == pytest.approx(sum(own_nll) / 6, rel=1e-5)
    assert found["kl"] == pytest.approx(sum(kl) / 6, rel=1e-4)
    # Tokens 0 to 2 of a text are item 1, the first text's last token is item 2, and no text has items 3 and 4.
    assert found["kl_items"] == [
        pytest.approx((sum(kl) - kl[3]) / 5, rel=1e-4),
        pytest.approx(kl[3], rel=1e-4),
        None,
        None,
    ]


def test_runs_and_searches_are_those_of_c1():
    for scale, settings in CLAIM.settings.items():
        theirs = c1_cost.CLAIM.settings[scale]
        for arm in ("sft", "distill"):
            assert dataclasses.astuple(getattr(settings, arm)) == dataclasses.astuple(getattr(theirs, arm))

"""Each guard's rule by hand, episodes, and what the guards say of the runs whose curves are committed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from understudy.config_guards import GuardsConfig
from understudy.guards import _LOOKS, CAUSES, QUIET, TRACKED, WINDOW, Past, Track, judge, past_of

ROOT = Path(__file__).resolve().parent.parent
C13 = ROOT / "experiments" / "c13_failure_modes" / "results.json"
MEASURED = ROOT / "benchmarks" / "results" / "guards.json"
DEFAULTS = GuardsConfig()
PER_STEP = 64


def rows_of(**curves: Sequence[float]) -> list[dict[str, Any]]:
    """Rows 1, 2, ...; ``reverse_kl__mean`` stands for reverse_kl/mean."""
    names = [name.replace("__", "/") for name in curves]
    steps = zip(*curves.values(), strict=True)
    return [{"step": i, **dict(zip(names, values, strict=True))} for i, values in enumerate(steps, 1)]


def found(
    rows: Sequence[Mapping[str, Any]], config: GuardsConfig = DEFAULTS, *, per_step: int = PER_STEP
) -> list[tuple[int, str]]:
    """(step, guard) of all findings."""
    past, findings = Past(), []
    for row in rows:
        now = judge(past, row, config, per_step=per_step)
        findings += [(row["step"], finding.guard) for finding in now]
        past = past.after(row["step"], row, now)
    return findings


def guards(**sections: Mapping[str, Any]) -> GuardsConfig:
    return GuardsConfig.model_validate(sections)


def test_a_track_by_hand() -> None:
    track = Track()
    assert (track.start, track.lowest, track.mean(1.0, 1), track.mean(1.0, 2)) == (None, None, 1.0, None)
    for value in (3.0, 2.0, 1.0, 0.0, 4.0, 5.0):
        track = track.after(value)
    assert track.first == (3.0, 2.0, 1.0)
    assert track.start == 2.0
    assert track.lowest == 2.0  # of 3 2 1 0 4, and 2 1 0 4 5 has 2.4
    assert track.mean(6.0, 3) == 5.0
    for _ in range(60):
        track = track.after(1.0)
    assert len(track.last) == WINDOW
    assert track.lowest == 1.0


def test_the_reverse_kl_rises_from_its_lowest_mean_of_five() -> None:
    # Lowest mean of five: 0.4. The limit is 1.75 * 0.4 + 0.1 = 0.8, for means of three.
    curve = [0.6, 0.5, 0.4, 0.3, 0.2, 0.7, 0.8, 0.89, 0.95]
    past = past_of(rows_of(reverse_kl__mean=curve[:8]), DEFAULTS, per_step=PER_STEP)
    assert past.track("reverse_kl/mean").lowest == pytest.approx(0.4)
    assert judge(past, {"reverse_kl/mean": 0.70}, DEFAULTS, per_step=PER_STEP) == []  # (0.8 + 0.89 + 0.7) / 3 < 0.8
    [finding] = judge(past, {"reverse_kl/mean": 0.95}, DEFAULTS, per_step=PER_STEP)
    assert (finding.guard, finding.metric) == ("reverse_kl", "reverse_kl/mean")
    assert finding.value == pytest.approx(0.88)
    assert finding.limit == pytest.approx(0.8)
    assert finding.words == (
        "reverse_kl/mean is 0.88 nats per token over the last 3 steps, above 0.8: reverse_kl.rise = 1.75 times 0.4, "
        "its lowest mean of 5 steps, plus 0.1"
    )
    assert finding.causes == CAUSES["reverse_kl"]


def test_small_and_negative_reverse_kls_may_wander_within_the_slack() -> None:
    assert found(rows_of(reverse_kl__mean=[-0.02, 0.01, -0.01, 0.0, 0.01, 0.09, 0.1, 0.1])) == []


def test_the_level_of_the_reverse_kl_is_judged_over_enough_completions() -> None:
    assert found(rows_of(reverse_kl__mean=[5.1])) == [(1, "reverse_kl")]
    assert found(rows_of(reverse_kl__mean=[4.9])) == []
    # Four completions a step: sixteen make a mean.
    assert found(rows_of(reverse_kl__mean=[9.0, 9.0, 9.0, 9.0]), per_step=4) == [(4, "reverse_kl")]


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([0.2, 0.4, 0.3, 0.4, 0.6, 0.8], []),  # 0.6 is below 2 * 0.3 + 0.05
        ([0.2, 0.4, 0.3, 0.4, 0.6, 1.0], [(6, "entropy")]),
        ([0.2, 0.4, 0.3, 0.02, 0.03, 0.05], []),  # 0.033 is above 0.1 * 0.3
        ([0.2, 0.4, 0.3, 0.02, 0.03, 0.02], [(6, "entropy")]),
    ],
)
def test_the_entropy_explodes_or_collapses(curve: Sequence[float], expected: Sequence[Any]) -> None:
    assert found(rows_of(entropy__sampled=curve)) == expected


def test_lengths_shares_and_repetitions_are_measured_from_the_start() -> None:
    assert found(rows_of(completion_length__mean=[10, 20, 30, 30, 40, 50, 51])) == [(7, "length")]  # 47 > 2 * 20
    assert found(rows_of(truncated__share=[0.0, 0.1, 0.2, 0.2, 0.3, 0.5, 0.5])) == [(7, "truncated")]  # 0.43 > 0.35
    assert found(rows_of(repeated_4gram__share=[0.0, 0.1, 0.2, 0.3, 0.4, 0.1])) == []
    assert found(rows_of(repeated_4gram__share=[0.0, 0.1, 0.2, 0.3, 0.4, 0.3])) == [(6, "repetition")]


def test_a_ratio_is_judged_at_once() -> None:
    assert found(rows_of(ratio__abs_log_mean=[0.1, 0.11])) == [(2, "ratio")]
    assert found(rows_of(ratio__outside_share=[0.3, 0.52])) == [(2, "ratio")]


def test_a_gradient_is_held_against_the_median_of_those_before() -> None:
    assert found(rows_of(optim__grad_norm=[1.0, 1.0, 1.0, 1.0, 99.0])) == []  # four are no measure
    assert found(rows_of(optim__grad_norm=[1.0, 2.0, 3.0, 4.0, 5.0, 30.0])) == []  # ten times 3, not above
    assert found(rows_of(optim__grad_norm=[1.0, 2.0, 3.0, 4.0, 5.0, 30.1])) == [(6, "gradient")]
    assert found(rows_of(optim__grad_norm=[0.0] * 6 + [1.0])) == []  # rewards that are all the same


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(value: float) -> None:
    assert found([{"step": 1, "optim/loss": value}]) == [(1, "nonfinite")]
    assert found([{"step": 1, "update/skipped": 1.0, "update/nonfinite": 1.0}]) == [(1, "nonfinite")]


def agreement(first: float, end: float, everywhere: float = 0.1, truncated: float = 0.0, steps: int = 1) -> Any:
    row = {"first_": first, "end_": end, "": everywhere}
    shares = {f"teacher/rejected_{place}share": value for place, value in row.items()}
    return [{"step": step, "truncated/share": truncated} | shares for step in range(1, steps + 1)]


def test_agreement_by_position() -> None:
    assert found(agreement(0.5, 0.5)) == []
    for row, cause in (((0.6, 0.2), "first"), ((0.2, 0.6), "end"), ((0.9, 0.9, 0.8), "level")):
        [finding] = judge(Past(), agreement(*row)[0], DEFAULTS, per_step=PER_STEP)
        assert finding.guard == "agreement"
        assert finding.causes == CAUSES[cause]
    # Of 64 completions 6 ended: no share.
    assert found(agreement(0.0, 1.0, truncated=0.9)) == []
    assert found(agreement(0.0, 1.0, truncated=0.8)) == [(1, "agreement")]
    # Eight a step: two steps make sixteen.
    assert found(agreement(1.0, 0.0, steps=2), per_step=8) == [(2, "agreement")]


def test_the_teacher_is_as_sharp_as_the_student_or_not() -> None:
    low, high = DEFAULTS.sharpness.low, DEFAULTS.sharpness.high
    assert found(rows_of(teacher__sharpness=[low, high, 1.0])) == []
    assert found(rows_of(teacher__sharpness=[low - 0.01])) == [(1, "sharpness")]
    assert found(rows_of(teacher__sharpness=[high + 0.01])) == [(1, "sharpness")]
    assert found(rows_of(teacher__sharpness=[1.0] * 5 + [9.0])) == []  # what training has made of the student
    # One completion a step: sixteen steps are the first that are judged, and the last.
    sharp = rows_of(teacher__sharpness=[9.0] * 20)
    assert found(sharp, per_step=1) == [(16, "sharpness")]


def test_a_direction_takes_two_updates_unless_it_is_the_other_one() -> None:
    assert found(rows_of(update__alignment=[-0.09])) == []
    assert found(rows_of(update__alignment=[-0.11])) == [(1, "direction")]
    assert found(rows_of(update__alignment=[0.0, 0.25, 0.06])) == []
    assert found(rows_of(update__alignment=[0.0, 0.19])) == [(2, "direction")]


def test_an_episode_ends_after_a_quiet_while() -> None:
    norms = [1.0] * 6 + [20.0] + [1.0] * QUIET + [20.0] + [1.0] * (QUIET + 1) + [20.0]
    past, new = Past(), []
    for row in rows_of(optim__grad_norm=norms):
        findings = judge(past, row, DEFAULTS, per_step=PER_STEP)
        new += [row["step"] for f in findings if not past.in_episode(f.guard, row["step"])]
        past = past.after(row["step"], row, findings)
    assert found(rows_of(optim__grad_norm=norms)) == [(7, "gradient"), (18, "gradient"), (30, "gradient")]
    # Ten quiet steps between the first two belong to the episode (17 - 7 = 10 is step 17; 18 is later).
    assert new == [7, 18, 30]


def test_skipped_updates_are_counted_and_are_no_measure() -> None:
    rows = rows_of(optim__grad_norm=[1.0] * 6)
    past = past_of([*rows, {"step": 7, "optim/grad_norm": 50.0, "update/skipped": 1.0}], DEFAULTS, per_step=PER_STEP)
    assert past.skips == 1
    assert past.track("optim/grad_norm").last == (1.0,) * 6
    assert past.active == {"gradient": 7}
    assert past.after(8, {"optim/grad_norm": 1.0}, []).skips == 0


def test_the_past_is_what_the_rows_tell() -> None:
    """Read back from JSON in one go or made step by step, evaluations and clocks among the metrics: the same."""
    rows: list[dict[str, Any]] = [{"step": 0, "eval/a/t1": 0.5}]
    rows += [row | {"cost/flops": 1.0} for row in rows_of(reverse_kl__mean=[0.1 * i**2 for i in range(9)])]
    step_by_step = Past()
    for row in rows[1:]:
        findings = judge(step_by_step, row, DEFAULTS, per_step=PER_STEP)
        step_by_step = step_by_step.after(row["step"], row, findings)
    assert step_by_step.active == {"reverse_kl": 9}
    assert past_of(json.loads(json.dumps(rows)), DEFAULTS, per_step=PER_STEP) == step_by_step


def test_a_guard_that_is_off_is_silent() -> None:
    row = {"step": 1, "reverse_kl/mean": 9.0, "ratio/abs_log_mean": 9.0}
    assert found([row]) == [(1, "reverse_kl"), (1, "ratio")]
    assert found([row], guards(reverse_kl={"action": "off"})) == [(1, "ratio")]


def test_every_guard_has_a_section_and_every_section_a_guard() -> None:
    assert {name for name, _ in DEFAULTS.actions()} == set(_LOOKS)
    assert dict(DEFAULTS.actions()) == {name: "stop" if name == "nonfinite" else "warn" for name in _LOOKS}


# Committed curves


def c13_rows(mode: str, pipeline: int) -> list[dict[str, Any]]:
    records = json.loads(C13.read_text(encoding="utf-8"))["records"]
    curves = records[pipeline]["runs"][mode]["metrics"]
    steps = [step for step, _ in curves["reverse_kl/mean"]]
    return [{"step": step, **{name: curve[i][1] for name, curve in curves.items()}} for i, step in enumerate(steps)]


@pytest.mark.parametrize("pipeline", range(5))
def test_no_alarm_over_the_healthy_runs_of_the_experiment(pipeline: int) -> None:
    assert found(c13_rows("healthy", pipeline)) == []


@pytest.mark.parametrize("pipeline", range(5))
@pytest.mark.parametrize("mode", ["flipped-sign", "k1-loss"])
def test_alarms_over_its_faults_of_the_code(mode: str, pipeline: int) -> None:
    """By the curves alone, without the look at the updates' direction."""
    steps = [step for step, guard in found(c13_rows(mode, pipeline)) if guard == "reverse_kl"]
    assert steps[0] <= (10 if mode == "flipped-sign" else 16)


def test_the_documentation_says_what_was_measured() -> None:
    page = MEASURED.with_suffix(".md").read_text(encoding="utf-8").partition("\n\n")[2]
    assert page in (ROOT / "docs" / "guards.md").read_text(encoding="utf-8")


MEASUREMENTS = json.loads(MEASURED.read_text(encoding="utf-8"))["records"]


@pytest.mark.parametrize("record", MEASUREMENTS, ids=lambda record: f"{record['seed']}-{record['mode']}")
def test_the_measured_runs_are_judged_as_is_written(record: Mapping[str, Any]) -> None:
    first: dict[str, int] = {}
    for step, guard in found(record["rows"]):
        first.setdefault(guard, step)
    assert first == {alarm["guard"]: alarm["step"] for alarm in record["alarms"]}
    if record["mode"].startswith("healthy"):
        assert first == {}
        assert set(TRACKED) <= {name for row in record["rows"] for name in row}

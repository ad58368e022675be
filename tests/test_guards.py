"""Each guard's rule by hand, episodes, and what the guards say of the runs whose curves are committed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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


def test_the_noise_of_a_track() -> None:
    """The median of |4 - 1|, |2 - 4|, |3 - 2| is 2; one leap, or a slow trend, changes little."""
    track = Track()
    assert track.noise == 0
    for value in (1.0, 4.0, 2.0, 3.0):
        track = track.after(value)
    assert track.noise == pytest.approx(2 / 0.9539)
    draws = np.random.default_rng(0).normal(size=(100, WINDOW))
    for added in (0.0, np.arange(WINDOW) / WINDOW, 9.0 * (np.arange(WINDOW) > 25)):
        noises = [Track(last=tuple(row)).noise for row in draws + added]
        assert np.mean(noises) == pytest.approx(1, abs=0.05)


def test_the_reverse_kl_rises_from_its_lowest_mean_of_five() -> None:
    # Lowest mean of five: 0.4. Without noise the limit is 1.75 * 0.4 + 0.1 = 0.8, for means of three.
    curve = [0.4] * 6
    past = past_of(rows_of(reverse_kl__mean=[*curve, 0.8, 0.9]), DEFAULTS, per_step=PER_STEP)
    assert past.track("reverse_kl/mean").lowest == pytest.approx(0.4)
    assert past.track("reverse_kl/mean").noise == 0
    assert judge(past, {"reverse_kl/mean": 0.69}, DEFAULTS, per_step=PER_STEP) == []  # (0.8 + 0.9 + 0.69) / 3 < 0.8
    [finding] = judge(past, {"reverse_kl/mean": 0.94}, DEFAULTS, per_step=PER_STEP)
    assert (finding.guard, finding.metric) == ("reverse_kl", "reverse_kl/mean")
    assert finding.value == pytest.approx(0.88)
    assert finding.limit == pytest.approx(0.8)
    assert finding.words == (
        "reverse_kl/mean is 0.88 nats per token over the last 3 steps, above 0.8: reverse_kl.rise = 1.75 times 0.4, "
        "its lowest mean of 5 steps, plus 0.1 and 0 for its noise"
    )
    assert finding.causes == CAUSES["reverse_kl"]


def test_a_noisy_reverse_kl_has_to_rise_further() -> None:
    """Steps of 0.2 up and down: three standard errors of a mean of three minus one of five are 0.46."""
    wavering = [0.3, 0.5] * 4
    past = past_of(rows_of(reverse_kl__mean=wavering), DEFAULTS, per_step=PER_STEP)
    noise = 3 * 0.2 / 0.9539 * math.sqrt(1 / 3 + 1 / 5)
    limit = 1.75 * past.track("reverse_kl/mean").lowest + 0.1 + noise  # type: ignore[operator]
    for end, expected in ((3 * limit - 0.8 - 0.01, []), (3 * limit - 0.8 + 0.01, ["reverse_kl"])):
        findings = judge(past, {"reverse_kl/mean": end}, DEFAULTS, per_step=PER_STEP)
        assert [finding.guard for finding in findings] == expected


def test_small_and_negative_reverse_kls_may_wander_within_the_slack() -> None:
    assert found(rows_of(reverse_kl__mean=[-0.02, 0.01, -0.01, 0.0, 0.01, 0.09, 0.1, 0.1])) == []


def test_the_level_of_the_reverse_kl_is_judged_over_enough_completions() -> None:
    assert found(rows_of(reverse_kl__mean=[8.1])) == [(1, "reverse_kl")]
    assert found(rows_of(reverse_kl__mean=[7.9])) == []
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


@pytest.mark.parametrize("entropy", [[0.3] * 3 + [0.02] * 3, [0.3] * 3 + [0.9] * 3], ids=["collapse", "explosion"])
def test_entropies_that_follow_the_teacher_are_no_fault(entropy: Sequence[float]) -> None:
    """The limit of being nearer: half of the first three steps' mean, or 0.1 nats."""
    for start, now, alarm in ((1.0, 0.49, False), (1.0, 0.51, True), (0.01, 0.09, False), (0.01, 0.11, True)):
        *before, row = rows_of(entropy__sampled=entropy, reverse_kl__mean=[start] * 3 + [now] * 3)
        findings = judge(past_of(before, DEFAULTS, per_step=PER_STEP), row, DEFAULTS, per_step=PER_STEP)
        assert [finding.guard for finding in findings] == (["entropy"] if alarm else [])


def test_entropies_that_pay_are_no_fault() -> None:
    """Rewards that jump by 0.1 from step to step: three standard errors of a difference of means are 0.26."""
    assert math.isclose(3 * 0.1 / 0.9539 * math.sqrt(2 / 3), 0.2568, abs_tol=1e-4)
    falls, rises = [0.3] * 3 + [0.02] * 3, [0.3] * 3 + [0.9] * 3
    start = [0.4, 0.5, 0.4]
    for after, collapse, explosion in (
        ([0.6, 0.5, 0.6], [], []),
        ([0.4, 0.3, 0.4], [(6, "entropy")], []),  # a search may cost nothing yet
        ([0.15, 0.05, 0.15], [(6, "entropy")], [(6, "entropy")]),
    ):
        assert found(rows_of(entropy__sampled=falls, reward__mean=start + after)) == collapse
        assert found(rows_of(entropy__sampled=rises, reward__mean=start + after)) == explosion


def test_lengths_shares_and_repetitions_are_measured_from_the_start() -> None:
    assert found(rows_of(completion_length__mean=[10, 20, 30, 30, 40, 50, 51])) == [(7, "length")]  # 47 > 2 * 20
    assert found(rows_of(truncated__share=[0.0, 0.1, 0.2, 0.2, 0.3, 0.5, 0.5])) == [(7, "truncated")]  # 0.43 > 0.35
    assert found(rows_of(repeated_4gram__share=[0.0, 0.1, 0.2, 0.3, 0.4, 0.1])) == []
    assert found(rows_of(repeated_4gram__share=[0.0, 0.1, 0.2, 0.3, 0.4, 0.3])) == [(6, "repetition")]


def test_a_ratio_is_judged_at_once() -> None:
    assert found(rows_of(ratio__abs_log_mean=[0.1, 0.11])) == [(2, "ratio")]
    assert found(rows_of(ratio__outside_share=[0.3, 0.52])) == [(2, "ratio")]


def test_a_gradient_is_held_against_the_largest_of_those_before() -> None:
    norms = [1.0] * 10 + [3.0] + [1.0] * 9
    assert found(rows_of(optim__grad_norm=[*norms[:19], 99.0])) == []  # nineteen are no measure
    assert found(rows_of(optim__grad_norm=[*norms, 15.0])) == []  # five times 3, not above
    assert found(rows_of(optim__grad_norm=[*norms, 15.1])) == [(21, "gradient")]
    assert found(rows_of(optim__grad_norm=[*norms, 3.0, *[1.0] * 49, 14.9, 5.1])) == []
    # The last 3 is forgotten, 50 updates later.
    assert found(rows_of(optim__grad_norm=[*norms, 3.0, *[1.0] * 50, 5.1])) == [(72, "gradient")]
    assert found(rows_of(optim__grad_norm=[0.0] * 30 + [1.0])) == []  # rewards that are all the same


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(value: float) -> None:
    assert found([{"step": 1, "optim/loss": value}]) == [(1, "nonfinite")]
    assert found([{"step": 1, "update/skipped": 1.0, "update/nonfinite": 1.0}]) == [(1, "nonfinite")]


def agreement(first: float, end: float, everywhere: float = 0.1, truncated: float = 0.0, steps: int = 1) -> Any:
    row = {"first_": first, "end_": end, "": everywhere}
    shares = {f"teacher/rejected_{place}share": value for place, value in row.items()}
    return [{"step": step, "truncated/share": truncated} | shares for step in range(1, steps + 1)]


def test_agreement_by_position() -> None:
    assert found(agreement(0.8, 0.8)) == []
    for row, cause in (((0.9, 0.2), "first"), ((0.2, 0.9), "end"), ((0.9, 0.9, 0.9), "level")):
        [finding] = judge(Past(), agreement(*row)[0], DEFAULTS, per_step=PER_STEP)
        assert finding.guard == "agreement"
        assert finding.causes == CAUSES[cause]
    # Of 64 completions 6 ended: no share.
    assert found(agreement(0.0, 1.0, truncated=0.9)) == []
    assert found(agreement(0.0, 1.0, truncated=0.8)) == [(1, "agreement")]
    # Eight a step: two steps make sixteen.
    assert found(agreement(1.0, 0.0, steps=2), per_step=8) == [(2, "agreement")]


def test_temperatures_apart() -> None:
    assert found(rows_of(teacher__temperature_ratio=[1.0, 1.09, 0.92])) == []
    for ratio, limit in ((2.0, 1.1), (0.5, 0.9)):
        [finding] = judge(Past(), {"teacher/temperature_ratio": ratio}, DEFAULTS, per_step=PER_STEP)
        assert (finding.guard, finding.value, finding.limit) == ("temperature", ratio, limit)
        assert f"at {ratio:g} times the temperature" in finding.words


def test_a_direction_is_wrong_where_it_is_the_other_one() -> None:
    assert found(rows_of(update__alignment=[-0.09])) == []
    assert found(rows_of(update__alignment=[-0.11])) == [(1, "direction")]


def test_an_episode_ends_after_a_quiet_while() -> None:
    lengths = [10.0] * 3 + [90.0] + [10.0] * QUIET + [90.0] + [10.0] * (QUIET + 3) + [90.0]
    past, new = Past(), []
    for row in rows_of(completion_length__mean=lengths):
        findings = judge(past, row, DEFAULTS, per_step=PER_STEP)
        new += [row["step"] for f in findings if not past.in_episode(f.guard, row["step"])]
        past = past.after(row["step"], row, findings)
    # A mean of three remembers each for two more steps.
    alarms = [*range(4, 7), *range(15, 18), 29]
    assert found(rows_of(completion_length__mean=lengths)) == [(step, "length") for step in alarms]
    # Ten quiet steps belong to the episode: step 15 is nine after step 6, and step 29 twelve after step 17.
    assert new == [4, 29]


def test_skipped_updates_are_counted_and_are_no_measure() -> None:
    rows = rows_of(optim__grad_norm=[1.0] * 20)
    past = past_of([*rows, {"step": 21, "optim/grad_norm": 50.0, "update/skipped": 1.0}], DEFAULTS, per_step=PER_STEP)
    assert past.skips == 1
    assert past.track("optim/grad_norm").last == (1.0,) * 20
    assert past.active == {"gradient": 21}
    assert past.after(22, {"optim/grad_norm": 1.0}, []).skips == 0


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
    assert steps[0] <= (10 if mode == "flipped-sign" else 19)


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
        written = {name for row in record["rows"] for name in row}
        apart = {"reward/mean"} | ({"update/alignment"} if record["mode"] == "healthy, full" else set())
        assert set(TRACKED) - apart <= written

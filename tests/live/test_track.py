"""What is known of a run in progress."""

from __future__ import annotations

import pytest

from understudy.live.track import KEPT, Track, metrics_that_matter, pace, role_shares, seconds_left


def row(step: int, **fields: float) -> dict[str, float]:
    return {"step": step, **{name.replace("__", "/"): value for name, value in fields.items()}}


def labels(track: Track) -> list[str]:
    return [metric.label for metric, _ in metrics_that_matter(track)]


def test_a_method_decides_what_matters() -> None:
    both = row(1, reverse_kl__full=0.5, reverse_kl__mean=0.6, reward__mean=0.1, optim__loss=2.0, optim__grad_norm=1.0)
    both |= row(1, completion_length__mean=30.0, optim__learning_rate=1e-4)
    shown = {method: labels(Track("t", method, 9).with_row(both)) for method in ("distill", "rl", "sft")}
    assert shown == {
        "distill": ["reverse KL", "reward", "length", "gradient norm"],
        "rl": ["reward", "length", "gradient norm", "loss"],
        "sft": ["loss", "reward", "gradient norm", "learning rate"],
    }
    values = {metric.label: values for metric, values in metrics_that_matter(Track("t", "distill", 9).with_row(both))}
    assert values["reverse KL"] == [0.5]  # the exact one, where there is one


def test_an_evaluation_takes_the_rewards_place_with_its_own_history() -> None:
    track = Track("t", "distill", 9).with_row({"step": 0, "eval/sums/greedy": 0.25, "eval/sums/greedy_se": 0.1})
    track = track.with_row(row(1, reward__mean=0.5)).with_row({"step": 2, "eval/sums/greedy": 0.75})
    assert [(m.label, values) for m, values in metrics_that_matter(track)] == [("sums greedy", [0.25, 0.75])]


def test_a_step_that_is_told_again_takes_its_own_place() -> None:
    track = Track("t", "sft", 9)
    for step in (1, 2, 3):
        track = track.with_row(row(step, optim__loss=float(step)))
    track = track.with_row(row(3, optim__loss=3.5))
    assert [point.row["optim/loss"] for point in track.points] == [1.0, 2.0, 3.5]
    track = track.with_row(row(2, optim__loss=9.0))  # the run went back to a checkpoint
    assert [point.row["optim/loss"] for point in track.points] == [1.0, 9.0]
    assert track.done == 2


def test_a_long_run_keeps_its_newest_steps() -> None:
    track = Track("t", "sft", 5000)
    for step in range(1, KEPT + 11):
        track = track.with_row({"step": step})
    assert [track.points[0].row["step"], track.done, len(track.points)] == [11, KEPT + 10, KEPT]


def test_the_pace_is_the_clocks_without_evaluations() -> None:
    track = Track("t", "sft", 10).with_row(row(0), 100.0)
    track = track.with_row(row(1, tokens__trained=300, time__student_training=99.0), 103.0)
    track = track.with_row(row(2, tokens__trained=500, time__evaluation=4.0), 109.0)
    known = pace(track)
    assert known is not None
    # 9 seconds for two steps, 4 of them in an evaluation.
    assert (known.seconds, known.evaluation, known.tokens) == (2.5, 2.0, 160.0)
    assert seconds_left(track, known) == 8 * 4.5


def test_rows_without_a_time_are_paced_by_their_roles() -> None:
    track = Track("t", "rl", 4)
    assert pace(track) is None
    for step in (1, 2):
        track = track.with_row(row(step, time__student_sampling=2.0, time__student_training=1.0, time__evaluation=step))
    known = pace(track)
    assert known is not None
    assert (known.seconds, known.evaluation, known.tokens) == (3.0, 1.5, None)
    assert seconds_left(track, known) == 9.0
    assert role_shares(track) == {
        "student sampling": pytest.approx(4 / 9),
        "evaluation": pytest.approx(3 / 9),
        "student training": pytest.approx(2 / 9),
    }


def test_a_count_of_prompts_has_a_pace_too() -> None:
    track = Track("generate", "generate", 100).with_row({"step": 0}, 0.0).with_row({"step": 40}, 20.0)
    known = pace(track)
    assert known is not None
    assert known.seconds == 0.5
    assert seconds_left(track, known) == 30.0
    assert metrics_that_matter(track) == []

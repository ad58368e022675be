"""A step's numbers, worked out by hand, and the file they go to."""

from pathlib import Path

import pytest

from tiny import prompt_of, rollout_of
from understudy.metrics import MetricsLog, read_metrics, rollout_metrics, update_metrics
from understudy.types import SampledScores, ScoredRollout


def scored(ids: list[int], student: list[float], teacher: list[float] | None, reward: float | None = None):
    scores = None if teacher is None else SampledScores(teacher)
    return ScoredRollout(rollout_of(prompt_of([1]), ids, student), scores, reward)


def test_rollout_metrics_by_hand() -> None:
    rows = [
        scored([5, 0], [-1.0, -0.5], [-3.0, -0.25], 1.0),  # ends with EOS; gaps 2, -0.25
        scored([5, 5, 5], [-1.0, -1.0, -1.5], [-1.0, -1.5, -0.5], 0.0),  # cut; gaps 0, 0.5, -1
    ]
    assert rollout_metrics(rows) == pytest.approx(
        {
            "completion_length/mean": 2.5,
            "completion_length/max": 3.0,
            "truncated/share": 0.5,
            "repeated_4gram/share": 0.0,
            "entropy/sampled": 1.0,
            "reverse_kl/mean": 0.25,  # 1.25 nats over 5 tokens, not the mean of 0.875 and -1/6
            "reverse_kl/max": 2.0,
            "reward/mean": 0.5,
        }
    )


def test_absent_teachers_and_graders_give_no_numbers() -> None:
    metrics = rollout_metrics([scored([5, 0], [-1.0, -0.5], None)])
    assert not {"reverse_kl/mean", "reverse_kl/max", "reward/mean"} & metrics.keys()


@pytest.mark.parametrize(
    ("ids", "repeats"),
    [
        ([1, 2, 3, 4], 0),
        ([7] * 4, 0),
        ([7] * 5, 1),
        ([7] * 10, 6),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1),  # the second 1 2 3 4
        ([1, 2, 1, 2, 1, 2, 1, 2], 3),  # 1 2 1 2 at 4; 2 1 2 1 at 5; again at 6, 7 and 8
        ([1, 2, 3], 0),
    ],
)
def test_repeated_4grams(ids: list[int], repeats: int) -> None:
    metrics = rollout_metrics([scored(ids, [-1.0] * len(ids), None)])
    assert metrics["repeated_4gram/share"] == repeats / len(ids)


def test_repeats_are_counted_within_a_completion() -> None:
    once = scored([1, 2, 3, 4], [-1.0] * 4, None)
    assert rollout_metrics([once, once])["repeated_4gram/share"] == 0.0


def test_update_metrics_have_public_names_and_no_unknown_ones() -> None:
    update = {"loss": 1.0, "grad_norm": 2.0, "tokens": 3, "ratio_max": 4.0, "reverse_kl_full": 5.0}
    assert update_metrics(update) == {
        "optim/loss": 1.0,
        "optim/grad_norm": 2.0,
        "tokens/trained": 3,
        "ratio/max": 4.0,
        "reverse_kl/full": 5.0,
    }
    with pytest.raises(KeyError):
        update_metrics({"undocumented": 1.0})


def test_the_log_survives_a_crash_and_forgets_later_steps(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate_after(3)  # nothing there yet
    for step in range(1, 5):
        log.append({"step": step, "loss": step / 8})
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2, 3, 4]
    log.truncate_after(2)
    log.append({"step": 3, "loss": 0.0})
    assert read_metrics(log.path) == [{"step": 1, "loss": 0.125}, {"step": 2, "loss": 0.25}, {"step": 3, "loss": 0.0}]


def test_numbers_that_json_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        MetricsLog(tmp_path / "metrics.jsonl").append({"loss": float("nan")})

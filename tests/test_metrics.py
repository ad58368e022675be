"""A step's numbers, worked out by hand, and the file they go to."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from tiny import prompt_of, rollout_of
from understudy.config_objective import ObjectiveConfig
from understudy.divergences import KINDS, Divergence
from understudy.errors import ConfigError
from understudy.lm_head import LMHead
from understudy.losses import cispo_loss, importance_sampling_loss, ppo_loss
from understudy.metrics import (
    MetricsLog,
    agreement_metrics,
    alignment,
    read_metrics,
    rollout_metrics,
    update_metrics,
)
from understudy.objectives import CrossEntropy, FullDivergence, Objective, PolicyGradient, TopkDivergence
from understudy.types import Batch, SampledScores, ScoredRollout, TrainingExample


def scored(
    ids: list[int],
    student: list[float],
    teacher: list[float] | None,
    reward: float | None = None,
    reference: list[float] | None = None,
):
    scores, other = (None if given is None else SampledScores(given) for given in (teacher, reference))
    return ScoredRollout(rollout_of(prompt_of([1]), ids, student), scores, reward, other)


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
            # No mark is below log 0.001.
            "teacher/rejected_share": 0.0,
            "teacher/rejected_first_share": 0.0,
            "teacher/rejected_end_share": 0.0,
        }
    )


def of_prompt(index: int, gaps: list[float], *, reward: float | None = None, **names: str) -> ScoredRollout:
    """Marked by ``gaps`` nats, written with log p = -1."""
    rollout = rollout_of(prompt_of([1], index, **names), [5] * len(gaps), [-1.0] * len(gaps))
    return ScoredRollout(rollout, SampledScores([-1.0 - gap for gap in gaps]), reward)


def test_standard_errors_are_over_prompts() -> None:
    """Prompt 0 has 3 tokens with a sum of 3, prompt 1 has 1 with 3: mean 1.5, r = 3 - 4.5 and 3 - 1.5, so
    sqrt(2 * (2.25 + 2.25)) / 4."""
    rows = [of_prompt(0, [1.0, 0.0], reward=1.0), of_prompt(0, [2.0], reward=0.0), of_prompt(1, [3.0], reward=1.0)]
    metrics = rollout_metrics(rows)
    assert metrics["reverse_kl/mean"] == 1.5
    assert metrics["reverse_kl/mean_se"] == pytest.approx(0.75)
    assert metrics["entropy/sampled_se"] == 0.0
    # Rewards: 1 of 2, and 1 of 1; mean 2/3, r = 1 - 4/3 and 1 - 2/3.
    assert metrics["reward/mean_se"] == pytest.approx(math.sqrt(2 * (1 / 9 + 1 / 9)) / 3)
    assert metrics["truncated/share"] == 1.0
    assert not [name for name in rollout_metrics(rows[:2]) if name.endswith("_se")]  # one prompt


def test_every_task_and_every_teacher_has_its_own_means() -> None:
    rows = [
        of_prompt(0, [1.0], task="sums", teacher="maths"),
        of_prompt(1, [3.0], task="sums", teacher="maths"),
        of_prompt(2, [5.0, 6.0], task="chat", teacher="default"),
    ]
    metrics = rollout_metrics(rows)
    assert metrics["by_task/sums/reverse_kl/mean"] == metrics["by_teacher/maths/reverse_kl/mean"] == 2.0
    assert metrics["by_task/sums/reverse_kl/mean_se"] == 1.0
    assert metrics["by_task/chat/completion_length/mean"] == 2.0
    assert metrics["by_teacher/default/reverse_kl/mean"] == 5.5
    assert "by_task/chat/reverse_kl/mean_se" not in metrics
    assert not [name for name in rollout_metrics([of_prompt(0, [1.0])]) if name.startswith("by_")]


def test_where_the_teacher_finds_tokens_impossible() -> None:
    rows = [
        scored([5, 6, 0], [-1.0] * 3, [-7.0, -1.0, -8.0]),
        scored([5, 0], [-1.0] * 2, [-6.9, -1.0]),  # e^-6.9 is just above 0.001
        scored([5, 6, 7], [-1.0] * 3, [-7.0, -1.0, -9.0]),  # cut: its last token is no end
    ]
    assert agreement_metrics(rows) == pytest.approx(
        {
            "teacher/rejected_share": 4 / 8,
            "teacher/rejected_first_share": 2 / 3,
            "teacher/rejected_end_share": 1 / 2,
        }
    )
    assert "teacher/rejected_end_share" not in agreement_metrics(rows[2:])
    assert agreement_metrics([scored([5, 0], [-1.0, -1.0], None)]) == {}


def test_the_alignment_of_an_update_with_its_advantages() -> None:
    own = TrainingExample(
        [1],
        [5, 6, 7],
        [True, True, False],
        sampler_logprobs=[-1.0, -2.0, -3.0],
        advantages=[3.0, 1.0, 99.0],
        weights=[1.0, 4.0, 1.0],
    )
    start = [-1.0, -2.0, -3.0]

    def found(moves: Sequence[float], before: Sequence[float] = start) -> float | None:
        return alignment([own], [before], [[a + b for a, b in zip(before, moves, strict=True)]])

    # What is wished for is (3, 4); the last token does not train.
    assert found([0.03, 0.04, -9.0]) == pytest.approx(1.0)
    assert found([-0.3, -0.4, 9.0]) == pytest.approx(-1.0)
    assert found([0.04, -0.03, 0.0]) == pytest.approx(0.0)
    assert found([0.05, 0.0, 0.0]) == pytest.approx(0.6)
    assert found([0.0, 0.0, 1.0]) is None
    # Trainer and sampler 0.01 apart: moves of less than three times that are rounding.
    assert found([0.031, 0.0, 0.0], before=[-1.01, -2.0, -3.0]) == pytest.approx(0.6)
    assert found([0.029, 0.0, 0.0], before=[-1.01, -2.0, -3.0]) is None
    assert alignment([TrainingExample([1], [5], [True])], [[-1.0]], [[-0.9]]) is None


def test_an_update_that_was_not_made_has_no_means_where_a_number_was_not_finite() -> None:
    update = {"loss": 1.0, "abs_log_ratio": 0.1, "tokens": 8, "skipped": 1.0, "nonfinite": 1.0}
    assert update_metrics(update) == {"tokens/trained": 8, "update/skipped": 1.0, "update/nonfinite": 1.0}
    del update["nonfinite"]
    assert update_metrics(update)["optim/loss"] == 1.0


def test_absent_teachers_and_graders_give_no_numbers() -> None:
    metrics = rollout_metrics([scored([5, 0], [-1.0, -0.5], None)])
    assert not {"reverse_kl/mean", "reverse_kl/max", "reference_kl/mean", "reward/mean"} & metrics.keys()
    # A clip without a teacher's marks has nothing to clip.
    assert rollout_metrics([scored([5, 0], [-1.0, -0.5], None)], ObjectiveConfig(signal_clip=0.1)) == metrics


CLIPPED = [
    scored([5, 0], [-1.0, -0.5], [-3.0, -0.25], None, [-2.0, -0.5]),  # gaps 2, -0.25; from the reference 1, 0
    scored([5, 5, 5], [-1.0, -1.0, -1.5], [-1.0, -1.5, -0.25], None, [-0.5, -1.0, -1.5]),  # 0, 0.5, -1.25; -0.5, 0, 0
]


def test_a_step_that_nobody_marked() -> None:
    assert rollout_metrics([], num_written=4) == {"teacher/away_share": 1.0}


def test_distance_from_the_reference() -> None:
    assert rollout_metrics(CLIPPED)["reference_kl/mean"] == pytest.approx(0.5 / 5)
    alone = rollout_metrics([scored([5], [-1.0], None, None, [-1.75])])
    assert alone["reference_kl/mean"] == 0.75
    assert "reverse_kl/mean" not in alone


@pytest.mark.parametrize(
    ("objective", "share"),
    [
        ({"signal_clip": 3.0}, 0.0),
        ({"signal_clip": 2.0}, 0.0),  # at the limit is not beyond it
        ({"signal_clip": 1.0}, 0.4),  # 2 and -1.25
        ({"signal_clip": 0.1}, 0.8),
        # 1.5 gap - 0.5 drift = (2.5, -0.375, 0.25, 0.75, -1.875): what is clipped is the extrapolated signal
        ({"signal_clip": 2.25, "extrapolation": 1.5}, 0.2),
        ({"signal_clip": 0.6, "extrapolation": 1.5}, 0.6),
    ],
)
def test_share_of_clipped_marks(objective: dict[str, float], share: float) -> None:
    metrics = rollout_metrics(CLIPPED, ObjectiveConfig.model_validate(objective))
    assert metrics["reverse_kl/clipped_share"] == pytest.approx(share)
    assert metrics["reverse_kl/mean"] == pytest.approx(1.0 / 5)  # the marks themselves are reported unclipped


def test_no_clip_no_share() -> None:
    assert "reverse_kl/clipped_share" not in rollout_metrics(CLIPPED, ObjectiveConfig())


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


HEAD = LMHead(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5]]))
HEADS = {"default": HEAD, "reference": HEAD}
IDS = torch.tensor([0, 2])
RATIO = {
    *("ratio/mean", "ratio/max", "ratio/abs_log_mean", "ratio/abs_log_max"),
    *("ratio/outside_share", "ratio/tail_share"),
}
CLIPPED_RATIO = RATIO | {"ratio/clipped_share"}
ENTROPIES = {"entropy/student", "entropy/teacher"}
TOPK = {"topk/divergence", "topk/student_mass", "topk/teacher_mass"}
EVERY_OBJECTIVE: dict[str, tuple[Objective, set[str]]] = {
    "cross-entropy": (CrossEntropy(), set()),
    "sampled": (PolicyGradient(), RATIO),
    "baseline": (PolicyGradient(baseline_heads=HEADS), RATIO | {"reverse_kl/full"}),
    "truncated": (PolicyGradient(policy_loss=partial(importance_sampling_loss, max_importance_ratio=2)), CLIPPED_RATIO),
    "band": (PolicyGradient(policy_loss=partial(importance_sampling_loss, importance_band=(0, 2))), CLIPPED_RATIO),
    "ppo": (PolicyGradient(policy_loss=ppo_loss), CLIPPED_RATIO),
    "cispo": (PolicyGradient(policy_loss=cispo_loss), CLIPPED_RATIO),
    **{
        kind: (
            FullDivergence(HEADS, divergence=Divergence(kind)),
            ENTROPIES | {f"{kind}/full"} | ({"entropy_gated/share"} if kind == "entropy_gated" else set()),
        )
        for kind in KINDS
    },
    "reference": (FullDivergence(HEADS, against="reference"), {"reference_kl/full"}),
    "topk": (TopkDivergence(2), TOPK),
    "topk of the student": (TopkDivergence(2, "student", heads=HEADS), TOPK),
    "topk of both": (TopkDivergence(2, "union", heads=HEADS), TOPK | {"topk/overlap"}),
}


@pytest.mark.parametrize("name", EVERY_OBJECTIVE)
def test_every_metric_of_every_objective_has_a_public_name(name: str) -> None:
    objective, names = EVERY_OBJECTIVE[name]
    hidden = torch.tensor([[0.5, -0.5], [1.0, 0.0]])
    batch = Batch(
        IDS[None],
        None,
        IDS,
        IDS,
        IDS >= 0,
        sampler_logprobs=torch.tensor([-1.0, -1.0]),
        advantages=torch.tensor([1.0, -1.0]),
        teacher_hidden=-hidden,
        teacher="default",
        sequence_tokens=2,
        num_sequences=1,
        reference_hidden=hidden / 2,
        topk_ids=torch.tensor([[0, 1], [2, 0]]),
        topk_logprobs=torch.tensor([[-0.5, -1.5], [-0.5, -1.5]]),
    )
    assert set(update_metrics(objective(batch, hidden, HEAD).metrics)) == names


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


@pytest.mark.parametrize(
    ("line", "got"),
    [
        (b'{"step": 2, "loss"', "Expecting ':' delimiter"),
        (b"\xff\xfe", "can't decode byte 0xff"),
        (b"[2]", "[2]"),
        (b'{"loss": 0.5}', "{'loss': 0.5}"),
        (b'{"step": 2, "loss": "low"}', "loss = 'low'"),
        (b'{"step": 2, "loss": 1e999}', "1e999, which is too large"),
    ],
)
def test_a_damaged_line_is_named(line: bytes, got: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.125}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(ConfigError) as refused:
        read_metrics(path)
    assert refused.value.where == f"{path}:2"
    assert got in refused.value.got


def test_alarms_hold_more_than_numbers(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "guards.jsonl")
    for step in (1, 2):
        log.append({"step": step, "guard": "entropy"})
    log.truncate_after(1)
    assert log.path.read_text() == '{"step": 1, "guard": "entropy"}\n'


def test_numbers_that_json_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        MetricsLog(tmp_path / "metrics.jsonl").append({"loss": float("nan")})

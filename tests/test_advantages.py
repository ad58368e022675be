"""Credit, with numbers worked out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny import prompt_of, rollout_of
from understudy.advantages import (
    CreditRules,
    distillation_advantages,
    group_advantages,
    reverse_kl,
    training_examples,
)
from understudy.types import HiddenScores, SampledScores, ScoredRollout

STUDENT = torch.tensor([-1.0, -2.0, -0.5])
TEACHER = torch.tensor([-3.0, -0.5, -0.5])  # reverse KL of the tokens: 2, -1.5, 0


def test_reverse_kl_is_student_minus_teacher() -> None:
    assert reverse_kl(STUDENT, TEACHER).tolist() == [2.0, -1.5, 0.0]


@pytest.mark.parametrize(
    ("discount", "expected"),
    [
        (0.0, [-2.0, 1.5, 0.0]),  # below zero where the teacher finds the token less likely
        (0.5, [-2.0 + 0.5 * 1.5, 1.5, 0.0]),
        (1.0, [-0.5, 1.5, 0.0]),
    ],
)
def test_discounted_credit(discount: float, expected: list[float]) -> None:
    assert distillation_advantages(STUDENT, TEACHER, discount=discount).tolist() == expected
    doubled = distillation_advantages(STUDENT, TEACHER, kl_coef=2.0, discount=discount)
    assert doubled.tolist() == [2 * value for value in expected]


logprobs = st.lists(st.tuples(*[st.floats(-20, 0)] * 2), min_size=1, max_size=12)


@given(logprobs, st.floats(0, 1))
def test_discounted_credit_is_the_sum_in_its_docstring(pairs: list[tuple[float, float]], discount: float) -> None:
    student, teacher = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    gaps = [p - q for p, q in pairs]
    expected = [
        -0.3 * sum(discount ** (k - t) * gaps[k] for k in range(t, len(gaps)))  # 0 ** 0 is 1
        for t in range(len(gaps))
    ]
    actual = distillation_advantages(student, teacher, kl_coef=0.3, discount=discount)
    assert actual.tolist() == pytest.approx(expected, abs=1e-10)


def test_credit_carries_no_gradient() -> None:
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    for discount in (0.0, 0.5):
        assert not distillation_advantages(student, teacher, discount=discount).requires_grad
    assert not group_advantages(student).requires_grad


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([-1.0, -2.0], [-1.0], r"\(2,\).*\(1,\)"),
        ([[-1.0]], [[-1.0]], "two vectors"),
        ([-1.0, -1.0], [-1.0, float("-inf")], r"teacher_logprobs\[1\] is -inf"),
        ([-1.0, float("nan")], [-1.0, -1.0], r"sampler_logprobs\[1\] is nan"),
        ([-1.0], [0.5], r"teacher_logprobs\[0\] is 0.5"),
    ],
)
def test_logprobs_that_are_none_are_refused(student: list, teacher: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distillation_advantages(torch.tensor(student), torch.tensor(teacher))


def test_rounding_above_zero_passes() -> None:
    assert distillation_advantages(torch.tensor([1e-6]), torch.tensor([0.0])).tolist() == pytest.approx([-1e-6])


def test_group_advantages() -> None:
    assert group_advantages(torch.tensor([1.0, 0.0, 0.0, 3.0])).tolist() == [0.0, -1.0, -1.0, 2.0]
    # deviations 0, -1, -1, 2: mean square 1.5
    normalized = group_advantages(torch.tensor([1.0, 0.0, 0.0, 3.0]), normalize=True)
    assert normalized.tolist() == pytest.approx([value / 1.5**0.5 for value in (0.0, -1.0, -1.0, 2.0)])
    for normalize in (False, True):
        assert group_advantages(torch.full((3,), 0.7), normalize=normalize).tolist() == pytest.approx([0] * 3, abs=1e-7)
        assert group_advantages(torch.tensor([5.0]), normalize=normalize).tolist() == [0.0]


def scored(index: int, ids: list[int], student: list[float], teacher: list[float] | None, reward: float | None):
    rollout = rollout_of(prompt_of([9, index], index, teacher=f"t{index}"), ids, student)
    return ScoredRollout(rollout, None if teacher is None else SampledScores(teacher), reward)


def group() -> list[ScoredRollout]:
    return [
        scored(1, [4, 0], [-1.0, -2.0], [-3.0, -0.5], 1.0),
        scored(1, [5], [-0.5], [-0.25], 0.0),
    ]


def test_examples_of_sampled_distillation() -> None:
    first, second = training_examples([group()], CreditRules())
    assert (first.prompt_ids, first.completion_ids, first.teacher) == ([9, 1], [4, 0], "t1")
    assert first.loss_mask == [True, True]  # the end token trains
    assert first.sampler_logprobs == [-1.0, -2.0]
    assert first.advantages == [-2.0, 1.5]
    assert second.advantages == [-0.25 * -1]
    assert first.teacher_hidden is None


def test_examples_add_rewards_centred_within_their_group() -> None:
    other = [scored(2, [3], [-1.0], [-1.0], 10.0), scored(2, [3], [-1.0], [-1.0], 14.0)]
    examples = training_examples([group(), other], CreditRules(kl_coef=0.5, reward_coef=4.0))
    # the teacher's part, halved, plus 4 * (reward - 0.5) and 4 * (reward - 12)
    assert [e.advantages for e in examples] == [[-1.0 + 2, 0.75 + 2], [0.125 - 2], [-8.0], [8.0]]
    rewarded = training_examples(
        [[scored(1, [4, 0], [-1.0] * 2, None, 3.0), scored(1, [5], [-1.0], None, 1.0)]],
        CreditRules(reward_coef=1),
    )
    assert [e.advantages for e in rewarded] == [[1.0, 1.0], [-1.0]]


def test_examples_of_full_distillation_carry_hidden_states() -> None:
    hidden = torch.arange(6.0).view(2, 3)
    rollout = group()[0].rollout
    one = ScoredRollout(rollout, HiddenScores([-3.0, -0.5], hidden), 1.0)
    [alone] = training_examples([[one]], CreditRules(estimator="full"))
    assert alone.teacher_hidden is hidden
    assert (alone.advantages, alone.sampler_logprobs) == (None, None)
    rewarded, _ = training_examples(
        [[one, ScoredRollout(rollout, one.scores, 0.0)]], CreditRules(estimator="full", reward_coef=2.0)
    )
    assert rewarded.teacher_hidden is hidden
    assert rewarded.advantages == [1.0, 1.0]  # the reward's part alone: the teacher's travels in the hidden states
    assert rewarded.sampler_logprobs == [-1.0, -2.0]


def test_credit_stays_within_its_sequence() -> None:
    """Whatever happens in a neighbour, with any discount, an example's advantages are its own: one per completion
    token, none for the prompt."""
    neighbours = [scored(1, [5], [-0.5], [-0.25], 0.0), scored(1, [5, 5, 0], [-4.0] * 3, [-0.1, -9.0, -1.0], 0.0)]
    for discount in (0.0, 0.5, 1.0):
        credits = [
            training_examples([[group()[0], other]], CreditRules(discount=discount))[0].advantages
            for other in neighbours
        ]
        swapped = [
            training_examples([[other, group()[0]]], CreditRules(discount=discount))[1].advantages
            for other in neighbours
        ]
        assert credits == swapped == [[-2.0 + discount * 1.5, 1.5]] * 2


def test_ungraded_rollouts_are_refused_where_rewards_count() -> None:
    with pytest.raises(ValueError, match=r"reward_coef is 1.0 but prompt 3 was not graded"):
        training_examples([[scored(3, [4], [-1.0], [-1.0], None)]], CreditRules(reward_coef=1.0))

"""Credit, with numbers worked out by hand."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny import prompt_of, rollout_of
from understudy.advantages import (
    CreditRules,
    distillation_advantages,
    fixed_negative_advantages,
    group_advantages,
    reverse_kl,
    swapped_marks,
    token_mask,
    training_examples,
)
from understudy.errors import RunError
from understudy.types import HiddenScores, Rollout, SampledScores, ScoredRollout, TopkScores, TrainingExample

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


REFERENCE = torch.tensor([-1.5, -1.0, -2.5])  # log p - log r of the tokens: 0.5, -1, 2
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # 1.25 (2, -1.5, 0) - 0.25 (0.5, -1, 2) = (2.375, -1.625, -0.5)
        ({"extrapolation": 1.25}, [-2.375, 1.625, 0.5]),
        ({"extrapolation": 1.25, "kl_coef": 2.0}, [-4.75, 3.25, 1.0]),
        ({"extrapolation": 0.5}, [-1.25, 1.25, -1.0]),  # half-way to the reference
        ({"anchor_coef": 0.5}, [-2.25, 2.0, -1.0]),
        ({"anchor_coef": 0.5, "kl_coef": 0.0}, [-0.25, 0.5, -1.0]),  # kl_coef is not the anchor's
        ({"extrapolation": 1.25, "anchor_coef": 0.5}, [-2.625, 2.125, -0.5]),
        ({"signal_clip": 1.75}, [-1.75, 1.5, 0.0]),
        ({"signal_clip": 1.75, "kl_coef": 2.0}, [-3.5, 3.0, 0.0]),  # nats are clipped, not advantages
        ({"signal_clip": 1.0, "discount": 0.5}, [-0.5, 1.0, 0.0]),  # clip (-1, 1, 0), then discount; not clip(-1.25)
        ({"signal_clip": 2.0, "extrapolation": 1.25}, [-2.0, 1.625, 0.5]),  # the extrapolated signal is what is clipped
        ({"signal_clip": 1.0, "anchor_coef": 1.0}, [-1.5, 2.0, -2.0]),  # the anchor is not
        ({"anchor_coef": 0.5, "discount": 1.0}, [-1.25, 1.0, -1.0]),
    ],
)
def test_signals_with_a_reference_and_a_clip(options: dict[str, float], expected: list[float]) -> None:
    actual = distillation_advantages(STUDENT, TEACHER, reference_logprobs=REFERENCE, **options)  # type: ignore[arg-type]
    assert actual.tolist() == expected


def test_a_missing_or_broken_reference_is_refused() -> None:
    for options in ({"extrapolation": 1.25}, {"anchor_coef": 0.1}):
        with pytest.raises(ValueError, match="got no reference_logprobs"):
            distillation_advantages(STUDENT, TEACHER, **options)
    with pytest.raises(ValueError, match=r"reference_logprobs\[2\] is -inf"):
        distillation_advantages(STUDENT, TEACHER, reference_logprobs=torch.tensor([-1, -1, -INF]), anchor_coef=1.0)
    with pytest.raises(ValueError, match=r"reference_logprobs \(2,\)"):
        distillation_advantages(STUDENT, TEACHER, reference_logprobs=REFERENCE[:2], anchor_coef=1.0)
    # Not asked for, it is not looked at.
    unused = distillation_advantages(STUDENT, TEACHER, reference_logprobs=torch.full((3,), -INF))
    assert unused.tolist() == [-2.0, 1.5, 0.0]


@given(logprobs, st.floats(0.1, 3), st.floats(0, 1))
def test_extrapolation_moves_the_target_along_the_line_through_the_reference(
    pairs: list[tuple[float, float]], extrapolation: float, discount: float
) -> None:
    """log p - log(q**l r**(1 - l)), whatever q and r are."""
    student = torch.full((len(pairs),), -0.5, dtype=torch.float64)
    teacher, reference = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    target = extrapolation * teacher + (1 - extrapolation) * reference
    actual = distillation_advantages(
        student, teacher, reference_logprobs=reference, extrapolation=extrapolation, discount=discount
    )
    shift = float(target.max().clamp(min=0))  # a target need not be a log-probability; moving both changes nothing
    expected = distillation_advantages(student - shift, target - shift, discount=discount)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("masked", [-INF, NAN, 3.0])
def test_masked_tokens_neither_get_nor_give_credit_and_may_hold_anything(masked: float) -> None:
    student = torch.tensor([-1.0, masked, -2.0, -0.5])
    teacher = torch.tensor([-3.0, masked, -0.5, -0.5])
    reference = torch.tensor([-1.5, masked, -1.0, -2.5])
    mask = torch.tensor([True, False, True, True])
    for options, expected in (
        ({}, [-2.0, 0.0, 1.5, 0.0]),
        ({"discount": 0.5}, [-2.0 + 0.25 * 1.5, 0.0, 1.5, 0.0]),  # it takes its place in the discount, and no more
        ({"discount": 1.0, "signal_clip": 1.0}, [0.0, 0.0, 1.0, 0.0]),
        ({"anchor_coef": 0.5}, [-2.25, 0.0, 2.0, -1.0]),
    ):
        credit = distillation_advantages(student, teacher, reference_logprobs=reference, loss_mask=mask, **options)
        assert credit.tolist() == expected
    with pytest.raises(ValueError, match=r"_logprobs\[1\] is"):
        distillation_advantages(student, teacher)


@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0), st.booleans()), min_size=1, max_size=12), st.data())
def test_masked_credit_is_that_of_a_signal_of_zero(rows: list[tuple[float, float, bool]], data: st.DataObject) -> None:
    discount = data.draw(st.floats(0, 1))
    student, teacher = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (0, 1))
    mask = torch.tensor([row[2] for row in rows])
    credit = distillation_advantages(student, teacher, discount=discount, loss_mask=mask)
    silenced = distillation_advantages(student, torch.where(mask, teacher, student), discount=discount)
    assert torch.equal(credit[mask], silenced[mask])
    assert torch.count_nonzero(credit[~mask]) == 0


def test_fixed_negative_faults_unlikely_tokens_alike() -> None:
    own = torch.tensor([0.099, 0.101, 1.0, 1e-9]).log()
    assert fixed_negative_advantages(own).tolist() == [-1.0, 0.0, 0.0, -1.0]
    assert fixed_negative_advantages(own, kl_coef=0.5, threshold=0.5).tolist() == [-0.5, -0.5, 0.0, -0.5]
    assert not fixed_negative_advantages(own.requires_grad_()).requires_grad


def written(*completions: Sequence[tuple[float, float]]) -> tuple[list[Rollout], list[SampledScores]]:
    """(student's, teacher's) log-probability of every token."""
    rollouts = [
        rollout_of(prompt_of([1], i), [5] * len(pairs), [p for p, _ in pairs]) for i, pairs in enumerate(completions)
    ]
    return rollouts, [SampledScores([q for _, q in pairs]) for pairs in completions]


def test_swapped_marks_are_the_next_completions_repeated_or_cut() -> None:
    long = [(-1.0, -2.0), (-1.0, -1.5), (-1.0, -0.5), (-3.0, -1.0), (-2.0, -2.0)]  # 1, 0.5, -0.5, -2, 0
    rollouts, scores = written(long, [(-1.0, -4.0), (-1.0, -0.75)], [(-0.5, -0.25)])
    marks = swapped_marks(rollouts, scores)
    assert [mark.tolist() for mark in marks] == [
        [3.0, -0.25, 3.0, -0.25, 3.0],  # the second one's, repeated
        [-0.25, -0.25],  # the third one's
        [1.0],  # the first one's, cut
    ]


def test_swapped_marks_need_two_completions() -> None:
    with pytest.raises(RunError, match="at least two completions a step; got one"):
        swapped_marks(*written([(-1.0, -2.0)]))


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_swapped_marks_have_their_completions_lengths(lengths: list[int]) -> None:
    rollouts, scores = written(*([(-1.0, -float(i) - 2)] * length for i, length in enumerate(lengths)))
    marks = swapped_marks(rollouts, scores)
    assert [len(mark) for mark in marks] == lengths
    # Whose they are: never one's own.
    assert [set(mark.tolist()) for mark in marks] == [{float((i + 1) % len(lengths)) + 1} for i in range(len(lengths))]


@pytest.mark.parametrize(
    ("length", "options", "trained"),
    [
        (4, {}, [0, 1, 2, 3]),
        (4, {"first": 2}, [0, 1]),
        (2, {"first": 9}, [0, 1]),
        (10, {"span": (0.0, 0.3)}, [0, 1, 2]),
        (10, {"span": (0.7, 1.0)}, [7, 8, 9]),
        (100, {"span": (0.0, 0.07)}, [*range(7)]),  # 0.07 * 100 is 7.000000000000001
        (100, {"span": (0.29, 0.3)}, [29]),  # 0.29 * 100 is 28.999999999999996
        (10, {"span": (0.29, 0.31)}, [2, 3]),  # a token that begins or ends inside counts
        (3, {"span": (0.0, 0.3)}, [0]),  # never none
        (3, {"span": (0.9, 1.0)}, [2]),
        (7, {"span": (0.0, 1.0)}, [*range(7)]),
        (6, {"masked_ids": frozenset({101, 104})}, [0, 2, 3, 5]),
        (6, {"first": 3, "masked_ids": frozenset({101, 104})}, [0, 2]),
        (10, {"span": (0.0, 0.3), "masked_ids": frozenset({100})}, [1, 2]),
    ],
)
def test_token_mask(length: int, options: dict[str, Any], trained: list[int]) -> None:
    mask = token_mask([100 + t for t in range(length)], **options)
    assert len(mask) == length
    assert [t for t, trains in enumerate(mask) if trains] == trained


@given(st.integers(1, 300), st.integers(1, 99))
def test_spans_that_meet_cover_every_token(length: int, percent: int) -> None:
    """Two parts of a completion miss no token, and share one at most: that in which the border falls."""
    border = percent / 100
    first, second = (token_mask([1] * length, span=span) for span in ((0.0, border), (border, 1.0)))
    assert all(a or b for a, b in zip(first, second, strict=True))
    assert sum(a and b for a, b in zip(first, second, strict=True)) == (length * percent % 100 != 0)


def one(completion: Sequence[int], scores: Any, **fields: Any) -> ScoredRollout:
    rollout = rollout_of(prompt_of([9], 1), completion, [-1.0] * len(completion))
    return ScoredRollout(rollout, scores, fields.get("reward"), fields.get("reference"))


def example(scored: ScoredRollout, **rules: Any) -> TrainingExample:
    [result] = training_examples([[scored]], CreditRules(**rules))
    return result


def test_examples_leave_tokens_out_of_mask_and_discount() -> None:
    scored = one([4, 7, 5, 0], SampledScores([-3.0, -9.0, -1.5, -2.0]))  # reverse KL 2, 8, 0.5, 1
    masked = example(scored, discount=1.0, masked_ids=frozenset({7}))
    assert masked.loss_mask == [True, False, True, True]
    assert masked.advantages == [-3.5, 0.0, -1.5, -1.0]
    first = example(scored, discount=1.0, first=2)
    assert (first.loss_mask, first.advantages) == ([True, True, False, False], [-10.0, -8.0, 0.0, 0.0])
    assert example(scored, span=(0.5, 1.0)).advantages == [0.0, 0.0, -0.5, -1.0]


def test_half_life_and_sequence_mean_are_weights() -> None:
    scored = one([4, 7, 5, 0], SampledScores([-1.0] * 4))
    assert example(scored).weights is None
    assert example(scored, half_life=1.0).weights == [1.0, 0.5, 0.25, 0.125]
    assert example(scored, half_life=2.0).weights == pytest.approx([1.0, 0.5**0.5, 0.5, 0.5**1.5])
    assert example(scored, sequence_mean=True).weights == [0.25] * 4
    # Divided by the tokens that train; t counts from the completion's start, masked tokens included.
    both = example(scored, sequence_mean=True, half_life=1.0, masked_ids=frozenset({7}))
    assert both.loss_mask == [True, False, True, True]
    assert both.weights == pytest.approx([1 / 3, 1 / 6, 1 / 12, 1 / 24])
    nothing = example(scored, sequence_mean=True, masked_ids=frozenset({0, 4, 5, 7}))
    assert (nothing.loss_mask, nothing.weights) == ([False] * 4, [1.0] * 4)


def test_topk_scores_travel() -> None:
    scores = TopkScores([-3.0, -0.5], [[4, 1], [0, 2]], [[-0.1, -3.0], [-0.5, -1.0]])
    alone = example(one([4, 0], scores), estimator="topk")
    assert (alone.topk_ids, alone.topk_logprobs) == (scores.ids, scores.logprobs)
    assert (alone.advantages, alone.sampler_logprobs, alone.teacher_hidden) == (None, None, None)
    graded = [one([4, 0], scores, reward=reward) for reward in (1.0, 0.0)]
    rewarded, _ = training_examples([graded], CreditRules(estimator="topk", reward_coef=2.0))
    assert rewarded.topk_ids == scores.ids
    assert rewarded.advantages == [1.0, 1.0]  # the reward's part alone
    # Marks that hold more than was asked for are not handed on.
    sampled = example(one([4, 0], scores))
    assert (sampled.topk_ids, sampled.topk_logprobs) == (None, None)
    assert sampled.advantages == [-2.0, 0.5]


def test_the_references_hidden_states_travel() -> None:
    hidden, other = torch.arange(6.0).view(2, 3), torch.ones(2, 3)
    scores, reference = HiddenScores([-3.0, -0.5], hidden), HiddenScores([-2.0, -2.0], other)
    both = example(one([4, 0], scores, reference=reference), estimator="full", anchor_coef=0.5)
    assert both.teacher_hidden is hidden
    assert both.reference_hidden is other
    assert both.advantages is None  # nothing of the reference is counted twice


def test_a_sampled_reference_is_part_of_the_advantages() -> None:
    scored = one([4, 0], SampledScores([-3.0, -0.5]), reference=SampledScores([-1.5, -3.0]))  # 2, -0.5; 0.5, 2
    assert example(scored, anchor_coef=0.5).advantages == [-2.25, -0.5]
    assert example(scored, extrapolation=1.5).advantages == [-2.75, 1.75]
    assert example(scored, anchor_coef=0.5).reference_hidden is None


def test_rewards_with_an_anchor_need_no_teacher() -> None:
    group = [
        one([4, 0], None, reward=1.0, reference=SampledScores([-1.5, -3.0])),
        one([5], None, reward=0.0, reference=SampledScores([-1.0])),
    ]
    rules = CreditRules(reward_coef=2.0, anchor_coef=0.5)
    assert [e.advantages for e in training_examples([group], rules)] == [[1.0 - 0.25, 1.0 - 1.0], [-1.0]]
    without = [one([4, 0], None, reward=1.0), one([5], None, reward=0.0)]
    assert [e.advantages for e in training_examples([without], CreditRules(reward_coef=2.0))] == [[1.0, 1.0], [-1.0]]


def test_controls_take_the_place_of_the_teachers_signal() -> None:
    rollout = rollout_of(prompt_of([9], 1), [4, 0], [math.log(0.5), math.log(0.05)])
    [[faulted]] = [training_examples([[ScoredRollout(rollout, None, None)]], CreditRules(control="fixed_negative"))]
    assert faulted.advantages == [0.0, -1.0]
    marked = ScoredRollout(rollout, SampledScores([-9.0, -9.0]), None)
    assert example(marked, control="fixed_negative", kl_coef=3.0, control_threshold=0.6).advantages == [-3.0, -3.0]
    groups = [[one([4, 0], SampledScores([-3.0, -1.5]))], [one([5], SampledScores([-1.25]))]]
    swapped = training_examples(groups, CreditRules(control="shuffled_teacher", kl_coef=2.0))
    assert [e.advantages for e in swapped] == [[-0.5, -0.5], [-4.0]]  # across prompts
    with pytest.raises(ValueError, match="needs a teacher's marks"):
        training_examples([[one([4], None)], [one([4], None)]], CreditRules(control="shuffled_teacher"))


def test_rewards_are_added_to_a_control() -> None:
    pair = [[one([4, 0], SampledScores([-3.0, -1.5]), reward=1.0), one([5], SampledScores([-1.25]), reward=0.0)]]
    swapped = training_examples(pair, CreditRules(control="shuffled_teacher", reward_coef=4.0))
    assert [e.advantages for e in swapped] == [[1.75, 1.75], [-4.0]]

"""Which teacher marks a rollout, what it reads, and marks that are refused. Values: tests/parity/test_scoring.py."""

from collections.abc import Sequence

import pytest

from tiny import prompt_of, rollout_of
from understudy.errors import NonFiniteError, RunError, ServerError, ServerUnavailable
from understudy.teacher_scores import score_reachable, score_reference, score_rollouts, teacher_view
from understudy.types import SampledScores, ScoreKind, TokenSequence, TopkScores


class Marks:
    """A teacher that answers with fixed lists and remembers what it was shown."""

    kinds: frozenset[ScoreKind] = frozenset({"sampled"})

    def __init__(self, *answers: list[float]) -> None:
        self.answers, self.shown = answers, []

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        raise AssertionError("score is what is asked")

    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0) -> list[SampledScores]:
        self.shown += [(list(s.prompt_ids), list(s.completion_ids)) for s in sequences]
        return [SampledScores(answer) for answer in self.answers]


def rollout(index: int, teacher: str = "default", **fields):
    return rollout_of(prompt_of([1, index], index, teacher=teacher, **fields), [index, 0], [-1.0, -1.0])


def test_the_teacher_reads_its_own_prompt_and_the_students_tokens() -> None:
    assert teacher_view(rollout(3)) == TokenSequence([1, 3], [3, 0])
    assert teacher_view(rollout(3, teacher_prompt_ids=[9, 9, 9])) == TokenSequence([9, 9, 9], [3, 0])
    assert teacher_view(rollout(3, teacher_prompt_ids=[])) == TokenSequence([], [3, 0])  # empty is not absent


def test_marks_come_back_in_the_given_order() -> None:
    teachers = {"a": Marks([-1.0, -1.5], [-3.0, -3.5]), "b": Marks([-2.0, -2.5]), "idle": Marks()}
    scores = score_rollouts(teachers, [rollout(1, "a"), rollout(2, "b"), rollout(3, "a")], "sampled")
    assert [s.teacher_logprobs for s in scores] == [[-1.0, -1.5], [-2.0, -2.5], [-3.0, -3.5]]
    assert teachers["a"].shown == [([1, 1], [1, 0]), ([1, 3], [3, 0])]
    assert teachers["b"].shown == [([1, 2], [2, 0])]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([-1.0], "prompt 4: got 1 scores for 2 completion tokens"),
        ([-1.0, float("-inf")], "token 0 at completion position 1 has log-probability -inf"),
        ([float("nan"), -1.0], "token 4 at completion position 0 has log-probability nan"),
        ([-1.0, 0.2], "log-probability 0.2; expected a finite value <= 0"),
    ],
)
def test_bad_marks_name_the_rollout(answer: list[float], message: str) -> None:
    with pytest.raises(RunError, match=message):
        score_rollouts({"default": Marks(answer)}, [rollout(4)], "sampled")


def test_a_missing_mark_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        score_rollouts({"default": Marks([-1.0, -1.0])}, [rollout(4), rollout(5)], "sampled")


class Away(Marks):
    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0) -> list[SampledScores]:
        raise ServerUnavailable("nobody answers")


class Wrong(Marks):
    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0) -> list[SampledScores]:
        raise ServerError("nonsense")


def test_a_teacher_that_is_away_takes_only_its_rows_with_it(caplog: pytest.LogCaptureFixture) -> None:
    teachers = {"a": Away(), "b": Marks([-2.0, -2.5])}
    rollouts = [rollout(1, "a"), rollout(2, "b"), rollout(3, "a")]
    scores = score_reachable(teachers, rollouts, "sampled", may_be_away=frozenset({"a"}))
    assert scores == [None, SampledScores([-2.0, -2.5]), None]
    assert "teacher 'a' is away, 2 completions go unmarked: nobody answers" in caplog.text


@pytest.mark.parametrize(
    ("teacher", "may_be_away"), [(Away(), set()), (Away(), {"b"}), (Wrong(), {"a"})], ids=["no", "another", "wrong"]
)
def test_it_stops_the_run_where_it_may_not_be_away_or_is_not(teacher: Marks, may_be_away: set[str]) -> None:
    teachers = {"a": teacher, "b": Marks([-2.0, -2.5])}
    with pytest.raises(ServerError):
        score_reachable(teachers, [rollout(1, "a"), rollout(2, "b")], "sampled", may_be_away=frozenset(may_be_away))


def test_a_step_of_one_lost_teacher_alone_goes_unmarked() -> None:
    teachers = {"a": Away(), "b": Marks([-2.0, -2.5])}
    assert score_reachable(teachers, [rollout(1, "a")], "sampled", may_be_away=frozenset({"a"})) == [None]


def test_nobody_left_to_mark_stops_the_run() -> None:
    with pytest.raises(ServerUnavailable, match="nobody answers"):
        score_reachable({"a": Away()}, [rollout(1, "a")], "sampled", may_be_away=frozenset({"a"}))


def test_the_reference_reads_what_the_student_read() -> None:
    """Whatever the teacher reads instead, and whichever teacher it is."""
    reference = Marks([-1.0, -1.5], [-2.0, -2.5], [-3.0, -3.5])
    rollouts = [rollout(1), rollout(2, "b", teacher_prompt_ids=[9, 9, 9]), rollout(3, teacher_prompt_ids=[])]
    scores = score_reference(reference, rollouts, "sampled")
    assert reference.shown == [([1, 1], [1, 0]), ([1, 2], [2, 0]), ([1, 3], [3, 0])]
    assert [s.teacher_logprobs for s in scores] == [[-1.0, -1.5], [-2.0, -2.5], [-3.0, -3.5]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([-1.0], "^reference, prompt 4: got 1 scores for 2 completion tokens"),
        ([-1.0, float("-inf")], "^reference, prompt 4: token 0 at completion position 1 has log-probability -inf"),
    ],
)
def test_bad_marks_of_the_reference_name_it(answer: list[float], message: str) -> None:
    with pytest.raises(RunError, match=message):
        score_reference(Marks(answer), [rollout(4, "b")], "sampled")


def test_a_missing_mark_of_the_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        score_reference(Marks([-1.0, -1.0]), [rollout(4), rollout(5)], "sampled")


class Alternatives(Marks):
    """Two tokens' marks with fixed alternatives."""

    kinds: frozenset[ScoreKind] = frozenset({"sampled", "topk"})

    def __init__(self, ids: list[list[int]], logprobs: list[list[float]]) -> None:
        super().__init__([-1.0, -1.0])
        self.ids, self.logprobs = ids, logprobs

    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0) -> list[TopkScores]:
        return [TopkScores([-1.0, -1.0], self.ids, self.logprobs) for _ in sequences]


@pytest.mark.parametrize(
    ("ids", "logprobs", "message"),
    [
        ([[1, 2]], [[-1.0, -2.0]], "got alternatives for 1 positions .*expected 2"),
        ([[1, 2], [1, 2]], [[-1.0, -2.0]], r"got alternatives for 2 positions \(1 with"),
        ([[1, 2], [1]], [[-1.0, -2.0], [-1.0]], "completion position 1 has 1 alternatives"),
        ([[1, 2, 3]] * 2, [[-2.0] * 3] * 2, "completion position 0 has 3 alternatives and 3 .*of the 2"),
        ([[1, 2], [1, 1]], [[-1.0, -2.0]] * 2, r"position 1 has alternatives \[1, 1\]; expected different"),
        ([[1, -2], [1, 2]], [[-1.0, -2.0]] * 2, r"position 0 has alternatives \[1, -2\]"),
        ([[1, 2]] * 2, [[-1.0, -2.0], [-0.1, -0.2]], "position 1 has alternatives of probability 1.724 in all"),
        ([[1, 2]] * 2, [[-1.0, -2.0], [-0.1, float("nan")]], "position 1 has alternatives of probability nan"),
    ],
)
def test_bad_alternatives_name_rollout_and_position(
    ids: list[list[int]], logprobs: list[list[float]], message: str
) -> None:
    with pytest.raises(RunError, match=f"teacher 'default', prompt 4.*{message}"):
        score_rollouts({"default": Alternatives(ids, logprobs)}, [rollout(4)], "topk", topk=2)


def test_alternatives_that_are_no_numbers_are_told_from_those_that_are_wrong() -> None:
    for value, kind in ((float("nan"), NonFiniteError), (-0.2, RunError)):
        teacher = Alternatives([[1, 2]] * 2, [[-1.0, -2.0], [-0.1, value]])
        with pytest.raises(RunError) as error:
            score_rollouts({"default": teacher}, [rollout(4)], "topk", topk=2)
        assert type(error.value) is kind


def test_good_alternatives_pass() -> None:
    teacher = Alternatives([[1, 2]] * 2, [[-0.5, -5.0]] * 2)
    [score] = score_rollouts({"default": teacher}, [rollout(4)], "topk", topk=2)
    assert isinstance(score, TopkScores)
    assert score.ids == [[1, 2]] * 2

"""A run in a log."""

from __future__ import annotations

import io

from understudy.live.lines import StepLines, line_of, summary
from understudy.live.track import Track


def test_the_exact_kl_stands_for_both() -> None:
    row = {
        "step": 3,
        "reverse_kl/full": 0.25,
        "reverse_kl/mean": 0.5,
        "optim/loss": 1.0,
        "completion_length/mean": 12.4,
    }
    assert summary(row) == "reverse KL 0.250  loss 1.000  length 12"


def test_evaluations_are_shown_without_their_errors() -> None:
    row = {"step": 0, "eval/sums/greedy": 0.5, "eval/sums/greedy_se": 0.1, "eval/sums/greedy_truncated": 0.2}
    row |= {"eval/sums/t0.6": 0.25, "eval/sums/t0.6_pass@2": 0.4, "eval/sums/t0.6_no_answer": 0.3}
    assert summary(row) == "sums/greedy 0.500  sums/t0.6 0.250"


def test_a_line_says_how_fast_and_how_long() -> None:
    track = Track("sft  runs/a", "sft", 4).with_row({"step": 1}, 0.0)
    track = track.with_row({"step": 2, "optim/loss": 0.5, "tokens/trained": 4000}, 2.0)
    assert line_of(track) == "sft  runs/a step 2/4, 4 s left, 2,000 tokens/s  loss 0.500"


def test_a_row_that_is_looked_at_again_is_not_news() -> None:
    out = io.StringIO()
    lines, track = StepLines(out), Track("sft", "sft", 4).with_row({"step": 4, "optim/loss": 0.5})
    for _ in range(3):
        lines.show(track)
    track = track.with_row({"step": 4, "optim/loss": 0.5, "eval/a/t1": 1.0})
    lines.show(track)
    lines.show(track, last=True)
    assert out.getvalue().splitlines() == ["sft step 4/4  loss 0.500", "sft step 4/4  loss 0.500  a/t1 1.000"]

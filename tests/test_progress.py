"""What a run says while it works."""

import pytest

from understudy.progress import StepProgress, summary


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


def test_a_log_gets_a_line_when_there_is_news(capsys: pytest.CaptureFixture[str]) -> None:
    progress = StepProgress("distill", first_step=2, num_steps=4)
    progress.update({"step": 3, "optim/loss": 2.0})
    assert capsys.readouterr().err == ""
    progress.update({"step": 3, "eval/a/t1": 0.5})
    progress.update({"step": 4, "optim/loss": 1.0})
    progress.close()
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("distill step 3/4, ")
    assert first.endswith("a/t1 0.500")
    assert last.startswith("distill step 4/4")
    assert last.endswith("loss 1.000")


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    progress = StepProgress("sft", first_step=0, num_steps=1, quiet=True)
    progress.update({"step": 1, "optim/loss": 1.0, "eval/a/t1": 1.0})
    progress.close()
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""

"""What a run says while it works."""

import pytest

from understudy.progress import StepProgress


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

"""What the recorder keeps of a step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tiny import prompt_of, rollout_of, teacher_of, tiny_model, tiny_tokenizer
from understudy.backends.local import LocalTeacher
from understudy.config import RunConfig
from understudy.recorder import Recorder
from understudy.rollout_store import read_rollouts
from understudy.runs import RunFolder
from understudy.stopping import StopRequest
from understudy.trackers import Trackers
from understudy.types import ScoredRollout, TokenSequence, TopkScores, TrainingExample


class Trainer:
    """Gives log-probabilities for the first few sequences only."""

    def __init__(self, answers: int) -> None:
        self.answers = answers

    def compute_logprobs(self, sequences: Any) -> list[list[float]]:
        return [[-1.0] * len(s.completion_ids) for s in sequences][: self.answers]


class Text:
    tokenizer = tiny_tokenizer(["e", "a", "b"])

    def tokens(self, ids: Any) -> list[str]:
        return [str(i) for i in ids]


def keep(folder: Path, answers: int, *, topk: int = 0, marker: LocalTeacher | None = None) -> Path:
    config = RunConfig.model_validate(
        {"output_dir": str(folder), "student": {"model": "m"}, "rollouts": {"per_step": 2, "topk": topk}}
    )
    scored = [ScoredRollout(rollout_of(prompt_of([1], i), [2, 0], [-0.5, -0.5]), None, None) for i in range(3)]
    examples = [TrainingExample([1], [2, 0], [True, True], advantages=[float(i)] * 2) for i in range(3)]
    with RunFolder(config, method="rl") as run:
        parts: Any = {"trainer": Trainer(answers), "teachers": {}, "student": Text(), "evaluate": dict}
        parts |= {"marker": marker, "trackers": Trackers(config, run.path)}
        recorder = Recorder(run, config, **parts, stop=StopRequest(), quiet=True)
        recorder.keep_rollouts(0, scored, examples)
    return folder / "rollouts" / "step_000000.jsonl"


def test_the_first_rollouts_of_a_step_are_kept(tmp_path: Path) -> None:
    records = read_rollouts(keep(tmp_path / "run", answers=2))
    assert [(r["prompt_index"], r["advantages"], r["trainer_logprobs"]) for r in records] == [
        (0, [0.0, 0.0], [-1.0, -1.0]),
        (1, [1.0, 1.0], [-1.0, -1.0]),
    ]
    # This trainer's weights are not at hand, and nobody teaches.
    unknown = ("student_entropy", "teacher_entropy", "student_topk", "teacher_topk")
    assert [r[name] for r in records for name in unknown] == [None] * 8


def test_weights_at_hand_say_what_else_the_student_could_have_written(tmp_path: Path) -> None:
    marker = teacher_of(tiny_model())
    [exact] = marker.score([TokenSequence([1], [2, 0])], "topk", topk=6)
    assert isinstance(exact, TopkScores)
    entropy = [-math.fsum(math.exp(value) * value for value in row) for row in exact.logprobs]
    for topk in (0, 4):
        path = keep(tmp_path / str(topk), answers=0, topk=topk, marker=marker)  # this trainer is not asked
        for record in read_rollouts(path):
            assert record["trainer_logprobs"] == pytest.approx(exact.teacher_logprobs, abs=1e-6)
            assert record["student_entropy"] == pytest.approx(entropy, abs=1e-6)
            found = record["student_topk"]
            assert (found and found["ids"]) == ([row[:4] for row in exact.ids] if topk else None)
            assert not found or found["logprobs"] == [pytest.approx(row[:4], abs=1e-6) for row in exact.logprobs]


def test_a_trainer_that_leaves_a_rollout_out_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        keep(tmp_path / "run", answers=1)

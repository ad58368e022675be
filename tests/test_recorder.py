"""What the recorder keeps of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny import prompt_of, rollout_of, tiny_tokenizer
from understudy.config import RunConfig
from understudy.recorder import Recorder
from understudy.rollout_store import read_rollouts
from understudy.runs import RunFolder
from understudy.stopping import StopRequest
from understudy.trackers import Trackers
from understudy.types import ScoredRollout, TrainingExample


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


def keep(folder: Path, answers: int) -> Path:
    config = RunConfig.model_validate(
        {"output_dir": str(folder), "student": {"model": "m"}, "rollouts": {"per_step": 2, "topk": 0}}
    )
    scored = [ScoredRollout(rollout_of(prompt_of([1], i), [2, 0], [-0.5, -0.5]), None, None) for i in range(3)]
    examples = [TrainingExample([1], [2, 0], [True, True], advantages=[float(i)] * 2) for i in range(3)]
    with RunFolder(config, method="rl") as run:
        parts: Any = {"trainer": Trainer(answers), "teachers": {}, "student": Text(), "evaluate": dict}
        recorder = Recorder(run, config, **parts, stop=StopRequest(), trackers=Trackers(config, run.path), quiet=True)
        recorder.keep_rollouts(0, scored, examples)
    return folder / "rollouts" / "step_000000.jsonl"


def test_the_first_rollouts_of_a_step_are_kept(tmp_path: Path) -> None:
    records = read_rollouts(keep(tmp_path / "run", answers=2))
    assert [(r["prompt_index"], r["advantages"], r["trainer_logprobs"]) for r in records] == [
        (0, [0.0, 0.0], [-1.0, -1.0]),
        (1, [1.0, 1.0], [-1.0, -1.0]),
    ]


def test_a_trainer_that_leaves_a_rollout_out_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        keep(tmp_path / "run", answers=1)

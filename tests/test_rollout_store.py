"""rollouts/step_NNNNNN.jsonl: what goes in comes out, and unknown versions are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from understudy import Prompt, Rollout, ScoredRollout, TopkScores
from understudy.next_tokens import NextTokens
from understudy.rollout_store import read_rollouts, rollout_record, rollouts_path, write_rollouts


def record(**changes: object) -> dict:
    prompt = Prompt(7, [1, 2], "May?", task="sums", answer="72", teacher_prompt_ids=[3], metadata={"line": "a\u2028b"})
    scores = TopkScores([-0.25, -2.0], [[5, 6], [6, 5]], [[-0.25, -1.5], [-2.0, -2.5]])
    scored = ScoredRollout(Rollout(prompt, [5, 6], [-1 / 3, -0.5], "length", 3, 3), scores, 1.0)
    made = rollout_record(
        scored,
        step=3,
        sample_index=1,
        tokens=lambda ids: [f"t{i}" for i in ids],
        text="t5 t6",
        trainer_logprobs=[-0.3333334, -0.5],
        advantages=[0.1, -1.5],
        loss_mask=[True, False],
        alternatives=scores,
        student=NextTokens([0.1234567, 1.0], [[6], [5]], [[-0.125], [-1.0000004]]),
        teacher_entropy=[2.0, 0.0],
    )
    return made | changes


def test_a_record_holds_every_number() -> None:
    made = record()
    assert made["sampler_logprobs"] == [-0.333333, -0.5]
    assert made["teacher_logprobs"] == [-0.25, -2.0]
    assert made["advantages"] == [0.1, -1.5]
    assert made["teacher_topk"] == {
        "ids": [[5, 6], [6, 5]],
        "tokens": [["t5", "t6"], ["t6", "t5"]],
        "logprobs": [[-0.25, -1.5], [-2.0, -2.5]],
    }
    assert made["student_topk"] == {"ids": [[6], [5]], "tokens": [["t6"], ["t5"]], "logprobs": [[-0.125], [-1.0]]}
    assert (made["student_entropy"], made["teacher_entropy"]) == ([0.123457, 1.0], [2.0, 0.0])
    assert (made["prompt_ids"], made["teacher_prompt_ids"], made["completion_ids"]) == ([1, 2], [3], [5, 6])
    assert (made["finish_reason"], made["reward"], made["answer"], made["sample_index"]) == ("length", 1.0, "72", 1)
    assert made["loss_mask"] == [True, False]


def test_written_and_read(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path / "rollouts", 3, [record(), record(step=4)])
    assert path == rollouts_path(tmp_path / "rollouts", 3) == tmp_path / "rollouts" / "step_000003.jsonl"
    assert [json.loads(line)["step"] for line in path.read_text().split("\n") if line] == [3, 4]
    assert read_rollouts(path) == [record(), record(step=4)]


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path, 0, [record(schema_version=2)])
    with pytest.raises(ValueError, match="got schema_version 2, expected 1"):
        read_rollouts(path)

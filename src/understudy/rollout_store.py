"""rollouts/step_NNNNNN.jsonl: scored rollouts as every later page reads them. Schema in docs/rollouts.md.

``step`` counts the optimizer steps behind the policy that wrote them: 0 is the untrained student.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.checkpoints import write_jsonl, writing
from understudy.types import ScoredRollout, TopkScores

if TYPE_CHECKING:
    from understudy.next_tokens import NextTokens

SCHEMA_VERSION = 1


def rollout_record(
    scored: ScoredRollout,
    *,
    step: int,
    sample_index: int,
    tokens: Callable[[Sequence[int]], list[str]],
    text: str,
    trainer_logprobs: Sequence[float] | None,
    advantages: Sequence[float] | None,
    loss_mask: Sequence[bool],
    alternatives: TopkScores | None,
    student: NextTokens | None = None,
    teacher_entropy: Sequence[float] | None = None,
) -> dict[str, Any]:
    """One line of the file. ``tokens`` turns ids into the text of each; ``alternatives`` are the teacher's."""
    rollout, prompt = scored.rollout, scored.rollout.prompt
    return {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "prompt_index": prompt.index,
        "sample_index": sample_index,
        "task": prompt.task,
        "teacher": prompt.teacher,
        "prompt_text": prompt.text,
        "prompt_ids": list(prompt.prompt_ids),
        "teacher_prompt_ids": None if prompt.teacher_prompt_ids is None else list(prompt.teacher_prompt_ids),
        "answer": prompt.answer,
        "completion_text": text,
        "completion_ids": list(rollout.completion_ids),
        "completion_tokens": tokens(rollout.completion_ids),
        "finish_reason": rollout.finish_reason,
        "reward": scored.reward,
        "policy_version_start": rollout.policy_version_start,
        "policy_version_end": rollout.policy_version_end,
        "sampler_logprobs": _short(rollout.sampler_logprobs),
        "trainer_logprobs": None if trainer_logprobs is None else _short(trainer_logprobs),
        "teacher_logprobs": None if scored.scores is None else _short(scored.scores.teacher_logprobs),
        "student_entropy": None if student is None else _short(student.entropy),
        "teacher_entropy": None if teacher_entropy is None else _short(teacher_entropy),
        "advantages": None if advantages is None else _short(advantages),
        "loss_mask": list(loss_mask),
        "teacher_topk": None if alternatives is None else _topk(alternatives, tokens),
        "student_topk": _topk(student, tokens) if student and any(student.ids) else None,
        "metadata": dict(prompt.metadata),
    }


def _topk(found: TopkScores | NextTokens, tokens: Callable[[Sequence[int]], list[str]]) -> dict[str, Any]:
    return {
        "ids": [list(ids) for ids in found.ids],
        "tokens": [tokens(ids) for ids in found.ids],
        "logprobs": [_short(row) for row in found.logprobs],
    }


def _short(values: Sequence[float]) -> list[float]:
    """Six decimals are below float32's noise and halve the file."""
    return [round(value, 6) for value in values]


def rollouts_path(folder: Path, step: int) -> Path:
    """Where the rollouts of the policy after ``step`` optimizer steps live."""
    return folder / f"step_{step:06d}.jsonl"


def write_rollouts(folder: Path, step: int, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write one step's records, all or none."""
    with writing(folder):
        folder.mkdir(exist_ok=True)
    path = rollouts_path(folder, step)
    write_jsonl(path, records)
    return path


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """Records of one file. Raises ValueError for a schema this version does not know."""
    # Not splitlines, which also splits at the line separators of Unicode that texts may hold.
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    for record in records:
        if record.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"{path}: got schema_version {record.get('schema_version')}, expected {SCHEMA_VERSION}")
    return records

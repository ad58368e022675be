"""Records -> records with marks: log-probabilities, entropies and alternatives of student and teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from understudy.backends.local import LocalTeacher
from understudy.errors import ConfigError
from understudy.tokenization import ModelText
from understudy.types import HiddenScores, TokenSequence

Record = dict[str, Any]

# Positions whose distribution over the vocabulary is held at once: 150,000 tokens take 40 MB in float32.
_POSITIONS_AT_ONCE = 64
# Completions whose hidden states wait at once: 256 tokens of 4,096 numbers take 4 MB.
_SEQUENCES_AT_ONCE = 32


@dataclass(frozen=True)
class Marks:
    """A model's view of one completion: ``logprobs`` [T] and ``entropy`` [T] in nats, and its ``k`` likeliest tokens at
    every position, best first: ``ids`` and ``topk_logprobs`` [T, k]."""

    logprobs: Sequence[float]
    entropy: Sequence[float]
    ids: Sequence[Sequence[int]]
    topk_logprobs: Sequence[Sequence[float]]


@torch.no_grad()
def mark(model: LocalTeacher, sequences: Sequence[TokenSequence], *, topk: int) -> list[Marks]:
    """Every completion as ``model`` sees it. Entropies are exact, over its whole vocabulary."""
    found = []
    parts = (sequences[i : i + _SEQUENCES_AT_ONCE] for i in range(0, len(sequences), _SEQUENCES_AT_ONCE))
    for scores in (one for part in parts for one in model.score(part, "hidden")):
        assert isinstance(scores, HiddenScores)
        entropy: list[float] = []
        ids: list[list[int]] = []
        values: list[list[float]] = []
        for hidden in scores.teacher_hidden.split(_POSITIONS_AT_ONCE):
            logprobs = model.head.logprobs(hidden.to(model.model.device), temperature=model.temperature)
            best = logprobs.topk(min(topk, logprobs.shape[1]))
            # A token of probability zero adds nothing; 0 * -inf would be NaN.
            entropy += (-(logprobs.exp() * logprobs).nan_to_num(0.0).sum(-1)).tolist()
            ids += best.indices.tolist()
            values += best.values.tolist()
        found.append(Marks(list(scores.teacher_logprobs), entropy, ids, values))
    return found


def as_ids(record: Record, text: ModelText, render: Callable[[Record], list[int]], end_id: int | None) -> Record:
    """``record`` with ``prompt_ids``, ``completion_ids`` and ``completion_tokens``, made from its texts where missing.

    ``end_id`` goes behind a completion given as text whose ``finish_reason`` is "stop": it was written, and the text
    leaves it out.
    """
    ids = record.get("completion_ids")
    if ids is None:
        ids = text.encode_completion(str(record["completion_text"]))
        if record.get("finish_reason") == "stop" and end_id is not None:
            ids = [*ids, end_id]
        lists = [name for name in ("sampler_logprobs", "teacher_logprobs", "advantages") if record.get(name)]
        if lists and len(record[lists[0]]) != len(ids):
            raise ConfigError(
                f"record of prompt {record.get('prompt_index')}",
                got=f"{len(record[lists[0]])} {lists[0]} for a text of {len(ids)} tokens",
                expected="completion_ids, where numbers per token are given: a text can be written in several ways",
                remedy="keep the ids in the file, or leave the numbers out",
            )
    beyond = [token for token in ids if not 0 <= token < text.vocab_width]
    if beyond:
        raise ConfigError(
            f"record of prompt {record.get('prompt_index')}",
            got=f"token {beyond[0]}",
            expected=f"ids below {text.vocab_width}, the vocabulary of {text.name}",
            remedy="name the model that wrote the file, or one with its tokenizer",
        )
    made = {
        "completion_ids": list(ids),
        "completion_tokens": record.get("completion_tokens") or text.tokens(ids),
        "prompt_ids": record.get("prompt_ids") or render(record),
    }
    if record.get("completion_text") is None:
        made["completion_text"] = text.tokenizer.decode(list(ids), skip_special_tokens=True)
    if record.get("prompt_text") is None:
        made["prompt_text"] = text.tokenizer.decode(list(made["prompt_ids"]))
    return record | made


def with_marks(
    records: Sequence[Record],
    text: ModelText,
    *,
    student: LocalTeacher | None,
    teacher: LocalTeacher | None,
    topk: int,
) -> list[Record]:
    """Records of ``as_ids`` with what the models at hand make of them.

    The student's own log-probabilities are taken only where a record has none: those of the moment of writing count.
    The teacher reads ``teacher_prompt_ids`` where a record has them.
    """
    made = [dict(record) for record in records]
    if student is not None:
        sequences = [TokenSequence(record["prompt_ids"], record["completion_ids"]) for record in made]
        for record, marks in zip(made, mark(student, sequences, topk=topk), strict=True):
            if record.get("sampler_logprobs") is None:
                record["sampler_logprobs"] = list(marks.logprobs)
            record |= {"student_entropy": list(marks.entropy), "student_topk": _topk(marks, text)}
    if teacher is not None:
        sequences = [
            TokenSequence(record.get("teacher_prompt_ids") or record["prompt_ids"], record["completion_ids"])
            for record in made
        ]
        for record, marks in zip(made, mark(teacher, sequences, topk=topk), strict=True):
            record |= {
                "teacher_logprobs": list(marks.logprobs),
                "teacher_entropy": list(marks.entropy),
                "teacher_topk": _topk(marks, text),
            }
    return made


def _topk(marks: Marks, text: ModelText) -> Mapping[str, Any] | None:
    if not marks.ids or not marks.ids[0]:
        return None
    return {
        "ids": [list(row) for row in marks.ids],
        "tokens": [text.tokens(row) for row in marks.ids],
        "logprobs": [list(row) for row in marks.topk_logprobs],
    }

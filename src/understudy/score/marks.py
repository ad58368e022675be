"""Records -> records with marks: log-probabilities, entropies and alternatives of student and teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from understudy.backends.local import LocalTeacher
from understudy.errors import ConfigError
from understudy.next_tokens import NextTokens, next_tokens_of
from understudy.tokenization import ModelText
from understudy.types import TokenSequence

Record = dict[str, Any]


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
        for record, logprobs, tokens in zip(made, *next_tokens_of(student, sequences, topk=topk), strict=True):
            if record.get("sampler_logprobs") is None:
                record["sampler_logprobs"] = list(logprobs)
            record |= {"student_entropy": list(tokens.entropy), "student_topk": _topk(tokens, text)}
    if teacher is not None:
        sequences = [
            TokenSequence(record.get("teacher_prompt_ids") or record["prompt_ids"], record["completion_ids"])
            for record in made
        ]
        for record, logprobs, tokens in zip(made, *next_tokens_of(teacher, sequences, topk=topk), strict=True):
            record |= {
                "teacher_logprobs": list(logprobs),
                "teacher_entropy": list(tokens.entropy),
                "teacher_topk": _topk(tokens, text),
            }
    return made


def _topk(likeliest: NextTokens, text: ModelText) -> Mapping[str, Any] | None:
    if not likeliest.ids or not likeliest.ids[0]:
        return None
    return {
        "ids": [list(row) for row in likeliest.ids],
        "tokens": [text.tokens(row) for row in likeliest.ids],
        "logprobs": [list(row) for row in likeliest.logprobs],
    }

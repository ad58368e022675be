"""Scored tokens in the form that pages carry: distinct tokens once, every number in a column of few bytes.

One block serves one rollout beside its markup as well as a thousand on a page of their own; ``tokens.js`` reads both.

    form        2
    texts, ids  the distinct tokens: text, and id where known
    shown       the text to print, of those whose own is invisible in part: {index: text}
    lengths     tokens per rollout
    notes       per rollout {position: note}
    pieces      per rollout {position: [characters, part, parts, shown]}: tokens that hold single bytes of characters
    left_out    per rollout the positions that its text leaves out, as end tokens
    columns     name -> [type, first byte, entries]: u1, u2, u4 (unsigned) or f4; first the lowest byte of every
                entry, then the next of every one: high bytes are much alike, and pack well side by side
    packing     "none" or "deflate" (zlib)
    bytes       all columns, packed, in base64

Columns with one entry per token of all rollouts: ``token`` (index into texts), ``gap`` (0 nothing, 1 a space, 2 a line
break before it), ``student``, ``teacher``, ``trainer``, ``entropy``, ``teacher_entropy`` (thousandths of a nat;
log-probabilities with their sign turned; ``trainer`` is what it adds to a known ``student``, modulo 65,536: most often
next to nothing), ``advantage``, ``trains``. ``best_count`` and ``own_count`` say how many
alternatives of the teacher and of the student belong to a token; ``best_token``, ``best_code``, ``own_token`` and
``own_code`` list them one after the other.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from understudy.report.token_text import Alignment, align, visible_text

Row = Mapping[str, Any]

FORM = 2
# Codes of the two-byte columns for what has no number.
INFINITE, UNKNOWN = 65534, 65535
# An alternative less likely than this would print as 0.0 %.
MIN_ALTERNATIVE_LOGPROB = math.log(5e-4)
# A byte per alternative: its code is proportional to the root of minus its log-probability, so that probabilities from
# a half on are exact to one percent of their value, and the least likely to three.
CODE_SCALE = 255 / math.sqrt(-MIN_ALTERNATIVE_LOGPROB)

_GAPS = {"": 0, " ": 1, "\n": 2}
# Column -> field of a stored rollout.
_NATS = {
    "student": ("sampler_logprobs", -1000.0),
    "teacher": ("teacher_logprobs", -1000.0),
    "trainer": ("trainer_logprobs", -1000.0),
    "entropy": ("student_entropy", 1000.0),
    "teacher_entropy": ("teacher_entropy", 1000.0),
}
_ALTERNATIVES = {"best": "teacher_topk", "own": "student_topk"}


def token_texts(rollout: Row) -> list[str]:
    """The completion's tokens as text; their ids where texts are not stored."""
    texts = rollout.get("completion_tokens")
    if texts is None:
        return [str(token_id) for token_id in rollout.get("completion_ids") or []]
    return [str(text) for text in texts]


def per_token(rollout: Row, key: str, length: int) -> list[float | None]:
    """The first ``length`` values of a per-token list; ``None`` where the list is missing or short."""
    values = [None if value is None else float(value) for value in (rollout.get(key) or [])[:length]]
    return values + [None] * (length - len(values))


def reverse_kl(rollout: Row) -> list[float | None]:
    """``sampler_logprobs - teacher_logprobs`` per token, in nats; ``None`` if either is unknown."""
    length = len(token_texts(rollout))
    sampler, teacher = (per_token(rollout, key, length) for key in ("sampler_logprobs", "teacher_logprobs"))
    return [
        None if s is None or t is None or math.isnan(s - t) else s - t for s, t in zip(sampler, teacher, strict=True)
    ]


class _Vocabulary:
    """Distinct (text, id) pairs in order of appearance."""

    def __init__(self) -> None:
        self._index: dict[tuple[str, int | None], int] = {}

    def add(self, text: str, token_id: int | None) -> int:
        return self._index.setdefault((text, token_id), len(self._index))

    def to_json(self) -> dict[str, Any]:
        texts = [text for text, _ in self._index]
        shown = {i: visible_text(text) for i, text in enumerate(texts) if visible_text(text) != text}
        return {"texts": texts, "ids": [token_id for _, token_id in self._index], "shown": shown}


def pack(
    rollouts: Sequence[Row],
    *,
    notes: Sequence[Mapping[int, str]] | None = None,
    max_tokens: int | None = None,
    compress: bool = True,
) -> dict[str, Any]:
    """Stored rollouts as the block described above. ``notes``: per rollout, by position. ``max_tokens`` cuts each."""
    vocabulary = _Vocabulary()
    texts = [token_texts(rollout) for rollout in rollouts]
    lengths = [len(own[:max_tokens]) for own in texts]
    columns = {"token": _array(_tokens(rollouts, texts, lengths, vocabulary), "u4")}
    columns |= _number_columns(rollouts, lengths)
    for name, field in _ALTERNATIVES.items():
        columns |= _alternative_columns(name, [rollout.get(field) for rollout in rollouts], lengths, vocabulary)
    marked = [
        {str(i): note for i, note in own.items() if 0 <= i < length}
        for own, length in zip(notes or [{}] * len(rollouts), lengths, strict=True)
    ]
    alignments = [
        align(own, str(rollout.get("completion_text") or "")) for rollout, own in zip(rollouts, texts, strict=True)
    ]
    gaps = [_GAPS[gap] for one, length in zip(alignments, lengths, strict=True) for gap in one.gaps[:length]]
    if any(gaps):
        columns["gap"] = _array(gaps, "u1")
    return {
        "form": FORM,
        **vocabulary.to_json(),
        "lengths": lengths,
        **({"notes": marked} if any(marked) else {}),
        **_alignment_json(alignments, lengths),
        **_packed(columns, len(vocabulary.to_json()["texts"]), compress),
    }


def _alignment_json(alignments: Sequence[Alignment], lengths: Sequence[int]) -> dict[str, Any]:
    pairs = list(zip(alignments, lengths, strict=True))
    pieces = [
        {
            str(i): [p.characters, p.part, p.parts, visible_text(p.characters)]
            for i, p in one.pieces.items()
            if i < length
        }
        for one, length in pairs
    ]
    left_out = [[i for i in one.left_out if i < length] for one, length in pairs]
    return ({"pieces": pieces} if any(pieces) else {}) | ({"left_out": left_out} if any(left_out) else {})


def _tokens(
    rollouts: Sequence[Row], texts: Sequence[list[str]], lengths: Sequence[int], vocabulary: _Vocabulary
) -> list[int]:
    indices = []
    for rollout, own, length in zip(rollouts, texts, lengths, strict=True):
        ids = list(rollout.get("completion_ids") or [])
        ids += [None] * (len(own) - len(ids))
        indices += [vocabulary.add(text, token_id) for text, token_id in zip(own[:length], ids[:length], strict=True)]
    return indices


def _number_columns(rollouts: Sequence[Row], lengths: Sequence[int]) -> dict[str, np.ndarray[Any, Any]]:
    """The columns that hold a number per token and are known for at least one."""

    def joined(field: str) -> list[float | None]:
        pairs = zip(rollouts, lengths, strict=True)
        return [value for rollout, length in pairs for value in per_token(rollout, field, length)]

    columns = {}
    for name, (field, factor) in _NATS.items():
        values = joined(field)
        if any(value is not None for value in values):
            columns[name] = _array([_code(value, factor) for value in values], "u2")
    if {"student", "trainer"} <= columns.keys():
        columns["trainer"] = columns["trainer"] - columns["student"]
    advantages = joined("advantages")
    if any(value is not None for value in advantages):
        columns["advantage"] = _short(_array([math.nan if v is None else v for v in advantages], "f4"))
    trains = [value is None or bool(value) for value in joined("loss_mask")]
    if not all(trains):
        columns["trains"] = _array(trains, "u1")
    return columns


def _code(nats: float | None, factor: float) -> int:
    """Thousandths of a nat, at most 65.533; negative rounding noise is zero."""
    if nats is None or math.isnan(nats):
        return UNKNOWN
    thousandths = nats * factor
    if math.isinf(thousandths):
        return INFINITE
    return max(0, min(INFINITE - 1, round(thousandths)))


def _short(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 rounded to eleven bits of mantissa: four digits, and zeros that pack away."""
    known = np.isfinite(values)
    bits = values.view("<u4")
    rounded = ((bits + np.uint32(0x800)) & np.uint32(0xFFFFF000)).astype("<u4").view("<f4")
    return np.where(known, rounded, values).astype("<f4")


def _alternative_columns(
    name: str, topks: Sequence[Mapping[str, Any] | None], lengths: Sequence[int], vocabulary: _Vocabulary
) -> dict[str, np.ndarray[Any, Any]]:
    """Counts, tokens and codes of alternatives, without the very unlikely; nothing if no rollout has any."""
    if not any(topks):
        return {}
    counts: list[int] = []
    tokens: list[int] = []
    codes: list[int] = []
    for topk, length in zip(topks, lengths, strict=True):
        for likely in _likely(topk, length, vocabulary):
            counts.append(len(likely))
            tokens += [token for token, _ in likely]
            codes += [code for _, code in likely]
    return {f"{name}_count": _array(counts, "u1"), f"{name}_token": _array(tokens, "u4")} | {
        f"{name}_code": _array(codes, "u1")
    }


def _likely(topk: Mapping[str, Any] | None, length: int, vocabulary: _Vocabulary) -> Iterable[list[tuple[int, int]]]:
    """Per token (index, code) of each alternative worth showing."""
    if not topk:
        yield from ([] for _ in range(length))
        return
    ids = topk.get("ids") or [[None] * len(row) for row in topk["logprobs"]]
    texts = topk.get("tokens") or [[str(token_id) for token_id in row] for row in ids]
    rows = list(zip(texts[:length], ids[:length], topk["logprobs"][:length], strict=True))
    for row in rows:
        yield [
            (vocabulary.add(str(text), token_id), alternative_code(logprob))
            for text, token_id, logprob in zip(*row, strict=True)
            if logprob is not None and logprob >= MIN_ALTERNATIVE_LOGPROB
        ][:255]
    yield from ([] for _ in range(length - len(rows)))


def alternative_code(logprob: float) -> int:
    """The byte of a log-probability; ``alternative_logprob`` turns it back.

    >>> alternative_code(0.0), alternative_code(MIN_ALTERNATIVE_LOGPROB)
    (0, 255)
    """
    return min(255, round(CODE_SCALE * math.sqrt(max(0.0, -logprob))))


def alternative_logprob(code: int) -> float:
    """The log-probability that a byte stands for."""
    return -((code / CODE_SCALE) ** 2)


def _array(values: Sequence[Any], kind: str) -> np.ndarray[Any, Any]:
    return np.asarray(values, dtype=f"<{kind}")


def _packed(columns: Mapping[str, np.ndarray[Any, Any]], num_tokens: int, compress: bool) -> dict[str, Any]:
    """Columns one behind the other, each with its bytes in planes."""
    small = {
        name: column.astype("<u2") if name.endswith("token") and num_tokens <= UNKNOWN else column
        for name, column in columns.items()
    }
    index: dict[str, list[Any]] = {}
    parts: list[bytes] = []
    for name, column in small.items():
        index[name] = [f"{column.dtype.kind}{column.dtype.itemsize}", sum(map(len, parts)), len(column)]
        parts.append(column.view("u1").reshape(-1, column.itemsize).T.tobytes())
    return {"columns": index, **_block(b"".join(parts), compress)}


def _block(whole: bytes, compress: bool) -> dict[str, str]:
    packed = zlib.compress(whole, 9) if compress else whole
    return {"packing": "deflate" if compress else "none", "bytes": base64.b64encode(packed).decode("ascii")}


def packed_json(content: object) -> dict[str, str]:
    """``content`` as JSON, packed as columns are."""
    return _block(_json(content).encode(), compress=True)


def _json(content: object) -> str:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # lone surrogates have no UTF-8


def json_script(identity: str, content: object) -> Markup:
    """``content`` as a data block of a page. No text in it can end the block: every ``<`` is written as its escape."""
    safe = _json(content).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return Markup(f'<script type="application/json" id="{identity}">{safe}</script>')


def json_attribute(name: str, content: object) -> str:
    """``content`` as an attribute. Single quotes outside let JSON's double quotes stand, which saves a fifth."""
    escaped = _json(content).replace("&", "&amp;").replace("'", "&#39;").replace("<", "&lt;")
    return f" {name}='{escaped}'"

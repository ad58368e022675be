"""Sequences as requests, and what every scoring server's reply is held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from understudy.backends.http import BadReply, Reply, Request, ServerClient
from understudy.errors import RunError, ServerError
from understudy.types import SampledScores, ScoreKind, Scores, TokenSequence, TopkScores

HIGHEST = 1e-3  # log-probabilities are at most 0, but for rounding
NO_CHANCE = -9999.0  # vLLM's stand-in for minus infinity, which JSON does not have


@dataclass(frozen=True)
class Piece:
    """One sequence of a request. ``number``: its place among those that were asked for; ``ids`` [L]: prompt, then
    completion; ``start``: where the completion begins."""

    number: int
    ids: list[int]
    start: int

    def place(self, position: int) -> str:
        """What errors call a position of the sequence."""
        if position < self.start:
            return f"sequence {self.number}, prompt position {position} (token {self.ids[position]})"
        return f"sequence {self.number}, completion position {position - self.start} (token {self.ids[position]})"


@dataclass(frozen=True)
class Marks:
    """A piece's marks as they were sent: for each completion token its log-probability, and (id, log-probability) of
    alternatives, in any order."""

    logprobs: list[float]
    alternatives: list[list[tuple[int, float]]]


def pieces_of(sequences: Sequence[TokenSequence], who: str) -> list[Piece]:
    """The sequences as plain integers.

    Raises:
        RunError: a prompt is empty: the first token of all has no log-probability.
    """
    pieces = [
        Piece(i, [int(token) for token in (*sequence.prompt_ids, *sequence.completion_ids)], len(sequence.prompt_ids))
        for i, sequence in enumerate(sequences)
    ]
    if empty := [piece.number for piece in pieces if piece.start == 0]:
        raise RunError(
            f"{who}: sequence {empty[0]} has an empty prompt; expected at least one token before the first that is "
            "scored. Give every prompt a begin-of-text token"
        )
    return pieces


def requests_of(pieces: Sequence[Piece], max_tokens: int) -> list[list[Piece]]:
    """The pieces in groups of at most ``max_tokens`` tokens, or one. Those that share a prompt stand side by side, in
    order, so that a server reads it once."""
    first: dict[tuple[int, ...], int] = {}
    prompts = [first.setdefault(tuple(piece.ids[: piece.start]), i) for i, piece in enumerate(pieces)]
    groups: list[list[Piece]] = []
    room = 0
    for i in sorted(range(len(pieces)), key=lambda i: (prompts[i], i)):
        length = len(pieces[i].ids)
        if not groups or length > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(pieces[i])
        room -= length
    return groups


def score_with(
    client: ServerClient,
    request: Callable[[list[Piece]], Request[list[Scores]]],
    sequences: Sequence[TokenSequence],
    max_marks: int,
    who: str,
    *,
    topk: int = 0,
) -> list[Scores]:
    """Scores in the order of ``sequences``, by requests for at most ``max_marks`` marks: alternatives take a server
    longer to write down than tokens to read. Raises as ``pieces_of`` and the client do."""
    groups = requests_of(pieces_of(sequences, who), max_marks // (1 + topk))
    answers = client.map([request(group) for group in groups])
    scores = {
        piece.number: score
        for group, answer in zip(groups, answers, strict=True)
        for piece, score in zip(group, answer, strict=True)
    }
    return [scores[i] for i in range(len(sequences))]


def check_kind(kind: ScoreKind, kinds: frozenset[ScoreKind], topk: int, who: str) -> None:
    """Raise ValueError for scores that a teacher does not give."""
    if kind not in kinds or (kind == "topk" and topk < 1):
        raise ValueError(f"{who}: got kind {kind!r} with topk = {topk}; expected one of {sorted(kinds)}, topk above 0")


def named(pieces: Sequence[Piece]) -> str:
    """What errors call a request's sequences."""
    numbers = ", ".join(str(piece.number) for piece in pieces[:3])
    more = f" and {len(pieces) - 3} more" if len(pieces) > 3 else ""
    return f"sequence{'s' if len(pieces) > 1 else ''} {numbers}{more}"


def number(value: Any, where: str) -> float:
    """A JSON number as a float. null is a number that JSON cannot hold, as some servers write it: NaN.

    Raises:
        BadReply: it is none.
    """
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise BadReply(f"{where}: got log-probability {value!r}; expected a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def scores_of(marks: Iterable[Marks], pieces: Sequence[Piece], kind: ScoreKind, topk: int, who: str) -> list[Scores]:
    """Marks of a well-formed reply as scores: the ``topk`` best alternatives, the smaller id first among equals.

    Raises:
        BadReply: too few alternatives.
        ServerError: a log-probability that is not finite, or above 0: asked again, the server would say the same.
    """
    scores: list[Scores] = []
    for piece, own in zip(pieces, marks, strict=True):
        for t, value in enumerate(own.logprobs):
            _check(value, piece.place(piece.start + t), who)
        if kind == "sampled":
            scores.append(SampledScores(own.logprobs))
            continue
        rows = [_best(row, topk, piece.place(piece.start + t), who) for t, row in enumerate(own.alternatives)]
        scores.append(
            TopkScores(own.logprobs, [[i for i, _ in row] for row in rows], [[p for _, p in r] for r in rows])
        )
    return scores


def _best(row: list[tuple[int, float]], topk: int, where: str, who: str) -> list[tuple[int, float]]:
    if len(row) < topk or len({i for i, _ in row}) < len(row):
        raise BadReply(f"{where}: got alternatives {[i for i, _ in row]}; expected {topk} different tokens")
    for token, value in row:
        _check(value, f"{where}, alternative {token}", who)
    return sorted(row, key=lambda pair: (-pair[1], pair[0]))[:topk]


def _check(value: float, where: str, who: str) -> None:
    if not math.isfinite(value) or value > HIGHEST or value <= NO_CHANCE:
        stand_in = " (its stand-in for minus infinity)" if value == NO_CHANCE else ""
        raise ServerError(
            f"{who}, {where}: got log-probability {value}{stand_in}; expected a finite number, at most 0. Serve the "
            "teacher in bfloat16 or float32, and with log-probabilities before any processing"
        )


def choices_of(reply: Reply, count: int) -> list[dict[str, Any]]:
    """A reply's choices by index; there are ``count``.

    Raises:
        BadReply: there are others.
    """
    tree = reply.json()
    choices = tree.get("choices") if isinstance(tree, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BadReply(f"got {str(tree)[:200]}; expected choices")
    by_index = {choice["index"]: choice for choice in choices if type(choice.get("index")) is int}
    if len(choices) != count or by_index.keys() != set(range(count)):
        raise BadReply(
            f"got choices {[choice.get('index') for choice in choices]}; expected 0 to {count - 1}, each once"
        )
    return [by_index[i] for i in range(count)]


def token_id(value: Any, where: str) -> int:
    """A JSON number as a token id.

    Raises:
        BadReply: it is none.
    """
    if type(value) is not int or value < 0:
        raise BadReply(f"{where}: got token id {value!r}; expected a number, 0 or more")
    return value


def same_ids(told: Any, ids: Sequence[int], where: str) -> None:
    """Raise BadReply unless a reply's ids are those that were sent."""
    if not isinstance(told, list) or [type(i) for i in told] != [int] * len(told) or told != list(ids):
        got = f"{len(told)} others" if isinstance(told, list) else repr(told)
        raise BadReply(f"{where}: got {got}; expected the {len(ids)} token ids that were sent")

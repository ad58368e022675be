"""A teacher behind `understudy serve teacher`, which gives more than log-probabilities of what was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any

from understudy.backends.http import BadReply, Reply, Request, ServerClient, client_of
from understudy.backends.served_scores import Marks, Piece, check_kind, named, number, score_with, scores_of, token_id
from understudy.backends.vllm import VllmTeacher
from understudy.config_served import ServerConfig
from understudy.errors import ServerError
from understudy.lm_head import LMHead
from understudy.serve.binary import digest, unpack_head, unpack_hidden
from understudy.types import ScoreKind, Scores, TokenSequence, TopkScores


class ServedTeacher:
    """Marks over POST /v1/score: alternatives of the teacher's choice or the caller's, and hidden states in bfloat16,
    from which ``head``, fetched once, gives the whole vocabulary's logits.

    ``vocab_size``: how many ids student and teacher share; the head is cut to them. A reply that another model wrote
    than the one first asked is an error: a server that was restarted with other weights is another teacher.

    Raises:
        ConfigError: a url or an API key that cannot be used.
    """

    kinds: frozenset[ScoreKind] = frozenset({"sampled", "topk", "chosen", "hidden"})
    temperature = 1.0

    def __init__(self, config: ServerConfig, *, name: str = "default", client: ServerClient | None = None) -> None:
        self._client = client or client_of(config, name=name)
        # What it has in common with vLLM: which model, which context, which tokens.
        self._plain = VllmTeacher(config, name=name, client=self._client)
        self._owns_client = client is None
        self._wanted, self._request_tokens = config.served_model, config.connection.request_tokens
        self._who = f"teacher {name!r} at {self._client.root}"
        self._fingerprint: str | None = None
        self._head: tuple[LMHead, str] | None = None
        self.vocab_size: int | None = None

    @property
    def max_topk(self) -> int | None:
        """Alternatives it gives at most; None until the server has said."""
        return self._plain.max_topk

    @property
    def head(self) -> LMHead:
        """For full-vocabulary objectives."""
        head, _ = self._fetched_head()
        return head if self.vocab_size is None else head.sliced(self.vocab_size)

    def cancel(self) -> None:
        """End what is under way: see ``ServerClient.cancel``."""
        self._client.cancel()

    def close(self) -> None:
        """Close its client."""
        if self._owns_client:
            self._client.close()

    def check(self, *, longest: int, topk: int = 0) -> None:
        """See ``VllmTeacher.check``."""
        self._plain.check(longest=longest, topk=topk)

    def identity(self) -> str:
        """See ``VllmTeacher.identity``."""
        return self._plain.identity()

    def vocabulary(self, tokenizer: Any) -> bool:
        """See ``VllmTeacher.vocabulary``."""
        return self._plain.vocabulary(tokenizer)

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """See ``Teacher.compute_logprobs``. Raises as ``score``."""
        return [list(scores.teacher_logprobs) for scores in self.score(sequences, "sampled")]

    def score(
        self,
        sequences: Sequence[TokenSequence],
        kind: ScoreKind,
        *,
        topk: int = 0,
        ids: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> list[Scores]:
        """See ``Teacher.score``. ``ids`` [sequence][position][k]: for kind "chosen".

        Raises:
            ServerUnavailable: the server was away for longer than patience allows.
            ServerError: it refused, its replies stay malformed, a log-probability is not finite, or its model is no
                longer the one it was.
        """
        check_kind(kind, self.kinds, topk if kind == "topk" else 1, self._who)
        if kind == "hidden":
            self._fetched_head()
        request = partial(self._request, kind=kind, topk=topk, ids=ids)
        alternatives = {"topk": topk, "chosen": len(ids[0][0]) if ids and ids[0] else 0}.get(kind, 0)
        return score_with(self._client, request, sequences, self._request_tokens, self._who, topk=alternatives)

    def _request(
        self, pieces: list[Piece], kind: ScoreKind, topk: int, ids: Sequence[Sequence[Sequence[int]]] | None
    ) -> Request[list[Scores]]:
        sequences = [{"prompt_ids": p.ids[: p.start], "completion_ids": p.ids[p.start :]} for p in pieces]
        body: dict[str, Any] = {"model": self._wanted, "sequences": sequences, "kind": kind}
        if kind == "topk":
            body["topk"] = topk
        if kind == "chosen":
            assert ids is not None
            body["ids"] = [[list(row) for row in ids[piece.number]] for piece in pieces]
        read = self._read_hidden if kind == "hidden" else self._read_scores
        parse = partial(read, pieces=pieces, kind=kind, topk=topk, ids=body.get("ids"))
        return Request("POST", "/v1/score", body, parse=parse, what=named(pieces))

    def _read_scores(
        self, reply: Reply, *, pieces: list[Piece], kind: ScoreKind, topk: int, ids: list[Any] | None
    ) -> list[Scores]:
        tree = reply.json()
        entries = tree.get("scores") if isinstance(tree, dict) else None
        if not isinstance(entries, list) or len(entries) != len(pieces):
            raise BadReply(f"got {str(tree)[:200]}; expected scores of {len(pieces)} sequences")
        self._check_fingerprint(tree.get("fingerprint"))
        _check_digests([entry.get("digest") if isinstance(entry, dict) else None for entry in entries], pieces)
        marks = [_marks(entry, piece, kind) for entry, piece in zip(entries, pieces, strict=True)]
        if kind != "chosen":
            return scores_of(marks, pieces, kind, topk, self._who)
        assert ids is not None
        return [_as_asked(own, piece, rows, self._who) for own, piece, rows in zip(marks, pieces, ids, strict=True)]

    def _read_hidden(self, reply: Reply, *, pieces: list[Piece], **_: Any) -> list[Scores]:
        try:
            scores, metadata = unpack_hidden(reply.content)
        except ValueError as error:
            raise BadReply(str(error)) from None
        lengths = [len(piece.ids) - piece.start for piece in pieces]
        if [len(score.teacher_logprobs) for score in scores] != lengths:
            raise BadReply(f"got states for {[len(s.teacher_logprobs) for s in scores]} tokens; expected {lengths}")
        self._check_fingerprint(metadata["fingerprint"])
        _check_digests(metadata.get("digests", "").split(), pieces)
        head, head_hash = self._fetched_head()
        if metadata["head"] != head_hash:
            raise ServerError(f"{self._who}: got states for another head than the one it sent; start the run anew")
        for score, piece in zip(scores, pieces, strict=True):
            if score.teacher_hidden.shape[1] != head.weight.shape[1] or not score.teacher_hidden.isfinite().all():
                shape = tuple(score.teacher_hidden.shape)
                raise BadReply(
                    f"sequence {piece.number}: got states {shape}; expected finite ones, {head.weight.shape[1]} wide"
                )
        marks = [Marks(list(score.teacher_logprobs), []) for score in scores]
        scores_of(marks, pieces, "sampled", 0, self._who)
        return list[Scores](scores)

    def _check_fingerprint(self, fingerprint: Any) -> None:
        if self._fingerprint is None:
            self._fingerprint = fingerprint
        if not isinstance(fingerprint, str) or fingerprint != self._fingerprint:
            raise ServerError(
                f"{self._who}: got marks of the model {fingerprint}; expected {self._fingerprint}, which marked "
                "before. Serve that checkpoint again, in the same dtype, or start a new run"
            )

    def _fetched_head(self) -> tuple[LMHead, str]:
        if self._head is None:
            self._head = self._client.call(Request("GET", "/v1/head", parse=_head, what="its LM head"))
        return self._head


def _check_digests(told: Sequence[Any], pieces: Sequence[Piece]) -> None:
    """Raise BadReply unless scores are of the sequences that were asked about, in their order."""
    for digest_told, piece in zip_longest(told, pieces):
        if piece is None or digest_told != digest(TokenSequence(piece.ids[: piece.start], piece.ids[piece.start :])):
            number_of = "one more sequence" if piece is None else f"sequence {piece.number}"
            raise BadReply(f"{number_of}: got scores of something else (digest {digest_told!r})")


def _head(reply: Reply) -> tuple[LMHead, str]:
    try:
        head, head_hash = unpack_head(reply.content)
    except ValueError as error:
        raise BadReply(str(error)) from None
    frozen = replace(head, weight=head.weight.requires_grad_(False))
    return frozen, head_hash


def _marks(entry: Any, piece: Piece, kind: ScoreKind) -> Marks:
    length = len(piece.ids) - piece.start
    keys = ("logprobs",) if kind == "sampled" else ("logprobs", "ids", "topk_logprobs")
    columns: list[Any] = [entry.get(key) for key in keys] if isinstance(entry, dict) else []
    if len(columns) != len(keys) or not all(isinstance(c, list) and len(c) == length for c in columns):
        raise BadReply(
            f"sequence {piece.number}: got {str(entry)[:200]}; expected {', '.join(keys)} of {length} tokens"
        )
    places = [piece.place(piece.start + t) for t in range(length)]
    logprobs = [number(value, place) for value, place in zip(columns[0], places, strict=True)]
    if kind == "sampled":
        return Marks(logprobs, [])
    return Marks(logprobs, [_pairs(*row) for row in zip(*columns[1:], places, strict=True)])


def _pairs(ids: Any, logprobs: Any, where: str) -> list[tuple[int, float]]:
    if not isinstance(ids, list) or not isinstance(logprobs, list) or len(ids) != len(logprobs):
        raise BadReply(f"{where}: got alternatives {str(ids)[:80]} and {str(logprobs)[:80]}; expected as many of both")
    return [(token_id(i, where), number(p, where)) for i, p in zip(ids, logprobs, strict=True)]


def _as_asked(marks: Marks, piece: Piece, rows: list[list[int]], who: str) -> Scores:
    """The marks of chosen ids, in the order they were asked for."""
    [score] = scores_of([Marks(marks.logprobs, [])], [piece], "sampled", 0, who)
    for t, (row, asked) in enumerate(zip(marks.alternatives, rows, strict=True)):
        if [token for token, _ in row] != asked:
            raise BadReply(f"{piece.place(piece.start + t)}: got other ids than were asked for")
        scores_of([Marks([p for _, p in row], [])], [Piece(piece.number, [0, *asked], 1)], "sampled", 0, who)
    logprobs = [[p for _, p in row] for row in marks.alternatives]
    return TopkScores(score.teacher_logprobs, [list(row) for row in rows], logprobs)

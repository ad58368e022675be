"""A teacher behind SGLang's own API, POST /generate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from understudy.backends.http import BadReply, Reply, Request, ServerClient, client_of
from understudy.backends.served_models import (
    CHECK_SECONDS,
    PROBE_IDS,
    SameWeights,
    check_tokens,
    fingerprint_of,
    refusing,
    served_model,
)
from understudy.backends.served_scores import (
    Marks,
    Piece,
    check_kind,
    named,
    number,
    same_ids,
    score_with,
    scores_of,
    token_id,
)
from understudy.config_served import ServerConfig
from understudy.errors import ConfigError, ServerError
from understudy.types import ScoreKind, Scores, TokenSequence

RESERVED = 6  # a sequence has to be shorter than the context by more than this


class SglangTeacher:
    """Marks over POST /generate: token ids in, ``input_token_logprobs`` out, from the last token of the prompt on, so
    that prompts stay in the server's cache. At temperature 1: SGLang does not scale the log-probabilities of an input.

    Its ``token_ids_logprob`` is one list for all positions of a sequence, so kind "chosen" is not offered.

    ``client``: instead of one of its own; it stays open.

    Raises:
        ConfigError: a url or an API key that cannot be used.
    """

    kinds: frozenset[ScoreKind] = frozenset({"sampled", "topk"})
    temperature = 1.0
    max_topk: int | None = None

    def __init__(self, config: ServerConfig, *, name: str = "default", client: ServerClient | None = None) -> None:
        self._client = client or client_of(config, name=name)
        self._owns_client = client is None
        self._wanted = config.served_model
        self._request_tokens = config.connection.request_tokens
        self._who = f"teacher {name!r} at {self._client.root}"
        self._weights = SameWeights(self._probe_marks, self._who)

    def cancel(self) -> None:
        """End what is under way: see ``ServerClient.cancel``."""
        self._client.cancel()

    def close(self) -> None:
        """Close its client."""
        if self._owns_client:
            self._client.close()

    def check(self, *, longest: int, topk: int = 0) -> None:
        """Whether a run can work with this server: it is there, has the model and room for ``longest`` tokens, marks
        the tokens of an input, and gives ``topk`` alternatives.

        Raises:
            ConfigError: it cannot.
        """
        server = "an SGLang server, which answers /model_info"
        with refusing(self._who, expected=server, remedy="correct the url; the root without /v1 will do"):
            info = self._info(CHECK_SECONDS)
            model = served_model(self._client, self._wanted, self._who, patience_seconds=CHECK_SECONDS)
            room = self._room(model.max_model_len)
        if info.get("is_generation") is False or model.parent is not None:
            raise ConfigError(
                self._who,
                got=f"the adapter {model.id!r}" if model.parent is not None else "an embedding model",
                expected="a whole language model",
                remedy="serve one; merge an adapter into its base",
            )
        if room is not None and longest > room:
            raise ConfigError(
                self._who,
                got=f"room for {room} tokens",
                expected=f"prompt and completion, up to {longest}",
                remedy=f"serve it with --context-length {longest + RESERVED + 1} and memory for as many, or lower "
                "sampling.max_completion_tokens",
            )
        marks = "log-probabilities of an input's tokens" + (f", and {topk} alternatives" if topk else "")
        with refusing(self._who, expected=marks, remedy="use a version of SGLang that has them"):
            request = self._request([Piece(0, list(PROBE_IDS[:2]), 1)], "topk" if topk else "sampled", topk)
            self._client.call(request, patience_seconds=CHECK_SECONDS)
            self._weights.look()

    def _room(self, context: int | None) -> int | None:
        """The longest sequence it takes; None where it does not say."""
        try:
            info = self._client.call(Request("GET", "/server_info", parse=_object), patience_seconds=CHECK_SECONDS)
        except ServerError as error:
            if error.status is None:
                raise
            info = {}  # a gateway, or a server that keeps it from those without the admin's key
        limit = info.get("max_req_input_len")  # of what its cache holds too; exclusive
        if type(limit) is int:
            return limit - 1
        return None if context is None else context - RESERVED - 1

    def _info(self, patience_seconds: float | None = None) -> dict[str, Any]:
        for path in ("/model_info", "/get_model_info"):  # the new name, and the one that older versions know
            try:
                return self._client.call(Request("GET", path, parse=_object), patience_seconds=patience_seconds)
            except ServerError as error:
                if error.status != 404 or path == "/get_model_info":
                    raise
        raise AssertionError

    def identity(self) -> str:
        """Changes when other weights answer: a hash of the checkpoint, of the weights' version, which updates in place
        count up, and of the model's marks of a few tokens.

        Raises:
            ServerError: the server did not answer.
        """
        info = self._info()
        return fingerprint_of({key: info.get(key) for key in ("model_path", "weight_version")}, self._probe_marks())

    def _probe_marks(self) -> list[float]:
        [marks] = self._scored([TokenSequence(PROBE_IDS[:1], PROBE_IDS[1:])], "sampled", 0)
        return list(marks.teacher_logprobs)

    def vocabulary(self, tokenizer: Any) -> bool:
        """Compare what every id of ``tokenizer`` means with what the server says. False: it has no /detokenize.

        Raises:
            ConfigError: an id means something else.
        """
        return check_tokens(self._client, tokenizer, _text, {"skip_special_tokens": False}, self._who)

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """See ``Teacher.compute_logprobs``. Raises as ``score``."""
        return [list(scores.teacher_logprobs) for scores in self.score(sequences, "sampled")]

    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0) -> list[Scores]:
        """See ``Teacher.score``.

        Raises:
            ServerUnavailable: the server was away for longer than patience allows.
            ServerError: it refused, its replies stay malformed, a log-probability is not finite, or it has other
                weights than it began with.
        """
        topk = topk if kind == "topk" else 0
        check_kind(kind, self.kinds, topk, self._who)
        scores = self._scored(sequences, kind, topk)
        self._weights.check()  # after each call, before anyone trains on these marks or keeps them
        return scores

    def _scored(self, sequences: Sequence[TokenSequence], kind: ScoreKind, topk: int) -> list[Scores]:
        request = partial(self._request, kind=kind, topk=topk)
        return score_with(self._client, request, sequences, self._request_tokens, self._who, topk=topk)

    def _request(self, pieces: list[Piece], kind: ScoreKind, topk: int) -> Request[list[Scores]]:
        body = {
            "input_ids": [piece.ids for piece in pieces],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": [piece.start - 1 for piece in pieces],  # the entry of that position is null
            "top_logprobs_num": topk,
            "return_prompt_token_ids": True,
        }
        parse = partial(_scores, pieces=pieces, kind=kind, topk=topk, who=self._who)
        return Request("POST", "/generate", body, parse=parse, what=named(pieces))


def _scores(reply: Reply, *, pieces: list[Piece], kind: ScoreKind, topk: int, who: str) -> list[Scores]:
    answers = reply.json()
    if not isinstance(answers, list) or len(answers) != len(pieces):
        got = f"{len(answers)} answers" if isinstance(answers, list) else str(answers)[:200]
        raise BadReply(f"got {got}; expected {len(pieces)}, in order")
    marks = [_marks(answer, piece, kind) for answer, piece in zip(answers, pieces, strict=True)]
    return scores_of(marks, pieces, kind, topk, who)


def _marks(answer: Any, piece: Piece, kind: ScoreKind) -> Marks:
    where = f"sequence {piece.number}"
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(meta, dict):
        raise BadReply(f"{where}: got {str(answer)[:200]}; expected an answer with meta_info")
    told = answer.get("prompt_token_ids")
    if told is not None:  # versions that do not know return_prompt_token_ids
        same_ids(told, piece.ids, where)
    if type(meta.get("prompt_tokens")) is not int or meta["prompt_tokens"] != len(piece.ids):
        raise BadReply(f"{where}: got prompt_tokens {meta.get('prompt_tokens')!r}; expected {len(piece.ids)}")
    rows = _rows(meta, "input_token_logprobs", piece)
    marks = Marks([], [])
    for position, row in enumerate(rows[1:], start=piece.start):
        value, token = _pair(row, piece.place(position))
        # The vocabulary's last id is written as 0; the log-probability is its own.
        if token != piece.ids[position] and not (token == 0 and told is not None):
            raise BadReply(f"{piece.place(position)}: got the log-probability of token {token}; expected one of this")
        marks.logprobs.append(value)
    if kind == "topk":
        tops = _rows(meta, "input_top_logprobs", piece)
        marks.alternatives.extend(
            _alternatives(row, piece.place(position)) for position, row in enumerate(tops[1:], start=piece.start)
        )
    return marks


def _rows(meta: dict[str, Any], key: str, piece: Piece) -> list[Any]:
    """One entry for every token from the prompt's last on; that one's is null."""
    rows, expected = meta.get(key), len(piece.ids) - piece.start + 1
    if not isinstance(rows, list) or len(rows) != expected:
        got = f"{len(rows)} entries" if isinstance(rows, list) else repr(rows)
        raise BadReply(f"sequence {piece.number}: got {got} as {key}; expected {expected}")
    return rows


def _alternatives(row: Any, where: str) -> list[tuple[int, float]]:
    if not isinstance(row, list):
        raise BadReply(f"{where}: got {row!r}; expected alternatives")
    return [(token, value) for value, token in (_pair(entry, where) for entry in row)]


def _pair(entry: Any, where: str) -> tuple[float, int]:
    """[log-probability, token id, text or null]."""
    if not isinstance(entry, list) or len(entry) != 3:
        raise BadReply(f"{where}: got {entry!r}; expected [log-probability, token id, text]")
    return number(entry[0], where), token_id(entry[1], where)


def _object(reply: Reply) -> dict[str, Any]:
    tree = reply.json()
    if not isinstance(tree, dict):
        raise BadReply(f"got {str(tree)[:200]}; expected an object")
    return tree


def _text(reply: Reply) -> str:
    tree = _object(reply)
    if not isinstance(tree.get("text"), str):
        raise BadReply(f"got {str(tree)[:200]}; expected the text of token ids")
    return tree["text"]

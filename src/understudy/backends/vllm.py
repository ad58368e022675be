"""A teacher behind an OpenAI-compatible server that returns log-probabilities of prompt tokens, as vLLM does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from understudy.backends.http import BadReply, Reply, Request, ServerClient, client_of
from understudy.backends.served_models import (
    CHECK_SECONDS,
    PROBE_IDS,
    SameWeights,
    ServedModel,
    check_tokens,
    fingerprint_of,
    refusing,
    served_model,
)
from understudy.backends.served_scores import (
    Marks,
    Piece,
    check_kind,
    choices_of,
    named,
    number,
    same_ids,
    score_with,
    scores_of,
)
from understudy.config_served import ServerConfig
from understudy.errors import ConfigError
from understudy.types import ScoreKind, Scores, TokenSequence, TopkScores

MAX_LOGPROBS = 64  # what errors advise to serve with at least


class VllmTeacher:
    """Marks over POST /v1/completions: token ids in, ``prompt_logprobs`` out, at temperature 1 whatever the server
    samples at. Every id of a reply is compared with what was sent.

    ``max_topk``: alternatives it gives at most; None until the server has said. ``client``: instead of one of its own;
    it stays open.

    Raises:
        ConfigError: a url or an API key that cannot be used.
    """

    kinds: frozenset[ScoreKind] = frozenset({"sampled", "topk"})
    temperature = 1.0

    def __init__(self, config: ServerConfig, *, name: str = "default", client: ServerClient | None = None) -> None:
        self._client = client or client_of(config, name=name)
        self._owns_client = client is None
        self._wanted = config.served_model
        self._request_tokens = config.connection.request_tokens
        self._who = f"teacher {name!r} at {self._client.root}"
        self._model: ServedModel | None = None
        self._weights = SameWeights(self._probe_marks, self._who)

    @property
    def max_topk(self) -> int | None:
        """See the class."""
        return self._model.max_logprobs if self._model else None

    def cancel(self) -> None:
        """End what is under way: see ``ServerClient.cancel``."""
        self._client.cancel()

    def close(self) -> None:
        """Close its client."""
        if self._owns_client:
            self._client.close()

    def check(self, *, longest: int, topk: int = 0) -> None:
        """Whether a run can work with this server: it is there, has the model and room for ``longest`` tokens, marks
        the tokens of a prompt, and gives ``topk`` alternatives.

        Raises:
            ConfigError: it cannot.
        """
        models = "an OpenAI-compatible server, which lists its models at /v1/models"
        with refusing(self._who, expected=models, remedy="correct the url; it ends before /completions"):
            model = self._served(CHECK_SECONDS)
        # A server writes at least one token after those it is given.
        if model.max_model_len is not None and longest + 1 > model.max_model_len:
            raise ConfigError(
                self._who,
                got=f"a context of {model.max_model_len} tokens",
                expected=f"room for prompt and completion, up to {longest} tokens, and one more",
                remedy=f"serve it with --max-model-len {longest + 1}, or lower sampling.max_completion_tokens",
            )
        marks = "log-probabilities of a prompt's tokens (prompt_logprobs)"
        with refusing(self._who, expected=marks, remedy="use vLLM, or another server that has them"):
            self._probe("sampled", 0)
            self._weights.look()
        if topk:
            remedy = f"serve it with --max-logprobs {max(topk, MAX_LOGPROBS)}"
            with refusing(self._who, expected=f"{topk} alternatives for each token of a prompt", remedy=remedy):
                scores = self._probe("topk", topk)
            self._check_mass(scores)

    def _probe(self, kind: ScoreKind, topk: int) -> Scores:
        piece = Piece(0, list(PROBE_IDS[:2]), 1)
        return self._client.call(self._request([piece], kind, topk), patience_seconds=CHECK_SECONDS)[0]

    def _check_mass(self, scores: Scores) -> None:
        if isinstance(scores, TopkScores) and (mass := sum(map(math.exp, scores.logprobs[0]))) > 1 + 1e-3:
            raise ConfigError(
                self._who,
                got=f"alternatives of probability {mass:.4g} in all",
                expected="log-probabilities, of one distribution",
                remedy="serve it with --logprobs-mode raw_logprobs, the default",
            )

    def identity(self) -> str:
        """Changes when other weights answer under the same name: a hash of the server's fingerprint of them where it
        gives one, else of the model's name, its checkpoint and its marks of a few tokens.

        Raises:
            ServerError: the server did not answer.
        """
        model = self._served()
        if model.fingerprint is not None:
            return fingerprint_of({"fingerprint": model.fingerprint}, None)
        return fingerprint_of({"id": model.id, "root": model.root}, self._probe_marks())

    def _probe_marks(self) -> list[float]:
        [marks] = self._scored([TokenSequence(PROBE_IDS[:1], PROBE_IDS[1:])], "sampled", 0)
        return list(marks.teacher_logprobs)

    def vocabulary(self, tokenizer: Any) -> bool:
        """Compare what every id of ``tokenizer`` means with what the server says. False: it has no /detokenize.

        Raises:
            ConfigError: an id means something else.
        """
        return check_tokens(self._client, tokenizer, _text, {"model": self._served().id}, self._who)

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """See ``Teacher.compute_logprobs``. Raises as ``score``."""
        return [list(scores.teacher_logprobs) for scores in self.score(sequences, "sampled")]

    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0) -> list[Scores]:
        """See ``Teacher.score``.

        Raises:
            ServerUnavailable: the server was away for longer than patience allows.
            ServerError: it refused, its replies stay malformed, a log-probability is not finite, or it has
                other weights than it began with.
        """
        topk = topk if kind == "topk" else 0
        check_kind(kind, self.kinds, topk, self._who)
        scores = self._scored(sequences, kind, topk)
        self._weights.check()  # after each call, before anyone trains on these marks or keeps them
        return scores

    def _scored(self, sequences: Sequence[TokenSequence], kind: ScoreKind, topk: int) -> list[Scores]:
        request = partial(self._request, kind=kind, topk=topk)
        return score_with(self._client, request, sequences, self._request_tokens, self._who, topk=topk)

    def _served(self, patience_seconds: float | None = None) -> ServedModel:
        if self._model is None:
            self._model = served_model(self._client, self._wanted, self._who, patience_seconds=patience_seconds)
        return self._model

    def _request(self, pieces: list[Piece], kind: ScoreKind, topk: int) -> Request[list[Scores]]:
        body = {
            "model": self._served().id,
            "prompt": [piece.ids for piece in pieces],
            "max_tokens": 1,  # vLLM refuses 0
            "temperature": 1.0,
            "prompt_logprobs": topk,
            "return_token_ids": True,
        }
        parse = partial(_scores, pieces=pieces, kind=kind, topk=topk, who=self._who)
        return Request("POST", "/v1/completions", body, parse=parse, what=named(pieces))


def _scores(reply: Reply, *, pieces: list[Piece], kind: ScoreKind, topk: int, who: str) -> list[Scores]:
    choices = choices_of(reply, len(pieces))
    marks = [_marks(choice, piece, kind) for choice, piece in zip(choices, pieces, strict=True)]
    return scores_of(marks, pieces, kind, topk, who)


def _marks(choice: dict[str, Any], piece: Piece, kind: ScoreKind) -> Marks:
    where = f"sequence {piece.number}"
    if choice.get("prompt_token_ids") is not None:
        same_ids(choice["prompt_token_ids"], piece.ids, where)
    rows = choice.get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != len(piece.ids):
        got = f"{len(rows)} entries" if isinstance(rows, list) else repr(rows)
        raise BadReply(f"{where}: got {got} as prompt_logprobs; expected {len(piece.ids)}, one per token")
    marks = Marks([], [])
    for position, (row, token) in enumerate(zip(rows[1:], piece.ids[1:], strict=True), start=1):
        if not isinstance(row, dict) or str(token) not in row:
            shown = sorted(row)[:8] if isinstance(row, dict) else row
            raise BadReply(f"{piece.place(position)}: got log-probabilities of {shown}; expected one of this token")
        if position >= piece.start:
            marks.logprobs.append(_logprob(row[str(token)], piece.place(position)))
            if kind == "topk":
                marks.alternatives.append(_alternatives(row, piece.place(position)))
    return marks


def _alternatives(row: dict[str, Any], where: str) -> list[tuple[int, float]]:
    if wrong := [key for key in row if not (key.isascii() and key.isdigit() and str(int(key)) == key)]:
        raise BadReply(f"{where}: got {wrong[0]!r} among the alternatives; expected token ids")
    return [(int(key), _logprob(entry, where)) for key, entry in row.items()]


def _logprob(entry: Any, where: str) -> float:
    if not isinstance(entry, dict) or "logprob" not in entry:
        raise BadReply(f"{where}: got {entry!r}; expected an entry with a log-probability")
    return number(entry["logprob"], where)


def _text(reply: Reply) -> str:
    tree = reply.json()
    if not isinstance(tree, dict) or not isinstance(tree.get("prompt"), str):
        raise BadReply(f"got {str(tree)[:200]}; expected the text of token ids")
    return tree["prompt"]

"""Which model a server has, whether it is the one that was there before, and whether its ids mean the same tokens."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from understudy.backends.http import BadReply, Reply, Request, ServerClient
from understudy.errors import ConfigError, ServerError, ServerUnavailable

CHECK_SECONDS = 10.0  # patience at the start of a run: a wrong url is found out now, not after minutes
TOKENS_AT_ONCE = 2048  # ids in one /detokenize
# Ids that every vocabulary has, in no order of their own: a model that was trained further marks them otherwise.
PROBE_IDS = (7, 3, 11, 2, 9, 5, 14, 1, 12, 6, 10, 4, 13, 8, 15, 3)
PROBE_DECIMALS = 2  # coarser than what load and batch size change, finer than what training does
SAME_WEIGHTS = 0.1  # nats, of one token: further apart are only other weights, or another dtype


@dataclass(frozen=True)
class ServedModel:
    """An entry of /v1/models. None where the server does not say. ``root``: the checkpoint; ``parent``: an adapter's
    base; ``fingerprint``: of the weights; ``max_logprobs``: alternatives it gives at most."""

    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None
    fingerprint: str | None = None
    max_logprobs: int | None = None


def model_cards(reply: Reply) -> list[dict[str, Any]]:
    """The entries of /v1/models. Raises BadReply for anything else."""
    tree = reply.json()
    cards = tree.get("data") if isinstance(tree, dict) else None
    if not isinstance(cards, list) or not all(isinstance(c, dict) and isinstance(c.get("id"), str) for c in cards):
        raise BadReply(f"got {str(tree)[:200]}; expected a list of models with ids")
    return cards


def parse_models(reply: Reply) -> list[ServedModel]:
    """The entries of /v1/models.

    Raises:
        BadReply: it is no list of models.
    """
    kinds: dict[str, type] = {"root": str, "parent": str, "max_model_len": int, "fingerprint": str, "max_logprobs": int}
    return [
        ServedModel(e["id"], **{name: e[name] for name, kind in kinds.items() if type(e.get(name)) is kind})
        for e in model_cards(reply)
    ]


def served_model(
    client: ServerClient, wanted: str | None, who: str, *, patience_seconds: float | None = None
) -> ServedModel:
    """The model of that name, or the only one.

    Raises:
        ConfigError: the server has no such model, or several and none was named.
        ServerError: the server did not say.
    """
    request = Request("GET", "/v1/models", parse=parse_models, what="the models it serves")
    models = client.call(request, patience_seconds=patience_seconds)
    found = [model for model in models if wanted is None or model.id == wanted]
    names = ", ".join(repr(model.id) for model in models) or "no model"
    if len(found) != 1:
        raise ConfigError(
            f"{who}: served_model",
            got=f"{wanted!r} of a server that has {names}" if wanted else f"no name, and a server that has {names}",
            expected="a model that the server has" if wanted else "a server with one model, or the name of one",
            remedy=f"set served_model = {models[0].id!r}" if models else "serve a model",
        )
    # vLLM gives an adapter's entry no length; its base model's holds.
    lengths = [model.max_model_len for model in [*found, *models] if model.max_model_len is not None]
    return replace(found[0], max_model_len=lengths[0] if lengths else None)


@contextlib.contextmanager
def refusing(who: str, *, expected: str, remedy: str) -> Iterator[None]:
    """A health check: what the server answers wrongly becomes something to do about it."""
    try:
        yield
    except ServerError as error:
        if isinstance(error, ServerUnavailable):
            expected, remedy = "a server that answers", "start it, wait until it is up, or correct the url"
        elif error.status in (401, 403):
            expected, remedy = "an API key it accepts", "name the environment variable that holds it: api_key_env"
        raise ConfigError(who, got=str(error), expected=expected, remedy=remedy) from None


def fingerprint_of(description: dict[str, Any], logprobs: Sequence[float] | None) -> str:
    """A hash of what a server says of its model and of what the model says of the probe."""
    rounded = None if logprobs is None else [round(value, PROBE_DECIMALS) + 0.0 for value in logprobs]  # no -0.0
    text = json.dumps([description, rounded], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class SameWeights:
    """Watches that a server goes on with the weights it was first looked at with: one that is restarted may have others
    under the same name. ``probe`` () -> log-probabilities of a few tokens."""

    def __init__(self, probe: Callable[[], Sequence[float]], who: str) -> None:
        self._probe, self._who = probe, who
        self._known: Sequence[float] | None = None

    def look(self) -> None:
        """What later ones are compared with."""
        self._known = self._probe()

    def check(self) -> None:
        """Raises ServerError where the server marks otherwise than at the first look; if there was one."""
        if self._known is None:
            return
        found = self._probe()
        apart = max(abs(a - b) for a, b in zip(found, self._known, strict=True))
        if apart > SAME_WEIGHTS:
            raise ServerError(
                f"{self._who}: has other weights than it began with: its marks of {len(found)} tokens have moved by up "
                f"to {apart:.3g} nats. Serve the checkpoint that marked before, in the same dtype, or start a new run"
            )


def check_tokens(
    client: ServerClient, tokenizer: Any, read: Callable[[Reply], str], body: dict[str, Any], who: str
) -> bool:
    """Whether the server could be asked what its ids mean; then they mean what ``tokenizer``'s do. ``body``: what goes
    with the tokens of a /detokenize; ``read``: its reply's text.

    Raises:
        ConfigError: an id means something else.
    """

    def texts(parts: Sequence[Sequence[int]]) -> list[str]:
        requests = [
            Request("POST", "/detokenize", {**body, "tokens": list(ids)}, parse=read, what="what its token ids mean")
            for ids in parts
        ]
        return client.map(requests)

    ids = range(len(tokenizer))
    parts = [ids[i : i + TOKENS_AT_ONCE] for i in range(0, len(ids), TOKENS_AT_ONCE)]
    try:
        answers = texts(parts)
    except ServerError as error:
        if error.status in (404, 405, 501):
            return False
        if error.status not in (400, 422):
            raise
        remedy = "serve a teacher of the student's model family"
        with refusing(f"{who}: tokenizer", expected=f"a server that knows {len(ids)} token ids", remedy=remedy):
            raise
    for part, answer in zip(parts, answers, strict=True):
        if answer != tokenizer.decode(list(part)):
            _raise_first_difference(part, tokenizer, texts, who)
    return True


def _raise_first_difference(
    ids: Sequence[int], tokenizer: Any, texts: Callable[[Sequence[Sequence[int]]], list[str]], who: str
) -> None:
    """Ids one by one: texts of several may differ in how they are joined, which means nothing."""
    for token, answer in zip(ids, texts([[token] for token in ids]), strict=True):
        own = tokenizer.decode([token])
        if answer != own:
            raise ConfigError(
                f"{who}: tokenizer",
                got=f"token id {token} is {answer!r} on the server and {own!r} for the student",
                expected="the same token-to-id map: the teacher scores the student's token ids",
                remedy="serve a teacher of the student's model family",
            )

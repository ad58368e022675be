"""A teacher over SGLang's /generate: its requests and replies by the contract, and replies that are refused."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fake_engines import LETTERS, FakeSglang, LetterTokenizer, expected_logprobs, expected_topk
from fake_server import Answer, Asked, FakeServer

from understudy.backends.served_models import PROBE_IDS
from understudy.backends.sglang import SglangTeacher
from understudy.config_served import ServerConfig
from understudy.errors import ConfigError, ServerError, ServerUnavailable
from understudy.types import TokenSequence, TopkScores

CONTRACT = json.loads((Path(__file__).parent / "contracts" / "sglang.json").read_text())
SEQUENCES = [
    TokenSequence([1, 2, 3], [4, 5, 6, 7]),
    TokenSequence([8], [9]),
    TokenSequence([1, 2, 3], [19]),  # the last id of the vocabulary, which SGLang writes as 0
]

Serve = Callable[..., tuple[FakeServer, SglangTeacher]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """(engine, settings of the connection) -> a server and its teacher, named "maths"."""
    with ExitStack() as stack:

        def start(engine: Callable[[Asked], Answer], *, served_model: str | None = None, **connection: float):
            server = stack.enter_context(FakeServer(engine))
            section = {"url": server.url, "served_model": served_model, "connection": connection}
            teacher = SglangTeacher(ServerConfig.model_validate(section), name="maths")
            stack.callback(teacher.close)
            return server, teacher

        yield start


def test_the_contract(serve: Serve):
    """The request is the one that was written down, and its reply is read as it is meant."""
    server, teacher = serve(lambda asked: Answer(CONTRACT["reply"]))
    sequences = [TokenSequence(s["prompt_ids"], s["completion_ids"]) for s in CONTRACT["sequences"]]
    scores = teacher.score(sequences, "topk", topk=CONTRACT["topk"])
    assert server.bodies("/generate") == [CONTRACT["request"]]
    for score, expected in zip(scores, CONTRACT["scores"], strict=True):
        assert isinstance(score, TopkScores)
        assert score.teacher_logprobs == expected["logprobs"]
        assert (score.ids, score.logprobs) == (expected["ids"], expected["topk_logprobs"])


def test_a_refusal_by_the_contract(serve: Serve):
    refusal = CONTRACT["refusal"]
    _, teacher = serve(lambda asked: Answer(refusal["reply"], refusal["status"]))
    with pytest.raises(ServerError, match=r"status 400: Input length \(70 tokens\)"):
        teacher.score(SEQUENCES, "sampled")


def test_the_fake_server_answers_as_the_contract_does():
    asked = Asked("POST", "/generate", {}, json.dumps(CONTRACT["request"]).encode())
    assert _forms(FakeSglang()(asked).body) <= _forms(CONTRACT["reply"])
    assert CONTRACT["model_info"].keys() >= FakeSglang().model_info.keys()


def _forms(tree: Any, path: str = "") -> set[tuple[str, str]]:
    """(where, type) of everything in a tree, whatever its place in a list."""
    if isinstance(tree, dict):
        return {form for key, value in tree.items() for form in _forms(value, f"{path}.{key}")}
    if isinstance(tree, list):
        return {(path, "list")} | {form for value in tree for form in _forms(value, f"{path}[]")}
    return {(path, type(tree).__name__)}


def test_sampled_scores_line_up_with_completion_tokens(serve: Serve):
    server, teacher = serve(FakeSglang(), request_tokens=12, max_concurrency=1)
    expected = [expected_logprobs(sequence.prompt_ids, sequence.completion_ids) for sequence in SEQUENCES]
    assert teacher.compute_logprobs(SEQUENCES) == expected
    asked = [(body["input_ids"], body["logprob_start_len"]) for body in server.bodies("/generate")]
    assert asked == [([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 19]], [2, 2]), ([[8, 9]], [0])]
    assert [body["top_logprobs_num"] for body in server.bodies("/generate")] == [0, 0]


@pytest.mark.parametrize("k", [1, 5, 20])
def test_topk_scores_are_the_best_first(serve: Serve, k: int):
    _, teacher = serve(FakeSglang())
    for score, sequence in zip(teacher.score(SEQUENCES, "topk", topk=k), SEQUENCES, strict=True):
        assert isinstance(score, TopkScores)
        expected = expected_topk(sequence.prompt_ids, sequence.completion_ids, k)
        assert (score.ids, score.logprobs) == expected


def _meta(reply: list[dict[str, Any]]) -> dict[str, Any]:
    return reply[0]["meta_info"]


def _value(reply: list[dict[str, Any]], value: object) -> None:
    _meta(reply)["input_token_logprobs"][2][0] = value


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), None, 0.5, -9999.0])
def test_a_log_probability_that_is_none_is_final_and_named(serve: Serve, value: float | None):
    server, teacher = serve(FakeSglang(tamper=lambda reply: _value(reply, value)))
    with pytest.raises(ServerError, match=r"teacher 'maths' at .*, sequence 0, completion position 1 \(token 5\)"):
        teacher.score(SEQUENCES, "sampled")
    assert len(server.bodies("/generate")) == 1


MALFORMED: dict[str, tuple[Callable[[Any], object], str]] = {
    "an answer too few": (lambda r: r.pop(), "got 2 answers; expected 3"),
    "an answer too many": (lambda r: r.append(r[0]), "got 4 answers; expected 3"),
    "no meta_info": (lambda r: r[0].pop("meta_info"), "expected an answer with meta_info"),
    "null": (lambda r: r.__setitem__(0, None), "expected an answer with meta_info"),
    "an aborted answer": (lambda r: _meta(r).pop("input_token_logprobs"), "got None as input_token_logprobs"),
    "cut": (lambda r: _meta(r)["input_token_logprobs"].pop(), "got 4 entries as input_token_logprobs; expected 5"),
    "without the null": (lambda r: _meta(r)["input_token_logprobs"].pop(0), "got 4 entries"),
    "from the start": (lambda r: _meta(r)["input_token_logprobs"].insert(0, [None, 2, None]), "got 6 entries"),
    "another prompt": (lambda r: r[0].update(prompt_token_ids=[9, 2, 3, 4, 5, 6, 7]), "got 7 others"),
    "truncated": (lambda r: _meta(r).update(prompt_tokens=6), "got prompt_tokens 6; expected 7"),
    "prompt_tokens as text": (lambda r: _meta(r).update(prompt_tokens="7"), "got prompt_tokens '7'"),
    "another token": (lambda r: _meta(r)["input_token_logprobs"][1].__setitem__(1, 6), "of token 6"),
    "a token as text": (lambda r: _meta(r)["input_token_logprobs"][1].__setitem__(1, "4"), "got token id '4'"),
    "a token as boolean": (lambda r: _meta(r)["input_token_logprobs"][1].__setitem__(1, True), "got token id True"),
    "a number as text": (lambda r: _value(r, "-1"), "got log-probability '-1'"),
    "a number as boolean": (lambda r: _value(r, True), "got log-probability True"),
    "no triple": (lambda r: _meta(r)["input_token_logprobs"].__setitem__(1, [-1.0, 4]), r"got \[-1.0, 4\]"),
    "no list": (lambda r: _meta(r).update(input_token_logprobs="x"), "got 'x' as input_token_logprobs"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_replies_are_refused(serve: Serve, name: str):
    tamper, message = MALFORMED[name]
    _, teacher = serve(FakeSglang(tamper=tamper), patience_seconds=0)
    with pytest.raises(ServerError, match=message) as caught:
        teacher.score(SEQUENCES, "sampled")
    assert "malformed reply" in str(caught.value)
    assert not isinstance(caught.value, ServerUnavailable)


ALTERNATIVES: dict[str, tuple[Callable[[Any], object], str]] = {
    "none": (lambda r: _meta(r).pop("input_top_logprobs"), "got None as input_top_logprobs"),
    "a row null": (lambda r: _meta(r)["input_top_logprobs"].__setitem__(1, None), "got None; expected alternatives"),
    "too few": (lambda r: _meta(r)["input_top_logprobs"][1].pop(), "expected 3 different tokens"),
    "one twice": (lambda r: _meta(r)["input_top_logprobs"][1].__setitem__(0, [-1.0, 19, None]), "different tokens"),
    "a negative id": (lambda r: _meta(r)["input_top_logprobs"][1][0].__setitem__(1, -1), "got token id -1"),
}


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_malformed_alternatives_are_refused(serve: Serve, name: str):
    tamper, message = ALTERNATIVES[name]

    def with_duplicate(reply: list[dict[str, Any]]) -> None:
        _meta(reply)["input_top_logprobs"][1][1] = [-1.0, 19, None]
        tamper(reply)

    _, teacher = serve(FakeSglang(tamper=with_duplicate), patience_seconds=0)
    with pytest.raises(ServerError, match=message):
        teacher.score(SEQUENCES[:1], "topk", topk=3)


def test_an_id_written_as_zero_needs_the_prompts_echo(serve: Serve):
    """Older versions do not send the prompt back; then a 0 in the place of another id may be any mistake."""
    _, teacher = serve(FakeSglang(old=True), patience_seconds=0)
    assert teacher.compute_logprobs(SEQUENCES[:2]) == [
        expected_logprobs(sequence.prompt_ids, sequence.completion_ids) for sequence in SEQUENCES[:2]
    ]
    with pytest.raises(ServerError, match="got the log-probability of token 0"):
        teacher.score(SEQUENCES, "sampled")


@pytest.mark.parametrize("kind", ["hidden", "chosen"])
def test_scores_it_does_not_give(serve: Serve, kind: Any):
    _, teacher = serve(FakeSglang())
    with pytest.raises(ValueError, match=r"expected one of \['sampled', 'topk'\]"):
        teacher.score(SEQUENCES, kind)


def test_marks_of_other_weights_are_refused(serve: Serve):
    engine = FakeSglang()
    _, teacher = serve(engine)
    teacher.check(longest=8)
    teacher.score(SEQUENCES, "sampled")
    engine.seed = 1
    with pytest.raises(ServerError, match="has other weights than it began with"):
        teacher.score(SEQUENCES, "sampled")


@pytest.mark.parametrize("old", [False, True])
def test_check_of_a_server_that_will_do(serve: Serve, old: bool):
    server, teacher = serve(FakeSglang(old=old))
    teacher.check(longest=57, topk=5)
    first = ["/model_info", "/get_model_info"] if old else ["/model_info"]
    assert [asked.path for asked in server.asked] == [*first, "/v1/models", "/server_info", "/generate", "/generate"]
    assert [body["input_ids"] for body in server.bodies("/generate")] == [[[7, 3]], [list(PROBE_IDS)]]
    # The longest that passes the check passes the server too, which refuses one more.
    teacher.score([TokenSequence([1], [2] * 56)], "sampled")
    with pytest.raises(ServerError, match="Input length"):
        teacher.score([TokenSequence([1], [2] * 57)], "sampled")


def _embedding() -> FakeSglang:
    engine = FakeSglang()
    engine.model_info["is_generation"] = False
    return engine


CHECKS: dict[str, tuple[Callable[[Asked], Answer], int, str]] = {
    "too long": (FakeSglang(), 58, r"room for 57 tokens[\s\S]*--context-length 65"),
    "a small cache": (FakeSglang(server_info={"max_req_input_len": 20}), 20, "room for 19 tokens"),
    "a length unsaid": (FakeSglang(server_info={}), 58, "room for 57 tokens"),
    "an embedding model": (_embedding(), 8, "got:      an embedding model"),
    "no log-probabilities": (
        FakeSglang(tamper=lambda r: _meta(r).pop("input_token_logprobs")),
        8,
        "a version of SGLang that has them",
    ),
    "another kind of server": (lambda asked: Answer({"detail": "Not Found"}, 404), 8, "correct the url"),
    "a key is asked for": (lambda asked: Answer({"error": "Unauthorized"}, 401), 8, "api_key_env"),
}


@pytest.mark.parametrize("name", CHECKS)
def test_check_says_what_to_do(serve: Serve, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("understudy.backends.http_retry.FIRST_SECONDS", 0.001)
    engine, longest, message = CHECKS[name]
    _, teacher = serve(engine)
    with pytest.raises(ConfigError, match=message) as caught:
        teacher.check(longest=longest)
    assert caught.value.where.startswith("teacher 'maths' at http://127.0.0.1")


def test_adapters_and_unknown_names_are_refused(serve: Serve):
    engine = FakeSglang()
    cards = [{"id": "m", "root": "m", "max_model_len": 64}, {"id": "lora", "root": "/l", "parent": "m"}]

    def answer(asked: Asked) -> Answer:
        return Answer({"data": cards}) if asked.path == "/v1/models" else engine(asked)

    with pytest.raises(ConfigError, match="the adapter 'lora'"):
        serve(answer, served_model="lora")[1].check(longest=8)
    with pytest.raises(ConfigError, match="'gone' of a server that has 'm', 'lora'"):
        serve(answer, served_model="gone")[1].check(longest=8)
    serve(answer, served_model="m")[1].check(longest=8)


def test_identity_changes_with_weights_and_their_version(serve: Serve):
    def identity(**engine: Any) -> str:
        return serve(FakeSglang(**engine))[1].identity()

    first = identity()
    assert first == identity() == identity(context=128)
    assert len({first, identity(seed=1), identity(weight_version="2")}) == 3


def test_every_id_means_the_same_token(serve: Serve):
    _, teacher = serve(FakeSglang())
    assert teacher.vocabulary(LetterTokenizer())
    with pytest.raises(ConfigError, match="token id 0 is 'a' on the server and 't' for the student"):
        teacher.vocabulary(LetterTokenizer(LETTERS[::-1]))
    assert serve(FakeSglang(letters=None))[1].vocabulary(LetterTokenizer()) is False

"""A teacher over /v1/completions: its requests, the alignment of its marks, and replies that are refused."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from fake_engines import LETTERS, FakeVllm, LetterTokenizer, expected_logprobs, expected_topk
from fake_server import Answer, Asked, FakeServer

from understudy.backends.served_models import PROBE_IDS
from understudy.backends.vllm import VllmTeacher
from understudy.config_served import ServerConfig
from understudy.errors import ConfigError, RunError, ServerError, ServerUnavailable
from understudy.types import SampledScores, TokenSequence, TopkScores

SEQUENCES = [
    TokenSequence([1, 2, 3], [4, 5, 6, 7]),
    TokenSequence([8], [9]),
    TokenSequence([1, 2, 3], [19]),
    TokenSequence([8], [0, 0]),
]

Serve = Callable[..., tuple[FakeServer, VllmTeacher]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """(engine, settings of the section, of the connection) -> a server and its teacher, named "maths"."""
    with ExitStack() as stack:

        def start(engine: Callable[[Asked], Answer], *, served_model: str | None = None, **connection: float):
            server = stack.enter_context(FakeServer(engine))
            section = {"url": server.url, "served_model": served_model, "connection": connection}
            teacher = VllmTeacher(ServerConfig.model_validate(section), name="maths")
            stack.callback(teacher.close)
            return server, teacher

        yield start


def test_sampled_scores_line_up_with_completion_tokens(serve: Serve):
    _, teacher = serve(FakeVllm())
    scores = teacher.score(SEQUENCES, "sampled")
    for score, sequence in zip(scores, SEQUENCES, strict=True):
        assert isinstance(score, SampledScores)
        assert score.teacher_logprobs == expected_logprobs(sequence.prompt_ids, sequence.completion_ids)
    assert teacher.compute_logprobs(SEQUENCES) == [score.teacher_logprobs for score in scores]
    assert teacher.score([], "sampled") == []


@pytest.mark.parametrize("k", [1, 3, 20])
def test_topk_scores_are_the_best_first(serve: Serve, k: int):
    _, teacher = serve(FakeVllm())
    for score, sequence in zip(teacher.score(SEQUENCES, "topk", topk=k), SEQUENCES, strict=True):
        assert isinstance(score, TopkScores)
        ids, logprobs = expected_topk(sequence.prompt_ids, sequence.completion_ids, k)
        assert (score.ids, score.logprobs) == (ids, logprobs)
        assert score.teacher_logprobs == expected_logprobs(sequence.prompt_ids, sequence.completion_ids)


def test_the_request_is_the_one_that_vllm_takes(serve: Serve):
    server, teacher = serve(FakeVllm())
    teacher.score(SEQUENCES[:2], "sampled")
    teacher.score([TokenSequence(np.array([1, 2]), np.array([3]))], "topk", topk=5)
    same = {"model": "m", "max_tokens": 1, "temperature": 1.0, "return_token_ids": True}
    assert server.bodies("/v1/completions") == [
        {**same, "prompt": [[1, 2, 3, 4, 5, 6, 7], [8, 9]], "prompt_logprobs": 0},
        {**same, "prompt": [[1, 2, 3]], "prompt_logprobs": 5},
    ]


def test_sequences_that_share_a_prompt_travel_together(serve: Serve):
    """Requests of at most 12 tokens; the prompts [1, 2, 3] and [8] side by side, in order."""
    server, teacher = serve(FakeVllm(), request_tokens=12, max_concurrency=1)
    scores = teacher.score(SEQUENCES, "sampled")
    prompts = [body["prompt"] for body in server.bodies("/v1/completions")]
    assert prompts == [[[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 19]], [[8, 9], [8, 0, 0]]]
    expected = [expected_logprobs(sequence.prompt_ids, sequence.completion_ids) for sequence in SEQUENCES]
    assert [score.teacher_logprobs for score in scores] == expected


def test_a_long_sequence_has_a_request_to_itself(serve: Serve):
    server, teacher = serve(FakeVllm(), request_tokens=3, max_concurrency=1)
    teacher.score(SEQUENCES, "sampled")
    assert [len(body["prompt"]) for body in server.bodies("/v1/completions")] == [1, 1, 1, 1]


def test_alternatives_count_as_tokens_of_a_request(serve: Serve):
    """48 tokens without alternatives, 12 with three for each."""
    server, teacher = serve(FakeVllm(), request_tokens=48, max_concurrency=1)
    teacher.score(SEQUENCES, "sampled", topk=3)
    teacher.score(SEQUENCES, "topk", topk=3)
    bodies = server.bodies("/v1/completions")
    assert [(body["prompt_logprobs"], len(body["prompt"])) for body in bodies] == [(0, 4), (3, 2), (3, 2)]


def test_choices_are_read_by_their_index(serve: Serve):
    _, teacher = serve(FakeVllm(tamper=lambda reply: reply["choices"].reverse()))
    expected = [expected_logprobs(sequence.prompt_ids, sequence.completion_ids) for sequence in SEQUENCES]
    assert teacher.compute_logprobs(SEQUENCES) == expected


def test_alternatives_of_equal_probability_come_by_id(serve: Serve):
    def tamper(reply: dict[str, Any]) -> None:
        rows = reply["choices"][0]["prompt_logprobs"]
        entry = {"logprob": math.log(0.25), "rank": 1, "decoded_token": "?"}
        rows[1] = dict.fromkeys(("9", "2", "11", "4"), entry)

    _, teacher = serve(FakeVllm(tamper=tamper))
    [score] = teacher.score([TokenSequence([1], [4])], "topk", topk=3)
    assert isinstance(score, TopkScores)
    assert score.ids == [[2, 4, 9]]


def entry_of(reply: dict[str, Any], position: int) -> dict[str, Any]:
    """The entry of the token that was sent there, in the first sequence of SEQUENCES."""
    return reply["choices"][0]["prompt_logprobs"][position][str(position + 1)]


NOT_FINITE = [float("nan"), float("-inf"), float("inf"), -9999.0, None, 0.5, -12000, 10**400]


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_log_probability_that_is_none_is_final_and_named(serve: Serve, value: float | None):
    server, teacher = serve(FakeVllm(tamper=lambda reply: entry_of(reply, 5).update(logprob=value)))
    with pytest.raises(ServerError, match=r"teacher 'maths' at .*, sequence 0, completion position 2 \(token 6\)"):
        teacher.score(SEQUENCES, "sampled")
    assert len(server.bodies("/v1/completions")) == 1, "the same would come again"


def test_one_of_a_prompt_token_does_not_matter(serve: Serve):
    _, teacher = serve(FakeVllm(tamper=lambda reply: entry_of(reply, 2).update(logprob=-9999.0)))
    assert teacher.compute_logprobs(SEQUENCES[:1]) == [expected_logprobs([1, 2, 3], [4, 5, 6, 7])]


def test_an_alternative_that_is_not_finite_is_named(serve: Serve):
    def tamper(reply: dict[str, Any]) -> None:
        row = reply["choices"][0]["prompt_logprobs"][4]
        next(entry for key, entry in row.items() if key != "5")["logprob"] = -9999.0

    _, teacher = serve(FakeVllm(tamper=tamper))
    with pytest.raises(ServerError, match=r"completion position 1 \(token 5\), alternative \d+: .* stand-in"):
        teacher.score(SEQUENCES, "topk", topk=3)


def _row(reply: dict[str, Any], position: int, row: object) -> None:
    reply["choices"][0]["prompt_logprobs"][position] = row


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no choices": (lambda r: r.pop("choices"), "expected choices"),
    "choices null": (lambda r: r.update(choices=None), "expected choices"),
    "a choice too few": (lambda r: r["choices"].pop(), r"got choices \[0, 1, 2\]; expected 0 to 3"),
    "a choice too many": (lambda r: r["choices"].append(r["choices"][0]), "expected 0 to 3, each once"),
    "an index twice": (lambda r: r["choices"][1].update(index=0), "each once"),
    "an index as text": (lambda r: r["choices"][1].update(index="1"), "each once"),
    "an index as boolean": (lambda r: r["choices"][1].update(index=True), "each once"),
    "no prompt_logprobs": (lambda r: r["choices"][0].pop("prompt_logprobs"), "got None as prompt_logprobs"),
    "shifted by one": (lambda r: r["choices"][0]["prompt_logprobs"].pop(0), "got 6 entries .* expected 7"),
    "other ids": (lambda r: r["choices"][0].update(prompt_token_ids=[1, 2, 3, 4, 5, 6, 8]), "got 7 others"),
    "ids as booleans": (lambda r: r["choices"][0].update(prompt_token_ids=[True, 2, 3, 4, 5, 6, 7]), "got 7 others"),
    "ids as text": (lambda r: r["choices"][0].update(prompt_token_ids="1 2"), "expected the 7 token ids"),
    "a row null": (lambda r: _row(r, 3, None), r"completion position 0 \(token 4\)"),
    "a prompt row null": (lambda r: _row(r, 1, None), r"prompt position 1 \(token 2\)"),
    "a prompt row of another token": (lambda r: _row(r, 2, {"9": {"logprob": -1.0}}), r"prompt position 2 \(token 3\)"),
    "another token": (lambda r: _row(r, 6, {"9": {"logprob": -1.0}}), r"got log-probabilities of \['9'\]"),
    "no log-probability": (lambda r: _row(r, 6, {"7": {"rank": 1}}), "an entry with a log-probability"),
    "a bare number": (lambda r: _row(r, 6, {"7": -1.0}), "an entry with a log-probability"),
    "text for a number": (lambda r: _row(r, 6, {"7": {"logprob": "-1.0"}}), "got log-probability '-1.0'"),
    "a boolean for a number": (lambda r: _row(r, 6, {"7": {"logprob": False}}), "got log-probability False"),
    "a list for a number": (lambda r: _row(r, 6, {"7": {"logprob": [-1]}}), r"got log-probability \[-1\]"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_replies_are_refused(serve: Serve, name: str):
    tamper, message = MALFORMED[name]
    _, teacher = serve(FakeVllm(tamper=tamper), patience_seconds=0)
    with pytest.raises(ServerError, match=message) as caught:
        teacher.score(SEQUENCES, "sampled")
    assert "malformed reply" in str(caught.value)
    assert "(sequences 0, 2, 1 and 1 more)" in str(caught.value)
    assert not isinstance(caught.value, ServerUnavailable)


@pytest.mark.parametrize("key", ["x", "-1", "007", "1.0", "¹"])
def test_keys_of_alternatives_are_token_ids(serve: Serve, key: str):
    def tamper(reply: dict[str, Any]) -> None:
        reply["choices"][0]["prompt_logprobs"][3][key] = {"logprob": -1.0}

    _, teacher = serve(FakeVllm(tamper=tamper), patience_seconds=0)
    with pytest.raises(ServerError, match="expected token ids"):
        teacher.score(SEQUENCES[:1], "topk", topk=2)


def test_too_few_alternatives_are_refused(serve: Serve):
    _, teacher = serve(FakeVllm(tamper=lambda r: _row(r, 6, {"7": {"logprob": -1.0}})), patience_seconds=0)
    with pytest.raises(ServerError, match=r"got alternatives \[7\]; expected 2 different"):
        teacher.score(SEQUENCES[:1], "topk", topk=2)


def test_a_key_that_stands_twice_is_refused(serve: Serve):
    entries = '{"4": {"logprob": -1.0}, "4": {"logprob": -2.0}}'
    content = f'{{"choices": [{{"index": 0, "prompt_logprobs": [null, {entries}]}}]}}'.encode()
    engine = FakeVllm()
    _, teacher = serve(
        lambda asked: Answer(content) if asked.path == "/v1/completions" else engine(asked), patience_seconds=0
    )
    with pytest.raises(ServerError, match="a key twice"):
        teacher.score([TokenSequence([1], [4])], "sampled")


def test_a_malformed_reply_that_passes_is_asked_again(serve: Serve):
    seen = []

    def tamper(reply: dict[str, Any]) -> None:
        seen.append(reply)
        if len(seen) == 1:
            reply["choices"].pop()

    _, teacher = serve(FakeVllm(tamper=tamper))
    assert teacher.compute_logprobs(SEQUENCES[:1]) == [expected_logprobs([1, 2, 3], [4, 5, 6, 7])]
    assert len(seen) == 2


def test_an_empty_prompt_is_refused(serve: Serve):
    server, teacher = serve(FakeVllm())
    with pytest.raises(RunError, match="sequence 1 has an empty prompt"):
        teacher.score([SEQUENCES[0], TokenSequence([], [1])], "sampled")
    assert server.asked == []


def test_an_empty_completion_has_no_marks(serve: Serve):
    _, teacher = serve(FakeVllm())
    assert teacher.compute_logprobs([TokenSequence([1, 2], [])]) == [[]]


@pytest.mark.parametrize(("kind", "topk"), [("hidden", 0), ("topk", 0), ("chosen", 0)])
def test_scores_it_does_not_give(serve: Serve, kind: Any, topk: int):
    _, teacher = serve(FakeVllm())
    with pytest.raises(ValueError, match=r"expected one of \['sampled', 'topk'\]"):
        teacher.score(SEQUENCES, kind, topk=topk)


def test_check_of_a_server_that_will_do(serve: Serve):
    server, teacher = serve(FakeVllm())
    assert teacher.max_topk is None
    teacher.check(longest=63, topk=20)
    assert [asked.path for asked in server.asked] == ["/v1/models"] + ["/v1/completions"] * 3
    assert [body["prompt"] for body in server.bodies("/v1/completions")] == [[[7, 3]], [list(PROBE_IDS)], [[7, 3]]]
    assert (teacher.temperature, teacher.kinds) == (1.0, {"sampled", "topk"})


def test_marks_of_other_weights_are_refused(serve: Serve):
    """A server may have been started again with another checkpoint under the same name."""
    engine = FakeVllm()
    _, teacher = serve(engine)
    teacher.check(longest=8)
    first = teacher.score(SEQUENCES, "sampled")
    assert teacher.score(SEQUENCES, "sampled") == first
    engine.seed = 1
    with pytest.raises(ServerError, match=r"teacher 'maths' .* has other weights than it began with"):
        teacher.score(SEQUENCES, "sampled")


def test_the_server_may_say_how_many_alternatives_it_gives(serve: Serve):
    models = [{"id": "m", "max_logprobs": 32, "fingerprint": "abc", "max_model_len": 64}]
    _, teacher = serve(FakeVllm(models=models, max_logprobs=32))
    teacher.check(longest=8)
    assert teacher.max_topk == 32


def _refusal(status: int) -> Callable[[Asked], Answer]:
    return lambda asked: Answer({"error": {"message": "no"}}, status)


CHECKS: dict[str, tuple[Callable[[Asked], Answer], dict[str, Any], str]] = {
    "too short a context": (FakeVllm(), {"longest": 64}, r"a context of 64 tokens[\s\S]*--max-model-len 65"),
    "too few alternatives": (FakeVllm(), {"topk": 21}, r"status 400: Requested[\s\S]*--max-logprobs 64"),
    "far too few": (FakeVllm(), {"topk": 100}, "--max-logprobs 100"),
    "no log-probabilities": (
        FakeVllm(tamper=lambda r: r["choices"][0].update(prompt_logprobs=None)),
        {},
        r"got None as prompt_logprobs[\s\S]*use vLLM",
    ),
    "logits": (
        FakeVllm(tamper=lambda r: [e.update(logprob=-0.01) for e in r["choices"][0]["prompt_logprobs"][1].values()]),
        {"topk": 5},
        "--logprobs-mode raw_logprobs",
    ),
    "no models": (FakeVllm(models=[]), {}, "no name, and a server that has no model"),
    "several models": (FakeVllm(models=[{"id": "a"}, {"id": "b"}]), {}, r"has 'a', 'b'[\s\S]*served_model = 'a'"),
    "no list of models": (FakeVllm(models="x"), {}, "expected a list of models"),  # type: ignore[arg-type]
    "another kind of server": (_refusal(404), {}, "correct the url"),
    "a key is asked for": (_refusal(401), {}, "api_key_env"),
}


@pytest.mark.parametrize("name", CHECKS)
def test_check_says_what_to_do(serve: Serve, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("understudy.backends.http_retry.FIRST_SECONDS", 0.001)
    engine, settings, message = CHECKS[name]
    _, teacher = serve(engine)
    with pytest.raises(ConfigError, match=message) as caught:
        teacher.check(**({"longest": 8} | settings))
    assert caught.value.where.startswith("teacher 'maths' at http://127.0.0.1")


def test_check_of_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("understudy.backends.vllm.CHECK_SECONDS", 0.0)
    with FakeServer(FakeVllm()) as server:
        config = ServerConfig(url=server.url)
    teacher = VllmTeacher(config)
    with pytest.raises(ConfigError, match="wait until it is up"):
        teacher.check(longest=8)
    teacher.close()


def test_a_model_is_chosen_by_name_and_an_adapter_has_its_bases_length(serve: Serve):
    models = [{"id": "base", "root": "/b", "max_model_len": 64}, {"id": "lora", "parent": "base", "root": "/l"}]
    server, teacher = serve(FakeVllm(models=models), served_model="lora")
    with pytest.raises(ConfigError, match="a context of 64 tokens"):
        teacher.check(longest=64)
    teacher.score(SEQUENCES[:1], "sampled")
    assert server.bodies("/v1/completions")[0]["model"] == "lora"
    _, other = serve(FakeVllm(models=models), served_model="gone")
    with pytest.raises(ConfigError, match="'gone' of a server that has 'base', 'lora'"):
        other.score(SEQUENCES[:1], "sampled")


def test_identity_changes_with_weights_name_and_checkpoint(serve: Serve):
    def identity(**engine: Any) -> str:
        return serve(FakeVllm(**engine))[1].identity()

    def model(**entry: str) -> list[dict[str, Any]]:
        return [{"id": "m", "root": "/m", "max_model_len": 64} | entry]

    first = identity()
    assert first == identity()
    assert len({first, identity(seed=1), identity(models=model(id="n")), identity(models=model(root="/n"))}) == 4


def test_identity_ignores_rounding(serve: Serve):
    """Values in the middle of a step of 0.01 nats, moved by less than half of one."""

    def engine(noise: float) -> FakeVllm:
        def tamper(reply: dict[str, Any]) -> None:
            for i, row in enumerate(reply["choices"][0]["prompt_logprobs"][1:]):
                row[str(PROBE_IDS[i + 1])]["logprob"] = -1.0 - i / 100 + noise

        return FakeVllm(tamper=tamper)

    identities = [serve(engine(noise))[1].identity() for noise in (0.0, 0.004, -0.004, 0.01)]
    assert identities[0] == identities[1] == identities[2] != identities[3]


def test_a_fingerprint_stands_for_the_weights(serve: Serve):
    models = [{"id": "m", "fingerprint": "abc"}]
    server, teacher = serve(FakeVllm(models=models))
    assert teacher.identity() == serve(FakeVllm(models=models, seed=1))[1].identity()
    assert teacher.identity() != serve(FakeVllm(models=[{"id": "m", "fingerprint": "abd"}]))[1].identity()
    assert server.bodies("/v1/completions") == []


def test_every_id_means_the_same_token(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("understudy.backends.served_models.TOKENS_AT_ONCE", 8)
    server, teacher = serve(FakeVllm(), max_concurrency=1)
    assert teacher.vocabulary(LetterTokenizer())
    parts = [list(range(8)), list(range(8, 16)), list(range(16, 20))]
    assert server.bodies("/detokenize") == [{"model": "m", "tokens": part} for part in parts]
    swapped = LETTERS.replace("k", "?").replace("l", "k").replace("?", "l")
    with pytest.raises(ConfigError, match="token id 10 is 'k' on the server and 'l' for the student"):
        teacher.vocabulary(LetterTokenizer(swapped))
    with pytest.raises(ConfigError, match=r"status 400: token id out of range[\s\S]*21 token ids"):
        teacher.vocabulary(LetterTokenizer(LETTERS + "z"))


def test_a_server_that_cannot_say_what_ids_mean(serve: Serve):
    _, teacher = serve(FakeVllm(letters=None))
    assert teacher.vocabulary(LetterTokenizer()) is False


def test_texts_that_are_joined_in_another_way_are_the_same_tokens(serve: Serve):
    class Spaced(LetterTokenizer):
        def decode(self, ids):
            return " ".join(self.letters[i] for i in ids)

    _, teacher = serve(FakeVllm())
    assert teacher.vocabulary(Spaced())


def test_fields_that_are_not_read_are_not_in_the_way(serve: Serve):
    """Every field that vLLM's reply has."""
    reply = {
        "id": "cmpl-0",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "text": "x",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "token_ids": [12],
                "prompt_logprobs": [None, {"4": {"logprob": -3.25, "rank": 7, "decoded_token": "!"}}],
                "prompt_token_ids": [1, 4],
                "routed_experts": None,
            }
        ],
        "service_tier": None,
        "system_fingerprint": None,
        "usage": {"prompt_tokens": 2, "total_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": None},
        "kv_transfer_params": None,
    }
    engine = FakeVllm()
    content = json.dumps(reply).encode()
    _, teacher = serve(lambda asked: Answer(content) if asked.path == "/v1/completions" else engine(asked))
    assert teacher.compute_logprobs([TokenSequence([1], [4])]) == [[-3.25]]

"""/v1/completions: what is written, and every number about it, against a plain forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from serving import CONTEXT, NAME, WIDTH, client_of, random_sequences, whole_logprobs

from understudy.serve.engine import Engine

PROMPTS = [[*list(s.prompt_ids), 5] for s in random_sequences(3, seed=2)]
TEXT = "How many clips did Natalia sell"


def complete(client: httpx2.Client, **fields: Any) -> list[dict[str, Any]]:
    reply = client.post("/v1/completions", json=fields).raise_for_status().json()
    assert (reply["object"], reply["model"]) == ("text_completion", NAME)
    assert [choice["index"] for choice in reply["choices"]] == list(range(len(reply["choices"])))
    return reply["choices"]


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(whole_logprobs(folder, [*ids, 0])[-1].argmax()))
    return ids[len(prompt) :]


def without_repetition(folder: Path) -> tuple[list[int], list[int]]:
    """A prompt, and its greedy completion of six different tokens."""
    pairs = ([i, i + 1] for i in range(WIDTH))
    return next((prompt, ids) for prompt in pairs if len(set(ids := greedy(folder, prompt, 6))) == 6)


def test_greedy_completions_are_those_of_a_forward_pass(client: httpx2.Client, checkpoint: Path) -> None:
    choices = complete(
        client, prompt=PROMPTS, max_tokens=5, temperature=0, return_token_ids=True, ignore_eos=True, logprobs=0
    )
    for prompt, choice in zip(PROMPTS, choices, strict=True):
        assert choice["prompt_token_ids"] == prompt
        assert choice["token_ids"] == greedy(checkpoint, prompt, 5)
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
        whole = whole_logprobs(checkpoint, [*prompt, *choice["token_ids"]])[len(prompt) - 1 :]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(whole.max(-1).values.tolist(), abs=2e-5)


def test_sampled_logprobs_are_at_temperature_1(client: httpx2.Client, checkpoint: Path, engine: Engine) -> None:
    fields = {"max_tokens": 8, "temperature": 0.6, "top_p": 0.9, "seed": 3, "n": 2, "logprobs": 3}
    choices = complete(client, prompt=PROMPTS[0], return_token_ids=True, **fields)
    assert len(choices) == 2
    for choice in choices:
        ids, logprobs = choice["token_ids"], choice["logprobs"]
        whole = whole_logprobs(checkpoint, [*PROMPTS[0], *ids])[len(PROMPTS[0]) - 1 :]
        own = whole.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert logprobs["token_logprobs"] == pytest.approx(own.tolist(), abs=2e-5)
        assert logprobs["tokens"] == [engine.token_text(token) for token in ids]
        for position, row in enumerate(logprobs["top_logprobs"]):
            values, top = whole[position].topk(3)
            # Texts can be equal (bytes that are no character alone): the likeliest stays, or the token itself.
            best = zip(top.tolist()[::-1], values.tolist()[::-1], strict=True)
            expected = {engine.token_text(token): value for token, value in best}
            expected[engine.token_text(ids[position])] = float(own[position])
            assert row == pytest.approx(expected, abs=2e-5)


def test_a_seed_decides_what_is_written(client: httpx2.Client) -> None:
    def written(**fields: Any) -> list[list[int]]:
        asked = {"prompt": PROMPTS[0], "max_tokens": 8, "n": 2, "return_token_ids": True}
        return [choice["token_ids"] for choice in complete(client, **asked | fields)]

    assert written(seed=1) == written(seed=1)
    assert written(seed=-1) != written(seed=1)
    assert written(seed=1)[0] != written(seed=1)[1]
    assert written() != written()


def test_prompt_logprobs_have_ranks_and_the_token_itself(
    client: httpx2.Client, checkpoint: Path, engine: Engine
) -> None:
    for k in (0, 4, -1):
        choices = complete(client, prompt=PROMPTS, max_tokens=1, prompt_logprobs=k)
        for prompt, choice in zip(PROMPTS, choices, strict=True):
            first, *rows = choice["prompt_logprobs"]
            assert first is None
            whole = whole_logprobs(checkpoint, prompt)
            for position, (token, row) in enumerate(zip(prompt[1:], rows, strict=True)):
                count = WIDTH if k == -1 else k
                values, order = whole[position].sort(descending=True)
                assert {int(i) for i in row} == {token, *order[:count].tolist()}
                assert next(iter(row)) == str(token)
                for other, entry in row.items():
                    assert entry["logprob"] == pytest.approx(float(whole[position, int(other)]), abs=2e-5)
                    # Tokens that are all but equally likely may change places.
                    assert values[entry["rank"] - 1] == pytest.approx(entry["logprob"], abs=4e-5)
                    assert entry["decoded_token"] == engine.token_text(int(other))


def test_scoring_without_writing(client: httpx2.Client, checkpoint: Path) -> None:
    [choice] = complete(client, prompt=PROMPTS[1], max_tokens=0, prompt_logprobs=0)
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    values = [next(iter(row.values()))["logprob"] for row in choice["prompt_logprobs"][1:]]
    own = whole_logprobs(checkpoint, PROMPTS[1]).gather(1, torch.tensor(PROMPTS[1][1:])[:, None])
    assert values == pytest.approx(own[:, 0].tolist(), abs=2e-5)


def test_echo_repeats_prompt_and_scores(client: httpx2.Client, checkpoint: Path, engine: Engine) -> None:
    [choice] = complete(client, prompt=TEXT, max_tokens=3, echo=True, logprobs=2, temperature=0, return_token_ids=True)
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    assert choice["prompt_token_ids"] == engine.encode(TEXT)
    assert choice["text"].startswith(TEXT)
    logprobs = choice["logprobs"]
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    own = whole_logprobs(checkpoint, ids).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert logprobs["token_logprobs"][1:] == pytest.approx(own.tolist(), abs=2e-5)
    assert logprobs["tokens"] == [engine.token_text(token) for token in ids]
    starts = [sum(map(len, logprobs["tokens"][:i])) for i in range(len(ids))]
    assert logprobs["text_offset"] == starts
    [again] = complete(client, prompt=TEXT, max_tokens=0, echo=True, logprobs=2)
    assert again["text"] == TEXT
    count = len(choice["prompt_token_ids"])
    assert again["logprobs"]["token_logprobs"][1:] == pytest.approx(own.tolist()[: count - 1], abs=2e-5)


def test_a_prompt_of_one_token_has_no_scores(client: httpx2.Client) -> None:
    [choice] = complete(client, prompt=[7], max_tokens=0, prompt_logprobs=2, echo=True, logprobs=1)
    assert choice["prompt_logprobs"] == [None]
    assert choice["logprobs"]["token_logprobs"] == [None]


def test_texts_and_ids_are_the_same_prompt(client: httpx2.Client, engine: Engine) -> None:
    fields = {"max_tokens": 4, "temperature": 0, "return_token_ids": True}
    by_text = complete(client, prompt=[TEXT, "April"], **fields)
    assert by_text == complete(client, prompt=[engine.encode(TEXT), engine.encode("April")], **fields)
    assert by_text[0] == complete(client, prompt=TEXT, **fields)[0]


def test_what_ends_a_completion(client: httpx2.Client, checkpoint: Path, engine: Engine) -> None:
    prompt, ids = without_repetition(checkpoint)
    fields = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
    [choice] = complete(client, stop_token_ids=[ids[3]], **fields)
    assert (choice["token_ids"], choice["finish_reason"], choice["stop_reason"]) == (ids[:4], "stop", ids[3])
    assert choice["text"] == engine.decode(ids[:3])
    text = engine.decode(ids[:3])
    stop = engine.token_text(ids[2])
    [choice] = complete(client, stop=[stop, "never"], **fields)
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["text"] == text[: text.index(stop)]
    assert len(choice["token_ids"]) <= 3


def test_the_models_own_end(checkpoint: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, ids = without_repetition(checkpoint)
    monkeypatch.setattr(engine, "end_ids", frozenset({ids[2]}))
    fields = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "return_token_ids": True}
    with client_of(engine) as client:
        [choice] = complete(client, **fields)
        assert (choice["token_ids"], choice["finish_reason"], choice["stop_reason"]) == (ids[:3], "stop", None)
        [choice] = complete(client, ignore_eos=True, **fields)
        assert (choice["token_ids"], choice["finish_reason"]) == (ids, "length")


def test_usage(client: httpx2.Client) -> None:
    fields = {"prompt": PROMPTS, "max_tokens": 2, "n": 2, "ignore_eos": True}
    reply = client.post("/v1/completions", json=fields).json()
    prompt = sum(map(len, PROMPTS))
    assert reply["usage"] == {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}


def test_tokenize_and_back(client: httpx2.Client, engine: Engine) -> None:
    reply = client.post("/tokenize", json={"prompt": TEXT}).raise_for_status().json()
    assert reply == {"tokens": engine.encode(TEXT), "count": len(engine.encode(TEXT)), "max_model_len": CONTEXT}
    assert client.post("/detokenize", json={"tokens": reply["tokens"]}).json() == {"prompt": TEXT}
    assert client.post("/detokenize", json={"tokens": [WIDTH]}).status_code == 400


@pytest.mark.parametrize(
    ("fields", "param", "fragment"),
    [
        ({"stream": True}, "stream", "False"),
        ({"suffix": "end"}, "suffix", "suffix"),
        ({"best_of": 2}, "best_of", "1"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias", "at most 0"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "0"),
        ({"presence_penalty": -0.5}, "presence_penalty", "0"),
        ({"repetition_penalty": 1.2}, "repetition_penalty", "1"),
        ({"min_p": 0.1}, "min_p", "0"),
        ({"guided_json": {}}, "guided_json", "not permitted"),
        ({"prompt": []}, "prompt", "none of them empty"),
        ({"prompt": [[]]}, "prompt", "none of them empty"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": [1, -2]}, "prompt", "token ids (0 or more)"),
        ({"prompt": [1, "a"]}, "prompt", "expected text"),
        ({"prompt": [WIDTH]}, "prompt", f"expected 0 to {WIDTH - 1}"),
        ({"prompt": None}, "prompt", "prompt"),
        ({"max_tokens": -1}, "max_tokens", "0"),
        ({"max_tokens": 0}, "max_tokens", "nothing would be written"),
        ({"max_tokens": CONTEXT}, None, f"context length is {CONTEXT}"),
        ({"temperature": -1}, "temperature", "0"),
        ({"top_p": 0}, "top_p", "0"),
        ({"top_k": -2}, "top_k", "-1"),
        ({"n": 0}, "n", "1"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"stop_token_ids": [WIDTH]}, "stop_token_ids", f"expected 0 to {WIDTH - 1}"),
        ({"logprobs": WIDTH + 1}, "logprobs", "--max-logprobs"),
        ({"prompt_logprobs": -2}, "prompt_logprobs", "-1"),
    ],
)
def test_what_is_not_offered_is_refused(
    client: httpx2.Client, fields: dict[str, Any], param: str | None, fragment: str
) -> None:
    reply = client.post("/v1/completions", json={"prompt": "April"} | fields)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert fragment in error["message"]


def test_values_that_change_nothing_are_taken(client: httpx2.Client) -> None:
    neutral = {
        "stream": False,
        "suffix": None,
        "best_of": 1,
        "logit_bias": {},
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_p": 0,
        "user": "me",
        "stop": [],
        "top_k": -1,
        "max_tokens": None,
        "n": None,
        "temperature": None,
    }
    [choice] = complete(client, prompt="April", **neutral)
    assert choice["finish_reason"] in ("stop", "length")
    # So cold that it is greedy: logits divided by less would overflow.
    cold, greedy = (
        complete(client, prompt="April", temperature=t, max_tokens=4, return_token_ids=True) for t in (1e-300, 0)
    )
    assert cold == greedy

"""OpenAI's own client, as it is."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from serving import NAME, listening

from understudy.serve.app import create_app
from understudy.serve.engine import Engine

TEXT = "How many clips did Natalia sell"


@pytest.fixture(scope="module")
def api(engine: Engine) -> Iterator[openai.OpenAI]:
    with (
        listening(create_app(engine, api_key="key")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as api,
    ):
        yield api


def test_models(api: openai.OpenAI, engine: Engine) -> None:
    [model] = api.models.list()
    assert (model.id, model.owned_by) == (NAME, "understudy")
    assert model.model_dump()["fingerprint"] == engine.fingerprint


def test_text_and_ids(api: openai.OpenAI, engine: Engine) -> None:
    def written(prompt: str | list[int]) -> openai.types.Completion:
        return api.completions.create(
            model=NAME,
            prompt=prompt,
            max_tokens=6,
            temperature=0,
            logprobs=2,
            stop=["never"],
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )

    by_text, by_ids = written(TEXT), written(engine.encode(TEXT))
    assert by_text.choices == by_ids.choices
    [choice] = by_text.choices
    assert choice.finish_reason == "length"
    assert choice.model_extra
    assert choice.text == engine.decode([*engine.encode(TEXT), *choice.model_extra["token_ids"]]).removeprefix(TEXT)
    assert choice.logprobs
    assert choice.logprobs.token_logprobs
    assert len(choice.logprobs.token_logprobs) == 6
    assert by_text.usage
    assert by_text.usage.completion_tokens == 6


def test_echo_and_prompt_logprobs_are_the_same_numbers(api: openai.OpenAI) -> None:
    reply = api.completions.create(
        model=NAME, prompt=TEXT, max_tokens=0, echo=True, logprobs=0, extra_body={"prompt_logprobs": 1}
    )
    [choice] = reply.choices
    assert choice.text == TEXT
    assert choice.logprobs
    assert choice.logprobs.token_logprobs
    assert choice.model_extra
    rows = choice.model_extra["prompt_logprobs"][1:]
    assert choice.logprobs.token_logprobs[1:] == [next(iter(row.values()))["logprob"] for row in rows]


def test_errors(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="stream"):
        api.completions.create(model=NAME, prompt=TEXT, stream=True)
    with pytest.raises(openai.NotFoundError) as error:
        api.completions.create(model="other", prompt=TEXT)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        api.with_options(api_key="wrong").models.list()

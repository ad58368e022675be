"""The OpenAPI document is true, and no input makes the server fail: requests drawn from it, valid and not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import listening

from understudy.serve.app import create_app
from understudy.serve.engine import Engine
from understudy.serve.metrics import Metrics
from understudy.serve.openapi import PATHS, document
from understudy.serve.schemas import CompletionRequest, NotOffered
from understudy.serve.settings import ServeSettings

EXAMPLES = {"/v1/completions": 40, "/v1/score": 40, "/tokenize": 10, "/detokenize": 10}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SETTINGS = settings(deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def schema(engine: Engine) -> Iterator[Any]:
    # Small enough that no example takes long.
    limits = ServeSettings(max_request_tokens=400, max_request_sequences=20, max_body_bytes=20_000)
    with listening(create_app(engine, limits)) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def answers(cases: Any, count: int, change: Callable[[Any], Any] = lambda body: body) -> Counter[int]:
    """Ask ``count`` of them, check the replies against the document, and count their statuses."""
    statuses: Counter[int] = Counter()

    @seed(0)
    @given(case=cases)
    @settings(SETTINGS, max_examples=count)
    def ask(case: Case) -> None:
        case.body = change(case.body)
        statuses[case.call_and_validate(checks=CHECKS).status_code] += 1

    ask()
    return statuses


@pytest.mark.parametrize("path", sorted(PATHS - EXAMPLES.keys()))
def test_pages(schema: Any, path: str) -> None:
    assert answers(schema[path]["GET"].as_strategy(), 1) == {200: 1}


@pytest.mark.parametrize("path", sorted(EXAMPLES))
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_input_makes_the_server_fail(schema: Any, path: str, mode: GenerationMode) -> None:
    statuses = answers(schema[path]["POST"].as_strategy(generation_mode=mode), EXAMPLES[path])
    assert statuses.total() >= EXAMPLES[path]
    assert mode is GenerationMode.POSITIVE or statuses[200] == 0


def within(value: Any) -> Any:
    """Ids of the vocabulary, small numbers, and whole numbers without a fraction (which JSON schema takes for integers,
    and the server does not)."""
    if isinstance(value, dict):
        return {key: within(item) for key, item in value.items()}
    if isinstance(value, list):
        return [within(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return int(value) % 17 if value == int(value) else value


def scorable(body: Any) -> Any:
    """With what its kind needs, and nothing that belongs to another."""
    body = within(body) | {"model": None}
    lengths = [len(sequence["completion_ids"]) for sequence in body["sequences"]]
    needed = {"topk": {"topk": 3}, "chosen": {"ids": [[[1, 2]] * length for length in lengths]}}
    return {"topk": None, "ids": None} | body | {"topk": None, "ids": None} | needed.get(body.get("kind"), {})


def writable(body: Any) -> Any:
    return within(body) | {"model": None, "max_tokens": 2, "top_p": 0.5, "prompt": within(body["prompt"]) or "a"}


@pytest.mark.parametrize(("path", "change"), [("/v1/score", scorable), ("/v1/completions", writable)])
def test_sensible_input_is_answered(schema: Any, path: str, change: Callable[[Any], Any]) -> None:
    statuses = answers(schema[path]["POST"].as_strategy(), EXAMPLES[path], change)
    assert statuses[200] > EXAMPLES[path] // 2, statuses


def test_every_field_of_a_request_is_described() -> None:
    schemas = document()["components"]["schemas"]
    for name in ("CompletionRequest", "ScoreRequest", "TokenizeRequest", "DetokenizeRequest"):
        assert schemas[name]["additionalProperties"] is False
    described = schemas["CompletionRequest"]["properties"]
    assert "ranks" in described["prompt_logprobs"]["description"]
    assert set(schemas["ScoreRequest"]["properties"]) == {"model", "sequences", "kind", "topk", "ids"}


def test_the_page_about_serving_names_all_there_is(engine: Engine) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(?:GET|POST) (/[\w/.]+)`", text)) == PATHS
    families = {family.name.removesuffix("_total") for family in Metrics().registry.collect()}
    assert {name.removesuffix("_total") for name in re.findall(r"`(understudy_\w+)`", text)} == families
    taken = set(re.findall(r"`(\w+)`", text[text.index("**`/v1/completions`**") : text.index("Errors have")]))
    offered = set(CompletionRequest.model_fields) - set(NotOffered.model_fields) - {"model"}
    assert offered <= taken
    options = {"--" + name.replace("_", "-") for name in ServeSettings.model_fields}
    assert options <= set(re.findall(r"`(--[\w-]+)`", text))

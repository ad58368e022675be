"""/v1/score and /v1/head against a plain forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from serving import (
    CONTEXT,
    NAME,
    WIDTH,
    as_json,
    client_of,
    completion_logprobs,
    load_engine,
    random_sequences,
)

from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import load_model
from understudy.backends.local import LocalTeacher
from understudy.serve.binary import digest, unpack_head, unpack_hidden
from understudy.serve.engine import Engine, fingerprint, head_hash
from understudy.types import SampledScores, TopkScores

SEQUENCES = random_sequences(5)


def score(client: httpx2.Client, **fields: Any) -> Any:
    return client.post("/v1/score", json={"sequences": as_json(SEQUENCES)} | fields).raise_for_status().json()


def test_sampled_scores_are_those_of_a_forward_pass(client: httpx2.Client, checkpoint: Path, engine: Engine) -> None:
    reply = score(client, model=NAME)
    assert (reply["model"], reply["fingerprint"]) == (NAME, engine.fingerprint)
    for sequence, row in zip(SEQUENCES, reply["scores"], strict=True):
        expected = completion_logprobs(checkpoint, sequence).gather(1, torch.tensor(sequence.completion_ids)[:, None])
        assert row.keys() == {"digest", "logprobs"}
        assert row["digest"] == digest(sequence)
        assert row["logprobs"] == pytest.approx(expected[:, 0].tolist(), abs=2e-5)


def test_topk_scores_are_those_of_a_forward_pass(client: httpx2.Client, checkpoint: Path) -> None:
    for sequence, row in zip(SEQUENCES, score(client, kind="topk", topk=7)["scores"], strict=True):
        values, ids = completion_logprobs(checkpoint, sequence).topk(7)
        assert row["ids"] == ids.tolist()
        torch.testing.assert_close(torch.tensor(row["topk_logprobs"]), values, atol=2e-5, rtol=0)


def test_chosen_scores_keep_their_order(client: httpx2.Client, checkpoint: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, WIDTH, (len(s.completion_ids), 4), generator=generator).tolist() for s in SEQUENCES]
    for sequence, chosen, row in zip(SEQUENCES, ids, score(client, kind="chosen", ids=ids)["scores"], strict=True):
        expected = completion_logprobs(checkpoint, sequence).gather(1, torch.tensor(chosen))
        assert row["ids"] == chosen
        torch.testing.assert_close(torch.tensor(row["topk_logprobs"]), expected, atol=2e-5, rtol=0)


def test_numbers_arrive_bit_for_bit(engine: Engine, checkpoint: Path) -> None:
    model = load_model(str(checkpoint), role="teacher", dtype=torch.float32, device=torch.device("cpu"))
    teacher = LocalTeacher(LanguageModel(model))
    with client_of(engine, max_batch_sequences=1) as client:
        for i, sequence in enumerate(SEQUENCES):
            [sampled], [topk] = teacher.score([sequence], "sampled"), teacher.score([sequence], "topk", topk=3)
            assert isinstance(sampled, SampledScores)
            assert isinstance(topk, TopkScores)
            assert score(client)["scores"][i] == {
                "digest": digest(sequence),
                "logprobs": sampled.teacher_logprobs,
            }
            row = score(client, kind="topk", topk=3)["scores"][i]
            assert (row["ids"], row["topk_logprobs"]) == (topk.ids, topk.logprobs)


def test_hidden_states_and_head_give_the_whole_distribution(client: httpx2.Client, checkpoint: Path) -> None:
    reply = client.post("/v1/score", json={"sequences": as_json(SEQUENCES), "kind": "hidden"}).raise_for_status()
    assert reply.headers["content-type"] == "application/octet-stream"
    scores, metadata = unpack_hidden(reply.content)
    head, head_hash = unpack_head(client.get("/v1/head").raise_for_status().content)
    assert metadata["head"] == head_hash
    assert metadata["digests"].split() == [digest(sequence) for sequence in SEQUENCES]
    for sequence, row in zip(SEQUENCES, scores, strict=True):
        assert row.teacher_hidden.dtype == torch.bfloat16
        expected = completion_logprobs(checkpoint, sequence)
        own = expected.gather(1, torch.tensor(sequence.completion_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row.teacher_logprobs), own, atol=2e-5, rtol=0)
        # A state is rounded by 2**-9 of itself, and with it each of the H products of a logit.
        products = row.teacher_hidden.float().abs() @ head.weight.abs().T
        bound = 2 * products.max() * 2**-9
        assert (head.logprobs(row.teacher_hidden.float()) - expected).abs().max() <= bound


def test_the_head_is_the_models(client: httpx2.Client, checkpoint: Path, engine: Engine) -> None:
    reply = client.get("/v1/head").raise_for_status()
    head, digest = unpack_head(reply.content)
    model: Any = load_model(str(checkpoint), role="teacher", dtype=torch.float32, device=torch.device("cpu"))
    assert torch.equal(head.weight, model.get_output_embeddings().weight)
    assert (head.bias, head.softcap, head.scale, head.rows) == (None, None, 1.0, WIDTH)
    assert digest == engine.head_hash == head_hash(head)
    assert reply.headers["etag"] == f'"{digest}"'
    again = client.get("/v1/head", headers={"If-None-Match": reply.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_fingerprints_tell_weights_precision_and_vocabulary_apart(checkpoint: Path, engine: Engine) -> None:
    model = load_model(str(checkpoint), role="teacher", dtype=torch.float32, device=torch.device("cpu"))
    assert fingerprint(model, WIDTH) == engine.fingerprint
    assert fingerprint(model, 300) != engine.fingerprint
    assert load_engine(checkpoint, dtype=torch.bfloat16).fingerprint != engine.fingerprint
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    assert fingerprint(model, WIDTH) != engine.fingerprint


def test_the_models_entry(client: httpx2.Client, engine: Engine, checkpoint: Path) -> None:
    reply = client.get("/v1/models").raise_for_status().json()
    [entry] = reply["data"]
    assert reply["object"] == "list"
    assert entry.pop("created") > 1_700_000_000
    assert entry == {
        "id": NAME,
        "object": "model",
        "owned_by": "understudy",
        "root": str(checkpoint),
        "max_model_len": CONTEXT,
        "fingerprint": engine.fingerprint,
        "max_logprobs": WIDTH,
        "vocab_size": WIDTH,
    }


ONE = {"prompt_ids": [1, 2], "completion_ids": [3, 4]}


@pytest.mark.parametrize(
    ("fields", "param", "fragment"),
    [
        ({"sequences": []}, "sequences", "at least 1"),
        ({"sequences": [ONE | {"prompt_ids": []}]}, "sequences", "at least 1"),
        ({"sequences": [ONE | {"completion_ids": [3, -1]}]}, "sequences", "completion_ids.1"),
        ({"sequences": [ONE | {"completion_ids": [3, WIDTH]}]}, "sequences.0.completion_ids", f"id {WIDTH}"),
        ({"sequences": [ONE | {"completion_ids": [3, "4"]}]}, "sequences", "valid integer"),
        ({"sequences": [ONE | {"completion_ids": [True]}]}, "sequences", "valid integer"),
        ({"sequences": [ONE | {"completion_ids": [1] * CONTEXT}]}, None, f"context length is {CONTEXT}"),
        ({"kind": "topk"}, "topk", "kind topk"),
        ({"kind": "sampled", "topk": 2}, "topk", "kind topk"),
        ({"kind": "topk", "topk": WIDTH + 1}, "topk", "--max-logprobs"),
        ({"kind": "chosen"}, "ids", "kind chosen"),
        ({"kind": "chosen", "ids": [[[1], [2]], [[1]]]}, "ids", "one row per completion token"),
        ({"kind": "chosen", "ids": [[[1]]]}, "ids", "one row per completion token"),
        ({"kind": "chosen", "ids": [[[1], [2, 3]]]}, "ids", "as many ids in every row"),
        ({"kind": "chosen", "ids": [[[1], [WIDTH]]]}, "ids", f"id {WIDTH}"),
        ({"kind": "best"}, "kind", "'sampled'"),
        ({"temperature": 0.5}, "temperature", "not permitted"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    client: httpx2.Client, fields: dict[str, Any], param: str | None, fragment: str
) -> None:
    reply = client.post("/v1/score", json={"sequences": [ONE]} | fields)
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert fragment in error["message"]


def test_a_sequence_may_fill_the_context(client: httpx2.Client) -> None:
    sequence = {"prompt_ids": [1] * 8, "completion_ids": [2] * (CONTEXT - 8)}
    [row] = client.post("/v1/score", json={"sequences": [sequence]}).raise_for_status().json()["scores"]
    assert len(row["logprobs"]) == CONTEXT - 8

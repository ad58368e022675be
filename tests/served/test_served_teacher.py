"""The client of `understudy serve teacher`, against a real server: values, and replies that must not pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import CONTEXT, WIDTH, listening, load_engine, make_checkpoint, random_sequences

from fault_proxy import Schedule, faulty
from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import load_model
from understudy.backends.local import LocalTeacher
from understudy.backends.served import ServedTeacher
from understudy.config_served import ConnectionConfig, ServerConfig
from understudy.errors import ConfigError, ServerError
from understudy.serve.app import create_app
from understudy.serve.settings import ServeSettings
from understudy.types import HiddenScores, TokenSequence, TopkScores

QUICK = ConnectionConfig(patience_seconds=2, timeout_seconds=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with listening(create_app(load_engine(folder), ServeSettings(max_batch_sequences=1))) as url:
        yield url


@pytest.fixture
def make(url: str) -> Iterator[Callable[..., ServedTeacher]]:
    made: list[ServedTeacher] = []

    def teacher(at: str = url, **changes: Any) -> ServedTeacher:
        made.append(ServedTeacher(ServerConfig(url=at, connection=QUICK, **changes)))
        return made[-1]

    yield teacher
    for one in made:
        one.close()


def local(folder: Path) -> LocalTeacher:
    model = load_model(str(folder), role="teacher", dtype=torch.float32, device=torch.device("cpu"))
    return LocalTeacher(LanguageModel(model.requires_grad_(False)))


def test_every_kind_is_what_the_model_says(folder: Path, make: Callable[..., ServedTeacher]) -> None:
    teacher, own, sequences = make(), local(folder), random_sequences(12, prompts=3)
    assert teacher.compute_logprobs(sequences) == [
        pytest.approx(row, abs=1e-5) for row in own.compute_logprobs(sequences)
    ]
    best = own.score(sequences, "topk", topk=5)
    for served, exact in zip(teacher.score(sequences, "topk", topk=5), best, strict=True):
        assert isinstance(served, TopkScores)
        assert isinstance(exact, TopkScores)
        assert served.ids == exact.ids
        torch.testing.assert_close(torch.tensor(served.logprobs), torch.tensor(exact.logprobs), atol=1e-5, rtol=0)
    ids = [[list(reversed(row)) for row in score.ids] for score in best if isinstance(score, TopkScores)]
    for served, exact in zip(teacher.score(sequences, "chosen", ids=ids), best, strict=True):
        assert isinstance(served, TopkScores)
        assert isinstance(exact, TopkScores)
        mirrored = torch.tensor(exact.logprobs).flip(-1)
        torch.testing.assert_close(torch.tensor(served.logprobs), mirrored, atol=1e-5, rtol=0)
    for served, exact in zip(teacher.score(sequences, "hidden"), own.score(sequences, "hidden"), strict=True):
        assert isinstance(served, HiddenScores)
        assert isinstance(exact, HiddenScores)
        assert torch.equal(served.teacher_hidden, exact.teacher_hidden.bfloat16())
    assert torch.equal(teacher.head.weight, own.head.weight)
    teacher.vocab_size = 300
    assert (teacher.head.vocab_size, own.head.vocab_size) == (300, WIDTH)


def test_what_a_run_needs_is_checked(make: Callable[..., ServedTeacher]) -> None:
    make().check(longest=CONTEXT - 1, topk=8)
    with pytest.raises(ConfigError, match="context"):
        make().check(longest=CONTEXT + 1)
    with pytest.raises(ConfigError, match="no such"):
        make(served_model="no such").check(longest=8)


@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_scores_in_another_order_are_refused(kind: Any, url: str, make: Callable[..., ServedTeacher]) -> None:
    """Of one length, so that nothing else tells them apart."""
    sequences = [TokenSequence([1, 2, i], [i, 3]) for i in range(4, 9)]
    schedule = Schedule(seed=0, share=1.0, faults=("reorder",))
    with faulty(url, schedule) as proxy, pytest.raises(ServerError, match="scores of something else"):
        make(proxy).score(sequences, kind, topk=2 if kind == "topk" else 0)


def test_marks_of_another_model_are_refused(url: str, make: Callable[..., ServedTeacher], tmp_path: Path) -> None:
    teacher = make()
    teacher.compute_logprobs(random_sequences(2))
    other = load_model(str(make_checkpoint(tmp_path)), role="teacher", dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        other.get_output_embeddings().weight[3] += 1
    other.save_pretrained(tmp_path)
    with listening(create_app(load_engine(tmp_path))) as elsewhere:
        moved = make(elsewhere)
        moved._fingerprint = teacher._fingerprint  # the server was started again with other weights
        with pytest.raises(ServerError, match="which marked before"):
            moved.compute_logprobs(random_sequences(2))


def test_a_kind_it_does_not_give_is_an_error(make: Callable[..., ServedTeacher]) -> None:
    with pytest.raises(ValueError, match="expected one of"):
        make().score(random_sequences(1), "nonsense")  # pyright: ignore[reportArgumentType]

"""Marks against the weights that are said to give them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from understudy.backends.loading import load_student
from understudy.backends.local import LocalTeacher
from understudy.config import StudentConfig, TeacherConfig
from understudy.mark_temperature import RATIOS, errors_by_ratio, named_weights
from understudy.types import TokenSequence
from user import save_model, word_tokenizer

SEQUENCES = [TokenSequence([1, 2], [3 + i for i in range(12)]), TokenSequence([4], [5, 6, 7])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "teacher", word_tokenizer())


def teacher(folder: Path, temperature: float = 1.0) -> LocalTeacher:
    return LocalTeacher(load_student(StudentConfig(model=str(folder), device="cpu")), temperature=temperature)


def test_the_right_ratio_alone_gives_the_marks(folder: Path) -> None:
    marks = teacher(folder, 2.0).compute_logprobs(SEQUENCES)
    errors = errors_by_ratio(marks, teacher(folder), SEQUENCES, temperature=1.0)
    assert tuple(errors) == RATIOS
    assert errors[2.0] < 1e-5
    assert min(error for ratio, error in errors.items() if ratio != 2.0) > 10 * errors[2.0]


def test_of_long_sequences_the_first_tokens_are_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("understudy.mark_temperature._TOKENS", 3)
    marks = teacher(folder).compute_logprobs(SEQUENCES)
    marks = [own[:3] + [-1000.0] * len(own[3:]) for own in marks]
    assert errors_by_ratio(marks, teacher(folder), SEQUENCES, temperature=1.0)[1.0] < 1e-5


def test_weights_that_are_not_all_at_hand(folder: Path, tmp_path: Path) -> None:
    """A folder of adapters is small whatever they belong to."""
    here = TeacherConfig(model=str(folder), url="http://127.0.0.1:1", device="cpu")
    assert named_weights(here, "student", vocab_size=None) is not None
    assert named_weights(here, str(folder), vocab_size=None) is None  # nobody said that the server has these
    size = (folder / "model.safetensors").stat().st_size
    assert named_weights(here, "student", vocab_size=None, most_bytes=size - 1) is None
    (tmp_path / "adapter_model.safetensors").write_bytes(b"few")
    for base in ("someone/a-large-model", str(folder)):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        adapters = here.model_copy(update={"model": str(tmp_path)})
        assert named_weights(adapters, "student", vocab_size=None, most_bytes=size - 1) is None

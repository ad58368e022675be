from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fuzzing
import huggingface_hub.constants
import pytest

from user import bpe_tokenizer, save_model, write_rows


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that looks like a hub's is not asked for there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and rows that work together."""
    folder = tmp_path_factory.mktemp("material")
    save_model(folder / "student", bpe_tokenizer(chat=True))
    save_model(folder / "teacher", bpe_tokenizer(chat=True), seed=1)
    rows = [{"prompt": f"How many are {i}?", "answer": str(i), "completion": f"{i}."} for i in range(4)]
    write_rows(folder / "rows.jsonl", rows)
    return folder


@pytest.fixture(scope="session", autouse=True)
def results(request: pytest.FixtureRequest) -> Iterator[None]:
    """The long form's counts, where everything passed."""
    yield
    target = os.environ.get("UNDERSTUDY_FUZZ_RESULTS")
    if target and request.session.testsfailed == 0:
        fuzzing.write_results(Path(target))

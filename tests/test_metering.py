"""How large a run's teachers are, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoConfig

from tiny import teacher_of, tiny_model
from understudy import flops
from understudy.backends.local import LocalTeacher
from understudy.backends.protocols import Teacher
from understudy.config import StudentConfig, TeacherConfig
from understudy.costs import CostLedger
from understudy.metering import matmul_sizes, metered
from understudy.types import SampledScores, ScoreKind, Scores, TokenSequence
from user import bpe_tokenizer, save_model

ASKED = [TokenSequence([1, 2, 3], [4, 5]), TokenSequence([1, 2, 3], [0])]


class Elsewhere:
    """A teacher of which nothing is known here."""

    kinds: frozenset[ScoreKind] = frozenset({"sampled"})

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        return [[-1.0] * len(sequence.completion_ids) for sequence in sequences]

    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0) -> list[Scores]:
        return [SampledScores(logprobs) for logprobs in self.compute_logprobs(sequences)]


def paid(teacher: Teacher, config: TeacherConfig | None, student: str = "elsewhere") -> dict[str, float]:
    costs = CostLedger()
    metered(teacher, costs, "teacher_scoring", config, StudentConfig(model=student)).score(ASKED, "sampled")
    return costs.roles["teacher_scoring"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    save_model(folder, bpe_tokenizer(), seed=0)
    return str(folder)


def test_a_teacher_in_this_process_is_measured() -> None:
    teacher = teacher_of(tiny_model(seed=0))
    assert isinstance(teacher, LocalTeacher)
    entry = paid(teacher, None)
    assert entry["tokens"] == 9
    assert entry["flops"] == 2 * matmul_sizes(teacher.model)[0] * 9


def test_a_served_teacher_is_as_large_as_the_model_it_names(checkpoint: str) -> None:
    """Each sequence whole: what its server's cache saves is not known."""
    entry = paid(Elsewhere(), TeacherConfig(url="http://there/v1", model=checkpoint))
    shape = flops.shape_of_config(AutoConfig.from_pretrained(checkpoint))
    assert shape is not None
    assert entry["flops"] == 2 * shape.active_weights * 9
    assert entry["exact_flops"] == sum(flops.scoring(shape, 3, [n], shared=False).total for n in (2, 1))


def test_what_is_not_known_is_not_counted(checkpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bpe_tokenizer().save_pretrained(tmp_path)
    unknown = [
        (None, "elsewhere"),  # a caller's own
        (TeacherConfig(url="http://there/v1", model=checkpoint), checkpoint),  # by default: whose tokens it reads
        (TeacherConfig(url="http://there/v1", model=str(tmp_path)), "elsewhere"),  # a tokenizer alone
    ]
    for config, student in unknown:
        assert paid(Elsewhere(), config, student) | {"seconds": 0} == {
            "tokens": 9,
            "flops": 0,
            "exact_flops": 0,
            "seconds": 0,
        }
    assert "has no configuration" in caplog.text

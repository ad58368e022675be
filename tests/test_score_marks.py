"""Marks of models: against a plain log-softmax, and the article's example on the models that ship."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny import teacher_of, tiny_model
from understudy import ConfigError, TokenSequence
from understudy.report.page import choose_scale
from understudy.report.tokens import LEVELS, colour_level
from understudy.score.command import Models, Sampling, answered
from understudy.score.marks import as_ids, with_marks
from understudy.tokenization import ModelText, load_text
from understudy.worlds.ledger import Ledger
from user import bpe_tokenizer, save_model

LEDGER = Path(__file__).resolve().parents[1] / "src" / "understudy" / "worlds" / "assets" / "ledger"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    return load_text(str(save_model(tmp_path_factory.mktemp("model"), bpe_tokenizer())), "student")


def complete(record: dict[str, Any], text: ModelText) -> dict[str, Any]:
    return as_ids(record, text, lambda own: text.encode(own["prompt_text"]), 0)


def test_texts_become_ids_and_a_finished_answer_its_end_token(text: ModelText) -> None:
    cut = complete({"prompt_text": "How many?", "completion_text": " 72", "finish_reason": "length"}, text)
    done = complete({"prompt_text": "How many?", "completion_text": " 72", "finish_reason": "stop"}, text)
    assert text.tokenizer.decode(cut["completion_ids"]) == " 72"
    assert done["completion_ids"] == [*cut["completion_ids"], 0]
    assert text.tokenizer.decode(cut["prompt_ids"]) == "How many?"
    assert "".join(cut["completion_tokens"]) == " 72"


def test_ids_become_texts(text: ModelText) -> None:
    ids, prompt = text.encode(" 72"), text.encode("How many?")
    made = complete({"prompt_ids": prompt, "completion_ids": [*ids, 0]}, text)
    assert (made["completion_text"], made["prompt_text"]) == (" 72", "How many?")


def test_ids_beyond_the_vocabulary_and_numbers_of_a_text_are_refused(text: ModelText) -> None:
    with pytest.raises(ConfigError, match=rf"token 999999(.|\n)*below {text.vocab_width}"):
        complete({"prompt_ids": [1], "completion_ids": [999_999]}, text)
    with pytest.raises(ConfigError, match="can be written in several ways"):
        complete({"prompt_text": "Q", "completion_text": " 72", "sampler_logprobs": [-1.0] * 40}, text)


def test_the_moment_of_writing_keeps_its_numbers_and_the_teacher_its_prompt(text: ModelText) -> None:
    student, teacher = (teacher_of(tiny_model(vocab_size=300, seed=seed)) for seed in (0, 1))
    record = complete({"prompt_ids": [5, 6], "completion_ids": [7, 8], "prompt_text": "", "completion_text": "x"}, text)
    given = record | {"sampler_logprobs": [-1.0, -2.0], "teacher_prompt_ids": [9]}
    kept, new, null = with_marks(
        [given, record, record | {"sampler_logprobs": None}], text, student=student, teacher=teacher, topk=2
    )
    assert null == new
    assert kept["sampler_logprobs"] == [-1.0, -2.0]
    assert new["sampler_logprobs"] == pytest.approx(student.compute_logprobs([TokenSequence([5, 6], [7, 8])])[0])
    assert kept["teacher_logprobs"] == pytest.approx(teacher.compute_logprobs([TokenSequence([9], [7, 8])])[0])
    assert new["teacher_logprobs"] == pytest.approx(teacher.compute_logprobs([TokenSequence([5, 6], [7, 8])])[0])
    assert kept["student_topk"] == new["student_topk"]
    assert [len(row) for row in new["teacher_topk"]["tokens"]] == [2, 2]
    assert "teacher_logprobs" not in given


def test_the_first_wrong_step_is_coloured_and_the_answer_that_follows_from_it_is_not() -> None:
    """The article's example in small, on the models that ship: the teacher holds the step that leaves the path against
    the student, and not the wrong answer, which is right given the step. Not every first wrong step is of the deepest
    shade: this teacher does not know every fact for certain either."""
    world = Ledger()
    models = Models(str(LEDGER / "start"), str(LEDGER / "teacher"), device="cpu", topk=3)
    prompts = [row["prompt"] for row in world.prompt_rows(16, seed=5)]
    records = answered(prompts, models, Sampling(samples=2, max_completion_tokens=60))
    scale = choose_scale(records)
    first, last = [], []
    for record in records:
        marks = world.diagnose(record["prompt_text"], record["completion_text"])
        false = [one.word_index for one in marks if one.false_in_itself]
        if len(marks) < world.num_items or not false or not marks[-1].inherited:
            continue
        gaps = [p - q for p, q in zip(record["sampler_logprobs"], record["teacher_logprobs"], strict=True)]
        first.append(colour_level(gaps[false[0]], scale))
        last.append(colour_level(gaps[marks[-1].word_index], scale))
        said = record["teacher_topk"]["tokens"][false[0]][0]
        true = next(str(one.true_value) for one in marks if one.word_index == false[0])
        # Where it holds the step against the student, the teacher says what is right.
        assert said == true or first[-1] < LEVELS
    assert len(first) >= 12
    assert sum(level == LEVELS for level in first) >= 0.75 * len(first)
    assert sum(first) / len(first) >= 0.8 * LEVELS
    assert set(last) == {0}

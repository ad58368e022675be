"""Checks of rows: duplicates, contamination, lengths; healthy and planted."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from cases import complaints, levels, look, only, tiny_config

from understudy import RunConfig
from understudy.doctor.data import NGRAM, asked_once, seen_grams, without_template
from user import bpe_tokenizer, save_model, word_tokenizer, write_rows

FAST = {"fast": True}
# Sixteen words each, drawn anew.
LONG = [
    {"prompt": " ".join(f"w{word}" for word in random.Random(i).choices(range(60), k=16)), "answer": f"w{i}"}
    for i in range(12)
]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, role in enumerate(("student", "teacher")):
        save_model(tmp_path / role, word_tokenizer(), seed=seed, context=64)
    return tmp_path


def config_with(
    folder: Path, training: Sequence[Mapping[str, Any]], problems: Sequence[Mapping[str, Any]]
) -> RunConfig:
    test = write_rows(folder / "test.jsonl", problems)
    return tiny_config(folder, rows=training, evaluation={"tasks": [{"name": "held-out", "path": str(test)}]})


def test_healthy_rows_pass(models: Path):
    report = look(config_with(models, LONG[:8], LONG[8:]), **FAST)
    assert complaints(report) == []
    assert only(report, "data.rows").numbers == {"rows": 8, "epochs": 0.5, "left_out": 0.0}
    assert only(report, "data.duplicates").numbers == {"rows": 8, "repeats": 0, "share": 0.0}
    assert only(report, "data.contamination").numbers == {
        "task": "held-out",
        "problems": 4,
        "long": 4,
        "seen": 0,
        "share": 0.0,
        "whole": 0,
        "whole_share": 0.0,
    }
    lengths = [finding.numbers for finding in report.findings if finding.check == "data.lengths"]
    assert lengths == [
        {"role": "student", "mean": 16.0, "max": 16, "needed": 22},
        {"role": "teacher default", "mean": 16.0, "max": 16, "needed": 22},
    ]


def test_an_empty_row_fails_and_hides_nothing(models: Path):
    report = look(tiny_config(models, rows=[LONG[0], {"prompt": "  "}]), **FAST)
    [finding] = report.of("fail")
    assert "rows.jsonl:2" in finding.evidence
    assert 'expected "a non-empty text"' in finding.evidence or "a non-empty text" in finding.evidence
    assert 'fix or drop the row\'s "prompt"' in finding.remedy
    assert levels(report, "tokens.map") == ["pass"]
    assert report.not_run["data.duplicates"] == f"see {finding.check}"


def test_rows_that_are_left_out_are_counted(models: Path):
    long = {"prompt": " ".join(["w1"] * 70)}
    config = tiny_config(models, rows=[LONG[0], long, LONG[1]], prompts={"over_long": "skip"})
    config = config.model_copy(
        update={"prompts": config.prompts and config.prompts.model_copy(update={"over_long": "skip"})}
    )
    finding = only(look(config, **FAST), "data.rows")
    assert finding.level == "warn"
    assert finding.numbers["left_out"] == pytest.approx(1 / 3)


def test_a_file_that_was_written_twice(models: Path):
    finding = only(look(tiny_config(models, rows=[*LONG, *LONG]), **FAST), "data.duplicates")
    assert finding.level == "warn"
    assert finding.numbers == {"rows": 24, "repeats": 12, "share": 0.5}
    assert f"2 times: '{LONG[0]['prompt']}" in finding.evidence
    assert "drop the repeats" in finding.remedy


def test_supervised_rows_may_repeat_up_to_a_half(models: Path):
    rows = [{"prompt": f"w{i}", "completion": "w1"} for i in range(4)]
    assert levels(look(tiny_config(models, rows=[*rows, rows[0]]), "sft", **FAST), "data.duplicates") == ["pass"]
    assert levels(look(tiny_config(models, rows=[*rows, *rows]), "sft", **FAST), "data.duplicates") == ["warn"]


def test_problems_among_the_training_rows(models: Path):
    """One problem as it is, one inside a longer prompt."""
    inside = {"prompt": f"w59 w58 {LONG[9]['prompt']}"}
    finding = only(look(config_with(models, [*LONG[:8], LONG[8], inside], LONG[8:]), **FAST), "data.contamination")
    assert finding.level == "warn"
    assert (finding.numbers["seen"], finding.numbers["share"]) == (2, 0.5)
    assert f"2 of 4 problems share {NGRAM} words in a row with one of 10 training rows" in finding.evidence
    assert repr(" ".join(LONG[8]["prompt"].split()[:NGRAM])) in finding.evidence
    assert "take these problems out" in finding.remedy


def test_at_the_start_of_a_run_so_many_characters_are_searched(models: Path, monkeypatch: pytest.MonkeyPatch):
    before = sum(len(row["prompt"]) for row in LONG[:8])
    config = config_with(models, LONG[:9], LONG[8:])
    for most, seen in ((before, 0), (before + 1, 1)):
        monkeypatch.setattr("understudy.doctor.data.FAST_CHARACTERS", most)
        assert only(look(config, **FAST), "data.contamination").numbers["seen"] == seen
    assert only(look(config), "data.contamination").numbers["seen"] == 1


def test_an_evaluation_that_reads_the_training_rows(models: Path):
    config = tiny_config(models, evaluation={"tasks": [{"path": str(models / "rows.jsonl")}]})
    finding = only(look(config, **FAST), "data.contamination")
    assert finding.level == "warn"
    assert "reads the rows that are trained on" in finding.evidence


def test_conversations_of_sft_are_searched(tmp_path: Path):
    for role in ("student", "teacher"):
        save_model(tmp_path / role, bpe_tokenizer(chat=True), context=512)
    problem = "Natalia sold clips to 48 of her friends in April and half as many in May; how many is that?"
    chat = [{"role": "user", "content": problem}, {"role": "assistant", "content": "72"}]
    rows = [{"messages": chat}, {"text": "Weng earns $12 an hour for babysitting."}]
    test = write_rows(tmp_path / "test.jsonl", [{"messages": chat[:1], "answer": "72"}])
    config = tiny_config(tmp_path, rows=rows, evaluation={"tasks": [{"path": str(test)}]})
    finding = only(look(config, "sft", **FAST), "data.contamination")
    assert finding.level == "warn"
    assert finding.numbers["seen"] == 1


SHORT = [{"prompt": f"w{i} w{i + 1} - w{i + 2}", "answer": f"w{i}"} for i in range(20)]


@pytest.mark.parametrize(("copies", "level"), [(0, "pass"), (2, "pass"), (3, "warn"), (20, "warn")])
def test_short_problems_are_compared_whole(copies: int, level: str, models: Path):
    """From more than a tenth of the problems on; signs count, blanks and capitals do not."""
    training = [*LONG, *({"prompt": row["prompt"].upper().replace(" ", "  ")} for row in SHORT[:copies])]
    other_signs = [{"prompt": row["prompt"].replace("-", "+")} for row in SHORT]
    finding = only(look(config_with(models, [*training, *other_signs], SHORT), **FAST), "data.contamination")
    assert finding.level == level
    assert (finding.numbers["whole"], finding.numbers["whole_share"]) == (copies, copies / 20)
    assert f"; {copies} of 20 shorter ones are what one row asks, word for word" in finding.evidence
    assert (repr(SHORT[0]["prompt"]) in finding.evidence) == (level == "warn")


def test_short_problems_among_the_rows_of_sft(tmp_path: Path):
    for role in ("student", "teacher"):
        save_model(tmp_path / role, bpe_tokenizer(chat=True), context=128)
    asked = [f"{i} sold to {i + 1}" for i in range(12)]
    as_prompts = [{"prompt": text, "completion": "72"} for text in asked[:6]]
    as_chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "72"}]} for text in asked[6:]
    ]
    test = write_rows(tmp_path / "test.jsonl", [{"prompt": text, "answer": "72"} for text in asked])
    rows = [*as_prompts, *as_chats]
    task = {"evaluation": {"tasks": [{"path": str(test)}]}}
    finding = only(look(tiny_config(tmp_path, rows=rows, **task), "sft", **FAST), "data.contamination")
    assert (finding.level, finding.numbers["whole"]) == ("warn", 12)
    # Drilled on purpose.
    finding = only(look(tiny_config(tmp_path, rows=rows * 2, **task), "sft", **FAST), "data.contamination")
    assert (finding.level, finding.numbers["whole"]) == ("pass", 0)


def test_texts_that_stand_again_are_met_by_chance():
    assert asked_once(["2 + 2 =", "2  + 2 =", "17 * 23 =", "A b"]) == {"17 * 23 =", "a b"}


def test_templates_are_no_contamination():
    """Thirteen words that all rows and problems share, and one problem that stands among the rows."""
    template = "please solve this and put the final answer into a box at the end"
    assert len(template.split()) == 14

    def problem(seed: int) -> str:
        return " ".join(f"n{word}" for word in random.Random(seed).choices(range(99), k=NGRAM))

    problems = [f"{template} {problem(i)}" for i in range(50)]
    rows = [f"{template} {problem(1000 + i)}" for i in range(100)]
    words = without_template([text.split() for text in problems])
    assert [" ".join(text) for text in words] == [problem(i) for i in range(50)]
    assert seen_grams(words, rows) == set()
    assert tuple(problem(3).split()) in seen_grams(words, [*rows, problems[3]])


def test_scripts_without_blanks_are_split_into_signs():
    text = "小明有四十八个苹果他给了小红一半还剩多少个"
    [gram] = seen_grams([list(text)[:NGRAM]], [f"问题：{text}？"])
    assert "".join(gram) == text[:NGRAM]


def test_numbers_are_json(models: Path):
    report = look(config_with(models, LONG[:8], LONG[8:]), **FAST)
    assert json.loads(json.dumps(report.to_json()))["counts"]["fail"] == 0

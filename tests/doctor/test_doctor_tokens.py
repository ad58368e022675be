"""Checks of tokens: a healthy pair of models, and one with each fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cases import complaints, levels, look, only, tiny_config
from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as Steps
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from user import END, START, STOP, WORDS, bpe_tokenizer, save_model, word_tokenizer

CHAT = [{"messages": [{"role": "user", "content": f"Natalia sold {i} clips."}], "answer": str(i)} for i in range(8)]
FAST = {"fast": True}


def pair(folder: Path, student: Any, teacher: Any | None = None, **teacher_options: Any) -> Path:
    save_model(folder / "student", student, context=128)
    save_model(folder / "teacher", teacher or student, seed=1, **{"context": 128, **teacher_options})
    return folder


def test_a_healthy_pair_passes_everything(tmp_path: Path):
    report = look(tiny_config(pair(tmp_path, bpe_tokenizer(chat=True)), rows=CHAT), **FAST)
    assert complaints(report) == []
    assert report.not_run == {}
    assert only(report, "tokens.map").numbers == {"ids": 300}
    assert "300 ids mean the same to the student and teacher default" in only(report, "tokens.map").evidence
    assert only(report, "tokens.widths").numbers == {
        "widths": {"student": 300, "teacher default": 300},
        "largest_id": 299,
    }
    trips = only(report, "tokens.round_trips").numbers
    assert trips == {"probes": 11, "whole": 11, "texts": 8, "lost": 0}
    assert only(report, "tokens.ends").numbers["stop_ids"] == [2]
    assert f"2 {STOP!r}" in only(report, "tokens.ends").evidence


def test_permuted_ids_fail(tmp_path: Path):
    swapped = word_tokenizer((WORDS[0], WORDS[2], WORDS[1], *WORDS[3:]))
    report = look(tiny_config(pair(tmp_path, word_tokenizer(), swapped)), **FAST)
    finding = only(report, "tokens.map")
    assert finding.level == "fail"
    assert "2 of 61 tokens differ: 'w0' is 1 for the student, 2 for the teacher" in finding.evidence
    assert "use a teacher of the student's model family" in finding.remedy
    assert report.exit_code == 2
    # What does not depend on it is looked at all the same.
    assert levels(report, "data.duplicates") == ["pass"]
    assert levels(report, "tokens.ends") == ["pass"]


def test_padding_rows_are_named_and_tokens_without_embedding_warned_about(tmp_path: Path):
    pair(tmp_path, word_tokenizer(), width=64)
    finding = only(look(tiny_config(tmp_path), **FAST), "tokens.widths")
    assert finding.level == "pass"
    assert "student 61, teacher default 64; largest id 60, 0 rows mean nothing" in finding.evidence
    narrow = pair(tmp_path / "narrow", word_tokenizer(), width=58)
    finding = only(look(tiny_config(narrow), **FAST), "tokens.widths")
    assert finding.level == "warn"
    assert finding.evidence.startswith("3 tokens have no embedding in teacher default: ids 58 to 60, 'w57' 'w58' 'w59'")
    assert "resize the embeddings" in finding.remedy


def test_the_same_map_split_in_another_way(tmp_path: Path):
    """One vocabulary; the teacher's tokenizer joins nothing."""
    student = bpe_tokenizer()
    whole = Tokenizer.from_str(student.backend_tokenizer.to_str())
    whole.pre_tokenizer = Steps([Split(Regex("."), "isolated"), ByteLevel(add_prefix_space=False)])  # type: ignore
    teacher = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token=END)
    assert teacher.get_vocab() == student.get_vocab()
    rows = [{"prompt": "sold 48 clips", "answer": "72"}]
    report = look(tiny_config(pair(tmp_path, student, teacher), rows=rows), **FAST)
    [finding] = report.of("warn")
    assert finding.check == "tokens.round_trips"
    assert "tokens for the student and" in finding.evidence
    assert "\nteacher default: " in finding.evidence
    assert "tokenizer.save_pretrained" in finding.remedy


def test_texts_that_a_vocabulary_cannot_write(tmp_path: Path):
    rows = [{"prompt": "w1 w2"}, {"prompt": "w1 hello"}]
    finding = only(look(tiny_config(pair(tmp_path, word_tokenizer()), rows=rows), **FAST), "tokens.round_trips")
    assert finding.level == "warn"
    assert finding.numbers["lost"] == 1
    assert "'w1 hello' becomes 'w1 <|endoftext|>'" in finding.evidence


def test_another_end_token_fails(tmp_path: Path):
    pair(tmp_path, bpe_tokenizer(), bpe_tokenizer(chat=True))
    report = look(tiny_config(tmp_path, rows=[{"prompt": "clips"}]), **FAST)
    finding = only(report, "tokens.ends")
    assert finding.level == "fail"
    assert f"student 0 {END!r}, teacher 2 {STOP!r}" in finding.evidence
    assert "sampling.stop_token_ids = [2]" in finding.remedy
    # Both named: each can write one of them.
    report = look(tiny_config(tmp_path, rows=[{"prompt": "clips"}], sampling={"stop_token_ids": [0, 2]}), **FAST)
    assert levels(report, "tokens.ends") == ["pass"]
    # One that the teacher never writes.
    report = look(tiny_config(tmp_path, rows=[{"prompt": "clips"}], sampling={"stop_token_ids": [0]}), **FAST)
    finding = only(report, "tokens.ends")
    assert finding.level == "warn"
    assert "teacher default never ends a text so, but with 2" in finding.evidence
    assert finding.remedy == "sampling.stop_token_ids = [0, 2]"


def test_a_stale_generation_config(tmp_path: Path):
    """Both say one token in their generation configs, and another in their tokenizers."""
    pair(tmp_path, bpe_tokenizer(chat=True))
    for role in ("student", "teacher"):
        (tmp_path / role / "generation_config.json").write_text('{"eos_token_id": 0}')
    finding = only(look(tiny_config(tmp_path, rows=CHAT), **FAST), "tokens.ends")
    assert finding.level == "warn"
    assert f"ends with 0 {END!r}, but the tokenizer of student ends texts with 2 {STOP!r}" in finding.evidence
    assert "generation_config 0" in finding.evidence
    assert finding.remedy == "sampling.stop_token_ids = [0, 2]"


def test_an_end_token_that_graders_would_read(tmp_path: Path):
    pair(tmp_path, word_tokenizer())
    finding = only(look(tiny_config(tmp_path, sampling={"stop_token_ids": [0, 5]}), **FAST), "tokens.special")
    assert finding.level == "warn"
    assert finding.numbers["plain_ends"] == [5]
    assert "5 'w4' ends completions" in finding.evidence


def padded(pad: str, end: str) -> Any:
    tokenizer = bpe_tokenizer(end=end)
    tokenizer.pad_token = pad
    return tokenizer


def test_padding_that_is_the_end_is_harmless_and_padding_that_is_no_end_is_not(tmp_path: Path):
    same = pair(tmp_path / "same", padded(END, END))
    finding = only(look(tiny_config(same, rows=[{"prompt": "clips"}]), **FAST), "tokens.padding")
    assert finding.level == "pass"
    assert "the end token of student and teacher default too, which is harmless here" in finding.evidence
    # The teacher pads with what the student ends with.
    trapped = pair(tmp_path / "trapped", padded(END, END), padded(END, STOP))
    config = tiny_config(trapped, rows=[{"prompt": "clips"}], sampling={"stop_token_ids": [0, 2]})
    finding = only(look(config, **FAST), "tokens.padding")
    assert finding.level == "warn"
    assert f"0 {END!r} ends completions and is only padding to teacher default" in finding.evidence
    assert finding.remedy == "sampling.stop_token_ids = [2]"


def test_no_remedy_is_an_empty_list(tmp_path: Path):
    """The only stop token is a role's padding: what that role ends texts with, or in words."""
    trapped = pair(tmp_path / "trapped", padded(END, END), padded(END, STOP))
    config = tiny_config(trapped, rows=[{"prompt": "clips"}], sampling={"stop_token_ids": [0]})
    assert only(look(config, **FAST), "tokens.padding").remedy == "sampling.stop_token_ids = [2]"
    endless = bpe_tokenizer()
    endless.pad_token, endless.eos_token = END, None
    pair(tmp_path / "endless", padded(END, END), endless)
    config = tiny_config(tmp_path / "endless", rows=[{"prompt": "clips"}], sampling={"stop_token_ids": [0]})
    report = look(config, **FAST)
    assert only(report, "tokens.padding").remedy.startswith("sampling.stop_token_ids = [...], tokens with which every")
    assert only(report, "tokens.ends").remedy == 'write "eos_token_id" into its generation_config.json'
    report = look(tiny_config(tmp_path / "endless", rows=[{"prompt": "clips"}]), **FAST)
    assert "sampling.stop_token_ids = [0] " in only(report, "tokens.ends").remedy


def with_begin(*, chat_template: str | None = None) -> Any:
    """A tokenizer that begins every text with START."""
    tokenizer = bpe_tokenizer(end=END)
    tokenizer.bos_token = START
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 1)])
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.mark.parametrize(
    ("row", "template", "level"),
    [
        ({"prompt": "clips"}, None, "pass"),
        ({"prompt": f"{START}clips"}, None, "warn"),
        ({"messages": [{"role": "user", "content": "clips"}]}, START + "{{ messages[0]['content'] }}", "pass"),
        ({"messages": [{"role": "user", "content": "clips"}]}, START * 2 + "{{ messages[0]['content'] }}", "warn"),
    ],
    ids=["text", "text with a begin token", "template", "template with two"],
)
def test_doubled_begin_tokens(row: dict[str, Any], template: str | None, level: str, tmp_path: Path):
    pair(tmp_path, with_begin(chat_template=template))
    report = look(tiny_config(tmp_path, rows=[row]), **FAST)
    assert levels(report, "tokens.begins") == [level, level]
    if level == "warn":
        finding = report.of("warn")[0]
        assert f"1 of 1 rows begin with 1 {START!r} twice for student" in finding.evidence
        assert f"{START!r} {START!r}" in finding.evidence
        assert "take the begin token out" in finding.remedy


def test_missing_begin_tokens(tmp_path: Path):
    rows = [{"messages": [{"role": "user", "content": "clips"}]}]
    pair(tmp_path, with_begin(chat_template="{{ messages[0]['content'] }}"))
    report = look(tiny_config(tmp_path, rows=rows), **FAST)
    assert levels(report, "tokens.begins") == ["warn", "warn"]
    assert f"1 of 1 rows lack 1 {START!r}" in report.of("warn")[0].evidence


def test_rows_of_sft_are_looked_at_too(tmp_path: Path):
    pair(tmp_path, with_begin())
    rows = [{"prompt": f"{START}clips", "completion": "72"}, {"prompt": "May", "completion": "48"}]
    report = look(tiny_config(tmp_path, rows=rows), "sft", **FAST)
    assert [f.check for f in report.of("warn")] == ["tokens.begins"]
    assert only(report, "tokens.begins").numbers == {"role": "student", "rows": 2, "doubled": 1, "missing": 0}

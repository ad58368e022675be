"""Templates: side by side, thinking, and a teacher's own answers under both, on the ledger world."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases import ARROW, FOREIGN, NATIVE, ledger_config, ledger_world, levels, look, only, tiny_config, with_template

from understudy import RunConfig
from understudy.doctor.findings import Report
from understudy.doctor.templates import MAX_NLL_DIFFERENCE
from user import CHATML, bpe_tokenizer, save_model, write_rows

CHAT = [{"messages": [{"role": "user", "content": "clips?"}]}]
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
CLOSED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")


@pytest.mark.parametrize(
    ("student", "teacher", "level", "mode"),
    [
        (CHATML, CHATML, "pass", "left to the model"),
        (THINKING, THINKING, "pass", "begun"),
        (CLOSED, THINKING, "warn", "closed"),
        (CHATML, CLOSED, "warn", "left to the model"),
    ],
)
def test_thinking_modes(student: str, teacher: str, level: str, mode: str, tmp_path: Path):
    save_model(tmp_path / "student", bpe_tokenizer(chat=True, chat_template=student), context=128)
    save_model(tmp_path / "teacher", bpe_tokenizer(chat=True, chat_template=teacher), context=128)
    finding = only(look(tiny_config(tmp_path, rows=CHAT), fast=True), "templates.views")
    assert finding.level == level
    assert f"thinking is {mode}" in finding.evidence
    assert "student: '<|im_start|>'" in finding.evidence
    assert "teacher default: '<|im_start|>'" in finding.evidence
    if level == "warn":
        assert "enable_thinking = false" in finding.remedy


def with_teacher_prompts(world: Path, folder: Path, change: object) -> RunConfig:
    rows = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    assert callable(change)
    path = write_rows(folder / "rows.jsonl", [row | {"teacher_prompt": change(row["prompt"])} for row in rows])
    return ledger_config(world, prompts={"path": str(path)}, output_dir=str(folder / "run"))


def test_a_teacher_that_reads_what_the_student_reads_has_nothing_to_compare(healthy: Report):
    finding = only(healthy, "templates.own_answers")
    assert finding.level == "pass"
    assert "nothing to compare" in finding.evidence


def test_a_teacher_prompt_without_its_last_sign(world: Path, tmp_path: Path):
    report = look(with_teacher_prompts(world, tmp_path, lambda prompt: prompt.removesuffix(ARROW)))
    finding = only(report, "templates.own_answers")
    assert finding.level == "warn"
    assert finding.numbers["difference"] > MAX_NLL_DIFFERENCE
    assert "'=>'" in finding.evidence
    assert 'drop "teacher_prompt"' in finding.remedy
    # It shows where the answer begins, too.
    assert levels(report, "fit.positions") == ["warn"]
    assert only(report, "fit.positions").numbers["first"] > 2


def test_a_teacher_prompt_with_something_before_it(world: Path, tmp_path: Path):
    """It does next to no harm, and is found."""
    report = look(with_teacher_prompts(world, tmp_path, lambda prompt: f"=> | => {prompt}"))
    finding = only(report, "templates.own_answers")
    assert finding.level == "warn"
    assert 0.001 < finding.numbers["difference"] < MAX_NLL_DIFFERENCE


@pytest.mark.parametrize(("template", "level"), [(NATIVE, "pass"), (FOREIGN, "warn")], ids=["its own", "another"])
def test_another_chat_template_on_the_teacher(template: str, level: str, tmp_path: Path):
    world = ledger_world(tmp_path / "world")
    with_template(world / "models" / "start", NATIVE)
    with_template(world / "models" / "teacher", template)
    rows = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    chats = [{"messages": [{"role": "user", "content": row["prompt"].removesuffix(ARROW)}]} for row in rows]
    config = ledger_config(world, prompts={"path": str(write_rows(tmp_path / "chats.jsonl", chats))})
    assert levels(look(config), "templates.own_answers") == [level]

"""What a report says of its findings: exit code, JSON, page."""

from __future__ import annotations

import json

from rich.console import Console

from understudy.doctor.findings import Finding, Report, shown
from understudy.doctor.page import page

PASSED = Finding("tokens.map", "pass", "162 ids mean the same", "ids are what is marked", numbers={"ids": 162})
WARNED = Finding("fit.truncation", "warn", "3 of 4 are cut\n'a' 'b'", "no end", "sampling.max_completion_tokens = 8")
FAILED = Finding("tokens.ends", "fail", "teacher 2, student 1", "no end", "sampling.stop_token_ids = [2]")


def text_of(report: Report) -> str:
    console = Console(width=80, record=True, force_terminal=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(page(report))
    return console.export_text()


def test_only_failures_change_the_exit_code():
    assert Report("distill", [PASSED]).exit_code == 0
    assert Report("distill", [PASSED, WARNED]).exit_code == 0
    assert Report("distill", [PASSED, WARNED, FAILED]).exit_code == 2


def test_json_holds_every_finding_and_what_was_not_run():
    report = Report("distill", [PASSED, WARNED, FAILED], {"fit.support": "see tokens.ends"})
    content = json.loads(json.dumps(report.to_json()))
    assert content["schema_version"] == 1
    assert (content["method"], content["exit_code"]) == ("distill", 2)
    assert content["counts"] == {"pass": 1, "warn": 1, "fail": 1}
    assert content["findings"][0] == {
        "check": "tokens.map",
        "level": "pass",
        "evidence": "162 ids mean the same",
        "why": "ids are what is marked",
        "remedy": "",
        "numbers": {"ids": 162},
    }
    assert content["not_run"] == {"fit.support": "see tokens.ends"}


def test_a_page_says_level_evidence_reason_and_remedy_in_words():
    text = text_of(Report("distill", [PASSED, WARNED, FAILED], {"fit.support": "see tokens.ends"}))
    lines = [line.strip() for line in text.splitlines()]
    assert lines[:3] == ["pass  tokens.map", "seen  162 ids mean the same", "why   ids are what is marked"]
    assert lines[3] == "warn  fit.truncation"
    assert "'a' 'b'" in lines
    assert "remedy  sampling.max_completion_tokens = 8" in lines
    assert "fail  tokens.ends" in lines
    assert "fit.support: see tokens.ends" in lines
    assert lines[-1] == "1 passed, 1 warned, 1 failed: mend what failed first"
    assert text_of(Report("rl", [PASSED])).strip().endswith("1 passed, 0 warned, 0 failed: ready to train")


def test_markup_in_evidence_is_text():
    finding = Finding("tokens.map", "warn", "'[bold red]' is 3 for the student", "why", "[teacher] model = ...")
    text = text_of(Report("distill", [finding]))
    assert "'[bold red]' is 3 for the student" in text
    assert "[teacher] model = ..." in text


def test_tokens_are_shown_in_quotes_and_long_ones_in_part():
    assert shown(["a", "\n", " b"]) == r"'a' '\n' ' b'"
    assert shown([str(i) for i in range(10)], most=4) == "'0' '1' ... 6 more ... '8' '9'"


def test_a_log_line_is_one_line():
    assert WARNED.line == "fit.truncation: 3 of 4 are cut; sampling.max_completion_tokens = 8"

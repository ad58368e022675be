"""The doctor as a whole: the faults of configuration, healthy demos and recipes, the command, the page of checks."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import (
    LEDGER,
    Marker,
    complaints,
    copied,
    exchanged_ids,
    ledger_config,
    levels,
    local_teacher,
    look,
    only,
    tiny_config,
    with_end,
)

from hostile import TEXTS
from test_recipes import SINGLE, stand_in
from understudy import ConfigError, RunConfig, RunError, api
from understudy.config_pipeline import PipelineConfig
from understudy.doctor import catalogue
from understudy.doctor.catalogue import CHECKS, look_before
from understudy.doctor.findings import Check, Found, Report
from understudy.preflight import check_run
from understudy.supervised import supervised_examples
from understudy.worlds import assistant_demo, demos, ledger_demo
from understudy.worlds.ledger import PAD
from user import bpe_tokenizer, run_cli, save_model, tree, word_tokenizer, write_rows, write_toml

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "doctor.md"


# The faults that a configuration can have


def test_a_healthy_run_passes_everything(healthy: Report):
    assert complaints(healthy) == []
    assert healthy.not_run == {}
    named = {finding.check for finding in healthy.findings}
    silent = {"teachers.own"}  # student and teacher are two models
    assert named == {check.name for check in CHECKS if "distill" in check.methods} - silent


def test_another_end_token(world: Path, tmp_path: Path):
    teacher = copied(world / "models" / "teacher", tmp_path / "teacher")
    with_end(teacher, PAD)
    report = look(ledger_config(world, teacher={"model": str(teacher)}))
    assert [finding.check for finding in report.of("fail")] == ["tokens.ends"]
    assert "161 '<eos>', teacher 162 '<pad>'" in only(report, "tokens.ends").evidence
    assert report.not_run["configuration.whole"] == "see tokens.ends"
    assert levels(report, "data.contamination") == ["pass"]


def test_another_vocabulary(world: Path, tmp_path: Path):
    teacher = copied(world / "models" / "teacher", tmp_path / "teacher")
    exchanged_ids(teacher, "op1", "op2")
    report = look(ledger_config(world, teacher={"model": str(teacher)}))
    assert [finding.check for finding in report.of("fail")] == ["tokens.map"]
    assert "2 of 163 tokens differ" in only(report, "tokens.map").evidence


def test_several_faults_are_all_found(world: Path, tmp_path: Path):
    teacher = copied(world / "models" / "teacher", tmp_path / "teacher")
    with_end(teacher, PAD)
    exchanged_ids(teacher, "op1", "op2")
    rows = [{"prompt": "4 | a"}, {"prompt": ""}]
    prompts = {"path": str(write_rows(tmp_path / "rows.jsonl", rows))}
    tasks = {"tasks": [{"name": "x", "path": str(tmp_path / "nowhere.jsonl")}]}
    config = ledger_config(world, teacher={"model": str(teacher)}, prompts=prompts, evaluation=tasks)
    report = look(config)
    failed = [finding.check for finding in report.of("fail")]
    assert failed == ["tokens.map", "tokens.round_trips", "tokens.ends", "configuration.tasks"]
    assert "rows.jsonl:2" in only(report, "tokens.round_trips").evidence
    assert report.not_run["data.rows"] == "see tokens.round_trips"
    assert report.not_run["fit.support"] == "see tokens.map"


def test_a_missing_model_is_said_once(world: Path):
    report = look(ledger_config(world, teacher={"model": str(world / "nowhere")}), fast=True)
    assert len(report.of("fail")) == 1
    assert "no such folder" in report.of("fail")[0].evidence


def test_the_fast_form_begins_with_what_commands_refuse(world: Path):
    report = look(ledger_config(world, prompts=None), fast=True)
    assert [finding.check for finding in report.of("fail")] == ["configuration.sections"]
    assert (report.exit_code, "no [prompts]" in report.of("fail")[0].evidence) == (2, True)


@pytest.mark.parametrize("method", ["rl", "sft"])
def test_other_methods_are_healthy_too(method: Any, world: Path, tmp_path: Path):
    """Of the ledger world: its prompts with its grader, and its solutions to them."""
    rows = [json.loads(line) for line in (world / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    solved = [{"prompt": row["prompt"], "completion": LEDGER.solution(row["prompt"])} for row in rows]
    sections: Any = {
        "rl": {"reward": {"grader": "ledger"}},
        "sft": {"prompts": {"path": str(write_rows(tmp_path / "solved.jsonl", solved))}},
    }
    report = look(ledger_config(world, **sections[method]), method, fast=True)
    assert complaints(report) == []
    assert report.not_run == {}
    silent = {"rl": {"tokens.map"}, "sft": {"tokens.map", "data.lengths"}}[method]  # no teacher; no prompts
    assert {finding.check for finding in report.findings} == {check.name for check in CHECKS if check.fast} - silent


def test_what_rows_say_never_reaches_a_terminal_as_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: Any
):
    """Hostile texts as prompts, twice, so that repeats are shown too."""
    for seed, role in enumerate(("student", "teacher")):
        save_model(tmp_path / role, bpe_tokenizer(), seed=seed, context=512)
    for text in ("\x1b]0;PWNED\x07", *(t for t in TEXTS if not t.isprintable() and "\ud800" not in t)):
        config = tiny_config(tmp_path, rows=[{"prompt": text, "answer": text}] * 2)
        run = write_toml(tmp_path / "run.toml", json.loads(config.model_dump_json(exclude_none=True)))
        run_cli(monkeypatch, "doctor", run, "--fast")
        printed = capsys.readouterr().out
        assert "stand there again" in printed
        assert all(character.isprintable() or character == "\n" for character in printed), text
        [line] = [line for line in said_before(config, "distill", caplog) if "data.duplicates" in line]
        assert line.isprintable()


def test_findings_hold_no_control_characters(world: Path):
    """Whoever writes one: in evidence, in remedies, in errors. What a check saw before an error stands."""

    def hostile(case: Any) -> Any:
        yield Found("warn", "\x1b[2Jseen\nmore\x07", {"raw": "\x1b"}, "do\u202e this")
        raise ConfigError("\x1b", got="\x9b", expected="\r", remedy="\x1b]0;PWNED\x07")

    def run(case: Any) -> Any:
        raise RunError("\x1b]0;PWNED\x07")

    checks = [Check(f"own.{name}", check, "", "", "") for name, check in (("seen", hostile), ("run", run))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "CHECKS", checks)
        report = look(ledger_config(world))
    assert [(f.evidence, f.remedy) for f in report.findings] == [
        ("⟨1B⟩[2Jseen\nmore⟨07⟩", "do⟨202E⟩ this"),
        ("⟨1B⟩: got ⟨9B⟩; expected ⟨0D⟩", "⟨1B⟩]0;PWNED⟨07⟩"),
        ("⟨1B⟩]0;PWNED⟨07⟩", ""),
    ]


# At the start of training


def test_warnings_are_one_line_each_and_failures_end_the_run(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    lines = (world / "prompts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "twice.jsonl").write_text("".join(lines[:8] * 2))
    config = ledger_config(
        world,
        prompts={"path": str(tmp_path / "twice.jsonl")},
        output_dir=str(tmp_path / "run"),
        evaluation={"tasks": []},
    )
    small = config.model_copy(
        update={
            "optim": config.optim.model_copy(update={"num_steps": 1}),
            "sampling": config.sampling.model_copy(update={"groups_per_batch": 2, "group_size": 1}),
        }
    )
    with caplog.at_level(logging.WARNING, logger="understudy"):
        api.distill(small, quiet=True)
    assert [message for message in caplog.messages if message.startswith("doctor, ")] == [
        "doctor, data.duplicates: 8 of 16 rows stand there again (50.0%); drop the repeats; optim.num_steps and "
        "sampling.group_size say how often a row is used"
    ]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore
    with pytest.raises(ConfigError, match=r"resources\.disk") as refused:
        api.distill(small.model_copy(update={"output_dir": str(tmp_path / "full")}), quiet=True)
    assert refused.value.exit_code == 2
    assert "0 B free" in refused.value.got
    assert "one checkpoint does not fit" in refused.value.expected
    assert not (tmp_path / "full").exists()


def test_rows_that_sft_leaves_out_are_no_reason_to_refuse_the_others(tmp_path: Path):
    save_model(tmp_path / "student", word_tokenizer())
    long = [{"prompt": "w1 " * 40, "completion": "w2"}] * 70
    rows = write_rows(tmp_path / "rows.jsonl", [*long, *({"prompt": f"w{i}", "completion": "w2"} for i in range(40))])
    sections: Any = {"prompts": {"over_long": "skip"}, "supervised": {"max_tokens": 20}}
    config = RunConfig.model_validate(tree(tmp_path / "student", None, rows, tmp_path / "run", **sections))
    assert api.sft(config, quiet=True).metrics["step"] == 2


def said_before(config: RunConfig, method: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the fast form says."""
    from understudy.assembly import Given

    caplog.clear()
    checked = check_run(config, method)
    examples = []
    if method == "sft" and config.prompts:
        examples = supervised_examples(checked.rows[:64], config.prompts, checked.student, checked.stop_ids)
    with caplog.at_level(logging.WARNING, logger="understudy"):
        look_before(config, method, checked, Given(), examples)
    return [message for message in caplog.messages if message.startswith("doctor")]


@pytest.mark.parametrize("arm", [arm for arm in ledger_demo.ARMS if arm.method != "sft"], ids=lambda arm: arm.name)
def test_the_ledger_demo_is_healthy(arm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """With all of its prompts and problems, in a second or two."""
    ledger_demo.prepare(tmp_path)
    config = ledger_demo.arm_config(tmp_path, arm)
    assert said_before(config, arm.method, caplog) == []
    start = time.perf_counter()
    said_before(config, arm.method, caplog)
    print(f"{time.perf_counter() - start:.2f} s")  # check_run among them


def test_the_assistant_demo_is_healthy(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Every phase, over the models that it begins with: their tokens are the same throughout. Rows of the full demo."""
    assistant_demo.prepare(tmp_path)
    untrained = str(tmp_path / "models" / "untrained")
    for name, (method, config) in assistant_demo.configs(tmp_path).items():
        if name in ("samples", "sft-control"):
            continue  # the one trains nothing, the other's rows are not written yet
        student = config.student.model_copy(update={"model": untrained})
        teacher = config.teacher and config.teacher.model_copy(update={"model": untrained})
        config = config.model_copy(update={"student": student, "teacher": teacher})
        assert said_before(config, method, caplog) == [], name


@pytest.fixture(scope="module")
def stand_in_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("stand-in"), bpe_tokenizer(chat=True), context=32768)


def numbered(path: Path) -> None:
    """Stand-ins of rows are all the same: give each another problem."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for i, row in enumerate(rows):
        for key in ("prompt", "question", "problem", "text"):
            if key in row:
                row[key] = f"{path.stem} {i}: {row[key]}"
        for message in row.get("messages", [])[:1]:
            message["content"] = f"{path.stem} {i}: {message['content']}"
    write_rows(path, rows)


@pytest.mark.parametrize("recipe", [name for name, method in SINGLE.items() if method != "generate"])
def test_recipes_are_healthy(recipe: str, stand_in_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Their settings, over a small model and a few rows in place of the hub's."""
    tree = tomllib.loads((ROOT / "recipes" / recipe).read_text(encoding="utf-8"))
    config = RunConfig.model_validate(stand_in(tree, stand_in_model, tmp_path) | {"output_dir": str(tmp_path / "run")})
    for path in (tmp_path / "rows").iterdir():
        numbered(path)
    assert said_before(config, SINGLE[recipe], caplog) == []


@pytest.mark.slow
def test_whole_demos_say_nothing(tmp_path: Path):
    for name in ("ledger", "assistant"):
        assert demos.run(name, tmp_path / name) == 0  # type: ignore[arg-type]
        for log in (tmp_path / name / "logs").iterdir():
            text = log.read_text(encoding="utf-8")
            assert "doctor, " not in text, log
            assert "guard " not in text, log
    # And the whole doctor finds nothing to complain of in what they train on-policy.
    for config in (tmp_path / "ledger" / "distill-full.toml", tmp_path / "ledger" / "distill-sampled.toml"):
        assert complaints(look(RunConfig.from_toml(config))) == []


# The command


def test_the_command(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    content = json.loads(ledger_config(world).model_dump_json(exclude_none=True))
    run = write_toml(tmp_path / "run.toml", content)
    assert run_cli(monkeypatch, "doctor", run, "--fast") == 0
    printed = capsys.readouterr().out
    assert "pass  tokens.map" in printed
    assert printed.strip().endswith("0 warned, 0 failed: ready to train")
    assert run_cli(monkeypatch, "doctor", run, "--fast", "--json", "--sampling.stop_token_ids", "[9999]") == 2
    report = json.loads(capsys.readouterr().out)
    assert report["counts"]["fail"] == 1
    [failed] = [finding for finding in report["findings"] if finding["level"] == "fail"]
    assert failed["check"] == "tokens.ends"
    assert "at least one id from 0 to 162" in failed["evidence"]
    assert "convert_tokens_to_ids" in failed["remedy"]
    # Warnings alone are no error.
    assert run_cli(monkeypatch, "doctor", run, "--fast", "--json", "--prompts.path", world / "test.jsonl") == 0
    assert json.loads(capsys.readouterr().out)["counts"]["warn"] == 1


@pytest.mark.parametrize(
    ("change", "method"),
    [
        (lambda c: c, "distill"),
        (lambda c: {**c, "teacher": None, "reward": {"grader": "exact_match"}}, "rl"),
        (lambda c: {**c, "teacher": None}, "sft"),
    ],
)
def test_the_method_is_told_from_the_file(
    change: Callable[[Any], Any], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    for role in ("student", "teacher"):
        save_model(tmp_path / role, word_tokenizer(), context=64)
    rows = [{"prompt": f"w{i}", "answer": "w1", "completion": "w2"} for i in range(8)]
    content = json.loads(tiny_config(tmp_path, rows=rows).model_dump_json(exclude_none=True))
    content = {name: value for name, value in change(content).items() if value is not None}
    run = write_toml(tmp_path / "run.toml", content)
    assert run_cli(monkeypatch, "doctor", run, "--fast", "--json") == 0
    assert json.loads(capsys.readouterr().out)["method"] == method


def test_errors_of_the_file_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert run_cli(monkeypatch, "doctor", tmp_path / "nowhere.toml") == 2


def test_a_brought_teacher_is_looked_at_in_place_of_the_configured_one(world: Path):
    teacher = Marker(local_teacher(world / "models" / "teacher"))
    report = look(ledger_config(world), teachers={"default": teacher})
    assert complaints(report) == []
    assert "at temperature 1 " in only(report, "teachers.temperature").evidence


# The page


def table() -> str:
    """docs/doctor.md's table of all checks."""
    rows = ["| check | start | methods | what it does | why | remedy |", "|---|---|---|---|---|---|"]
    for check in CHECKS:
        methods = "all" if len(check.methods) == 3 else ", ".join(sorted(check.methods))
        cells = (
            f"`{check.name}`",
            "start" if check.fast else "",
            methods,
            check.threshold,
            check.why,
            check.remedy,
        )
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def with_table(text: str) -> str:
    begin, end = "<!-- checks:begin -->\n", "<!-- checks:end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table()}\n{end}{rest.split(end)[1]}"


def test_every_check_is_described():
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_table(text), "run `python tests/doctor/test_doctor_catalogue.py`"


def test_names_of_checks():
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+\.[a-z_]+", name) for name in names)
    assert not any(check.fast and check.weights for check in CHECKS)


def test_plans_of_several_phases_are_not_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert PipelineConfig.from_toml(ROOT / "recipes" / "assistant-pipeline" / "plan.toml").phases
    assert run_cli(monkeypatch, "doctor", ROOT / "recipes" / "assistant-pipeline" / "plan.toml") == 2


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

"""`understudy score` from the command line: what it takes, what it writes, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from big_pages import unpacked
from user import bpe_tokenizer, run_cli, save_model, tree, word_tokenizer, write_rows, write_toml

Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", bpe_tokenizer())
    save_model(folder / "teacher", bpe_tokenizer(), seed=1)
    save_model(folder / "chat", bpe_tokenizer(chat=True))
    save_model(folder / "words", word_tokenizer())
    return folder


def content(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the page says of its rollouts, and their packed tokens."""
    html = path.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="[\w-]+">(.*?)</script>', html, re.DOTALL)
    rollouts, data = (json.loads(block) for block in found)
    return unpacked(rollouts), data


def test_prompts_are_answered_and_marked(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    page = tmp_path / "page.html"
    arguments = ["--student", models / "student", "--teacher", models / "teacher", "--samples", 2]
    prompts = ["--prompt", "How many?", "--prompt", "- Weng?"]
    assert run_cli(monkeypatch, "score", *arguments, *prompts, "--max-completion-tokens", 6, "--output", page) == 0
    assert capsys.readouterr().out.strip() == str(page)
    rollouts, data = content(page)
    assert [prompt["prompt_text"] for prompt in rollouts["prompts"]] == ["How many?", "- Weng?"]
    assert [prompt["prompt_ids"] for prompt in rollouts["prompts"]] == [
        bpe_tokenizer()(prompt)["input_ids"] for prompt in ("How many?", "- Weng?")
    ]
    assert [row["label"] for row in rollouts["rollouts"]] == ["sample 0", "sample 1"] * 2
    assert all(row["kl"] is not None for row in rollouts["rollouts"])
    assert all(1 <= length <= 6 for length in data["lengths"])
    assert {"student", "teacher", "entropy", "teacher_entropy", "best_code", "own_code"} <= set(data["columns"])


def test_a_chat_model_reads_its_template(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from understudy.rows import read_rows
    from understudy.score.command import Models, Sampling, _config

    asked = Models(str(models / "chat"), str(models / "chat"))
    for plain, column in ((False, "messages"), (True, "prompt")):
        config = _config(tmp_path, ["Why?"], asked, Sampling(plain=plain))
        assert config.prompts is not None
        [row] = read_rows(config.prompts)
        assert set(row.values) == {column}


def test_texts_are_marked(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"prompt": "How many?", "completion": " 72", "finish_reason": "stop"},
        {"prompt": "And?", "completion": " 7."},
        {"prompt": "Nothing?", "completion": "", "finish_reason": "stop"},
        {"prompt": "Nothing?", "completion": ""},
    ]
    file, page = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "page.html"
    arguments = ["--student", models / "student", "--teacher", models / "teacher", "--output", page]
    assert run_cli(monkeypatch, "score", "--text", file, *arguments) == 0
    rollouts, data = content(page)
    assert [row["finish"] for row in rollouts["rollouts"]] == ["stop", None, "stop", None]
    assert data["lengths"][2:] == [1, 0]  # the end token alone, and nothing
    assert {"student", "teacher"} <= set(data["columns"])


def test_a_dump_needs_no_model_for_its_numbers_and_takes_a_tokenizer_for_its_texts(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = {
        "prompt_ids": [5], "completion_ids": [40, 41], "completion_mask": [True, True],
        "completion_logprobs": [-0.5, -1.0], "reference_logprobs": [-1.0, -1.5], "advantage": 1.0,
    }  # fmt: skip
    file, page = write_rows(tmp_path / "dump.jsonl", [sample]), tmp_path / "page.html"
    assert run_cli(monkeypatch, "score", "--text", file, "--output", page) == 0
    rollouts, data = content(page)
    assert (data["texts"], rollouts["rollouts"][0]["kl"]) == (["40", "41"], 0.5)
    words = ["--tokenizer", models / "student", "--format", "prime-rl"]
    assert run_cli(monkeypatch, "score", "--text", file, "--output", page, *words) == 0
    tokenizer = bpe_tokenizer()
    assert content(page)[1]["texts"] == [tokenizer.decode([40]), tokenizer.decode([41])]


def test_an_empty_completion_needs_no_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a page exports one; other rollouts of its file are shown beside it."""
    empty: dict[str, Any] = {"completion_ids": [], "sampler_logprobs": [], "teacher_logprobs": []}
    marked = {"completion_ids": [7, 8], "sampler_logprobs": [-1.0, -1.0], "teacher_logprobs": [-2.0, -1.0]}
    rows = [empty, marked, {"completion_tokens": []}]
    file, page = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "page.html"
    assert run_cli(monkeypatch, "score", "--text", file, "--output", page) == 0
    rollouts, data = content(page)
    assert data["lengths"] == [0, 2, 0]
    assert [row["kl"] for row in rollouts["rollouts"]] == [None, 0.5, None]


def test_a_runs_rollouts_and_two_steps_side_by_side(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"How many {i}?"} for i in range(4)])
    run, page = tmp_path / "run", tmp_path / "page.html"
    toml = write_toml(tmp_path / "run.toml", tree(models / "student", models / "teacher", rows, run))
    assert run_cli(monkeypatch, "distill", toml) == 0
    assert run_cli(monkeypatch, "score", run, "--step", 0, "--output", page) == 0
    stored = [json.loads(line) for line in (run / "rollouts" / "step_000000.jsonl").read_text().splitlines()]
    rollouts, data = content(page)
    assert data["lengths"] == [len(record["completion_ids"]) for record in stored]
    assert "trainer" in data["columns"]
    assert run_cli(monkeypatch, "score", "--compare", f"{run}@0", f"{run}@2", "--output", page) == 0
    rollouts, data = content(page)
    assert [row["label"] for row in rollouts["rollouts"]] == ["run, step 0", "run, step 2"] * 2
    assert [row["unit"] for row in rollouts["rollouts"]] == [0, 0, 1, 1]
    assert len(rollouts["prompts"]) == len({record["prompt_text"] for record in stored})
    before = page.read_bytes()
    assert run_cli(monkeypatch, "score", "--compare", run, run, "--output", page) == 0  # its first step and its last
    assert page.read_bytes() == before
    assert run_cli(monkeypatch, "score", run, "--step", "all", "--output", page) == 0
    rollouts, data = content(page)
    last = [json.loads(line) for line in (run / "rollouts" / "step_000002.jsonl").read_text().splitlines()]
    assert data["lengths"] == [len(record["completion_ids"]) for record in stored + last]
    labels = [row["label"] for row in rollouts["rollouts"]]
    assert labels == ["step 0, sample 0", "step 0, sample 1"] * (len(stored) // 2) + [
        "step 2, sample 0",
        "step 2, sample 1",
    ] * (len(last) // 2)
    forks = re.findall(r'<a href="#r(\d+)t\d+">', page.read_text(encoding="utf-8"))
    assert {int(number) < len(stored) for number in forks} == {True, False}  # ranked across both steps
    capsys.readouterr()
    assert run_cli(monkeypatch, "score", run, "--teacher", models / "teacher", "--output", page) == 2
    assert "a run has kept its own marks" in capsys.readouterr().err
    assert run_cli(monkeypatch, "score", f"{run}@1", "--output", page) == 2
    assert "one of the steps 0, 2" in capsys.readouterr().err


def test_two_files_side_by_side_are_marked_by_one_teacher(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    prompts = ("How many?", "And?", "Alone?")
    before = [{"prompt": prompt, "completion": " 72"} for prompt in prompts]
    after = [{"prompt": prompt, "completion": " 71"} for prompt in prompts[:2]]
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", before), ("b", after))]
    arguments = ["--student", models / "student", "--teacher", models / "teacher", "--output", tmp_path / "page.html"]
    assert run_cli(monkeypatch, "score", "--compare", *files, *arguments) == 0
    rollouts, data = content(tmp_path / "page.html")
    assert [row["label"] for row in rollouts["rollouts"]] == ["a.jsonl", "b.jsonl"] * 2
    assert {"student", "teacher", "best_code"} <= set(data["columns"])
    assert "1 rollouts have no partner" in (tmp_path / "page.html").read_text(encoding="utf-8")
    twice = [{"prompt_index": 0, "prompt": "How many?", "completion": text} for text in (" 7", " 8", " 9")]
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", twice), ("b", twice[:2]))]
    assert run_cli(monkeypatch, "score", "--compare", *files, *arguments) == 0
    assert [row["unit"] for row in content(tmp_path / "page.html")[0]["rollouts"]] == [0, 0, 1, 1]
    assert "1 rollouts have no partner" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to score"),
        (("runs/x", "--prompt", "Q"), "a run and --prompt"),
        (("--prompt", "Q"), "--prompt without --student"),
        (("--prompt", "Q", "--student", "{models}/student"), "--prompt without --teacher"),
        (("--prompt", "Q", "--student", "{models}/student", "--teacher", "{models}/words"), "tokens differ"),
        (("--prompt", "Q", "--samples", "0"), "at least 1"),
        (("nowhere",), "no such file or folder"),
        (("--prompt", "Q", "--tokenizer", "{models}/student"), "drop --tokenizer"),
        (("--prompt", "Q", "--step", "4"), "drop --step"),
        (("{models}", "--format", "trl"), "drop --format"),
        (("--text", "{models}/rows.jsonl", "--step", "all"), "drop --step"),
        (("--compare", "{models}/rows.jsonl", "{models}/rows.jsonl"), "add --student S --teacher T"),
        (("--text", "{models}/rows.jsonl"), "add --student S --teacher T"),
        (("--text", "{models}/rows.jsonl", "--output", "{models}"), "a folder"),
        (("--text", "{models}/rows.jsonl", "--format", "slime"), "response_length"),
    ],
)
def test_what_cannot_work_is_refused(
    arguments: tuple[str, ...],
    message: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Printed,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(models / "rows.jsonl", [{"prompt": "Q", "completion": "A"}])
    assert run_cli(monkeypatch, "score", *(own.format(models=models) for own in arguments)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "credit.html").exists()

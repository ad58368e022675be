"""The command line itself on broken input: exit codes, and words instead of tracebacks."""

from __future__ import annotations

import copy
import json
import shutil
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from fuzzing import CASE_SECONDS, broken_bytes, count, forms, fuzz, note
from hypothesis import strategies as st
from test_fuzz_checkpoints import USED, damage, damaged
from test_fuzz_configs import changed_trees, valid_trees

from understudy.time_limit import TimeIsUp, time_limit
from user import run_cli

RESULTS = {0: "accepted", 1: "stopped", 2: "refused"}
COMMANDS = st.sampled_from(["distill", "rl", "sft", "generate", "eval", "doctor"])
OPTIONS = {"doctor": ("--fast", "--json")}  # the others run in miniature
Captured = pytest.CaptureFixture[str]


def leaves(data: bytes, *folders: Path) -> bool:
    """Whether a run of this would write somewhere else than in the test's folders."""
    try:
        tree = tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    texts = [tree.get("output_dir"), *(role.get("cache") for role in tree.values() if isinstance(role, dict))]
    places = [Path(text).resolve() for text in texts if isinstance(text, str) and "\0" not in text]
    return not all(any(place.is_relative_to(folder) for folder in folders) for place in places)


def used(surface: str, command: str, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """What can run, does. Exit code 2 comes with the four parts of a message, or the doctor's findings, and leaves
    nothing new behind."""
    folder = path.parent
    before, begun = {entry.name for entry in folder.iterdir()}, time.monotonic()
    try:
        with time_limit(CASE_SECONDS):
            code = run_cli(monkeypatch, command, path, *OPTIONS.get(command, ("--smoke",)))
    except TimeIsUp:
        raise AssertionError(f"no end after {CASE_SECONDS} seconds") from None
    found, said = capsys.readouterr()
    assert "Traceback" not in found + said, found + said
    if code == 2 and found:
        assert all(one["remedy"] for one in json.loads(found)["findings"] if one["level"] == "fail"), found
    elif code == 2:
        for word in ("error ", "got: ", "expected: ", "remedy: "):
            assert word in said, said
    if code == 2:
        assert {entry.name for entry in folder.iterdir()} <= before
    note(surface, command)
    count(surface, RESULTS[code], time.monotonic() - begun)


@pytest.mark.filterwarnings("ignore")
@forms(20, 400)
def test_configurations(
    cases: int, long: bool, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    trees = valid_trees(material)[:2]
    for number, content in enumerate(trees):
        content["output_dir"] = f"run{number}"
    data = st.one_of(
        changed_trees(trees),
        changed_trees(trees),
        broken_bytes(st.sampled_from([tomli_w.dumps(content).encode() for content in trees])),
    )

    def body(case: tuple[dict[str, Any] | bytes, str]) -> None:
        content, command = case
        if isinstance(content, dict):
            content = tomli_w.dumps(copy.deepcopy(content)).encode("utf-8", "surrogatepass")
        if leaves(content, tmp_path, material):
            return
        path = tmp_path / "run.toml"
        path.write_bytes(content)
        used("commands: configurations", command, path, monkeypatch, capsys)

    fuzz(st.tuples(data, COMMANDS), body, cases, long=long)


@pytest.mark.filterwarnings("ignore")
@forms(10, 300)
def test_files(
    cases: int, long: bool, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """A good configuration of broken rows, and of a broken student."""
    monkeypatch.chdir(tmp_path)
    source, mark, rows = material / "student", tmp_path / "mark", tmp_path / "rows.jsonl"
    contents = {path.name: path.read_bytes() for path in source.iterdir() if path.suffix in USED}
    [content, *_] = valid_trees(material)
    content["output_dir"] = "run"
    content["student"]["model"], content["prompts"]["path"] = str(tmp_path / "student"), str(rows)
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(content), encoding="utf-8")
    good = (material / "rows.jsonl").read_bytes()
    command = st.sampled_from(["distill", "sft", "doctor"])

    def body(case: tuple[bytes | dict[str, bytes | None], str]) -> None:
        change, command = case
        rows.write_bytes(change if isinstance(change, bytes) else good)
        damaged(source, tmp_path / "student", change if isinstance(change, dict) else {}, mark)
        shutil.rmtree(tmp_path / "run-smoke", ignore_errors=True)
        used("commands: files", command, path, monkeypatch, capsys)
        assert not mark.exists()

    fuzz(st.tuples(st.one_of(broken_bytes(st.just(good)), damage(contents)), command), body, cases, long=long)

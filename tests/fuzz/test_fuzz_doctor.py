"""The doctor on broken input: whatever it is handed, a report of findings, and what fails comes with a remedy."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from fuzzing import broken_bytes, check_words, forms, fuzz, note, outcome
from hypothesis import strategies as st
from rich.console import Console
from test_fuzz_checkpoints import USED, damage, damaged
from test_fuzz_configs import changed_trees, valid_trees
from test_fuzz_rows import ROWS, lines_of
from test_fuzz_templates import TEMPLATE

from understudy import RunConfig, tokenization
from understudy.doctor.catalogue import diagnose
from understudy.doctor.page import page
from understudy.preflight import Method

METHODS: st.SearchStrategy[Method] = st.sampled_from(["distill", "rl", "sft"])


def examined(surface: str, path: Path, method: Method) -> None:
    """The report of a file, as people and as machines read it. A file that cannot be read is refused before."""

    def work() -> None:
        report = diagnose(RunConfig.from_toml(path), method, fast=True)
        said = json.dumps(report.to_json(), allow_nan=False)
        Console(file=io.StringIO(), width=100).print(page(report))
        assert "Traceback" not in said
        for finding in report.findings:
            check_words(finding.evidence)
            check_words(finding.why)
            assert len(finding.evidence) < 6000
            if finding.level == "fail":
                check_words(finding.remedy)
        note(surface, f"exit code {report.exit_code}")

    outcome(surface, work)


@pytest.mark.filterwarnings("ignore")
@forms(25, 1_500)
def test_configurations(
    cases: int, long: bool, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.toml"

    def body(case: tuple[dict[str, Any], Method]) -> None:
        content, method = case
        path.write_text(tomli_w.dumps(content), encoding="utf-8", errors="surrogatepass")
        examined("doctor: configurations", path, method)

    fuzz(st.tuples(changed_trees(valid_trees(material)), METHODS), body, cases, long=long)


@pytest.mark.filterwarnings("ignore")
@forms(25, 1_500)
def test_files(cases: int, long: bool, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A good configuration of broken rows, a broken student, or one with a chat template of any kind."""
    monkeypatch.setattr(tokenization, "TEMPLATE_SECONDS", 0.3)
    source, mark, rows = material / "student", tmp_path / "mark", tmp_path / "rows.jsonl"
    good = (material / "rows.jsonl").read_bytes()
    plain, *_ = valid_trees(material)
    plain["student"]["model"], plain["prompts"]["path"] = str(tmp_path / "student"), str(rows)
    plain["output_dir"] = str(tmp_path / "run")
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(plain), encoding="utf-8")
    talk = lines_of([{"messages": [{"role": "user", "content": "How many?"}], "completion": "3."}], ascii_only=True)
    contents = {path.name: path.read_bytes() for path in source.iterdir() if path.suffix in USED}
    kinds = st.one_of(
        st.tuples(
            st.just("rows"), st.one_of(broken_bytes(st.just(good)), ROWS.map(lambda r: lines_of(r, ascii_only=True)))
        ),
        st.tuples(st.just("models"), damage(contents)),
        st.tuples(st.just("templates"), TEMPLATE),
    )

    def body(case: tuple[tuple[str, Any], Method]) -> None:
        (kind, change), method = case
        rows.write_bytes(change if kind == "rows" else talk if kind == "templates" else good)
        template = {"chat_template.jinja": change.encode("utf-8", "replace")} if kind == "templates" else {}
        damaged(source, tmp_path / "student", change if kind == "models" else template, mark)
        examined(f"doctor: {kind}", path, method)
        assert not mark.exists()

    fuzz(st.tuples(kinds, METHODS), body, cases, long=long)

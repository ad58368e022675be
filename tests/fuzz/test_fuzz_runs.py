"""Folders of runs as disks and crashes leave them: `--resume` goes on from what is whole, or says what is not."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import forms, fuzz, note, outcome
from hypothesis import strategies as st
from test_fuzz_checkpoints import ODD, Trap, change_node, damage, damaged

from understudy import RunConfig, distill, evaluate
from understudy.checkpoints import STATE_FILE, SUMS_FILE, newest_state, write_sums
from understudy.cli_report import report
from understudy.compare import compare
from understudy.config_pipeline import PipelineConfig
from understudy.pipeline import pipeline
from understudy.report import write_run_report
from user import bpe_tokenizer, save_model, tree, write_rows, write_toml

# Of a run's folder, beside its checkpoints.
RECORDS = (
    *("config.toml", "metrics.jsonl", "costs.json", "rollouts/step_000000.jsonl"),
    *("environment.jsonl", "doctor.jsonl"),
)
STATE_KEYS = ("step", "trainer", "costs", "method", "optimizer", "state", "param_groups", "roles", "flops", "exp_avg")
TENSORS = st.sampled_from([torch.zeros(3), torch.full((2, 2), float("nan")), torch.zeros(0), torch.tensor(1)])


def config_of(folder: Path, steps: int) -> RunConfig:
    content = tree(
        folder / "student",
        folder / "teacher",
        folder / "rows.jsonl",
        folder / "run",
        optim={"num_steps": steps},
        checkpoints={"every": 1, "keep": 2},
        rollouts={"per_step": 1},
    )
    return RunConfig.model_validate(content)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """whole: a finished run of two steps with their checkpoints; and what it was made of."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "student", bpe_tokenizer(chat=True))
    save_model(folder / "teacher", bpe_tokenizer(chat=True), seed=1)
    write_rows(
        folder / "rows.jsonl",
        [{"prompt": f"How many are {i}?", "answer": str(i), "completion": f"{i}."} for i in range(4)],
    )
    distill(config_of(folder, 2), quiet=True)
    return (folder / "run").rename(folder / "whole").parent


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@st.composite
def changed_states(draw: st.DrawFn, name: str, data: bytes) -> dict[str, bytes]:
    """A state that torch reads, with other things in it."""
    state = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(draw(st.integers(1, 2))):
        change_node(draw, state, st.one_of(ODD, TENSORS), STATE_KEYS)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return {name: buffer.getvalue()}


def broken(run: Path, folder: Path, changes: dict[str, bytes | None], sums: str) -> None:
    """``folder`` becomes a copy of ``run`` with these changes. ``sums``: those of the files as they were ("kept"), of
    the changed ones ("made anew"), or none in the newest checkpoint ("gone")."""
    mark = run.with_name("mark")
    damaged(run, folder, changes, mark)
    checkpoints = sorted((folder / "checkpoints").iterdir())
    if sums == "gone":
        (checkpoints[-1] / SUMS_FILE).unlink(missing_ok=True)
    elif sums == "made anew":
        for checkpoint in checkpoints:
            write_sums(checkpoint)


SUMS = st.sampled_from(["kept", "gone", "made anew"])


@pytest.mark.filterwarnings("ignore")
@forms(60, 3_000)
def test_checkpoints(cases: int, long: bool, world: Path, tmp_path: Path) -> None:
    """With their sums whatever has changed is found, and that they are gone; with sums made anew, what cannot be read.
    Nothing in them is run."""
    run, folder = world / "whole", tmp_path / "run"
    good = contents_of(run / "checkpoints" / "step_000002")
    trap = io.BytesIO()
    torch.save({"step": 2, "trainer": Trap(run.with_name("mark"))}, trap)
    states = st.sampled_from([{STATE_FILE: trap.getvalue()}])

    def body(case: tuple[dict[str, bytes | None], str]) -> None:
        changes, sums = case
        broken(run, folder, {f"checkpoints/step_000002/{name}": data for name, data in changes.items()}, sums)
        changed = {name for name, data in changes.items() if data != good[name] and name != SUMS_FILE}
        found: list[Any] = []
        outcome("folders: checkpoints", lambda: found.extend(newest_state(folder / "checkpoints")))
        assert not run.with_name("mark").exists()
        if sums == "made anew" and STATE_FILE not in changes:
            assert found[0] == 2, changes.keys()
        if sums == "gone":
            assert (found[0], [*found[3].values()]) == (1, [f"without {SUMS_FILE}"])
        if sums == "kept" and changed and SUMS_FILE not in changes:
            assert found[0] == 1, changes.keys()
            [what] = found[3].values()
            assert any(name in what for name in changed), what
        note("folders: checkpoints", f"sums {sums}")

    fuzz(st.tuples(st.one_of(*[damage(good)] * 9, states), SUMS), body, cases, long=long)


@pytest.mark.filterwarnings("ignore")
@forms(16, 1_000)
def test_resumed(cases: int, long: bool, world: Path) -> None:
    """One more step of a run in whose folder something is broken."""
    run, folder = world / "whole", world / "run"
    contents = contents_of(run)
    newest = "checkpoints/step_000002"
    records = {name: contents[name] for name in RECORDS}
    own = {name: data for name, data in contents.items() if name.startswith(newest)}
    state = f"{newest}/{STATE_FILE}"
    config = config_of(world, 3)

    def body(case: tuple[dict[str, bytes | None], str]) -> None:
        changes, sums = case
        broken(run, folder, changes, sums)
        outcome("folders: runs, resumed", lambda: distill(config, resume=True, quiet=True))
        assert not run.with_name("mark").exists()
        note("folders: runs, resumed", f"sums {sums}")

    fuzz(
        st.tuples(st.one_of(damage(records), damage(own), changed_states(state, contents[state])), SUMS),
        body,
        cases,
        long=long,
    )


@pytest.mark.filterwarnings("ignore")
@forms(20, 1_000)
def test_reports(cases: int, long: bool, world: Path, tmp_path: Path) -> None:
    """A page is written of what can be read, whatever the rest is."""
    run, folder = world / "whole", tmp_path / "run"
    records = {name: data for name, data in contents_of(run).items() if not name.startswith("checkpoints")}

    def body(changes: dict[str, bytes | None]) -> None:
        broken(run, folder, changes, "kept")
        assert outcome("reports: runs", lambda: write_run_report(folder)) == "accepted"
        assert (folder / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")

    fuzz(damage(records), body, cases, long=long)


@pytest.fixture(scope="module")
def others(world: Path) -> Path:
    """whole-pipeline, and whole-eval: a student's evaluation."""
    rows, model = world / "rows.jsonl", world / "student"
    task = {"name": "sums", "path": str(rows), "grader": "last_number", "samples": 2}
    plain = tree(model, None, rows, world / "whole-eval", evaluation={"tasks": [task]}, optim={"num_steps": 1})
    evaluate(RunConfig.model_validate(plain), quiet=True)
    second = {"name": "second", "method": "distill", "teacher": {"model": "@start"}}
    plain |= {"output_dir": str(world / "whole-pipeline"), "phases": [{"name": "first", "method": "sft"}, second]}
    pipeline(PipelineConfig.from_toml(write_toml(world / "plan.toml", plain)))
    return world


@pytest.mark.filterwarnings("ignore")
@forms(20, 1_000)
def test_evaluations(cases: int, long: bool, others: Path, tmp_path: Path) -> None:
    run, folder = others / "whole-eval", tmp_path / "eval"
    records = {name: data for name, data in contents_of(run).items() if name.startswith("evaluation/")}

    def body(changes: dict[str, bytes | None]) -> None:
        damaged(run, folder, changes, run.with_name("mark"))
        outcome("reports: evaluations", lambda: compare(run, folder).to_text())

    fuzz(damage(records), body, cases, long=long)


@pytest.mark.filterwarnings("ignore")
@forms(20, 1_000)
def test_pipelines(cases: int, long: bool, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of a pipeline: its state has to be whole, the costs of phases are left out where they are not."""
    run, folder = others / "whole-pipeline", tmp_path / "pipeline"
    names = [name for name in contents_of(run) if name == "pipeline.json" or name.endswith("costs.json")]
    records = {name: contents_of(run)[name] for name in names}

    def body(changes: dict[str, bytes | None]) -> None:
        damaged(run, folder, changes, run.with_name("mark"))
        outcome("reports: pipelines", lambda: report(folder))

    fuzz(damage(records), body, cases, long=long)

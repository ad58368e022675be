"""Pipelines: phases that go on from each other, gates, and what a crash, a Ctrl-C and a second try make of them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from understudy import ConfigError, RunConfig, RunError
from understudy.cli_arguments import smoke_config
from understudy.config_pipeline import PipelineConfig, planned_runs
from understudy.pipeline import PipelineResult, check_runs, pipeline
from understudy.pipeline_state import PhaseRecord, load_state
from understudy.report.pipeline_report import summed_costs, write_pipeline_report
from user import (
    assert_same_run,
    interrupt_in,
    metrics,
    owner_of,
    run_cli,
    save_model,
    word_tokenizer,
    write_rows,
    write_toml,
)

STEPS = 3
PHASES = ("01-documents", "02-behaviour", "03-again")
GREEDY = "eval/eval/greedy"
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    save_model(folder / "model", word_tokenizer())
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": f"w{i}"} for i in range(6)]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "documents.jsonl", [{"text": f"w{i} w{i + 2} w{i + 3}"} for i in range(6)])
    return folder


def plan_tree(material: Path, **top: Any) -> Tree:
    """Three phases of three steps: documents in, behaviour back from the start, documents again."""
    rows, documents = ({"path": str(material / name)} for name in ("rows.jsonl", "documents.jsonl"))
    return {
        "output_dir": "run",
        "num_threads": 1,
        "student": {"model": str(material / "model"), "device": "cpu"},
        "sampling": {"group_size": 2, "groups_per_batch": 2, "max_completion_tokens": 4},
        "supervised": {"batch_size": 2},
        "optim": {"learning_rate": 1e-2, "num_steps": STEPS},
        "checkpoints": {"every": 2},
        "rollouts": {"per_step": 2, "topk": 2},
        "evaluation": {"tasks": [{**rows, "limit": 2, "temperatures": [0.0]}]},
        "phases": [
            {"name": "documents", "method": "sft", "prompts": documents},
            {"name": "behaviour", "method": "distill", "prompts": rows, "teacher": {"model": "@start"}},
            {"name": "again", "method": "sft", "prompts": documents},
        ],
    } | top


def of(tree: Mapping[str, Any]) -> PipelineConfig:
    return PipelineConfig.from_tree(tree, "plan.toml")


def run(tree: Mapping[str, Any], *, resume: bool = False) -> PipelineResult:
    return pipeline(of(tree), resume=resume, quiet=True)


def records() -> tuple[PhaseRecord, ...]:
    return load_state(Path("run")).phases


@pytest.fixture(scope="module")
def whole(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline that nothing happened to."""
    with contextlib.chdir(tmp_path_factory.mktemp("whole")):
        run(plan_tree(material))
        return Path("run").resolve()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pipelines run in folders of their own under the same name, so that their configurations are the same too."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_same_pipeline(expected: Path) -> None:
    names = [sorted(path.name for path in each.iterdir()) for each in (Path("run"), expected)]
    assert names[0] == names[1] == [".lock", *PHASES, "pipeline.json", "report.html"]
    for name in PHASES:
        assert_same_run(Path("run") / name, expected / name, steps=STEPS)
    states = [load_state(each) for each in (Path("run"), expected)]
    assert states[0].plan == states[1].plan
    done = [[record.model_copy(update={"seconds": 0.0}) for record in state.phases] for state in states]
    assert done[0] == done[1]


# Phases


def test_each_phase_goes_on_from_the_one_before(material: Path, whole: Path) -> None:
    configs = [RunConfig.from_toml(whole / name / "config.toml") for name in PHASES]
    checkpoints = [f"run/{name}/checkpoints/step_000003" for name in PHASES]
    assert [config.student.model for config in configs] == [str(material / "model"), *checkpoints[:2]]
    assert configs[1].teacher is not None
    assert configs[1].teacher.model == str(material / "model")
    state = load_state(whole)
    assert [record.output for record in state.phases] == checkpoints
    assert [(record.steps, record.outcome) for record in state.phases] == [(STEPS, "kept")] * 3
    for record, after in zip(state.phases, state.phases[1:], strict=False):
        assert record.final == after.start  # the same weights, evaluated with the same random numbers
    rows = metrics(whole / PHASES[1])
    assert state.phases[1].final[GREEDY] == rows[-1][GREEDY]
    assert state.phases[1].flops == rows[-1]["cost/flops"] > 0


def test_the_report_shows_phases_and_summed_costs(whole: Path) -> None:
    page = (whole / "report.html").read_text(encoding="utf-8")
    for name in PHASES:
        assert f'href="{name}/report.html"' in page
        assert (whole / name / "report.html").exists()
    costs = [json.loads((whole / name / "costs.json").read_text())["roles"] for name in PHASES]
    total = summed_costs(costs)
    assert total["student_training"]["tokens"] == sum(each["student_training"]["tokens"] for each in costs)
    assert total["teacher_scoring"] == costs[1]["teacher_scoring"]
    assert "eval, greedy" in page
    # Three phases; evaluated once before them, and once after each.
    [chart] = [json.loads(unescape(text)) for text in re.findall(r'data-chart="([^"]*)"', page)]
    assert chart["x"] == [
        f"before phase 1, {PHASES[0][3:]}",
        *(f"after phase {number}, {name[3:]}" for number, name in enumerate(PHASES, 1)),
    ]


def test_the_reports_headline_and_curve_follow_the_newest_student(whole: Path) -> None:
    shutil.copytree(whole, "run")
    state = json.loads(Path("run/pipeline.json").read_text())
    first, behaviour, last = state["phases"]
    for phase, start, final in ((first, 0.1, 0.2), (behaviour, 0.2, 0.3), (last, 0.3, 0.4)):
        phase |= {"start": {GREEDY: start}, "final": {GREEDY: final}}
    checked = {"name": "check", "method": "eval", "output": "", "outcome": "kept", "flops": 0.0, "gates": []}
    for number, (model, value) in enumerate([(last["output"], 0.45), (first["output"], 0.9)], 4):
        measured = {"start": {GREEDY: value}, "final": {GREEDY: value}}
        state["phases"].append(last | checked | measured | {"began_with": model, "folder": f"{number:02d}-check"})
    # One of another model that comes first is no beginning either.
    state["phases"].insert(0, state["phases"][-1] | {"began_with": "other", "folder": "00-check"})
    Path("run/pipeline.json").write_text(json.dumps(state))
    page = write_pipeline_report(Path("run")).read_text(encoding="utf-8")
    assert "10.0 % → 45.0 %" in page
    assert page.count("90.0 %") == 2  # both in the table, and nowhere else
    # A metric that only other models have has no curve and no headline.
    for phase in state["phases"][1:5]:
        phase |= {"start": {}, "final": {}}
    Path("run/pipeline.json").write_text(json.dumps(state))
    page = write_pipeline_report(Path("run")).read_text(encoding="utf-8")
    assert ("data-chart=" in page, page.count("90.0 %")) == (False, 2)


def test_samples_of_one_phase_are_rows_of_the_next_and_evaluations_stand_between(material: Path) -> None:
    tree = plan_tree(material)
    rows = tree["phases"][1]["prompts"]
    tree["phases"] = [
        {"name": "answers", "method": "generate", "prompts": rows, "teacher": {"model": "@start"}},
        {"name": "copy", "method": "sft", "prompts": {"path": "@samples:answers"}},
        {"name": "check", "method": "eval"},
    ]
    run(tree)
    written, copied, checked = records()
    assert (written.output, written.steps, written.final) == ("run/01-answers/samples.jsonl", 0, {})
    assert written.flops > 0
    assert RunConfig.from_toml("run/03-check/config.toml").student.model == copied.output
    assert checked.final == checked.start == copied.final
    assert "run/01-answers/samples.jsonl" in Path("run/02-copy/config.toml").read_text()
    # A crash between evaluation and state leaves a folder that is made anew.
    state = json.loads(Path("run/pipeline.json").read_text())
    state["phases"].pop()
    Path("run/pipeline.json").write_text(json.dumps(state))
    run(tree, resume=True)
    assert records()[2] == checked


def test_cycles(material: Path) -> None:
    for cycle in (1, 2):
        shutil.copy(material / "documents.jsonl", f"documents-{cycle}.jsonl")
    tree = plan_tree(material, cycles=2, optim={"learning_rate": 1e-2, "num_steps": 1})
    tree["phases"] = [
        {"name": "documents", "method": "sft", "prompts": {"path": "documents-{cycle}.jsonl"}},
        {"name": "behaviour", "method": "distill", "prompts": {"path": str(material / "rows.jsonl")}}
        | {"teacher": {"model": "@start"}},
    ]
    result = run(tree)
    assert [record.folder for record in records()][2:] == ["03-documents-cycle2", "04-behaviour-cycle2"]
    config = RunConfig.from_toml("run/03-documents-cycle2/config.toml")
    assert config.prompts is not None
    assert (config.prompts.path, config.seed) == ("documents-2.jsonl", 1)
    assert config.student.model == "run/02-behaviour/checkpoints/step_000001"
    assert result.student == Path("run/04-behaviour-cycle2/checkpoints/step_000001")
    shutil.copy("documents-1.jsonl", "documents-3.jsonl")
    again = run(tree | {"cycles": 3}, resume=True)  # one round more
    assert len(again.phases) == 6


# Interruptions


def failing(original: Callable[..., Any], at_call: int, fail: Callable[[], None]) -> Callable[..., Any]:
    calls = 0

    def function(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call:
            fail()
        return original(*arguments, **keywords)

    return function


def fall_over() -> None:
    raise RuntimeError("fell over")


@pytest.mark.parametrize(
    ("place", "at_call", "finished"),
    [
        ("understudy.updates.optimizer_step", 2, 0),
        ("understudy.updates.optimizer_step", STEPS + 3, 1),
        ("understudy.pipeline._record", 2, 1),  # the second phase is done, and nothing says so yet
        ("understudy.pipeline.save_state", 4, 2),
    ],
)
def test_a_crash_is_made_good(
    place: str, at_call: int, finished: int, material: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, name = place.rpartition(".")
    with monkeypatch.context() as patched:
        patched.setattr(place, failing(getattr(owner_of(module), name), at_call, fall_over))
        with pytest.raises(RuntimeError, match="fell over"):
            run(plan_tree(material))
    assert len(records()) == finished
    run(plan_tree(material), resume=True)
    assert_same_pipeline(whole)


def killed_in_the_second_phase(tree: Tree) -> None:
    torch.set_num_threads(1)
    owner: Any = owner_of("understudy.updates")
    owner.optimizer_step = failing(owner.optimizer_step, STEPS + 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(tree)


def test_a_killed_pipeline_goes_on(material: Path, whole: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(
        target=killed_in_the_second_phase, args=(plan_tree(material, output_dir=str(Path("run").resolve())),)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    tree = plan_tree(material, output_dir=str(Path("run").resolve()))
    assert len(records()) == 1
    run(tree, resume=True)
    for name in PHASES:
        weights = f"{name}/checkpoints/step_000003/model.safetensors"
        assert (Path("run") / weights).read_bytes() == (whole / weights).read_bytes()


def test_ctrl_c(
    material: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_toml(Path("plan.toml"), plan_tree(material))
    with monkeypatch.context() as patched:
        interrupt_in(patched, "understudy.updates.optimizer_step", at_call=STEPS + 2)
        assert run_cli(patched, "pipeline", path) == 130
    assert "stopped with 1 phases finished" in capsys.readouterr().out
    assert len(records()) == 1
    with monkeypatch.context() as patched:
        # In the last step the phase ends as if nothing had come; the pipeline stops all the same.
        interrupt_in(patched, "understudy.updates.optimizer_step", at_call=1)
        assert run_cli(patched, "pipeline", path, "--resume") == 130
    assert len(records()) == 2
    assert run_cli(monkeypatch, "pipeline", path, "--resume") == 0
    assert_same_pipeline(whole)


def test_a_finished_pipeline_is_not_run_again(material: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(whole, "run")
    monkeypatch.setattr("understudy.api.assemble", lambda *a, **k: pytest.fail("models were loaded"))
    result = run(plan_tree(material), resume=True)
    assert result.student == Path("run/03-again/checkpoints/step_000003")
    assert_same_pipeline(whole)


# Gates


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes evaluations give these values in turn: before the first phase, after each, and before the next."""

    def give(*values: float) -> None:
        left: Iterator[float] = iter(values)
        monkeypatch.setattr("understudy.api.evaluate_tasks", lambda *a: {GREEDY: next(left)})

    return give


def gated(material: Path, **gate: Any) -> Tree:
    return plan_tree(material, gates=[{"metric": GREEDY, "max_drop": 0.1} | gate], checkpoints={"every": 50})


def test_a_gate_stops_the_pipeline_until_it_is_changed(
    material: Path, measured: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(0.8, 0.7, 0.7, 0.5, 0.5, 0.5)
    path = write_toml(Path("plan.toml"), gated(material))
    for arguments in ((), ("--resume",)):
        assert run_cli(monkeypatch, "pipeline", path, *arguments) == 1
        text = capsys.readouterr().err
        assert "after phase behaviour" in text
        assert "is 0.5, from 0.7 (previous), and may drop by 0.1" in text
    assert [record.outcome for record in records()] == ["kept", "stopped"]
    assert [record.gates[0].passed for record in records()] == [True, False]
    assert "stopped the pipeline" in Path("run/report.html").read_text(encoding="utf-8")
    result = run(gated(material, max_drop=0.25), resume=True)
    assert [record.outcome for record in result.phases] == ["kept"] * 3


def test_a_rolled_back_phase_changes_nothing(material: Path, measured: Callable[..., None]) -> None:
    gate = {"metric": GREEDY, "max_drop": 0.1, "action": "roll_back", "after": ["again"]}
    tree = plan_tree(material, gates=[gate | {"against": against} for against in ("start", "best", "previous")])
    tree["phases"].append({"name": "last", "method": "distill", "prompts": tree["phases"][1]["prompts"]})
    tree["phases"][3]["teacher"] = {"model": "@phase:again"}
    measured(0.6, 0.9, 0.9, 0.7, 0.7, 0.1, 0.7, 0.8)
    result = run(tree)
    assert [record.outcome for record in result.phases] == ["kept", "kept", "rolled_back", "kept"]
    found = [(outcome.value, outcome.reference, outcome.passed) for outcome in result.phases[2].gates]
    assert found == [(0.1, 0.6, False), (0.1, 0.9, False), (0.1, 0.7, False)]
    config = RunConfig.from_toml("run/04-last/config.toml")
    assert config.teacher is not None
    kept = "run/02-behaviour/checkpoints/step_000003"
    assert (config.student.model, config.teacher.model, result.phases[3].began_with) == (kept, kept, kept)
    assert Path("run/03-again/checkpoints/step_000003").is_dir()  # left aside, not deleted
    assert "rolled back" in Path("run/report.html").read_text(encoding="utf-8")


def test_after_a_phase_with_a_student_of_its_own_the_newest_kept_one_goes_on(
    material: Path, measured: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    gate = {"metric": GREEDY, "max_drop": 0.1, "action": "roll_back", "after": ["again"]}
    tree = plan_tree(material, gates=[gate])
    tree["phases"][2]["student"] = {"model": "@start"}
    measured(0.6, 0.9, 0.9, 0.7, 0.6, 0.1)
    result = run(tree)
    kept = "run/02-behaviour/checkpoints/step_000003"
    assert (result.student, result.phases[2].began_with) == (Path(kept), str(material / "model"))
    assert f"again: rolled back; the pipeline goes on from {kept}" in caplog.messages


def test_a_drop_of_exactly_as_much_as_allowed_passes(material: Path, measured: Callable[..., None]) -> None:
    measured(0.8, 0.7, 0.7, 0.6, 0.6, 0.5)  # 0.8 - 0.1 is a little more than 0.7
    assert [record.outcome for record in run(gated(material)).phases] == ["kept"] * 3


def test_a_gate_without_its_metric_fails_loudly(material: Path, measured: Callable[..., None]) -> None:
    measured(0.8, 0.7)
    with pytest.raises(RunError, match=r"no such metric after phase documents; the phase has eval/eval/greedy"):
        run(gated(material, metric=f"{GREEDY}_style"))


# Refusals


def without(tree: Tree, number: int, section: str) -> Tree:
    del tree["phases"][number][section]
    return tree


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda tree: without(tree, 1, "teacher"), ["phase behaviour: configuration of distill", "no [teacher]"]),
        (lambda tree: without(tree, 2, "prompts"), ["phase again: configuration of sft", "no [prompts]"]),
        (lambda tree: tree | {"student": {"model": "nowhere/at/all"}}, ["phase documents", "no such folder"]),
        (
            lambda tree: tree | {"gates": [{"metric": "eval/eval/t1", "max_drop": 0}]},
            ["gate eval/eval/t1", "phase documents", GREEDY],
        ),
        (
            lambda tree: tree | {"gates": [{"metric": "eval/x/greedy", "max_drop": 0}], "evaluation": {}},
            ["gate eval/x/greedy", "[[evaluation.tasks]]"],
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_phase(
    change: Callable[[Tree], Tree],
    fragments: list[str],
    material: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_toml(Path("plan.toml"), change(plan_tree(material)))
    assert run_cli(monkeypatch, "pipeline", path) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert all(fragment in text for fragment in fragments), text
    assert not Path("run").exists()


def test_rows_of_later_phases_are_read_first(material: Path) -> None:
    """Also of those whose student is not there yet, and of those that begin from samples."""
    write_rows(Path("bad.jsonl"), [{"words": "w1"}])
    tree = plan_tree(material)
    tree["phases"][2]["prompts"] = {"path": "bad.jsonl"}
    with pytest.raises(ConfigError, match=r"phase again: bad\.jsonl:1"):
        run(tree)
    # Four words and 509 more do not fit; only the prompts that samples will answer can say so.
    long = write_rows(Path("long.jsonl"), [{"prompt": "w1 w2 w3 w4"}])
    tree["phases"][1:] = [
        {"name": "answers", "method": "generate", "prompts": {"path": str(long)}, "teacher": {"model": "@previous"}},
        {"name": "copy", "method": "distill", "prompts": {"path": "@samples:answers"}, "teacher": {"model": "@start"}}
        | {"sampling": {"max_completion_tokens": 509}, "evaluation": {"tasks": []}},
    ]
    with pytest.raises(ConfigError, match=r"phase copy: long\.jsonl:1\n.*4 prompt tokens \+ 509 completion tokens"):
        run(tree)
    assert not Path("run").exists()


def sampled(tree: Tree, prompts: Tree, *phases: Tree) -> None:
    """Check a plan of a generate phase and what comes after it."""
    answers = {"name": "answers", "method": "generate", "prompts": prompts, "teacher": {"model": "@start"}}
    check_runs(planned_runs(of(tree | {"phases": [answers, *phases]})))


def test_prompts_stand_in_for_samples_as_they_are_read(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("made_rows.py").write_text("def rows(word, count):\n    yield from [{'question': word}] * count + [{}]\n")
    monkeypatch.syspath_prepend(".")
    source = {"path": "made_rows:rows", "options": {"word": "w1", "count": 3}, "prompt_template": "w2 {prompt}"}
    source |= {"columns": {"prompt": "question"}, "limit": 3}  # the fourth row is none
    copy = {"name": "copy", "method": "sft", "prompts": {"path": "@samples:answers", "limit": 6}}
    back = {"name": "back", "method": "distill", "teacher": {"model": "@start"}} | {"prompts": copy["prompts"]}
    tree = plan_tree(material, evaluation={"tasks": []})
    sampled(tree, source, copy, back)
    with pytest.raises(ConfigError, match=r"phase back: .*\n.*2 prompt tokens \+ 511"):
        sampled(tree, source, back | {"sampling": {"max_completion_tokens": 511}})
    # Prompts that are too long for `generate` never become samples.
    long = write_rows(Path("long.jsonl"), [{"prompt": "w1"}, {"prompt": "w1 " * 600}])
    sampled(tree, {"path": str(long), "over_long": "skip"}, back)


def test_each_source_of_sft_is_checked_beside_samples(material: Path) -> None:
    tree, samples = plan_tree(material), {"path": "@samples:answers"}
    rows, documents = ({"path": str(material / name)} for name in ("rows.jsonl", "documents.jsonl"))
    long = {"path": str(write_rows(Path("long.jsonl"), [{"text": "w1 " * 600}]))}

    def copy(prompts: Tree, mix: Tree) -> Tree:
        return {"name": "copy", "method": "sft", "prompts": prompts, "supervised": {"mix": mix | {"share": 0.5}}}

    sampled(tree, rows, copy(samples, documents))
    sampled(tree, rows, copy(documents, samples))
    with pytest.raises(ConfigError, match=r"phase copy: rows nowhere\.jsonl"):
        sampled(tree, rows, copy(samples, {"path": "nowhere.jsonl"}))
    with pytest.raises(ConfigError, match=r"(?s)phase copy: long\.jsonl:1\n.*at most 512"):
        sampled(tree, rows, copy(long, samples))
    # The prompts of samples are no examples where a phase names them itself.
    first = {"name": "first", "method": "sft", "prompts": samples}
    with pytest.raises(ConfigError, match=r"phase copy: .*rows\.jsonl:1"):
        sampled(tree, rows, first, {"name": "copy", "method": "sft", "prompts": rows, "student": {"model": "@start"}})


def test_what_shows_only_when_weights_are_read(material: Path) -> None:
    """In the first phase nothing was started; later the phases before it are kept."""
    for name in ("broken", "teacher"):
        shutil.copytree(material / "model", name)
        Path(name, "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="student model broken"):
        run(plan_tree(material, student={"model": "broken"}))
    assert not Path("run").exists()
    tree = plan_tree(material)
    tree["phases"][1]["teacher"] = {"model": "./teacher"}
    with pytest.raises(RunError, match=r"(?s)phase behaviour: teacher model \./teacher.*phases before it are kept"):
        run(tree)
    assert len(records()) == 1
    shutil.copytree(material / "model", "teacher", dirs_exist_ok=True)
    assert len(run(tree, resume=True).phases) == 3


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda tree: tree | {"seed": 1}, "seed of phase documents"),
        (lambda tree: tree | {"optim": {"learning_rate": 1e-3}}, "optim.learning_rate of phase documents"),
        (lambda tree: tree | {"optim": {"learning_rate": 1e-2, "num_steps": 4}}, "optim.num_steps of phase documents"),
        (lambda tree: tree | {"student": tree["student"] | {"model": "other"}}, "the first student"),
        (lambda tree: tree | {"phases": tree["phases"][:2]}, "phases"),
    ],
)
def test_another_plan_is_refused_on_resume(
    change: Callable[[Tree], Tree], what: str, material: Path, whole: Path
) -> None:
    shutil.copytree(whole, "run")
    with pytest.raises(ConfigError) as error:
        run(change(plan_tree(material)), resume=True)
    assert f"--resume in run: {what}" in str(error.value)
    assert_same_pipeline(whole)


def test_what_runs_may_change_a_plan_may_change(material: Path, whole: Path) -> None:
    shutil.copytree(whole, "run")
    state = json.loads(Path("run/pipeline.json").read_text())
    state["phases"].pop()
    Path("run/pipeline.json").write_text(json.dumps(state))
    tree = plan_tree(material, checkpoints={"every": 1})
    tree["phases"][2]["optim"] = {"num_steps": 4}  # not finished, as far as the state says
    assert run(tree, resume=True).student == Path("run/03-again/checkpoints/step_000004")
    assert [row["step"] for row in metrics(Path("run/03-again"))] == [0, 1, 2, 3, 4]


def test_folders_that_are_taken(material: Path, whole: Path) -> None:
    tree = plan_tree(material)
    shutil.copytree(whole, "run")
    with pytest.raises(ConfigError, match="continue it with --resume"):
        run(tree)
    with Path("run/.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            run(tree, resume=True)
    Path("run/pipeline.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"pipeline\.json.*\n.*Field required"):
        run(tree, resume=True)
    Path("run/pipeline.json").unlink()
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"no pipeline\.json"):
            run(tree, resume=resume)
    Path("file").touch()
    with pytest.raises(ConfigError, match="a file"):
        run(tree | {"output_dir": "file"})


# The command


def test_smoke_replaces_its_own_folder_and_no_other(material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = plan_tree(material, optim={"num_steps": 50}, rollouts={"per_step": 0})
    tree["phases"] = tree["phases"][:1]
    path = write_toml(Path("plan.toml"), tree)
    assert run_cli(monkeypatch, "pipeline", path, "--smoke") == 0
    assert load_state(Path("run-smoke")).phases[0].steps == 2
    Path("run-smoke/mark").touch()
    assert run_cli(monkeypatch, "pipeline", path, "--smoke", "--phases.documents.optim.num_steps", "1") == 0
    assert not Path("run-smoke/mark").exists()
    assert load_state(Path("run-smoke")).phases[0].steps == 1
    Path("run-smoke").rename("kept")
    pipeline(of(tree | {"output_dir": "run-smoke", "optim": {"num_steps": 3}}), quiet=True)
    assert run_cli(monkeypatch, "pipeline", path, "--smoke") == 2  # a real pipeline of that name
    assert smoke_config(of(tree).phases[0].config).optim.num_steps == 2


def test_progress_and_the_page_made_anew(
    material: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    assert run_cli(monkeypatch, "pipeline", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "understudy pipeline plan.toml --resume" in text
    assert "understudy pipeline plan.toml --phases.behaviour.optim.num_steps 30" in text
    shutil.copytree(whole, "run")
    Path("run/report.html").unlink()
    assert run_cli(monkeypatch, "report", "run") == 0
    assert Path("run/report.html").read_bytes() == (whole / "report.html").read_bytes()
    Path("run/pipeline.json").write_bytes(b'{"phases": \xff')
    assert run_cli(monkeypatch, "report", "run") == 2
    assert "what `understudy pipeline` wrote there" in capsys.readouterr().err
    shutil.copy(whole / "pipeline.json", "run")
    state = json.loads(Path("run/pipeline.json").read_text())
    state["phases"].pop()
    Path("run/pipeline.json").write_text(json.dumps(state))
    with caplog.at_level("INFO", logger="understudy"):
        run(plan_tree(material), resume=True)
    assert "phase 3 of 3: again (sft), in 03-again" in caplog.messages

"""Plans: what a phase's configuration becomes, what references stand for, and what is refused."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from understudy import ConfigError
from understudy.cli_arguments import smoke_config
from understudy.config import MixConfig, PromptsConfig
from understudy.config_pipeline import (
    READING,
    GateConfig,
    Made,
    PhaseConfig,
    PipelineConfig,
    PlannedRun,
    merged,
    planned_runs,
    runs_of,
)
from user import write_toml

ROOT = Path(__file__).resolve().parents[1]
STEP = "checkpoints/step_000100"


def plan_tree(*phases: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {"output_dir": "out", "student": {"model": "start"}, "phases": list(phases)} | top


def phase(name: str, method: str = "sft", **sections: Any) -> dict[str, Any]:
    return {"name": name, "method": method, "prompts": {"path": "rows.jsonl"}} | sections


def plan(*phases: dict[str, Any], **top: Any) -> PipelineConfig:
    return PipelineConfig.from_tree(plan_tree(*phases, **top), "plan.toml")


def planned(*phases: dict[str, Any], **top: Any) -> list[PlannedRun]:
    return planned_runs(plan(*phases, **top))


def refused(*phases: dict[str, Any], **top: Any) -> str:
    with pytest.raises(ConfigError) as error:
        planned_runs(plan(*phases, **top))
    return str(error.value)


def test_phases_overlay_what_the_plan_shares() -> None:
    optim = {"learning_rate": 1e-3, "num_steps": 7}
    first, second = planned(phase("a", optim={"num_steps": 9}), phase("b", seed=5), optim=optim, seed=3, num_threads=2)
    assert (first.config.optim.num_steps, first.config.optim.learning_rate, first.config.seed) == (9, 1e-3, 3)
    assert (second.config.optim.num_steps, second.config.seed, second.config.num_threads) == (7, 5, 2)
    assert (first.config.output_dir, second.config.output_dir) == ("out/01-a", "out/02-b")
    assert merged({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}, "d": 3}) == {"a": {"b": 1, "c": [2]}, "d": 3}


def test_students_go_on_from_the_phase_before() -> None:
    sampled = phase("samples", "generate", teacher={"model": "@previous"})
    runs = planned(phase("a"), phase("check", "eval"), sampled, phase("b"), phase("c", student={"model": "@start"}))
    models = [one.config.student.model for one in runs]
    assert models == ["start", f"out/01-a/{STEP}", f"out/01-a/{STEP}", f"out/01-a/{STEP}", "start"]
    teacher = runs[2].config.teacher
    assert teacher is not None
    assert teacher.model == f"out/01-a/{STEP}"
    assert [one.output for one in runs][2:] == ["out/03-samples/samples.jsonl", f"out/04-b/{STEP}", f"out/05-c/{STEP}"]


def test_the_first_phase_may_name_the_first_student() -> None:
    tree = plan_tree(phase("a", student={"model": "mine"}), phase("b", "distill", teacher={"model": "@start"}))
    del tree["student"]
    one = PipelineConfig.from_tree(tree, "plan.toml")
    teacher = planned_runs(one)[1].config.teacher
    assert teacher is not None
    assert (one.start, teacher.model) == ("mine", "mine")


def test_references_stand_for_what_phases_make() -> None:
    distilled = phase(
        "b",
        "distill",
        teacher={"model": "@start"},
        teachers={"old": {"model": "@phase:a"}, "far": {"model": "org/model"}},
        reference={"model": "@previous"},
        prompts={"path": "@samples:s"},
    )
    runs = planned(phase("a"), phase("s", "generate", teacher={"model": "@phase:a:1"}), distilled)
    config = runs[2].config
    assert config.reference is not None
    assert config.prompts is not None
    assert {name: teacher.model for name, teacher in config.all_teachers.items()} == {
        "default": "start",
        "old": f"out/01-a/{STEP}",
        "far": "org/model",
    }
    assert (config.reference.model, config.prompts.path) == (f"out/01-a/{STEP}", "out/02-s/samples.jsonl")


def test_rows_mixed_in_may_be_samples() -> None:
    mix = {"path": "@samples:s", "share": 0.1}
    runs = planned(phase("s", "generate", teacher={"model": "@start"}), phase("a", supervised={"mix": mix}))
    assert runs[1].config.supervised.mix is not None
    assert runs[1].config.supervised.mix.path == "out/01-s/samples.jsonl"


def test_how_the_plans_rows_are_read_does_not_concern_samples() -> None:
    reading = {"format": "gsm8k", "options": {"size": 1}, "prompt_template": "Q: {prompt}", "chat": False}
    reading |= {"subset": "main", "split": "test", "columns": {"prompt": "question"}}
    assert tuple(reading) == READING
    kept = {"limit": 5, "over_long": "skip", "system_prompt": "Be brief."}
    shared = {"prompts": reading | kept, "supervised": {"mix": reading | kept | {"share": 0.5, "path": "rows.jsonl"}}}
    source = phase("s", "generate", teacher={"model": "@start"})
    samples = {"path": "@samples:s"}
    runs = planned(source, phase("a", prompts=samples, supervised={"mix": samples}), phase("b"), **shared)
    configs = [one.config for one in runs]
    assert configs[1].prompts == PromptsConfig(path="out/01-s/samples.jsonl", **kept)
    assert configs[1].supervised.mix == MixConfig(path="out/01-s/samples.jsonl", share=0.5, **kept)
    for config in (configs[0], configs[2]):
        assert config.prompts == PromptsConfig(path="rows.jsonl", **reading, **kept)
        assert config.supervised.mix == MixConfig(path="rows.jsonl", share=0.5, **reading, **kept)
    for key, value in reading.items():
        text = refused(source, phase("a", prompts=samples | {key: value}))
        assert f"phase a: prompts.{key}" in text
        text = refused(source, phase("a", supervised={"mix": samples | {key: value, "share": 0.5}}))
        assert f"phase a: supervised.mix.{key}" in text


def test_cycles_repeat_the_phases() -> None:
    documents = phase("docs", prompts={"path": "docs-{cycle}.jsonl"})
    behaviour = phase("back", "distill", teacher={"model": "@phase:begin"})
    runs = planned(phase("begin", once=True), documents, behaviour, cycles=2, seed=4)
    assert [one.run.folder for one in runs] == ["01-begin", "02-docs", "03-back", "04-docs-cycle2", "05-back-cycle2"]
    assert [one.config.prompts and one.config.prompts.path for one in runs][1::2] == ["docs-1.jsonl", "docs-2.jsonl"]
    assert [one.config.student.model for one in runs][3] == f"out/03-back/{STEP}"
    assert [one.config.teacher.model for one in runs if one.config.teacher] == [f"out/01-begin/{STEP}"] * 2
    assert [one.config.seed for one in runs] == [4, 4, 4, 5, 5]


def test_a_name_means_its_newest_run_and_a_number_a_certain_one() -> None:
    teachers = {"old": {"model": "@phase:docs:1"}, "new": {"model": "@phase:docs"}}
    runs = planned(phase("docs"), phase("back", "distill", teachers=teachers), cycles=2)
    found = {name: teacher.model for name, teacher in runs[3].config.teachers.items()}
    assert found == {"old": f"out/01-docs/{STEP}", "new": f"out/03-docs-cycle2/{STEP}"}


def test_students_that_were_not_kept_are_not_previous() -> None:
    [a, b, _] = runs_of(plan(phase("a"), phase("b"), phase("c")))
    made = Made("start", "start").after(a, "A").after(b, "A", kept=False)
    assert (made.previous, made.students["b", 1]) == ("A", "A")
    left = planned_runs(plan(phase("a"), phase("b"), phase("c")), made, done=2)
    assert [one.config.student.model for one in left] == ["A"]


def test_sections_that_a_method_does_not_read_need_not_lead_anywhere() -> None:
    shared = {"teacher": {"model": "@phase:a"}, "reference": {"model": "@phase:a"}}
    first, second = planned(phase("a"), phase("b", "distill"), **shared)
    assert first.config.teacher is None
    assert second.config.teacher is not None
    [checked] = planned({"name": "e", "method": "eval"}, prompts={"path": "@samples:nobody"})
    assert checked.config.prompts is None


BACK = {"method": "distill", "name": "b", "prompts": {"path": "rows.jsonl"}}


@pytest.mark.parametrize(
    ("phases", "top", "fragments"),
    [
        ([phase("a", optim={"lr": 1})], {}, ["plan.toml, phase a", "optim.lr", "[optim] has learning_rate"]),
        ([phase("a")], {"optimm": {}}, ["unknown key optimm", "did you mean optim?"]),
        ([phase("a")], {"cycle": 2}, ["unknown key cycle", "did you mean cycles?"]),
        ([phase("a", metod="x")], {}, ["phase a", "unknown key metod", "did you mean method?"]),
        ([phase("a", output_dir="x")], {}, ["phase a", "unknown key output_dir"]),
        ([phase("a", "stf")], {}, ["phases[0].method", "'stf'", "'sft'"]),
        ([{"name": "a"}], {}, ["phases[0].method", "nothing"]),
        ([phase("a b")], {}, ["phases[0].name", "'a b'"]),
        ([phase("a"), phase("a")], {}, ["2 phases named a"]),
        ([], {}, ["no [[phases]]"]),
        ([phase("a")], {"phases": "a"}, ["no [[phases]]"]),
        ([phase("a")], {"cycles": 0}, ["cycles", "greater than or equal to 1"]),
        ([phase("a")], {"student": {}}, ["student.model", "nothing", "begins with"]),
        ([phase("a")], {"student": "start"}, ["student.model", "[student]"]),
        ([phase("a", student="start")], {}, ["phase a", "student"]),
        ([phase("a")], {"student": {"model": "@previous"}}, ["student.model", "'@previous'"]),
        ([phase("a", student={"model": "x"})], {"cycles": 2}, ["each would start anew"]),
        ([phase("a"), BACK | {"teacher": {"model": "@phase:c"}}], {}, ["phase b: @phase:c", "comes before", "of a"]),
        ([BACK | {"teacher": {"model": "@phase:b"}}], {}, ["phase b: @phase:b", "there is none"]),
        ([BACK | {"teacher": {"model": "@phase:c"}}, phase("c")], {"cycles": 2}, ["@phase:c", "comes before"]),
        ([phase("docs"), BACK | {"teacher": {"model": "@phase:doc"}}], {}, ["did you mean docs?"]),
        ([phase("a"), BACK | {"teacher": {"model": "@phase:a:2"}}], {"cycles": 3}, ["cycle 2 of phase a"]),
        ([phase("a"), BACK | {"teacher": {"model": "@phase:a:x"}}], {}, ["cycle x of phase a"]),
        ([phase("a"), BACK | {"teacher": {"model": "@prevous"}}], {}, ["model @prevous", '"@previous"']),
        ([phase("a"), phase("b", prompts={"path": "@samples:a"})], {}, ["@samples:a", "generate phase before it"]),
        ([phase("a", prompts={"path": "@rows"})], {}, ["path @rows", '"@samples:<name>"']),
        ([phase("a")], {"gates": [{"metric": "m"}]}, ["gates[0].max_drop", "nothing"]),
        (
            [phase("a")],
            {"gates": [{"metric": "m", "max_drop": 0, "agaisnt": "x"}]},
            ["agaisnt", "did you mean against"],
        ),
        ([phase("a")], {"gates": [{"metric": "m", "max_drop": 0, "after": ["z"]}]}, ["gates after", "z"]),
        ([phase("a", student={"lora": {}}), phase("b", student={"lora": {}})], {}, ["adapters on top", "phase a"]),
    ],
)
def test_what_is_refused(phases: list[dict[str, Any]], top: dict[str, Any], fragments: list[str]) -> None:
    text = refused(*phases, **top)
    assert all(fragment in text for fragment in fragments), text


def test_overrides_reach_the_defaults_and_single_phases(tmp_path: Path) -> None:
    path = write_toml(tmp_path / "plan.toml", plan_tree(phase("a"), phase("b", optim={"num_steps": 2})))
    overrides = {"optim.num_steps": "5", "phases.a.optim.learning-rate": "1e-2", "output_dir": "there", "cycles": "2"}
    one = PipelineConfig.from_toml(path, overrides)
    assert [each.config.optim.num_steps for each in one.phases] == [5, 2]
    assert [each.config.optim.learning_rate for each in one.phases] == [1e-2, 1e-5]
    assert (one.output_dir, one.cycles) == ("there", 2)
    with pytest.raises(ConfigError, match=r"--phases\.c\.seed"):
        PipelineConfig.from_toml(path, {"phases.c.seed": 1})
    with pytest.raises(ConfigError, match="no such file"):
        PipelineConfig.from_toml(tmp_path / "nowhere.toml")


def test_in_miniature_nothing_is_made_twice_as_small() -> None:
    gate = {"metric": "eval/eval/greedy", "max_drop": 0.1}
    small = plan(phase("a"), gates=[gate], optim={"num_steps": 50}).in_miniature(smoke_config)
    assert (small.output_dir, small.phases[0].config.optim.num_steps, small.gates[0].max_drop) == ("out-smoke", 2, 1e9)
    again = small.in_miniature(smoke_config)
    assert again == small.model_copy(update={"output_dir": "out-smoke-smoke"})


def test_a_plan_survives_being_stored() -> None:
    one = plan(
        phase("a"), BACK | {"teacher": {"model": "@phase:a"}}, gates=[{"metric": "m", "max_drop": 0.5}], cycles=2
    )
    assert PipelineConfig.model_validate_json(one.model_dump_json()) == one


def test_the_plans_of_the_documentation_hold() -> None:
    text = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
    plans = re.findall(r"^```TOML\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert plans
    for code in plans:
        assert planned_runs(PipelineConfig.from_tree(tomllib.loads(code), "docs/pipelines.md"))


def test_the_recipe_is_three_phases_and_five_runs() -> None:
    one = PipelineConfig.from_toml(ROOT / "recipes" / "assistant-pipeline" / "plan.toml")
    names = [planned_run.run.folder for planned_run in planned_runs(one)]
    assert names == ["01-assistant", "02-documents", "03-behaviour", "04-documents-cycle2", "05-behaviour-cycle2"]


def test_every_key_of_a_plan_is_documented() -> None:
    text = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
    for model, left_out in ((PipelineConfig, {"start"}), (PhaseConfig, {"config"}), (GateConfig, set[str]())):
        for name in model.model_fields.keys() - left_out:
            assert f"`{name}`" in text, name

"""The documentation is true: its files parse, its commands and programs run, its tables are those of the code.

Fenced blocks of README.md and docs/*.md, in the order of each file, in a folder of its own that holds ``models/start``,
``models/teacher``, ``prompts.jsonl`` and ``test.jsonl`` (the ledger world's):

    toml     a whole configuration, or a plan for ``cost``, written to the file that a first line ``# name.toml`` names
             (``run.toml`` without);
             ``# part of name.toml`` as first line: laid over that file, which is not written
    python   executed; the blocks of one file share their names
    console  lines ``$ understudy ...`` are run. Training commands get --smoke, and what they wrote then also stands
             under the full run's names; ``demo`` and ``world`` are only parsed. ``# not run: why`` as first line: all
             are only parsed

``python tests/test_docs.py`` writes the tables of docs/configuration.md anew.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic import TypeAdapter

import understudy
from understudy import RunConfig, cli, cli_arguments
from understudy.config import field_rows
from understudy.config_pipeline import merged
from understudy.config_plan import load_plan
from understudy.tasks import Grade
from understudy.types import Prompt
from understudy.worlds.ledger_demo import prepare
from user import metrics, run_cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*/README.md"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("README.md"))
RUNS = sorted(path for path in (ROOT / "recipes").glob("*/*.toml") if path.name != "plan.toml")
CONFIGURATION = ROOT / "docs" / "configuration.md"
TRAINING = ("distill", "rl", "sft")


class Block(NamedTuple):
    language: str
    code: str
    line: int


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], text[: m.start()].count("\n") + 2) for m in found]


def commands(block: Block) -> list[list[str]]:
    lines = block.code.replace("\\\n", " ").splitlines()
    return [shlex.split(line[2:], comments=True)[1:] for line in lines if line.startswith("$ understudy ")]


def named(path: Path) -> Any:
    return str(path.relative_to(ROOT))


# Blocks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    prepare(folder)
    for name, rows in (("prompts.jsonl", 32), ("test.jsonl", 8)):
        lines = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:rows]), encoding="utf-8")
    return folder


@pytest.mark.parametrize("path", DOCS, ids=named)
def test_blocks_work(path: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for block in blocks(path):
        where = f"{path.name}:{block.line}"
        print(where)  # shown when something fails
        if block.language == "toml":
            use_toml(block.code)
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), namespace)
        elif block.language == "json":
            for text in re.split(r"\n(?=\{)", block.code.strip()):
                json.loads(text)
        elif block.language == "console":
            only_parsed = block.code.startswith("# not run:")
            for arguments in commands(block):
                run_command(arguments, monkeypatch, only_parsed=only_parsed or arguments[0] in ("demo", "world"))


def use_toml(code: str) -> None:
    part = re.match(r"# part of ([\w.-]+\.toml)\n", code)
    if part:
        base = Path(part[1])
        tree = tomllib.loads(base.read_text(encoding="utf-8")) if base.exists() else {"output_dir": "a"}
        RunConfig.model_validate(merged(tree, tomllib.loads(code)))
        return
    name = re.match(r"# ([\w.-]+\.toml)\n", code)
    file = Path(name[1] if name else "run.toml")
    file.write_text(code, encoding="utf-8")
    if "methods" in tomllib.loads(code):
        load_plan(file)
    else:
        RunConfig.from_toml(file)


def run_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch, *, only_parsed: bool) -> None:
    if only_parsed:
        cli.app.parse_args(arguments, exit_on_error=False, print_error=False)
        return
    if arguments[0] not in TRAINING:
        assert run_cli(monkeypatch, *arguments) == 0, arguments
        return
    config = RunConfig.from_toml(arguments[1], cli_arguments.parse_overrides(overrides(arguments[2:])))
    full, small = Path(config.output_dir), Path(f"{config.output_dir}-smoke")
    if "--resume" not in arguments:
        shutil.rmtree(small, ignore_errors=True)
    flags = [] if "--smoke" in arguments else ["--smoke"]
    assert run_cli(monkeypatch, *arguments, *flags) == 0, arguments
    shutil.copytree(small, full, dirs_exist_ok=True)
    last = full / "checkpoints" / f"step_{config.optim.num_steps:06d}"
    if not last.exists():
        (full / "checkpoints" / "step_000002").rename(last)


def overrides(tokens: list[str]) -> tuple[str, ...]:
    return tuple(token for token in tokens if token not in ("--smoke", "--resume"))


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_commands_of_recipes_parse(path: Path) -> None:
    for block in blocks(path):
        for arguments in commands(block) if block.language == "console" else []:
            cli.app.parse_args(arguments, exit_on_error=False, print_error=False)
            for token in arguments:
                assert not token.startswith("recipes/") or (ROOT / token).exists(), arguments


@pytest.mark.parametrize("path", RUNS, ids=named)
def test_configurations_of_recipes_parse(path: Path) -> None:
    config = RunConfig.from_toml(path)
    # It goes through the file format unchanged, so that a run's config.toml can be run again.
    assert RunConfig.model_validate(tomllib.loads(config.to_toml())) == config


@pytest.mark.parametrize("name", ["gsm8k", "maths", "one-prompt", "assistant"])
def test_recipes_that_were_not_run_say_so(name: str) -> None:
    assert "not been run" in (ROOT / "recipes" / name / "README.md").read_text(encoding="utf-8")


# Links


def anchors(path: Path) -> set[str]:
    """Headings as GitHub names them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*DOCS, *RECIPES, *EXPERIMENTS, ROOT / "AGENTS.md", ROOT / "CHANGELOG.md"], ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        assert found.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(found), target


# Tables


def tables(path: Path) -> Iterator[list[str]]:
    """Cells of every table row whose first cell is one name in backticks."""
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [c.strip().replace(r"\|", "|") for c in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        if cells and re.fullmatch(r"`[^`]+`", cells[0]):
            yield [cells[0].strip("`"), *cells[1:]]


def key_tables() -> str:
    """Every key, a table per section."""
    sections: dict[str, list[str]] = {}
    for name, kind, default, description in field_rows():
        section, _, leaf = name.rpartition(".")
        cells = (f"`{leaf}`", f"`{_plain(kind)}`", default if default == "required" else f"`{default}`", description)
        rows = sections.setdefault(section, ["| key | type | default | meaning |", "|---|---|---|---|"])
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    text = []
    for section, rows in sections.items():
        header = f"[[{section[:-2]}]]" if section.endswith("[]") else f"[{section}]"
        text += ["", f"### `{header}`" if section else "### Top level", "", *rows]
    return "\n".join(text) + "\n"


def _plain(kind: str) -> str:
    """Unions as ``A | B``, whatever this Python calls them."""
    union = re.fullmatch(r"Union\[(.*)\]", kind)
    if not union:
        return kind
    parts, depth = [""], 0
    for character in union[1]:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return " | ".join(part.strip() for part in parts)


def with_keys(text: str) -> str:
    begin, end = "<!-- keys:begin -->\n", "<!-- keys:end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}{key_tables()}\n{end}{rest.split(end)[1]}"


def test_every_key_is_described() -> None:
    text = CONFIGURATION.read_text(encoding="utf-8")
    assert text == with_keys(text), "run `python tests/test_docs.py`"
    assert all(description for *_, description in field_rows())


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """One small run of each kind that writes other metrics or other rollouts than the rest."""
    out = tmp_path_factory.mktemp("runs")
    start, teacher = ({"model": str(world / "models" / name)} for name in ("start", "teacher"))
    rewarded = {"reward": {"grader": "ledger"}}
    task = {"name": "ledger", "path": str(world / "test.jsonl"), "grader": "ledger"}
    sft_rows = out / "sft.jsonl"
    rows = [json.loads(line) for line in (world / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    sft_rows.write_text("".join(json.dumps(r | {"completion": r["answer"]}) + "\n" for r in rows), encoding="utf-8")
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "full": ("distill", {"teacher": teacher, "evaluation": {"tasks": [task]}}),
        "mixed": ("distill", {"teacher": teacher, "objective": {"reward_coef": 1.0}, **rewarded}),
        "sampled": ("distill", {"teacher": teacher, "objective": {"estimator": "sampled"}}),
        "rl": ("rl", rewarded),
        "sft": ("sft", {"prompts": {"path": str(sft_rows)}}),
        "generate": ("generate", {"teacher": teacher, "prompts": {"path": str(world / "test.jsonl")}}),
        "eval": ("evaluate", {"evaluation": {"tasks": [task | {"samples": 2, "grader": "test_docs:graded"}]}}),
    }
    folders = {}
    for name, (method, sections) in kinds.items():
        tree = {
            "output_dir": str(out / name),
            "student": start,
            "prompts": {"path": str(world / "prompts.jsonl")},
            "sampling": {"max_completion_tokens": 8},
        }
        config = cli_arguments.smoke_config(RunConfig.model_validate(tree | sections))
        folders[name] = getattr(understudy, method)(config, quiet=True).folder
    return folders


def graded(prompt: Prompt, completion: str, finish_reason: str) -> Grade:
    return Grade(float(finish_reason == "stop"), details={"words": len(completion.split())})


def generic(name: str) -> str:
    name = re.sub(r"^time/\w+$", "time/<role>", name)
    name = re.sub(r"^eval/ledger/(greedy|t1)", "eval/<task>/<decoding>", name)
    name = re.sub(r"^by_task/ledger/.+", "by_task/<task>/<name>", name)
    return re.sub(r"_pass@\d+$", "_pass@<m>", name).replace("_words", "_<detail>")


def test_every_metric_is_defined(runs: Mapping[str, Path]) -> None:
    documented = Counter(row[0] for row in tables(ROOT / "docs" / "metrics.md"))
    assert max(documented.values()) == 1
    written = {name: {key for row in metrics(runs[name]) for key in row} for name in runs if has(runs[name], "metrics")}
    # The rest belongs to single objectives: test_every_objective.py.
    assert {generic(key) for keys in written.values() for key in keys} <= set(documented)
    # The column that says where: spot checks of its claims.
    assert {"ratio/mean", "reverse_kl/full", "reward/mean"} <= written["mixed"]
    assert "ratio/mean" not in written["full"]
    assert "reverse_kl/full" not in written["sampled"]
    assert "reverse_kl/mean" not in written["rl"]
    everywhere = {row[0] for row in tables(ROOT / "docs" / "metrics.md") if row[3] == "all"} - {"time/<role>"}
    assert all(everywhere <= keys for keys in written.values())
    evaluation = json.loads((runs["eval"] / "evaluation.json").read_text(encoding="utf-8"))
    assert {generic(key) for key in evaluation} == {key for key in documented if key.startswith("eval/")}


def has(folder: Path, name: str) -> bool:
    return (folder / f"{name}.jsonl").exists()


def test_every_role_is_named(runs: Mapping[str, Path]) -> None:
    costs = {}
    for name, folder in runs.items():
        if (folder / "costs.json").exists():
            costs[name] = json.loads((folder / "costs.json").read_text(encoding="utf-8"))
    roles = {role for content in costs.values() for role in content["roles"]}
    for document in ("metrics.md", "rollouts.md"):
        text = (ROOT / "docs" / document).read_text(encoding="utf-8")
        assert all(f"`{role}`" in text for role in roles)
    for content in costs.values():
        assert set(content) == {"schema_version", "roles", "total_without_evaluation"}
        assert content["schema_version"] == 1
        assert all(set(e) == {"tokens", "flops", "exact_flops", "seconds"} for e in content["roles"].values())


def test_rollouts_have_the_documented_fields_and_types(runs: Mapping[str, Path]) -> None:
    text = (ROOT / "docs" / "rollouts.md").read_text(encoding="utf-8")
    rows = [row for row in tables(ROOT / "docs" / "rollouts.md") if len(row) == 3 and row[1].startswith("`")]
    fields = {row[0]: row[1].strip("`") for row in rows}
    types = {name: TypeAdapter(eval(kind, {})) for name, kind in fields.items()}
    nested = {name for name in fields if "." in name}
    example = next(b.code for b in blocks(ROOT / "docs" / "rollouts.md") if b.language == "json")
    records = [json.loads(example)]
    for name in ("full", "mixed", "sampled", "rl"):
        files = sorted((runs[name] / "rollouts").iterdir())
        assert [file.name for file in files] == ["step_000000.jsonl", "step_000002.jsonl"]
        records += [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    for record in records:
        assert set(record) == set(fields) - nested
        assert f"Schema version {record['schema_version']}." in text
        topk = {f"teacher_topk.{key}": value for key, value in (record["teacher_topk"] or {}).items()}
        assert set(topk) == (nested if record["teacher_topk"] is not None else set())
        for name, value in (record | topk).items():
            types[name].validate_python(value, strict=True)
            per_token = name.startswith(("teacher_topk.", "completion_tokens", "loss_mask", "advantages"))
            if (per_token or name.endswith("_logprobs")) and value is not None:
                assert len(value) == len(record["completion_ids"]), name
    none = {name: {f for f in fields if all(r.get(f, 0) is None for r in of(runs[name]))} for name in ("full", "rl")}
    assert {"advantages", "reward", "teacher_prompt_ids"} <= none["full"]
    assert {"teacher_logprobs", "teacher_topk"} <= none["rl"]


def test_the_teacher_of_the_docs_marks_as_the_package_does(runs: Mapping[str, Path], world: Path) -> None:
    [code] = [b.code for b in blocks(ROOT / "docs" / "backends.md") if b.language == "python"]
    namespace: dict[str, Any] = {}
    exec(code.split("\nconfig = ")[0], namespace)
    teacher = namespace["PlainTeacher"](str(world / "models" / "teacher"))
    records = of(runs["sampled"])
    sequences = [understudy.TokenSequence(r["prompt_ids"], r["completion_ids"]) for r in records]
    for record, logprobs in zip(records, teacher.compute_logprobs(sequences), strict=True):
        # float32 in other batch shapes; stored numbers have six decimals
        assert logprobs == pytest.approx(record["teacher_logprobs"], abs=1e-4, rel=1e-5)


def of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "rollouts" / "step_000000.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_folders_hold_what_is_said(runs: Mapping[str, Path]) -> None:
    def names(folder: Path) -> set[str]:
        return {path.name for path in folder.iterdir()} - {".lock"}

    training = {"config.toml", "metrics.jsonl", "costs.json", "checkpoints", "report.html"}
    training |= {"doctor.jsonl", "environment.jsonl"}
    assert names(runs["full"]) == training | {"rollouts"}
    assert names(runs["sft"]) == training
    assert names(runs["generate"]) == {"config.toml", "samples.jsonl", "costs.json"}
    assert names(runs["eval"]) == {"config.toml", "evaluation.json", "evaluation"}
    checkpoint = names(runs["full"] / "checkpoints" / "step_000002")
    text = (ROOT / "docs" / "rollouts.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in checkpoint)


def test_signatures_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in understudy.__all__:
        assert re.search(rf"\b{name}\b", text), name
        subject = getattr(understudy, name)
        if not (inspect.isfunction(subject) or is_dataclass(subject)):
            continue
        signature = inspect.signature(subject)
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        line = f"{name}{inspect.Signature(bare)}".replace("<factory>", "{}")
        assert line in text.splitlines(), line


if __name__ == "__main__":
    CONFIGURATION.write_text(with_keys(CONFIGURATION.read_text(encoding="utf-8")), encoding="utf-8")

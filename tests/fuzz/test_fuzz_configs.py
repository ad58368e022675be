"""Configurations: whatever a TOML file holds, the answer is a tree that can be written again, or an error that says
what to change."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from fuzzing import NUMBERS, SPECIAL_NUMBERS, TEXTS, broken_bytes, forms, fuzz, note, outcome
from hypothesis import strategies as st

from understudy import RunConfig
from understudy.config import field_rows
from understudy.config_pipeline import PipelineConfig
from understudy.config_plan import load_plan
from understudy.preflight import Method, check_run
from user import tree

KEYS = sorted({name for key, *_ in field_rows() for name in key.replace("[]", "").split(".")})
METHODS: tuple[Method, ...] = ("distill", "rl", "sft", "generate", "eval")


def valid_trees(material: Path) -> list[dict[str, Any]]:
    """Configurations with most sections in them."""
    rows, student, teacher = material / "rows.jsonl", material / "student", material / "teacher"
    task = {"name": "held out", "path": str(rows), "grader": "last_number", "temperatures": [0.0, 1.0], "samples": 2}
    plain = tree(student, teacher, rows, material / "run", seed=1)
    rich = tree(
        student,
        teacher,
        rows,
        material / "run",
        objective={
            "estimator": "sampled",
            "discount": 0.5,
            "signal_clip": 2.0,
            "loss": "ppo",
            "reward_coef": 0.5,
            "tokens": {"first": 0.5, "span": [0.0, 0.5], "half_life": 3.0},
        },
        reward={"grader": "last_number", "grader_timeout_seconds": 5.0},
        evaluation={"every": 1, "tasks": [task]},
        reference={"model": str(teacher)},
        checkpoints={"every": 1, "keep": 1},
    )
    rich["student"]["lora"] = {"rank": 2, "alpha": 4.0, "target_modules": ["q_proj"]}
    rich["prompts"] |= {"columns": {"prompt": "prompt"}, "limit": 3, "system_prompt": "Be brief."}
    rich["prompts"] |= {"chat_template_kwargs": {"enable_thinking": False}, "teacher_of_task": {"a": "default"}}
    served = tree(student, None, rows, material / "run", sampling={"max_policy_lag": 0, "stop": ["\n\n"]})
    served["teachers"] = {
        "far": {"url": "http://127.0.0.1:9/v1", "api_key_env": "NO_SUCH_KEY", "cache": "marks.sqlite"}
    }
    served["supervised"]["mix"] = {"path": str(rows), "share": 0.25}
    return [plain, rich, served]


def paths_of(node: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [prefix] if prefix else []
    if isinstance(node, Mapping):
        for key, value in node.items():
            found += paths_of(value, (*prefix, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            found += paths_of(value, (*prefix, index))
    return found


VALUES = st.one_of(
    st.sampled_from([*NUMBERS, *SPECIAL_NUMBERS, *TEXTS, True, False, [], {}, [[]], [{}], date(2025, 1, 2)]),
    st.integers(),
    st.floats(),
    st.text(max_size=30),
    st.lists(st.sampled_from([0, 0.5, "a", True]), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3),
    st.integers(5, 200).map(lambda depth: nested(depth)),
)
# What a setting of a type could well have been.
NEAR: dict[type, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(0, 16),
    float: st.one_of(st.floats(0, 1), st.sampled_from([1e-6, 1e-4, 2, 10.0])),
}


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = {"a": value} if level % 2 else [value]
    return value


@st.composite
def changed_trees(draw: st.DrawFn, trees: list[dict[str, Any]]) -> dict[str, Any]:
    """A valid tree with a few things moved, replaced, dropped, added or called otherwise."""
    content = copy.deepcopy(draw(st.sampled_from(trees)))
    for _ in range(draw(st.integers(1, 3))):
        paths = paths_of(content)
        if not paths:
            break
        *parents, last = draw(st.sampled_from(paths))
        node: Any = content
        for key in parents:
            node = node[key]
        kind = draw(st.sampled_from([*["move", "replace"] * 3, "drop", "add", "rename", "borrow"]))
        if kind == "move":
            node[last] = draw(NEAR.get(type(node[last]), st.just(node[last])))
        elif kind == "replace":
            node[last] = draw(VALUES)
        elif kind == "drop":
            del node[last]
        elif isinstance(node, dict):
            if kind == "add":
                node[draw(st.one_of(st.sampled_from(KEYS), st.text(max_size=12)))] = draw(VALUES)
            elif kind == "rename":
                node[str(last)[:-1] + draw(st.sampled_from(["", "x", "ß", "."]))] = node.pop(last)
            else:
                node[draw(st.sampled_from(KEYS))] = copy.deepcopy(node[last])
    return content


def use(path: Path) -> RunConfig:
    """Read, write, read again: the same."""
    config = RunConfig.from_toml(path)
    again = path.with_name("again.toml")
    again.write_text(config.to_toml(), encoding="utf-8")
    assert RunConfig.from_toml(again) == config
    return config


@pytest.mark.filterwarnings("ignore")
@forms(100, 6_000)
def test_trees(cases: int, long: bool, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types, ranges, keys, depths; what is accepted goes through all checks before weights, for some command."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.toml"
    case = st.tuples(changed_trees(valid_trees(material)), st.sampled_from(METHODS))

    def body(case: tuple[dict[str, Any], Method]) -> None:
        content, method = case
        path.write_text(tomli_w.dumps(content), encoding="utf-8", errors="surrogatepass")

        def work() -> None:
            config = use(path)
            note("configurations: values", "readable")
            check_run(config, method)

        outcome("configurations: values", work)

    fuzz(case, body, cases, long=long)


@forms(100, 8_000)
def test_bytes(cases: int, long: bool, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncated, flipped, in other encodings, with a byte order mark, NUL, and thousands of brackets."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.toml"
    texts = st.sampled_from([tomli_w.dumps(content).encode() for content in valid_trees(material)])

    def body(data: bytes) -> None:
        path.write_bytes(data)
        outcome("configurations: bytes", lambda: use(path))

    fuzz(broken_bytes(texts), body, cases, long=long)


@forms(60, 3_000)
def test_overrides(cases: int, long: bool, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dotted keys of the command line, with text that may be TOML."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(valid_trees(material)[0]), encoding="utf-8")
    part = st.one_of(st.sampled_from(KEYS), st.text(max_size=6), st.just("0"))
    key = st.one_of(
        st.sampled_from([name for name, *_ in field_rows()]), st.lists(part, min_size=1, max_size=40).map(".".join)
    )
    value = st.one_of(
        VALUES.map(str), st.text(max_size=40), st.sampled_from(["1\nseed = 2", "[" * 5000, "{a = 1", "'''"])
    )

    def body(overrides: dict[str, str]) -> None:
        outcome("configurations: overrides", lambda: RunConfig.from_toml(path, overrides))

    fuzz(st.dictionaries(key, value, min_size=1, max_size=3), body, cases, long=long)


@pytest.mark.filterwarnings("ignore")
@forms(40, 3_000)
def test_plans(cases: int, long: bool, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other files there are: pipelines, and plans of costs."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "plan.toml"
    plain = valid_trees(material)[0]
    phases = [
        {"name": "documents", "method": "sft", "optim": {"num_steps": 1}},
        {"name": "behaviour", "method": "distill", "teacher": {"model": "@start"}, "once": True},
    ]
    gate = {"after": ["documents"], "max_drop": 0.1}
    costs: dict[str, Any] = {
        "student": {"model": "Qwen/Qwen3-8B"},
        "teacher": {"shape": {"hidden": 64, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 32}},
        "methods": {"distill": {"kind": "distill", "steps": 10}},
        "hardware": {"gpu": "H100", "count": 2},
    }
    del plain["teacher"]
    trees = [plain | {"phases": phases, "cycles": 2}, plain | {"phases": phases, "gates": [gate]}, costs]

    def body(content: dict[str, Any]) -> None:
        path.write_text(tomli_w.dumps(content), encoding="utf-8", errors="surrogatepass")
        outcome("pipelines and plans of costs", lambda: PipelineConfig.from_toml(path))
        outcome("pipelines and plans of costs", lambda: load_plan(path, {}))

    fuzz(changed_trees(trees), body, cases, long=long)

"""Records of published sets, generators and functions as rows."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from understudy import ConfigError
from understudy.config import RowsConfig, RunConfig
from understudy.rows import Row, read_rows
from user import bpe_tokenizer, run_cli, save_model, write_rows, write_toml

DATA = os.environ.get("UNDERSTUDY_DATA")
BOX = "\n\nReason step by step, and put the final answer in \\boxed{}."


def rows(path: Path | str, records: Any = None, **keys: Any) -> list[Row]:
    if records is not None:
        assert isinstance(path, Path)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return read_rows(RowsConfig.model_validate({"path": str(path), **keys}))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("form", "record", "row"),
    [
        (
            "gsm8k",
            {"question": "How many?", "answer": "9 * 2 = <<9*2=18>>18\n#### 18"},
            {"messages": user("How many?" + BOX), "answer": "18"},
        ),
        (
            "math500",
            {"problem": "Solve.", "answer": "\\frac12", "solution": "...", "level": 2},
            {"messages": user("Solve." + BOX), "answer": "\\frac12", "solution": "...", "level": 2},
        ),
        (
            "aime24",
            {"id": "I-2", "problem": "Find $xy$.", "answer": 25},
            {"messages": user("Find $xy$." + BOX), "answer": "25", "id": "I-2"},
        ),
        (
            "deepmath",
            {"question": "Sum?", "final_answer": 2.5, "topic": "sums", "r1_solution_1": "...", "r1_solution_3": "..."},
            {"messages": user("Sum?" + BOX), "answer": "2.5", "topic": "sums"},
        ),
        (
            "tulu3",
            {"messages": [*user("Hi."), {"role": "assistant", "content": "Hello."}], "source": "x"},
            {"messages": user("Hi."), "source": "x"},
        ),
        (
            "ifeval",
            {"key": 7, "prompt": "Write.", "instruction_id_list": ["a:b"], "kwargs": [{"n": 3, "relation": None}]},
            {"messages": user("Write."), "key": 7, "instruction_id_list": ["a:b"], "kwargs": [{"n": 3}]},
        ),
        (
            "simplebench",
            {"question_id": 1, "prompt": "Where?\nA. here\nB. there\n", "answer": "B"},
            {"messages": user("Where?\nA. here\nB. there"), "question_id": 1, "answer": "B"},
        ),
    ],
)
def test_formats(form: str, record: dict[str, Any], row: dict[str, Any], tmp_path: Path) -> None:
    assert [each.values for each in rows(tmp_path / "r.jsonl", [record], format=form)] == [row]
    del record[next(name for name in record if name in ("question", "problem", "prompt", "messages"))]
    with pytest.raises(ConfigError, match=rf'r.jsonl:1\n.*\n.*a record of format "{form}"'):
        rows(tmp_path / "r.jsonl", [record], format=form)


def test_a_record_of_other_types_is_refused(tmp_path: Path) -> None:
    for form, record in (
        ("gsm8k", {"question": "?", "answer": 3}),
        ("ifeval", {"prompt": "?", "instruction_id_list": ["a:b"], "kwargs": "{}"}),
        ("tulu3", {"messages": [{"role": "assistant", "content": "Alone."}]}),
        ("tulu3", {"messages": ["Hi."]}),
    ):
        with pytest.raises(ConfigError, match="a record of format"):
            rows(tmp_path / "r.jsonl", [record], format=form)


def test_plain_text_for_base_models(tmp_path: Path) -> None:
    records = [{"question": "How many?", "answer": "#### 18"}]
    [row] = rows(tmp_path / "r.jsonl", records, format="gsm8k", chat=False)
    assert row.values == {"prompt": f"Problem: How many?{BOX}\n\nSolution:", "answer": "18"}


def test_columns_are_renamed_before_a_format_reads_them(tmp_path: Path) -> None:
    [row] = rows(tmp_path / "r.jsonl", [{"Q": "?", "answer": "#### 1"}], format="gsm8k", columns={"question": "Q"})
    assert row.values["messages"] == user("?" + BOX)


@pytest.mark.parametrize("keys", [{"format": "gsm8k"}, {"columns": {"prompt": "question"}}])
def test_a_template_of_ones_own(keys: dict[str, Any], tmp_path: Path) -> None:
    """Braces other than those of {prompt} mean nothing."""
    records = [{"question": "How {many}?", "answer": "#### 18"}]
    [row] = rows(tmp_path / "r.jsonl", records, prompt_template="Q: {prompt} In \\boxed{}.\nA:", chat=False, **keys)
    assert row.values["prompt"] == "Q: How {many}? In \\boxed{}.\nA:"


def test_a_template_surrounds_the_last_message(tmp_path: Path) -> None:
    talk = [*user("Hi"), {"role": "assistant", "content": "Yes?"}]
    path = tmp_path / "r.jsonl"
    [row] = rows(path, [{"messages": [*talk, *user("May?")]}], prompt_template="{prompt} Please.")
    assert row.values["messages"] == [*talk, *user("May? Please.")]
    assert rows(path, [{"messages": talk}])[0].values["messages"] == talk
    with pytest.raises(ConfigError, match="a user's message"):
        rows(path, [{"messages": talk}], prompt_template="{prompt} Please.")


def test_a_list_of_answers(tmp_path: Path) -> None:
    [row] = rows(tmp_path / "r.jsonl", [{"prompt": "?", "answer": ["Lyon", "Lyon, France"]}])
    assert row.values == {"prompt": "?", "answer": "Lyon", "answers": ["Lyon", "Lyon, France"]}
    for answer in ([], [["Lyon"]], [None]):
        with pytest.raises(ConfigError, match="a list of texts"):
            rows(tmp_path / "r.jsonl", [{"prompt": "?", "answer": answer}])


@pytest.mark.parametrize(
    "whole", [[{"prompt": "a"}, {"prompt": "b"}], {"eval_data": [{"prompt": "a"}, {"prompt": "b"}]}]
)
def test_a_json_file_is_one_list(whole: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    found = rows(path)
    assert [(row.where, row.values) for row in found] == [
        (f"{path}[0]", {"prompt": "a"}),
        (f"{path}[1]", {"prompt": "b"}),
    ]


def test_a_json_file_may_hold_lines(tmp_path: Path) -> None:
    records = [{"prompt": "a"}, {"prompt": "b"}]
    for count in (1, 2):
        assert [row.values for row in rows(tmp_path / "r.json", records[:count])] == records[:count]
    (tmp_path / "r.json").write_text("[3]", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"r.json\[0\]"):
        rows(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("form", "split", "asked"),
    [
        ("gsm8k", "test", ("openai/gsm8k", "main", "test")),
        ("math500", "train", ("HuggingFaceH4/MATH-500", None, "test")),
        ("aime24", "test", ("HuggingFaceH4/aime_2024", None, "train")),
        ("ifeval", "train", ("google/IFEval", None, "train")),
    ],
)
def test_the_formats_own_dataset(
    form: str, split: str, asked: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``split`` matters where a dataset has several."""
    calls: list[tuple[Any, ...]] = []
    text = {"question": "?", "problem": "?", "prompt": "?", "instruction_id_list": [], "kwargs": []}

    def load_dataset(path: str, subset: str | None, *, split: str) -> list[dict[str, Any]]:
        calls.append((path, subset, split))
        return [{**text, "answer": "#### 1"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    [row] = rows("hub", format=form, split=split)
    assert calls == [asked]
    assert row.where == f"{asked[0]}[0]"


def test_the_hub_needs_a_format_with_a_dataset() -> None:
    for keys in ({}, {"format": "simplebench"}):
        with pytest.raises(ConfigError, match="gsm8k, math500, aime24, deepmath, tulu3, ifeval"):
            rows("hub", **keys)


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rows.py").write_text(
        "def sums(size, start=1):\n"
        "    for i in range(start, start + size):\n"
        "        yield {'prompt': f'{i}+{i}=', 'answer': str(2 * i)}\n"
        "def number(): return 3\n"
        "def texts(): return ['a']\n"
        "table = [{'prompt': 'a'}]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = rows("my_rows:sums", options={"size": 2, "start": 4})
    assert [(row.where, row.values) for row in found] == [
        ("my_rows:sums[0]", {"prompt": "4+4=", "answer": "8"}),
        ("my_rows:sums[1]", {"prompt": "5+5=", "answer": "10"}),
    ]
    for path, options in (
        ("my_rows:sums", {}),
        ("my_rows:sums", {"size": 1, "sise": 2}),
        ("my_rows:missing", {}),
        ("my_rows:table", {}),
        ("no_such_module:sums", {}),
        ("my_rows:number", {}),
        ("my_rows:texts", {}),
    ):
        with pytest.raises(ConfigError, match=path):
            rows(path, options=options)


def test_options_are_for_what_takes_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a file or a dataset takes none"):
        rows(tmp_path / "r.jsonl", [{"prompt": "?"}], options={"size": 3})


def test_a_generator_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    def nothing(package: str) -> Any:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", nothing)
    with pytest.raises(ConfigError, match=r"understudy\[graders\]"):
        rows("reasoning_gym:leg_counting")


@pytest.mark.parametrize(
    ("key", "remedy"), [("format = 'gsm8'", 'did you mean "gsm8k"'), ("prompt_template = 'x'", 'no "{prompt}"')]
)
def test_keys_are_checked_as_they_are_read(key: str, remedy: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"output_dir = 'a'\nstudent.model = 'm'\n[prompts]\npath = 'r.jsonl'\n{key}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=remedy):
        RunConfig.from_toml(path)


def test_a_format_and_its_grader_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small chat model writes noise; a row that cannot be graded is refused before it writes."""
    pytest.importorskip("math_verify", reason="the `graders` extra is not installed")
    save_model(tmp_path / "chat", bpe_tokenizer(chat=True), context=256)
    path = tmp_path / "r.jsonl"
    task = {"name": "sums", "path": str(path), "format": "gsm8k", "grader": "math", "temperatures": [0.0]}
    config = {
        "output_dir": str(tmp_path / "run"),
        "student": {"model": str(tmp_path / "chat")},
        "sampling": {"max_completion_tokens": 4},
        "evaluation": {"tasks": [task]},
    }
    toml = write_toml(tmp_path / "run.toml", config)
    records = [{"question": f"{i}+{i}?", "answer": f"#### {2 * i}"} for i in range(3)]
    write_rows(path, [*records, {"question": "?", "answer": ""}])
    assert run_cli(monkeypatch, "eval", toml) == 2
    assert "r.jsonl:4" in capsys.readouterr().err
    write_rows(path, records)
    assert run_cli(monkeypatch, "eval", toml) == 0
    assert "eval/sums/greedy 0.0000" in capsys.readouterr().out


@pytest.mark.skipif(DATA is None or not Path(DATA).is_dir(), reason="UNDERSTUDY_DATA names no folder of data sets")
def test_every_published_instruction() -> None:
    assert DATA is not None
    found = rows(Path(DATA) / "ifeval" / "input_data.jsonl", format="ifeval")
    assert len(found) == 541
    assert all(len(row.values["instruction_id_list"]) == len(row.values["kwargs"]) > 0 for row in found)
    assert found[0].values["kwargs"] == [{}, {"num_highlights": 3}, {"relation": "at least", "num_words": 300}]

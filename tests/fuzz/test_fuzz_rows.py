"""Rows: JSONL, JSON, Parquet and a user's functions. What is accepted can be tokenised, graded and written again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fuzzing import NUMBERS, TEXTS, broken_bytes, forms, fuzz, note, outcome
from hypothesis import strategies as st

from understudy.checkpoints import jsonl
from understudy.config import PromptsConfig
from understudy.preflight import _check_answers
from understudy.prompts import load_prompts
from understudy.rows import read_rows
from understudy.supervised import supervised_examples
from understudy.tasks import GRADERS
from understudy.tokenization import ModelText, load_text
from user import bpe_tokenizer, save_model

GRADER_NAMES = ("exact_match", "last_number", "choice", "questions", "ifeval")  # those that ask no other process
NAMES = ("prompt", "messages", "answer", "completion", "text", "task", "teacher", "teacher_prompt", "finish_reason")
FURTHER = ("question", "instruction_id_list", "kwargs", "problem", "score", "é", "", "a b", "answers")

TEXT = st.one_of(
    st.sampled_from(
        [*TEXTS, "How many are 3?", "12", "\0", "\ud800", "a\udfffb", "x" * 5000, "<|im_end|>", "<|endoftext|>"]
    ),
    st.text(st.characters(), max_size=30),
)
LEAF = st.one_of(TEXT, st.sampled_from([*NUMBERS, float("nan"), float("inf"), True, None]), st.integers(), st.floats())
VALUE = st.recursive(
    LEAF, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)), max_leaves=8
)
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "", "tool"]), "content": TEXT}),
    st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls"]), VALUE, max_size=3),
    VALUE,
)
MESSAGES = st.one_of(st.lists(MESSAGE, max_size=4), VALUE)
INSTRUCTIONS = st.sampled_from(["punctuation:no_comma", "length_constraints:number_words", "nothing:such"])
OF_A_COLUMN = {
    "messages": MESSAGES,
    "teacher_prompt": MESSAGES,
    "prompt": st.one_of(TEXT, VALUE),
    "answer": st.one_of(TEXT, VALUE, st.lists(LEAF, max_size=3)),
    "instruction_id_list": st.one_of(st.lists(INSTRUCTIONS, max_size=2), VALUE),
    "kwargs": st.one_of(st.lists(st.dictionaries(st.sampled_from(["num_words", "relation"]), LEAF, max_size=2)), VALUE),
}
# Rows that training or some grader takes as they are: what is broken has to begin with something that works.
WORKING: tuple[dict[str, Any], ...] = (
    {"prompt": "How many are 3?", "answer": "3", "completion": "3."},
    {"prompt": "Which of A to F?", "answer": "B", "completion": "B"},
    {"messages": [{"role": "user", "content": "Who was it?"}], "answer": ["Ann", "Bob"], "completion": "Ann."},
    {"prompt": "Write.", "completion": "So.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
)


@st.composite
def touched(draw: st.DrawFn) -> dict[str, Any]:
    """A row that works, with at most one column of something else."""
    row = dict(draw(st.sampled_from(WORKING)))
    if draw(st.booleans()):
        name = draw(st.sampled_from([*row, *NAMES, *FURTHER]))
        row[name] = draw(OF_A_COLUMN.get(name, VALUE))
    return row


ROW = st.one_of(
    st.fixed_dictionaries({"messages": MESSAGES}, optional={"answer": TEXT, "completion": TEXT}),
    st.fixed_dictionaries({}, optional={name: OF_A_COLUMN.get(name, VALUE) for name in (*NAMES, *FURTHER)}),
    VALUE,
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "format": st.sampled_from(["gsm8k", "math500", "tulu3", "ifeval", "simplebench"]),
        "columns": st.sampled_from([{"prompt": "question"}, {"answer": "é"}, {"prompt": "answer", "answer": "prompt"}]),
        "prompt_template": st.sampled_from(["{prompt}", "Q: {prompt} {prompt} {x}", "\n{prompt}\0"]),
        "chat": st.booleans(),
        "limit": st.integers(1, 3),
        "over_long": st.sampled_from(["error", "skip", "split"]),
        "system_prompt": st.sampled_from(["Be brief.", ""]),
        "chat_template_kwargs": st.sampled_from(
            [
                {"enable_thinking": True},
                {"tokenize": False},
                {"return_tensors": "pt"},
                {"chat_template": "{{"},
                {"tools": 3},
            ]
        ),
        "teacher_of_task": st.sampled_from([{"default": "default"}, {"": "x"}]),
    },
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ModelText]:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "chat", bpe_tokenizer(chat=True))
    save_model(folder / "plain", bpe_tokenizer())
    return [load_text(str(folder / name), "student") for name in ("chat", "plain")]


def use(path: str, options: dict[str, Any], models: list[ModelText], grader: str, *, supervised: bool) -> None:
    """What a run does with rows before it loads weights; then what it does with them later on."""
    config = PromptsConfig(path=path, **options)
    model = models[0]
    if supervised:
        examples = supervised_examples(read_rows(config), config, model, model.end_ids)
        assert all(type(token) is int for example in examples for token in example.completion_ids)
        return
    prompts = load_prompts(config, model, {"default": models[1]}, max_completion_tokens=8)
    _check_answers(prompts, GRADERS[grader], config)
    for prompt in prompts:
        assert all(type(token) is int for token in prompt.prompt_ids)
        GRADERS[grader](prompt, "The answer is 3.", "stop")
        jsonl([{"text": prompt.text, "answer": prompt.answer, "metadata": dict(prompt.metadata)}]).encode()


def lines_of(rows: list[Any], *, ascii_only: bool) -> bytes:
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    return text.encode("utf-8", "surrogatepass")


ROWS = st.one_of(st.lists(touched(), min_size=1, max_size=3), st.lists(ROW, min_size=1, max_size=3))
CASE = st.tuples(
    st.one_of(st.just({}), OPTIONS),
    st.sampled_from(GRADER_NAMES),
    st.booleans(),
    st.sampled_from(["rows.jsonl", "rows.json"]),
)


@pytest.mark.filterwarnings("ignore")
@forms(120, 8_000)
def test_values(cases: int, long: bool, models: list[ModelText], tmp_path: Path) -> None:
    """Every shape of JSON where a row belongs, lone surrogates, NaN and huge numbers among them."""

    def body(case: Any) -> None:
        rows, ascii_only, (options, grader, supervised, name) = case
        path = tmp_path / name
        whole = name == "rows.json" and not ascii_only
        path.write_bytes(json.dumps(rows).encode() if whole else lines_of(rows, ascii_only=ascii_only))
        outcome("rows: values", lambda: use(str(path), options, models, grader, supervised=supervised))

    fuzz(st.tuples(ROWS, st.booleans(), CASE), body, cases, long=long)


@pytest.mark.filterwarnings("ignore")
@forms(80, 6_000)
def test_bytes(cases: int, long: bool, models: list[ModelText], tmp_path: Path) -> None:
    """Broken lines: cut, flipped, in other encodings, keys twice, brackets by the thousand."""
    good = lines_of(
        [{"prompt": f"How many are {i}?", "answer": str(i), "é": [1, {"a": 2.5}]} for i in range(3)], ascii_only=False
    )
    odd = (
        b'{"prompt": "a", "prompt": "b"}\n',
        b'{"prompt": "a", "x": {"y": 1, "y": 2}}\n',
        b'{"prompt": "a", "x": 1e999}\n',
        b'{"prompt": "' + b"w " * 150_000 + b'"}\n',
        b'{"prompt": "a", "x": ' + b"[" * 90 + b"]" * 90 + b"}\n",
        b'{"prompt": "a", "x": ' + b"[" * 500 + b"]" * 500 + b"}\n",
    )

    def body(case: Any) -> None:
        data, (options, grader, supervised, name) = case
        path = tmp_path / name
        path.write_bytes(data)
        outcome("rows: bytes", lambda: use(str(path), options, models, grader, supervised=supervised))

    data = st.one_of(broken_bytes(st.just(good)), broken_bytes(st.just(good)), st.sampled_from(odd))
    fuzz(st.tuples(data, CASE), body, cases, long=long)


@pytest.mark.filterwarnings("ignore")
@forms(60, 3_000)
def test_functions(
    cases: int, long: bool, models: list[ModelText], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's function yields what it likes, and fails where it likes."""
    module = type(sys)("fuzzed_rows")
    monkeypatch.setitem(sys.modules, "fuzzed_rows", module)
    keys = st.one_of(st.sampled_from(NAMES), st.integers(), st.none(), TEXT)
    odd = st.one_of(VALUE, st.binary(max_size=4), st.just(object()), st.just({1, 2}), st.complex_numbers())
    rows = st.one_of(ROWS, st.lists(st.one_of(ROW, st.dictionaries(keys, odd, max_size=4), odd), max_size=3))
    failures = st.sampled_from([None, None, None, KeyError("x"), ValueError(""), RecursionError(), OSError(5, "gone")])

    def body(case: Any) -> None:
        made, failure, (options, grader, supervised, _) = case

        def function() -> Any:
            yield from made
            if failure is not None:
                raise failure

        module.rows = function  # type: ignore[attr-defined]
        outcome("rows: functions", lambda: use("fuzzed_rows:rows", options, models, grader, supervised=supervised))

    fuzz(st.tuples(rows, failures, CASE), body, cases, long=long)


@pytest.mark.filterwarnings("ignore")
@forms(20, 2_000)
def test_parquet(
    cases: int, long: bool, models: list[ModelText], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables of every column type, and files that are none."""
    datasets = pytest.importorskip("datasets", reason="the `data` extra is not among the development packages")
    import pyarrow as pa  # pyright: ignore[reportMissingImports]
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]

    datasets.disable_progress_bars()
    columns = [
        pa.array(["How many?", "é\u2028", None]),
        pa.array([1, None, 2**62]),
        pa.array([0.5, float("nan"), float("inf")]),
        pa.array([b"\xff", b"", None]),
        pa.array([[{"role": "user", "content": "Hi"}], [], None]),
        pa.array([["3", "4"], [None], []]),
        pa.array([0, 1, 2], pa.timestamp("us")),
        pa.array([None, None, None]),
        pa.array([{"a": {"b": [1]}}, None, {"a": None}]),
        pa.array([True, False, None]),
    ]
    index = st.sampled_from(range(len(columns)))
    table = st.dictionaries(st.sampled_from([*NAMES, *FURTHER]), index, max_size=4)
    one_more = st.dictionaries(st.sampled_from(["answer", "completion", "task", "score", "é"]), index, max_size=1)
    good = tmp_path / "good.parquet"
    pq.write_table(pa.table({"prompt": columns[0].slice(0, 2), "score": columns[1].slice(0, 2)}), good)
    number = iter(range(10**9))

    def body(case: Any) -> None:
        (begin, made), data, (options, grader, supervised, _) = case
        # Names of their own: the library keeps what it read by name and time.
        path = tmp_path / f"rows{next(number)}.parquet"
        if data is None:
            pq.write_table(pa.table(begin | {name: columns[index] for name, index in made.items()}), path)
            note("rows: Parquet", "whole files")
        else:
            path.write_bytes(data)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / f"cache{path.stem}"))
        outcome("rows: Parquet", lambda: use(str(path), options, models, grader, supervised=supervised))

    data = st.one_of(st.none(), st.none(), broken_bytes(st.just(good.read_bytes())))
    texts, answers = pa.array(["How many are 3?", "Who?", "Why?"]), pa.array(["3", "4", "5"])
    begin = {"prompt": texts, "answer": answers, "completion": answers}
    contents = st.one_of(st.tuples(st.just({}), table), st.tuples(st.just(begin), one_more))
    fuzz(st.tuples(contents, data, CASE), body, cases, long=long)

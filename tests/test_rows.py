"""Reading rows: what counts as one, and where an error points."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from understudy import ConfigError
from understudy.config import RowsConfig
from understudy.rows import read_rows


def read(path: Path, text: str, **options: Any) -> list[Any]:
    path.write_text(text, encoding="utf-8")
    return read_rows(RowsConfig(path=str(path), **options))


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    rows = read(tmp_path / "r.jsonl", '\n{"prompt": "é"}\n   \n{"prompt": "b"}\r\n')
    assert [(row.index, row.where.rpartition("/")[2], row.values["prompt"]) for row in rows] == [
        (0, "r.jsonl:2", "é"),
        (1, "r.jsonl:4", "b"),
    ]


def test_a_last_line_needs_no_newline_and_text_may_hold_separators(tmp_path: Path) -> None:
    [row] = read(tmp_path / "r.jsonl", '{"prompt": "a\u2028b"}')
    assert row.values == {"prompt": "a\u2028b"}


def test_columns_are_renamed_and_swapped(tmp_path: Path) -> None:
    [row] = read(tmp_path / "r", '{"a": 1, "b": 2, "c": 3}', columns={"a": "b", "b": "a"})
    assert row.values == {"a": 2, "b": 1, "c": 3}


def test_limit_stops_reading(tmp_path: Path) -> None:
    """Lines after the limit are not even looked at."""
    assert len(read(tmp_path / "r.jsonl", '{"p": 1}\n{"p": 2}\nbroken', limit=2)) == 2


def test_parquet_without_datasets_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in (tmp_path / "r.parquet", Path("somebody/some-data")):
        with pytest.raises(ConfigError, match=r"understudy\[data\]"):
            read_rows(RowsConfig(path=str(path)))


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as those of a JSONL file: the same order, nested messages, absent values as None, a limit."""
    reason = "the `data` extra is not among the development packages"
    datasets = pytest.importorskip("datasets", reason=reason)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    talk = [{"role": "user", "content": "May?"}]
    path = tmp_path / "r.parquet"
    table = {"question": ["a", "é\u2028"], "messages": [talk, None], "n": [1, 2]}
    datasets.Dataset.from_dict(table).to_parquet(str(path))
    config = RowsConfig(path=str(path), columns={"prompt": "question"})
    one, two = read_rows(config)
    assert one.values == {"prompt": "a", "messages": talk, "n": 1}
    assert one.messages() == talk
    assert (two.index, two.where, two.text("prompt"), two.messages()) == (1, f"{path}[1]", "é\u2028", None)
    assert len(read_rows(config.model_copy(update={"limit": 1}))) == 1
    with pytest.raises(ConfigError, match="readable Parquet file"):
        read_rows(RowsConfig(path=str(tmp_path / "missing.parquet")))
    path.write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="readable Parquet file"):
        read_rows(RowsConfig(path=str(path)))


@pytest.mark.parametrize("value", ["", "  ", 3, ["a"], {"a": 1}])
def test_a_text_is_a_non_empty_string(value: Any, tmp_path: Path) -> None:
    import json

    [row] = read(tmp_path / "r.jsonl", json.dumps({"prompt": value}))
    with pytest.raises(ConfigError, match=r"r.jsonl:1"):
        row.text("prompt")
    assert row.text("other") is None


@pytest.mark.parametrize("value", [[], "hi", [{"role": "user"}], [{"role": 1, "content": "a"}], [["user", "a"]]])
def test_messages_have_roles_and_contents(value: Any, tmp_path: Path) -> None:
    import json

    [row] = read(tmp_path / "r.jsonl", json.dumps({"messages": value}))
    with pytest.raises(ConfigError, match=r"r.jsonl:1"):
        row.messages()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "x": NaN}', "NaN, which is no JSON"),
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' twice"),
        ('{"prompt": "a\\ud800"}', "half of a surrogate pair"),
        ('{"x": ' + "[" * 5000 + "]" * 5000 + "}", "more than 100 deep"),
        ('{"x": ' + "1" * 5000 + "}", "integer string"),
    ],
)
def test_lines_that_could_not_be_written_again(line: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        read(tmp_path / "r.jsonl", f'{{"prompt": "a"}}\n{line}\n')
    assert refused.value.where == f"{tmp_path / 'r.jsonl'}:2"
    assert said in refused.value.got
    assert refused.value.remedy == "fix or delete the line"


def test_a_byte_order_mark_begins_a_file_and_no_other_line(tmp_path: Path) -> None:
    [row] = read(tmp_path / "r.jsonl", '\ufeff{"prompt": "a"}')
    assert row.values == {"prompt": "a"}
    [row] = read(tmp_path / "r.json", '\ufeff[{"prompt": "a"}]')
    assert row.values == {"prompt": "a"}
    with pytest.raises(ConfigError, match=r"r.jsonl:2\n"):
        read(tmp_path / "r.jsonl", '{"prompt": "a"}\n\ufeff{"prompt": "a"}')


def test_a_list_in_a_file_is_as_strict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rows .*r.json\n.*the key 'a' twice"):
        read(tmp_path / "r.json", '[{"prompt": "x",\n "a": 1, "a": 2}]')


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("yield {'prompt': 'a'}; raise KeyError('lost')", "KeyError: 'lost'"),
        ("yield {1: 'a', 'b': 2}", "the keys [1, 'b']"),
        ("yield {'prompt': '\\ud800'}", "half of a surrogate pair"),
        ("yield 3", "a int"),
        ("raise ValueError", "ValueError"),
    ],
)
def test_functions_that_fail(body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"failing_rows_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"def rows():\n    {body}\n    yield {{}}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as refused:
        read_rows(RowsConfig(path=f"{name}:rows"))
    assert said in refused.value.got
    assert f"{name}:rows" in refused.value.where

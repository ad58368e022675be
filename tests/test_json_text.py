"""JSON from outside: what Python would read and nobody could use is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.json_text import check_texts, parsed

PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=10,
)


@given(PLAIN, st.booleans())
def test_what_is_written_is_read(value: Any, ascii_only: bool) -> None:
    assert parsed(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a": NaN}', "NaN, which is no JSON"),
        (b'{"a": -Infinity}', "-Infinity, which is no JSON"),
        (b'{"a": 1e999}', "the number 1e999, which is too large"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        (b'{"x": [{"a": 1, "a": 1}]}', "the key 'a' twice"),
        (b'{"a": "b\\ud800c"}', "half of a surrogate pair"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
        (b"[" * 101 + b"]" * 101, "more than 100 deep"),
        (b"[" * 100_000, "more than 100 deep"),
        (b"1" * 5000, "integer string"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": 1', "delimiter"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parsed(data)


def test_a_byte_order_mark_may_begin_a_file() -> None:
    assert parsed(b'\xef\xbb\xbf{"a": 1}', first=True) == {"a": 1}


def test_whole_pairs_and_nesting_are_fine() -> None:
    assert parsed(b'"\\ud83d\\ude00"') == "\U0001f600"
    assert parsed(b"[" * 100 + b"]" * 100) is not None
    assert len(parsed(b"[" + b"[]," * 500 + b"[]]")) == 501
    check_texts({"a": ["b", ("c", {"d": 1})]})
    with pytest.raises(ValueError, match="surrogate"):
        check_texts({"a": ["b", ("c", {"d\ud800": 1})]})

"""Folders named by what they are made from."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from understudy.experiments.cache import Cache, digest


def test_equal_content_has_equal_digests_whatever_its_order():
    assert digest({"a": 1, "b": [1, 2.5]}) == digest({"b": [1, 2.5], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert len(digest(None)) == 16


def test_a_folder_is_made_once_and_knows_its_key(tmp_path):
    calls = []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "content").write_text("made")

    cache = Cache(tmp_path)
    first = cache.folder("kind", {"n": 1}, make)
    assert cache.folder("kind", {"n": 1}, make) == first == tmp_path / "kind" / digest({"n": 1})
    assert len(calls) == 1
    assert (first / "content").read_text() == "made"
    assert json.loads((first / "key.json").read_text()) == {"n": 1}
    assert cache.folder("kind", {"n": 2}, make) != first


def test_what_a_killed_process_left_is_made_anew(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("killed")

    cache = Cache(tmp_path)
    with pytest.raises(RuntimeError, match="killed"):
        cache.folder("kind", {}, fail)
    assert not (tmp_path / "kind" / digest({})).exists()
    folder = cache.folder("kind", {}, lambda folder: (folder / "whole").write_text("whole"))
    assert sorted(path.name for path in folder.iterdir()) == ["key.json", "whole"]


def _slowly(root: Path, name: str) -> None:
    def make(folder: Path) -> None:
        time.sleep(0.3)
        (folder / "by").write_text(name)

    Cache(root).folder("kind", {}, make)


def test_of_two_processes_one_makes_and_the_other_waits(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_slowly, args=(tmp_path, name)) for name in ("one", "two")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "kind" / digest({}) / "by").read_text() in ("one", "two")

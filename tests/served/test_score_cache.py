"""Marks that are kept: to the last bit, within bounds, whoever is killed or writes beside."""

import json
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from understudy import score_cache
from understudy.errors import ConfigError, RunError
from understudy.score_cache import CachedTeacher, ScoreCache, folder_identity, from_bytes, score_key, to_bytes
from understudy.types import HiddenScores, SampledScores, ScoreKind, Scores, TokenSequence, TopkScores

ROOM = 10 * 2**20


class Counting:
    """A teacher that remembers what it was asked. Its marks are numbers that take all digits of a float64."""

    kinds: frozenset[ScoreKind] = frozenset({"sampled", "topk", "hidden"})
    temperature = 1.0
    max_topk = 7

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, list[tuple[tuple[int, ...], tuple[int, ...]]]]] = []
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        return [list(scores.teacher_logprobs) for scores in self.score(sequences, "sampled")]

    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0, **ids: Any) -> list[Scores]:
        shown = [(tuple(sequence.prompt_ids), tuple(sequence.completion_ids)) for sequence in sequences]
        self.asked.append((kind, topk, shown))
        return [self._scores(sequence, kind, topk) for sequence in sequences]

    def _scores(self, sequence: TokenSequence, kind: str, topk: int) -> Scores:
        logprobs = [-math.sqrt(sum(sequence.prompt_ids) + 0.1 + t * i) for t, i in enumerate(sequence.completion_ids)]
        if kind == "sampled":
            return SampledScores(logprobs)
        if kind == "hidden":
            return HiddenScores(logprobs, np.zeros((len(logprobs), 2)))  # type: ignore[arg-type]
        ids = [[i + j for j in range(topk)] for i in sequence.completion_ids]
        return TopkScores(logprobs, ids, [[-math.pi - j for j in row] for row in ids])


A, B, C = (TokenSequence([i], [i, 2 * i + 1]) for i in (1, 2, 3))


def key_of(i: int) -> bytes:
    return i.to_bytes(32, "big")


def value_of(i: int, length: int = 100) -> SampledScores:
    return SampledScores([-i - t / 7 for t in range(length)])


@pytest.mark.parametrize(
    "scores",
    [
        SampledScores([-0.1, -1e-300, -0.0, -1 / 3, 5e-324]),
        SampledScores([]),
        TopkScores([-0.5], [[3, 2**40]], [[-0.25, -1e308]]),
        TopkScores([], [], []),
    ],
)
def test_values_come_back_to_the_last_bit(scores: SampledScores):
    content = to_bytes(scores)
    assert content is not None
    assert repr(from_bytes(content)) == repr(scores)  # repr tells -0.0 from 0.0


@pytest.mark.parametrize(
    "scores",
    [
        SampledScores([float("nan")]),
        SampledScores([-1.0, float("-inf")]),
        TopkScores([-1.0, -1.0], [[1, 2], [3]], [[-1.0, -2.0], [-1.0]]),
        TopkScores([-1.0, -1.0], [[1]], [[-1.0]]),
        TopkScores([-1.0], [[1]], [[float("nan")]]),
        SampledScores([None]),  # type: ignore[list-item]
        HiddenScores([-1.0], np.zeros((1, 2))),  # type: ignore[arg-type]
    ],
)
def test_values_that_are_not_kept(scores: Scores, tmp_path: Path):
    assert to_bytes(scores) is None
    with ScoreCache(tmp_path / "c", max_bytes=ROOM) as cache:
        cache.put({key_of(1): scores, key_of(2): value_of(2)})
        assert len(cache) == 1


def test_a_key_is_everything_that_a_value_depends_on():
    keys = [
        score_key("t", "sampled", 0, TokenSequence([1, 2], [3])),
        score_key("u", "sampled", 0, TokenSequence([1, 2], [3])),
        score_key("t", "topk", 0, TokenSequence([1, 2], [3])),
        score_key("t", "topk", 1, TokenSequence([1, 2], [3])),
        score_key("t", "sampled", 0, TokenSequence([1], [2, 3])),
        score_key("t", "sampled", 0, TokenSequence([1, 2], [4])),
        score_key("t", "sampled", 0, TokenSequence([1, 2], [3, 0])),
    ]
    assert len(set(keys)) == len(keys)
    assert score_key("t", "sampled", 0, TokenSequence(np.array([1, 2], dtype=np.int32), (3,))) == keys[0]


def test_a_cached_run_equals_the_uncached_one(tmp_path: Path):
    sequences = [A, B, A, C]
    for kind, topk in (("sampled", 0), ("topk", 3)):
        plain = Counting().score(sequences, kind, topk=topk)
        for _ in range(2):
            with ScoreCache(tmp_path / "c.sqlite", max_bytes=ROOM) as cache:
                assert repr(CachedTeacher(Counting(), cache, "t").score(sequences, kind, topk=topk)) == repr(plain)


def test_the_teacher_is_asked_for_what_is_missing_once_and_in_order(tmp_path: Path):
    teacher = Counting()
    with ScoreCache(tmp_path / "c", max_bytes=ROOM) as cache:
        cached = CachedTeacher(teacher, cache, "t")
        cached.score([B, A, B], "sampled")
        assert teacher.asked == [("sampled", 0, [((2,), (2, 5)), ((1,), (1, 3))])]
        assert (cached.hits, cached.misses) == (1, 2)
        scores = cached.score([A, C, B, C], "sampled", topk=9)
        assert teacher.asked[1:] == [("sampled", 9, [((3,), (3, 7))])]
        assert [list(s.teacher_logprobs) for s in scores] == Counting().compute_logprobs([A, C, B, C])
        assert (cached.hits, cached.misses) == (4, 3)
        assert cached.compute_logprobs([C, A]) == Counting().compute_logprobs([C, A])
        assert (cached.hits, cached.misses, len(teacher.asked)) == (6, 3, 2)
        cached.score([A], "topk", topk=2)
        cached.score([A], "topk", topk=3)
        assert teacher.asked[2:] == [("topk", 2, [((1,), (1, 3))]), ("topk", 3, [((1,), (1, 3))])]
        CachedTeacher(teacher, cache, "other weights").score([A], "sampled")
        assert len(teacher.asked) == 5
        assert cached.score([], "sampled") == []


def test_other_kinds_and_attributes_are_the_teachers(tmp_path: Path):
    teacher = Counting()
    with ScoreCache(tmp_path / "c", max_bytes=ROOM) as cache:
        cached = CachedTeacher(teacher, cache, "t")
        for _ in range(2):
            assert isinstance(cached.score([A], "hidden")[0], HiddenScores)
        assert len(teacher.asked) == 2
        assert (cached.hits, cached.misses, len(cache)) == (0, 0, 0)
        assert (cached.kinds, cached.temperature, cached.max_topk) == (teacher.kinds, 1.0, 7)
        assert not hasattr(cached, "head")
        cached.close()
    assert teacher.closed


@pytest.mark.parametrize("logprobs", [[-1.0], [-1.0, float("nan")], [-1.0, 0.5]])
def test_marks_that_stop_a_run_are_not_kept(logprobs: list[float], tmp_path: Path):
    class Broken(Counting):
        def _scores(self, sequence: TokenSequence, kind: str, topk: int) -> Scores:
            return SampledScores(logprobs)

    with ScoreCache(tmp_path / "c", max_bytes=ROOM) as cache:
        [scores] = CachedTeacher(Broken(), cache, "t").score([A], "sampled")
        assert repr(scores.teacher_logprobs) == repr(logprobs)
        assert len(cache) == 0


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(score_cache.time, "time_ns", lambda: next(ticks))
    with ScoreCache(tmp_path / "c", max_bytes=200_000) as cache:
        for i in range(1, 400):
            cache.put({key_of(i): value_of(i)})  # about 1 KB each
            assert key_of(1) in cache.get([key_of(1)])  # used all the time
        kept = [i for i in range(1, 400) if cache.get([key_of(i)])]
    assert kept[0] == 1
    assert 80 < len(kept) < 200
    assert kept[1:] == list(range(400 - len(kept) + 1, 400)), "the newest, without a gap"
    assert (tmp_path / "c").stat().st_size < 250_000


def test_a_value_too_large_for_the_cache_does_not_push_others_out(tmp_path: Path):
    with ScoreCache(tmp_path / "c", max_bytes=200_000) as cache:
        cache.put({key_of(1): value_of(1)})
        cache.put({key_of(2): value_of(2, 20_000)})
        assert cache.get([key_of(1), key_of(2)]).keys() == {key_of(1)}


def test_a_smaller_bound_shrinks_the_file(tmp_path: Path):
    with ScoreCache(tmp_path / "c", max_bytes=ROOM) as cache:
        cache.put({key_of(i): value_of(i) for i in range(1000)})
    assert (tmp_path / "c").stat().st_size > 800_000
    with ScoreCache(tmp_path / "c", max_bytes=200_000) as cache:
        assert 80 < len(cache) < 200
    assert (tmp_path / "c").stat().st_size < 250_000


def test_more_keys_than_sqlite_takes_at_once(tmp_path: Path):
    values = {key_of(i): value_of(i, 3) for i in range(1200)}
    with ScoreCache(tmp_path / "c", max_bytes=ROOM) as cache:
        cache.put(values)
        assert cache.get([*values, key_of(5000)]) == values


@pytest.mark.parametrize("damage", ["value", "digest", "swapped"])
def test_damaged_values_are_asked_for_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    teacher = Counting()
    with ScoreCache(tmp_path / "c", max_bytes=ROOM) as cache:
        CachedTeacher(teacher, cache, "t").score([A, B, C], "sampled")
    with sqlite3.connect(tmp_path / "c") as db:
        if damage == "swapped":
            (value, digest) = db.execute("SELECT value, digest FROM scores LIMIT 1").fetchone()
            db.execute("UPDATE scores SET value = ?, digest = ?", (value, digest))
        else:
            db.execute(f"UPDATE scores SET {damage} = CAST('rubbish' AS BLOB)")
    db.close()
    damaged = 2 if damage == "swapped" else 3
    caplog.set_level(logging.WARNING)
    with ScoreCache(tmp_path / "c", max_bytes=ROOM) as cache:
        cached = CachedTeacher(teacher, cache, "t")
        assert [list(s.teacher_logprobs) for s in cached.score([A, B, C], "sampled")] == Counting().compute_logprobs(
            [A, B, C]
        )
        assert cached.misses == damaged
        assert cached.score([A, B, C], "sampled")
        assert cached.misses == damaged
    assert [record.message for record in caplog.records] == [
        f"cache {tmp_path / 'c'}: {damaged} damaged values are left out and asked for again"
    ]


def _other_database(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE other (x)")
    db.close()


def _other_program(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA application_id = 77")
        db.execute("CREATE TABLE other (x)")
    db.close()


def _other_version(path: Path) -> None:
    with ScoreCache(path, max_bytes=ROOM) as cache:
        cache._db.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda path: path.write_text("not a database, but long enough to look like a file of some kind" * 20),
            "not a",
        ),
        (lambda path: path.mkdir(), "unable to open"),
        (lambda path: path.parent.rmdir() or path.parent.write_text(""), "exists|directory"),
        (_other_database, "another program"),
        (_other_program, "another program"),
        (_other_version, "another version"),
    ],
)
def test_files_that_cannot_be_a_cache(spoil: Any, message: str, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "c"
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ConfigError, match=message) as caught:
        ScoreCache(path, max_bytes=ROOM)
    assert caught.value.where == f"cache {path}"
    assert before is None or path.read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_folder(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cache"):
        ScoreCache(tmp_path / "c", max_bytes=ROOM)
    tmp_path.chmod(0o700)


def test_a_lock_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(score_cache, "BUSY_SECONDS", 0.05)
    with ScoreCache(tmp_path / "c", max_bytes=ROOM) as cache:
        holder = sqlite3.connect(tmp_path / "c", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunError, match="database is locked"):
            cache.put({key_of(1): value_of(1)})
        with pytest.raises(ConfigError, match="database is locked"):
            ScoreCache(tmp_path / "c", max_bytes=ROOM)
        holder.execute("ROLLBACK")
        holder.close()
        cache.put({key_of(1): value_of(1)})
        assert len(cache) == 1


def test_a_file_that_breaks_while_in_use(tmp_path: Path):
    with ScoreCache(tmp_path / "c", max_bytes=ROOM) as cache:
        cache.put({key_of(1): value_of(1)})
        cache._db.execute("DROP TABLE scores")
        with pytest.raises(RunError, match=r"no such table: scores; expected to read and write it"):
            cache.get([key_of(1)])


def test_threads_share_a_cache(tmp_path: Path):
    with ScoreCache(tmp_path / "c", max_bytes=ROOM) as cache:

        def work(start: int) -> None:
            for i in range(start, start + 20):
                cache.put({key_of(i): value_of(i)})
                assert cache.get([key_of(i)]) == {key_of(i): value_of(i)}

        threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(cache) == 60


WRITER = textwrap.dedent(
    """
    import sys
    from understudy.score_cache import ScoreCache
    from understudy.types import SampledScores

    path, start, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with ScoreCache(path, max_bytes=10 * 2**20) as cache:
        for i in range(start, start + count):
            cache.put({i.to_bytes(32, "big"): SampledScores([-i - t / 7 for t in range(100)])})
            print(i, flush=True)
    """
)


def _writer(path: Path, start: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(start), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_process_that_is_killed_loses_nothing_that_it_had_put(tmp_path: Path):
    with _writer(tmp_path / "c", 0, 10**6) as process:
        assert process.stdout is not None
        for _ in range(50):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split("\n")  # what it had said before it died; the last line may be cut
    with ScoreCache(tmp_path / "c", max_bytes=ROOM) as cache:
        assert cache._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        count = len(cache)
        assert 49 + len(rest) - 1 <= count <= 50 + len(rest)
        assert cache.get([key_of(i) for i in range(count)]) == {key_of(i): value_of(i) for i in range(count)}


def test_processes_write_side_by_side(tmp_path: Path):
    """They start on a file that is not there yet."""
    processes = [_writer(tmp_path / "c", 1000 * n, 50) for n in range(3)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    with ScoreCache(tmp_path / "c", max_bytes=ROOM) as cache:
        keys = [1000 * n + i for n in range(3) for i in range(50)]
        assert cache.get([key_of(i) for i in keys]) == {key_of(i): value_of(i) for i in keys}


def _checkpoint(folder: Path, *, weights: bytes = b"w", config: str = "{}") -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(config)
    return folder


def test_a_folder_is_known_by_its_weights_and_configuration(tmp_path: Path):
    first = folder_identity(_checkpoint(tmp_path / "a"))
    same = _checkpoint(tmp_path / "b")
    (same / "README.md").write_text("other text")
    (same / "tokenizer.json").write_text("{}")
    (same / "trainer_state.pt").write_bytes(b"state")
    assert folder_identity(same) == first
    others = [
        folder_identity(_checkpoint(tmp_path / "c", weights=b"x")),
        folder_identity(_checkpoint(tmp_path / "d", config="{ }")),
        folder_identity(tmp_path / "a", "bfloat16"),
        folder_identity(tmp_path / "a", "bfloat16", "0.7"),
    ]
    (same / "modeling.py").write_text("")
    assert len({first, *others, folder_identity(same)}) == 6


def test_adapters_are_known_by_their_base_too(tmp_path: Path):
    def adapters(name: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"a")
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        return folder_identity(folder)

    base = _checkpoint(tmp_path / "base")
    first = adapters("one")
    assert adapters("two") == first
    (base / "model.safetensors").write_bytes(b"trained further")
    assert adapters("three") != first


def test_folders_that_have_no_weights(tmp_path: Path):
    with pytest.raises(ConfigError, match="no weight files"):
        folder_identity(tmp_path)
    with pytest.raises(ConfigError, match="no folder, and no downloaded model"):
        folder_identity(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no folder, and no downloaded model"):
        folder_identity("nobody/nothing-of-that-name")


def test_a_downloaded_model_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--us--teacher" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    _checkpoint(snapshot)
    (tmp_path / "models--us--teacher" / "refs").mkdir()
    (tmp_path / "models--us--teacher" / "refs" / "main").write_text("0123")
    assert folder_identity("us/teacher") == folder_identity(snapshot)

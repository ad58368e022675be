"""A teacher's marks kept on disk, for runs that ask for the same again: the same to the last bit.

One SQLite file, which any number of processes share and any of them may be killed at any time. A value is found by what
it depends on: the teacher's identity, the kind of score, and the tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from understudy.backends.protocols import Teacher
from understudy.errors import ConfigError, RunError
from understudy.model_files import adapter_base
from understudy.types import SampledScores, ScoreKind, Scores, TokenSequence, TopkScores

log = logging.getLogger("understudy")

APPLICATION_ID = 0x75536373  # marks the file as one of these: "uScs"
VERSION = 1  # of tables, keys and values
BUSY_SECONDS = 60.0  # others write for milliseconds; a lock that stays is somebody's who stands still
KEYS_AT_ONCE = 500  # SQLite takes 999 parameters in its oldest builds
ROW_BYTES = 160  # about what a row takes beside its value
LOG_BYTES = 64 * 2**20  # what the write-ahead log shrinks back to

TABLES = (
    "CREATE TABLE scores (key BLOB PRIMARY KEY, value BLOB NOT NULL, digest BLOB NOT NULL, used INTEGER NOT NULL)",
    "CREATE INDEX scores_by_use ON scores (used)",
)

# Files of a checkpoint that its marks depend on.
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
OTHER_FILES = ("config.json", "adapter_config.json", "*.index.json", "*.py")


def score_key(identity: str, kind: ScoreKind, topk: int, sequence: TokenSequence) -> bytes:
    """What a value is found by, 32 bytes."""
    prompt, completion = (np.asarray(ids, dtype="<i8") for ids in (sequence.prompt_ids, sequence.completion_ids))
    head = json.dumps([VERSION, identity, kind, topk, len(prompt), len(completion)]).encode()
    return hashlib.sha256(head + b"\0" + prompt.tobytes() + completion.tobytes()).digest()


def to_bytes(scores: Scores) -> bytes | None:
    """float64 as they are. None: not for the cache, as they are of another kind, or none that a step would take."""
    if not isinstance(scores, SampledScores | TopkScores):
        return None
    try:
        arrays: dict[str, np.ndarray] = {"logprobs": np.asarray(scores.teacher_logprobs, dtype=np.float64)}
        if isinstance(scores, TopkScores):
            arrays["ids"] = np.asarray(scores.ids, dtype=np.int64)
            arrays["topk_logprobs"] = np.asarray(scores.logprobs, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):  # rows of several lengths, for one
        return None
    if len({len(array) for array in arrays.values()}) > 1 or not all(np.isfinite(a).all() for a in arrays.values()):
        return None
    return save(arrays)


def from_bytes(content: bytes) -> Scores:
    """The inverse of ``to_bytes``."""
    arrays = {name: array.tolist() for name, array in load(content).items()}
    if "ids" in arrays:
        return TopkScores(arrays["logprobs"], arrays["ids"], arrays["topk_logprobs"])
    return SampledScores(arrays["logprobs"])


KEPT_KINDS = frozenset[ScoreKind]({"sampled", "topk"})


def _digest(key: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(key + content, digest_size=16).digest()


class ScoreCache:
    """Values by key, at most ``max_bytes`` of them: what has not been used for longest goes first. Threads may share
    it; each process opens its own.

    Raises:
        ConfigError: the file cannot be written, is locked for good, or is something else.
    """

    def __init__(self, path: str | Path, *, max_bytes: int) -> None:
        self.path = Path(path)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._warned = False
        with self._explained(self._cannot_open):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Scores]:
        """What there is of ``keys``; a damaged value counts as absent.

        Raises:
            RunError: the file cannot be read any more.
        """
        found: dict[bytes, Scores] = {}
        damaged: list[bytes] = []
        with self._lock, self._explained(self._broken):
            for key, content, digest in self._rows(keys):
                try:
                    if _digest(key, content) != digest:
                        raise ValueError
                    found[key] = from_bytes(content)
                except (ValueError, KeyError, TypeError, SafetensorError):
                    damaged.append(key)
            if found or damaged:
                with self._writing():
                    now = self._now()
                    self._db.executemany("UPDATE scores SET used = ? WHERE key = ?", [(now, key) for key in found])
                    self._db.executemany("DELETE FROM scores WHERE key = ?", [(key,) for key in damaged])
        if damaged and not self._warned:
            self._warned = True
            log.warning("cache %s: %d damaged values are left out and asked for again", self.path, len(damaged))
        return found

    def _rows(self, keys: Sequence[bytes]) -> Iterator[tuple[bytes, bytes, bytes]]:
        for start in range(0, len(keys), KEYS_AT_ONCE):
            some = keys[start : start + KEYS_AT_ONCE]
            marks = ",".join("?" * len(some))
            yield from self._db.execute(f"SELECT key, value, digest FROM scores WHERE key IN ({marks})", some)

    def put(self, values: Mapping[bytes, Scores]) -> None:
        """Keep those that are fit for it (``to_bytes``) and leave room for others.

        Raises:
            RunError: the file cannot be written any more.
        """
        contents = {key: content for key, scores in values.items() if (content := to_bytes(scores)) is not None}
        rows = [
            (key, content, _digest(key, content))
            for key, content in contents.items()
            if len(content) <= self._max_bytes // 2
        ]
        if rows:
            with self._lock, self._explained(self._broken), self._writing():
                now = self._now()
                self._db.executemany(
                    "INSERT OR REPLACE INTO scores (key, value, digest, used) VALUES (?, ?, ?, ?)",
                    [(*row, now) for row in rows],
                )
                self._evict()

    def _now(self) -> int:
        """A time after all that are in the file: a clock that was set back must not make the newest look oldest."""
        [(newest,)] = self._db.execute("SELECT MAX(used) FROM scores")
        return max(time.time_ns(), (newest or 0) + 1)

    def __len__(self) -> int:
        with self._lock, self._explained(self._broken):
            return self._db.execute("SELECT COUNT(*) FROM scores").fetchone()[0]

    def _prepare(self) -> None:
        """A new file gets its tables; one that has others is refused; one that has grown too large shrinks."""
        self._check_marks()  # before anything is written to what may be somebody else's
        self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        self._log_ahead()
        self._db.execute("PRAGMA synchronous = NORMAL")  # with the log, a process may die at any time
        self._db.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
        with self._writing():
            if not self._check_marks():
                for statement in TABLES:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {VERSION}")
            self._evict()
        if self._pragma("page_count") * self._pragma("page_size") > self._max_bytes:
            self._db.executescript("PRAGMA incremental_vacuum")  # execute stops after the first page

    def _check_marks(self) -> bool:
        """Whether the file has our tables; False: it is new."""
        if self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0:
            return False
        if self._pragma("application_id") != APPLICATION_ID or self._pragma("user_version") != VERSION:
            raise sqlite3.DatabaseError("a database of another program, or of another version of this one")
        return True

    def _log_ahead(self) -> None:
        """Switch the write-ahead log on. SQLite does not wait for others who do the same at this moment."""
        end = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL").fetchall()
                return
            except sqlite3.OperationalError:
                if time.monotonic() > end or self._db.in_transaction:
                    raise
                time.sleep(0.01)

    def _evict(self) -> None:
        """Free pages until the rest is small enough; the file keeps them for what comes next."""
        while (excess := self._used_bytes() - self._max_bytes) > 0:
            oldest: list[tuple[bytes]] = []
            for key, size in self._db.execute("SELECT key, LENGTH(value) FROM scores ORDER BY used, key"):
                oldest.append((key,))
                excess -= size + ROW_BYTES
                if excess <= 0:
                    break
            if not oldest:
                return
            self._db.executemany("DELETE FROM scores WHERE key = ?", oldest)

    def _used_bytes(self) -> int:
        return (self._pragma("page_count") - self._pragma("freelist_count")) * self._pragma("page_size")

    def _pragma(self, name: str) -> int:
        return self._db.execute(f"PRAGMA {name}").fetchone()[0]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """All or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _explained(self, explain: Callable[[Exception], Exception]) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise explain(error) from error

    def _cannot_open(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"cache {self.path}",
            got=str(error),
            expected="a file of cached scores, or a place where one can be made",
            remedy="name another file; remove this one if nothing uses it",
        )

    def _broken(self, error: Exception) -> RunError:
        return RunError(
            f"cache {self.path}: {error}; expected to read and write it. Look after the disk, or remove the file, "
            "which costs the marks in it and nothing else; then resume"
        )


class CachedTeacher:
    """A teacher that is asked only for what the cache does not have, and for each sequence once.

    Kinds other than "sampled" and "topk" go to ``teacher`` as they are: hidden states would fill a disk, and chosen ids
    do not come again. ``identity`` names all that marks depend on besides tokens: weights, dtype, temperature.
    ``hits`` and ``misses`` count sequences. Any other attribute is the teacher's.

    Raises:
        RunError: the file cannot be read or written any more; and as ``teacher`` does.
    """

    def __init__(self, teacher: Teacher, cache: ScoreCache, identity: str) -> None:
        self._teacher = teacher
        self._cache = cache
        self._identity = identity
        self.kinds = teacher.kinds
        self.hits = self.misses = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._teacher, name)

    def close(self) -> None:
        """Close the cache, and the teacher where it can be closed."""
        self._cache.close()
        close = getattr(self._teacher, "close", None)
        if close is not None:
            close()

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """See ``Teacher.compute_logprobs``."""
        return [list(scores.teacher_logprobs) for scores in self.score(sequences, "sampled")]

    def score(
        self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0, **other: Any
    ) -> list[Scores]:
        """See ``Teacher.score``."""
        if kind not in KEPT_KINDS:
            return self._teacher.score(sequences, kind, topk=topk, **other)
        keys = [score_key(self._identity, kind, topk if kind == "topk" else 0, sequence) for sequence in sequences]
        wanted = dict(zip(keys, sequences, strict=True))
        values = self._cache.get(list(wanted))
        missing = {key: sequence for key, sequence in wanted.items() if key not in values}
        if missing:
            answers = self._teacher.score(list(missing.values()), kind, topk=topk, **other)
            fresh = dict(zip(missing, answers, strict=True))
            self._cache.put({key: scores for key, scores in fresh.items() if _sound(scores, missing[key])})
            values |= fresh
        self.misses += len(missing)
        self.hits += len(sequences) - len(missing)
        return [values[key] for key in keys]


def _sound(scores: Scores, sequence: TokenSequence) -> bool:
    """Whether a step would take them: what stops a run must not stop the next one too."""
    logprobs = scores.teacher_logprobs
    return len(logprobs) == len(sequence.completion_ids) and all(value <= 1e-3 for value in logprobs)


def folder_identity(model: str | Path, *settings: str) -> str:
    """A hash of a checkpoint's weights and configuration, of its base's where it is a folder of adapters, and of what
    else marks depend on (``settings``: dtype, temperature). ``model``: a folder, or the hub id of one on this machine.

    Raises:
        ConfigError: no folder, or one without weights.
    """
    folder = _folder(str(model))
    weights = [file for pattern in WEIGHT_FILES for file in folder.glob(pattern)]
    if not weights:
        raise ConfigError(
            f"model {model}",
            got="no weight files" if folder.is_dir() else "no folder, and no downloaded model of that name",
            expected="a folder with weights (*.safetensors), whose contents tell this teacher from others",
            remedy="point at a checkpoint's folder, or leave the cache out",
        )
    digests: dict[str, str] = {}
    for file in [*weights, *(other for pattern in OTHER_FILES for other in folder.glob(pattern))]:
        with file.open("rb") as content:
            digests[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    base = adapter_base(folder)
    parts = [digests, folder_identity(base) if base is not None else None, list(settings)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _folder(model: str) -> Path:
    """Where transformers reads a model from; for a hub id, the snapshot it has downloaded."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return Path(model)

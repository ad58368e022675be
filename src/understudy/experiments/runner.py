"""Runs claims: searches, then pipelines, a few at a time in processes of their own; nothing is done twice."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from understudy.checkpoints import write_json
from understudy.errors import RunError
from understudy.experiments.board import Board
from understudy.experiments.cache import Cache, digest
from understudy.experiments.claim import Claim
from understudy.experiments.claims import load_claim
from understudy.experiments.code import claim_hash
from understudy.experiments.lab import Lab
from understudy.experiments.search import Search
from understudy.experiments.worlds import SCALES, ScaleName


@dataclass(frozen=True)
class Task:
    """One arm's search, or one pipeline. ``code``: hash of what results come from. ``rates``: what the searches
    chose."""

    claim: str
    code: str
    scale: ScaleName
    cache: Path
    arm: str | None = None
    pipeline: int = 0
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.claim} {f'search {self.arm}' if self.arm else f'pipeline {self.pipeline + 1}'}"

    @property
    def log(self) -> Path:
        return self.cache / "logs" / f"{self.name.replace(' ', '-')}.log"


@dataclass(frozen=True)
class Results:
    """All that a claim's runs found: ``searches`` by arm, a record per pipeline, and their seconds."""

    searches: Mapping[str, Search]
    records: Sequence[Mapping[str, Any]]
    seconds: Mapping[str, float]


def config_hash(claim: Claim, scale: ScaleName) -> str:
    """Of everything that is set: the claim's settings, its arms, and the scale of the worlds."""
    return digest([asdict(claim.settings[scale]), list(claim.arms), asdict(SCALES[scale])])


def perform(task: Task) -> dict[str, Any]:
    """The task's record, with the seconds it took when it was made."""
    claim = load_claim(task.claim)
    if claim_hash(task.claim) != task.code:
        raise RunError(f"{task.name}: its code has changed since the command began; start it again")
    cache = Cache(task.cache)
    lab = Lab(cache, SCALES[task.scale], task.pipeline)
    settings = claim.settings[task.scale]
    key = {
        "code": task.code,
        "config": config_hash(claim, task.scale),
        "arm": task.arm,
        "pipeline": task.pipeline,
        "rates": dict(task.rates),
    }

    def make(folder: Path) -> None:
        start = time.monotonic()
        if task.arm is not None:
            found: Any = claim.search(lab, settings, task.arm).scores
        else:
            found = claim.pipeline(lab, settings, task.rates)
        write_json(folder / "record.json", {"found": found, "seconds": time.monotonic() - start})

    return json.loads((cache.folder("records", key, make) / "record.json").read_text(encoding="utf-8"))


def run_claims(
    names: Sequence[str], *, pipelines: int, scale: ScaleName, cache: Path, slots: int
) -> Iterator[tuple[str, Results]]:
    """Each claim's results as soon as all its parts are there. Raises RunError when one fails; a further call goes on
    after what was finished."""
    (cache / "logs").mkdir(parents=True, exist_ok=True)
    stages = {name: _Stage(name, pipelines, scale, cache) for name in names}
    board = Board({name: len(stage.claim.arms) + pipelines for name, stage in stages.items()})
    workers = [_Worker() for _ in range(slots)]
    try:
        with board:
            while any(not stage.finished for stage in stages.values()):
                for worker in workers:
                    if worker.task is None and (task := _next(stages)):
                        worker.begin(task)
                board.show([(w.task.name, w.task.log, w.started) for w in workers if w.task])
                for worker in _answered(workers):
                    task, record = worker.take()
                    stage = stages[task.claim]
                    stage.keep(task, record)
                    board.done(task.claim, time.monotonic() - worker.started)
                    if stage.finished:
                        yield task.claim, stage.results()
    finally:
        for worker in workers:
            worker.end()


class _Stage:
    """How far a claim is: which tasks wait, which are out, what came back."""

    def __init__(self, name: str, pipelines: int, scale: ScaleName, cache: Path) -> None:
        self.claim = load_claim(name)
        self._name, self._pipelines, self._cache = name, pipelines, cache
        self._scale: ScaleName = scale
        self._out: set[str] = set()
        self._back: dict[str, dict[str, Any]] = {}
        self._code = claim_hash(name)
        self._searches = [Task(name, self._code, scale, cache, arm=arm) for arm in self.claim.arms]

    @property
    def finished(self) -> bool:
        return len(self._back) == len(self._searches) + self._pipelines

    def next(self) -> Task | None:
        """A task that can start now."""
        tasks = self._searches
        if all(task.name in self._back for task in self._searches):
            tasks = self._pipeline_tasks()
        task = next((task for task in tasks if task.name not in self._out), None)
        if task:
            self._out.add(task.name)
        return task

    def _pipeline_tasks(self) -> list[Task]:
        rates = {arm: search.chosen for arm, search in self._found().items()}
        return [
            Task(self._name, self._code, self._scale, self._cache, pipeline=number, rates=rates)
            for number in range(self._pipelines)
        ]

    def _found(self) -> dict[str, Search]:
        return {
            str(task.arm): Search([(rate, score) for rate, score in self._back[task.name]["found"]])
            for task in self._searches
        }

    def keep(self, task: Task, record: dict[str, Any]) -> None:
        self._back[task.name] = record

    def results(self) -> Results:
        records = [self._back[task.name]["found"] for task in self._pipeline_tasks()]
        return Results(self._found(), records, {name: entry["seconds"] for name, entry in sorted(self._back.items())})


def _next(stages: Mapping[str, _Stage]) -> Task | None:
    """In the order of claims; a later claim's work fills the time in which an earlier one waits."""
    return next((task for stage in stages.values() if (task := stage.next())), None)


class _Worker:
    """A process that performs tasks one after another: Python and torch load once."""

    def __init__(self) -> None:
        self.task: Task | None = None
        self.started = 0.0
        self.connection: Connection | None = None
        self._process: SpawnProcess | None = None

    def begin(self, task: Task) -> None:
        if self.connection is None:
            # Two processes of one thread each finish more than one process of two.
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            context = multiprocessing.get_context("spawn")
            self.connection, far = context.Pipe()
            self._process = context.Process(target=_serve, args=(far,), daemon=True)
            self._process.start()
            far.close()
        self.task, self.started = task, time.monotonic()
        self.connection.send(task)

    def take(self) -> tuple[Task, dict[str, Any]]:
        """The finished task and its record. Raises RunError for one that failed."""
        assert self.connection is not None
        assert self.task is not None
        task, self.task = self.task, None
        try:
            record, error = self.connection.recv()
        except EOFError:
            raise RunError(f"{task.name}: its process died (out of memory?); log: {task.log}") from None
        if error:
            raise RunError(
                f"{task.name} failed; the same command goes on after what was finished. Log: {task.log}\n{error}"
            )
        return task, record

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _answered(workers: Sequence[_Worker]) -> list[_Worker]:
    busy = {worker.connection: worker for worker in workers if worker.task and worker.connection}
    return [busy[connection] for connection in wait(list(busy), timeout=1.0) if isinstance(connection, Connection)]


def _serve(connection: Connection) -> None:
    """A worker's life. A Ctrl-C in the terminal reaches the main process only, which ends its workers itself: a run
    that saw it would stop early and look finished."""
    os.setsid()
    while True:
        try:
            task = connection.recv()
        except EOFError:  # the main process is gone
            return
        with (
            task.log.open("w", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            try:
                answer: tuple[Any, str] = perform(task), ""
            except Exception:
                traceback.print_exc()
                answer = None, "".join(traceback.format_exception_only(*sys.exc_info()[:2]))
        connection.send(answer)

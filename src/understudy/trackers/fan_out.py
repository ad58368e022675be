"""Metrics, samples and alarms to every configured tracker. The run's folder is the truth: no tracker can hold a run up,
fail it, or cost it a row."""

from __future__ import annotations

import json
import logging
import math
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from understudy.checkpoints import write_json
from understudy.config import RunConfig
from understudy.errors import RunError
from understudy.runs import flat
from understudy.trackers.protocol import TrackedRun, Tracker

log = logging.getLogger("understudy")

ID_FILE = "tracking.json"
# Messages that may wait for a tracker: some minutes of short steps. One that is further behind does not answer.
MOST_WAITING = 2000
# What a run that is done waits for the last uploads, and what one that was stopped, or failed, does: whoever stopped it
# may kill it soon, and --resume sends what is missing.
FINISHED_SECONDS, CUT_SECONDS = 120.0, 10.0
# Addresses and the names of variables that hold keys say nothing about a run's numbers.
_LEFT_OUT = re.compile(r"(^|\.)(url|api_key_env|weights_dir|cache|output_dir)$|^tracking\.")

Opener = Callable[[TrackedRun], Tracker]


def opener(name: str) -> Opener:
    """What opens the tracker ``name``. Raises ImportError where its package is not installed."""
    return import_module(f"understudy.trackers.{name}_tracker").open_run


class Trackers:
    """All trackers of a run, each in a thread of its own; inside a ``with`` block, whose end waits for them. Without
    any, nothing happens.

    ``goes_on_after``: the step after which a run goes on, None for a new one.
    """

    def __init__(
        self,
        run: RunConfig,
        folder: Path,
        *,
        goes_on_after: int | None = None,
        openers: Mapping[str, Opener] | None = None,
    ) -> None:
        self._config, self._folder, self._run, self._goes_on_after = run.tracking, folder, run, goes_on_after
        self._openers = openers or {}
        self._workers: list[_Worker] = []
        self._newest = goes_on_after or 0
        self._told_of_gaps = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let them finish, for a while."""
        finished = self._newest >= self._run.optim.num_steps
        end = time.monotonic() + (FINISHED_SECONDS if finished else CUT_SECONDS)
        for worker in self._workers:
            worker.end(finished)
        try:
            for worker in self._workers:
                worker.wait(end - time.monotonic())
        except KeyboardInterrupt:  # a Ctrl-C ends the waiting alone: the run is over
            for worker in self._workers:
                worker.drop_if_busy("it was not waited for")
        self._workers = []

    def start(self, history: Sequence[Mapping[str, Any]] = ()) -> None:
        """Open them. One that lacks rows of ``history`` (it failed, or is new) is sent these first."""
        if not self._config.trackers:
            return
        run = self._tracked()
        self._tell_of_gaps(history)
        messages = [_row_message(row) for row in history]
        for name in dict.fromkeys(self._config.trackers):
            known = self._openers.get(name)
            worker = _Worker(name, (lambda known=known: known) if known else (lambda name=name: opener(name)), run)
            worker.start(messages)
            self._workers.append(worker)

    def log(self, row: Mapping[str, Any]) -> None:
        """A step's row, once its evaluation is in it."""
        self._newest = int(row["step"])
        if self._workers:
            self._tell_of_gaps([row])
        for worker in self._workers:
            worker.send(_row_message(row))

    def _tell_of_gaps(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Once per run: which metric is the first that no tracker gets."""
        gaps = ((row["step"], key, value) for row in rows for key, value in row.items() if _is_number(value))
        gap = next((gap for gap in gaps if not math.isfinite(gap[2])), None)
        if gap is not None and not self._told_of_gaps:
            self._told_of_gaps = True
            log.warning("step %d: %s is %s; trackers are sent finite numbers only, here and later", *gap)

    def log_alarm(self, alarm: Mapping[str, Any]) -> None:
        """A guard's alarm, as text."""
        text = f"**step {alarm['step']}, {alarm['guard']} ({alarm['action']})**\n\n{alarm['words']}.\n\n"
        text += f"Likely: {alarm['causes']}."
        for worker in self._workers:
            worker.send(lambda tracker: tracker.log_text(alarm["step"], f"alarms/{alarm['guard']}", text))

    def log_samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """The first few of a step's stored rollouts, as text."""
        chosen = records[: self._config.samples]
        if self._workers and chosen:
            text = "\n\n".join(sample_markdown(record) for record in chosen)
            for worker in self._workers:
                worker.send(lambda tracker: tracker.log_text(step, "rollouts", text))

    def _tracked(self) -> TrackedRun:
        name = self._config.run_name or default_name(self._folder)
        config = {key: _plain(value) for key, value in flat(self._run).items() if not _LEFT_OUT.search(key)}
        return TrackedRun(
            _run_id(self._folder / ID_FILE), self._config.project, name, self._folder, config, self._goes_on_after
        )


class _Worker:
    """One tracker and the thread that calls it. The first failure is its last: it is told once, and nothing more is
    sent."""

    def __init__(self, name: str, find: Callable[[], Opener], run: TrackedRun) -> None:
        self._name, self._find, self._run = name, find, run
        self._messages: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MOST_WAITING)
        self._finished = self._dropped = False
        self._telling = threading.Lock()
        # Not the thread's join: a Ctrl-C in the middle of one makes Python 3.11 take the thread for ended.
        self._ended = threading.Event()
        # A daemon: a tracker that never answers must not keep a finished run from ending.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)

    def start(self, history: Sequence[Callable[[Tracker], None]]) -> None:
        self._history = history
        self._thread.start()

    def send(self, message: Callable[[Tracker], None]) -> None:
        if self._dropped:
            return
        try:
            self._messages.put_nowait(message)
        except queue.Full:
            self._drop(f"it is {MOST_WAITING} messages behind")

    def end(self, finished: bool) -> None:
        self._finished = finished
        if not self._dropped:
            try:
                self._messages.put_nowait(None)
            except queue.Full:
                self._drop(f"it is {MOST_WAITING} messages behind")

    def wait(self, seconds: float) -> None:
        if not self._dropped:
            self._ended.wait(max(0.0, seconds))
        self.drop_if_busy("it does not finish")
        with self._telling:  # whoever drops it has said so
            pass

    def drop_if_busy(self, reason: str) -> None:
        if not self._ended.is_set():
            self._drop(reason)

    def _work(self) -> None:
        try:
            tracker = self._find()(self._run)
            for message in self._history:
                message(tracker)
            while not self._dropped and (message := self._messages.get()) is not None:
                message(tracker)
            if not self._dropped:
                tracker.close(finished=self._finished)
        except ImportError as error:
            self._drop(f'{error}; pip install "understudy[{self._name}]"')
        except (Exception, SystemExit) as error:  # whatever a third party's code raises: the run goes on without it
            self._drop(f"{type(error).__name__}: {str(error).strip() or 'no message'}")
        finally:
            self._ended.set()

    def _drop(self, reason: str) -> None:
        with self._telling:
            if self._dropped:
                return
            self._dropped = True
            log.warning(
                "tracker %s is dropped: %s. The run's own files have everything; --resume sends the metrics that are "
                "missing there",
                self._name,
                reason,
            )


def _row_message(row: Mapping[str, Any]) -> Callable[[Tracker], None]:
    step = int(row["step"])
    known = {key: float(value) for key, value in row.items() if key != "step" and _is_number(value)}
    numbers = {key: value for key, value in known.items() if math.isfinite(value)}

    def send(tracker: Tracker) -> None:
        # What it holds already was sent before a crash; the run repeats these steps to the same numbers.
        if step > tracker.last_step:
            tracker.log(step, numbers)

    return send


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: object) -> str | int | float | bool:
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)


def _run_id(path: Path) -> str:
    """The run's name to all trackers, drawn once and kept in its folder."""
    if path.exists():
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["run_id"])
        except (ValueError, KeyError, TypeError):
            raise RunError(
                f'{path} cannot be read; expected {{"run_id": "..."}}. Remove it to track the run anew'
            ) from None
    # Not random.*: seeds of the run have no part in it, nor it in them.
    run_id = secrets.token_hex(8)
    write_json(path, {"run_id": run_id})
    return run_id


def default_name(folder: Path) -> str:
    """The folder's name; of a pipeline's phase the pipeline's before it."""
    folder = folder.absolute()
    return f"{folder.parent.name}-{folder.name}" if (folder.parent / "pipeline.json").exists() else folder.name


def sample_markdown(record: Mapping[str, Any]) -> str:
    """A stored rollout as text: which one, its prompt, what was written."""
    facts = [f"prompt {record['prompt_index']}", f"{len(record['completion_ids'])} tokens"]
    if record.get("reward") is not None:
        facts.append(f"reward {record['reward']:g}")
    if record.get("teacher_logprobs"):
        gaps = [p - q for p, q in zip(record["sampler_logprobs"], record["teacher_logprobs"], strict=True)]
        facts.append(f"reverse KL {sum(gaps) / len(gaps):.3f} nats per token")
    prompt, written = (_as_code(str(record[key])) for key in ("prompt_text", "completion_text"))
    return f"**{', '.join(facts)}**\n\n{prompt}\n\nwritten:\n\n{written}"


def _as_code(text: str) -> str:
    """An indented block of Markdown, in which nothing that a model writes means anything."""
    return "\n".join(f"    {line}" for line in text.split("\n"))

"""Small jobs to be killed, starved and stopped, and how a process runs one: the real command line, in a folder of its
own, with a mark on a pipe whenever it enters or leaves a phase.

Processes are forked from a server that has imported everything: a start takes a tenth of a second.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from understudy.pipeline_state import load_state
from user import assert_same_run, metrics, owner_of, save_model, tree, word_tokenizer, write_rows, write_toml

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["understudy.cli", "understudy.api", "understudy.pipeline", "understudy.report", "jobs"])

# What belongs to which phase: module or class, and function. One inside another counts as the inner one.
PHASES: Mapping[str, Sequence[tuple[str, str]]] = {
    "loading": [("understudy.api", "assemble")],
    "sampling": [("understudy.loop", "sample_rollouts")],
    "scoring": [("understudy.loop", "score_reachable")],
    "update": [("understudy.updates", "optimizer_step")],
    "evaluation": [("understudy.api", "evaluate_tasks")],
    "metrics write": [("understudy.runs.RunFolder", "record"), ("understudy.runs.RunFolder", "amend")],
    "rollouts write": [("understudy.recorder.Recorder", "keep_rollouts")],
    "checkpoint write": [("understudy.runs.RunFolder", "save_checkpoint")],
    "report write": [("understudy.report", "write_run_report")],
    "pipeline boundary": [
        ("understudy.pipeline", "_record"),
        ("understudy.pipeline", "save_state"),
        ("understudy.pipeline", "_release_memory"),
    ],
}
STEPS = {"distill": 6, "pipeline": 4}


@dataclass(frozen=True)
class Job:
    """``command`` is the one of the command line, ``folders`` the runs it leaves in its ``run`` folder."""

    name: str
    material: Path
    folders: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        return [self.name, str(self.material / f"{self.name}.toml")]

    @property
    def phases(self) -> list[str]:
        """The phases that it goes through."""
        return [name for name in PHASES if self.name == "pipeline" or name != "pipeline boundary"]


def make_jobs(folder: Path) -> list[Job]:
    """Models of a few thousand weights, rows, and the two files: `distill` with evaluations, checkpoints and rollouts
    at different steps; a pipeline of `sft` and then `distill` from the start."""
    save_model(folder / "student", word_tokenizer())
    save_model(folder / "teacher", word_tokenizer(), seed=1)
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": f"w{i}"} for i in range(7)]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "documents.jsonl", [{"text": f"w{i} w{i + 2} w{i + 3}"} for i in range(6)])
    task = {"path": str(folder / "rows.jsonl"), "limit": 3}
    content: dict[str, Any] = tree(
        folder / "student",
        folder / "teacher",
        folder / "rows.jsonl",
        Path("run"),
        optim={"learning_rate": 1e-2, "num_steps": STEPS["distill"], "schedule": "cosine", "warmup_steps": 1},
        checkpoints={"every": 2, "keep": 2},
        rollouts={"every": 2, "per_step": 3, "topk": 2},
        evaluation={"every": 3, "tasks": [task]},
    )
    write_toml(folder / "distill.toml", content)
    shared = {key: value for key, value in content.items() if key not in ("teacher", "prompts")}
    documents, prompts = ({"path": str(folder / name)} for name in ("documents.jsonl", "rows.jsonl"))
    phases = [
        {"name": "documents", "method": "sft", "prompts": documents},
        {"name": "behaviour", "method": "distill", "prompts": prompts, "teacher": {"model": "@start"}},
    ]
    optim = {"learning_rate": 1e-2, "num_steps": STEPS["pipeline"]}
    write_toml(folder / "pipeline.toml", shared | {"optim": optim, "phases": phases})
    return [Job("distill", folder, ("",)), Job("pipeline", folder, ("01-documents", "02-behaviour"))]


def assert_same(job: Job, folder: Path, expected: Path) -> None:
    """Both ``run`` folders hold the same weights and optimizer states bit for bit, the same metrics, rollouts and costs
    but for times, nothing twice, nothing left out, and no time is negative."""
    for name in job.folders:
        here, there = folder / "run" / name, expected / "run" / name
        assert_same_run(here, there, steps=STEPS[job.name])
        times = [value for row in metrics(here) for key, value in row.items() if key.startswith("time/")]
        assert times
        assert min(times) >= 0
    if job.name == "pipeline":
        states = [load_state(each / "run") for each in (folder, expected)]
        assert [_timeless(one) for one in states[0].phases] == [_timeless(one) for one in states[1].phases]
        assert {path.name for path in (folder / "run").iterdir()} == {
            path.name for path in (expected / "run").iterdir()
        }


def _timeless(record: Any) -> Any:
    return record.model_copy(update={"seconds": 0.0})


# The process


Setup = Callable[[], None]


def work(command: Sequence[str], folder: Path, marks: Connection | None, setup: Setup | None) -> None:
    """What the process does: ``setup``, then the command, in ``folder``. Both outputs go to ``log`` there."""
    os.chdir(folder)
    with Path("log").open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    from understudy import cli

    if marks is not None:
        for phase, places in PHASES.items():
            for module, name in places:
                owner = owner_of(module)
                setattr(owner, name, _marked(getattr(owner, name), phase, marks))
    if setup is not None:
        setup()
    sys.argv = ["understudy", *command]
    cli.main()


def _marked(original: Callable[..., Any], phase: str, marks: Connection) -> Callable[..., Any]:
    def function(*arguments: Any, **keywords: Any) -> Any:
        marks.send_bytes(f">{phase}".encode())
        try:
            return original(*arguments, **keywords)
        finally:
            marks.send_bytes(f"<{phase}".encode())

    return function


def start(
    command: Sequence[str], folder: Path, *, setup: Setup | None = None, marked: bool = False
) -> tuple[BaseProcess, Connection | None]:
    """A process at work, and where its marks arrive."""
    folder.mkdir(parents=True, exist_ok=True)
    receiver, sender = forks.Pipe(duplex=False) if marked else (None, None)
    process = forks.Process(target=work, args=(list(command), folder, sender, setup))
    process.start()
    if sender is not None:
        sender.close()
    return process, receiver


def run(command: Sequence[str], folder: Path, *, setup: Setup | None = None, seconds: float = 900) -> int:
    """The exit code of a process that nobody disturbs."""
    process, _ = start(command, folder, setup=setup)
    return wait(process, seconds)


def wait(process: BaseProcess, seconds: float = 900) -> int:
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"still at work after {seconds:g} seconds")
    return process.exitcode


def arriving(marks: Connection) -> Iterator[str]:
    """Marks until the process is gone; one that it was killed in the middle of is left out."""
    with contextlib.suppress(EOFError, OSError), marks:
        while True:
            yield marks.recv_bytes().decode()


def log_of(folder: Path) -> str:
    return (folder / "log").read_text()

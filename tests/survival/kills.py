"""SIGKILL from outside at random moments of every phase, resume, compare.

The moment is drawn in two steps, so that short phases are hit as often as long ones: one of the times that a phase is
gone through, and a share of the time that it takes.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import Job, arriving, assert_same, log_of, make_jobs, run, start, wait

MOST_KILLS = 3  # of one job, before it may end
ATTEMPTS = 20  # times the aimed-for kills that may be tried: a phase may be over when the signal comes


@dataclass(frozen=True)
class Pace:
    """How a job goes that nothing happens to: ``seconds`` of every time that it went through a phase."""

    seconds: Mapping[str, Sequence[float]]
    folder: Path


@dataclass
class Trial:
    """One job that was killed some times. ``hits``: the phases it died in, each with whether it had been resumed."""

    job: str
    number: int
    hits: list[tuple[str, bool]] = field(default_factory=list)
    processes: int = 0
    difference: str = ""


def undisturbed(job: Job, folder: Path) -> Pace:
    """Run ``job`` to its end, and take the times."""
    process, marks = start(job.command, folder, marked=True)
    assert marks is not None
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    began: list[float] = []
    for mark in arriving(marks):
        if mark[0] == ">":
            began.append(time.monotonic())
        else:
            seconds[mark[1:]].append(time.monotonic() - began.pop())
    assert wait(process) == 0, log_of(folder)
    return Pace(dict(seconds), folder)


def killed(job: Job, folder: Path, pace: Pace, phase: str, draw: random.Random) -> str | None:
    """Start or go on with ``job``, and kill it somewhere in ``phase``. The phase that it died in ("between phases" is
    one); None: it ended before."""
    resumed = (folder / "run").exists()
    process, marks = start([*job.command, "--resume"], folder, marked=True)
    assert marks is not None
    times = len(pace.seconds[phase])
    turn = draw.randint(1, max(1, times // 2 if resumed else times))
    delay = draw.random() * draw.choice(pace.seconds[phase])
    inside: list[str] = []
    for mark in arriving(marks):
        if mark[0] == "<":
            inside.pop()
            continue
        inside.append(mark[1:])
        if mark[1:] == phase:
            turn -= 1
            if turn == 0:
                time.sleep(delay)
                process.kill()  # SIGKILL, unless it has ended
    code = wait(process)
    if code == 0:
        return None
    assert code == -signal.SIGKILL, log_of(folder)
    return inside[-1] if inside else "between phases"


def attempt(job: Job, folder: Path, pace: Pace, phases: Sequence[str], number: int, seed: int) -> Trial:
    """Kill one job in ``phases`` in turn, let it end, and compare it with the undisturbed one."""
    draw, trial = random.Random(f"{seed} {number}"), Trial(job.name, number)
    for phase in phases:
        resumed = trial.processes > 0
        trial.processes += 1
        hit = killed(job, folder, pace, phase, draw)
        if hit is None:
            break
        trial.hits.append((hit, resumed))
    trial.processes += 1
    code = run([*job.command, "--resume"], folder)
    try:
        assert code == 0, log_of(folder)
        assert_same(job, folder, pace.folder)
    except AssertionError as error:
        trial.difference = str(error) or repr(error)
    if not trial.difference:
        shutil.rmtree(folder)
    return trial


def kill_all(folder: Path, *, per_phase: int, seed: int = 0, workers: int = 2) -> dict[str, Any]:
    """Trials until every phase was died in ``per_phase`` times. What came of them, for the page of results."""
    began = time.monotonic()
    (folder / "material").mkdir(parents=True)
    jobs = make_jobs(folder / "material")
    paces = {job.name: undisturbed(job, folder / f"undisturbed-{job.name}") for job in jobs}
    trials: list[Trial] = []
    number = 0
    with ThreadPoolExecutor(workers) as pool:
        while rest := _missing(trials, jobs, per_phase):
            assert number < ATTEMPTS * per_phase, f"cannot be hit: {rest}"
            plans: list[tuple[Job, list[str]]] = []
            for _ in range(workers):
                job = jobs[number % len(jobs)]
                order = [phase for phase in rest if phase in paces[job.name].seconds]
                random.Random(f"{seed} plan {number}").shuffle(order)
                plans.append((job, order[:MOST_KILLS]))
                number += 1
            trials += pool.map(
                lambda plan, at: attempt(plan[0], folder / f"trial-{at}", paces[plan[0].name], plan[1], at, seed),
                plans,
                range(number - workers, number),
            )
    return _summary(trials, jobs, time.monotonic() - began, seed)


def _missing(trials: Sequence[Trial], jobs: Sequence[Job], per_phase: int) -> list[str]:
    """Phases with too few hits, the rarest first."""
    hits = Counter(phase for trial in trials for phase, _ in trial.hits)
    names = dict.fromkeys(phase for job in jobs for phase in job.phases)
    return sorted((name for name in names if hits[name] < per_phase), key=lambda name: hits[name])


def _summary(trials: Sequence[Trial], jobs: Sequence[Job], seconds: float, seed: int) -> dict[str, Any]:
    phases: dict[str, dict[str, int]] = {}
    names = [*dict.fromkeys(phase for job in jobs for phase in job.phases), "between phases"]
    for name in names:
        of_phase = [(trial, resumed) for trial in trials for phase, resumed in trial.hits if phase == name]
        phases[name] = {
            "kills": len(of_phase),
            "of_resumed": sum(resumed for _, resumed in of_phase),
            "equal": sum(not trial.difference for trial, _ in of_phase),
        }
    return {
        "seed": seed,
        "seconds": round(seconds),
        "kills": sum(phase["kills"] for phase in phases.values()),
        "equal": sum(phase["equal"] for phase in phases.values()),
        "phases": phases,
        "jobs": {
            job.name: {
                "jobs": sum(trial.job == job.name for trial in trials),
                "kills": sum(len(trial.hits) for trial in trials if trial.job == job.name),
                "processes": sum(trial.processes for trial in trials if trial.job == job.name),
            }
            for job in jobs
        },
        "differences": [f"{trial.job} {trial.number}: {trial.difference}" for trial in trials if trial.difference],
    }

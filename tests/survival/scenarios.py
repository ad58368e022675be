"""What a disk, a cluster, a clock and a second process do to a run, and how often it came out the same.

Every function gets an empty folder and returns figures for the page of results; what must hold is asserted here.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jobs import Job, arriving, assert_same, log_of, make_jobs, run, start, wait

from understudy.checkpoints import checkpoint_path, damage, list_checkpoints
from user import metrics

SLOW_SECONDS = 60.0
DEADLINE_SECONDS = 2.0


def prepared(folder: Path) -> tuple[Job, Path]:
    """The `distill` job, and the folder of one that nothing happened to."""
    (folder / "material").mkdir(parents=True)
    job = make_jobs(folder / "material")[0]
    assert run(job.command, folder / "undisturbed") == 0, log_of(folder / "undisturbed")
    return job, folder / "undisturbed"


def resumed_equal(job: Job, folder: Path, expected: Path) -> None:
    assert run([*job.command, "--resume"], folder) == 0, log_of(folder)
    assert_same(job, folder, expected)


# A damaged checkpoint


def damaged_checkpoints(folder: Path, *, looked_at: int, resumed: int, seed: int = 0) -> dict[str, Any]:
    """One bit of one file flipped, a file cut, a file removed: all are found, and runs go on from the one before."""
    job, whole = prepared(folder)
    draw = random.Random(seed)
    found: dict[str, Counter[str]] = {kind: Counter() for kind in ("flipped bit", "cut file", "missing file")}
    [_, (_, newest)] = list_checkpoints(whole / "run" / "checkpoints")
    assert damage(newest) is None
    for number in range(looked_at):
        kind = list(found)[number % len(found)]
        copy = Path(shutil.copytree(newest, folder / "copy"))
        spoil(copy, kind, draw)
        found[kind]["tried"] += 1
        found[kind]["found"] += damage(copy) is not None
        shutil.rmtree(copy)
    for number in range(resumed):
        kind = list(found)[number % len(found)]
        trial = Path(shutil.copytree(whole, folder / f"trial-{number}"))
        spoil(trial / "run" / "checkpoints" / newest.name, kind, draw)
        resumed_equal(job, trial, whole)
        assert re.search(rf"{newest.name} is damaged \(.*\): going on after step 4 instead", log_of(trial))
        found[kind]["resumed"] += 1
        shutil.rmtree(trial)
    assert all(counts["found"] == counts["tried"] for counts in found.values())
    return {kind: dict(counts) for kind, counts in found.items()}


def spoil(checkpoint: Path, kind: str, draw: random.Random) -> None:
    """Damage one of its files, the list of sums among them."""
    path = draw.choice(sorted(path for path in checkpoint.iterdir() if path.is_file()))
    if kind == "missing file":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if kind == "flipped bit":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    else:
        del content[draw.randrange(len(content)) :]
    path.write_bytes(content)


# A full disk


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of ``size`` bytes at ``folder``; needs the right to mount one."""
    folder.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "understudy", folder], check=True, capture_output=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a file system of its own."""
    try:
        with small_disk(folder, 2**16):
            return True
    except (subprocess.CalledProcessError, OSError):
        return False


def full_disk(folder: Path, *, trials: int) -> dict[str, Any]:
    """Disks on which more and more room is left when the run begins: it ends with exit code 1 (2 where not even a
    folder could be made, or no checkpoint would have fitted) and says what could not be written; with room again it
    ends the same."""
    job, whole = prepared(folder)
    most = 2 * sum(path.stat().st_size + 4096 for path in (whole / "run").rglob("*"))
    stopped: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    for number in range(trials):
        trial = folder / f"trial-{number}"
        with small_disk(trial, 4 * most):
            (trial / "log").symlink_to(folder / f"log-{number}")  # what is said has a disk of its own
            fill(trial / "ballast", 4096 * (number * most // 2 // trials // 4096))
            codes[code := run(job.command, trial)] += 1
            said = log_of(trial)
            assert code in (0, 1, 2), said
            assert "Traceback" not in said
            if code:
                stopped[_what_was_not_written(said)] += 1
            (trial / "ballast").unlink()
            resumed_equal(job, trial, whole)
    return {"trials": trials, "exit_codes": _texts(codes), "not_written": dict(sorted(stopped.items()))}


def fill(ballast: Path, left: int) -> None:
    """Take all room but ``left`` bytes."""
    statistics = os.statvfs(ballast.parent)
    with ballast.open("wb") as file:
        for _ in range((statistics.f_bavail * statistics.f_frsize - left) // 4096):
            file.write(bytes(4096))


def limited_files(folder: Path, *, limits: list[int]) -> dict[str, Any]:
    """The same without a disk of one's own: the kernel refuses to let a file grow beyond a limit."""
    job, whole = prepared(folder)
    stopped: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    for limit in limits:
        trial = folder / f"trial-{limit}"
        codes[code := run(job.command, trial, setup=partial(_limit_files, limit))] += 1
        said = log_of(trial)
        assert code in (0, 1), said
        assert "Traceback" not in said
        if code:
            stopped[_what_was_not_written(said)] += 1
        resumed_equal(job, trial, whole)
    return {"trials": len(limits), "exit_codes": _texts(codes), "not_written": dict(sorted(stopped.items()))}


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _what_was_not_written(said: str) -> str:
    """The file, without its step; "output_dir" where a run could not begin, "the first checkpoint" where one could not
    have been written."""
    match = re.search(r"(\S+) could not be written: \S.*", said)
    if "error resources.disk" in said:
        return "the first checkpoint"
    if match is None:
        assert "expected: a folder that this process can write in" in said, said
        return "output_dir"
    assert re.search(r"No space left|File too large|file write failed|unexpected pos|iostream error", match[0]), said
    return re.sub(r"step_\d+.*", "step_NNNNNN", match[1].removeprefix("run/"))


def read_only(folder: Path) -> dict[str, Any]:
    """A disk that cannot be written: a new run and a resumed one are refused before anything is computed."""
    job, whole = prepared(folder)
    disk = folder / "disk"
    codes = []
    with small_disk(disk, 2**26):
        (disk / "old").mkdir()
        (disk / "new").mkdir()
        shutil.copytree(whole / "run", disk / "old" / "run")
        shutil.rmtree(max((disk / "old" / "run" / "checkpoints").iterdir()))
        for each in ("old", "new"):
            (folder / f"{each}-log").touch()
            (disk / each / "log").symlink_to(folder / f"{each}-log")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for each, options in (("new", []), ("old", ["--resume"])):
            codes.append(run([*job.command, *options], disk / each))
            assert "Read-only file system" in (folder / f"{each}-log").read_text()
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        resumed_equal(job, disk / "old", whole)
    assert codes == [2, 2]
    return {"exit_codes": codes}


def _texts(codes: Counter[int]) -> dict[str, int]:
    return {str(code): count for code, count in sorted(codes.items())}


# Pre-emption


def slow(phase_owner: str, name: str, at_call: int, seconds: float) -> None:
    """Make one call of a function slow, as a large model would be."""
    from user import owner_of

    owner, calls = owner_of(phase_owner), [0]
    original = getattr(owner, name)

    def function(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == at_call:
            Path("slow").touch()
            end = time.monotonic() + seconds
            while time.monotonic() < end:  # not one long call: Python looks at signals between its instructions
                time.sleep(0.05)
        return original(*arguments, **keywords)

    setattr(owner, name, function)


# Where a step is slow: phase, function, at which call.
SLOW_PLACES = {
    "loading": ("understudy.assembly", "load_student", 1),
    "first evaluation": ("understudy.api", "evaluate_tasks", 1),
    "sampling, first step": ("understudy.loop", "sample_rollouts", 1),
    "sampling": ("understudy.loop", "sample_rollouts", 4),
    "scoring": ("understudy.loop", "score_reachable", 4),
    "forward and backward": ("understudy.backends.local.LocalTrainer", "forward_backward", 4),
    "update": ("understudy.backends.local.LocalTrainer", "optimizer_step", 4),
    "rollouts write": ("understudy.recorder.Recorder", "keep_rollouts", 3),
    "metrics write": ("understudy.runs.RunFolder", "record", 5),
    "evaluation": ("understudy.api", "evaluate_tasks", 2),
    "checkpoint write": ("understudy.checkpoints", "flush_tree", 2),
}
# What is begun there is finished all the same: a state half-way is none to go on from.
FINISHED = ("update", "metrics write", "checkpoint write")


def deadline(folder: Path, *, places: list[str], late_seconds: float = 15.0) -> dict[str, Any]:
    """SIGTERM while a step is slow: the run ends within its deadline with the last update saved, and goes on the same.
    ``late_seconds``: what a busy machine may add."""
    job, whole = prepared(folder)
    results: dict[str, Any] = {}
    for place in places:
        owner, name, at_call = SLOW_PLACES[place]
        trial = folder / re.sub(r"\W+", "-", place)
        pause = 2 * DEADLINE_SECONDS if place in FINISHED else SLOW_SECONDS
        options = ["--checkpoints.stop_within_seconds", str(DEADLINE_SECONDS)]
        setup = partial(slow, owner, name, at_call, pause)
        process, _ = start([*job.command, *options], trial, setup=setup)
        _until_slow(trial, place, process.is_alive)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        began = time.monotonic()
        code = wait(process)
        seconds = time.monotonic() - began
        assert seconds < DEADLINE_SECONDS + pause * (place in FINISHED) + late_seconds
        saved = list_checkpoints(trial / "run" / "checkpoints")
        step = metrics(trial / "run")[-1]["step"] if (trial / "run" / "metrics.jsonl").exists() else 0
        assert code == (130 if place != "loading" else -signal.SIGTERM), log_of(trial)
        assert step == 0 or saved[-1] == (step, checkpoint_path(trial / "run" / "checkpoints", step))
        results[place] = {"seconds": round(seconds, 1), "exit_code": code, "saved_after_step": step}
        resumed_equal(job, trial, whole)
    return {"deadline_seconds": DEADLINE_SECONDS, "places": results}


def _until_slow(trial: Path, place: str, alive: Any) -> None:
    """Wait until the slow call has begun."""
    marker, end = trial / "slow", time.monotonic() + 120
    while not marker.exists():
        assert alive(), log_of(trial)
        assert time.monotonic() < end, place
        time.sleep(0.05)


# A second process


def two_processes(folder: Path, *, pairs: int, seed: int = 0) -> dict[str, Any]:
    """Two processes begin in one folder, the second up to a second later: one runs, the other one is refused."""
    job, whole = prepared(folder)
    draw, refused = random.Random(seed), 0
    for number in range(pairs):
        trial = folder / f"trial-{number}"
        options = ["--resume"] if number % 2 else []
        first, marks = start([*job.command, *options], trial, marked=True)
        assert marks is not None
        if number % 3:  # anywhere in the first one's life; else both at once
            time.sleep(draw.random())
        second, _ = start([*job.command, *options], trial)
        list(arriving(marks))
        codes = sorted((wait(first), wait(second)))
        said = log_of(trial)
        assert "Traceback" not in said
        # Where the first one had ended, a second --resume has nothing to do.
        assert codes == [0, 2] or (codes == [0, 0] and "all 6 steps are done" in said), said
        refused += codes == [0, 2]
        assert_same(job, trial, whole)
    return {"pairs": pairs, "refused": refused}


# A clock that jumps


def jumping_clock(seed: int) -> None:
    """time.time goes back by up to ten years, or ahead by up to a hundred, at every call."""
    draw, year = random.Random(seed), 365.25 * 86400

    def now() -> float:
        return 1.8e9 + draw.uniform(-10, 100) * year

    time.time = now
    time.time_ns = lambda: int(1e9 * now())


def clock_jumps(folder: Path, *, trials: int) -> dict[str, Any]:
    """Runs, each stopped once by SIGTERM and resumed, under such a clock."""
    job, whole = prepared(folder)
    for number in range(trials):
        trial = folder / f"trial-{number}"
        process, marks = start(job.command, trial, setup=partial(jumping_clock, number), marked=True)
        assert marks is not None
        updates = 0
        for mark in arriving(marks):
            updates += mark == ">update"
            if mark == ">update" and updates == 1 + number % 4:  # a checkpoint of step 5 would stay
                assert process.pid is not None
                os.kill(process.pid, signal.SIGTERM)
        assert wait(process) == 130, log_of(trial)
        assert run([*job.command, "--resume"], trial, setup=partial(jumping_clock, -number)) == 0, log_of(trial)
        assert_same(job, trial, whole)
    return {"trials": trials}

"""Step time of whole runs on two vLLM servers, without and with a lag."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import tomli_w
from _served_servers import Server, long_line, save_checkpoint, vllm_server
from _step import Workload, make_prompts, make_tokenizer

# Hidden size, layers, heads, key-value heads, feed-forward size.
STUDENT, TEACHER = (256, 4, 4, 2, 1024), (512, 8, 8, 4, 1536)
# Prompts, completions of each, their tokens.
WORK = Workload(512, prompts=4, samples=4, prompt_tokens=32, max_tokens=48)
# Seconds that a reply of the teacher's takes on its way, lag.
VARIANTS = ((0.0, 0), (0.0, 1), (1.0, 0), (1.0, 1), (1.0, 2))
# Of the trainer and of each server. More of them than cores hold each other up: with one for each of two cores every
# step took longer, without a lag too.
THREADS = 1
# Steps at a run's ends that are left out: the first make what later ones use, the last have nothing to overlap with.
FILLING, DRAINING = 2, 2
POLL_SECONDS = 0.005
ROLES = ("student_sampling", "teacher_scoring", "student_training")


def step_runs(steps: int, rounds: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Part d: rows of all variants, round by round."""
    tokenizer = make_tokenizer()
    student = save_checkpoint(folder / "student", tokenizer, vocab=WORK.vocab, shape=STUDENT)
    teacher = save_checkpoint(folder / "teacher", tokenizer, vocab=WORK.vocab, shape=TEACHER)
    rows = [json.dumps({"prompt": text}) for text in make_prompts(tokenizer, WORK)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    with ExitStack() as running:
        writer = running.enter_context(vllm_server(student, threads=THREADS))
        marker = running.enter_context(vllm_server(teacher, threads=THREADS))
        writer.wait()
        marker.wait()
        for number in range(rounds):
            for delay, lag in VARIANTS:
                row = {"part": "d", "round": number, "delay_s": delay, "lag": lag}
                with ExitStack() as line:
                    root = line.enter_context(long_line(marker.root, delay)) if delay else marker.root
                    yield row | _run(folder, writer, root, f"{number}-{delay}-{lag}", steps=steps, lag=lag)


def _run(folder: Path, writer: Server, teacher: str, name: str, *, steps: int, lag: int) -> dict[str, Any]:
    """One `understudy distill`: wall seconds from each row of its metrics to the next, and what its roles took."""
    out, file = folder / "runs" / name, folder / f"{name}.toml"
    content = {
        "output_dir": str(out),
        "num_threads": THREADS,
        "student": {"model": str(folder / "student"), "device": "cpu"},
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "sampling": {
            "group_size": WORK.samples,
            "groups_per_batch": WORK.prompts,
            "max_completion_tokens": WORK.max_tokens,
            "max_policy_lag": lag,
        },
        "optim": {"learning_rate": 1e-4, "num_steps": steps},
        "objective": {"estimator": "sampled"},
        "rollouts": {"per_step": 0},
        "checkpoints": {"every": 1000},
        "teacher": {"url": f"{teacher}/v1"},
        "sampler": {"url": f"{writer.root}/v1"},
    }
    file.write_text(tomli_w.dumps(content))
    words = [sys.executable, "-m", "understudy", "distill", str(file)]
    arrivals: list[float] = []
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        while process.poll() is None:
            now, done = time.perf_counter(), _lines(out / "metrics.jsonl")
            arrivals += [now] * (done - len(arrivals))
            time.sleep(POLL_SECONDS)
    if process.returncode != 0:
        raise SystemExit(f"run {name}: exit code {process.returncode}\n{(folder / f'{name}.log').read_text()[-3000:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(arrivals) == len(rows) == steps, (len(arrivals), len(rows))
    return {
        "step_s": [round(later - earlier, 3) for earlier, later in pairwise(arrivals)][FILLING - 1 : -DRAINING],
        "roles_s": {
            role: [round(row.get(f"time/{role}", 0.0), 3) for row in rows[FILLING:-DRAINING]] for role in ROLES
        },
        "policy_lag": max(row.get("policy_lag/max", 0) for row in rows),
    }


def _lines(file: Path) -> int:
    try:
        return file.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0

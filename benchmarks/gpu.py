"""One step of on-policy distillation on one data-centre GPU (H100, H200), phase by phase. See README.md beside it.

    python benchmarks/gpu.py                     # everything that fits into 7.5 minutes; needs no network
    python benchmarks/gpu.py --only decoding     # some jobs again (or for the first time), the rest kept
    python benchmarks/gpu.py --tiny              # the same code on small models, on a CPU too: does it run?
    python benchmarks/gpu.py --render            # table again, from the JSON

Random weights, made on the device. Every job is a process with a time limit; its rows are saved as they come. What
runs out of memory or time, or fails, is a result like any other.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _gpu import (
    DEVICE,
    FULL,
    MEASURED,
    OUT_OF_MEMORY,
    TINY,
    Setting,
    measure_decoding,
    measure_trl,
    measure_understudy,
    trl_name,
)
from lm_head import machine

RESULTS = Path(__file__).parent / "results" / "gpu"
# Dense bfloat16 TFLOP/s of NVIDIA's data sheets, which print twice as much "with sparsity". The first match counts.
PEAKS = {"H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "A100": 312}
# Share of the peak that training and scoring should reach, and how many times TRL's speed a whole step.
MFU_TARGET, STEP_TARGET = 0.4, 2.0
OUT_OF_TIME = "not measured: out of time"
# A process needs so long to start and make its models; with less left there is no point.
START_SECONDS = 25


@dataclass(frozen=True)
class Job:
    """A process: what it does, its time limit, the rows it should give. Of one group's jobs the next runs only where
    those before it ran out of memory."""

    group: str
    arguments: tuple[Any, ...]
    seconds: float
    rows: tuple[str, ...]
    module: str = "torch"


def trl_job(kind: str, seconds: float, rows: int, checkpointing: bool) -> Job:
    return Job(kind, (rows, checkpointing), seconds, (trl_name(kind, rows, checkpointing),), "trl")


PHASES = ("scoring, sampled", "training, sampled", "scoring, full", "training, full")
# By what they are worth when time runs out. TRL's rows per micro-batch: some 20k tokens fill the device. The IW-OPD
# trainer holds several copies of its logits, 0.8 GB a row each.
JOBS = (
    Job("understudy", (), 270, ("matmul", *PHASES, "scoring, padded", "training, padded", "sampling")),
    *(trl_job("distillation", 170, *setting) for setting in ((16, False), (16, True), (8, True))),
    *(trl_job("iw_opd", 130, *setting) for setting in ((16, False), (16, True), (8, True))),
    Job("decoding", (), 150, tuple(f"decoding, {kind}" for kind in ("understudy", "generate", "generate compiled"))),
    Job("flash", (), 60, ("scoring, flash", "training, flash"), "flash_attn"),
)


# What the mathematics needs: two FLOPs per weight and token, the head on completion positions, prompts once however
# many samples they have, a completion's last token not at all, and attention between causal pairs.


def head_flops(s: Setting, role: str) -> float:
    return 2.0 * s.step.vocab * s.shapes[role][0] * s.step.rows * s.step.max_tokens


def body_flops(s: Setting, role: str) -> float:
    hidden, layers, heads, kv_heads, feed_forward = s.shapes[role]
    weights = layers * hidden * (2 * (heads + kv_heads) * s.head_dim + 3 * feed_forward)
    prompt, later = s.step.prompt_tokens, s.step.max_tokens - 1
    tokens = s.step.prompts * prompt + s.step.rows * later
    pairs = s.step.prompts * prompt * (prompt + 1) / 2 + s.step.rows * later * (prompt + (later + 1) / 2)
    return 2.0 * weights * tokens + 4.0 * layers * heads * s.head_dim * pairs


def flops(s: Setting, name: str) -> float | None:
    """Of a row; None where a utilisation would mean nothing. The full objective needs the teacher's logits once, and
    the training phase makes them (scoring makes them too, for its metrics: not counted)."""
    phase, _, variant = name.partition(", ")
    student, teacher, full = body_flops(s, "student") + head_flops(s, "student"), "teacher", variant == "full"
    if phase == "training":
        return 3 * student + (head_flops(s, teacher) if full else 0)
    if phase == "scoring":
        return body_flops(s, teacher) + (0 if full else head_flops(s, teacher))
    return student if phase == "sampling" else None


# Running jobs


def run_jobs(jobs: Sequence[Job], record: dict[str, Any], results: Path, end: float) -> None:
    """What a job does not get to is a result too. ``end``: of the whole, by the monotonic clock."""
    rows: dict[str, Any] = record["rows"]
    for job in jobs:
        earlier = [
            rows[name]["status"]
            for other in JOBS[: JOBS.index(job)]
            if other.group == job.group
            for name in other.rows
            if name in rows
        ]
        if any(status != OUT_OF_MEMORY for status in earlier):
            continue
        if importlib.util.find_spec(job.module) is None:
            reason = f"skipped: {job.module} is not installed"
            print(f"{job.group}: {reason}", flush=True)
        elif end - time.monotonic() < START_SECONDS:
            reason = OUT_OF_TIME
        else:
            reason = run_job(job, record, results, end)
        for name in job.rows:
            if name not in rows:
                add_row(record, results, name, {"status": reason})


def run_job(job: Job, record: dict[str, Any], results: Path, end: float) -> str:
    """Collect a process's rows as they come; why there are no more."""
    limit = min(time.monotonic() + job.seconds, end)
    command = [sys.executable, __file__, "--one", json.dumps([job.group, *job.arguments])]
    command += ["--tiny"] if record["tiny"] else []
    environment = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        with out.open("w") as one, errors.open("w") as other:
            process = subprocess.Popen(command, stdout=one, stderr=other, env=environment, start_new_session=True)
        done = 0
        try:
            running = True
            while running and time.monotonic() < limit:
                running = process.poll() is None
                lines = [line for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]
                for line in lines[done:]:
                    if line.startswith('{"row":'):
                        row = json.loads(line)
                        add_row(record, results, row.pop("row"), row)
                done = len(lines)
                time.sleep(0.2)
        finally:
            # Its children too: compilers and the like.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said = errors.read_text()
    if process.returncode and said:
        print(said[-3000:], file=sys.stderr, flush=True)
    if running:
        return OUT_OF_TIME if limit == end else f"not measured: over {job.seconds:g} s"
    if "OutOfMemoryError" in said[-2000:]:
        return OUT_OF_MEMORY
    return f"failed: exit code {process.returncode}: {' '.join(said.splitlines()[-1:])[:200]}"


def add_row(record: dict[str, Any], results: Path, name: str, row: dict[str, Any]) -> None:
    record["rows"][name] = row
    seconds = f"{row['seconds']:.4g} s" if "seconds" in row else ""
    print(f"{name:50} {row['status']} {seconds}", flush=True)
    save(record, results)


def save(record: dict[str, Any], results: Path) -> None:
    """Whole or not at all: an interruption must not lose what there is."""
    results.parent.mkdir(parents=True, exist_ok=True)
    new = results.with_suffix(".json.new")
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(results.with_suffix(".json"))
    results.with_suffix(".md").write_text(markdown(record))


# Tables


def peaks(record: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """TFLOP/s: of the data sheet, of the matrix product in this run."""
    gpu = record["machine"]["gpu"] or ""
    return next((peak for name, peak in PEAKS.items() if name in gpu), None), record["rows"].get("matmul", {}).get(
        "tflops"
    )


def step_seconds(record: Mapping[str, Any], kind: str) -> float | None:
    """Of a whole step: ours with an objective, or TRL's with a trainer, scaled up where part of one was measured."""
    rows, s = record["rows"], TINY if record["tiny"] else FULL
    if kind in ("sampled", "full"):
        parts = [rows.get(name, {}).get("seconds") for name in ("sampling", f"scoring, {kind}", f"training, {kind}")]
        return sum(parts) if all(parts) else None
    found = [row for name, row in rows.items() if name.startswith(f"TRL {kind}") and row["status"] == MEASURED]
    return found[0]["seconds"] * s.step.rows / found[0]["rows"] if found else None


def verdicts(record: Mapping[str, Any]) -> Iterator[tuple[str, str, bool | None]]:
    """(target, measured, met); None: not measured."""
    s, (sheet, measured) = TINY if record["tiny"] else FULL, peaks(record)
    for name in PHASES:
        needed, seconds = flops(s, name), record["rows"].get(name, {}).get("seconds")
        peak = sheet or measured
        share = needed / seconds / 1e12 / peak if needed and seconds and peak else None
        yield (
            f"{name}: at least {MFU_TARGET:.0%} of the peak",
            "" if share is None else f"{share:.1%}",
            (None if share is None else share >= MFU_TARGET),
        )
    for own, trainer in (("full", "distillation"), ("sampled", "iw_opd")):
        ours, other = step_seconds(record, own), step_seconds(record, trainer)
        ratio = other / ours if ours and other else None
        yield (
            f"whole step, {own}: at least {STEP_TARGET:g} times the speed of TRL's {trainer}",
            ("" if ratio is None else f"{ratio:.2f} times"),
            None if ratio is None else ratio >= STEP_TARGET,
        )


def cells(record: Mapping[str, Any], name: str, row: Mapping[str, Any]) -> list[str]:
    s = TINY if record["tiny"] else FULL
    seconds, gb = row.get("seconds"), row.get("peak_gb")
    if not seconds:
        return [name, "", "", "", "", "" if gb is None else f"{gb:.1f}", row["status"]]
    completions = row.get("rows", s.step.rows) * row.get("steps", s.step.max_tokens)
    rate = completions / seconds
    needed = flops(s, name)
    shares = [f"{needed / seconds / 1e12 / peak:.1%}" if needed and peak else "" for peak in peaks(record)]
    notes = []
    if "tflops" in row:
        notes.append(f"{row['tflops']:.3g} TFLOP/s")
    if "steps" in row:
        notes.append(f"{seconds / row['steps'] * 1000:.1f} ms per step of {s.step.rows} rows")
    if "micro_batch_tokens" in row:
        notes.append(f"{row['micro_batch_tokens']} tokens per batch")
    notes += [f"out of memory at {size}" for size in row.get("out_of_memory_at", ())]
    if "generation_s" in row:
        notes.append(f"{row['generation_s']:.1f} s of it generation")
    if row.get("rows", s.step.rows) < s.step.rows:
        notes.append(f"{row['rows']} of {s.step.rows} rows")
    tokens = "" if name == "matmul" else f"{rate:,.0f}"
    return [name, f"{seconds:.3g}", tokens, *shares, "" if gb is None else f"{gb:.1f}", "; ".join(notes)]


def markdown(record: Mapping[str, Any]) -> str:
    s, (sheet, _) = TINY if record["tiny"] else FULL, peaks(record)
    known = f"data sheet {sheet} TFLOP/s" if sheet else "no data-sheet peak known for this device"
    models = "A student of Qwen3-0.6B's shape and a teacher of Qwen3-4B's"
    models = "Small models, only to see that it runs" if record["tiny"] else models
    names = [name for job in JOBS for name in job.rows if name in record["rows"]]
    lines = [
        f"{models}, random weights: {s.step.title}. Student in float32, a bfloat16 copy to sample with and bfloat16 "
        "autocast to train, teacher in bfloat16.",
        "",
        ", ".join(f"{key} {' '.join(x) if isinstance(x, list) else x}" for key, x in record["machine"].items() if x)
        + f"; {known}",
        "",
        "Tokens are completion tokens. Utilisation: FLOPs that the mathematics needs, prompts counted once per group, "
        "over the peak of the data sheet and of a bfloat16 matrix product in this run. Scoring and training run on "
        "random completions. TRL: bf16=True, bfloat16 teacher; a step is scaled up where only some rows ran.",
        "",
        "| | seconds | tokens/s | of data sheet | of matmul | peak GB | |",
        "|---|---:|---:|---:|---:|---:|---|",
        *(f"| {' | '.join(cells(record, name, record['rows'][name]))} |" for name in names),
        *(
            f"| **step: {kind}** | {seconds:.3g} | {s.step.rows * s.step.max_tokens / seconds:,.0f} | | | | |"
            for kind in ("sampled", "full", "distillation", "iw_opd")
            if (seconds := step_seconds(record, kind))
        ),
        "",
        "| target | measured | |",
        "|---|---|---|",
    ]
    words = {True: "met", False: "missed", None: "not measured"}
    return "\n".join([*lines, *(f"| {t} | {m} | {words[met]} |" for t, m, met in verdicts(record))]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = list(dict.fromkeys(job.group for job in JOBS))
    parser.add_argument("--only", nargs="+", choices=groups, help="these jobs; other rows of the JSON are kept")
    parser.add_argument("--minutes", type=float, default=7.5, help="what is not measured by then never is")
    parser.add_argument("--tiny", action="store_true", help="small models; results go to a temporary folder")
    parser.add_argument("--results", type=Path, help="results/gpu; .json and .md are added")
    parser.add_argument("--render", action="store_true", help="rewrite the table from the JSON")
    parser.add_argument("--one", help="a job as JSON, in this process")
    arguments = parser.parse_args()
    results = arguments.results or (Path(tempfile.gettempdir(), "gpu_tiny") if arguments.tiny else RESULTS)
    path = results.with_suffix(".json")
    if arguments.render:
        if not path.exists():
            raise SystemExit(f"{path} does not exist: measure first")
        save(json.loads(path.read_text()), results)
        return
    if DEVICE.type == "cpu" and not arguments.tiny:
        print("no CUDA device: run this on a machine with one, or with --tiny to see that it runs", file=sys.stderr)
        raise SystemExit(2)
    if arguments.one:
        group, *rest = json.loads(arguments.one)
        s = TINY if arguments.tiny else FULL
        if group in ("understudy", "flash"):
            measure_understudy(s, flash=group == "flash")
        elif group == "decoding":
            measure_decoding(s)
        else:
            measure_trl(s, group, *rest)
        return
    end = time.monotonic() + 60 * arguments.minutes
    jobs = [job for job in JOBS if job.group in (arguments.only or groups)]
    record = {"tiny": arguments.tiny, "rows": {}}
    if arguments.only and path.exists():
        record = json.loads(path.read_text())
        for name in (name for job in jobs for name in job.rows):
            record["rows"].pop(name, None)
    record["machine"] = machine() | {"threads": torch.get_num_threads()}
    run_jobs(jobs, record, results, end)
    print(f"\n{markdown(record)}\n{results.with_suffix('.md')}")


if __name__ == "__main__":
    main()

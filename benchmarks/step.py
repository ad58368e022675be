"""One optimizer step of on-policy distillation: understudy's against the TRL trainers that need no server. See
README.md beside it.

    OMP_NUM_THREADS=1 python benchmarks/step.py --search             # TRL's fastest settings, hours
    OMP_NUM_THREADS=1 python benchmarks/step.py                      # everything, with the settings found, hours
    OMP_NUM_THREADS=1 python benchmarks/step.py --resume             # go on after an interruption
    OMP_NUM_THREADS=1 python benchmarks/step.py --workload a c       # some workloads only; also with --search
    python benchmarks/step.py --render                               # tables again, from the JSON

Both sides read the same models from disk and take the same number of steps on the same prompts, with the same number
of tokens generated and trained; a measurement where they differ fails. Every measurement is a process of its own, and
rounds interleave the variants, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _step import WORKLOADS, Workload, measure_understudy, prepare
from _trl import measure_trl
from lm_head import machine
from scaling import PHASES as ROLES
from scaling import Point, flops, matmul_rate

RESULTS = Path(__file__).parent / "results" / "step"
PHASES = ("generate", "teacher", "forward", "backward", "other")
# What each trainer optimises, and so which of ours it compares with. GKD and GOLD are their experimental trainers.
TRAINERS = {"distillation": "full", "gkd": "full", "gold": "full", "iw_opd": "sampled"}
# Overrides of a run's configuration, by kind of comparison.
OURS: dict[str, dict[str, Any]] = {
    "float32": {"student.dtype": "float32", "student.compute_dtype": "float32", "teacher.dtype": "float32"},
    "best": {"student.dtype": "float32", "student.compute_dtype": "bfloat16", "teacher.dtype": "bfloat16"},
}
# (bf16=True, dtype of the teacher handed over). A student in bfloat16 is not among them: without a float32 master copy
# small updates round away. It is measured apart.
PRECISIONS = ((False, "float32"), (False, "bfloat16"), (True, "float32"), (True, "bfloat16"))
# Where a step takes minutes, two trainers stand for the rest, in micro-batches of 8 (16 where they fit easily), and a
# float32 teacher under bf16=True, never the fastest elsewhere, is left out. GOLD is GKD's loss with more around it.
SEARCHED = {
    "a": tuple(TRAINERS),
    "b": ("distillation", "iw_opd"),
    "c": ("distillation", "gkd", "iw_opd"),
    "d": ("distillation", "iw_opd"),
}
SLOW = ("b", "d")
SLOW_PRECISIONS = tuple(p for p in PRECISIONS if p != (True, "float32"))
# (workload, kind, objective): times TRL's speed.
TARGETS = {
    ("a", "float32", "sampled"): 1.1,
    ("a", "float32", "full"): 1.1,
    ("a", "best", "sampled"): 2.0,
    ("a", "best", "full"): 2.0,
    ("b", "float32", "sampled"): 2.2,
    ("b", "float32", "full"): 1.7,
    ("b", "best", "sampled"): 4.0,
    ("b", "best", "full"): 2.2,
    ("c", "best", "sampled"): 3.0,
    ("c", "best", "full"): 3.0,
    ("d", "best", "sampled"): 3.0,
    ("d", "best", "full"): 3.0,
}
# Of TRL's peak memory, best against best.
MEMORY_TARGET = 0.5


def micro_sizes(workload: Workload, trainer: str) -> list[int]:
    """Rows per micro-batch to try. All but DistillationTrainer hold the logits of prompts and completions, several
    times over: 1 GB of them at most."""
    row = (workload.prompt_tokens + workload.max_tokens) * workload.vocab * 4
    sizes = (64, 16, 8) if workload.vocab < 4096 else (16, 8) if workload.vocab < 100_000 else (8,)
    return [size for size in sizes if trainer == "distillation" or size * row <= 1e9]


def precisions(name: str) -> tuple[tuple[bool, str], ...]:
    return SLOW_PRECISIONS if name in SLOW else PRECISIONS


def trl_setting(trainer: str, micro: int, precision: tuple[bool, str], student: str = "float32") -> dict[str, Any]:
    return {
        "trainer": trainer,
        "autocast": precision[0],
        "student": student,
        "teacher": precision[1],
        "micro": micro,
    }


def search(name: str, trainers: Sequence[str], record: dict[str, Any], folder: Path, threads: int) -> None:
    """TRL's fastest settings, one step each: the micro-batch in float32, then the precision at that size. What was
    measured before is not measured again."""
    rows: list[dict[str, Any]] = record.setdefault("search", [])

    def tried(setting: dict[str, Any]) -> float:
        known = [row for row in rows if row["workload"] == name and row["setting"] == setting]
        if not known:
            variant = {"name": describe(setting), "side": "TRL", "setting": setting}
            row = in_process(name, variant, folder, threads, quick=True)
            rows.append(row)
            known = [row]
            write(record)
        return known[0]["cpu_s"][0] if "cpu_s" in known[0] else float("inf")

    for trainer in trainers:
        sizes = micro_sizes(WORKLOADS[name], trainer)
        micro = min(sizes, key=lambda size: tried(trl_setting(trainer, size, PRECISIONS[0])))
        for precision in precisions(name)[1:]:
            tried(trl_setting(trainer, micro, precision))


def fastest(record: Mapping[str, Any], name: str, trainer: str, kind: str) -> dict[str, Any] | None:
    """The setting that the search found for a trainer."""
    rows = [
        row
        for row in record.get("search", [])
        if row["workload"] == name and row["setting"]["trainer"] == trainer and "cpu_s" in row
    ]
    if kind == "float32":
        rows = [row for row in rows if (row["setting"]["autocast"], row["setting"]["teacher"]) == PRECISIONS[0]]
    return min(rows, key=lambda row: row["cpu_s"][0])["setting"] if rows else None


def variants(record: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """What a round measures: every trainer and both of our objectives in float32, then each side's best."""
    found = []
    for kind, overrides in OURS.items():
        for objective in ("full", "sampled"):
            setting = {**overrides, "objective.estimator": objective}
            found.append(_variant(f"understudy {objective}", kind, "understudy", objective, setting))
        for trainer, objective in TRAINERS.items():
            setting = fastest(record, name, trainer, kind) if trainer in SEARCHED[name] else None
            if setting is not None and not any(row["setting"] == setting for row in found):
                found.append(_variant(describe(setting), kind, "TRL", objective, setting))
    best = [fastest(record, name, trainer, "best") for trainer in SEARCHED[name]]
    times = {json.dumps(row["setting"]): row["cpu_s"][0] for row in searched(record, name) if "cpu_s" in row}
    if any(best):
        setting = min((s for s in best if s), key=lambda s: times[json.dumps(s)])
        setting = trl_setting(setting["trainer"], setting["micro"], (False, "bfloat16"), student="bfloat16")
        found.append(_variant(describe(setting), "bfloat16 student", "TRL", TRAINERS[setting["trainer"]], setting))
    return found


def _variant(name: str, kind: str, side: str, objective: str, setting: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "kind": kind, "side": side, "objective": objective, "setting": setting}


def searched(record: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for row in record.get("search", []) if row["workload"] == name]


def unsearched(record: Mapping[str, Any], name: str) -> list[str]:
    """Trainers whose search has not come to its end."""
    settings = [row["setting"] for row in searched(record, name)]
    tried = {(s["trainer"], s["autocast"], s["teacher"]) for s in settings}
    wanted = SEARCHED[name]
    return [trainer for trainer in wanted if not all((trainer, *precision) in tried for precision in precisions(name))]


def describe(setting: Mapping[str, Any]) -> str:
    """A TRL setting in words."""
    words = [f"TRL {setting['trainer']}", f"micro-batch {setting['micro']}"]
    words += ["bf16=True"] if setting["autocast"] else []
    words += [f"{role} bfloat16" for role in ("student", "teacher") if setting[role] == "bfloat16"]
    return ", ".join(words)


def in_process(
    name: str, variant: Mapping[str, Any], folder: Path, threads: int, *, quick: bool = False
) -> dict[str, Any]:
    """A measurement's row. ``quick``: a single step, and an error is a result."""
    command = [sys.executable, __file__, "--variant", json.dumps(variant), "--workload", name, "--folder", str(folder)]
    command += ["--threads", str(threads), *(["--quick"] if quick else [])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    row: dict[str, Any] = {"workload": name, **variant}
    if done.returncode == 0:
        row |= json.loads(done.stdout.splitlines()[-1])
        seconds, peak = statistics.median(row["cpu_s"]), row["rss_peak_mb"] - row["rss_base_mb"]
        print(f"{name}  {row['name']:60} {seconds:8.2f} s {peak:8.0f} MB", flush=True)
    elif quick:
        row["failed"] = f"exit code {done.returncode}: {''.join(done.stderr.splitlines()[-1:])[:200]}"
        print(f"{name}  {row['name']:60} {row['failed']}", flush=True)
    else:
        raise SystemExit(f"{name} {row['name']}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return row


# Tables


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All measurements of a variant as one."""
    first, steps = rows[0], [seconds for row in rows for seconds in row["cpu_s"]]
    phases = [step for row in rows for step in row["phases"]]
    return {
        **{key: first[key] for key in ("workload", "name", "kind", "side", "objective", "setting", "micro_batches")},
        "cpu_s": statistics.median(steps),
        "low": min(steps),
        "high": max(steps),
        "wall_s": statistics.median(seconds for row in rows for seconds in row["wall_s"]),
        "phases": {phase: statistics.median(step.get(phase, 0.0) for step in phases) for phase in PHASES},
        "over_base_mb": statistics.median(row["rss_peak_mb"] - row["rss_base_mb"] for row in rows),
    }


def summaries(record: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in record.get("runs", []):
        if row["workload"] == name:
            groups.setdefault((row["name"], row["kind"]), []).append(row)
    return [summary(rows) for rows in groups.values()]


def opponent(rows: Sequence[Mapping[str, Any]], own: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """TRL's fastest with the same objective and no more freedom in precision."""
    kinds = ("float32",) if own["kind"] == "float32" else ("float32", "best")
    others = [
        row for row in rows if row["side"] == "TRL" and row["objective"] == own["objective"] and row["kind"] in kinds
    ]
    return min(others, key=lambda row: row["cpu_s"], default=None)


def verdicts(record: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """(target, measured, met)"""
    for name in WORKLOADS:
        rows = summaries(record, name)
        for own in rows:
            other = opponent(rows, own)
            target = TARGETS.get((name, own["kind"], own["objective"]))
            if own["side"] != "understudy" or other is None:
                continue
            what = f"{name}, {own['kind']}, {own['objective']}"
            if target is not None:
                ratio = other["cpu_s"] / own["cpu_s"]
                yield f"{what}: at least {target:g} times TRL's speed", f"{ratio:.2f} times", ratio >= target
            if own["kind"] == "best":
                share = own["over_base_mb"] / other["over_base_mb"]
                yield f"{what}: at most {MEMORY_TARGET:g} of TRL's memory", f"{share:.2f}", share <= MEMORY_TARGET


def markdown(record: Mapping[str, Any]) -> str:
    info = record["machine"]
    lines = [
        "One optimizer step of on-policy distillation: generation, teacher, student forward and backward, update. "
        "Medians over steps and rounds; seconds are CPU seconds. Peak: over the memory in use before the first step. "
        "Ratio: TRL's fastest with the same objective, by CPU seconds; in float32 against its fastest in float32.",
        "",
        ", ".join(f"{key} {' '.join(x) if isinstance(x, list) else x}" for key, x in info.items() if x is not None),
        "",
    ]
    for name, workload in WORKLOADS.items():
        rows = summaries(record, name)
        if not rows:
            continue
        lines += [
            f"## {name}: {workload.title}",
            "",
            floors(record, workload),
            "",
            "| | precision | micro-batches | CPU s | min..max | wall s | "
            + " | ".join(PHASES)
            + " | peak MB | ratio |",
            "|---|---|---:|---:|---:|---:|" + "---:|" * len(PHASES) + "---:|---:|",
        ]
        for row in rows:
            other = opponent(rows, row) if row["side"] == "understudy" else None
            cells = [row["name"], row["kind"], str(row["micro_batches"]), f"{row['cpu_s']:.2f}"]
            cells += [f"{row['low']:.2f}..{row['high']:.2f}", f"{row['wall_s']:.2f}"]
            cells += [f"{row['phases'][phase]:.2f}" for phase in PHASES]
            cells += [f"{row['over_base_mb']:.0f}", f"{other['cpu_s'] / row['cpu_s']:.2f}" if other else ""]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    targets = list(verdicts(record))
    if targets:
        lines += ["## Targets", "", "| target | measured | |", "|---|---|---|"]
        lines += [f"| {what} | {measured} | {'met' if met else 'missed'} |" for what, measured, met in targets]
        lines.append("")
    lines += ["## TRL's settings", "", "One step each, no warm-up.", ""]
    lines += ["| workload | setting | CPU s | peak MB |", "|---|---|---:|---:|"]
    for row in record.get("search", []):
        peak = row.get("rss_peak_mb", 0) - row.get("rss_base_mb", 0)
        cells = [f"{row['cpu_s'][0]:.2f}", f"{peak:.0f}"] if "cpu_s" in row else [row["failed"], ""]
        lines.append(f"| {row['workload']} | {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def floors(record: Mapping[str, Any], workload: Workload) -> str:
    """What the products of a step would take at the machine's rates."""
    length = sum(workload.lengths) // workload.rows
    needed = {}
    for objective in ("full", "sampled"):
        point = Point(workload.rows, workload.samples, workload.prompt_tokens, length, workload.vocab, objective)
        needed[objective] = sum(sum(flops(point, role)) for role in ROLES)
    parts = [
        f"{objective} {1e-9 * total:.0f} GFLOP, "
        + " or ".join(f"{total / rate:.1f} s in {dtype}" for dtype, rate in record["rates"].items())
        for objective, total in needed.items()
    ]
    rates = ", ".join(f"{1e-9 * rate:.0f} GFLOP/s in {dtype}" for dtype, rate in record["rates"].items())
    return f"Floor, every prompt read once: {'; '.join(parts)} (products of 2048 x 2048 matrices run at {rates})."


def write(record: dict[str, Any]) -> None:
    """Whole or not at all: an interruption must not lose hours of measurements."""
    RESULTS.parent.mkdir(exist_ok=True)
    record["settings"] = {
        name: {f"{trainer} {kind}": fastest(record, name, trainer, kind) for trainer in TRAINERS for kind in OURS}
        for name in WORKLOADS
        if searched(record, name)
    }
    new = RESULTS.with_suffix(".json.new")
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(RESULTS.with_suffix(".json"))


def whole_machine(threads: int) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return machine() | {"threads": threads, "cores": os.cpu_count(), "memory GB": round(memory)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, help="of --search")
    parser.add_argument("--search", action="store_true", help="find TRL's fastest settings")
    parser.add_argument("--rounds", type=int, help="default: 3, and 2 of the slow workloads")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="keep the runs of results/step.json")
    parser.add_argument("--render", action="store_true", help="rewrite the tables from the JSON")
    parser.add_argument("--variant", help="measure in this process: a variant as JSON, or a name of --list")
    parser.add_argument("--list", action="store_true", help="the variants of each workload")
    parser.add_argument("--folder", type=Path, help="with --variant: where the workload's models lie")
    parser.add_argument("--quick", action="store_true", help="with --variant: one step, no warm-up")
    arguments = parser.parse_args()
    path = RESULTS.with_suffix(".json")
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if arguments.variant:
        [name] = arguments.workload
        torch.set_num_threads(arguments.threads)
        known = {f"{row['name']} {row['kind']}": row for row in variants(record, name)}
        variant = known.get(arguments.variant) or json.loads(arguments.variant)
        workload = WORKLOADS[name]
        workload = replace(workload, warmup=0, steps=1) if arguments.quick else workload
        with tempfile.TemporaryDirectory() as scratch:
            folder = arguments.folder or Path(scratch)
            prepare(workload, folder)
            measure = measure_understudy if variant["side"] == "understudy" else measure_trl
            print(json.dumps(measure(workload, folder, variant["setting"])))
        return
    if arguments.list:
        print("\n".join(f"{name}: {row['name']} {row['kind']}" for name in WORKLOADS for row in variants(record, name)))
        return
    if not arguments.render:
        record["machine"] = whole_machine(arguments.threads)
        torch.set_num_threads(arguments.threads)
        dtypes = torch.float32, torch.bfloat16
        record["rates"] = {str(dtype).removeprefix("torch."): matmul_rate(dtype) for dtype in dtypes}
    if not (arguments.render or arguments.search or arguments.resume):
        record["runs"] = [row for row in record.get("runs", []) if row["workload"] not in arguments.workload]
    for name in [] if arguments.render else arguments.workload:
        with tempfile.TemporaryDirectory() as scratch:
            prepare(WORKLOADS[name], Path(scratch))
            if arguments.search:
                chosen = arguments.trainers or SEARCHED[name]
                search(name, chosen, record, Path(scratch), arguments.threads)
            else:
                run(name, arguments.rounds, record, Path(scratch), arguments.threads)
    RESULTS.with_suffix(".md").write_text(markdown(record))


def run(name: str, rounds: int | None, record: dict[str, Any], folder: Path, threads: int) -> None:
    """All variants of a workload, round by round."""
    runs: list[dict[str, Any]] = record.setdefault("runs", [])
    if unsearched(record, name):
        raise SystemExit(f"{name}: no fastest setting of {', '.join(unsearched(record, name))} yet; run --search first")
    for number in range(rounds or (2 if name in SLOW else 3)):
        for variant in variants(record, name):
            key = {"workload": name, "round": number, "name": variant["name"], "kind": variant["kind"]}
            if not any(key.items() <= row.items() for row in runs):
                runs.append({"round": number, **in_process(name, variant, folder, threads)})
                write(record)


if __name__ == "__main__":
    main()

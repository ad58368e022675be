"""What each lever of understudy's step pays: the step as shipped against the step with one thing taken back.

    OMP_NUM_THREADS=1 python benchmarks/levers.py                  # half an hour on one core
    OMP_NUM_THREADS=1 python benchmarks/levers.py --workload c     # one workload; the other results stay
    python benchmarks/levers.py --render                           # the table again, from the JSON

Workloads and clock are step.py's. Every measurement is a process of its own; rounds interleave the variants.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _step import WORKLOADS, measure_understudy, prepare
from step import OURS, PHASES, whole_machine
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "levers"


def no_matmul_attention() -> None:
    from understudy.backends import loading

    loading.use_matmul_attention = lambda model: None


def no_shared_prompts() -> None:
    """In scoring and training; sampling still reads a prompt once."""
    from understudy.backends import language_model

    language_model._can_share_prompts = lambda model: False


def no_chosen_rows() -> None:
    """Every row reads its own prompt, and stays in the batch to the end."""
    from understudy.backends import decoding

    decoding.new_cache = lambda config, in_place: None


def one_cumulative_sum() -> None:
    """Sampling by a float64 cumulative sum over all logits."""
    from understudy.backends import decoding

    def choose(self: Any, hidden: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = self._head.logprobs(hidden, temperature=self._temperature)
        cumulative = logprobs.double().exp().cumsum(-1)
        ids = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None])[:, 0]
        return ids, logprobs.gather(-1, ids[:, None])[:, 0]

    decoding.TokenChooser.__call__ = choose


# Name -> (patch, overrides of a run's configuration), and the workloads where it matters.
Lever = tuple[Callable[[], None] | None, dict[str, Any]]
LEVERS: dict[str, Lever] = {
    "as shipped": (None, {}),
    "student in float32": (None, {"student.compute_dtype": "float32"}),
    "teacher in float32": (None, {"teacher.dtype": "float32"}),
    "torch's bfloat16 attention": (no_matmul_attention, {}),
    "prompts not shared in scoring and training": (no_shared_prompts, {}),
    "sampling: prompts not shared, ended rows kept": (no_chosen_rows, {}),
    "sampling: one cumulative sum over the vocabulary": (one_cumulative_sum, {}),
    "micro-batches of 1024 tokens": (None, {"optim.micro_batch_tokens": 1024}),
    "micro-batches of 4096 tokens": (None, {"optim.micro_batch_tokens": 4096}),
    "micro-batches of 16384 tokens": (None, {"optim.micro_batch_tokens": 16384}),
}
_NAMES = list(LEVERS)
WHERE = {
    "a": [name for name in _NAMES if "cumulative" not in name],
    "b": ["as shipped", "sampling: one cumulative sum over the vocabulary", "micro-batches of 4096 tokens"],
    "c": ["as shipped", _NAMES[3], _NAMES[4], _NAMES[5], _NAMES[9]],
    "d": ["as shipped", _NAMES[4], _NAMES[5]],
}


def measure(workload: str, lever: str, folder: Path) -> dict[str, Any]:
    """A measurement in this process."""
    patch, overrides = LEVERS[lever]
    if patch is not None:
        patch()
    torch.set_num_threads(1)
    estimator = {"objective.estimator": "sampled" if workload == "b" else "full"}
    return measure_understudy(replace(WORKLOADS[workload]), folder, {**OURS["best"], **estimator, **overrides})


def run(workload: str, rounds: int, record: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        prepare(WORKLOADS[workload], Path(scratch))
        for number in range(rounds):
            for lever in WHERE[workload]:
                command = [sys.executable, __file__, "--measure", lever, "--workload", workload, "--folder", scratch]
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
                if done.returncode:
                    raise SystemExit(f"{workload} {lever}: exit code {done.returncode}\n{done.stderr[-3000:]}")
                row = {
                    "workload": workload,
                    "lever": lever,
                    "round": number,
                    **json.loads(done.stdout.splitlines()[-1]),
                }
                record["runs"].append(row)
                print(workload, lever, row["cpu_s"], flush=True)
                RESULTS.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def markdown(record: dict[str, Any]) -> str:
    lines = [
        "One step with one lever taken back, against the step as shipped. Medians over steps and rounds of CPU "
        "seconds; ratio: how many times longer the step takes without the lever (below 1: it would be faster).",
        "",
        ", ".join(f"{k} {' '.join(x) if isinstance(x, list) else x}" for k, x in record["machine"].items() if x),
        "",
    ]
    for name, workload in WORKLOADS.items():
        rows = [row for row in record["runs"] if row["workload"] == name]
        if not rows:
            continue
        lines += [f"## {name}: {workload.title}", "", f"| | CPU s | ratio | {' | '.join(PHASES)} | peak MB |"]
        lines.append("|---|---:|---:|" + "---:|" * len(PHASES) + "---:|")
        shipped = 0.0
        for lever in WHERE[name]:
            own = [row for row in rows if row["lever"] == lever]
            seconds = statistics.median(s for row in own for s in row["cpu_s"])
            shipped = shipped or seconds
            phases = [step for row in own for step in row["phases"]]
            cells = [lever, f"{seconds:.2f}", f"{seconds / shipped:.2f}"]
            cells += [f"{statistics.median(step.get(phase, 0.0) for step in phases):.2f}" for phase in PHASES]
            cells.append(f"{statistics.median(row['rss_peak_mb'] - row['rss_base_mb'] for row in own):.0f}")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--render", action="store_true", help="rewrite the table from the JSON")
    parser.add_argument("--measure", choices=LEVERS, help="one lever, in this process")
    parser.add_argument("--folder", type=Path, help="with --measure: where the workload's models lie")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.workload[0], arguments.measure, arguments.folder)))
        return
    path = RESULTS.with_suffix(".json")
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": []}
    if not arguments.render:
        record["machine"] = whole_machine(1)
        record["runs"] = [row for row in record["runs"] if row["workload"] not in arguments.workload]
        for name in arguments.workload:
            run(name, arguments.rounds, record)
    RESULTS.with_suffix(".md").write_text(markdown(record))


if __name__ == "__main__":
    main()

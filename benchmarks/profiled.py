"""What kinds of operations understudy's step spends its time in, as torch's profiler sees it.

    OMP_NUM_THREADS=1 python benchmarks/profiled.py      # ten minutes on one core

Workloads are step.py's, in its "best" precisions: two steps each. The profiler itself slows small operations down, so
that shares are to be read, not seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from _step import WORKLOADS, measure_understudy, prepare
from scaling import matmul_rate
from step import OURS, whole_machine
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results" / "profiled"
# What each workload is profiled with, and operations by kind; what is in none of them is "other".
ESTIMATORS = {"a": "full", "b": "sampled", "c": "full", "d": "full"}
KINDS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "mkldnn_linear"),
    "attention in decoding": ("_scaled_dot_product_flash_attention_for_cpu",),
    "softmax, exponentials": ("_softmax", "_softmax_backward_data", "exp_", "exp", "logsumexp", "amax", "sum", "log"),
    "copies, casts, zeros": (
        "copy_",
        "cat",
        "fill_",
        "index_select",
        "clone",
        "index",
        "zero_",
        "gather",
        "index_put_",
    ),
}


def kinds_of(workload: str, folder: Path) -> dict[str, float]:
    """Share of each kind in the time spent inside operations."""
    torch.set_num_threads(1)
    short = replace(WORKLOADS[workload], warmup=0, steps=2)
    overrides = {**OURS["best"], "objective.estimator": ESTIMATORS[workload]}
    with profile(activities=[ProfilerActivity.CPU]) as found:
        measure_understudy(short, folder, overrides)
    by_name = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}
    seconds: Counter[str] = Counter()
    for event in found.key_averages():
        if event.key.startswith(("aten::", "mkldnn")):
            seconds[by_name.get(event.key, "other")] += event.self_cpu_time_total
    total = sum(seconds.values())
    return {kind: seconds[kind] / total for kind in (*KINDS, "other")}


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(kinds_of(sys.argv[1], Path(sys.argv[2]))))
        return
    torch.set_num_threads(1)
    dtypes = torch.float32, torch.bfloat16
    rates = {str(dtype).removeprefix("torch."): matmul_rate(dtype) for dtype in dtypes}
    record = {"machine": whole_machine(1), "rates": rates, "shares": {}}
    for name in WORKLOADS:
        with tempfile.TemporaryDirectory() as scratch:
            prepare(WORKLOADS[name], Path(scratch))
            command = [sys.executable, __file__, name, scratch]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            if done.returncode:
                raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr[-3000:]}")
            record["shares"][name] = json.loads(done.stdout.splitlines()[-1])
            print(name, record["shares"][name], flush=True)
    RESULTS.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    kinds = (*KINDS, "other")
    lines = ["Share of the time inside torch's operations, two steps each.", ""]
    lines.append(
        ", ".join(f"{k} {' '.join(x) if isinstance(x, list) else x}" for k, x in record["machine"].items() if x)
    )
    lines += ["", f"| | {' | '.join(kinds)} |", "|---|" + "---:|" * len(kinds)]
    for name, shares in record["shares"].items():
        lines.append(f"| {name}, {ESTIMATORS[name]} | {' | '.join(f'{shares[kind]:.0%}' for kind in kinds)} |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

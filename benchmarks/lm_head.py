"""Time and memory of losses at the LM head: understudy's against the plain ones and TRL's. See README.md beside it.

    OMP_NUM_THREADS=1 python benchmarks/lm_head.py             # everything, an hour on one core
    OMP_NUM_THREADS=1 python benchmarks/lm_head.py --quick     # 256 tokens once: does it run?
    python benchmarks/lm_head.py --render                      # table and chart again, from the JSON

Every measurement is a process of its own, on one thread; repetitions are interleaved, so that a busy machine slows all
variants alike. Memory is the peak over what inputs and libraries occupy before; gradients are part of it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from understudy.lm_head import LMHead, divergence_from_hidden, logprob_loss, selected_logprobs
from understudy.report.charts import Series, line_chart, picture

RESULTS = Path(__file__).parent / "results" / "lm_head"
# Qwen3's vocabulary; 8 sequences of 512 tokens; hidden sizes of a small student and a larger teacher.
VOCAB, TOKENS, STUDENT_WIDTH, TEACHER_WIDTH = 151_936, 4096, 256, 512
SCALING = [(n, VOCAB) for n in (512, 1024, 2048, 4096, 8192, 16384)] + [(2048, v * 1024) for v in (32, 64, 128, 256)]
CHUNK = 512

Loss = Callable[..., Tensor]


# Sampled token: minus the sum of advantages times log-probabilities.


def naive(hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Tensor) -> Tensor:
    logprobs = F.linear(hidden, weight).float().log_softmax(-1)
    return -(logprobs.gather(-1, ids[:, None])[:, 0] * advantages).sum()


def logsumexp_gather(hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return -((logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)) * advantages).sum()


def chunks(loss: Loss, hidden: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Token by token recomputed in the backward pass, CHUNK at a time."""
    parts = [x.split(CHUNK) for x in (hidden, first, second)]
    total = hidden.new_zeros((), dtype=torch.float32)
    for own, one, other in zip(*parts, strict=True):
        total = total + checkpoint(loss, own, weight, one, other, use_reentrant=False)
    return total


def two_projections(hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Tensor) -> Tensor:
    return -(selected_logprobs(hidden, weight, ids) * advantages).sum()


def one_projection(hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Tensor) -> Tensor:
    return logprob_loss(LMHead(weight), hidden, ids, lambda logprobs, rows: -(logprobs * advantages[rows]).sum())[0]


def liger_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Tensor) -> Tensor:
    """Without the advantages: Liger's loss knows no token weights."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, ids)


# Full reverse KL: KL(student || teacher), summed over tokens.


def kl_naive(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    log_p = F.linear(hidden, weight).float().log_softmax(-1)
    log_q = F.linear(teacher_hidden, teacher_weight).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def kl_chunks(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    def piece(own: Tensor, weight: Tensor, other: Tensor, _: Tensor) -> Tensor:
        return kl_naive(own, weight, other, teacher_weight)

    return chunks(piece, hidden, weight, teacher_hidden, teacher_hidden)


def kl_ours(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    mask = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    return divergence_from_hidden(hidden, weight, teacher_hidden, teacher_weight, mask).loss


def kl_trl(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # pyright: ignore[reportMissingImports]

    return ChunkedDivergenceFunction.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, 1.0)[0].sum()


def kl_liger(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """A mean over tokens, unlike the others."""
    from liger_kernel.transformers import LigerFusedLinearJSD  # pyright: ignore[reportMissingImports]

    labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    return LigerFusedLinearJSD(jsd_beta=1.0)(hidden, weight, teacher_hidden, teacher_weight, labels)


SAMPLED: dict[str, Loss] = {
    "naive": naive,
    "logsumexp + gather": logsumexp_gather,
    "chunks + checkpoint": lambda *inputs: chunks(logsumexp_gather, *inputs),
    "understudy selected_logprobs": two_projections,
    "understudy logprob_loss": one_projection,
}
FULL: dict[str, Loss] = {
    "KL naive": kl_naive,
    "KL chunks + checkpoint": kl_chunks,
    "KL TRL chunked": kl_trl,
    "KL understudy": kl_ours,
}
OURS = ("understudy logprob_loss", "KL understudy")
ON_CUDA: dict[str, Loss] = {
    "compiled": lambda *inputs: torch.compile(naive)(*inputs),
    "Liger cross-entropy": liger_cross_entropy,
    "KL compiled": lambda *inputs: torch.compile(kl_naive)(*inputs),
    "KL Liger JSD": kl_liger,
}
MODULES = {
    "KL TRL chunked": "trl.kernels.chunked_divergence",
    "Liger cross-entropy": "liger_kernel.transformers",
    "KL Liger JSD": "liger_kernel.transformers",
}


def available() -> list[str]:
    names = [*SAMPLED, *FULL, *(ON_CUDA if torch.cuda.is_available() else {})]
    return [name for name in names if importlib.util.find_spec(MODULES.get(name, "torch").split(".")[0])]


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def measure(name: str, dtype_name: str, tokens: int, vocab_size: int) -> dict[str, Any]:
    """One forward and backward pass in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, dtype_name)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).mul_(scale)

    hidden = draw(tokens, STUDENT_WIDTH).requires_grad_()
    # Logits of standard deviation 1.6.
    weight = draw(vocab_size, STUDENT_WIDTH, scale=0.1).requires_grad_()
    if name.startswith("KL"):
        rest = draw(tokens, TEACHER_WIDTH), draw(vocab_size, TEACHER_WIDTH, scale=0.07)
    else:
        rest = torch.randint(vocab_size, (tokens,), device=device), torch.randn(tokens, device=device)
    loss_function = {**SAMPLED, **FULL, **ON_CUDA}[name]
    # Imports, compilation and CUDA's own start are not what is measured.
    importlib.import_module(MODULES.get(name, "torch"))
    if device.type == "cuda":
        loss_function(hidden, weight, *rest).backward()
        hidden.grad = weight.grad = None
    before = start_memory(device)
    cpu, wall = time.process_time(), time.perf_counter()
    loss = loss_function(hidden, weight, *rest)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = memory_mb("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "name": name,
        "dtype": dtype_name,
        "tokens": tokens,
        "vocab_size": vocab_size,
        "cpu_s": round(cpu, 3),
        "wall_s": round(wall, 3),
        "peak_mb": round(peak - before, 1),
        "gradients_mb": round((hidden.grad.nbytes + weight.grad.nbytes) / 2**20, 1),
        "loss": float(loss.detach()),
        "hidden_gradient": float(hidden.grad.float().norm()),
        "weight_gradient": float(weight.grad.float().norm()),
    }


def start_memory(device: torch.device) -> float:
    """Forget the peak so far; MB in use."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mb("VmRSS")


def in_process(name: str, dtype: str, tokens: int, vocab_size: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name, dtype, str(tokens), str(vocab_size)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{name} {dtype}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    row = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{name:30} {dtype:9} {tokens:6} x {vocab_size:6}  {row['cpu_s']:7.2f} s  {row['peak_mb']:8.0f} MB", flush=True
    )
    return row


def medians(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per variant and dtype; numbers are medians over repetitions."""
    groups: dict[tuple[str, str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["dtype"], row["tokens"], row["vocab_size"]), []).append(row)
    merged = []
    for group in groups.values():
        row = {key: value for key, value in group[0].items() if isinstance(value, str)}
        numbers = [key for key, value in group[0].items() if not isinstance(value, str)]
        merged.append(row | {key: statistics.median(row[key] for row in group) for key in numbers})
    return merged


def machine() -> dict[str, Any]:
    packages = {}
    for package in ("torch", "trl", "transformers", "liger_kernel"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    field = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in field.items()}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpu = f"{fields.get('model name')} (family {fields.get('cpu family')}, model {fields.get('model')})"
    return {"cpu": cpu, "flags": flags, "gpu": gpu, "threads": 1, "python": platform.python_version(), **packages}


def verdicts(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, bool]]:
    """(target, measured, met)"""
    by = {(row["name"], row["dtype"]): row for row in rows}
    ours, kl = by["understudy logprob_loss", "float32"], by["KL understudy", "float32"]
    ratio = by["naive", "float32"]["cpu_s"] / ours["cpu_s"]
    lines = [
        ("sampled token, float32: peak at most 300 MB", f"{ours['peak_mb']:.0f} MB", ours["peak_mb"] <= 300),
        ("sampled token, float32: not slower than naive", f"{ratio:.2f} times naive's speed", ratio >= 1),
        ("full reverse KL, float32: peak at most 500 MB", f"{kl['peak_mb']:.0f} MB", kl["peak_mb"] <= 500),
    ]
    if ("KL TRL chunked", "float32") in by:
        ratio = by["KL TRL chunked", "float32"]["cpu_s"] / kl["cpu_s"]
        lines.append(("full reverse KL, float32: at least 1.8 times TRL's speed", f"{ratio:.2f} times", ratio >= 1.8))
    for name in OURS:
        ratio = by[name, "float32"]["cpu_s"] / by[name, "bfloat16"]["cpu_s"]
        lines.append((f"{name}: bfloat16 at least twice as fast as float32", f"{ratio:.2f} times", ratio >= 2))
    return lines


def markdown(record: dict[str, Any]) -> str:
    rows, info = record["medians"], record["machine"]
    first = rows[0]
    lines = [
        f"LM-head losses, forward and backward: {first['tokens']} tokens, vocabulary {first['vocab_size']}, hidden "
        f"size {STUDENT_WIDTH} (teacher {TEACHER_WIDTH}). Medians of {record['repetitions']} interleaved runs, each in "
        "a fresh process. Peak: over the memory in use before, gradients included.",
        "",
        ", ".join(f"{key} {' '.join(x) if isinstance(x, list) else x}" for key, x in info.items() if x is not None),
        "",
        "| loss | dtype | CPU s | wall s | peak MB |",
        "|---|---|---:|---:|---:|",
        *(
            f"| {row['name']} | {row['dtype']} | {row['cpu_s']:.1f} | {row['wall_s']:.1f} | {row['peak_mb']:.0f} |"
            for row in rows
        ),
        "",
        "| target | measured | |",
        "|---|---|---|",
        *(f"| {target} | {measured} | {'met' if met else 'missed'} |" for target, measured, met in verdicts(rows)),
        "",
    ]
    if record["scaling"]:
        lines += [
            "Working memory, float32: peak less the gradients.",
            "",
            "| tokens | vocabulary | logprob_loss MB | KL MB |",
            "|---:|---:|---:|---:|",
        ]
        working = {
            (r["name"], r["tokens"], r["vocab_size"]): r["peak_mb"] - r["gradients_mb"] for r in record["scaling"]
        }
        for tokens, vocab_size in dict.fromkeys((r["tokens"], r["vocab_size"]) for r in record["scaling"]):
            both = (working[name, tokens, vocab_size] for name in OURS)
            lines.append(f"| {tokens} | {vocab_size} | {' | '.join(f'{mb:.0f}' for mb in both)} |")
    return "\n".join(lines) + "\n"


def chart(scaling: Sequence[dict[str, Any]]) -> str:
    """Working memory over the number of logits, N x V: tokens and vocabulary both move along it."""
    series = []
    for name in OURS:
        for label, wanted in (
            (f"V = {VOCAB:,}", lambda r: r["vocab_size"] == VOCAB),
            ("N = 2,048", lambda r: r["tokens"] == 2048),
        ):
            own = [r for r in scaling if r["name"] == name and wanted(r)]
            points = [(r["tokens"] * r["vocab_size"] / 1e6, r["peak_mb"] - r["gradients_mb"]) for r in own]
            series.append(Series(f"{name.removeprefix('understudy ')}, {label}", sorted(points)))
    return line_chart(
        series,
        title="Working memory of a loss (peak less gradients)",
        x_label="logits: tokens x vocabulary, millions",
        y_label="MB",
        log_x=True,
    )


def write(record: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(record))
    # Charts are made to stand in a page; a file of its own needs the namespace, and a font.
    alone = '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" '
    RESULTS.with_suffix(".svg").write_text(picture(chart(record["scaling"])).replace("<svg ", alone, 1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=4, metavar=("NAME", "DTYPE", "TOKENS", "VOCAB"), help="measure in this process")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="256 tokens, one repetition, nothing written")
    parser.add_argument("--render", action="store_true", help="rewrite table and chart from the JSON")
    arguments = parser.parse_args()
    if arguments.one:
        name, dtype, tokens, vocab_size = arguments.one
        print(json.dumps(measure(name, dtype, int(tokens), int(vocab_size))))
        return
    if arguments.render:
        write(json.loads(RESULTS.with_suffix(".json").read_text()))
        return
    tokens, repetitions = (256, 1) if arguments.quick else (TOKENS, arguments.repetitions)
    cells = [(name, dtype) for dtype in ("float32", "bfloat16") for name in available()]
    runs = [in_process(*cell, tokens, VOCAB) for _ in range(repetitions) for cell in cells]
    shapes = [] if arguments.quick else [(name, "float32", *shape) for shape in SCALING for name in OURS]
    scaling = [in_process(*shape) for shape in shapes]
    common = {"machine": machine(), "repetitions": repetitions}
    record = common | {"medians": medians(runs), "scaling": scaling, "runs": runs}
    print(markdown(record))
    if not arguments.quick:
        write(record)


if __name__ == "__main__":
    main()

"""Pieces of a step done in another way, each pair interleaved in one process: what docs/performance.md decides by.

    OMP_NUM_THREADS=1 python benchmarks/tried.py        # five minutes on one core, two of them torch.compile's

CPU only. Models and sizes are workload a's of step.py. Medians of CPU seconds.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _step import WORKLOADS, prepare
from step import whole_machine
from torch import Tensor, nn

from understudy.backends import decoding, loading
from understudy.backends.attention import attention
from understudy.backends.language_model import LanguageModel
from understudy.lm_head import LMHead

RESULTS = Path(__file__).parent / "results" / "tried"
BF16 = torch.bfloat16
Pair = tuple[str, Callable[[], Any], Callable[[], Any]]


def interleaved(before: Callable[[], Any], after: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    """CPU seconds of both, turn by turn, after one turn to warm up."""
    seconds: tuple[list[float], list[float]] = [], []
    for turn in range(repeats + 1):
        for own, work in zip(seconds, (before, after), strict=True):
            start = time.process_time()
            work()
            if turn:
                own.append(time.process_time() - start)
    return seconds


def pairs(folder: Path) -> Iterator[tuple[str, str, list[Pair], int]]:
    """(title, what it says, pairs, repeats)"""
    yield "Matrix products", "float32 against bfloat16, GFLOP of each: see the rates", list(products()), 9
    yield "Attention", "torch's kernel against two matrix products, bfloat16", list(attentions()), 9
    yield "Sampling a token", "64 rows: one float64 cumulative sum against two levels, head included", list(draws()), 9
    student, shadow, teacher = models(folder)
    yield "Decoding", "64 rows, 128 tokens: as shipped against the alternative", list(decodings(shadow)), 3
    yield "Norms", "transformers' RMSNorm, [2560, 512] bfloat16, against the alternative", list(norms()), 9
    yield "torch.compile", "16 rows of 160 tokens; seconds of compiling apart", list(compiled(student, teacher)), 5


def products() -> Iterator[Pair]:
    for rows, width, out in ((2048, 2048, 2048), (2048, 512, 1536), (64, 256, 1024), (64, 256, 151_936)):
        x, w = torch.randn(rows, width), torch.randn(out, width)
        x_half, w_half = x.to(BF16), w.to(BF16)
        gflop = 2e-9 * rows * width * out
        yield (
            f"{rows} x {width} x {out} ({gflop:.2f} GFLOP)",
            lambda x=x, w=w: F.linear(x, w),
            (lambda x=x_half, w=w_half: F.linear(x, w)),
        )
    x, w = torch.randn(2048, 512), torch.randn(1536, 512)
    linear: Any = torch.ops.mkldnn._linear_pointwise
    yield (
        "float32: MKL against oneDNN, 2048 x 512 x 1536",
        lambda: F.linear(x, w),
        lambda: linear(x, w, None, "none", [], ""),
    )


def attentions() -> Iterator[Pair]:
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2  # pyright: ignore
    for rows, heads, length, total in ((64, 4, 1, 96), (16, 4, 160, 160), (16, 8, 160, 160)):
        q, k, v = (
            torch.randn(rows, h, n, 64, dtype=BF16, requires_grad=length > 1)
            for h, n in ((heads, length), (heads // 2, total), (heads // 2, total))
        )

        def torchs(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)

        def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return attention(module, q, k, v, None)[0]

        title = f"{rows} rows, {heads} heads, {length} of {total} positions"
        if length == 1:
            yield title, torchs, ours
        else:
            yield f"{title}, forward and backward", _both_ways(torchs), _both_ways(ours)


def _both_ways(work: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: work().float().sum().backward()


def draws() -> Iterator[Pair]:
    uniforms = torch.rand(64, dtype=torch.float64)
    for vocab in (512, 151_936):
        for dtype in (torch.float32, BF16):
            hidden, head = torch.randn(64, 256, dtype=dtype), LMHead(0.05 * torch.randn(vocab, 256, dtype=dtype))
            chooser = decoding.TokenChooser(head, rows=64, temperature=1.0)

            def plain(hidden: Tensor = hidden, head: LMHead = head) -> Tensor:
                cumulative = head.logprobs(hidden).double().exp().cumsum(-1)
                return torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None])

            name = f"vocabulary {vocab}, {str(dtype).removeprefix('torch.')}"
            yield name, plain, lambda c=chooser, h=hidden: c(h, uniforms)
            yield (
                f"{name}: the head's product alone against all of it",
                lambda h=hidden, w=head.weight: h @ w.T,
                (lambda c=chooser, h=hidden: c(h, uniforms)),
            )


def models(folder: Path) -> tuple[LanguageModel, LanguageModel, LanguageModel]:
    """Student, its bfloat16 copy, teacher in bfloat16."""
    cpu = torch.device("cpu")
    student = LanguageModel(
        loading.load_model(str(folder / "student"), role="student", dtype=torch.float32, device=cpu)
    )
    teacher = loading.load_model(str(folder / "teacher"), role="teacher", dtype=BF16, device=cpu).requires_grad_(False)
    return student, student.copy_in(BF16), LanguageModel(teacher)


def decodings(model: LanguageModel) -> Iterator[Pair]:
    prompts = [p for p in torch.randint(2, 512, (16, 32)).tolist() for _ in range(4)]
    uniforms = np.random.default_rng(0).random((64, 128))
    raw: Any = decoding.decode

    def run() -> None:
        raw(model, prompts, uniforms, stop_ids=frozenset(), max_tokens=[128] * 64, temperature=1.0)

    def in_inference_mode() -> None:
        with torch.inference_mode():
            raw.__wrapped__(model, prompts, uniforms, stop_ids=frozenset(), max_tokens=[128] * 64, temperature=1.0)

    def growing() -> None:
        shipped = decoding.new_cache
        decoding.new_cache = lambda config, in_place: shipped(config)
        try:
            run()
        finally:
            decoding.new_cache = shipped

    yield "torch.inference_mode", run, in_inference_mode
    yield "a bfloat16 cache that is copied at every step", run, growing


def norms() -> Iterator[Pair]:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    x, norm = torch.randn(2560, 512, dtype=BF16), Qwen3RMSNorm(512).to(BF16).requires_grad_(False)
    yield "torch.nn.functional.rms_norm", lambda: norm(x), lambda: F.rms_norm(x, (512,), norm.weight, 1e-6)


def compiled(student: LanguageModel, teacher: LanguageModel) -> Iterator[Pair]:
    ids = torch.randint(2, 512, (16, 160))

    @torch.no_grad()
    def score(model: Callable[..., Any]) -> None:
        model(ids, use_cache=False)

    def train(model: Callable[..., Any]) -> None:
        with torch.autocast("cpu", BF16):
            model(ids, use_cache=False).last_hidden_state.float().square().sum().backward()

    for name, model, work in (("teacher, forward", teacher, score), ("student, forward and backward", student, train)):
        fast = torch.compile(model.hidden, dynamic=False)
        start = time.perf_counter()
        work(fast)
        yield (
            f"{name} (compiled in {time.perf_counter() - start:.0f} s)",
            (lambda m=model.hidden, w=work: w(m)),
            lambda m=fast, w=work: w(m),
        )


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    record: dict[str, Any] = {"machine": whole_machine(1), "pairs": []}
    lines = ["Medians of CPU milliseconds, turn by turn; ratio: before / after.", ""]
    lines.append(
        ", ".join(f"{k} {' '.join(x) if isinstance(x, list) else x}" for k, x in record["machine"].items() if x)
    )
    with tempfile.TemporaryDirectory() as scratch:
        prepare(WORKLOADS["a"], Path(scratch))
        for title, what, found, repeats in pairs(Path(scratch)):
            lines += ["", f"## {title}", "", what[0].upper() + what[1:] + ".", "", "| | before | after | ratio |"]
            lines.append("|---|---:|---:|---:|")
            for name, before, after in found:
                seconds = interleaved(before, after, repeats)
                medians = [statistics.median(own) for own in seconds]
                record["pairs"].append({"section": title, "name": name, "before_s": seconds[0], "after_s": seconds[1]})
                cells = [f"{1e3 * m:.2f}" for m in medians]
                lines.append(f"| {name} | {' | '.join(cells)} | {medians[0] / medians[1]:.2f} |")
                print(lines[-1], flush=True)
                RESULTS.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
                RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""What each phase of a step costs as completions, groups, batches and vocabularies grow. See README.md beside it.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py             # everything, a quarter of an hour on one core
    OMP_NUM_THREADS=1 python benchmarks/scaling.py --resume    # go on after an interruption
    OMP_NUM_THREADS=1 python benchmarks/scaling.py --quick     # one small point, nothing written: does it run?
    python benchmarks/scaling.py --render                      # tables and chart again, from the JSON

Models and precision are those of step.py ("best"); every completion has its full length. One quantity varies at a time,
each point is a process of its own, and beside a time stands its floor: the products' FLOPs at this machine's rate.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _step import LEARNING_RATE, SHAPES, Workload, prepare
from lm_head import machine, memory_mb, start_memory

from understudy.report.chart_shapes import GRID_STYLE, LABEL_STYLE, PALETTE, TITLE_STYLE
from understudy.report.scales import Axis, log_ticks

RESULTS = Path(__file__).parent / "results" / "scaling"
PHASES = ("sampling", "scoring", "training")
HEAD_DIM = 64  # of both models, see _step.prepare
# Cost per token counts as flat up to this many times the axis's smallest.
FLAT = 1.3


@dataclass(frozen=True)
class Point:
    """One step: ``rows`` completions of ``length`` tokens, ``group`` of them behind each prompt of ``prompt``."""

    rows: int = 16
    group: int = 4
    prompt: int = 32
    length: int = 128
    vocab: int = 512
    objective: str = "sampled"

    @property
    def tokens(self) -> int:
        """What has to go through a model: each prompt once, and completions but for their last tokens."""
        return self.rows // self.group * self.prompt + self.rows * (self.length - 1)

    @property
    def pairs(self) -> int:
        """Query and key, causal."""
        prompts = self.rows // self.group * self.prompt * (self.prompt + 1) // 2
        return prompts + self.rows * (self.length - 1) * (2 * self.prompt + self.length) // 2


VOCABS = (512, 4096, 32_768, 151_936)
# Name: label, base point, points. Long completions take few rows; sharing prompts shows where prompts are long.
AXES: dict[str, tuple[str, int, list[tuple[int, Point]]]] = {
    "length": ("completion length, 8 rows", 128, [(2**n, Point(rows=8, length=2**n)) for n in range(6, 12)]),
    "group": ("group size, prompts of 256", 4, [(n, Point(group=n, prompt=256)) for n in (1, 2, 4, 8, 16)]),
    "rows": ("rows", 16, [(n, Point(rows=n)) for n in (8, 16, 32, 64, 128)]),
    "vocab": ("vocabulary", 512, [(n, Point(vocab=n)) for n in VOCABS]),
    "vocab, full": ("vocabulary, full objective", 512, [(n, Point(vocab=n, objective="full")) for n in VOCABS]),
}


def flops(point: Point, phase: str) -> tuple[float, float]:
    """(products with weights, attention) of a phase. A token costs 2 per weight forward and 6 in training; the head
    runs on completion tokens only. The full objective reads the teacher's head once more while it trains."""
    hidden, layers, heads, kv_heads, feed_forward = SHAPES["teacher" if phase == "scoring" else "student"]
    weights = layers * hidden * (2 * (heads + kv_heads) * HEAD_DIM + 3 * feed_forward)
    logits = point.rows * point.length * point.vocab
    products, attention = 2 * (weights * point.tokens + logits * hidden), 4 * layers * heads * HEAD_DIM * point.pairs
    if phase != "training":
        return products, attention
    return 3 * products + 2 * logits * SHAPES["teacher"][0] * (point.objective == "full"), 3 * attention


def matmul_rate(dtype: torch.dtype = torch.bfloat16, size: int = 2048) -> float:
    """FLOPs per CPU second in a square product: the median of five, after one to warm up."""
    one, other = (torch.randn(size, size).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = time.process_time()
        F.linear(one, other)
        seconds.append(time.process_time() - start)
    return 2 * size**3 / statistics.median(seconds[1:])


def measure(point: Point, folder: Path) -> dict[str, Any]:
    """Steps in this process: a small one that makes the optimizer's state, one for memory, then those for time."""
    from understudy.backends.language_model import LanguageModel
    from understudy.backends.loading import load_model
    from understudy.backends.local import LocalSampler, LocalTeacher, LocalTrainer, default_micro_batch_tokens
    from understudy.batching import micro_batches
    from understudy.config import OptimConfig, SamplingConfig
    from understudy.objectives import FullDivergence, PolicyGradient
    from understudy.optimizer_step import optimizer_step
    from understudy.types import Prompt, Rollout, Scores, TokenSequence, TrainingExample
    from understudy.weight_sync import sync_weights

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    student, frozen = (
        LanguageModel(load_model(str(folder / role), role=role, dtype=dtype, device=cpu))
        for role, dtype in (("student", torch.float32), ("teacher", torch.bfloat16))
    )
    sampler = LocalSampler(student, stop_ids=frozenset(), shadow=student.copy_in(torch.bfloat16))
    teacher = LocalTeacher(frozen)
    trainer = LocalTrainer(student, OptimConfig(), autocast=torch.bfloat16)
    full = point.objective == "full"
    objective = FullDivergence({"default": teacher.head}) if full else PolicyGradient()
    draw, groups = random.Random(0), point.rows // point.group
    prompts = [Prompt(i, [draw.randrange(2, 512) for _ in range(point.prompt)], "") for i in range(groups)]

    def example(rollout: Rollout, scores: Scores) -> TrainingExample:
        own, ids, hidden = rollout.sampler_logprobs, rollout.completion_ids, getattr(scores, "teacher_hidden", None)
        advantages = [q - p for q, p in zip(scores.teacher_logprobs, own, strict=True)]
        return TrainingExample(rollout.prompt.prompt_ids, ids, [True] * len(ids), own, advantages, hidden)

    def train(examples: Sequence[TrainingExample]) -> int:
        size = default_micro_batch_tokens(cpu)
        batches = micro_batches(examples, micro_batch_tokens=size, share_prompts=student.shares_prompts)
        update = optimizer_step(trainer, batches, objective, learning_rate=LEARNING_RATE)
        sync_weights(sampler, policy_version=number)
        return int(update["tokens"])

    number, held = 1, 0.0
    seconds: dict[str, list[float]] = {name: [] for name in PHASES}
    peaks: dict[str, float] = {"step": 0.0}

    def phase(name: str, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        before = held_mb() if number == 2 else 0.0
        start = time.process_time()
        result = work(*arguments, **options)
        seconds[name].append(round(time.process_time() - start, 4))
        if number == 2:
            high = memory_mb("VmHWM")
            peaks.update({name: round(high - before, 1), "step": max(peaks["step"], round(high - held, 1))})
        return result

    # Two timed steps; a long one averages over enough by itself.
    for number in range(1, 5 if point.length < 1024 else 4):
        length = 8 if number == 1 else point.length
        sampling = SamplingConfig(group_size=point.group, max_completion_tokens=length)
        rollouts = list(chain.from_iterable(phase("sampling", sampler.sample, prompts, sampling, seed=number)))
        sequences = [TokenSequence(rollout.prompt.prompt_ids, rollout.completion_ids) for rollout in rollouts]
        scores = phase("scoring", teacher.score, sequences, "hidden" if full else "sampled")
        trained = phase("training", train, [example(*pair) for pair in zip(rollouts, scores, strict=True)])
        assert trained == point.rows * length, f"{trained} tokens trained; expected {point.rows * length}"
        held = held_mb() if number == 1 else held
    timed = {name: own[2:] for name, own in seconds.items()}
    return {"point": asdict(point), "cpu_s": timed, "peak_mb": peaks, "held_mb": round(held, 1)}


def held_mb() -> float:
    """Memory in use; the peak starts anew from there. What malloc keeps of freed memory goes back first: it would hide
    a part of the next peak."""
    ctypes.CDLL(None).malloc_trim(0)
    return start_memory(torch.device("cpu"))


def in_process(point: Point, folder: Path) -> dict[str, Any]:
    """A point's row, and the machine's rate just before it."""
    measured, own = matmul_rate(), folder / str(point.vocab)
    prepare(Workload(point.vocab, 1, 1, 32, 32), own)  # only the models are used
    command = [sys.executable, __file__, "--one", json.dumps(asdict(point)), str(own)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode != 0:
        raise SystemExit(f"{point}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    row = json.loads(done.stdout.splitlines()[-1]) | {"rate": round(measured)}
    print(*(f"{key} {value} " for key, value in (row["point"] | row["cpu_s"]).items()), flush=True)
    return row


def cells(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A phase at a point of an axis. ``unit``: seconds per token (per FLOP over the vocabulary, where a token's work
    itself grows with the head), attention's share of the FLOPs taken out."""
    rows = {Point(**row["point"]): row for row in record["runs"]}
    rate = statistics.median(row["rate"] for row in rows.values())
    for axis, (_, _, points) in AXES.items():
        for (value, point), phase in product(points, PHASES):
            if point in rows:
                row, (products, attention) = rows[point], flops(point, phase)
                seconds = statistics.median(row["cpu_s"][phase])
                unit = seconds / (products + attention) * (1 if axis.startswith("vocab") else products / point.tokens)
                cell = {"axis": axis, "value": value, "phase": phase, "seconds": seconds, "unit": unit, "row": row}
                yield cell | {"floor": (products + attention) / rate, "peak": row["peak_mb"][phase], "rate": rate}


def markdown(record: Mapping[str, Any]) -> str:
    found, info, flat = list(cells(record)), record["machine"], []
    noise = [max(own) / min(own) for row in record["runs"] for own in row["cpu_s"].values() if len(own) > 1]
    lines = [
        INTRODUCTION.format(rate=found[0]["rate"] / 1e9),
        ", ".join(f"{key} {' '.join(x) if isinstance(x, list) else x}" for key, x in info.items() if x is not None),
    ]
    for axis, (label, base, _) in AXES.items():
        own = [cell for cell in found if cell["axis"] == axis]
        lines += ["", f"## {label[0].upper()}{label[1:]}", ""]
        heads = "".join(f" {phase} s | floor s | MB |" for phase in PHASES)
        lines.append(f"| | tokens |{heads} step MB | held MB |")
        lines.append("|---:|---:|" + "---:|---:|---:|" * len(PHASES) + "---:|---:|")
        for three in zip(*[iter(own)] * len(PHASES), strict=True):
            row, value = three[0]["row"], three[0]["value"]
            numbers = "".join(f" {cell['seconds']:.2f} | {cell['floor']:.2f} | {cell['peak']:.0f} |" for cell in three)
            numbers += f" {row['peak_mb']['step']:.0f} | {row['held_mb']:.0f} |"
            lines.append(f"| {value} | {Point(**row['point']).tokens} |{numbers}")
        for phase in PHASES:
            units = {cell["value"]: cell["unit"] for cell in own if cell["phase"] == phase}
            ratios = ", ".join(f"{value}: {unit / units[base]:.2f}" for value, unit in units.items())
            spread = max(units.values()) / min(units.values())
            verdict = "flat" if spread <= FLAT else "**not flat**"
            flat.append(f"| {label} | {phase} | {ratios} | {spread:.2f} | {verdict} |")
    return "\n".join(
        [*lines, "", FLATNESS, *flat, REASONS.format(noise=statistics.median(noise), worst=max(noise), FLAT=FLAT)]
    )


INTRODUCTION = """CPU seconds of a step's sampling, scoring and training (medians over steps, after two others), and the
memory that each adds at its peak; of the whole step, over what is held between steps: weights, optimizer state,
libraries. Floor: FLOPs at {rate:.0f} GFLOP/s, this machine's rate in a bfloat16 product of 2048 x 2048 matrices. Tokens
are those that a model has to read, shared prompts once. Where not said otherwise: 16 rows in groups of 4, prompts of 32
tokens, completions of 128, vocabulary 512, sampled objective, 2048 tokens per micro-batch.
"""
FLATNESS = f"""## Does a token's price stay flat?

Seconds per token as multiples of the base point's, attention's share of the FLOPs taken out. Over the vocabulary, where
a token's work itself grows with the head: seconds per FLOP. Flat: the largest is at most {FLAT} times the smallest.

| | phase | multiples of the base point's | largest / smallest | |
|---|---|---|---:|---|"""
# To be looked at again where a verdict changes.
REASONS = """
- Sampling reads all weights and starts all kernels once per position, whatever the rows. So a token gets cheaper with
  rows, with prompts (read in one go; group size 1 has most of them) and, per FLOP, with a large head. It is far from
  its floor wherever rows are few; its memory is the cache.
- Scoring and training take micro-batches of 2048 tokens, beyond which their memory hardly grows.
- The machine had other work: one process's steps differ by a factor of {noise:.2f} (median) to {worst:.2f}, and
  processes by as much. A ratio near {FLAT} decides nothing.
"""


PANEL_WIDTH, PANEL_HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 250, 220, 46, 240, 30, 176
# Series: (axis's suffix, phase), with a mark each, and a colour. The full objective differs in training alone.
MARKS = {("", "sampling"): "●", ("", "scoring"): "■", ("", "training"): "▲", (", full", "training"): "◆"}


def draw(record: Mapping[str, Any]) -> str:
    """Axes side by side, seconds above memory, both on logarithmic scales."""
    found, parts, x = list(cells(record)), [], 4
    for (suffix, phase), mark in MARKS.items():
        style = f"fill:{PALETTE[len(parts)]};font-size:13px;font-weight:600"
        parts.append(_text(x, 18, f"{mark} {phase}{suffix}", style))
        x += 40 + 8 * len(phase + suffix)
    parts.append(_text(x, 18, "dashed: floor (FLOPs at this machine's rate); memory: what a phase adds at its peak"))
    axes = [axis for axis in AXES if not axis.endswith("full")]
    for column, axis in enumerate(axes):
        keys = [(axis + suffix, phase) for suffix, phase in MARKS]
        lines = [[cell for cell in found if (cell["axis"], cell["phase"]) == key] for key in keys]
        for row, names in enumerate((("seconds", "floor"), ("peak",))):
            place = f"translate({column * PANEL_WIDTH} {30 + row * PANEL_HEIGHT})"
            parts.append(f'<g transform="{place}">{_panel(lines, names, AXES[axis][0])}</g>')
    box = f'viewBox="0 0 {len(axes) * PANEL_WIDTH} {30 + 2 * PANEL_HEIGHT}"'
    label = f'role="img" aria-label="Seconds and memory of each phase over {len(axes)} axes; numbers in scaling.md"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" {label} {box}>{"".join(parts)}</svg>'


def _panel(lines: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str], x_label: str) -> str:
    """The first of ``names`` as marks and lines, the second dashed."""
    xs = sorted({cell["value"] for line in lines for cell in line})
    ys = [cell[name] for line in lines for cell in line for name in names]
    low, high = min(ys) / 1.3, max(ys) * 1.3
    x_axis = Axis(xs[0], xs[-1], LEFT + 10, RIGHT - 10, xs, log=True)
    y_axis = Axis(low, high, BOTTOM, TOP, log_ticks(low, high), log=True)
    title = _text(4, 14, {"seconds": "CPU seconds", "peak": "peak MB"}[names[0]], TITLE_STYLE)
    parts = [title, _text((LEFT + RIGHT) / 2, BOTTOM + 34, x_label, anchor="middle")]
    for value in y_axis.ticks:
        parts.append(f'<path d="M{LEFT} {y_axis.place(value):.1f}H{RIGHT}" style="{GRID_STYLE}"/>')
        parts.append(_text(LEFT - 5, y_axis.place(value) + 4, f"{value:g}", anchor="end"))
    for value in x_axis.ticks:
        label = str(value) if value < 10_000 else f"{value / 1000:.0f}k"
        parts.append(_text(x_axis.place(value), BOTTOM + 16, label, anchor="middle"))
    for name, dash in zip(names, ("", "4 3"), strict=False):
        for line, mark, colour in zip(lines, MARKS.values(), PALETTE, strict=False):
            places = [(x_axis.place(cell["value"]), y_axis.place(cell[name])) for cell in line]
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            style = f"fill:none;stroke:{colour};stroke-width:{1.3 if dash else 2}"
            parts += [f'<path d="M{path}" stroke-dasharray="{dash}" style="{style}"/>'] if line else []
            marks = (_text(x, y + 3.5, mark, f"fill:{colour};font-size:10px", "middle") for x, y in places)
            parts += [] if dash else marks
    return "".join(parts)


def _text(x: float, y: float, text: str, style: str = LABEL_STYLE, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">{text}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="keep the measurements of results/scaling.json")
    parser.add_argument("--quick", action="store_true", help="one small point, nothing written")
    parser.add_argument("--render", action="store_true", help="rewrite tables and chart from the JSON")
    parser.add_argument("--one", nargs=2, metavar=("POINT", "FOLDER"), help="measure a point (JSON) in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        return print(json.dumps(measure(Point(**json.loads(arguments.one[0])), Path(arguments.one[1]))))
    kept = arguments.resume or arguments.render
    record: dict[str, Any] = json.loads(RESULTS.with_suffix(".json").read_text()) if kept else {"runs": []}
    RESULTS.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.quick:
            return print(in_process(Point(rows=4, length=16, prompt=8), Path(scratch)))
        done = {Point(**row["point"]) for row in record["runs"]}
        wanted = dict.fromkeys(point for _, _, points in AXES.values() for _, point in points if point not in done)
        for point in () if arguments.render else sorted(wanted, key=lambda point: point.length):
            record["machine"] = machine()
            record["runs"].append(in_process(point, Path(scratch)))
            # Whole or not at all: an interruption must not lose measurements.
            RESULTS.with_suffix(".new").write_text(json.dumps(record, indent=1) + "\n")
            RESULTS.with_suffix(".new").rename(RESULTS.with_suffix(".json"))
    RESULTS.with_suffix(".md").write_text(markdown(record))
    RESULTS.with_suffix(".svg").write_text(draw(record) + "\n")


if __name__ == "__main__":
    main()

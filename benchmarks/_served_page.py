"""The page results/served.md, from the measurements."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

TARGET = 0.15  # overhead of part b
NOT_MEASURED = "*vLLM: not measured; it needs UNDERSTUDY_VLLM, vLLM's command, in the environment.*"
SERVERS = ("understudy", "vLLM")


def markdown(record: Mapping[str, Any]) -> str:
    """Medians over rounds."""
    lines = [
        INTRODUCTION,
        ", ".join(f"{k} {' '.join(x) if isinstance(x, list) else x}" for k, x in record["machine"].items() if x),
    ]
    writers: tuple[tuple[str, str, Callable[[Sequence[Row], Row], list[str]]], ...] = (
        ("a", "Tokens per second against concurrency and batch", _throughput),
        ("b", "Overhead over scoring in process", _overhead),
        ("c", "What reuse pays", _reuse),
        ("d", "Step time without and with a lag", _steps),
    )
    for part, title, write in writers:
        rows = [row for row in record["runs"] if row["part"] == part]
        lines += ["", f"## {part}: {title}", ""]
        lines += write(rows, record["sizes"]) if rows else [NOT_MEASURED if part == "d" else "*Not measured yet.*"]
    return "\n".join(lines) + "\n"


def _median(rows: Sequence[Row], name: str = "seconds", **fields: Any) -> float | None:
    values = [row[name] for row in rows if all(row.get(key) == value for key, value in fields.items())]
    return statistics.median(values) if values else None


def _present(rows: Sequence[Row]) -> list[str]:
    return [name for name in SERVERS if any(row.get("server") == name for row in rows)]


def _missing(rows: Sequence[Row]) -> list[str]:
    return [] if "vLLM" in _present(rows) else ["", NOT_MEASURED]


def _throughput(rows: Sequence[Row], sizes: Row) -> list[str]:
    servers = _present(rows)
    prompt, completion = sizes["lengths"]
    lines = [
        THROUGHPUT.format(least=sizes["least"], prompt=prompt, completion=completion),
        f"| in flight | {' | '.join(f'{name}: requests of one | one request' for name in servers)} |",
        "|---:|" + "---:|---:|" * len(servers),
    ]
    rates = [{**row, "rate": row["tokens"] / row["seconds"]} for row in rows]
    for n in sizes["in_flight"]:
        cells = [str(n)]
        for name in servers:
            alone = _median(rates, "rate", server=name, in_flight=1)
            for how in ("requests of one", "one request"):
                rate = _median(rates, "rate", server=name, in_flight=n, how=how)
                cells.append("" if rate is None or alone is None else f"{rate:.0f} ({rate / alone:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *_missing(rows)]


def _overhead(rows: Sequence[Row], sizes: Row) -> list[str]:
    here, cpu = _median(rows, how="in process"), _median(rows, "cpu_s", how="in process")
    assert here is not None
    assert cpu is not None
    prompt, completion = sizes["lengths"]
    lines = [
        OVERHEAD.format(count=max(sizes["in_flight"]), prompt=prompt, completion=completion),
        "| | seconds | min..max | overhead | in the model | in all else | batches | CPU s | client's CPU s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| in process | {here:.3f} | {_range(rows, 'in process')} | | | | | {cpu:.2f} | |",
    ]
    for how in ("requests of one", "one request"):
        own = [row for row in rows if row["how"] == how]
        seconds, model = (
            statistics.median(row["seconds"] for row in own),
            statistics.median(row["model_s"] for row in own),
        )
        rest = statistics.median(row["seconds"] - row["model_s"] for row in own)
        client = statistics.median(row["cpu_s"] for row in own)
        both = statistics.median(row["cpu_s"] + row["server_cpu_s"] for row in own)
        shares = [f"{share:+.1%}" for share in (seconds / here - 1, model / here - 1, rest / here)]
        batches = statistics.median(row["batches"] for row in own)
        cells = [f"served, {how}", f"{seconds:.3f}", _range(rows, how), *shares, f"{batches:.0f}", f"{both:.2f}"]
        lines.append(f"| {' | '.join([*cells, f'{client:.3f}'])} |")
    seconds = _median(rows, how="requests of one")
    assert seconds is not None
    verdict = "met" if seconds / here - 1 < TARGET else "**missed**"
    difference = max(row.get("difference", 0.0) for row in rows)
    return [
        *lines,
        "",
        f"Target: below {TARGET:.0%} with each sequence a request of its own: {verdict}. Largest difference between "
        f"marks: {difference:.1e} nats.",
    ]


def _range(rows: Sequence[Row], how: str) -> str:
    values = [row["seconds"] for row in rows if row["how"] == how]
    return f"{min(values):.3f}..{max(values):.3f}"


def _reuse(rows: Sequence[Row], sizes: Row) -> list[str]:
    prompt, completion = sizes["grouped"]
    lines = [
        PREFIXES.format(**sizes, prompt=prompt, completion=completion),
        "| | sent | different prompts s | shared prompts s | ratio |",
        "|---|---|---:|---:|---:|",
    ]
    for name in _present(rows):
        for how in ("as a run sends them", "requests of one"):
            different, shared = (_median(rows, server=name, how=how, prompts=p) for p in ("different", "shared"))
            if different is not None and shared is not None:
                lines.append(f"| {name} | {how} | {different:.2f} | {shared:.2f} | {different / shared:.2f} |")
    lines += [*_missing(rows), "", REUSE, "", "| `teacher.cache` | seconds | against no cache |", "|---|---:|---:|"]
    plain = _median(rows, cache="no cache")
    for how in ("no cache", "first pass", "second pass"):
        seconds = _median(rows, cache=how)
        if seconds is not None and plain is not None:
            lines.append(f"| {how} | {seconds:.4f} | {seconds / plain:.4f} |")
    return lines


def _steps(rows: Sequence[Row], sizes: Row) -> list[str]:
    lines = [
        STEPS.format(steps=sizes["steps"]),
        "| teacher's line | lag | step s | min..max | ratio | sampling s | scoring s | training s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for delay in sorted({row["delay_s"] for row in rows}):
        alone = 0.0
        for lag in sorted({row["lag"] for row in rows if row["delay_s"] == delay}):
            own = [row for row in rows if (row["delay_s"], row["lag"]) == (delay, lag)]
            steps = [seconds for row in own for seconds in row["step_s"]]
            step = statistics.median(steps)
            alone = alone or step
            roles = [
                statistics.median(seconds for row in own for seconds in row["roles_s"][role])
                for role in own[0]["roles_s"]
            ]
            line = f"{delay:g} s" if delay else "none"
            cells = [line, str(lag), f"{step:.2f}", f"{min(steps):.2f}..{max(steps):.2f}", f"{alone / step:.2f}"]
            lines.append(f"| {' | '.join([*cells, *(f'{seconds:.2f}' for seconds in roles)])} |")
    return lines


INTRODUCTION = """Teachers and samplers on servers of this machine: wall seconds, medians over rounds in which what is
compared takes turns. Servers are processes of their own and compute in float32, `understudy serve teacher` with a
thread for each core, vLLM eagerly (not compiled). Every measurement asks about new random tokens, so that nothing is
reused but where the table says so. Models are of Qwen3's architecture with random weights.
"""
THROUGHPUT = """Sequences of {prompt} + {completion} tokens, {least} or as many as are in flight: each a request of its
own (`connection.max_concurrency` at a time), or so many in one request (`connection.request_tokens`), one request at a
time. Tokens per second, prompts included; in brackets, as a multiple of one in flight. vLLM has a thread on each core
here; its default leaves one to its scheduler.
"""
OVERHEAD = """`LocalTeacher.compute_logprobs` of {count} sequences of {prompt} + {completion} tokens in one process,
and of the same sequences through `understudy serve teacher` on as many threads, while the calling process waits.
Overhead: seconds over those in process, less 1. In the model: by the server's own count of its batches. In all else:
HTTP, JSON, checks on both sides, waiting for a batch. CPU seconds are those of both processes, threads included that
wait for others in a busy loop.
"""
PREFIXES = """{groups} groups of {group} completions, {prompt} + {completion} tokens: a prompt for each sequence, or
one for each group. Sent with the defaults of `[teacher.connection]`, or each sequence as a request of its own, 32 at a
time. Ratio: how many times faster shared prompts are.
"""
REUSE = """`understudy serve teacher` reads a prompt once for those of its completions that are scored together. vLLM
keeps prefixes between requests, but reads none of them for a request that wants log-probabilities of its prompt, as
every scoring request does (`skip_reading_prefix_cache` in its SamplingParams).

The same rows without a cache, and twice through a new one:"""
STEPS = """`understudy distill` from TOML, {steps} steps; medians without the first two and the last two, which fill and
drain what overlaps. 4 prompts x 4 samples, 32 + 48 tokens, a student of 4 layers of 256 and a teacher of 8 of 512 on a
vLLM server each. Weights are pushed to the sampler at each step, within its time. The teacher's line is this machine's
loopback, or one on which every reply travels for so long. With lag 1 the next step is sampled, then scored while one
trains; with lag 2 all three overlap. Ratio: how many times faster than with lag 0. Sampling, scoring, training: wall
seconds of each, which overlap where there is a lag.

Trainer and servers share this machine's cores, on one thread each, and a worker of vLLM's looks for more work in a busy
loop for a second after each request: what overlaps also competes, so that machines of their own would gain more. Only
the time a reply travels takes nobody's core.
"""

"""Teachers and samplers on servers: tokens per second, the client's overhead, what reuse and a lag pay. See README.md.

    python benchmarks/served.py                      # all parts; vLLM's with UNDERSTUDY_VLLM=.../bin/vllm
    python benchmarks/served.py --part b c           # some of them; the other results stay
    python benchmarks/served.py --smoke              # tiny sizes, no vLLM, nothing written: does it run?
    python benchmarks/served.py --render             # the page again, from the JSON

Parts: a tokens per second against concurrency and batch, b overhead over scoring in process, c reuse of prefixes and of
stored marks, d step time without and with a lag. Every server is a process of its own. What is compared takes turns,
round by round; a server that is not being measured waits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from _served_page import markdown
from _served_servers import Server, save_checkpoint, understudy_server, vllm_server, vllm_version, word_tokenizer
from _served_steps import step_runs
from step import whole_machine

from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import load_model
from understudy.backends.local import LocalTeacher
from understudy.backends.protocols import Teacher
from understudy.backends.served import ServedTeacher
from understudy.backends.vllm import VllmTeacher
from understudy.config_served import ConnectionConfig, ServerConfig
from understudy.score_cache import CachedTeacher, ScoreCache
from understudy.types import TokenSequence

RESULTS = Path(__file__).parent / "results" / "served"
PARTS = "abcd"
THREADS = os.cpu_count() or 1
PACKAGES = ("understudy", "uvicorn", "starlette", "pydantic", "httpx2")
DEFAULT_TOKENS = ConnectionConfig().request_tokens

Row = dict[str, Any]
P = TypeVar("P")


@dataclass(frozen=True)
class Sizes:
    """``shape``: see save_checkpoint. ``least``: sequences of a measurement of part a, where no more are in flight.
    ``lengths``, ``grouped``: prompt and completion tokens of parts a and b, and of
    c, where ``groups`` prompts have ``group`` completions each."""

    vocab: int = 16_384
    shape: tuple[int, int, int, int, int] = (512, 8, 8, 4, 1536)
    in_flight: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    least: int = 8
    lengths: tuple[int, int] = (128, 128)
    groups: int = 2
    group: int = 8
    grouped: tuple[int, int] = (512, 64)
    steps: int = 12
    rounds: tuple[int, int, int, int] = (3, 6, 3, 1)  # of each part


FULL = Sizes()
SMOKE = Sizes(64, (64, 2, 2, 1, 128), (1, 4), 2, (8, 8), 2, 4, (16, 4), 4, (1, 1, 1, 1))


def sequences(count: int, lengths: tuple[int, int], seed: str, vocab: int, *, group: int = 1) -> list[TokenSequence]:
    """Random ids, others for every seed: no server has seen them. ``group`` of them share a prompt."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(1, vocab) for _ in range(lengths[0])] for _ in range(count // group)]
    return [
        TokenSequence(prompts[i // group], [draw.randrange(1, vocab) for _ in range(lengths[1])]) for i in range(count)
    ]


@contextmanager
def client_of(server: Server, *, concurrency: int, request_tokens: int) -> Iterator[ServedTeacher | VllmTeacher]:
    kind = ServedTeacher if server.kind == "understudy" else VllmTeacher
    connection = ConnectionConfig(max_concurrency=concurrency, request_tokens=request_tokens)
    teacher = kind(ServerConfig(url=server.root, connection=connection))
    try:
        # Asks for the model's name once, and opens the first connection; the others open as a run's do.
        teacher.compute_logprobs([TokenSequence([1, 2], [3])])
        yield teacher
    finally:
        teacher.close()


def timed(teacher: Teacher, rows: Sequence[TokenSequence]) -> tuple[float, list[list[float]]]:
    start = time.perf_counter()
    marks = teacher.compute_logprobs(rows)
    seconds = time.perf_counter() - start
    assert [len(own) for own in marks] == [len(row.completion_ids) for row in rows]
    return round(seconds, 5), marks


def throughput(servers: Mapping[str, Server], sizes: Sizes, number: int) -> Iterator[Row]:
    """Part a, one round: ``n`` sequences in flight as requests of one each, or as one request, until all are done."""
    total = sum(sizes.lengths)
    points = [(n, how) for n in sizes.in_flight for how in ("requests of one", "one request")[: 1 if n == 1 else 2]]
    for (name, server), (n, how) in turns(servers, points, number):
        concurrency, request_tokens = (n, 1) if how == "requests of one" else (1, n * total)
        rows = sequences(max(n, sizes.least), sizes.lengths, f"a {number} {n} {how}", sizes.vocab)
        with client_of(server, concurrency=concurrency, request_tokens=request_tokens) as teacher:
            seconds, _ = timed(teacher, rows)
        yield {"server": name, "how": how, "in_flight": n, "seconds": seconds, "tokens": len(rows) * total}


def turns(servers: Mapping[str, Server], points: Sequence[P], number: int) -> Iterator[tuple[tuple[str, Server], P]]:
    """All points of one server, then, once it is idle, of the other. Every other round goes the other way."""
    for name, server in list(servers.items())[:: -1 if number % 2 else 1]:
        for point in points[:: -1 if number % 2 else 1]:
            yield (name, server), point
        server.settle()


def overhead(servers: Mapping[str, Server], sizes: Sizes, number: int, local: LocalTeacher) -> Iterator[Row]:
    """Part b, one round: the same sequences in this process, and from it through `understudy serve teacher`."""
    count, server = max(sizes.in_flight), servers["understudy"]
    rows = sequences(count, sizes.lengths, f"b {number}", sizes.vocab)
    cpu = time.process_time()
    seconds, own = timed(local, rows)
    yield {"how": "in process", "seconds": seconds, "cpu_s": round(time.process_time() - cpu, 3)}
    for how, request_tokens in (("requests of one", 1), ("one request", DEFAULT_TOKENS)):
        with client_of(server, concurrency=count, request_tokens=request_tokens) as teacher:
            before, used, cpu = server.batches(), server.cpu_seconds(), time.process_time()
            seconds, marks = timed(teacher, rows)
            cpu, used, after = time.process_time() - cpu, server.cpu_seconds() - used, server.batches()
        yield {
            "how": how,
            "seconds": seconds,
            "batches": after[0] - before[0],
            "model_s": round(after[1] - before[1], 5),
            "cpu_s": round(cpu, 3),
            "server_cpu_s": round(used, 3),
            "difference": max(
                abs(p - q) for one, other in zip(own, marks, strict=True) for p, q in zip(one, other, strict=True)
            ),
        }


def prefixes(servers: Mapping[str, Server], sizes: Sizes, number: int) -> Iterator[Row]:
    """Part c, one round: prompts that all differ, and prompts that a group shares; sent as a run sends them, and each
    sequence as a request of its own."""
    count = sizes.groups * sizes.group
    points = [
        (how, prompts) for how in ("as a run sends them", "requests of one") for prompts in ("different", "shared")
    ]
    for (name, server), (how, prompts) in turns(servers, points, number):
        request_tokens, group = (
            1 if how == "requests of one" else DEFAULT_TOKENS,
            sizes.group if prompts == "shared" else 1,
        )
        rows = sequences(count, sizes.grouped, f"c {number} {how} {prompts}", sizes.vocab, group=group)
        with client_of(server, concurrency=32, request_tokens=request_tokens) as teacher:
            seconds, _ = timed(teacher, rows)
        yield {"server": name, "how": how, "prompts": prompts, "seconds": seconds}


def stored_marks(servers: Mapping[str, Server], sizes: Sizes, number: int, folder: Path) -> Iterator[Row]:
    """Part c's cache, one round: the same rows without one, and twice through a new one."""
    rows = sequences(max(sizes.in_flight), sizes.lengths, f"cache {number}", sizes.vocab)
    with (
        client_of(servers["understudy"], concurrency=32, request_tokens=DEFAULT_TOKENS) as teacher,
        ScoreCache(folder / f"marks{number}.sqlite", max_bytes=2**30) as cache,
    ):
        cached = CachedTeacher(teacher, cache, teacher.identity())
        first: list[list[float]] = []
        for how, asked in (("no cache", teacher), ("first pass", cached), ("second pass", cached)):
            seconds, marks = timed(asked, rows)
            assert how != "second pass" or marks == first
            first = marks
            yield {"cache": how, "seconds": seconds}


def scoring_runs(parts: str, sizes: Sizes, folder: Path, *, vllm: bool) -> Iterator[Row]:
    """Parts a to c. vLLM starts only once what does not need it is done."""
    checkpoint = save_checkpoint(folder / "model", word_tokenizer(sizes.vocab), vocab=sizes.vocab, shape=sizes.shape)
    with ExitStack() as running:
        servers = {"understudy": running.enter_context(understudy_server(checkpoint, threads=THREADS)).wait()}
        warm_up(servers["understudy"], sizes)
        if "b" in parts:
            model = load_model(str(checkpoint), role="teacher", dtype=torch.float32, device=torch.device("cpu"))
            local = LocalTeacher(LanguageModel(model.requires_grad_(False)))
            local.compute_logprobs(sequences(8, sizes.lengths, "warm", sizes.vocab))
            yield from in_rounds("b", sizes.rounds[1], lambda number: overhead(servers, sizes, number, local))
        if "c" in parts:
            yield from in_rounds("c", sizes.rounds[2], lambda number: stored_marks(servers, sizes, number, folder))
        if vllm and set(parts) & set("ac"):
            servers["vLLM"] = running.enter_context(vllm_server(checkpoint)).wait()
            warm_up(servers["vLLM"], sizes)
        for part, one_round, rounds in (("a", throughput, sizes.rounds[0]), ("c", prefixes, sizes.rounds[2])):
            if part in parts:
                yield from in_rounds(part, rounds, lambda number, one=one_round: one(servers, sizes, number))


def warm_up(server: Server, sizes: Sizes) -> None:
    with client_of(server, concurrency=4, request_tokens=1) as teacher:
        teacher.compute_logprobs(sequences(8, sizes.lengths, "warm", sizes.vocab))
    server.settle()


def in_rounds(part: str, rounds: int, one_round: Callable[[int], Iterator[Row]]) -> Iterator[Row]:
    for number in range(rounds):
        yield from ({"part": part, "round": number, **row} for row in one_round(number))


def run(parts: str, sizes: Sizes, record: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure, and put what is new in the place of what was there of these parts."""
    vllm = bool(os.environ.get("UNDERSTUDY_VLLM"))
    torch.set_num_threads(THREADS)
    versions = {name: version(name) for name in PACKAGES} | {"trl": None}
    versions["vllm"] = vllm_version() if vllm else record.get("machine", {}).get("vllm")
    record["machine"] = whole_machine(THREADS) | versions
    record["sizes"] = asdict(sizes)
    record["runs"] = [row for row in record.get("runs", []) if row["part"] not in parts]
    with tempfile.TemporaryDirectory() as scratch:
        rows = [scoring_runs(parts, sizes, Path(scratch), vllm=vllm)] if set(parts) & set("abc") else []
        rows += [step_runs(sizes.steps, sizes.rounds[3], Path(scratch))] if "d" in parts and vllm else []
        for row in chain.from_iterable(rows):
            record["runs"].append(row)
            print(*(f"{key} {value} " for key, value in row.items()), flush=True)
            save()
    if not vllm:
        print("vLLM: not measured, UNDERSTUDY_VLLM is not set")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, help="of every part; default: 3, 6, 3, 1")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing written")
    parser.add_argument("--render", action="store_true", help="rewrite the page from the JSON")
    arguments = parser.parse_args()
    parts = "".join(arguments.part)
    if arguments.smoke:
        os.environ.pop("UNDERSTUDY_VLLM", None)
        record: dict[str, Any] = {}
        run(parts, SMOKE, record, lambda: None)
        print(markdown(record))
        return
    path = RESULTS.with_suffix(".json")
    record = json.loads(path.read_text()) if path.exists() else {}
    if not arguments.render:
        sizes = replace(FULL, rounds=(arguments.rounds,) * 4) if arguments.rounds else FULL

        def save() -> None:
            # Whole or not at all: an interruption must not lose measurements.
            RESULTS.with_suffix(".new").write_text(json.dumps(record, indent=1) + "\n")
            RESULTS.with_suffix(".new").rename(path)

        run(parts, sizes, record, save)
        save()
    RESULTS.with_suffix(".md").write_text(markdown(record))


if __name__ == "__main__":
    main()

"""What served.py measures against: checkpoints, servers as processes of their own, and a long line to one of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2
import torch

START_SECONDS = 300
SETTLE_SECONDS, SETTLE_STEP = 30, 0.3
# Cores in vLLM's notation. Its default leaves one to its scheduler, which would halve a machine of two.
ALL_CORES = f"0-{(os.cpu_count() or 1) - 1}"


def save_checkpoint(folder: Path, tokenizer: Any, *, vocab: int, shape: tuple[int, int, int, int, int]) -> Path:
    """A random Qwen3 with heads of 64. ``shape``: hidden size, layers, heads, key-value heads, feed-forward size."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, layers, heads, kv_heads, feed_forward = shape
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        intermediate_size=feed_forward,
        max_position_embeddings=1024,
        initializer_range=0.1,  # marks that differ from token to token, so that comparing them says something
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer(size: int) -> Any:
    """One id per word, ``size`` of them, so that a server can write every id of the model's vocabulary as text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", *(f"w{i}" for i in range(1, size))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=words[0])


class Server:
    """A command that answers GET /health on ``port`` of this machine once it is up; killed at the end with all the
    processes it started."""

    def __init__(self, kind: str, words: list[str], environment: Mapping[str, str], port: int, log: Path) -> None:
        self.kind = kind
        self.root = f"http://127.0.0.1:{port}"
        self._log_path = log
        # The bytecode cache saves vLLM a minute of its start.
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                words, stdout=file, stderr=file, env={**inherited, **environment}, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait(self) -> Self:
        """Until it is up."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{self.root}/health", timeout=2).status_code == 200:
                    return self
            time.sleep(0.2)
        raise SystemExit(f"{self.root} did not come up:\n{self._log_path.read_text(errors='replace')[-3000:]}")

    def cpu_seconds(self) -> float:
        """What its processes have used so far."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # ended meanwhile
                fields = stat.read_text().rpartition(")")[2].split()
                ticks += (int(fields[11]) + int(fields[12])) * (int(fields[2]) == self._process.pid)
        return ticks / os.sysconf("SC_CLK_TCK")

    def settle(self) -> None:
        """Wait until it is idle: vLLM's worker looks for more work in a busy loop, a second after the last."""
        used = self.cpu_seconds()
        for _ in range(round(SETTLE_SECONDS / SETTLE_STEP)):
            time.sleep(SETTLE_STEP)
            before, used = used, self.cpu_seconds()
            if used - before <= SETTLE_STEP / 10:
                return
        raise SystemExit(f"{self.root} computes though nothing is asked of it, for {SETTLE_SECONDS} s")

    def batches(self) -> tuple[float, float]:
        """(batches scored, seconds they took) so far, by `understudy serve`'s own count."""
        page = httpx2.get(f"{self.root}/metrics").raise_for_status().text
        values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        return float(values["understudy_batch_seconds_count"]), float(values["understudy_batch_seconds_sum"])


def understudy_server(checkpoint: Path, *, threads: int) -> Server:
    """`understudy serve teacher`, in float32."""
    port = _free_port()
    words = [sys.executable, "-m", "understudy", "serve", "teacher", str(checkpoint), "--port", str(port)]
    words += ["--dtype", "float32", "--num-threads", str(threads)]
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return Server("understudy", words, environment, port, checkpoint.with_suffix(".understudy.log"))


def vllm_server(checkpoint: Path, *, cores: str = ALL_CORES, threads: int | None = None) -> Server:
    """`vllm serve` in float32, not compiled, a thread on each of ``cores``; or ``threads`` that the system places. Its
    command is in the environment: UNDERSTUDY_VLLM."""
    port = _free_port()
    words = [os.environ["UNDERSTUDY_VLLM"], "serve", str(checkpoint), "--served-model-name", checkpoint.name]
    words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "1024"]
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",  # routes that take weights
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cores if threads is None else "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",  # it has a venv of its own
    }
    environment |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return Server("vLLM", words, environment, port, checkpoint.with_suffix(".vllm.log"))


def vllm_version() -> str:
    """That of its venv."""
    python = Path(os.environ["UNDERSTUDY_VLLM"]).with_name("python")
    words = [str(python), "-c", "from importlib.metadata import version; print(version('vllm'))"]
    return subprocess.run(words, capture_output=True, text=True, check=True, env={}).stdout.strip()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def long_line(root: str, seconds: float) -> Iterator[str]:
    """The address of a line to ``root`` on which every reply travels for ``seconds``, however many are on their way."""
    loop = asyncio.new_event_loop()
    stop, ready, addresses = asyncio.Event(), threading.Event(), list[str]()

    async def serve() -> None:
        target = urlsplit(root)

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            upstream_reader, upstream_writer = await asyncio.open_connection(target.hostname, target.port)
            await asyncio.gather(_carry(reader, upstream_writer, 0), _carry(upstream_reader, writer, seconds))

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        addresses.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        ready.set()
        await stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    ready.wait()
    try:
        yield addresses[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """Every byte arrives so much later, in order; then the end."""
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        while True:
            due, data = await queue.get()
            await asyncio.sleep(due - time.monotonic())
            if not data:
                return
            writer.write(data)
            await writer.drain()

    async def take() -> None:
        data = b"?"
        while data:
            data = await reader.read(2**16)
            queue.put_nowait((time.monotonic() + seconds, data))

    try:
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(deliver(), take())
    finally:
        writer.close()

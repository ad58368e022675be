"""vLLM servers as processes of their own, on this machine's loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import IO, Self

import httpx2

START_SECONDS = 300


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class VllmServer:
    """``vllm serve CHECKPOINT`` in float32; killed and started again on the same port at will."""

    def __init__(self, checkpoint: Path, name: str, log: Path, *options: str) -> None:
        self.port, self.name = free_port(), name
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._log_path = log
        self._words = [
            *(os.environ["UNDERSTUDY_VLLM"], "serve", str(checkpoint), "--served-model-name", name),
            *("--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--max-model-len", "256"),
            *("--enforce-eager", "--max-logprobs", "64", *options),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start, and wait until it is up."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        settings = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than all that is asked here
            "HF_HUB_OFFLINE": "1",
        }
        # Without the settings for tests of other packages; the bytecode cache saves a minute of the start.
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")}
        self._log = self._log_path.open("ab")
        self._process = subprocess.Popen(
            self._words, stdout=self._log, stderr=self._log, env=inherited | settings, start_new_session=True
        )

    def wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self._log_path.read_text(errors="replace")[-4000:]
            try:
                if httpx2.get(f"http://127.0.0.1:{self.port}/health", timeout=2).status_code == 200:
                    return
            except httpx2.TransportError:
                time.sleep(0.5)
        raise AssertionError(f"not up within {START_SECONDS} s: {self._log_path.read_text(errors='replace')[-4000:]}")

    def kill(self) -> None:
        """kill -9, of the server and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

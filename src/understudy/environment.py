"""What a run ran on: versions, machine, devices. Kept with the run, for whoever tries to make its numbers again."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

# Those whose version may show in a result; of extras where they are there.
PACKAGES = ("understudy", "torch", "transformers", "tokenizers", "safetensors", "numpy", "peft", "datasets")


def environment() -> dict[str, Any]:
    """Of this process, now. Keys: started (UTC), python, platform, processor, cores, threads, memory_gib, devices (CUDA
    ones that hold something), packages (name -> version)."""
    import torch

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "devices": _devices(),
        "packages": {name: own for name in PACKAGES if (own := _version(name))},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    """The name that Linux knows; elsewhere the platform's."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _devices() -> list[str]:
    """To ask for devices before anything uses CUDA would take memory there."""
    import torch

    if not torch.cuda.is_initialized():
        return []
    used = [index for index in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(index)]
    return [f"{torch.cuda.get_device_name(index)} (CUDA {torch.version.cuda})" for index in used]

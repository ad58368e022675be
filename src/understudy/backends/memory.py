"""How much memory there is to plan with."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

# What is left for everything that is not planned for.
_SHARE = 0.7


def memory_budget(device: torch.device) -> int:
    """Bytes that one piece of work may take on a device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(_SHARE * (free + unused))
    return int(_SHARE * min(psutil.virtual_memory().available, _container_limit()))


def _container_limit(root: Path = Path("/sys/fs/cgroup")) -> float:
    """What a container's control group leaves, where there is one; its file cache does not count, it can go."""
    try:
        limit = (root / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except OSError:
        return float("inf")
    return float("inf") if limit == "max" else int(limit) - int(stat["anon"])

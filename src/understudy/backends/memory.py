"""How much memory there is to plan with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

# What is left for everything that is not planned for.
_SHARE = 0.7


# How errors that are not torch.OutOfMemoryError say it: torch's allocator for CPUs, MPS, cuBLAS.
_SAID = ("DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no room for what was asked of it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)


def fewer_tokens(tokens: int, count: Callable[[int], int]) -> int:
    """Half of ``tokens``, or half of that, and so on: the first bound that leads to more batches. ``count`` (bound) ->
    how many batches there are then; there must be a bound with more than now."""
    now = count(tokens)
    while tokens > 1:
        tokens //= 2
        if count(tokens) > now:
            return tokens
    raise ValueError(f"got work that makes {now} batches at any bound; expected more with fewer tokens")


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

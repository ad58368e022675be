"""A run in a process that gets no more memory: the kernel refuses it, torch says so, the update is made smaller."""

from __future__ import annotations

import re
import resource
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jobs import log_of, run

from understudy import RunConfig
from understudy.checkpoints import checkpoint_path
from user import metrics, save_model, tree, word_tokenizer, write_rows, write_toml

STEPS = 2
MIB = 2**20


def limit_memory(spare: int) -> None:
    """From the first update on, this process may grow by ``spare`` bytes."""
    from understudy import updates

    own = updates.optimizer_step

    def optimizer_step(*arguments: Any, **keywords: Any) -> Any:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, hard))
        updates.optimizer_step = own
        return own(*arguments, **keywords)

    updates.optimizer_step = optimizer_step


def out_of_memory(folder: Path, *, spare_mib: int = 64) -> dict[str, Any]:
    """`sft` in micro-batches that take more than there is; and the same with the size that it ended up with."""
    material = folder / "material"
    material.mkdir(parents=True)
    save_model(material / "student", word_tokenizer(), hidden=64, context=2048)
    text = " ".join(f"w{i % 60}" for i in range(400))
    write_rows(material / "rows.jsonl", [{"text": f"w{i} {text}"} for i in range(64)])
    content = tree(
        material / "student",
        None,
        material / "rows.jsonl",
        Path("run"),
        optim={"learning_rate": 1e-2, "num_steps": STEPS, "micro_batch_tokens": 64 * 512},
        supervised={"batch_size": 64},
    )
    write_toml(folder / "run.toml", content)
    command = ["sft", str(folder / "run.toml")]
    assert run(command, folder / "short", setup=partial(limit_memory, spare_mib * MIB)) == 0, log_of(folder / "short")
    said = re.findall(r"to begin with that size, set optim.micro_batch_tokens = (\d+)", log_of(folder / "short"))
    assert said, log_of(folder / "short")
    small = [*command, "--optim.micro_batch_tokens", said[-1]]
    assert run(small, folder / "small") == 0, log_of(folder / "small")
    assert run(command, folder / "whole") == 0, log_of(folder / "whole")
    states = [weights(folder / name) for name in ("short", "small", "whole")]
    assert torch.equal(states[0], states[1])
    losses = [[row["optim/loss"] for row in metrics(folder / name / "run")] for name in ("short", "small")]
    assert losses[0] == losses[1]
    assert RunConfig.from_toml(folder / "short" / "run" / "config.toml").optim.micro_batch_tokens == 64 * 512
    difference = float((states[0] - states[2]).abs().max())
    # Sums of float32 in another order; AdamW's first steps are as large as the rate wherever a gradient is not zero.
    assert difference < 1e-3
    return {
        "micro_batch_tokens": [64 * 512, *map(int, said)],
        "equal_to_smaller_size": True,
        "largest_difference_to_whole": difference,
    }


def weights(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    state = load_file(checkpoint_path(folder / "run" / "checkpoints", STEPS) / "model.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state)])

"""Training a world's model from nothing: next-token loss on completions, AdamW, warm-up and linear decay."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

CorpusBatch = tuple["Tensor", int, "Tensor"]
"""``input_ids`` [B, L], ``prompt_length`` P (the same for all rows) and ``loss_mask`` [B, L - P]."""

LOG_EVERY = 100


def learning_rate_factor(step: int, *, steps: int, warmup: int, final_fraction: float) -> float:
    """Linear warm-up to 1 at step ``warmup``, then linear decay to ``final_fraction``. Steps count from 1."""
    decay = 1.0 - max(0, step - warmup) / max(1, steps - warmup)
    return min(1.0, step / max(1, warmup)) * max(final_fraction, decay)


def completion_loss(model: nn.Module, batch: CorpusBatch) -> Tensor:
    """Mean negative log-likelihood (nats) over the completion tokens where ``loss_mask`` is set."""
    import torch

    input_ids, prompt_length, loss_mask = batch
    completion = input_ids[:, prompt_length:]
    # Without the last token, which predicts nothing, the last logits are those of the completion's tokens.
    logits = model(input_ids=input_ids[:, :-1], logits_to_keep=completion.shape[1], use_cache=False).logits
    token_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), completion.flatten(), reduction="none")
    weights = loss_mask.flatten().float()
    return (token_loss * weights).sum() / weights.sum()


def pretrain(
    model: nn.Module,
    batches: Iterable[CorpusBatch],
    *,
    steps: int,
    learning_rate: float,
    warmup: int = 50,
    final_fraction: float = 0.02,
    weight_decay: float = 0.01,
    log: Callable[[str], object] = print,
) -> float:
    """Train ``model`` in place for ``steps`` batches; returns the wall seconds spent."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    model.train()
    start, done = time.perf_counter(), 0
    for done, batch in enumerate(itertools.islice(batches, steps), start=1):
        factor = learning_rate_factor(done, steps=steps, warmup=warmup, final_fraction=final_fraction)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        loss = completion_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if done % LOG_EVERY == 0 or done == steps:
            log(f"step {done}/{steps}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s")
    if done < steps:
        raise ValueError(f"the corpus ended after {done} batches; expected {steps}")
    model.eval()
    return time.perf_counter() - start

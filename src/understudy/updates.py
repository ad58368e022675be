"""Updates in micro-batches that memory holds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from understudy.backends.memory import fewer_tokens, is_out_of_memory
from understudy.backends.protocols import Trainer
from understudy.batching import micro_batches
from understudy.errors import RunError
from understudy.objectives import Objective
from understudy.optimizer_step import optimizer_step
from understudy.types import Batch, TrainingExample

log = logging.getLogger("understudy")


class Updates:
    """One update after another. Where memory runs out, the whole window is done again with half of the tokens in a
    micro-batch, or a quarter, ..., and so are later ones: sums are divided once, so that the split changes no gradient
    beyond float noise. ``batching``: what ``micro_batches`` takes."""

    def __init__(self, trainer: Trainer, batching: Mapping[str, Any]) -> None:
        self._trainer, self._batching = trainer, dict(batching)

    def make(
        self,
        examples: Sequence[TrainingExample],
        objective: Objective,
        *,
        learning_rate: float,
        reduction: Literal["token_mean", "sum", "sequence_mean"] = "token_mean",
    ) -> Mapping[str, float]:
        """``optimizer_step`` on the examples, and what it returns. Raises as it does, and RunError where there is no
        memory for a single one of them."""
        while True:
            batches = self._micro_batches(examples, self._batching["micro_batch_tokens"])
            try:
                return optimizer_step(
                    self._trainer, batches, objective, learning_rate=learning_rate, reduction=reduction
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(batches) == len(examples):
                    longest = max(len(e.prompt_ids) + len(e.completion_ids) for e in examples)
                    raise RunError(
                        f"out of memory while training on single sequences of up to {longest} tokens; lower "
                        "sampling.max_completion_tokens (in `sft`, supervised.max_tokens), set "
                        "student.gradient_checkpointing, or train adapters ([student.lora])"
                    ) from error
            # Outside the handler, which would keep the failed attempt's tensors alive.
            self._trainer.discard_gradients()
            self._shrink(examples)

    def _shrink(self, examples: Sequence[TrainingExample]) -> None:
        before = self._batching["micro_batch_tokens"]
        tokens = fewer_tokens(before, lambda most: len(self._micro_batches(examples, most)))
        self._batching["micro_batch_tokens"] = tokens
        log.warning(
            "out of memory with micro-batches of up to %d tokens: this update is done again with %d; to begin with "
            "that size, set optim.micro_batch_tokens = %d",
            before,
            tokens,
            tokens,
        )

    def _micro_batches(self, examples: Sequence[TrainingExample], tokens: int) -> list[Batch]:
        return micro_batches(examples, **{**self._batching, "micro_batch_tokens": tokens})

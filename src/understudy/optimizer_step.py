"""Accumulate, divide once, clip, step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

from understudy.backends.protocols import Trainer
from understudy.config import OptimConfig
from understudy.errors import NonFiniteError, RunError
from understudy.objectives import Objective
from understudy.types import Batch


def learning_rate_at(optim: OptimConfig, step: int) -> float:
    """The learning rate of step ``step`` (0-based): linear warm-up, then the schedule down to its final fraction.

    The final fraction belongs to the step after the last, so that a final fraction of 0 wastes no step.
    """
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.learning_rate
    progress = (step - optim.warmup_steps) / max(1, optim.num_steps - optim.warmup_steps)
    shape = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return optim.learning_rate * max(shape, 0.0) * (1 - optim.final_fraction) + (
        optim.learning_rate * optim.final_fraction
    )


def optimizer_step(
    trainer: Trainer,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    learning_rate: float,
    reduction: Literal["token_mean", "sum", "sequence_mean"] = "token_mean",
) -> Mapping[str, float]:
    """One update over the whole window of micro-batches.

    Sums are added up and divided once, by the window's trained tokens (``token_mean``), its completions
    (``sequence_mean``; the examples' weights divide by their lengths) or by nothing (``sum``), so that the split
    changes nothing. Returns token means of the objective's metrics, maxima of ``*_max`` ones, ``loss``, ``grad_norm``
    and ``tokens``.

    Raises RunError when nothing trains, NonFiniteError when the loss is not finite; the weights are then untouched, but
    the trainer still holds the gradients of this window: the run ends here, and goes on from a checkpoint.
    """
    num_tokens = sum(batch.num_tokens for batch in batches)
    if num_tokens == 0:
        raise RunError("no token of this step trains: every loss_mask is empty")
    sums: defaultdict[str, float] = defaultdict(float)
    maxima: dict[str, float] = {}
    for batch in batches:
        output = trainer.forward_backward(batch, objective)
        sums["loss"] += float(output.loss)
        for name, value in output.metrics.items():
            if name.endswith("_max"):
                maxima[name] = max(value, maxima.get(name, value))
            else:
                sums[name] += value
    if not math.isfinite(sums["loss"]):
        raise NonFiniteError(
            f"the loss is {sums['loss']}; expected a finite number. The cause is a teacher that gives a token "
            "probability zero where the student does not (use another teacher), or weights that overflowed (lower "
            "optim.learning_rate in a new run)"
        )
    sequences = sum(batch.num_sequences for batch in batches)
    divisor = {"token_mean": num_tokens, "sequence_mean": sequences, "sum": 1}[reduction]
    step_metrics = trainer.optimizer_step(learning_rate=learning_rate, divisor=divisor)
    means = {name: value / num_tokens for name, value in sums.items()} | {"loss": sums["loss"] / divisor}
    return means | maxima | dict(step_metrics) | {"tokens": num_tokens}

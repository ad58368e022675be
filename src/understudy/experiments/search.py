"""The search for learning rates: the same number of values for every arm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Learning rates that every arm is searched over."""
LORA_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""The same, ten times higher: adapters want about ten times the rate (Schulman et al., LoRA Without Regret)."""


@dataclass(frozen=True)
class Search:
    """Scores on the validation problems by learning rate, as (rate, score); the best is taken."""

    scores: Sequence[tuple[float, float]]

    @property
    def chosen(self) -> float:
        """Of equal scores the lowest rate."""
        return max(self.scores, key=lambda pair: (pair[1], -pair[0]))[0]

    @property
    def at_edge(self) -> bool:
        """Whether the best is the lowest or the highest tried: a better one may lie beyond."""
        rates = [rate for rate, _ in self.scores]
        return self.chosen in (min(rates), max(rates))


def searched(score: Callable[[float], float], rates: Sequence[float] = RATES) -> Search:
    """Score every rate."""
    return Search([(rate, score(rate)) for rate in rates])

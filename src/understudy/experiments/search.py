"""The search for learning rates: the same number of values for every arm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from understudy.errors import RunError

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Learning rates that every arm is searched over."""
LORA_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""The same, ten times higher: adapters want about ten times the rate (Schulman et al., LoRA Without Regret)."""


@dataclass(frozen=True)
class Search:
    """Scores on the validation problems by learning rate, as (rate, score); None: training broke off. The best is
    taken."""

    scores: Sequence[tuple[float, float | None]]

    @property
    def chosen(self) -> float:
        """Of equal scores the lowest rate. Raises RunError where every rate broke off."""
        known = [(score, -rate) for rate, score in self.scores if score is not None]
        if not known:
            raise RunError("training broke off at every learning rate that was tried; the logs say how")
        return -max(known)[1]

    @property
    def at_edge(self) -> bool:
        """Whether the best is the lowest or the highest tried: a better one may lie beyond."""
        rates = [rate for rate, _ in self.scores]
        return self.chosen in (min(rates), max(rates))


def searched(score: Callable[[float], float], rates: Sequence[float] = RATES) -> Search:
    """Score every rate. A run that breaks off, as weights that overflow do, has no score."""
    return Search([(rate, _score(score, rate)) for rate in rates])


def _score(score: Callable[[float], float], rate: float) -> float | None:
    try:
        return score(rate)
    except RunError as error:
        print(f"learning rate {rate:g} broke off: {error}", flush=True)
        return None

"""The search for learning rates: the same number of values for every arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from understudy.errors import RunError

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Learning rates that every arm is searched over, at first."""
LORA_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""The same, ten times higher: adapters want about ten times the rate (Schulman et al., LoRA Without Regret)."""
EXTENSIONS = 2
"""How many further rates an arm gets whose best is the lowest or the highest tried."""


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


def searched(score: Callable[[float], float], rates: Sequence[float] = RATES, extensions: int = EXTENSIONS) -> Search:
    """Score every rate; then, while the best lies at an edge, the next one beyond it, at most ``extensions`` of them.
    A run that breaks off, as weights that overflow do, has no score."""
    found = Search([(rate, _score(score, rate)) for rate in rates])
    for _ in range(extensions):
        if not found.at_edge:
            break
        rate = _beyond(found)
        found = Search(sorted([*found.scores, (rate, _score(score, rate))]))
    return found


def _beyond(found: Search) -> float:
    """The next rate of the ladder 1, 3, 10, ... on the side of the best one."""
    rates = [rate for rate, _ in found.scores]
    up = found.chosen == max(rates)
    exponent, is_three = math.floor(math.log10(found.chosen) + 1e-9), f"{found.chosen:.0e}".startswith("3")
    if up:
        return float(f"1e{exponent + 1}") if is_three else float(f"3e{exponent}")
    return float(f"1e{exponent}") if is_three else float(f"3e{exponent - 1}")


def _score(score: Callable[[float], float], rate: float) -> float | None:
    try:
        return score(rate)
    except RunError as error:
        print(f"learning rate {rate:g} broke off: {error}", flush=True)
        return None

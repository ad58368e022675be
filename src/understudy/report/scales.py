"""From data to positions: tick choice and the two kinds of axis a chart has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Width kept at the left of a log axis for values that have no logarithm (a cost of zero, before training).
ZERO_GUTTER = 26.0


def same(low: float, high: float) -> bool:
    """Whether nothing but rounding lies between them: ticks have twelve digits."""
    return high - low <= 1e-9 * max(abs(low), abs(high))


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cover ``low``..``high`` in about ``count`` intervals.

    >>> nice_ticks(0.0, 0.93)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if same(low, high):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / raw)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Twelve significant digits remove 0.30000000000000004 and its kin.
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside ``low``..``high``; 2 and 5 times them too when the range holds fewer than three.

    >>> log_ticks(1e9, 1e12)
    [1000000000.0, 10000000000.0, 100000000000.0, 1000000000000.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = [10.0**power for power in powers if low <= 10.0**power <= high]
    if len(decades) >= 3:
        stride = math.ceil(len(decades) / 6)
        return decades[::stride]
    fine = [m * 10.0**power for power in powers for m in (1, 2, 5) if low <= m * 10.0**power <= high]
    return fine or [low]


@dataclass(frozen=True)
class Axis:
    """Maps ``low``..``high`` onto ``start``..``end`` pixels; with ``log``, values <= 0 sit at ``start``."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    log: bool = False
    gutter: float = 0.0

    def place(self, value: float) -> float:
        """The pixel of ``value``."""
        if not self.log:
            return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)
        if value <= 0:
            return self.start
        share = (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return self.start + self.gutter + share * (self.end - self.start - self.gutter)


def linear_x_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis that ends where the data end, so that no width is lost."""
    low, high = min(values), max(values)
    if same(low, high):
        room = max(0.5, abs(low) / 2**20)
        low, high = low - room, high + room
    ticks = [t for t in nice_ticks(low, high) if low <= t <= high]
    return Axis(low, high, start, end, ticks)


def log_x_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """A log axis over the positive values; a zero gets its own place at the left."""
    positive = [value for value in values if value > 0]
    if not positive:
        return linear_x_axis(values, start, end)
    low, high = min(positive), max(positive)
    if same(low, high):
        low, high = low / 2, high * 2
    gutter = ZERO_GUTTER if len(positive) < len(values) else 0.0
    return Axis(low, high, start, end, log_ticks(low, high), log=True, gutter=gutter)


def y_axis(low: float, high: float, start: float, end: float) -> Axis:
    """A linear axis ending on ticks. It starts at 0 unless that would waste more than half of the height."""
    if same(low, high):
        low, high = min(low, 0.0), max(high, 0.0) or (1.0 if low == 0 else 0.0)
    if 0 <= low < high / 2:
        low = 0.0
    ticks = nice_ticks(low, high, 4)
    return Axis(ticks[0], ticks[-1], start, end, ticks)

"""Numbers as people read them: FLOPs, durations, shares, ticks. Pure functions from a number to a string."""

from __future__ import annotations

import math

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def scientific(value: float) -> str:
    """``2.5×10¹⁵``; a mantissa of one is left out (``10¹⁵``)."""
    mantissa, exponent = f"{value:.2e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
    return power if mantissa == "1" else f"{mantissa}×{power}"


def number(value: float | None) -> str:
    """Four significant digits, thousands separated; very large and very small numbers in powers of ten."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    size = abs(value)
    if size and (size >= 1e7 or size < 1e-3):
        return scientific(value).replace("-", "−")
    if value == int(value) or size >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def flops(value: float | None) -> str:
    """``1.25 PFLOP``: decimal prefixes, three significant digits."""
    if value is None or not math.isfinite(value):
        return number(value)
    power = 0
    while abs(value) >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {_PREFIXES[power]}FLOP"


def duration(seconds: float | None) -> str:
    """``3.2 s``, ``4 min 05 s``, ``2 h 03 min``."""
    if seconds is None or not math.isfinite(seconds):
        return number(seconds)
    if seconds < 59.95:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def percent(share: float | None, error: float | None = None) -> str:
    """``42.0 % ± 1.6`` from a share and its standard error (both in 0..1)."""
    if share is None or not math.isfinite(share):
        return number(share)
    text = f"{100 * share:.1f} %"
    return text if error is None else f"{text} ± {100 * error:.1f}"


def mean(value: float | None, error: float | None = None, *, share: bool) -> str:
    """A mean with its standard error: ``percent`` of a share, else ``3 ± 0.5``."""
    if share:
        return percent(value, error)
    return number(value) + (f" ± {number(error)}" if error is not None else "")


def tick(value: float, step: float) -> str:
    """A tick label with just the decimals that neighbours ``step`` apart need."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or step < 1e-4:
        return scientific(value).replace("-", "−") if value < 0 else scientific(value)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}".replace("-", "−")

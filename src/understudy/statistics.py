"""Standard errors, intervals and tests of accuracies: pure functions of numbers per problem.

Problems are the independent units. Completions of one problem resemble each other, so they enter as the problem's mean:
with as many completions for each, the standard error over these means is the cluster-robust one, and it covers both
chances, of the problems drawn and of the completions sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

# Up to so many different outcomes a permutation test counts all of them; beyond, it draws some.
EXACT_OUTCOMES = 2**16
# A p-value of 0.05 is then known to 0.0015.
RANDOM_FLIPS = 20_000


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error): sample standard deviation / sqrt(n). Of one value the error is unknown and given as 0."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def ratio_and_error(clusters: Sequence[tuple[float, int]]) -> tuple[float, float | None]:
    """(mean, standard error) of things in clusters of unlike sizes, each given as (sum, count).

    The mean is sum / count over all; its error is that of a ratio of two sums (Cochran, Sampling Techniques, 6.13):
    with r = a cluster's sum - mean * its count, sqrt(n / (n - 1) * sum of r^2) / count. Clusters of one size give
    ``mean_and_error`` of their means. Of one cluster the error is unknown: None.
    """
    count = sum(own for _, own in clusters)
    mean = math.fsum(own for own, _ in clusters) / count
    if len(clusters) < 2:
        return mean, None
    squares = math.fsum((total - mean * own) ** 2 for total, own in clusters)
    return mean, math.sqrt(len(clusters) / (len(clusters) - 1) * squares) / count


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Probability that at least one of ``k`` completions passes, estimated without bias from more: the share of all
    ``k``-subsets of the samples that hold one, 1 - C(n - c, k) / C(n, k).

    Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not (1 <= k <= num_samples and 0 <= num_passed <= num_samples):
        raise ValueError(f"got k = {k}, {num_passed} passed of {num_samples}; expected 1 <= k <= n and 0 <= c <= n")
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's interval for the mean that ``values`` are drawn from. Raises ValueError for fewer than two."""
    if len(values) < 2:
        raise ValueError(f"got {len(values)} values; expected at least two, which show how much they vary")
    mean, error = mean_and_error(values)
    reach = t_critical(len(values) - 1, level) * error
    return mean - reach, mean + reach


@cache
def t_critical(degrees: int, level: float = 0.95) -> float:
    """What |t| stays below with probability ``level``, by bisection."""
    low, high = 0.0, 1.0
    while _t_within(high, degrees) < level:
        high *= 2
    for _ in range(60):  # a factor of 2^60 is float64's precision
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < level else (low, middle)
    return high


def _t_within(t: float, degrees: int) -> float:
    """P(|T| < t), by the finite sums for a whole number of degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for j in range(2 + odd, degrees - 1, 2):
        term *= math.cos(angle) ** 2 * (j - 1) / j
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def sign_flip_p_value(differences: Sequence[float], *, seed: int = 0) -> float:
    """Two-sided p-value of paired ``differences`` under the hypothesis that each might as well have had the other sign:
    the share of all sign patterns whose sum is at least as far from 0.

    Exact where there are few outcomes, as of differences that have one size (it is then the sign test); else from
    ``RANDOM_FLIPS`` patterns drawn from ``seed``, the observed one counted among them.
    """
    sizes = np.abs(np.asarray(differences, dtype=np.float64))
    if not sizes.any():
        return 1.0
    # Differences of means, 1 - 2/3 and 1/3, are one size but for rounding. Equal sizes are flipped together: what
    # counts is how many of them come out positive.
    values, counts = np.unique(np.round(sizes[sizes > 0] / sizes.max(), 12), return_counts=True)
    observed = abs(math.fsum(differences)) / sizes.max() - 1e-11 * len(sizes)  # rounding may move a sum as far
    if math.prod(int(count) + 1 for count in counts) <= EXACT_OUTCOMES:
        sums, weights = _all_sums(values, counts)
        return min(1.0, float(weights[np.abs(sums) >= observed].sum()))
    generator = np.random.default_rng(seed)
    rows = max(1, 2**20 // len(values))
    hits = 0
    for start in range(0, RANDOM_FLIPS, rows):
        positive = generator.binomial(counts, 0.5, size=(min(rows, RANDOM_FLIPS - start), len(counts)))
        hits += int((np.abs((2 * positive - counts) @ values) >= observed).sum())
    return (1 + hits) / (1 + RANDOM_FLIPS)


def _all_sums(values: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[NDArray[np.float64], ...]:
    """Every sum that flipping signs can give, and its probability."""
    sums, weights = np.zeros(1), np.ones(1)
    for value, count in zip(values, map(int, counts), strict=True):
        positive = np.arange(count + 1)
        chances = np.exp([_log_comb(count, number) - count * math.log(2) for number in range(count + 1)])
        sums = np.add.outer(sums, value * (2 * positive - count)).ravel()
        weights = np.multiply.outer(weights, chances).ravel()
    return sums, weights


def _log_comb(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

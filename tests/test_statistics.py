"""Errors, intervals and tests against closed forms, enumeration, printed tables and simulation."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest

from understudy import statistics
from understudy.statistics import (
    mean_and_error,
    pass_at_k,
    ratio_and_error,
    sign_flip_p_value,
    t_critical,
    t_interval,
)

# Of an estimate from as many simulations as the tests below use, with their fixed seeds.
SIMULATIONS = 4000


def test_mean_and_error_by_hand() -> None:
    """Values 0, 1, 1, 1: variance 1/4 over 3 degrees, standard error sqrt(1/16)."""
    assert mean_and_error([0.0, 1.0, 1.0, 1.0]) == (0.75, pytest.approx(0.25))
    assert mean_and_error([0.5]) == (0.5, 0.0)


def test_the_error_of_a_ratio_is_that_of_the_means_where_clusters_are_alike_and_its_own_where_not() -> None:
    clusters = [(2.0, 4), (4.0, 4), (4.0, 4), (4.0, 4)]
    assert ratio_and_error(clusters) == tuple(map(pytest.approx, mean_and_error([0.5, 1.0, 1.0, 1.0])))
    assert ratio_and_error([(3.0, 2)]) == (1.5, None)
    # Lengths vary, and longer clusters have larger values: the spread of the estimate over many draws.
    draw = np.random.default_rng(0)
    counts = draw.integers(1, 20, size=(SIMULATIONS, 60))
    sums = counts * (0.1 * counts + draw.normal(size=counts.shape))
    found = [ratio_and_error(list(zip(s.tolist(), c.tolist(), strict=True))) for s, c in zip(sums, counts, strict=True)]
    errors = [error for _, error in found if error is not None]
    assert np.mean(errors) == pytest.approx(np.std([mean for mean, _ in found]), rel=0.05)


def test_error_over_problem_means_is_the_cluster_robust_one() -> None:
    """Sum of residuals within a problem, squared, summed over problems: with n / (n - 1) for small samples."""
    rewards = np.random.default_rng(0).random((7, 4))
    residuals = (rewards - rewards.mean()).sum(axis=1)
    expected = math.sqrt((residuals**2).sum() * 7 / 6) / rewards.size
    assert mean_and_error(rewards.mean(axis=1).tolist())[1] == pytest.approx(expected, rel=1e-12)


def test_error_over_problem_means_is_what_the_mean_varies_by() -> None:
    """Problems with success rates of 0.2 and 0.9, n = 30 of them with k = 4 completions each: the mean has the variance
    (Var p + E[p (1 - p)] / k) / n. Completions taken for independent would claim E p (1 - E p) / (n k)."""
    generator, n, k = np.random.default_rng(1), 30, 4
    rates = generator.choice([0.2, 0.9], size=(SIMULATIONS, n))
    means = generator.binomial(k, rates) / k
    closed = (0.35**2 + (0.2 * 0.8 + 0.9 * 0.1) / 2 / k) / n
    estimates = [mean_and_error(row)[1] ** 2 for row in means.tolist()]
    assert np.mean(estimates) == pytest.approx(closed, rel=0.02)
    assert means.mean(axis=1).var() == pytest.approx(closed, rel=0.06)  # 3 standard errors, sqrt(2 / SIMULATIONS)
    assert 0.55 * 0.45 / (n * k) < closed / 2


def test_pass_at_k_is_the_share_of_subsets_with_a_pass() -> None:
    for n in range(1, 8):
        for passed, k in product(range(n + 1), range(1, n + 1)):
            subsets = list(combinations([1] * passed + [0] * (n - passed), k))
            assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Over all outcomes of 6 completions that pass with probability 0.3, it averages to 1 - 0.7^k."""
    weights = [math.comb(6, c) * 0.3**c * 0.7 ** (6 - c) for c in range(7)]
    for k in (1, 2, 4, 6):
        mean = sum(weight * pass_at_k(6, c, k) for c, weight in enumerate(weights))
        assert mean == pytest.approx(1 - 0.7**k, abs=1e-12)


@pytest.mark.parametrize(("n", "passed", "k"), [(2, 1, 3), (2, 1, 0), (2, 3, 1), (2, -1, 1)])
def test_impossible_counts_are_refused(n: int, passed: int, k: int) -> None:
    with pytest.raises(ValueError, match="expected 1 <= k <= n"):
        pass_at_k(n, passed, k)


def test_t_critical_as_printed_in_tables() -> None:
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 7: 2.36462, 29: 2.04523, 120: 1.97993}
    for degrees, value in table.items():
        assert t_critical(degrees) == pytest.approx(value, rel=3e-6)
    assert t_critical(5, 0.99) == pytest.approx(4.03214, rel=3e-6)
    assert t_critical(20_000) == pytest.approx(1.959964 * (1 + (1.959964**2 + 1) / 80_000), rel=1e-6)


def test_interval_by_hand() -> None:
    assert t_interval([0.0, 1.0, 1.0, 1.0]) == pytest.approx((0.75 - 3.18245 / 4, 0.75 + 3.18245 / 4), abs=1e-5)
    with pytest.raises(ValueError, match="at least two"):
        t_interval([1.0])


@pytest.mark.parametrize("samples", [1, 4])
def test_interval_of_paired_differences_covers_the_truth(samples: int) -> None:
    """Two students on the same 40 problems of various difficulty, one better by 0.1 on each."""
    generator = np.random.default_rng(samples)
    rates = generator.uniform(0.1, 0.8, size=(SIMULATIONS, 40))
    a, b = (generator.binomial(samples, rates + gain) / samples for gain in (0.0, 0.1))
    intervals = [t_interval(row) for row in (b - a).tolist()]
    covered = np.mean([low <= 0.1 <= high for low, high in intervals])
    assert covered == pytest.approx(0.95, abs=0.012)  # a little over 3 standard errors


def test_error_of_paired_differences_agrees_with_a_bootstrap_over_problems() -> None:
    generator = np.random.default_rng(3)
    rates = generator.uniform(size=200)
    a, b = generator.binomial(4, rates) / 4, generator.binomial(4, np.minimum(1, rates + 0.1)) / 4
    drawn = generator.integers(0, 200, size=(SIMULATIONS, 200))
    resampled = (b - a)[drawn].mean(axis=1)
    mean, error = mean_and_error((b - a).tolist())
    assert error == pytest.approx(resampled.std(), rel=0.04)
    low, high = t_interval((b - a).tolist())
    assert (low, high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), abs=0.1 * error)
    assert (low + high) / 2 == pytest.approx(mean)


def by_enumeration(differences: list[float]) -> float:
    observed = abs(sum(differences)) - 1e-9
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in patterns(len(differences))]
    return sum(total >= observed for total in sums) / len(sums)


def patterns(length: int) -> list[tuple[int, ...]]:
    return list(product([-1, 1], repeat=length))


@pytest.mark.parametrize(
    "differences",
    [
        [1.0, 1.0, 1.0, 1.0],  # 2 of 16 patterns
        [1.0, 1.0, -1.0, 0.0, 1.0],
        [0.25, -0.5, 0.75, 1.0, 1.0, -0.25, 0.0],
        [1 - 2 / 3, 1 / 3, 2 / 3, -1 / 3, 1.0],
        [0.31, -0.12, 0.55, 0.07, 0.9, 0.41, -0.08, 0.2],
        [-3e-7, -5e-7, 2e-7],
    ],
)
def test_p_value_counts_every_pattern(differences: list[float]) -> None:
    assert sign_flip_p_value(differences) == pytest.approx(by_enumeration(differences), rel=1e-12)


def test_p_value_of_equal_sizes_is_the_sign_test() -> None:
    """61 won and 39 lost of 1000: twice the tail of a fair coin's 100 throws; 0 differences say nothing."""
    expected = 2 * sum(math.comb(100, heads) for heads in range(61, 101)) / 2**100
    assert sign_flip_p_value([1.0] * 61 + [-1.0] * 39 + [0.0] * 900) == pytest.approx(expected, rel=1e-9)


def test_p_value_without_a_difference() -> None:
    assert sign_flip_p_value([0.0, 0.0]) == 1.0
    assert sign_flip_p_value([0.5, -0.5]) == pytest.approx(1.0, abs=1e-12)


def test_drawn_p_value_agrees_with_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = [0.31, -0.12, 0.55, 0.07, 0.9, -0.41, -0.08, 0.2]
    exact = sign_flip_p_value(differences)
    monkeypatch.setattr(statistics, "EXACT_OUTCOMES", 1)
    drawn = sign_flip_p_value(differences, seed=5)
    assert drawn == sign_flip_p_value(differences, seed=5) != sign_flip_p_value(differences, seed=6)
    assert drawn == pytest.approx(exact, abs=3 * math.sqrt(exact * (1 - exact) / statistics.RANDOM_FLIPS))


def test_drawn_p_value_is_never_zero() -> None:
    differences = np.random.default_rng(0).uniform(0.5, 1.0, size=100).tolist()
    assert sign_flip_p_value(differences) == 1 / (1 + statistics.RANDOM_FLIPS)


@pytest.mark.parametrize(("problems", "least"), [(12, 0.0), (100, 0.02)])
def test_equal_students_are_rarely_told_apart(problems: int, least: float) -> None:
    """At most 5 in 100 p-values fall to 0.05: few of few problems, whose sums are coarse; nearly so many of many."""
    generator = np.random.default_rng(7)
    rates = generator.uniform(size=(600, problems))
    a, b = (generator.binomial(3, rates) / 3 for _ in range(2))
    rejected = np.mean([sign_flip_p_value(row) <= 0.05 for row in (b - a).tolist()])
    assert least <= rejected <= 0.05 + 0.027  # 3 standard errors

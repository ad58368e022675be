"""What analyses are made of, with numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from understudy.errors import RunError
from understudy.experiments.claim import Estimate, column, crossing, mean_curve
from understudy.experiments.search import Search, searched


def test_the_best_rate_is_taken_and_of_equals_the_lowest():
    assert Search([(0.1, 0.5), (0.2, 0.9), (0.3, 0.7)]).chosen == 0.2
    assert Search([(0.3, 0.9), (0.1, 0.9), (0.2, 0.5)]).chosen == 0.1


def test_a_best_rate_at_the_edge_is_told():
    assert not Search([(0.1, 0.5), (0.2, 0.9), (0.3, 0.7)]).at_edge
    assert Search([(0.1, 0.5), (0.2, 0.6), (0.3, 0.7)]).at_edge
    assert Search([(0.1, 0.8), (0.2, 0.6), (0.3, 0.7)]).at_edge


def test_every_rate_is_scored():
    assert searched(lambda rate: -rate, (1.0, 2.0), extensions=0).scores == [(1.0, -1.0), (2.0, -2.0)]


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1e-3, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
        (3e-5, [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
        (1e-6, [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
        (3e-2, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
        (1e-4, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
    ],
)
def test_the_search_goes_on_where_the_best_is_at_an_edge(best, tried):
    found = searched(lambda rate: -abs(math.log(rate / best)))
    assert [rate for rate, _ in found.scores] == tried
    assert found.at_edge == (best == 1e-6)


def test_a_rate_at_which_training_breaks_off_has_no_score():
    def score(rate: float) -> float:
        if rate > 1:
            raise RunError("overflow")
        return rate

    found = searched(score, (0.5, 1.0, 2.0), extensions=0)
    assert found.scores == [(0.5, 0.5), (1.0, 1.0), (2.0, None)]
    assert found.chosen == 1.0
    assert not found.at_edge
    with pytest.raises(RunError, match="every learning rate"):
        _ = Search([(1.0, None)]).chosen


def test_an_interval_over_pipelines():
    # Mean 3, standard deviation sqrt(2.5), error sqrt(0.5); t(4) at 97.5% is 2.7764.
    estimate = Estimate.of([1, 2, 3, 4, 5])
    assert estimate.mean == 3
    assert estimate.low == pytest.approx(3 - 2.7764 * math.sqrt(0.5), abs=1e-3)
    assert estimate.high == pytest.approx(3 + 2.7764 * math.sqrt(0.5), abs=1e-3)
    assert estimate.show("{:.1f}") == "3.0 [1.0, 5.0]"


def test_one_pipeline_leaves_everything_open():
    assert Estimate.of([0.5]) == Estimate(0.5, -math.inf, math.inf)


def test_columns_and_levels():
    assert column([{"a": {"b": 1}}, {"a": {"b": 2.5}}], "a", "b") == [1.0, 2.5]
    curve = [(0, 0.1), (10, 0.5), (20, 0.4), (30, 0.6)]
    assert crossing(curve, 0.5) == 10
    assert crossing(curve, 0.3) == pytest.approx(5)
    assert crossing(curve, 0.55) == pytest.approx(27.5)
    assert crossing(curve, 0.1) == 0
    assert crossing(curve, 0.9) is None


def test_differences_ratios_and_points():
    assert Estimate.of_differences([0.5, 0.7], [0.4, 0.4]).mean == pytest.approx(0.2)
    ratios = Estimate.geometric([1.0, 4.0])
    assert ratios.mean == pytest.approx(2.0)
    # Logarithms 0 and ln 4: error ln 2, t(1) at 97.5% is 12.706.
    assert ratios.high == pytest.approx(2.0 * 2.0**12.706, rel=1e-3)
    assert ratios.low == pytest.approx(2.0 / 2.0**12.706, rel=1e-3)
    assert Estimate.geometric([2.0]).show("{:.1f}").startswith("2.0 [0.0, ")
    assert Estimate(0.0123, -0.01, 0.1).points() == "+1.2 [-1.0, +10.0]"


def test_a_mean_curve_has_the_error_over_pipelines():
    line = mean_curve("a", [[(0, 1.0), (5, 2.0)], [(0, 3.0), (5, 2.0)]])
    assert line.points == [(0, 2.0), (5, 2.0)]
    assert line.errors == [pytest.approx(1.0), 0.0]
    assert mean_curve("one", [[(0, 1.0)]]).errors == [None]

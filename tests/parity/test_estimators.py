"""Every objective that can be selected, weighed over all outcomes of small random worlds: its expected gradient."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from understudy.config_objective import ObjectiveConfig
from understudy.estimators.measure import (
    REFUSED,
    agreeing,
    normalised_outcomes,
    outcomes,
    refused_outcomes,
    reward_of,
)
from understudy.estimators.table import (
    LAGGING,
    SIGNALS,
    WEIGHTINGS,
    bytes_per_token,
    extra_flops,
    find,
    render,
)
from understudy.estimators.tabular import World, candidates, lagging_candidates, random_world

REVERSE = "KL(p‖q)"
ON_POLICY = [
    {"loss": "importance_sampling", "estimator": "sampled"},
    {"loss": "ppo"},
    {"loss": "cispo"},
    {"max_importance_ratio": 2.0},
    {"importance_band": [0.5, 2.0]},
    {"loss": "ppo", "baseline": True},
]
EXACT: list[tuple[Mapping[str, Any], str]] = [
    ({"estimator": "full"}, REVERSE),
    ({"estimator": "sampled"}, REVERSE),
    ({"estimator": "sampled", "baseline": True}, REVERSE),
    *((objective, REVERSE) for objective in ON_POLICY),
    ({"estimator": "sampled", "discount": 0.5}, "discounted return"),
    ({"estimator": "sampled", "discount": 0.5, "baseline": True}, "discounted return"),
    ({"estimator": "sampled", "discount": 1.0}, "KL of whole completions"),
    ({"estimator": "sampled", "signal_clip": 1e6}, REVERSE),  # a clip that never acts
    ({"divergence": "forward_kl"}, "KL(q‖p)"),
    ({"divergence": "jsd", "beta": 0.0}, "KL(q‖p)"),
    ({"divergence": "jsd", "beta": 0.1}, "JSD, beta 0.1"),
    ({"divergence": "jsd", "beta": 0.5}, "JSD, beta 0.5"),
    ({"divergence": "jsd", "beta": 0.9}, "JSD, beta 0.9"),
    ({"divergence": "jsd", "beta": 1.0}, REVERSE),
    ({"divergence": "skewed_kl"}, "KL(q‖0.1q + 0.9p)"),
    ({"divergence": "skewed_reverse_kl"}, "KL(p‖0.1p + 0.9q)"),
    ({"divergence": "entropy_gated"}, "KL(p‖q) + KL(q‖p) where H(q) > 1"),
    *(
        ({"estimator": "topk", "topk": 2, "topk_set": chosen_by, "tail": tail}, f"{name} ({chosen_by})")
        for tail, name in (("bucket", "KL of k + 1 classes"), ("renormalize", "KL of the top k, renormalised"))
        for chosen_by in ("teacher", "student", "union")
    ),
    # With every token in the set there is no tail to be biased about.
    *(
        ({"estimator": "topk", "topk": 4, "topk_set": chosen_by, "tail": tail}, REVERSE)
        for tail in ("bucket", "renormalize", "stop_gradient")
        for chosen_by in ("teacher", "student", "union")
    ),
    *(({"estimator": name, "extrapolation": 1.25}, "KL(p‖q^1.25 r^-0.25)") for name in ("sampled", "full")),
    *(({"estimator": name, "anchor_coef": 0.5}, "KL(p‖q) + 0.5 KL(p‖r)") for name in ("sampled", "full")),
    *(({"estimator": name, "reward_coef": 1.0}, "KL(p‖q) − ½ expected reward") for name in ("sampled", "full")),
    ({"estimator": "sampled", "max_policy_lag": 3}, REVERSE),
    ({"estimator": "sampled", "max_policy_lag": 3, "baseline": True}, REVERSE),
    ({"estimator": "sampled", "max_policy_lag": 1, "anchor_coef": 0.5}, "KL(p‖q) + 0.5 KL(p‖r)"),
    ({"estimator": "sampled", "max_policy_lag": 1, "extrapolation": 1.25}, "KL(p‖q^1.25 r^-0.25)"),
    ({"control": "shuffled_teacher"}, "zero"),
    *(({"estimator": name, "tokens": {"first": 2}}, "KL(p‖q) of the first two tokens") for name in ("sampled", "full")),
    *(
        ({"estimator": name, "tokens": {"half_life": 2.0}}, "KL(p‖q) weighted with 2^(−t/2)")
        for name in ("sampled", "full")
    ),
]


@pytest.fixture(scope="module", params=[0, 1, 2])
def case(request: pytest.FixtureRequest) -> tuple[World, Mapping[str, Tensor]]:
    world = random_world(request.param)
    return world, candidates(world, reward_of)


@pytest.mark.parametrize(
    ("objective", "name"), EXACT, ids=lambda value: value if isinstance(value, str) else str(value)
)
def test_the_expected_gradient_is(
    case: tuple[World, Mapping[str, Tensor]], objective: Mapping[str, Any], name: str
) -> None:
    world, exact = case
    error = outcomes(world, objective).expectation - exact[name]
    assert float(error.norm()) <= 1e-10 * max(float(exact[name].norm()), 1.0)


def test_the_exact_gradients_differ_from_one_another(case: tuple[World, Mapping[str, Tensor]]) -> None:
    """Otherwise equality would prove little."""
    _, exact = case
    names = [name for name in exact if "union" not in name and "student" not in name]
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert float((exact[one] - exact[other]).norm()) > 1e-3, (one, other)


def test_the_exact_gradients_are_those_of_their_values() -> None:
    """Central differences on the student's table, for the reverse KL at fixed visits and the whole completions' KL."""
    world = random_world(3, vocab_size=3, horizon=2)
    exact, visits = candidates(world, reward_of), world.reach(world.student)
    log_q = world.teacher.log_softmax(-1)

    def frozen(table: Tensor) -> float:
        log_p = table.log_softmax(-1)
        return float((visits * (log_p.exp() * (log_p - log_q)).sum(-1)).sum())

    def whole(table: Tensor) -> float:
        gaps = [(world.logprobs(table, c) - world.logprobs(world.teacher, c)).sum() for c in world.completions]
        return float((world.probabilities(table) * torch.stack(gaps)).sum())

    for value, name in ((frozen, REVERSE), (whole, "KL of whole completions")):
        for place in torch.cartesian_prod(torch.arange(3), torch.arange(3)).tolist():
            step = torch.zeros_like(world.student)
            step[tuple(place)] = 1e-5
            slope = (value(world.student + step) - value(world.student - step)) / 2e-5
            assert slope == pytest.approx(float(exact[name][tuple(place)]), abs=1e-8), (name, place)


def test_probabilities_of_all_completions_add_up() -> None:
    world = random_world(0)
    assert float(world.probabilities(world.student).sum()) == pytest.approx(1, abs=1e-12)
    assert len(world.completions) == 40


OF_THE_TEACHER_ALONE = [
    objective
    for objective in (*SIGNALS, *WEIGHTINGS)
    if "reward_coef" not in objective and objective.get("control") != "fixed_negative"
]


@pytest.mark.parametrize("objective", OF_THE_TEACHER_ALONE, ids=str)
def test_agreement_teaches_nothing(objective: Mapping[str, Any]) -> None:
    """Teacher and reference equal to the student: zero for every outcome, not on average only."""
    assert outcomes(agreeing(random_world(0)), objective).noise == 0.0


def test_full_is_the_conditional_expectation_of_sampled() -> None:
    for seed in range(3):
        full, sampled = (outcomes(random_world(seed), {"estimator": name}) for name in ("full", "sampled"))
        assert full.variance_per_token < sampled.variance_per_token


def test_the_baseline_pays_with_a_larger_vocabulary() -> None:
    for seed in range(3):
        world = random_world(seed, vocab_size=16, horizon=2)
        plain, based = (outcomes(world, {"estimator": "sampled", "baseline": on}) for on in (False, True))
        assert based.variance_per_token < plain.variance_per_token
        torch.testing.assert_close(based.expectation, plain.expectation, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_sampler_that_lags_behind(seed: int) -> None:
    """Importance sampling is exact for the mark and the states of the weights that wrote; clips are not, and differ."""
    world = random_world(seed)
    at_sampler, marked = lagging_candidates(world, world.reference).values()
    found = {str(o): outcomes(world, o, sampler=world.reference).expectation for o in LAGGING}
    torch.testing.assert_close(found[str({"estimator": "full"})], at_sampler, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[str({"estimator": "sampled"})], marked, rtol=1e-10, atol=1e-12)
    live = found.pop(str({"estimator": "sampled", "max_policy_lag": 1}))
    torch.testing.assert_close(live, at_sampler, rtol=1e-10, atol=1e-12)
    others = list(found.values())[1:]
    for i, one in enumerate(others):
        for other in others[i + 1 :]:
            assert float((one - other).norm()) > 1e-3


def test_what_is_not_offered_fails_the_same_test(case: tuple[World, Mapping[str, Tensor]]) -> None:
    world, exact = case
    k1, k3, k3_reward, truncated, as_advantage, flipped = (refused_outcomes(world, f) for f in REFUSED.values())
    assert float(k1.expectation.norm()) < 1e-12 < k1.noise
    assert float(as_advantage.expectation.norm()) < 1e-12 < as_advantage.noise
    torch.testing.assert_close(k3.expectation, exact["KL(q‖p)"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(flipped.expectation, -exact[REVERSE], rtol=1e-10, atol=1e-12)
    for outcome in (k3_reward, truncated, normalised_outcomes(world)):
        assert min(float((outcome.expectation - other).norm()) for other in exact.values()) > 1e-2
    k1_loss, *_, truncated_loss = list(REFUSED.values())[:4]
    for loss in (k1_loss, truncated_loss):
        assert refused_outcomes(agreeing(world), loss).noise > 0.01  # not silent where there is nothing to learn


def test_costs_by_hand() -> None:
    """Head passes of 2 x 4,096 x 151,936 (student) and 2 x 5,120 x 151,936 (teacher) FLOPs."""
    student, teacher = 2 * 4096 * 151_936, 2 * 5120 * 151_936

    def cost(**objective: Any) -> tuple[int, float]:
        config = ObjectiveConfig.model_validate(objective)
        return bytes_per_token(config), extra_flops(config, rewarded=False)

    assert cost(estimator="sampled") == (4, 0)
    assert cost(estimator="full") == (4 + 2 * 5120, teacher)
    assert cost(estimator="sampled", baseline=True) == (4 + 2 * 5120, student + teacher)
    assert cost(estimator="topk", topk=20) == (4 + 32 * 8, teacher)
    assert cost(estimator="topk", topk_set="union") == (4 + 2 * 5120, student + 2 * teacher)
    assert cost(control="fixed_negative") == (0, 0)
    assert cost(estimator="full", anchor_coef=0.1) == (4 + 2 * 5120, teacher + 4 * student + 2 * 8.2e9)


def test_a_finding_is_of_all_worlds() -> None:
    found = find(lambda world: outcomes(world, {"estimator": "sampled"}))
    assert found.equals == REVERSE
    assert found.cosine == pytest.approx(1)
    assert found.length == pytest.approx(1)
    assert found.signal_to_noise[2] == pytest.approx(16 * found.signal_to_noise[0])
    assert find(lambda world: outcomes(world, {"signal_clip": 1.0})).equals is None


def test_the_page_is_what_the_command_prints() -> None:
    assert render() == Path("docs/estimators.md").read_text(encoding="utf-8")

"""[objective] -> estimator, scores, credit rules and objective; and teachers that cannot give what is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from understudy import ConfigError, RunConfig
from understudy.advantages import CreditRules
from understudy.config_objective import ObjectiveConfig
from understudy.divergences import KINDS, Divergence
from understudy.lm_head import LMHead
from understudy.losses import cispo_loss, importance_sampling_loss, ppo_loss
from understudy.objectives import FullDivergence, Mixture, PolicyGradient, TopkDivergence
from understudy.signals import Needs, build_objective, credit_rules, resolve_estimator, score_needs
from understudy.types import Batch

HEAD = LMHead(torch.eye(3, dtype=torch.float64))
IN_PROCESS: Any = SimpleNamespace(kinds=frozenset({"sampled", "topk", "hidden"}), head=HEAD)
OTHER: Any = SimpleNamespace(kinds=frozenset({"sampled", "topk", "hidden"}), head=replace(HEAD, scale=2.0))
# What answers over a network, with and without alternatives.
SERVED: Any = SimpleNamespace(kinds=frozenset({"sampled", "topk"}), max_topk=20)
PLAIN: Any = SimpleNamespace(kinds=frozenset({"sampled"}))


def run(objective: Mapping[str, Any], **sections: Any) -> RunConfig:
    base: dict[str, Any] = {"output_dir": "run", "student": {"model": "m"}, "objective": objective}
    return RunConfig.model_validate(base | sections)


def resolved(objective: Mapping[str, Any], teacher: Any = IN_PROCESS, **sections: Any) -> RunConfig:
    teachers = {} if teacher is None else {"default": teacher}
    return resolve_estimator(run(objective, **({"teacher": {"model": "t"}} if teachers else {}), **sections), teachers)


@pytest.mark.parametrize(
    ("objective", "estimator"),
    [
        ({}, "full"),
        ({"divergence": "jsd"}, "full"),
        ({"extrapolation": 1.25}, "full"),
        ({"anchor_coef": 0.1}, "full"),
        ({"kl_coef": 0.5, "reduction": "sum", "tokens": {"first": 3}}, "full"),
        ({"discount": 0.5}, "sampled"),
        ({"signal_clip": 2.0}, "sampled"),
        ({"baseline": True}, "sampled"),
        ({"control": "fixed_negative"}, "sampled"),
        ({"control": "shuffled_teacher"}, "sampled"),
        ({"loss": "ppo"}, "sampled"),
        ({"loss": "cispo"}, "sampled"),
        ({"max_importance_ratio": 2.0}, "sampled"),
        ({"importance_band": [0.5, 2.0]}, "sampled"),
        ({"estimator": "sampled"}, "sampled"),
        ({"estimator": "topk"}, "topk"),
    ],
)
def test_auto_is_full_unless_something_asks_for_sampled(objective: dict[str, Any], estimator: str) -> None:
    assert resolved(objective).objective.estimator == estimator


@pytest.mark.parametrize("teachers", [{}, {"a": PLAIN}, {"a": SERVED}, {"a": IN_PROCESS, "b": SERVED}])
def test_auto_is_sampled_unless_every_teacher_is_in_process(teachers: dict[str, Any]) -> None:
    assert resolve_estimator(run({}), teachers).objective.estimator == "sampled"


@pytest.mark.parametrize(
    ("objective", "teacher", "where", "fragments"),
    [
        ({"estimator": "full"}, PLAIN, "objective.estimator", ['"full"', "in this process", 'estimator = "sampled"']),
        ({"estimator": "full"}, SERVED, "objective.estimator", ['"full"', "written tokens only"]),
        ({"baseline": True}, SERVED, "objective.baseline", ["True", "without a baseline"]),
        ({"estimator": "topk", "topk_set": "student"}, SERVED, "objective.topk_set", ['use topk_set = "teacher"']),
        ({"estimator": "topk", "topk_set": "union"}, SERVED, "objective.topk_set", ['"union"', "in this process"]),
        ({"estimator": "topk"}, PLAIN, "objective.topk", ["32 of teacher 'default'", "no alternatives", '"sampled"']),
        ({"estimator": "topk"}, SERVED, "objective.topk", ["gives 20 alternatives", "set objective.topk = 20"]),
        ({"divergence": "jsd"}, PLAIN, "objective.divergence", ['"jsd"', '"reverse_kl"', "[teacher] model"]),
    ],
)
def test_teachers_that_cannot_give_what_is_needed(
    objective: dict[str, Any], teacher: Any, where: str, fragments: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        resolved(objective, teacher)
    assert error.value.where == where
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)


@pytest.mark.parametrize("objective", [{"estimator": "full"}, {"estimator": "topk"}, {"baseline": True}])
def test_a_teachers_settings_do_not_apply_without_one(objective: dict[str, Any]) -> None:
    """`rl` and `sft` read the file of a distillation."""
    settled = resolved(objective, None).objective
    assert (settled.estimator, settled.baseline) == ("sampled", False)


def test_one_teacher_that_cannot_is_enough_and_is_named() -> None:
    config = run({"estimator": "topk", "topk": 5})
    with pytest.raises(ConfigError, match="5 of teacher 'b', which gives no alternatives"):
        resolve_estimator(config, {"a": SERVED, "b": PLAIN})
    with pytest.raises(ConfigError, match=r"objective.estimator[\s\S]*in this process"):
        resolve_estimator(run({"estimator": "full"}), {"a": IN_PROCESS, "b": SERVED})
    assert resolve_estimator(config, {"a": SERVED, "b": IN_PROCESS}).objective.estimator == "topk"


def test_a_served_teacher_gives_as_many_alternatives_as_it_says() -> None:
    assert resolved({"estimator": "topk", "topk": 20}, SERVED).objective.topk == 20
    with pytest.raises(ConfigError, match=r"objective.topk\n.*21 of"):
        resolved({"estimator": "topk", "topk": 21}, SERVED)
    unlimited: Any = SimpleNamespace(kinds=SERVED.kinds)
    assert resolved({"estimator": "topk", "topk": 500}, unlimited).objective.topk == 500


@pytest.mark.parametrize(
    ("objective", "teacher", "reference"),
    [
        ({"estimator": "sampled"}, "sampled", "sampled"),
        ({"estimator": "sampled", "baseline": True}, "hidden", "sampled"),
        ({"estimator": "full"}, "hidden", "hidden"),
        ({"estimator": "topk"}, "topk", "hidden"),
        ({"estimator": "topk", "topk_set": "student"}, "hidden", "hidden"),
        ({"estimator": "topk", "topk_set": "union"}, "hidden", "hidden"),
    ],
)
def test_score_needs(objective: dict[str, Any], teacher: Any, reference: Any) -> None:
    assert score_needs(ObjectiveConfig(topk=7, **objective)) == Needs(teacher, reference, 7)


def test_credit_rules_take_over_every_setting() -> None:
    config = run(
        {
            "estimator": "sampled",
            "kl_coef": 0.5,
            "discount": 0.25,
            "signal_clip": 3.0,
            "extrapolation": 1.5,
            "anchor_coef": 0.1,
            "reward_coef": 0.75,
            "normalize_rewards": True,
            "control_threshold": 0.2,
            "reduction": "sequence_mean",
            "tokens": {"first": 9, "half_life": 4.0, "mask_special": True},
        }
    )
    assert credit_rules(config, special_ids=frozenset({3, 4})) == CreditRules(
        estimator="sampled",
        kl_coef=0.5,
        discount=0.25,
        signal_clip=3.0,
        extrapolation=1.5,
        anchor_coef=0.1,
        reward_coef=0.75,
        normalize_rewards=True,
        control_threshold=0.2,
        sequence_mean=True,
        first=9,
        half_life=4.0,
        masked_ids=frozenset({3, 4}),
    )


def test_credit_rules_by_default_are_plain_distillation() -> None:
    config = resolved({"estimator": "sampled"})
    assert credit_rules(config, special_ids=frozenset({3})) == CreditRules()
    controlled = resolved({"control": "shuffled_teacher", "tokens": {"span": [0.1, 0.4]}})
    assert credit_rules(controlled, special_ids=frozenset({3})) == CreditRules(
        control="shuffled_teacher", span=(0.1, 0.4)
    )
    assert credit_rules(resolved({}, None), special_ids=frozenset()).reward_coef == 1.0


def build(objective: Mapping[str, Any], teacher: Any = IN_PROCESS, **sections: Any) -> Any:
    return build_objective(resolved(objective, teacher, **sections), {} if teacher is None else {"a": teacher}, OTHER)


def test_sampled_is_a_policy_loss_alone() -> None:
    """Reference, anchor and rewards are in its advantages."""
    for extra in ({}, {"extrapolation": 1.25}, {"anchor_coef": 0.5}, {"reward_coef": 1.0}):
        built = build({"estimator": "sampled", **extra}, sampling={"temperature": 0.7})
        assert isinstance(built, PolicyGradient)
        assert (built.temperature, built.baseline_heads) == (0.7, None)
    for teacher in (PLAIN, SERVED, None):
        assert isinstance(build({}, teacher), PolicyGradient)


def test_a_baseline_has_the_teachers_heads_and_the_signals_weight() -> None:
    built = build({"baseline": True, "kl_coef": 0.5})
    assert (built.baseline_heads, built.baseline_coef) == ({"a": HEAD}, 0.5)


@pytest.mark.parametrize(
    ("objective", "function", "options"),
    [
        ({}, importance_sampling_loss, {"max_importance_ratio": None, "importance_band": None}),
        (
            {"max_importance_ratio": 2.0},
            importance_sampling_loss,
            {"max_importance_ratio": 2.0, "importance_band": None},
        ),
        (
            {"importance_band": [0.5, 2.0]},
            importance_sampling_loss,
            {"max_importance_ratio": None, "importance_band": (0.5, 2.0)},
        ),
        ({"loss": "ppo", "clip_low": 0.1}, ppo_loss, {"clip_low": 0.1, "clip_high": 0.2}),
        ({"loss": "cispo", "clip_high": 4.0}, cispo_loss, {"clip_low": 0.2, "clip_high": 4.0}),
    ],
)
def test_policy_losses_and_their_settings(objective: dict[str, Any], function: object, options: dict) -> None:
    loss = build({"estimator": "sampled", **objective}).policy_loss
    assert (loss.func, loss.keywords) == (function, options)


@pytest.mark.parametrize("kind", KINDS)
def test_full_divergences(kind: Any) -> None:
    settings = {"beta": 0.3, "skew": 0.2, "entropy_threshold": 2.0}
    built = build({"divergence": kind, "kl_coef": 0.5, **settings}, sampling={"temperature": 0.7})
    assert built == FullDivergence({"a": HEAD}, 0.5, 0.7, Divergence(kind, **settings), "teacher")


def test_topk_of_a_served_and_of_an_in_process_teacher() -> None:
    assert build({"estimator": "topk", "topk": 8, "tail": "renormalize", "kl_coef": 2.0}, SERVED) == TopkDivergence(
        8, "teacher", "renormalize", 2.0, 1.0, None
    )
    built = build({"estimator": "topk", "topk_set": "union"}, sampling={"temperature": 0.7})
    assert built == TopkDivergence(32, "union", "bucket", 1.0, 0.7, {"a": HEAD})


def test_an_anchor_stands_beside_the_teachers_part() -> None:
    for estimator, first in (("full", FullDivergence), ("topk", TopkDivergence)):
        built = build({"estimator": estimator, "anchor_coef": 0.3, "kl_coef": 2.0})
        assert isinstance(built, Mixture)
        teacher, anchor = built.objectives
        assert isinstance(teacher, first)
        assert teacher.coef == 2.0
        assert anchor == FullDivergence({"reference": OTHER.head}, 0.3, 1.0, Divergence(), "reference")


def test_extrapolation_is_a_difference_of_two_kls() -> None:
    """1.25 KL(p || q) - 0.25 KL(p || r), all times kl_coef; the anchor comes on top."""
    for options, coefficients in (
        ({"extrapolation": 1.25}, (1.25, -0.25)),
        ({"extrapolation": 1.25, "kl_coef": 2.0}, (2.5, -0.5)),
        ({"extrapolation": 1.25, "anchor_coef": 0.5}, (1.25, 0.25)),
        ({"extrapolation": 0.5}, (0.5, 0.5)),
    ):
        parts = build({"estimator": "full", **options}).objectives
        assert [part.coef for part in parts] == pytest.approx(list(coefficients))
        assert [part.against for part in parts] == ["teacher", "reference"]
    # An anchor that undoes it leaves the teacher's part alone.
    undone = build({"estimator": "full", "extrapolation": 1.25, "anchor_coef": 0.25})
    assert isinstance(undone, FullDivergence)


def test_extrapolations_value_and_gradient() -> None:
    """Up to a constant of the state, it is the KL from q**1.25 r**-0.25."""
    logits = torch.tensor([[0.3, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    q, r = (torch.tensor([row], dtype=torch.float64).log_softmax(-1) for row in ([1.0, 0.0, 2.0], [0.5, 0.5, 0.0]))
    ids = torch.zeros(1, dtype=torch.long)
    batch = Batch(ids[None], None, ids, ids, ids == 0, None, None, q, "a", 1, 1, reference_hidden=r)
    config = resolved({"estimator": "full", "extrapolation": 1.25})
    reference: Any = SimpleNamespace(head=HEAD)
    output = build_objective(config, {"a": IN_PROCESS}, reference)(batch, logits, HEAD)
    log_p = logits.log_softmax(-1)
    by_hand = (log_p.exp() * (1.25 * (log_p - q) - 0.25 * (log_p - r))).sum()
    assert float(output.loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-12)
    target = (1.25 * q - 0.25 * r).log_softmax(-1)
    from_target = (log_p.exp() * (log_p - target)).sum()
    expected = torch.autograd.grad(from_target, logits)[0]
    torch.testing.assert_close(torch.autograd.grad(output.loss, logits)[0], expected)


def test_rewards_are_added_as_a_policy_loss() -> None:
    rewarded = {"reward": {"grader": "exact_match"}}
    for estimator, first in (("full", FullDivergence), ("topk", TopkDivergence)):
        teacher, policy = build({"estimator": estimator, "reward_coef": 0.5}, **rewarded).objectives
        assert isinstance(teacher, first)
        assert isinstance(policy, PolicyGradient)
    three = build({"estimator": "full", "reward_coef": 0.5, "anchor_coef": 0.1}, **rewarded).objectives
    assert [type(part) for part in three] == [FullDivergence, FullDivergence, PolicyGradient]

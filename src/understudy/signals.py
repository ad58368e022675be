"""[objective] -> what the loop works with: the resolved estimator, the scores it needs, credit rules, objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from understudy.advantages import CreditRules
from understudy.backends.protocols import Teacher
from understudy.config import RunConfig
from understudy.config_objective import ObjectiveConfig
from understudy.divergences import REVERSE_KL, Divergence
from understudy.errors import ConfigError
from understudy.losses import cispo_loss, importance_sampling_loss, ppo_loss
from understudy.objectives import FullDivergence, Mixture, Objective, PolicyGradient, PolicyLoss, TopkDivergence
from understudy.types import ScoreKind


@dataclass(frozen=True)
class Needs:
    """The kinds of scores an objective is made from; ``topk``: how many alternatives, for kind "topk"."""

    teacher: ScoreKind
    reference: ScoreKind
    topk: int


def resolve_estimator(config: RunConfig, teachers: Mapping[str, Teacher]) -> RunConfig:
    """ "auto" settled, and the choice checked against what the teachers can give.

    auto is full where every teacher can give hidden states and nothing asks for sampled, else sampled. Older weights'
    tokens ask for it: only a signal on them can be corrected for who wrote them.

    Raises:
        ConfigError: teachers that cannot give what the objective needs.
    """
    objective = config.objective
    if not teachers:  # rewards, or a control, on the written tokens: a teacher's settings do not apply
        update = {"estimator": "sampled", "baseline": False}
        return config.model_copy(update={"objective": objective.model_copy(update=update)})
    in_process = all("hidden" in teacher.kinds for teacher in teachers.values())
    if objective.estimator == "auto":
        full = in_process and not objective.asks_for_sampled and config.sampling.max_policy_lag == 0
        objective = objective.model_copy(update={"estimator": "full" if full else "sampled"})
    _check_teachers(objective, teachers, in_process)
    return config.model_copy(update={"objective": objective})


def _check_teachers(objective: ObjectiveConfig, teachers: Mapping[str, Teacher], in_process: bool) -> None:
    kind = score_needs(objective, teachers).teacher
    if kind == "hidden" and not in_process:
        key = {"sampled": "baseline", "full": "estimator", "topk": "topk_set"}[objective.estimator]
        raise ConfigError(
            f"objective.{key}",
            got=f'"{getattr(objective, key)}" with a teacher that gives log-probabilities of written tokens only',
            expected="teachers in this process or behind `understudy serve teacher`, whose hidden states give every "
            "token's probability",
            remedy='use topk_set = "teacher"' if key == "topk_set" else 'use estimator = "sampled", without a baseline',
        )
    if objective.estimator == "sampled" and objective.divergence != "reverse_kl":
        raise ConfigError(
            "objective.divergence",
            got=f'"{objective.divergence}" with estimator = "sampled"',
            expected='"reverse_kl": the written tokens are samples of the student, which other divergences do not '
            "average over",
            remedy="bring the teacher into this process ([teacher] model), and drop what asks for sampled",
        )
    for name, teacher in teachers.items() if kind == "topk" else ():
        most = getattr(teacher, "max_topk", None)
        if "topk" not in teacher.kinds or (most is not None and most < objective.topk):
            raise ConfigError(
                "objective.topk",
                got=f"{objective.topk} of teacher {name!r}, which gives "
                f"{most if 'topk' in teacher.kinds else 'no'} alternatives",
                expected="a teacher that returns as many",
                remedy=f"set objective.topk = {most}" if most else 'use estimator = "sampled"',
            )


def score_needs(objective: ObjectiveConfig, teachers: Mapping[str, Teacher] = {}) -> Needs:
    """What teachers and reference must send, for a resolved estimator. The student's own top-k set is asked for id by
    id where all teachers can, and looked up in hidden states elsewhere."""
    sampled = objective.estimator == "sampled"
    can_choose = bool(teachers) and all("chosen" in teacher.kinds for teacher in teachers.values())
    teacher: ScoreKind
    if objective.estimator == "topk" and objective.topk_set == "teacher":
        teacher = "topk"
    elif objective.estimator == "topk" and objective.topk_set == "student" and can_choose:
        teacher = "chosen"
    else:
        teacher = "hidden" if not sampled or objective.baseline else "sampled"
    return Needs(teacher, "sampled" if sampled else "hidden", objective.topk)


def credit_rules(config: RunConfig, *, special_ids: frozenset[int]) -> CreditRules:
    """[objective] as ``training_examples`` takes it."""
    objective = config.objective
    assert objective.estimator != "auto"
    same = ("kl_coef", "discount", "signal_clip", "extrapolation", "anchor_coef", "control", "control_threshold")
    return CreditRules(
        estimator=objective.estimator,
        reward_coef=config.reward_coef,
        normalize_rewards=objective.normalize_rewards,
        sequence_mean=objective.reduction == "sequence_mean",
        first=config.first_tokens,
        span=objective.tokens.span,
        half_life=objective.tokens.half_life,
        masked_ids=special_ids if objective.tokens.mask_special else frozenset(),
        compare_sampler=config.sampler is not None,
        **{name: getattr(objective, name) for name in same},
    )


def build_objective(config: RunConfig, teachers: Mapping[str, Any], reference: Any | None) -> Objective:
    """The objective of a resolved configuration. ``teachers`` and ``reference`` lend their heads."""
    objective, temperature = config.objective, config.sampling.temperature
    heads = {name: teacher.head for name, teacher in teachers.items() if "hidden" in teacher.kinds}
    policy = PolicyGradient(
        temperature=temperature,
        policy_loss=_policy_loss(objective),
        baseline_heads=heads if objective.baseline else None,
        baseline_coef=objective.kl_coef,
        live_coef=_live_coef(config),
    )
    if objective.estimator == "sampled":
        return policy
    if objective.estimator == "topk":
        k, coef = objective.topk, objective.kl_coef
        looked_up = heads if score_needs(objective, teachers).teacher == "hidden" else None
        parts: list[Objective] = [TopkDivergence(k, objective.topk_set, objective.tail, coef, temperature, looked_up)]
    else:
        divergence = Divergence(objective.divergence, objective.beta, objective.skew, objective.entropy_threshold)
        parts = [FullDivergence(heads, objective.kl_coef * objective.extrapolation, temperature, divergence)]
    # KL(p || q**l r**(1 - l)) is l KL(p || q) + (1 - l) KL(p || r) but for a constant.
    coef = objective.kl_coef * (1 - objective.extrapolation) + objective.anchor_coef
    if coef != 0:
        assert reference is not None
        parts.append(FullDivergence({"reference": reference.head}, coef, temperature, REVERSE_KL, "reference"))
    # A sampler of its own weights is watched: its advantages are zero where there are no rewards.
    if config.reward_coef > 0 or config.sampler is not None:
        parts.append(policy)
    return parts[0] if len(parts) == 1 else Mixture(parts)


def _live_coef(config: RunConfig) -> float:
    """What log p counts for in the advantages, where older weights may have written and it stands for itself alone."""
    objective = config.objective
    per_token = objective.discount == 0 and objective.signal_clip is None and objective.control == "none"
    taught = bool(config.all_teachers)
    if config.sampling.max_policy_lag == 0 or not per_token or objective.estimator != "sampled":
        return 0.0
    return (objective.kl_coef if taught else 0.0) + objective.anchor_coef


def _policy_loss(objective: ObjectiveConfig) -> PolicyLoss:
    if objective.loss == "importance_sampling":
        return partial(
            importance_sampling_loss,
            max_importance_ratio=objective.max_importance_ratio,
            importance_band=objective.importance_band,
        )
    loss = {"ppo": ppo_loss, "cispo": cispo_loss}[objective.loss]
    return partial(loss, clip_low=objective.clip_low, clip_high=objective.clip_high)

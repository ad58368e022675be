"""Which settings of [objective] make sense together. Everything that can be told from the file alone is told here."""

from __future__ import annotations

from typing import NoReturn

from understudy.config import RunConfig
from understudy.config_objective import ObjectiveConfig
from understudy.errors import ConfigError


def check_objective(config: RunConfig, method: str, rewarded: bool) -> None:
    """Raise ConfigError for what cannot work or would have no effect in ``distill`` and ``rl``."""
    _check_sampling(config)
    _check_servers(config)
    _check_lag(config)
    _check_rewards(config, method, rewarded)
    if method == "distill":
        _check_estimator(config.objective)
        _check_baseline(config.objective)
        _check_effect(config)
    _check_reference(config, method)
    _check_control(config, method)
    _check_policy_loss(config)
    _check_tokens(config)


def _refuse(where: str, got: object, expected: str, remedy: str) -> NoReturn:
    raise ConfigError(where, got=str(got), expected=expected, remedy=remedy)


def _check_sampling(config: RunConfig) -> None:
    sampling = config.sampling
    if sampling.temperature == 0:
        _refuse("sampling.temperature", 0, "above 0 in training", "use 1.0, the article's setting")
    if sampling.top_p != 1 or sampling.top_k != 0:
        _refuse(
            "sampling",
            f"top_p = {sampling.top_p}, top_k = {sampling.top_k}",
            "no truncation in training: the written tokens' probabilities would not be the trained ones",
            "drop top_p and top_k; [[evaluation.tasks]] and `generate` may use them",
        )


def _check_servers(config: RunConfig) -> None:
    roles = {f"teacher {name!r}": role for name, role in config.all_teachers.items()} | {"reference": config.reference}
    for name, role in roles.items():
        if role is not None and role.url is not None and config.sampling.temperature != 1:
            _refuse(
                "sampling.temperature",
                f"{config.sampling.temperature:g} with {name} at {role.url}",
                "1: servers score at temperature 1, and the reverse KL would compare two different distributions",
                "set sampling.temperature = 1, or bring the teacher into this process",
            )
        if role is not None and role.when_away == "skip" and (role.url is None or role is config.reference):
            got = '"skip" without a url' if role.url is None else '"skip"'
            _refuse(f"{name}: when_away", got, "a teacher on a server, whose rows a step can do without", "drop it")


def _check_lag(config: RunConfig) -> None:
    lag, objective = config.sampling.max_policy_lag, config.objective
    if lag == 0:
        return
    if objective.estimator in ("full", "topk") or objective.divergence != "reverse_kl":
        _refuse(
            "sampling.max_policy_lag",
            f'{lag} with estimator = "{objective.estimator}", divergence = "{objective.divergence}"',
            "the sampled estimator, whose importance ratios correct for the older weights that wrote the tokens",
            'use estimator = "sampled", or max_policy_lag = 0',
        )


def _check_rewards(config: RunConfig, method: str, rewarded: bool) -> None:
    size = config.sampling.group_size
    if config.reward_coef > 0 and not rewarded:
        _refuse("objective.reward_coef", config.reward_coef, "a [reward] grader", 'add [reward] grader = "..."')
    if config.reward_coef > 0 and size < 2:
        _refuse(
            "sampling.group_size",
            size,
            "at least 2 with rewards: they are centred on their group",
            "set sampling.group_size = 8",
        )
    if method == "rl" and config.reward_coef == 0:
        _refuse("objective.reward_coef", 0, "above 0 for rl", "drop it (1 without a teacher) or use `distill`")
    if method == "distill" and config.objective.kl_coef == 0:
        _refuse("objective.kl_coef", 0, "above 0 for distill", "drop it, or use `rl`")


def _check_estimator(objective: ObjectiveConfig) -> None:
    """Settings that one estimator has and another has not."""
    estimator = objective.estimator
    only_sampled = {
        "discount": objective.discount != 0,
        "signal_clip": objective.signal_clip is not None,
        "baseline": objective.baseline,
        "control": objective.control != "none",
    }
    for key, is_set in only_sampled.items():
        if is_set and estimator not in ("auto", "sampled"):
            _refuse(
                f"objective.{key}",
                f'{getattr(objective, key)} with estimator = "{estimator}"',
                "a signal on the written tokens alone",
                f'use estimator = "sampled", or drop {key}',
            )
    settled = estimator in ("sampled", "topk") or (estimator == "auto" and objective.asks_for_sampled)
    if objective.divergence != "reverse_kl" and settled:
        _refuse(
            "objective.divergence",
            f'"{objective.divergence}" with {_what_rules_out_full(objective)}',
            '"reverse_kl": the written tokens are samples of the student, over which only its expectation can be taken'
            if estimator != "topk"
            else '"reverse_kl", the top-k estimator\'s',
            'use estimator = "full"',
        )


def _what_rules_out_full(objective: ObjectiveConfig) -> str:
    if objective.estimator in ("sampled", "topk"):
        return f'estimator = "{objective.estimator}"'
    return "a setting of the sampled estimator (discount, signal_clip, baseline, control or the policy loss)"


def _check_effect(config: RunConfig) -> None:
    """Keys that act under one setting only, and are set without it."""
    objective = config.objective
    acts = {
        "topk": (objective.estimator == "topk", 'estimator = "topk"'),
        "topk_set": (objective.estimator == "topk", 'estimator = "topk"'),
        "tail": (objective.estimator == "topk", 'estimator = "topk"'),
        "beta": (objective.divergence == "jsd", 'divergence = "jsd"'),
        "skew": (objective.divergence.startswith("skewed"), 'divergence = "skewed_kl" or "skewed_reverse_kl"'),
        "entropy_threshold": (objective.divergence == "entropy_gated", 'divergence = "entropy_gated"'),
        "clip_low": (objective.loss in ("ppo", "cispo"), 'loss = "ppo" or "cispo"'),
        "clip_high": (objective.loss in ("ppo", "cispo"), 'loss = "ppo" or "cispo"'),
        "control_threshold": (objective.control == "fixed_negative", 'control = "fixed_negative"'),
        "normalize_rewards": (config.reward_coef > 0, "reward_coef above 0"),
    }
    for key, (does_act, where) in acts.items():
        # By value: a stored configuration holds every key.
        if not does_act and getattr(objective, key) != ObjectiveConfig.model_fields[key].default:
            _refuse(
                f"objective.{key}",
                f"{getattr(objective, key)} without {where}",
                "settings that have an effect",
                f"set objective.{where}, or drop {key}",
            )


def _check_baseline(objective: ObjectiveConfig) -> None:
    """A baseline leaves the expectation alone if it and the token's weight are known before the token is written."""
    unknown = {
        "tokens.span": objective.tokens.span != (0.0, 1.0),
        "tokens.mask_special": objective.tokens.mask_special,
        'reduction = "sequence_mean"': objective.reduction == "sequence_mean",
    }
    for key in (key for key, is_set in unknown.items() if objective.baseline and is_set):
        _refuse(
            "objective.baseline",
            f"true with {key}",
            "weights that do not depend on the written token: the baseline would change the expected gradient",
            "drop one of them",
        )


def _check_reference(config: RunConfig, method: str) -> None:
    objective = config.objective
    # rl has no teacher to go beyond.
    extrapolates, anchored = objective.extrapolation != 1 and method == "distill", objective.anchor_coef != 0
    key = "extrapolation" if extrapolates else "anchor_coef"
    if (extrapolates or anchored) and config.reference is None:
        _refuse(
            f"objective.{key}",
            getattr(objective, key),
            "a [reference] to measure from",
            'add [reference] model = "...", e.g. the student as it is now',
        )
    if config.reference is not None and not (extrapolates or anchored):
        _refuse(
            "reference",
            config.reference.model,
            "a use for it",
            f"set objective.anchor_coef{' or objective.extrapolation' if method == 'distill' else ''}, or drop "
            "[reference]",
        )
    if extrapolates and (objective.divergence != "reverse_kl" or objective.estimator == "topk"):
        _refuse(
            "objective.extrapolation",
            f'{objective.extrapolation} with divergence = "{objective.divergence}", '
            f'estimator = "{objective.estimator}"',
            "the reverse KL, sampled or full",
            "drop it, or the other key",
        )


def _check_control(config: RunConfig, method: str) -> None:
    objective, sampling = config.objective, config.sampling
    if objective.control == "none":
        return
    others = {
        "baseline": objective.baseline,
        "discount": objective.discount != 0,
        "signal_clip": objective.signal_clip is not None,
        "extrapolation": objective.extrapolation != 1,
        "anchor_coef": objective.anchor_coef != 0,
    }
    for key in (key for key, is_set in others.items() if is_set):
        _refuse(
            f"objective.{key}",
            f'{getattr(objective, key)} with control = "{objective.control}"',
            "a control alone: it takes the place of the teacher's signal",
            f"drop {key}",
        )
    if method == "rl":
        _refuse("objective.control", objective.control, '"none" for rl, which has no teacher', "use `distill`")
    if objective.control == "shuffled_teacher" and not config.all_teachers:
        _refuse("objective.control", objective.control, "a [teacher] whose marks to shuffle", "add [teacher]")
    if objective.control == "shuffled_teacher" and sampling.group_size * sampling.groups_per_batch < 2:
        _refuse("objective.control", objective.control, "two completions a step", "set sampling.group_size = 2")


def _check_policy_loss(config: RunConfig) -> None:
    objective = config.objective
    corrected = objective.max_importance_ratio is not None or objective.importance_band is not None
    if objective.loss != "importance_sampling" and corrected:
        key = "importance_band" if objective.max_importance_ratio is None else "max_importance_ratio"
        _refuse(
            f"objective.{key}",
            f'{getattr(objective, key)} with loss = "{objective.loss}"',
            "one correction of the importance ratio: that loss clips it itself",
            f'drop {key}, or use loss = "importance_sampling"',
        )
    band = objective.importance_band
    if band is not None and not 0 <= band[0] < 1 < band[1]:
        _refuse("objective.importance_band", list(band), "[low, high] around 1", "e.g. [0.5, 2.0]")
    if objective.max_importance_ratio is not None and objective.max_importance_ratio < 1:
        _refuse("objective.max_importance_ratio", objective.max_importance_ratio, "at least 1", "e.g. 2.0")
    if (objective.loss != "importance_sampling" or corrected) and (
        objective.estimator in ("full", "topk") and config.reward_coef == 0
    ):
        _refuse(
            "objective.loss",
            f'a policy loss\'s setting with estimator = "{objective.estimator}" and no rewards',
            "advantages for it to act on",
            'use estimator = "sampled", or drop the setting',
        )


def _check_tokens(config: RunConfig) -> None:
    tokens = config.objective.tokens
    if not 0 <= tokens.span[0] < tokens.span[1] <= 1:
        _refuse("objective.tokens.span", list(tokens.span), "0 <= start < end <= 1", "e.g. [0.0, 0.3]")
    if tokens.first is not None and tokens.first >= 1 and tokens.first != int(tokens.first):
        _refuse(
            "objective.tokens.first",
            tokens.first,
            "a number of tokens, or a fraction below 1 of sampling.max_completion_tokens",
            f"set objective.tokens.first = {int(tokens.first)}",
        )
    if tokens.first is not None and tokens.span != (0.0, 1.0):
        _refuse(
            "objective.tokens",
            f"first = {tokens.first} and span = {list(tokens.span)}",
            "one of them: where sampling stops at `first`, a completion's own length is not known",
            "drop one",
        )

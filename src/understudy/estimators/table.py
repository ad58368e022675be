"""docs/estimators.md: every objective measured, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from math import isinf
from typing import Any

from torch import Tensor

from understudy.config_objective import ObjectiveConfig
from understudy.estimators.measure import (
    REFUSED,
    Outcomes,
    agreeing,
    normalised_outcomes,
    outcomes,
    refused_outcomes,
    reward_of,
    run_config,
)
from understudy.estimators.tabular import World, candidates, lagging_candidates, random_world
from understudy.signals import score_needs

WORLDS = 5
BATCHES = (1, 16, 256)
_EXACT = 1e-9
_Objective = Mapping[str, Any]

SIGNALS: Sequence[_Objective] = (
    {"estimator": "full"},
    {"estimator": "sampled"},
    {"estimator": "sampled", "baseline": True},
    {"estimator": "sampled", "discount": 0.5},
    {"estimator": "sampled", "discount": 1.0},
    {"estimator": "sampled", "signal_clip": 1.0},
    {"divergence": "forward_kl"},
    *({"divergence": "jsd", "beta": beta} for beta in (0.1, 0.5, 0.9)),
    {"divergence": "skewed_kl"},
    {"divergence": "skewed_reverse_kl"},
    {"divergence": "entropy_gated"},
    *(
        {"estimator": "topk", "topk": 2, "topk_set": chosen_by, "tail": tail}
        for tail in ("bucket", "renormalize", "stop_gradient")
        for chosen_by in ("teacher", "student", "union")
    ),
    *({"estimator": estimator, "extrapolation": 1.25} for estimator in ("sampled", "full")),
    *({"estimator": estimator, "anchor_coef": 0.5} for estimator in ("sampled", "full")),
    *({"estimator": estimator, "reward_coef": 1.0} for estimator in ("sampled", "full")),
    {"control": "fixed_negative"},
    {"control": "shuffled_teacher"},
)
WEIGHTINGS: Sequence[_Objective] = (
    {"tokens": {"first": 2}},
    {"tokens": {"span": [0.0, 0.5]}},
    {"tokens": {"half_life": 2.0}},
    {"tokens": {"mask_special": True}},
    {"reduction": "sequence_mean"},
    {"estimator": "sampled", "tokens": {"first": 2}},
    {"estimator": "sampled", "tokens": {"span": [0.0, 0.5]}},
    {"estimator": "sampled", "tokens": {"half_life": 2.0}},
    {"estimator": "sampled", "tokens": {"mask_special": True}},
    {"estimator": "sampled", "reduction": "sequence_mean"},
)
LAGGING: Sequence[_Objective] = (
    {"estimator": "full"},
    {"estimator": "sampled"},
    {"estimator": "sampled", "max_policy_lag": 1},
    {"max_importance_ratio": 1.5},
    {"importance_band": [0.5, 2.0]},
    {"loss": "ppo"},
    {"loss": "cispo"},
)


@dataclass(frozen=True)
class Finding:
    """One objective over several worlds: means, but for ``equals``, which holds in every one or is None."""

    equals: str | None
    cosine: float
    length: float
    variance: float
    noise_at_agreement: float
    signal_to_noise: tuple[float, ...]


def find(of: Callable[[World], Outcomes], known: Callable[[int], Mapping[str, Tensor]] | None = None) -> Finding:
    """Measure in WORLDS random worlds: which of the ``known`` exact gradients (by world) it equals, and how it compares
    with the first of them."""
    rows, names = [], set[str]()
    for seed in range(WORLDS):
        world, exact = _world(seed), (known or exact_gradients)(seed)
        result = of(world)
        mean, target = result.expectation, next(iter(exact.values()))
        equal = {name for name, other in exact.items() if _same(mean, other)}
        names = equal if seed == 0 else names & equal
        length = float(mean.norm() / target.norm())
        cosine = float((mean * target).sum() / (mean.norm() * target.norm())) if length > _EXACT else 0.0
        ratios = [result.signal_to_noise(size) for size in BATCHES]
        rows.append((cosine, length, result.variance_per_token, of(agreeing(world)).noise, *ratios))
    cosine, length, variance, noise, *ratios = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    # In their own order: of two names for one gradient, the plainer stands first.
    name = next((name for name in (known or exact_gradients)(0) if name in names), None)
    return Finding(name, cosine, length, variance, noise, tuple(ratios))


@cache
def _world(seed: int, vocab_size: int = 4, horizon: int = 3) -> World:
    return random_world(seed, vocab_size=vocab_size, horizon=horizon)


@cache
def exact_gradients(seed: int) -> Mapping[str, Tensor]:
    """``candidates`` of a world."""
    return candidates(_world(seed), reward_of)


@cache
def lagging_gradients(seed: int) -> Mapping[str, Tensor]:
    """``lagging_candidates`` of a world whose reference wrote the completions."""
    return lagging_candidates(_world(seed), _world(seed).reference)


def _same(one: Tensor, other: Tensor) -> bool:
    return float((one - other).norm()) <= _EXACT * max(1e-3, float(other.norm()))


# Qwen3-8B taught by Qwen3-32B: parameters, hidden size, vocabulary.
_STUDENT, _TEACHER, _VOCABULARY = (8.2e9, 4096), (32.8e9, 5120), 151_936
# Sampling and training the student, one forward pass of the teacher.
_PLAIN_FLOPS = 8 * _STUDENT[0] + 2 * _TEACHER[0]


def bytes_per_token(objective: ObjectiveConfig, *, topk: int = 32) -> int:
    """What a served teacher has to send for a token: float32 log-probabilities, int32 ids, bfloat16 hidden states."""
    if objective.control == "fixed_negative":
        return 0
    kind = score_needs(objective).teacher
    return 4 + {"sampled": 0, "topk": topk * 8, "hidden": 2 * _TEACHER[1]}[kind]


def extra_flops(objective: ObjectiveConfig, *, rewarded: bool) -> float:
    """FLOPs for a token on top of the plain sampled estimator's: passes through the LM heads, and a reference."""
    student_head, teacher_head = (2.0 * size[1] * _VOCABULARY for size in (_STUDENT, _TEACHER))
    total = 0.0
    if objective.estimator == "full":
        total += teacher_head
    if objective.baseline:
        total += student_head + teacher_head
    if objective.estimator == "topk":
        total += teacher_head  # the best of all, or the looked-up tokens' normaliser
        total += student_head if objective.topk_set in ("student", "union") else 0.0
        total += teacher_head if objective.topk_set == "union" else 0.0
    if objective.extrapolation != 1 or objective.anchor_coef:
        total += 2 * _STUDENT[0]  # a reference of the student's size
        # A second divergence goes through the student's head forwards and backwards.
        total += 0.0 if objective.estimator == "sampled" else 4 * student_head
    if rewarded and objective.estimator != "sampled":
        total += 3 * student_head
    return total


def render() -> str:
    """The page, from nothing but the code: some ten seconds."""
    signals = [(objective, find(_of(objective))) for objective in SIGNALS]
    full = signals[0][1]
    weightings = [(objective, find(_of(objective))) for objective in WEIGHTINGS]
    lagging = [(objective, find(_of(objective, lagging=True), lagging_gradients)) for objective in LAGGING]
    refused = [(name, find(partial(refused_outcomes, per_token=loss))) for name, loss in REFUSED.items()]
    refused.append(("advantages brought to mean 0 and deviation 1 over a group", find(normalised_outcomes)))
    page = files("understudy.estimators").joinpath("page.md").read_text(encoding="utf-8")
    return page.format(
        signals=_table(signals, full),
        weightings=_table(weightings, full),
        lagging=_table(lagging, full),
        refused=_table(refused, full),
        vocabulary=_vocabulary(),
        worlds=WORLDS,
        exact=_EXACT,
        plain=_PLAIN_FLOPS / 1e9,
        logits=2 * _VOCABULARY,
    )


def _of(objective: _Objective, *, lagging: bool = False) -> Callable[[World], Outcomes]:
    return lambda world: outcomes(world, objective, sampler=world.reference if lagging else None)


def _toml(objective: _Objective) -> str:
    flat = {
        f"{key}.{name}" if name else key: item
        for key, value in objective.items()
        for name, item in (value.items() if isinstance(value, Mapping) else [("", value)])
    }
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in flat.items())


def _table(rows: Sequence[tuple[str | _Objective, Finding]], full: Finding) -> str:
    """One row for each objective, with its price; for each loss by name, without."""
    priced = not isinstance(rows[0][0], str)
    names = ["objective", "expected gradient", "cosine", "length", "variance", "signal-to-noise at 1, 16, 256"]
    names += ["at p = q", *(["bytes", "extra GFLOP"] if priced else [])]
    lines = [names, ["---"] * len(names)]
    for objective, found in rows:
        line = [
            objective if isinstance(objective, str) else f"`{_toml(objective)}`",
            found.equals or "biased",
            _cosine(found),
            f"{found.length:.2f}",
            f"{found.variance / full.variance:.2f}",
            _ratios(found),
            _agreement(found),
        ]
        lines.append(line + ([] if isinstance(objective, str) else _price(objective)))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _price(objective: _Objective) -> list[str]:
    """Bytes and GFLOP for a token, with 32 alternatives where there are any."""
    shown = {**objective, **({"topk": 32} if "topk" in objective else {})}
    config = run_config(shown).objective
    settled = "sampled" if config.asks_for_sampled else "full"
    config = config if config.estimator != "auto" else config.model_copy(update={"estimator": settled})
    flops = extra_flops(config, rewarded=bool(config.reward_coef))
    return [f"{bytes_per_token(config):,}", f"{flops / 1e9:.1f}"]


def _cosine(found: Finding) -> str:
    return "" if found.length < _EXACT else f"{found.cosine:.2f}"


def _ratios(found: Finding) -> str:
    if isinf(found.signal_to_noise[0]):
        return "no noise"
    return ", ".join(f"{ratio:.2f}" for ratio in found.signal_to_noise)


def _agreement(found: Finding) -> str:
    return "0" if found.noise_at_agreement < 1e-12 else f"{found.noise_at_agreement:.2g}"


def _vocabulary() -> str:
    lines = ["| vocabulary, tokens | sampled / full | with a baseline / without |\n|---|---|---|\n"]
    for vocab_size, horizon in ((4, 3), (8, 2), (16, 2), (24, 2)):
        worlds = [_world(seed, vocab_size, horizon) for seed in range(WORLDS)]
        full, sampled, based = (
            sum(outcomes(world, objective).variance_per_token for world in worlds) for objective in SIGNALS[:3]
        )
        lines.append(f"| {vocab_size}, {horizon} | {sampled / full:.2f} | {based / sampled:.2f} |\n")
    return "".join(lines)

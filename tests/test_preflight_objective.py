"""Settings of [objective] that cannot work together, or would have no effect: each is refused with key and remedy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from understudy import ConfigError, RunConfig
from understudy.preflight import check_run
from understudy.preflight_objective import check_objective
from user import WORDS, bpe_tokenizer, save_model, tree, word_tokenizer, write_rows

REFERENCE = {"reference": {"model": "start"}}
REWARD = {"reward": {"grader": "exact_match"}}


def run(objective: Mapping[str, Any], **sections: Any) -> RunConfig:
    base: dict[str, Any] = {
        "output_dir": "run",
        "student": {"model": "m"},
        "teacher": {"model": "t"},
        "prompts": {"path": "rows.jsonl"},
    }
    merged = base | {"objective": objective} | sections
    return RunConfig.model_validate({name: value for name, value in merged.items() if value is not None})


def check(objective: Mapping[str, Any], method: str = "distill", **sections: Any) -> None:
    config = run(objective, **sections)
    check_objective(config, method, rewarded=config.reward is not None)


# What is wrong -> [objective], other sections (None: none), the key that is named, and words of the message.
DISTILL: dict[str, tuple[dict[str, Any], dict[str, Any], str, list[str]]] = {
    "greedy training": ({}, {"sampling": {"temperature": 0}}, "sampling.temperature", ["above 0", "use 1.0"]),
    "top_p": ({}, {"sampling": {"top_p": 0.9}}, "sampling", ["top_p = 0.9", "no truncation", "drop top_p and top_k"]),
    "top_k": ({}, {"sampling": {"top_k": 5}}, "sampling", ["top_k = 5", "no truncation", "drop top_p and top_k"]),
    "rewards without a grader": ({"reward_coef": 1}, {}, "objective.reward_coef", ["1", "add [reward] grader"]),
    "a group of one": (
        {"reward_coef": 1},
        {**REWARD, "sampling": {"group_size": 1}},
        "sampling.group_size",
        ["at least 2", "set sampling.group_size = 8"],
    ),
    "a teacher that does not count": ({"kl_coef": 0}, {}, "objective.kl_coef", ["above 0 for distill", "or use `rl`"]),
    "discount with full": (
        {"estimator": "full", "discount": 0.5},
        {},
        "objective.discount",
        ['0.5 with estimator = "full"', 'use estimator = "sampled", or drop discount'],
    ),
    "clip with full": (
        {"estimator": "full", "signal_clip": 2.0},
        {},
        "objective.signal_clip",
        ['2.0 with estimator = "full"', "or drop signal_clip"],
    ),
    "baseline with topk": (
        {"estimator": "topk", "baseline": True},
        {},
        "objective.baseline",
        ['True with estimator = "topk"', "or drop baseline"],
    ),
    "control with full": (
        {"estimator": "full", "control": "fixed_negative"},
        {},
        "objective.control",
        ['fixed_negative with estimator = "full"', "or drop control"],
    ),
    "divergence of samples": (
        {"estimator": "sampled", "divergence": "forward_kl"},
        {},
        "objective.divergence",
        ['"forward_kl" with estimator = "sampled"', "samples of the student", 'use estimator = "full"'],
    ),
    "divergence of the top k": (
        {"estimator": "topk", "divergence": "jsd"},
        {},
        "objective.divergence",
        ['"jsd" with estimator = "topk"', "the top-k estimator's", 'use estimator = "full"'],
    ),
    "divergence with what only samples have": (
        {"divergence": "skewed_kl", "discount": 0.5},
        {},
        "objective.divergence",
        ['"skewed_kl" with a setting of the sampled estimator (discount,', 'use estimator = "full"'],
    ),
    "divergence with a policy loss": (
        {"divergence": "jsd", "loss": "ppo"},
        {},
        "objective.divergence",
        ["or the policy loss)"],
    ),
    "extrapolation from nowhere": (
        {"extrapolation": 1.25},
        {},
        "objective.extrapolation",
        ["1.25", "a [reference]", "add [reference] model"],
    ),
    "anchor to nothing": ({"anchor_coef": 0.1}, {}, "objective.anchor_coef", ["0.1", "add [reference] model"]),
    "a reference without use": ({}, REFERENCE, "reference", ["start", "anchor_coef or objective.extrapolation"]),
    "extrapolation of another divergence": (
        {"extrapolation": 1.25, "divergence": "jsd"},
        REFERENCE,
        "objective.extrapolation",
        ['divergence = "jsd"', "the reverse KL, sampled or full", "drop it, or the other key"],
    ),
    "extrapolation of the top k": (
        {"extrapolation": 1.25, "estimator": "topk"},
        REFERENCE,
        "objective.extrapolation",
        ['estimator = "topk"', "drop it"],
    ),
    **{
        f"control with {key}": (
            {"control": "shuffled_teacher", key: value},
            REFERENCE if key in ("extrapolation", "anchor_coef") else {},
            f"objective.{key}",
            [f'{value} with control = "shuffled_teacher"', "a control alone", f"drop {key}"],
        )
        for key, value in {
            "baseline": True,
            "discount": 0.5,
            "signal_clip": 2.0,
            "extrapolation": 1.25,
            "anchor_coef": 0.1,
        }.items()
    },
    "marks of no teacher": (
        {"control": "shuffled_teacher", "reward_coef": 0},
        {"teacher": None},
        "objective.control",
        ["shuffled_teacher", "add [teacher]"],
    ),
    "nobody to swap marks with": (
        {"control": "shuffled_teacher"},
        {"sampling": {"group_size": 1, "groups_per_batch": 1}},
        "objective.control",
        ["two completions a step", "set sampling.group_size = 2"],
    ),
    "truncation under ppo": (
        {"loss": "ppo", "max_importance_ratio": 2.0},
        {},
        "objective.max_importance_ratio",
        ['2.0 with loss = "ppo"', 'drop max_importance_ratio, or use loss = "importance_sampling"'],
    ),
    "band under cispo": (
        {"loss": "cispo", "importance_band": [0.5, 2.0]},
        {},
        "objective.importance_band",
        ['(0.5, 2.0) with loss = "cispo"', "drop importance_band"],
    ),
    "band beside 1": (
        {"importance_band": [1.5, 2.0]},
        {},
        "objective.importance_band",
        ["[1.5, 2.0]", "[low, high] around 1", "e.g. [0.5, 2.0]"],
    ),
    "band the wrong way round": ({"importance_band": [2.0, 0.5]}, {}, "objective.importance_band", ["[2.0, 0.5]"]),
    "negative band": ({"importance_band": [-1.0, 2.0]}, {}, "objective.importance_band", ["[-1.0, 2.0]"]),
    "truncation below 1": (
        {"max_importance_ratio": 0.5},
        {},
        "objective.max_importance_ratio",
        ["0.5", "at least 1", "e.g. 2.0"],
    ),
    "ppo without advantages": (
        {"estimator": "full", "loss": "ppo"},
        {},
        "objective.loss",
        ['estimator = "full" and no rewards', 'use estimator = "sampled", or drop the setting'],
    ),
    "truncation without advantages": (
        {"estimator": "topk", "max_importance_ratio": 2.0},
        {},
        "objective.loss",
        ['estimator = "topk" and no rewards', "advantages for it to act on"],
    ),
    "an empty span": ({"tokens": {"span": [0.5, 0.5]}}, {}, "objective.tokens.span", ["[0.5, 0.5]", "[0.0, 0.3]"]),
    "a span beyond the end": ({"tokens": {"span": [0.5, 1.5]}}, {}, "objective.tokens.span", ["0 <= start < end <= 1"]),
    "a span before the start": ({"tokens": {"span": [-0.5, 1.0]}}, {}, "objective.tokens.span", ["[-0.5, 1.0]"]),
    "half a token": (
        {"tokens": {"first": 2.5}},
        {},
        "objective.tokens.first",
        ["2.5", "a fraction below 1", "set objective.tokens.first = 2"],
    ),
    "first and span": (
        {"tokens": {"first": 5, "span": [0.0, 0.5]}},
        {},
        "objective.tokens",
        ["first = 5 and span = [0.0, 0.5]", "one of them", "drop one"],
    ),
}


@pytest.mark.parametrize("name", DISTILL)
def test_what_cannot_work_in_distill(name: str) -> None:
    objective, sections, where, fragments = DISTILL[name]
    with pytest.raises(ConfigError) as error:
        check(objective, **sections)
    assert error.value.where == where
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)
    assert error.value.remedy


@pytest.mark.parametrize(
    ("objective", "where", "fragments"),
    [
        ({"reward_coef": 0}, "objective.reward_coef", ["above 0 for rl", "or use `distill`"]),
        ({"control": "shuffled_teacher"}, "objective.control", ['"none" for rl', "use `distill`"]),
        ({"anchor_coef": 0.1}, "objective.anchor_coef", ["add [reference]"]),
    ],
)
def test_what_cannot_work_in_rl(objective: dict[str, Any], where: str, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check(objective, "rl", teacher=None, **REWARD)
    assert error.value.where == where
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)


@pytest.mark.parametrize(
    ("objective", "sections"),
    [
        ({}, {}),
        ({"estimator": "sampled", "baseline": True, "discount": 1.0, "signal_clip": 5.0}, {}),
        ({"divergence": "jsd", "beta": 0.1}, {}),
        ({"estimator": "full", "divergence": "entropy_gated", "anchor_coef": 0.1}, REFERENCE),
        ({"extrapolation": 1.25, "anchor_coef": 0.1, "signal_clip": 2.0, "discount": 0.5}, REFERENCE),
        ({"estimator": "full", "extrapolation": 0.5}, REFERENCE),
        ({"estimator": "topk", "topk_set": "union", "tail": "renormalize", "anchor_coef": 0.1}, REFERENCE),
        ({"estimator": "full", "loss": "ppo", "reward_coef": 0.5}, REWARD),  # it acts on the rewards
        ({"estimator": "topk", "max_importance_ratio": 2.0, "reward_coef": 0.5}, REWARD),
        ({"max_importance_ratio": 1.0, "importance_band": [0.0, 1.01]}, {}),
        ({"control": "fixed_negative"}, {}),
        ({"control": "fixed_negative"}, {"teacher": None}),
        ({"control": "shuffled_teacher", "loss": "cispo"}, {"sampling": {"group_size": 1, "groups_per_batch": 2}}),
        ({"tokens": {"first": 3, "half_life": 2.0, "mask_special": True}}, {}),
        ({"tokens": {"span": [0.9, 1.0]}, "reduction": "sequence_mean"}, {}),
    ],
)
def test_what_goes_together_passes(objective: dict[str, Any], sections: dict[str, Any]) -> None:
    check(objective, **sections)  # raises what it refuses
    first = DISTILL["greedy training"][1]
    with pytest.raises(ConfigError, match="temperature"):  # and it does look
        check(objective, **{**sections, **first})


def test_rl_may_have_an_anchor() -> None:
    check({"anchor_coef": 0.1, "normalize_rewards": True, "loss": "ppo"}, "rl", teacher=None, **REWARD, **REFERENCE)
    with pytest.raises(ConfigError, match="a use for it"):
        check({"normalize_rewards": True}, "rl", teacher=None, **REWARD, **REFERENCE)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", word_tokenizer(), context=32)
    save_model(folder / "short", word_tokenizer(), seed=1, context=9)
    save_model(folder / "chat", bpe_tokenizer(chat=True), context=64)
    write_rows(folder / "rows.jsonl", [{"prompt": "w1 w2 w3", "answer": "w1"}, {"prompt": "w1", "answer": "w1"}])
    return folder


def configured(models: Path, objective: Mapping[str, Any], reference: str | None = None, **sections: Any) -> RunConfig:
    config = tree(models / "student", models / "student", models / "rows.jsonl", models / "run", **sections)
    config["objective"] = dict(objective)
    if reference is not None:
        config["reference"] = {"model": str(models / reference)}
    return RunConfig.model_validate(config)


def test_the_reference_must_hold_the_longest_sequence(models: Path) -> None:
    """Three prompt tokens and a completion of six just fit in nine."""
    objective = {"anchor_coef": 0.1}
    check_run(configured(models, objective, "short"), "distill")
    longer = configured(models, objective, "short", sampling={"max_completion_tokens": 7})
    with pytest.raises(ConfigError, match=r"reference.model\n.*context of 9 tokens\n.*at least 10,[\s\S]*another ref"):
        check_run(longer, "distill")
    with pytest.raises(ConfigError, match=r"reference\.model"):
        check_run(longer.model_copy(update={"teacher": None}), "rl", grader=lambda *a: 0.0)


def test_the_reference_must_have_the_students_tokens(models: Path) -> None:
    with pytest.raises(ConfigError, match="tokens differ"):
        check_run(configured(models, {"anchor_coef": 0.1}, "chat"), "distill")


def test_a_missing_reference_is_named(models: Path) -> None:
    with pytest.raises(ConfigError, match=r"reference model .*nowhere"):
        check_run(configured(models, {"anchor_coef": 0.1}, "nowhere"), "distill")


def test_commands_without_a_use_for_the_reference_do_not_look_at_it(models: Path) -> None:
    config = configured(models, {}, "nowhere", prompts={"columns": {"completion": "answer"}})
    for method in ("sft", "generate"):
        assert check_run(config, method).vocab_size == len(WORDS)


def test_topk_may_be_the_vocabulary_and_no_more(models: Path) -> None:
    everything = {"estimator": "topk", "topk": len(WORDS)}
    check_run(configured(models, everything), "distill")
    one_more = {"estimator": "topk", "topk": len(WORDS) + 1}
    with pytest.raises(ConfigError, match=rf"objective.topk\n.*{len(WORDS) + 1}\n.*at most {len(WORDS)}[\s\S]*full"):
        check_run(configured(models, one_more), "distill")


def test_fixed_negative_needs_no_teacher(models: Path) -> None:
    config = configured(models, {"control": "fixed_negative"}).model_copy(update={"teacher": None})
    assert check_run(config, "distill").teachers == {}
    without = configured(models, {}).model_copy(update={"teacher": None})
    with pytest.raises(ConfigError, match=r"no \[teacher\]"):
        check_run(without, "distill")


# What is set, without what it belongs to.
IDLE: list[tuple[dict[str, Any], str]] = [
    ({"topk": 8}, 'estimator = "topk"'),
    ({"topk_set": "union"}, 'estimator = "topk"'),
    ({"tail": "renormalize", "estimator": "full"}, 'estimator = "topk"'),
    ({"beta": 0.9}, 'divergence = "jsd"'),
    ({"skew": 0.3, "divergence": "jsd"}, 'divergence = "skewed_kl" or "skewed_reverse_kl"'),
    ({"entropy_threshold": 2.0}, 'divergence = "entropy_gated"'),
    ({"clip_low": 0.1}, 'loss = "ppo" or "cispo"'),
    ({"clip_high": 0.3, "max_importance_ratio": 2.0}, 'loss = "ppo" or "cispo"'),
    ({"control_threshold": 0.2, "control": "shuffled_teacher"}, 'control = "fixed_negative"'),
    ({"normalize_rewards": True}, "reward_coef above 0"),
]


@pytest.mark.parametrize(("objective", "belongs_to"), IDLE, ids=lambda value: str(value))
def test_settings_without_effect(objective: dict[str, Any], belongs_to: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(objective)
    assert error.value.where == f"objective.{next(iter(objective))}"
    assert f"without {belongs_to}" in str(error.value)
    assert f"set objective.{belongs_to}, or drop {next(iter(objective))}" in str(error.value)


@pytest.mark.parametrize(
    "other",
    [{"tokens": {"span": [0.0, 0.5]}}, {"tokens": {"mask_special": True}}, {"reduction": "sequence_mean"}],
    ids=str,
)
def test_a_baseline_and_weights_that_depend_on_the_token(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"objective.baseline[\s\S]*would change the expected gradient"):
        check({"baseline": True, **other})
    check({"baseline": True, "tokens": {"first": 5, "half_life": 3.0}, "discount": 0.5})


def test_full_divergences_go_with_any_policy_loss_on_rewards() -> None:
    check({"estimator": "full", "divergence": "jsd", "loss": "ppo", "reward_coef": 1.0}, **REWARD)


def test_rl_has_no_use_for_extrapolation() -> None:
    with pytest.raises(ConfigError, match=r"reference[\s\S]*set objective.anchor_coef, or drop"):
        check({"extrapolation": 1.5}, "rl", teacher=None, **REWARD, **REFERENCE)

"""Formulas against torch's FLOP counter on real models, and against published parameter counts.

Eager attention multiplies whole matrices, masked pairs included, and the counter sees them all. Each comparison says
how many pairs that are, and takes the place of the visible ones; everything else must be equal to the last FLOP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from understudy import flops
from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import _recompute_layers
from understudy.backends.local import LocalSampler, LocalTeacher, LocalTrainer
from understudy.batching import micro_batches
from understudy.config import OptimConfig, SamplingConfig
from understudy.costs import CountedModel
from understudy.flops import (
    ALL_WEIGHTS,
    DENSE_FAMILIES,
    EXPERT_FAMILIES,
    KNOWN_SHAPES,
    Flops,
    ModelShape,
    Update,
    adapter_weights,
    attention_flops,
    backpropagated,
    forward,
    shape_of_config,
    visible_pairs,
)
from understudy.objectives import CrossEntropy, FullDivergence, Mixture
from understudy.types import Prompt, TokenSequence, TrainingExample

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 120,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_QWEN_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_EXTRA: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _QWEN_EXPERTS,
    "qwen2_moe": {**_QWEN_EXPERTS, "shared_expert_intermediate_size": 48, "mlp_only_layers": [1]},
    "gemma2": {"sliding_window": 7},
}
PROMPT, LENGTH, GROUP = 12, 9, 3
FULL = PROMPT + LENGTH


def model_of(family: str, **sizes: Any) -> tuple[Any, ModelShape]:
    config = CONFIG_MAPPING[family](**{**_SIZES, **_EXTRA.get(family, {}), **sizes})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # others multiply with idle experts, or by kernels that are not counted
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_of_config(config)
    assert shape is not None
    return model, shape


def counted(work: Callable[[], object]) -> float:
    """FLOPs that torch's counter sees, and those of the products in place that it has no formula for."""

    def in_place(total: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        work()
    return counter.get_total_flops()


def with_pairs(found: Flops, shape: ModelShape, pairs: int, times: int = 1) -> float:
    """With ``pairs`` a layer instead of the visible ones."""
    return found.layers + found.head + times * attention_flops(shape, shape.layers * pairs)


def sequences() -> list[TokenSequence]:
    prompt = list(range(1, PROMPT + 1))
    return [TokenSequence(prompt, list(range(3 + i, 3 + i + LENGTH))) for i in range(GROUP)]


def examples() -> list[TrainingExample]:
    return [TrainingExample(s.prompt_ids, s.completion_ids, [True] * LENGTH) for s in sequences()]


SHARED_PAIRS = PROMPT**2 + GROUP * (LENGTH - 1) * (PROMPT + LENGTH - 1)
PADDED_PAIRS = GROUP * FULL**2


# Shapes


@pytest.mark.parametrize("family", sorted(DENSE_FAMILIES | EXPERT_FAMILIES))
def test_shapes_have_the_weights_that_transformers_builds(family: str) -> None:
    config = CONFIG_MAPPING[family](**{**_SIZES, **_EXTRA.get(family, {})})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of_config(config)
    assert shape is not None
    assert shape.parameters == sum(p.numel() for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [  # total parameters: safetensors' metadata and model cards on the hub; active ones in words there
        ("Qwen/Qwen3-0.6B", 596_049_920, None),
        ("Qwen/Qwen3-1.7B", 1_720_574_976, None),
        ("Qwen/Qwen3-4B", 4_022_468_096, None),
        ("Qwen/Qwen3-8B", 8_190_735_360, None),
        ("Qwen/Qwen3-8B-Base", 8_190_735_360, None),
        ("Qwen/Qwen3-14B", 14_768_307_200, None),
        ("Qwen/Qwen3-32B", 32_762_123_264, None),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624, 3.3e9),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507", 235_093_634_560, 22e9),
    ],
)
def test_known_shapes_have_the_published_parameters(name: str, total: int, active: float | None) -> None:
    shape = KNOWN_SHAPES[name]
    # Norms: two of `hidden` and two of `head_dim` a layer, one of `hidden` at the end.
    norms = shape.layers * 2 * (shape.hidden + shape.head_dim) + shape.hidden
    assert shape.parameters + norms == total
    if active:  # the embedding counts there
        embedding = 0 if shape.tied else shape.head_weights
        assert shape.active_weights + embedding == pytest.approx(active, rel=0.02)
    else:
        assert shape.idle_weights == 0


def test_known_shapes_are_what_transformers_makes_of_their_sizes() -> None:
    for shape in KNOWN_SHAPES.values():
        config = CONFIG_MAPPING["qwen3_moe" if shape.experts else "qwen3"](
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate,
            vocab_size=shape.vocab,
            tie_word_embeddings=shape.tied,
            num_experts=shape.experts,
            num_experts_per_tok=shape.active_experts,
            moe_intermediate_size=shape.expert_intermediate,
        )
        assert shape_of_config(config) == shape


def test_other_architectures_have_no_shape() -> None:
    assert shape_of_config(CONFIG_MAPPING["lfm2"]()) is None
    assert shape_of_config(CONFIG_MAPPING["qwen3_next"]()) is None


def test_a_shape_by_hand() -> None:
    shape = ModelShape(hidden=4, layers=2, heads=2, kv_heads=1, head_dim=3, intermediate=5, vocab=7)
    attention = 4 * 6 + 4 * 3 + 4 * 3 + 6 * 4
    assert shape.layer_weights == 2 * (attention + 3 * 4 * 5)
    assert shape.head_weights == 28
    assert shape.active_weights == shape.layer_weights + 28
    assert shape.parameters == shape.layer_weights + 2 * 28
    assert dataclasses.replace(shape, tied=True).parameters == shape.active_weights
    assert shape.cache_numbers(10) == 2 * 2 * 3 * 10
    sliding = dataclasses.replace(shape, sliding_window=4, sliding_layers=1)
    assert sliding.cache_numbers(10) == 2 * 3 * (10 + 4)
    found = forward(shape, 2, 4, 1)  # the third token sees three, the fourth sees four
    assert found == Flops(2 * 2 * shape.layer_weights, 2 * 4 * 6 * 7, 56)
    assert forward(sliding, 0, 6, 0).attention == 4 * 6 * (21 + 1 + 2 + 3 + 4 + 4 + 4)


@pytest.mark.parametrize("window", [0, 1, 3, 50])
def test_visible_pairs(window: int) -> None:
    for start, stop in ((0, 0), (0, 1), (0, 9), (2, 3), (2, 9), (5, 20)):
        by_hand = sum(min(i + 1, window or i + 1) for i in range(start, stop))
        assert visible_pairs(start, stop, window) == by_hand


# Against the counter

MODELS = ["qwen3", "llama", "gemma2", "qwen3_moe", "qwen2_moe", "mixtral"]


@pytest.mark.parametrize("family", MODELS)
def test_a_forward_and_a_backward_pass(family: str) -> None:
    model, shape = model_of(family)
    ids = torch.randint(1, 100, (GROUP, FULL))
    once = forward(shape, 0, FULL, FULL) * GROUP
    assert counted(lambda: model(ids, use_cache=False)) == with_pairs(once, shape, PADDED_PAIRS)
    loss = model(ids, use_cache=False).logits.sum()
    both = backpropagated(shape, once, ALL_WEIGHTS)
    assert counted(loss.backward) == with_pairs(both, shape, PADDED_PAIRS, 3) - with_pairs(once, shape, PADDED_PAIRS)


def test_a_step_of_generation_over_a_cache() -> None:
    """Nothing is masked: the count is the counter's as it stands."""
    model, shape = model_of("qwen3")
    cache = model(torch.ones(2, PROMPT, dtype=torch.long), use_cache=True).past_key_values
    step = counted(lambda: model(torch.ones(2, 1, dtype=torch.long), past_key_values=cache, use_cache=True))
    assert step == (forward(shape, PROMPT, PROMPT + 1, 1) * 2).total


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe"])
def test_sampling(family: str) -> None:
    model, shape = model_of(family)
    sampler = LocalSampler(LanguageModel(model), stop_ids=frozenset())
    sampling = SamplingConfig(group_size=GROUP, max_completion_tokens=LENGTH)
    prompt = Prompt(index=0, prompt_ids=list(range(1, PROMPT + 1)), text="")
    sampler.sample([prompt], sampling, seed=0)  # measures the cache
    found = flops.sampling(shape, PROMPT, [LENGTH] * GROUP)
    # The prompt's pass is masked; a step multiplies what it sees.
    pairs = PROMPT**2 + GROUP * visible_pairs(PROMPT, FULL - 1)
    assert counted(lambda: sampler.sample([prompt], sampling, seed=0)) == with_pairs(found, shape, pairs)
    assert found.head == 2 * shape.head_weights * GROUP * LENGTH
    again = flops.sampling(shape, PROMPT, [LENGTH] * GROUP, shared=False)
    assert again.total - found.total == (GROUP - 1) * forward(shape, 0, PROMPT, 0).total


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe"])
def test_scoring(family: str) -> None:
    model, shape = model_of(family)
    teacher = LocalTeacher(LanguageModel(model))
    assert teacher.model.shares_prompts
    found = flops.scoring(shape, PROMPT, [LENGTH] * GROUP)
    expected = with_pairs(found, shape, SHARED_PAIRS)
    ledger = CountedModel(shape, shares_prompts=True, samples_shared=True)
    for kind, heads in (("sampled", 1), ("hidden", 1), ("topk", 2)):
        assert (
            counted(lambda kind=kind: teacher.score(sequences(), kind, topk=4)) == expected + (heads - 1) * found.head
        )
        assert ledger.scoring(sequences(), kind) == found.total + (heads - 1) * found.head
    alone = flops.scoring(shape, PROMPT, [LENGTH])
    apart = flops.scoring(shape, PROMPT, [LENGTH] * GROUP, shared=False)
    assert counted(lambda: teacher.score(sequences()[:1], "sampled")) == with_pairs(
        flops.scoring(shape, PROMPT, [LENGTH], shared=False), shape, FULL**2
    )
    assert apart.layers == GROUP * (alone.layers + 2 * shape.layer_weights)  # the last token goes in
    unshared = CountedModel(shape, shares_prompts=False, samples_shared=True)
    assert unshared.scoring(sequences(), "sampled") == apart.total


def trained(model: Any, objective: Any, *, shared: bool, batch: Any = None) -> float:
    [own] = [batch] if batch else micro_batches(examples(), micro_batch_tokens=999, share_prompts=shared)
    trainer = LocalTrainer(LanguageModel(model, share_prompts=shared), OptimConfig())
    return counted(lambda: trainer.forward_backward(own, objective))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe"])
def test_training(family: str, shared: bool) -> None:
    model, shape = model_of(family)
    found = flops.training(shape, PROMPT, [LENGTH] * GROUP, ALL_WEIGHTS, shared=shared)
    pairs = SHARED_PAIRS if shared else PADDED_PAIRS
    assert trained(model, CrossEntropy(), shared=shared) == with_pairs(found, shape, pairs, 3)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "qwen3_moe"])
def test_training_with_recomputed_layers(family: str) -> None:
    model, shape = model_of(family)
    _recompute_layers(model)
    found = flops.training(shape, PROMPT, [LENGTH] * GROUP, Update(recompute=True), shared=False)
    assert trained(model, CrossEntropy(), shared=False) == with_pairs(found, shape, PADDED_PAIRS, 4)


# peft asks transformers the old way
peft_warns = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@peft_warns
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("family", "targets", "untied"),
    [
        ("qwen3", "all-linear", True),
        ("llama", "all-linear", True),
        ("llama", ("gate_proj", "self_attn.q_proj", "k_proj", "v_proj", "lm_head"), True),
        ("gemma2", "all-linear", False),
        ("qwen3_moe", ATTENTION, True),
        ("qwen2_moe", "all-linear", True),
    ],
)
def test_training_adapters(family: str, targets: Any, untied: bool, recompute: bool) -> None:
    import peft

    model, shape = model_of(family, tie_word_embeddings=not untied)
    names = targets if isinstance(targets, str) else list(targets)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=names, task_type="CAUSAL_LM"))
    weights = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name and "lm_head" not in name)
    update = Update(rank=8, targets=targets, recompute=recompute)
    assert adapter_weights(shape, update) == weights
    if recompute:
        _recompute_layers(model)
    found = flops.training(shape, PROMPT, [LENGTH] * GROUP, update, shared=False)
    expected = with_pairs(found, shape, PADDED_PAIRS, 4 if recompute else 3)
    if "lm_head" in targets:  # a product and its two gradients, once a pass
        expected += 3 * 2 * 8 * shape.head_weights
    assert trained(model, CrossEntropy(), shared=False) == expected


@peft_warns
def test_adapters_on_some_of_attention_are_counted_to_a_product_of_one_layer() -> None:
    """Without one on k, the first layer's keys need no gradient."""
    import peft

    model, shape = model_of("qwen3")
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    found = flops.training(shape, PROMPT, [LENGTH] * GROUP, Update(8, ("q_proj", "v_proj")), shared=False)
    too_much = with_pairs(found, shape, PADDED_PAIRS, 3) - trained(model, CrossEntropy(), shared=False)
    assert too_much == 2 * shape.heads * shape.head_dim * PADDED_PAIRS


def test_objectives_with_other_heads() -> None:
    model, shape = model_of("qwen3")
    other = LanguageModel(model_of("qwen3", hidden_size=32)[0])
    sequences = [dataclasses.replace(e, teacher_hidden=torch.randn(LENGTH, 32)) for e in examples()]
    [batch] = micro_batches(sequences, micro_batch_tokens=999)
    full = FullDivergence({"default": other.head})
    heads = {"one": (full, 0), "two": (Mixture([full, CrossEntropy()]), 3 * 2 * shape.head_weights * GROUP * LENGTH)}
    plain = flops.training(shape, PROMPT, [LENGTH] * GROUP, ALL_WEIGHTS, shared=False)
    teacher = 2 * 32 * shape.vocab * GROUP * LENGTH
    ledger = CountedModel(shape, shares_prompts=False, samples_shared=True)
    for objective, more in heads.values():
        expected = with_pairs(plain, shape, PADDED_PAIRS, 3) + teacher + more
        assert trained(model, objective, shared=False, batch=batch) == expected
        assert ledger.training(batch, objective) == plain.total + teacher + more


# Batches


def work_of(lengths: Sequence[tuple[int, int]], **options: Any) -> float:
    """What the ledger counts for one batch of sequences of these (prompt, completion) lengths."""
    shape = ModelShape(hidden=4, layers=2, heads=2, kv_heads=1, head_dim=3, intermediate=5, vocab=7)
    rows = [TrainingExample([5] * p, [1] * c, [True] * c) for p, c in lengths]
    ledger = CountedModel(shape, shares_prompts=True, samples_shared=True)
    batches = micro_batches(rows, micro_batch_tokens=999, **options)
    return sum(ledger.training(batch, CrossEntropy()) for batch in batches)


def test_batches_count_their_sequences_without_padding() -> None:
    shape = ModelShape(hidden=4, layers=2, heads=2, kv_heads=1, head_dim=3, intermediate=5, vocab=7)
    ragged = [(3, 2), (1, 7), (6, 1)]
    apart = sum(flops.training(shape, p, [c], ALL_WEIGHTS, shared=False).total for p, c in ragged)
    assert work_of(ragged) == apart
    assert work_of(ragged, packing=True) == apart
    groups = [(9, 1), (9, 4), (9, 6), (7, 2), (7, 2)]
    together = (
        flops.training(shape, 9, [1, 4, 6], ALL_WEIGHTS).total + flops.training(shape, 7, [2, 2], ALL_WEIGHTS).total
    )
    assert work_of(groups, share_prompts=True) == together


# By hand


def test_an_update_of_all_weights_takes_three_forward_passes() -> None:
    shape = KNOWN_SHAPES["Qwen/Qwen3-8B"]
    once = flops.scoring(shape, 100, [1000] * 4)
    assert flops.training(shape, 100, [1000] * 4, ALL_WEIGHTS).total == 3 * once.total
    # Attention over a thousand tokens is a few per cent; the convention counts the head at the prompt too.
    assert 0.01 < once.attention / once.total < 0.05
    assert once.total == pytest.approx(2 * shape.active_weights * 4100, rel=0.05)


def test_frozen_weights_take_two_thirds() -> None:
    shape = KNOWN_SHAPES["Qwen/Qwen3-8B"]
    full, adapters = (flops.training(shape, 100, [1000], Update(rank=rank)).total for rank in (0, 32))
    assert adapters / full == pytest.approx(2 / 3, abs=0.03)

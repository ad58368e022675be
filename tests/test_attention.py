"""bfloat16 attention on CPUs: as accurate as transformers' eager attention, on every kind of mask, with gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from tiny import relative_error, tiny_model
from understudy.backends import attention as module
from understudy.backends.attention import NAME, attention, use_matmul_attention

BFLOAT16 = torch.bfloat16
# (rows, heads, key heads, queries, keys, width)
SHAPES = {
    "grouped": (2, 4, 2, 33, 33, 64),
    "one key head": (1, 6, 1, 64, 64, 80),
    "a key head each": (3, 3, 3, 17, 17, 128),
    "decoding": (4, 4, 2, 1, 90, 64),
    "continuing": (2, 4, 2, 20, 55, 64),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = BFLOAT16, seed: int = 0) -> list[Tensor]:
    """Query, key, value; queries are wide, so that attention is far from even."""
    rows, heads, groups, queries, keys, width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, queries, 2.0), (groups, keys, 1.0), (groups, keys, 1.0))
    return [
        (scale * torch.randn(rows, h, n, width, generator=generator)).to(dtype).requires_grad_()
        for h, n, scale in sizes
    ]


def causal(shape: tuple[int, ...]) -> Tensor:
    """[B, 1, L, T]: the queries are the last ones."""
    rows, _, _, queries, keys, _ = shape
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(rows, 1, -1, -1)


def left_padded(shape: tuple[int, ...]) -> Tensor:
    """Row i has 3 i tokens of padding, which see nothing and are not seen."""
    visible = torch.arange(shape[4]) >= 3 * torch.arange(shape[0])[:, None]
    return causal(shape) & visible[:, None, None]


def module_of(shape: tuple[int, ...]) -> Any:
    return SimpleNamespace(num_key_value_groups=shape[1] // shape[2], is_causal=True, training=False)


def ours(shape: tuple[int, ...], *tensors: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    output, weights = attention(module_of(shape), *tensors, mask, scaling=shape[5] ** -0.5, dropout=0.0, **options)
    assert weights is None
    return output


def eager(shape: tuple[int, ...], *tensors: Tensor, mask: Tensor) -> Tensor:
    added = torch.zeros(mask.shape, dtype=tensors[0].dtype).masked_fill(~mask, torch.finfo(tensors[0].dtype).min)
    return eager_attention_forward(module_of(shape), *tensors, added, scaling=shape[5] ** -0.5, dropout=0.0)[0]


def exact(shape: tuple[int, ...], *tensors: Tensor, mask: Tensor) -> Tensor:
    """transformers' function in float32."""
    return sdpa_attention_forward(
        module_of(shape), *(x.float() for x in tensors), mask, scaling=shape[5] ** -0.5, dropout=0.0
    )[0]


def errors(shape: tuple[int, ...], function: Callable[..., Tensor], mask: Tensor | None, seen: Tensor) -> list[float]:
    """Relative errors of the output and of the gradients of query, key and value, where queries see something."""
    weights = torch.randn(shape[0], shape[3], shape[1], shape[5], generator=torch.Generator().manual_seed(9))
    weights = weights * seen.any(-1).transpose(1, 2)[..., None]
    results = []
    for call, own in ((exact, seen), (function, mask)):
        tensors = inputs(shape)
        output = call(shape, *tensors, mask=own)
        assert output.shape == weights.shape
        (output.float() * weights).sum().backward()
        gradients = [x.grad for x in tensors if x.grad is not None]
        results.append([output.detach().float() * (weights != 0), *(g.float() for g in gradients)])
    return [relative_error(actual, expected) for expected, actual in zip(*results, strict=True)]


@pytest.mark.parametrize("masks", [causal, left_padded], ids=["causal", "left padding"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_errs_no_more_than_eager_attention(shape: tuple[int, ...], masks: Callable[..., Tensor]) -> None:
    seen = masks(shape)
    yardstick = errors(shape, eager, seen, seen)
    for error, theirs in zip(errors(shape, ours, seen, seen), yardstick, strict=True):
        assert error < 1.5 * theirs
        assert error < 0.02


@pytest.mark.parametrize("name", SHAPES)
def test_without_a_mask_it_is_causal(name: str) -> None:
    """The queries are the last ones: a single one sees every key."""
    shape = SHAPES[name]
    tensors = inputs(shape)
    masked = ours(shape, *tensors, mask=causal(shape))
    assert torch.equal(ours(shape, *tensors, mask=None), masked)
    assert torch.equal(ours(shape, *tensors, mask=None, is_causal=True), masked)
    whole = torch.ones_like(causal(shape))
    assert torch.equal(ours(shape, *tensors, mask=None, is_causal=False), ours(shape, *tensors, mask=whole))
    assert torch.equal(ours(shape, *tensors, mask=None), masked)


@pytest.mark.parametrize("name", ["grouped", "one key head", "continuing"])
def test_long_causal_sequences_are_cut_into_blocks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of 16 queries, the last one shorter; each sees no key behind it."""
    shape, widths = SHAPES[name], []
    seen, products = causal(shape), module._two_products
    monkeypatch.setattr(module, "_two_products", lambda *a: (widths.append(a[1].shape[2]), products(*a))[1])
    whole = errors(shape, ours, seen, seen)
    monkeypatch.setattr(module, "_BLOCK", 16)
    widths.clear()
    for error, before in zip(errors(shape, ours, None, seen), whole, strict=True):
        assert error < 1.2 * before
    queries, keys = shape[3:5]
    assert widths == [keys - queries + min(end, queries) for end in range(16, queries + 16, 16)]


@pytest.mark.parametrize("name", ["grouped", "continuing"])
def test_large_causal_inputs_need_no_mask(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Without gradients the scores of one block count; with them half of all."""
    shape, calls = SHAPES[name], []
    flash = module._flash
    monkeypatch.setattr(module, "_flash", lambda *a: (calls.append(a[5]), flash(*a))[1])
    monkeypatch.setattr(module, "_BLOCK", 8)
    rows, heads, _, queries, keys, _ = shape
    monkeypatch.setattr(module, "_MAX_SCORES", rows * heads * queries * keys // 2 - 1)
    seen = causal(shape)
    assert max(errors(shape, ours, None, seen)) < 2.0**-7
    assert calls == [True]
    with torch.no_grad():
        ours(shape, *inputs(shape), mask=None)
    assert calls == [True]
    monkeypatch.setattr(module, "_MAX_SCORES", rows * heads * queries * keys * 8 // queries - 1)
    with torch.no_grad():
        ours(shape, *inputs(shape), mask=None)
    assert calls == [True, True]


def test_masks_that_are_added() -> None:
    shape = SHAPES["grouped"]
    tensors, seen = inputs(shape), left_padded(SHAPES["grouped"])
    added = torch.zeros(seen.shape, dtype=BFLOAT16).masked_fill(~seen, torch.finfo(BFLOAT16).min)
    some = seen.any(-1).transpose(1, 2)[..., None]
    torch.testing.assert_close(
        ours(shape, *tensors, mask=added) * some, ours(shape, *tensors, mask=seen) * some, rtol=0, atol=1e-2
    )


def test_queries_that_see_nothing_stay_finite() -> None:
    """And what they hold reaches nobody's gradient but their own."""
    shape = SHAPES["a key head each"]
    tensors, seen = inputs(shape), left_padded(shape)
    assert not bool(seen.any(-1).all())
    output = ours(shape, *tensors, mask=seen)
    assert bool(output.isfinite().all())
    (output.float() * seen.any(-1).transpose(1, 2)[..., None]).sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None
        assert bool(tensor.grad.isfinite().all())
    blind = ~seen.any(-1)[:, 0]  # [B, L]
    for tensor in tensors:
        assert tensor.grad is not None
        assert torch.count_nonzero(tensor.grad.transpose(1, 2)[blind]) == 0


def test_arguments_are_left_as_they_are() -> None:
    shape = SHAPES["grouped"]
    tensors, mask = inputs(shape), left_padded(shape)
    before = [x.detach().clone() for x in (*tensors, mask)]
    ours(shape, *tensors, mask=mask)
    assert all(map(torch.equal, before, (*tensors, mask)))


class Calls:
    """Counts what reaches transformers' own function, and with which dtype."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dtypes: list[torch.dtype] = []
        monkeypatch.setattr("transformers.integrations.sdpa_attention.sdpa_attention_forward", self)

    def __call__(self, module: Any, query: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, None]:
        self.dtypes.append(query.dtype)
        return sdpa_attention_forward(module, query, *arguments, **options)


@pytest.mark.parametrize("masks", [causal, left_padded], ids=["causal", "left padding"])
def test_large_inputs_go_through_float32(monkeypatch: pytest.MonkeyPatch, masks: Callable[..., Tensor]) -> None:
    shape, seen = SHAPES["grouped"], masks(SHAPES["grouped"])
    calls: list[torch.dtype] = []
    flash = module._flash
    monkeypatch.setattr(module, "_flash", lambda *a: (calls.append(a[0].dtype), flash(*a))[1])
    scores = 2 * 4 * 33 * 33
    monkeypatch.setattr(module, "_MAX_SCORES", scores)
    errors(shape, ours, seen, seen)
    assert calls == []
    monkeypatch.setattr(module, "_MAX_SCORES", scores - 1)
    large = errors(shape, ours, seen, seen)
    assert calls == [BFLOAT16]
    assert large[0] < 2.0**-8  # one rounding of the output
    assert max(large) < 2.0**-7
    output = ours(shape, *inputs(shape), mask=seen)
    assert output.dtype == BFLOAT16
    added = torch.zeros(seen.shape, dtype=BFLOAT16).masked_fill(~seen, torch.finfo(BFLOAT16).min)
    some = seen.any(-1).transpose(1, 2)[..., None]
    assert torch.equal(ours(shape, *inputs(shape), mask=added) * some, output * some)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_dtypes_are_passed_through(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    shape = SHAPES["grouped"]
    calls = Calls(monkeypatch)
    tensors, mask = inputs(shape, dtype), causal(shape)
    output = ours(shape, *tensors, mask=mask)
    assert calls.dtypes == [dtype]
    expected, _ = sdpa_attention_forward(module_of(shape), *tensors, mask, scaling=shape[5] ** -0.5, dropout=0.0)
    assert torch.equal(output, expected)


def test_dropout_and_position_biases_are_passed_through(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["grouped"]
    calls = Calls(monkeypatch)
    bias = torch.zeros(1, 4, 33, 33, dtype=BFLOAT16)
    attention(module_of(shape), *inputs(shape), None, position_bias=bias)
    attention(module_of(shape), *inputs(shape), None, dropout=0.5)
    assert calls.dtypes == [BFLOAT16] * 2


def test_under_autocast_float32_becomes_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, calls = SHAPES["grouped"], Calls(monkeypatch)
    tensors = [x.detach().float().requires_grad_() for x in inputs(shape)]
    with torch.autocast("cpu", BFLOAT16):
        output = ours(shape, *tensors, mask=None)
    assert calls.dtypes == []
    assert output.dtype == BFLOAT16
    assert relative_error(output.detach().float(), ours(shape, *inputs(shape), mask=None).detach().float()) < 2.0**-7
    output.float().sum().backward()
    assert {x.grad.dtype for x in tensors if x.grad is not None} == {torch.float32}


def cpu_with(monkeypatch: pytest.MonkeyPatch, *, bf16: bool, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


@pytest.mark.parametrize(
    ("bf16", "amx", "switched"), [(True, False, True), (True, True, False), (False, False, False), (False, True, False)]
)
def test_only_where_flash_attention_is_slow(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, amx: bool, switched: bool
) -> None:
    cpu_with(monkeypatch, bf16=bf16, amx=amx)
    model = tiny_model("qwen3")
    assert model.config._attn_implementation == "sdpa"
    use_matmul_attention(model)
    assert model.config._attn_implementation == (NAME if switched else "sdpa")


def test_eager_models_stay_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft-capped scores are no matter for two plain products."""
    cpu_with(monkeypatch, bf16=True, amx=False)
    for dtype in (torch.float32, torch.float64):
        model = tiny_model("gemma2", dtype=dtype)
        before = model.config._attn_implementation
        assert before.startswith("eager")
        use_matmul_attention(model)
        assert model.config._attn_implementation == before


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3_text", "cohere", "lfm2"])
def test_a_whole_model(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    """Sliding windows, padding and a cache: float32 is bit for bit transformers', bfloat16 as close to it as theirs."""
    cpu_with(monkeypatch, bf16=True, amx=False)
    ids = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5, 1], [5, 4, 3, 2, 1, 5, 0, 3, 2]])
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])

    def run(dtype: torch.dtype, *, switched: bool) -> Tensor:
        model = tiny_model(architecture, seed=5, dtype=torch.float32, std=0.2).to(dtype)
        if switched:
            use_matmul_attention(model)
            assert model.config._attn_implementation == NAME
        with torch.no_grad():
            first = model(input_ids=ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
            second = model(input_ids=ids[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
        return torch.cat([first.logits[:, 3:], second.logits], 1).float()

    calls: list[torch.dtype] = []
    monkeypatch.setattr(
        module, "attention", lambda m, query, *a, **k: (calls.append(query.dtype), attention(m, query, *a, **k))[1]
    )
    plain = run(torch.float32, switched=False)
    assert torch.equal(run(torch.float32, switched=True), plain)
    theirs = relative_error(run(BFLOAT16, switched=False), plain)
    assert relative_error(run(BFLOAT16, switched=True), plain) < max(2 * theirs, 0.02)
    assert set(calls) == {torch.float32, BFLOAT16}


def test_the_name_is_not_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It means nothing to anyone who loads the weights elsewhere."""
    cpu_with(monkeypatch, bf16=True, amx=False)
    model = tiny_model("qwen3", dtype=torch.float32)
    model.save_pretrained(tmp_path / "before")
    use_matmul_attention(model)
    model.save_pretrained(tmp_path / "after")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "after"))
    assert after == before
    assert NAME not in (tmp_path / "after" / "config.json").read_text()

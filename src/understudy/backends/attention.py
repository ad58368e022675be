"""bfloat16 attention for CPUs whose flash kernel has no matrix unit (AMX) to run on.

There torch's kernel falls back to slow arithmetic: two plain matrix products are two to eight times faster on
sequences of usual length. Scores are rounded to bfloat16 before the softmax, as in transformers' eager attention.

Not in decoding: there a key is longer at every step, and products of a new shape have new code generated for them,
half a megabyte each. ``cache.new_cache`` keeps keys and values in float32 for it, whose flash kernel takes any length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

NAME = "understudy_cpu"
# Scores at a time. Beyond it they leave the caches (and autograd would keep them all): float32 flash attention then.
_MAX_SCORES = 2**24
# Queries at a time where they see no later keys: half of the scores of a long sequence need not be computed.
_BLOCK = 512


def use_matmul_attention(model: Any) -> None:
    """Switch a transformers model that runs on a CPU to this module's attention, where that is the faster one."""
    slow_flash = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    if slow_flash and model.config._attn_implementation == "sdpa":
        _register()
        model.set_attn_implementation(NAME)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, heads, L, D], key and value [B, groups, T, D] -> [B, L, heads, D].

    Anything but bfloat16 goes to transformers' own function.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    plain = not options.get("dropout") and options.get("position_bias") is None
    if dtype != torch.bfloat16 or not plain:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    with torch.autocast("cpu", enabled=False):
        scale = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        causal = mask is None and query.shape[2] > 1 and _is_causal(module, options)
        cached = query.dtype == dtype and key.dtype == torch.float32
        if cached or _scores(query, key, causal) > _MAX_SCORES:
            return _flash(query, key, value, mask, scale, causal).to(dtype), None
        query, key, value = (x.to(dtype) for x in (query * scale, key, value))
        return _causal_blocks(query, key, value) if causal else _two_products(query, key, value, mask), None


def _scores(query: Tensor, key: Tensor, causal: bool) -> int:
    """How many there will be at a time: all that autograd keeps, otherwise those of a block."""
    rows, heads, length, _ = query.shape
    total = rows * heads * length * key.shape[2]
    if not causal:
        return total
    return total // 2 if torch.is_grad_enabled() else total * min(_BLOCK, length) // length


def _is_causal(module: Any, options: Mapping[str, Any]) -> bool:
    causal = options.get("is_causal")
    return getattr(module, "is_causal", True) if causal is None else causal


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """torch's kernel in float32."""
    mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    if causal and query.shape[2] != key.shape[2]:  # its own causal mask begins at the first key
        mask, causal = _causal_mask(query.shape[2], key.shape[2], query.device), False
    wide = query.float(), key.float(), value.float()
    output = torch.nn.functional.scaled_dot_product_attention(
        *wide, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )
    return output.transpose(1, 2)


def _causal_mask(length: int, total: int, device: torch.device) -> Tensor:
    """What the last ``length`` of ``total`` positions see."""
    return torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)


def _causal_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Queries block by block, each with the keys up to its end."""
    length, before = query.shape[2], key.shape[2] - query.shape[2]
    outputs = []
    for start in range(0, length, _BLOCK):
        block = query[:, :, start : start + _BLOCK]
        seen = before + start + block.shape[2]
        mask = _causal_mask(block.shape[2], seen, query.device)
        outputs.append(_two_products(block, key[:, :, :seen], value[:, :, :seen], mask))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _two_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Heads that share a key and value are rows of one product."""
    (rows, heads, length, width), groups = query.shape, key.shape[1]
    scores = query.reshape(rows, groups, -1, width) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.view(rows, groups, heads // groups, length, -1)
        visible = mask[:, :, None] if mask.dim() == 4 else mask
        # Not -inf: a padding position sees nothing, and must not become NaN.
        hidden = torch.finfo(scores.dtype).min
        scores = scores.masked_fill_(~visible, hidden) if visible.dtype == torch.bool else scores.add_(visible)
        scores = scores.view(rows, groups, -1, scores.shape[-1])
    return (torch.softmax(scores, dim=-1) @ value).view(rows, heads, length, width).transpose(1, 2)

"""Key-value caches whose rows can be chosen: what sharing a prompt and dropping finished rows need."""

from __future__ import annotations

import copy
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from understudy.backends import attention


def new_cache(config: Any, *, in_place: bool = False) -> Any:
    """An empty cache for a model of this configuration, or None where some layer keeps a state that ``select_rows``
    cannot choose from: convolutions, linear attention.

    ``in_place``: tokens are written into room that was made for them, without gradients. Otherwise every step copies
    the whole cache: as many bytes again as attention reads.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=config.get_text_config(decoder=True))
    if not cache.layers or not {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    if in_place:
        widen = config._attn_implementation == attention.NAME
        whole: list[Any] = [layer for layer in cache.layers if type(layer) is DynamicLayer]
        for layer in whole:
            layer.update = partial(_update_in_place, layer, widen, [])
    return cache


def _update_in_place(
    layer: Any, widen: bool, room: list[Tensor], keys: Tensor, values: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """``DynamicLayer.update``, where the layer's states are views of ``room``. ``widen``: bfloat16 is kept in float32,
    see ``attention``."""
    if widen and keys.dtype == torch.bfloat16:
        keys, values = keys.float(), values.float()
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys[:, :, :0], values[:, :, :0]
    used = layer.keys.shape[2]
    total = used + keys.shape[2]
    # Anew when it is full, and when rows have been chosen.
    if not room or room[0].shape[2] < total or layer.keys.data_ptr() != room[0].data_ptr():
        size = total + max(64, total // 4)
        room[:] = [x.new_empty(*x.shape[:2], size, x.shape[3]) for x in (keys, values)]
        room[0][:, :, :used], room[1][:, :, :used] = layer.keys, layer.values
    room[0][:, :, used:total], room[1][:, :, used:total] = keys, values
    layer.keys, layer.values = (x[:, :, :total] for x in room)
    return layer.keys, layer.values


def select_rows(cache: Any, rows: Tensor) -> None:
    """Row i of the cache becomes what row ``rows[i]`` was; gradients pass."""
    for layer in cache.layers:
        if layer.get_seq_length():
            layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)


def chosen_rows(cache: Any, rows: Tensor) -> Any:
    """A cache of its own whose row i is row ``rows[i]``; gradients pass."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    select_rows(chosen, rows)
    return chosen


def cache_bytes(cache: Any) -> int:
    """Memory that a cache holds."""
    held = chain.from_iterable(vars(layer).values() for layer in cache.layers)
    # Hybrids keep their states in dictionaries.
    tensors = chain.from_iterable(x.values() if isinstance(x, dict) else [x] for x in held)
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))

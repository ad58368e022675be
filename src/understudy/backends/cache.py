"""Key-value caches whose rows can be chosen: what sharing a prompt and dropping finished rows need."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

from torch import Tensor


def new_cache(config: Any) -> Any:
    """An empty cache for a model of this configuration, or None where some layer keeps a state that ``select_rows``
    cannot choose from: convolutions, linear attention."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=config.get_text_config(decoder=True))
    known = {DynamicLayer, DynamicSlidingWindowLayer}
    return cache if cache.layers and {type(layer) for layer in cache.layers} <= known else None


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

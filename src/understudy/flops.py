"""FLOPs of matrix products, counted from a model's shape: no weights, no torch.

A multiply-add is two FLOPs. Counted: the weights a token is multiplied with (of experts the active ones, and the
router), the scores and sums of attention between each token and those it sees, and the LM head where it is applied.
A backward pass takes two more products for each of a forward pass: one for the gradient of its input, one for that of
its other factor. Frozen weights need only the first. Embeddings are looked up, and cost nothing. Norms, activations,
softmax and rotary embeddings are left out: no matrix products, and far below one per cent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Attention by q, k, v and o, and a gated MLP of three matrices, in every layer. tests/test_flops.py compares each with
# the weights of the model that transformers builds.
DENSE_FAMILIES = frozenset(
    {"cohere", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3"}
)
EXPERT_FAMILIES = frozenset({"mixtral", "qwen2_moe", "qwen3_moe"})
POST_NORM_FAMILIES = frozenset({"gemma2", "gemma3_text", "olmo2"})


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a transformer.

    ``intermediate``: width of the gated MLP in the ``dense_layers`` (None: in all). The other layers choose
    ``active_experts`` of ``experts``, each ``expert_intermediate`` wide, beside a shared one of ``shared_intermediate``
    (0: none). ``sliding_layers`` of the layers see the last ``sliding_window`` tokens only. ``post_norm``: a norm
    behind the MLP (see ``Update``).
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    dense_layers: int | None = None
    experts: int = 0
    active_experts: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    sliding_window: int = 0
    sliding_layers: int = 0
    post_norm: bool = False

    @property
    def expert_layers(self) -> int:
        """Layers with experts."""
        return 0 if self.dense_layers is None else self.layers - self.dense_layers

    @property
    def layer_weights(self) -> int:
        """Weights in the layers that one token is multiplied with."""
        return self._layer_weights(self.active_experts)

    @property
    def head_weights(self) -> int:
        """Weights of the LM head."""
        return self.hidden * self.vocab

    @property
    def active_weights(self) -> int:
        """The N of 2N: what one token is multiplied with, the head included."""
        return self.layer_weights + self.head_weights

    @property
    def parameters(self) -> int:
        """All weights but those of norms and biases (about 0.01% of a model's)."""
        return self._layer_weights(self.experts) + self.head_weights * (1 if self.tied else 2)

    @property
    def idle_weights(self) -> int:
        """Weights of the experts that a token is not sent to."""
        return self._layer_weights(self.experts) - self._layer_weights(self.active_experts)

    def _layer_weights(self, experts: int) -> int:
        linear = sum(inputs * outputs * count for _, inputs, outputs, count in self.linears())
        in_experts = 3 * experts * self.hidden * self.expert_intermediate
        return linear + self.expert_layers * (self.hidden * self.experts + in_experts)  # the router sees all

    def linears(self) -> Iterator[tuple[str, int, int, int]]:
        """(name, inputs, outputs, how many) of the linear layers that every token passes: not the head, not experts."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "q_proj", self.hidden, queries, self.layers
        yield "k_proj", self.hidden, keys, self.layers
        yield "v_proj", self.hidden, keys, self.layers
        yield "o_proj", queries, self.hidden, self.layers
        widths = [(self.intermediate, self.layers - self.expert_layers)]
        if self.shared_intermediate:
            widths.append((self.shared_intermediate, self.expert_layers))
            yield "shared_expert_gate", self.hidden, 1, self.expert_layers
        for width, count in widths:
            yield "gate_proj", self.hidden, width, count
            yield "up_proj", self.hidden, width, count
            yield "down_proj", width, self.hidden, count

    def cache_numbers(self, length: int) -> int:
        """Keys and values that a sequence of ``length`` tokens keeps."""
        window = min(length, self.sliding_window)
        tokens = (self.layers - self.sliding_layers) * length + self.sliding_layers * window
        return 2 * self.kv_heads * self.head_dim * tokens


def shape_of_config(config: Any) -> ModelShape | None:
    """A transformers configuration -> its shape; None for architectures that are not of ``DENSE_FAMILIES`` or
    ``EXPERT_FAMILIES`` (linear attention, state spaces, latent attention), whose products are others."""
    config = config.get_text_config()
    if config.model_type not in DENSE_FAMILIES | EXPERT_FAMILIES:
        return None
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    sliding = kinds.count("sliding_attention")
    return ModelShape(
        hidden=config.hidden_size,
        layers=layers,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        sliding_window=window if sliding else 0,
        sliding_layers=sliding,
        post_norm=config.model_type in POST_NORM_FAMILIES,
        **(_experts(config) if config.model_type in EXPERT_FAMILIES else {}),
    )


def _experts(config: Any) -> dict[str, int]:
    if config.model_type == "mixtral":
        count, width, dense = config.num_local_experts, config.intermediate_size, 0
    else:
        count, width = config.num_experts, config.moe_intermediate_size
        every, plain = config.decoder_sparse_step, set(config.mlp_only_layers or [])
        dense = sum(i in plain or (i + 1) % every != 0 for i in range(config.num_hidden_layers))
    return {
        "dense_layers": dense,
        "experts": count,
        "active_experts": config.num_experts_per_tok,
        "expert_intermediate": width,
        "shared_intermediate": getattr(config, "shared_expert_intermediate_size", None) or 0,
    }


@dataclass(frozen=True)
class Flops:
    """Matrix products by kind: with the layers' weights, between tokens in attention, with the LM head."""

    layers: float = 0.0
    attention: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        """Their sum."""
        return self.layers + self.attention + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.layers + other.layers, self.attention + other.attention, self.head + other.head)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.layers * factor, self.attention * factor, self.head * factor)


def visible_pairs(start: int, stop: int, window: int = 0) -> int:
    """(token, token it sees) among the tokens ``start`` to ``stop`` - 1 of a sequence: itself and all before, or the
    last ``window`` of them."""

    def before(n: int) -> int:
        full = min(n, window) if window else n
        return full * (full + 1) // 2 + (n - full) * window

    return before(stop) - before(start)


def forward(shape: ModelShape, start: int, stop: int, head_tokens: int) -> Flops:
    """Tokens ``start`` to ``stop`` - 1 of a sequence go through the layers (those before are in the cache),
    ``head_tokens`` of their hidden states through the head."""
    full = (shape.layers - shape.sliding_layers) * visible_pairs(start, stop)
    pairs = full + shape.sliding_layers * visible_pairs(start, stop, shape.sliding_window)
    return Flops(
        layers=2.0 * shape.layer_weights * (stop - start),
        attention=attention_flops(shape, pairs),
        head=2.0 * shape.head_weights * head_tokens,
    )


def attention_flops(shape: ModelShape, pairs: int) -> float:
    """A score and a weighted value for each of ``pairs`` (summed over layers) and head."""
    return 4.0 * shape.heads * shape.head_dim * pairs


def sampling(shape: ModelShape, prompt: int, completions: Sequence[int], *, shared: bool = True) -> Flops:
    """One prompt of ``prompt`` tokens and its completions of so many tokens each, written over a key-value cache. The
    prompt goes through the model once if ``shared``; a completion's last token does not go in."""
    first = forward(shape, 0, prompt, 0) * (1 if shared else len(completions))
    return sum((forward(shape, prompt, prompt + n - 1, n) for n in completions), first)


def scoring(shape: ModelShape, prompt: int, completions: Sequence[int], *, shared: bool = True) -> Flops:
    """Log-probabilities of a prompt's completions, in one pass over each; the head at completion tokens only. Behind a
    ``shared`` prompt that is what sampling takes."""
    if shared:
        return sampling(shape, prompt, completions)
    return sum((forward(shape, 0, prompt + n, n) for n in completions), Flops())


@dataclass(frozen=True)
class Update:
    """What trains. ``rank`` 0: all weights; else adapters of that rank on ``targets``, names of linear layers
    ("all-linear": all but the head and experts). ``recompute``: layers run a second time in the backward pass, up to
    the last value that torch keeps for it: a layer that ends in a dense MLP's last product does not repeat that."""

    rank: int = 0
    targets: str | tuple[str, ...] = "all-linear"
    recompute: bool = False

    def adapts(self, name: str) -> bool:
        """Whether the linear layer ``name`` has an adapter."""
        named = self.targets == "all-linear" or name in {target.rpartition(".")[2] for target in self.targets}
        return self.rank > 0 and (named if name != "lm_head" else "lm_head" in self.targets)


ALL_WEIGHTS = Update()


def adapter_weights(shape: ModelShape, update: Update) -> int:
    """Weights of the adapters in the layers."""
    sizes = ((inputs + outputs) * count for name, inputs, outputs, count in shape.linears() if update.adapts(name))
    return update.rank * sum(sizes)


def training(
    shape: ModelShape, prompt: int, completions: Sequence[int], update: Update, *, shared: bool = True
) -> Flops:
    """Forward and backward over a prompt's completions."""
    return backpropagated(shape, scoring(shape, prompt, completions, shared=shared), update)


def backpropagated(shape: ModelShape, once: Flops, update: Update) -> Flops:
    """A forward pass -> that pass with its backward pass, adapters included.

    Under adapters the embedding is frozen, so that the first layer's q, k and v pass no gradient on.
    """
    tokens = once.layers / (2 * shape.layer_weights)
    adapters = 2 * tokens * adapter_weights(shape, update)
    again = Flops()
    if update.recompute:
        last = 0 if shape.post_norm else (shape.layers - shape.expert_layers) * shape.hidden
        last *= update.rank if update.adapts("down_proj") else shape.intermediate
        again = Flops(once.layers + adapters - 2 * tokens * last, once.attention)
    if not update.rank:
        return once * 3 + again
    first = [name for name in ("q_proj", "k_proj", "v_proj") if update.adapts(name)]
    unneeded = (shape.heads + 2 * shape.kv_heads) * shape.head_dim + len(first) * update.rank
    layers = 2 * once.layers + 3 * adapters - 2 * tokens * shape.hidden * unneeded
    return Flops(layers, 3 * once.attention, once.head * (3 if update.adapts("lm_head") else 2)) + again


def _qwen3(
    hidden: int, layers: int, heads: int, intermediate: int, *, tied: bool = False, experts: int | None = None
) -> ModelShape:
    """``experts``: the width of each of 128, of which 8 are active."""
    if experts is None:
        return ModelShape(hidden, layers, heads, 8, 128, intermediate, 151_936, tied)
    return ModelShape(hidden, layers, heads, 4, 128, intermediate, 151_936, tied, 0, 128, 8, experts)


# From the models' public configurations. Base, Instruct and Thinking checkpoints of a size share its shape.
_SHAPES = {
    "0.6B": _qwen3(1024, 28, 16, 3072, tied=True),
    "1.7B": _qwen3(2048, 28, 16, 6144, tied=True),
    "4B": _qwen3(2560, 36, 32, 9728, tied=True),
    "8B": _qwen3(4096, 36, 32, 12288),
    "14B": _qwen3(5120, 40, 40, 17408),
    "32B": _qwen3(5120, 64, 64, 25600),
    "30B-A3B": _qwen3(2048, 48, 32, 6144, experts=768),
    "235B-A22B": _qwen3(4096, 94, 64, 12288, experts=1536),
}
_WITH_BASE = ("0.6B", "1.7B", "4B", "8B", "14B", "30B-A3B")
_WITH_2507 = ("4B", "30B-A3B", "235B-A22B")
KNOWN_SHAPES = (
    {f"Qwen/Qwen3-{size}": shape for size, shape in _SHAPES.items()}
    | {f"Qwen/Qwen3-{size}-Base": _SHAPES[size] for size in _WITH_BASE}
    | {f"Qwen/Qwen3-{size}-{kind}-2507": _SHAPES[size] for size in _WITH_2507 for kind in ("Instruct", "Thinking")}
)

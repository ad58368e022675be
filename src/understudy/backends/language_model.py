"""A causal language model as distillation needs it: hidden states first, then the head."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from understudy.backends.cache import cache_bytes, chosen_rows, new_cache
from understudy.batching import Layout, lay_out
from understudy.errors import ConfigError
from understudy.lm_head import LMHead
from understudy.types import Batch, TokenSequence

log = logging.getLogger("understudy")


class LanguageModel:
    """A causal language model split where distillation needs it: hidden states, then the head.

    ``vocab_size`` restricts the head to the ids every role knows (padding rows beyond them mean nothing).
    ``shares_prompts``: whether completions can continue the cache of one pass over their prompt, with gradients;
    ``share_prompts = False`` forbids it (a cache cannot be written twice by gradient checkpointing).
    """

    def __init__(self, model: nn.Module, *, vocab_size: int | None = None, share_prompts: bool = True) -> None:
        self.model: Any = model.eval()  # dropout off in every role: sampler and trainer must agree
        base = model.get_base_model() if hasattr(model, "peft_config") else model  # pyright: ignore[reportCallIssue]
        self._causal: Any = base
        self._body: Any = base.base_model  # pyright: ignore[reportAttributeAccessIssue]
        self._vocab_size = vocab_size
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = self._causal.get_output_embeddings().weight.dtype
        self._cache_sizes: tuple[int, int] | None = None
        _check_head(self)
        self.shares_prompts = share_prompts and _can_share_prompts(self)

    @property
    def dtype_name(self) -> str:
        """As configurations write it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def config(self) -> Any:
        """transformers' configuration."""
        return self._causal.config

    @property
    def head(self) -> LMHead:
        """The head over the live weights."""
        output = self._causal.get_output_embeddings()
        config = self._causal.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
        head = LMHead(_whole_weight(output), output.bias, getattr(config, "final_logit_softcapping", None), scale)
        return head if self._vocab_size is None else head.sliced(self._vocab_size)

    def hidden(self, input_ids: Tensor, **inputs: Any) -> Any:
        """The body's output for [B, L] ids: ``last_hidden_state`` [B, L, H] and, with a cache, ``past_key_values``."""
        return self._body(input_ids=input_ids, **inputs)

    def completion_hidden(self, inputs: Layout | Batch) -> Tensor:
        """The hidden states [N, H] at ``inputs.token_index``: those that predict the completions' tokens."""
        if inputs.shared is None:
            options = {} if inputs.position_ids is None else {"position_ids": inputs.position_ids}
            output = self.hidden(inputs.input_ids, use_cache=False, **options)
            return output.last_hidden_state.flatten(0, 1)[inputs.token_index]
        mask = inputs.shared.attention_mask
        ragged = not bool(mask.all())
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        options = {"attention_mask": mask, "position_ids": positions} if ragged else {}
        cache = new_cache(self.config)
        output = self.hidden(inputs.input_ids, use_cache=True, past_key_values=cache, **options)
        hidden = [output.last_hidden_state.flatten(0, 1)]
        for part in inputs.shared.continuations:
            if ragged:
                steps = torch.arange(1, part.input_ids.shape[1] + 1, device=self.device)
                seen = torch.cat([mask[part.rows], torch.ones_like(part.input_ids)], dim=1)
                options = {"attention_mask": seen, "position_ids": positions[part.rows, -1:] + steps}
            own = chosen_rows(cache, part.rows)
            output = self.hidden(part.input_ids, use_cache=True, past_key_values=own, **options)
            hidden.append(output.last_hidden_state.flatten(0, 1))
        return torch.cat(hidden)[inputs.token_index]

    def copy_in(self, dtype: torch.dtype) -> LanguageModel:
        """A frozen copy with parameters in another dtype. Buffers stay: rounded rotary frequencies are wrong ones."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return LanguageModel(model, vocab_size=self._vocab_size, share_prompts=self.shares_prompts)

    @torch.no_grad()
    def take_weights(self, source: LanguageModel) -> None:
        """Become what ``source``, of which this is a copy, is by now."""
        for own, other in zip(self.model.parameters(), source.model.parameters(), strict=True):
            own.copy_(other)

    @torch.no_grad()
    def decoding_bytes(self, length: int, *, truncated: bool = False) -> int:
        """Memory that a row of ``length`` tokens takes while it is sampled: its cache, a larger one while it grows
        or rows leave, and its logits; with top-p or top-k (``truncated``) these are sorted in float64."""
        if self._cache_sizes is None:
            ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
            one, two = (cache_bytes(self.hidden(ids[:, :n], use_cache=True).past_key_values) for n in (1, 2))
            self._cache_sizes = 2 * one - two, two - one
        fixed, per_token = self._cache_sizes
        return 5 * (fixed + per_token * length) // 2 + (64 if truncated else 8) * self.head.vocab_size

    @property
    def shape(self) -> tuple[int, ...]:
        """What makes two models the same architecture at the same size: the matrices' sizes, adapters left out."""
        return shape_of(self._causal)

    def matmul_parameters(self) -> tuple[int, int]:
        """(all, trainable) weights a token is multiplied with: no look-up embeddings, no biases, the head included."""
        embedding = self._causal.get_input_embeddings().weight
        head = self._causal.get_output_embeddings().weight
        matrices = [p for p in self._causal.parameters() if p.dim() > 1 and p is not embedding and p is not head]
        matrices.append(head)
        return sum(p.numel() for p in matrices), sum(p.numel() for p in matrices if p.requires_grad)


def _whole_weight(output: Any) -> Tensor:
    """The head's weight, with its adapters' contribution where it has adapters; gradients flow into both. Adapters are
    float32, and so is the sum: in bfloat16 a small contribution would round away."""
    if not hasattr(output, "lora_A") or output.merged or output.disable_adapters:
        return output.weight
    return output.weight + sum(output.get_delta_weight(name) for name in output.active_adapters)


def shape_of(model: nn.Module) -> tuple[int, ...]:
    return tuple(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "lora_" not in name)


@torch.no_grad()
def _check_head(model: LanguageModel) -> None:
    """Refuse architectures that do something to logits that ``LMHead`` does not know, instead of training on wrong
    ones."""
    ids = torch.arange(1, 5, device=model.device)[None]
    whole = model.model(input_ids=ids, use_cache=False).logits[0]
    width = model.head.vocab_size
    ours = model.head.logits(model.hidden(ids, use_cache=False).last_hidden_state[0])
    error = float((whole[:, :width].to(ours.dtype) - ours).abs().max())
    # Both passes compute the same hidden states, so that only the head's own roundings differ. In bfloat16 each is at
    # most 2**-9 of a logit, and scaling with soft-capping is half a dozen of them.
    tolerance = {torch.float32: 1e-3, torch.float64: 1e-6}.get(model.dtype, 0.03)
    if not error <= tolerance * float(ours.abs().max()):
        raise ConfigError(
            f"architecture {type(model.model).__name__}",
            got=f"logits that differ by {error:.3g} from the LM head applied to the last hidden state",
            expected="a linear head, with soft-capping or scaling at most",
            remedy="use another architecture, or open a feature request with the model's name",
        )


@torch.no_grad()
def _can_share_prompts(model: LanguageModel) -> bool:
    """Whether sequences behind a shared prompt are what they are one by one, prompts of two lengths included."""
    if new_cache(model.config) is None:
        return False
    width = model.head.vocab_size
    prompts = [[i % width for i in range(1, 7)], [i % width for i in range(9, 4, -1)]]
    sequences = [
        TokenSequence(prompt, [(first + i) % width for i in range(4)]) for prompt in prompts for first in (0, 3)
    ]
    apart, shared = (
        model.completion_hidden(lay_out(sequences, device=model.device, arrangement=arrangement)).double()
        for arrangement in ("padded", "shared")
    )
    return bool((apart - shared).norm() <= _tolerance(model) * apart.norm())


def _tolerance(model: LanguageModel) -> float:
    """Share of a hidden state that rounding may account for: it differs by a row's shape and adds up over layers. A
    leak between sequences moves hidden states by a share of themselves."""
    return {torch.float32: 1e-3, torch.float64: 1e-6}.get(model.dtype, 0.05)


@torch.no_grad()
def check_packing(model: LanguageModel) -> None:
    """Refuse models for which a row of several sequences is not what the sequences are one by one: layers with a state
    (convolutions, linear attention) and some attention masks take no notice of position ids that restart."""
    width = model.head.vocab_size
    first = torch.arange(1, 9, device=model.device)[None] % width
    second = torch.arange(11, 3, -1, device=model.device)[None] % width
    positions = torch.arange(8, device=model.device).repeat(2)[None]
    packed = model.hidden(torch.cat([first, second], 1), position_ids=positions, use_cache=False).last_hidden_state
    alone = model.hidden(second, use_cache=False).last_hidden_state.double()
    error = float((packed[:, 8:].double() - alone).norm() / alone.norm())
    if not error <= _tolerance(model):
        raise ConfigError(
            "optim.packing",
            got=f"true for {type(model.model).__name__}, where a sequence changes with its neighbour in the row "
            f"(hidden states by {error:.1%})",
            expected="an architecture whose layers keep packed sequences apart",
            remedy="set optim.packing = false",
        )

"""Random models of a few thousand weights, built from configurations alone, and a tokenizer for them.

Weights are drawn wide, so that next-token distributions are far from uniform: a wrong position or sign shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from understudy.backends.language_model import LanguageModel
from understudy.backends.local import LocalSampler, LocalTeacher, LocalTrainer
from understudy.config import OptimConfig
from understudy.types import Prompt, Rollout, TokenSequence

EOS = 0  # ends a completion, and is the number that batches are padded with: masks must not confuse the two
WINDOW = 4  # sliding attention, where an architecture has it; test sequences are longer
_SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
_EXTRA: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8, "tie_word_embeddings": False},
    "llama": {"tie_word_embeddings": False},
    "gemma2": {**_SLIDING, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 0.5, "residual_multiplier": 0.7, "embedding_multiplier": 1.5},
    "cohere": {"logit_scale": 0.25},
}
ARCHITECTURES = tuple(_EXTRA)
# A convolution's state beside attention: rows cannot be dropped from its cache, nor sequences packed.
_EXTRA["lfm2"] = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False}


def tiny_model(
    architecture: str = "qwen3",
    *,
    seed: int = 0,
    vocab_size: int = 6,
    dtype: torch.dtype = torch.float64,
    std: float = 0.4,
) -> Any:
    """A transformers model, in eval mode. In float64 it computes in float64 throughout: see ``_in_full_precision``."""
    config = CONFIG_MAPPING[architecture](vocab_size=vocab_size, **{**_SHAPE, **_EXTRA[architecture]})
    model: Any = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            parameter.copy_(std * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    if dtype == torch.float64:
        _in_full_precision(model)
    return model


def _in_full_precision(model: Any) -> None:
    """transformers' norms and eager attention round to float32 whatever the model's dtype. That rounding jumps, so that
    two orders of summation differ by 1e-7; without it float64 tests can ask for 1e-10."""
    if model.config._attn_implementation == "eager":
        model.set_attn_implementation("eager_in_own_dtype")
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            offset = 1.0 if name.startswith("Gemma") else 0.0
            module.forward = _Norm(module, offset=offset, centred=False)
        elif name.endswith("LayerNorm"):
            module.forward = _Norm(module, offset=0.0, centred=True)


class _Norm:
    def __init__(self, module: nn.Module, *, offset: float, centred: bool) -> None:
        self.module: Any = module
        self.offset, self.centred = offset, centred

    def __call__(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        eps = getattr(self.module, "eps", None) or self.module.variance_epsilon
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (self.offset + self.module.weight)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    """transformers' eager attention, soft-capped, but for its cast to float32."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    cap = options["softcap"]
    weights = cap * torch.tanh(query @ key.transpose(2, 3) * scaling / cap)
    weights = torch.softmax(weights if mask is None else weights + mask, dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("eager_in_own_dtype", _attention)
AttentionMaskInterface.register("eager_in_own_dtype", eager_mask)


def tiny_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Whitespace-separated words; the first one is the end-of-text token and stands for unknown words."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[0])


def trainer_of(model: Any, *, temperature: float = 1.0, vocab_size: int | None = None, **optim: Any) -> LocalTrainer:
    return LocalTrainer(LanguageModel(model, vocab_size=vocab_size), OptimConfig(**optim), temperature=temperature)


def teacher_of(model: Any, *, temperature: float = 1.0, vocab_size: int | None = None, **options: Any) -> LocalTeacher:
    return LocalTeacher(LanguageModel(model, vocab_size=vocab_size), temperature=temperature, **options)


def sampler_of(model: Any, *, stop_ids: frozenset[int] = frozenset({EOS})) -> LocalSampler:
    return LocalSampler(LanguageModel(model), stop_ids=stop_ids)


def prompt_of(ids: Sequence[int], index: int = 0, **fields: Any) -> Prompt:
    return Prompt(index=index, prompt_ids=list(ids), text="", **fields)


def rollout_of(prompt: Prompt, ids: Sequence[int], logprobs: Sequence[float]) -> Rollout:
    reason = "stop" if ids[-1] == EOS else "length"
    return Rollout(prompt, list(ids), list(logprobs), reason, policy_version_start=0, policy_version_end=0)


def rollouts_on(trainer: LocalTrainer, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Rollout]:
    """(prompt, completion) pairs as rollouts, each with the trainer's own log-probabilities; prompts are numbered."""
    sequences = [TokenSequence(prompt, completion) for prompt, completion in pairs]
    logprobs = trainer.compute_logprobs(sequences)
    rows = enumerate(zip(pairs, logprobs, strict=True))
    return [rollout_of(prompt_of(prompt, i), completion, own) for i, ((prompt, completion), own) in rows]


def gradient_of(trainer: LocalTrainer) -> Tensor:
    """The accumulated gradient as one vector, taken out of the model."""
    parts = []
    for parameter in trainer.model.model.parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            parts.append((torch.zeros_like(parameter) if gradient is None else gradient).flatten().clone())
            parameter.grad = None
    return torch.cat(parts)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())

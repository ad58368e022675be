"""Small Qwen3 models and word tokenizers, saved as ordinary Hugging Face folders.

The worlds are invented, so their models are trained from nothing; but they are stored in the format of every
other checkpoint, and the rest of the package cannot tell them from a downloaded one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

MAX_LENGTH = 256
"""Positions per sequence. The longest text of the worlds has 94 tokens."""

RESIDUAL_SCALE = 0.3
"""Factor on the layers that write into the residual stream: blocks start close to the identity."""


def word_tokenizer(
    tokens: Sequence[str],
    *,
    eos: str,
    pad: str,
    unk: str | None = None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are whitespace-separated words; ``tokens[i]`` gets id ``i``.

    It adds nothing at the start or the end, and decoding joins words with single spaces. Without ``unk`` an
    unknown word is an error.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError(f"got {len(tokens)} tokens of which {len(vocabulary)} are distinct; each must occur once")
    missing = [token for token in (eos, pad, unk) if token is not None and token not in vocabulary]
    if missing:
        raise ValueError(f"special tokens {missing} are not among the tokens; add them")

    backend = Tokenizer(WordLevel(vocabulary, unk_token=unk) if unk else WordLevel(vocabulary))
    backend.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]  # a setter the stubs do not know
    special = {"eos_token": eos, "pad_token": pad} | ({"unk_token": unk} if unk else {})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        **special,
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def build_qwen3(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, num_layers: int, num_heads: int, seed: int
) -> Qwen3ForCausalLM:
    """An untrained float32 ``Qwen3ForCausalLM`` with tied embeddings, the same for equal seeds.

    The global random state is left as it was.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"got hidden_size {hidden_size} for {num_heads} heads; expected an even size per head, as rotary "
            "embeddings turn pairs"
        )
    eos_token_id, pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(eos_token_id, int)
    assert isinstance(pad_token_id, int)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=int(hidden_size * 8 / 3) // 8 * 8,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        dtype="float32",
        attention_bias=False,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights of its own
        model = Qwen3ForCausalLM(config)
    _initialise(model, seed)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = eos_token_id
    model.generation_config.pad_token_id = pad_token_id
    return model


def _initialise(model: Qwen3ForCausalLM, seed: int) -> None:
    """Embeddings N(0, 1/d), linear layers N(0, 1/fan_in); norms keep their ones.

    Larger than the usual 0.02, which trains slowly at these widths.
    """
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, module.embedding_dim**-0.5, generator=generator)
            elif isinstance(module, nn.Linear) and name != "lm_head":  # the head is the embedding matrix
                scale = RESIDUAL_SCALE if name.endswith(("o_proj", "down_proj")) else 1.0
                module.weight.normal_(0.0, scale * module.in_features**-0.5, generator=generator)


def save_folder(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: str | Path, card: str) -> None:
    """Write model (float32 safetensors), tokenizer and ``card`` (as ``README.md``) to ``folder``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")

"""Hub id or folder -> a model ready for its role: device, dtype, adapters, and its head apart from its body."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from understudy.config import Dtype, LoraConfig, StudentConfig
from understudy.errors import ConfigError
from understudy.lm_head import LMHead
from understudy.tokenization import adapter_base

log = logging.getLogger("understudy")


class LanguageModel:
    """A causal language model split where distillation needs it: hidden states, then the head.

    ``vocab_size`` restricts the head to the ids every role knows (padding rows beyond them mean nothing).
    """

    def __init__(self, model: nn.Module, *, vocab_size: int | None = None) -> None:
        self.model: Any = model.eval()  # dropout off in every role: sampler and trainer must agree
        base = model.get_base_model() if hasattr(model, "peft_config") else model  # pyright: ignore[reportCallIssue]
        self._causal: Any = base
        self._body: Any = base.base_model  # pyright: ignore[reportAttributeAccessIssue]
        self._vocab_size = vocab_size
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = self._causal.get_output_embeddings().weight.dtype
        _check_head(self)

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

    @property
    def shape(self) -> tuple[int, ...]:
        """What makes two models the same architecture at the same size: the matrices' sizes, adapters left out."""
        return _shape_of(self._causal)

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


def _shape_of(model: nn.Module) -> tuple[int, ...]:
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
    # Rounding differs by the row's length and adds up over layers; a leak moves hidden states by a share of themselves.
    tolerance = {torch.float32: 1e-3, torch.float64: 1e-6}.get(model.dtype, 0.05)
    if not error <= tolerance:
        raise ConfigError(
            "optim.packing",
            got=f"true for {type(model.model).__name__}, where a sequence changes with its neighbour in the row "
            f"(hidden states by {error:.1%})",
            expected="an architecture whose layers keep packed sequences apart",
            remedy="set optim.packing = false",
        )


def pick_device(device: str) -> torch.device:
    """Resolve "auto": cuda, then mps, then cpu."""
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:  # the latter: a build of torch without CUDA
            raise ConfigError(
                f"device {device}",
                got=str(error).strip().splitlines()[0],
                expected="auto, cpu, mps, cuda or cuda:<n>, present on this machine",
                remedy='use device = "auto"',
            ) from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run on matrix hardware here (elsewhere they are slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())


def meta_shape(model: str, *, role: str) -> tuple[int, ...]:
    """``LanguageModel.shape`` of a model, from its configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _explained(model, role), torch.device("meta"):
        config = AutoConfig.from_pretrained(adapter_base(Path(model)) or model)
        return _shape_of(AutoModelForCausalLM.from_config(config))


@contextlib.contextmanager
def _explained(model: str, role: str) -> Iterator[None]:
    """What transformers raises for a model it cannot load, as ConfigError."""
    from safetensors import SafetensorError

    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"{role} model {model}",
            got=str(error).strip().splitlines()[0],
            expected="a causal language model that transformers loads",
            remedy=f'try AutoModelForCausalLM.from_pretrained("{adapter_base(Path(model)) or model}") by hand',
        ) from None


def load_model(model: str, *, role: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A causal language model from a hub id, a folder, or an adapter folder merged into its base."""
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()  # a run shows its own
    base = adapter_base(Path(model))
    with _explained(model, role):
        # pyright does not know that this flag makes it a pair
        loaded, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            base or model, dtype=dtype, output_loading_info=True
        )
        if report["missing_keys"]:  # transformers would go on with random weights in their place
            raise ValueError(f"weights without {', '.join(sorted(report['missing_keys'])[:3])}")
        if base is not None:
            loaded = _peft().PeftModel.from_pretrained(loaded, model).merge_and_unload()
    return loaded.to(device)


def load_student(
    config: StudentConfig,
    *,
    vocab_size: int | None = None,
    weights: Path | None = None,
    role: str = "student",
    seed: int = 0,
) -> LanguageModel:
    """The student, adapters attached. ``weights``: a checkpoint's folder to take the weights from instead. ``role``:
    what errors call it. ``seed`` decides new adapters."""
    device = pick_device(config.device)
    dtype = _student_dtype(config.dtype, device, lora=config.lora is not None)
    if config.lora is None:
        model: Any = load_model(str(weights or config.model), role=role, dtype=dtype, device=device)
    else:
        base = load_model(config.model, role=role, dtype=dtype, device=device)
        model = _with_adapters(base, config.lora, weights, seed)
    if config.gradient_checkpointing:
        _recompute_layers(model)
    return LanguageModel(model, vocab_size=vocab_size)


def _recompute_layers(model: nn.Module) -> None:
    """Gradient checkpointing layer by layer. transformers' own switch works in train mode only, which would also turn
    dropout on."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            "student.gradient_checkpointing",
            got=f"true for {type(model).__name__}, which has no layers that transformers knows how to recompute",
            expected="an architecture with gradient checkpointing",
            remedy="set it to false",
        )
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():  # sampling and scoring: nothing to save, and a cache must be written once
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _student_dtype(dtype: Dtype, device: torch.device, *, lora: bool) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if lora and device.type == "cuda" and fast_bfloat16(device) else torch.float32
    return getattr(torch, dtype)


def _with_adapters(base: Any, config: LoraConfig, weights: Path | None, seed: int) -> Any:
    peft = _peft()
    if weights is not None:
        return peft.PeftModel.from_pretrained(base, str(weights), is_trainable=True)
    targets = config.target_modules
    if targets != "all-linear" and _shared_head(base) in {target.rpartition(".")[2] for target in targets}:
        raise ConfigError(
            "student.lora.target_modules",
            got=f"{_shared_head(base)}, which shares its weight with the embedding",
            expected="layers of their own: merged, such an adapter would change the embedding too",
            remedy='use "all-linear", which adapts everything else',
        )
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        # peft draws adapters on the CPU, whatever device they go to.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return peft.get_peft_model(base, lora)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        layers = sorted({name.rpartition(".")[2] for name, part in base.named_modules() if isinstance(part, nn.Linear)})
        raise ConfigError(
            "student.lora.target_modules",
            got=str(error).strip().splitlines()[0],
            expected=f'"all-linear", or some of {", ".join(layers)}',
            remedy="drop it, or name layers of this model",
        ) from None


def _shared_head(model: Any) -> str | None:
    """The last part of the LM head's name, where its weight is the embedding's."""
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        return None
    return next(name.rpartition(".")[2] for name, module in model.named_modules() if module is head)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "student.lora",
            got="the package `peft` is not installed",
            expected="peft, for adapters",
            remedy='pip install "understudy[lora]"',
        ) from None
    return peft

"""Hub id or folder -> a model ready for its role: device, dtype, adapters."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from understudy.backends.attention import use_matmul_attention
from understudy.backends.language_model import LanguageModel, shape_of
from understudy.backends.memory import is_out_of_memory
from understudy.checkpoints import SUMS_FILE, damage
from understudy.config import Dtype, LoraConfig, StudentConfig
from understudy.errors import ConfigError, first_line
from understudy.model_files import adapter_base, check_weights, unreadable

log = logging.getLogger("understudy")


def pick_device(device: str) -> torch.device:
    """Resolve "auto": cuda, then mps, then cpu."""
    if device != "auto":
        try:
            found = torch.empty(0, device=device).device
            if found.type == "meta":
                raise RuntimeError("a device that holds no numbers")
            return found
        except (RuntimeError, AssertionError) as error:  # the latter: a build of torch without CUDA
            raise ConfigError(
                f"device {device}",
                got=first_line(error),
                expected="auto, cpu, mps, cuda or cuda:<n>, present on this machine",
                remedy='use device = "auto"',
            ) from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def fast_bfloat16(device: torch.device) -> bool:
    """Whether this hardware multiplies bfloat16 (elsewhere it is slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def default_micro_batch_tokens(device: torch.device) -> int:
    """Tokens in one pass: enough to fill a GPU; on a CPU, what caches hold."""
    return 2048 if device.type == "cpu" else 16384


def meta_shape(model: str, *, role: str, trust_remote_code: bool = False) -> tuple[int, ...]:
    """``LanguageModel.shape`` of a model, from its configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _explained(model, role), torch.device("meta"):
        config = AutoConfig.from_pretrained(adapter_base(Path(model)) or model, trust_remote_code=trust_remote_code)
        return shape_of(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


@contextlib.contextmanager
def _explained(model: str, role: str) -> Iterator[None]:
    """What transformers and peft raise for a model they cannot load, or have no room for, as ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # files that people write, read by libraries that raise whatever comes to them
        if is_out_of_memory(error):
            raise ConfigError(
                f"{role} model {model}",
                got=f"out of memory while it was loaded: {first_line(error)}",
                expected="room for its weights",
                remedy='use a smaller model, dtype = "bfloat16" or another device; or end what else takes memory there',
            ) from None
        raise unreadable(
            error,
            model,
            role,
            expected="a causal language model that transformers loads",
            remedy=f'try AutoModelForCausalLM.from_pretrained("{adapter_base(Path(model)) or model}") by hand',
        ) from None


def load_model(
    model: str,
    *,
    role: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    verified: bool = False,
) -> nn.Module:
    """A causal language model from a hub id, a folder, or an adapter folder merged into its base. Weights are read from
    safetensors alone. Raises ConfigError when it cannot be loaded, or its weights are damaged; ``verified``: the latter
    has been looked at."""
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()  # a run shows its own
    if not verified:
        _refuse_damaged(Path(model), role)
    base = adapter_base(Path(model))
    check_weights(model, role)
    if base is not None:
        check_weights(base, role)
    with _explained(model, role):
        # pyright does not know that this flag makes it a pair
        loaded, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            base or model,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
        if report["missing_keys"]:  # transformers would go on with random weights in their place
            raise ValueError(f"weights without {', '.join(sorted(report['missing_keys'])[:3])}")
        if base is not None:
            loaded = _peft().PeftModel.from_pretrained(loaded, model).merge_and_unload()
        loaded = loaded.to(device)
    if device.type == "cpu":
        use_matmul_attention(loaded)
    return loaded


def _refuse_damaged(folder: Path, role: str) -> None:
    """Raise ConfigError for a run's checkpoint whose weights a disk has changed: they would load all the same. Other
    folders have no sums, and need none."""
    if (folder / SUMS_FILE).exists() and (got := damage(folder, only=".safetensors")) is not None:
        raise ConfigError(
            f"{role} model {folder}",
            got=got,
            expected=f"the weights that {SUMS_FILE} was written for",
            remedy="make it again: the run that wrote it, with --resume, goes on from the checkpoint before it; or, if "
            f"the weights were changed on purpose, remove {SUMS_FILE}",
        )


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
    dtype, trust = _student_dtype(config.dtype, device, lora=config.lora is not None), config.trust_remote_code
    if config.lora is None:
        name, resumed = str(weights or config.model), weights is not None
        model: Any = load_model(name, role=role, dtype=dtype, device=device, trust_remote_code=trust, verified=resumed)
    else:
        base = load_model(config.model, role=role, dtype=dtype, device=device, trust_remote_code=trust)
        model = _with_adapters(base, config.lora, weights, seed)
    if config.gradient_checkpointing:
        _recompute_layers(model)
    return LanguageModel(model, vocab_size=vocab_size, share_prompts=not config.gradient_checkpointing)


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
            got=first_line(error),
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

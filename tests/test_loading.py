"""Folders -> models: what is refused instead of being trained on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import prompt_of, tiny_model
from understudy import ConfigError
from understudy.backends.language_model import LanguageModel, check_packing
from understudy.backends.loading import _student_dtype, load_model, load_student, meta_shape, pick_device
from understudy.backends.local import LocalSampler, LocalTrainer
from understudy.batching import micro_batches
from understudy.config import LoraConfig, OptimConfig, SamplingConfig, StudentConfig
from understudy.objectives import CrossEntropy
from understudy.types import TokenSequence, TrainingExample
from user import save_model, word_tokenizer

# peft asks transformers the old way
peft_warns = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "m", word_tokenizer())


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    """transformers fills gaps with random numbers and a warning; a run must not start from those."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"teacher model[\s\S]*without model.layers.1.mlp.up_proj.weight"):
        load_model(str(folder), role="teacher", dtype=torch.float32, device=torch.device("cpu"))


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"student model[\s\S]*remedy"):
        load_student(StudentConfig(model=str(folder), device="cpu"))


def test_no_room_for_a_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    monkeypatch.setattr("transformers.PreTrainedModel.to", full)
    with pytest.raises(ConfigError) as error:
        load_model(str(folder), role="teacher", dtype=torch.float32, device=torch.device("cpu"))
    assert error.value.where == f"teacher model {folder}"
    assert error.value.got == ("out of memory while it was loaded: CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert error.value.remedy.startswith("use a smaller model")


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:99", "", "meta"):
        with pytest.raises(ConfigError, match="present on this machine"):
            pick_device(name)


def test_a_tied_head_is_not_adapted(folder: Path) -> None:
    model = tiny_model("gemma2", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(folder)
    config = StudentConfig(model=str(folder), device="cpu", lora=LoraConfig(target_modules=("lm_head",)))
    with pytest.raises(ConfigError, match=r"student.lora.target_modules[\s\S]*shares its weight with the embedding"):
        load_student(config)


@peft_warns
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "gradient checkpointing"])
def test_an_adapted_head_trains_and_is_saved(tmp_path: Path, recompute: bool) -> None:
    """Losses, scores and completions see the adapters; their gradients are those of peft's own forward pass."""
    tiny_model("llama", seed=5, dtype=torch.float32).save_pretrained(tmp_path / "base")
    lora = LoraConfig(rank=2, target_modules=("lm_head", "q_proj"))
    model = load_student(
        StudentConfig(model=str(tmp_path / "base"), device="cpu", lora=lora, gradient_checkpointing=recompute)
    )
    adapters = {name: p for name, p in model.model.named_parameters() if "lm_head.lora_" in name}
    assert len(adapters) == 2
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    logits = model.model(input_ids=ids).logits[0]
    torch.testing.assert_close(model.head.logits(model.hidden(ids).last_hidden_state[0]), logits)
    (-logits[2:4].log_softmax(-1)[[0, 1], [4, 5]].sum()).backward()
    expected = {name: p.grad.clone() for name, p in adapters.items() if p.grad is not None}
    model.model.zero_grad()

    trainer = LocalTrainer(model, OptimConfig())
    [batch] = micro_batches([TrainingExample([1, 2, 3], [4, 5], [True, True])], micro_batch_tokens=99)
    trainer.forward_backward(batch, CrossEntropy())
    assert set(expected) == set(adapters)
    for name, parameter in adapters.items():
        torch.testing.assert_close(parameter.grad, expected[name])

    trainer.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_model.safetensors").stat().st_size < 20_000  # no copy of the whole head
    merged = load_model(str(tmp_path / "adapters"), role="student", dtype=torch.float32, device=torch.device("cpu"))
    torch.testing.assert_close(merged(input_ids=ids).logits[0], logits.detach())


@peft_warns
def test_an_adapted_head_in_bfloat16(tmp_path: Path) -> None:
    """The adapters are float32: a contribution below bfloat16's grid counts, in losses and in decoding."""
    tiny_model("llama", seed=5, dtype=torch.float32).save_pretrained(tmp_path / "base")
    lora = LoraConfig(rank=2, target_modules=("lm_head",))
    model = load_student(StudentConfig(model=str(tmp_path / "base"), device="cpu", dtype="bfloat16", lora=lora))
    trainer = LocalTrainer(model, OptimConfig())
    sequences = [TokenSequence([1, 2, 3], [4, 5])]
    [before] = trainer.compute_logprobs(sequences)
    for _ in range(2):
        [batch] = micro_batches([TrainingExample([1, 2, 3], [4, 5], [True, True])], micro_batch_tokens=99)
        trainer.forward_backward(batch, CrossEntropy())
        trainer.optimizer_step(learning_rate=1e-3, divisor=2)
    [after] = trainer.compute_logprobs(sequences)
    assert 0 < sum(after) - sum(before) < 0.1
    [[rollout]] = LocalSampler(model, stop_ids=frozenset({0})).sample(
        [prompt_of([1, 2, 3])], SamplingConfig(group_size=1, max_completion_tokens=3), seed=0
    )
    [again] = trainer.compute_logprobs([TokenSequence([1, 2, 3], rollout.completion_ids)])
    assert rollout.sampler_logprobs == pytest.approx(again, abs=0.05)


def test_adapters_that_fit_no_layer(folder: Path) -> None:
    config = StudentConfig(model=str(folder), device="cpu", lora=LoraConfig(target_modules=("query",)))
    with pytest.raises(ConfigError, match=r"student.lora.target_modules[\s\S]*query"):
        load_student(config)


def test_adapters_without_peft(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"understudy\[lora\]"):
        load_student(StudentConfig(model=str(folder), device="cpu", lora=LoraConfig()))


@peft_warns
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_shapes_are_known_before_any_weights(tmp_path: Path, architecture: str) -> None:
    """From the configuration, from the model, and from the model under adapters: the same matrices."""
    folder = str(save_model(tmp_path / "m", word_tokenizer(), architecture=architecture))
    plain = load_student(StudentConfig(model=folder, device="cpu"))
    adapted = load_student(StudentConfig(model=folder, device="cpu", lora=LoraConfig(rank=3)))
    assert meta_shape(folder, role="teacher") == plain.shape == adapted.shape
    assert sum(plain.shape) == sum(p.numel() for p in plain.model.parameters() if p.dim() == 2)
    wider = save_model(tmp_path / "wider", word_tokenizer(), architecture=architecture, hidden=32)
    assert meta_shape(str(wider), role="teacher") != plain.shape


@peft_warns
def test_the_seed_decides_the_adapters(folder: Path) -> None:
    def adapters(seed: int) -> torch.Tensor:
        config = StudentConfig(model=str(folder), device="cpu", lora=LoraConfig(rank=2))
        model = load_student(config, seed=seed).model
        return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_A" in name])

    torch.manual_seed(5)
    first = adapters(1)
    drawn = torch.rand(3)
    torch.manual_seed(6)
    assert torch.equal(adapters(1), first)
    assert not torch.equal(adapters(2), first)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)  # the process's own random numbers go on as if nothing had been drawn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "granite", "cohere"])
def test_heads_are_judged_in_half_precision_too(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture, seed=5, dtype=dtype)
    LanguageModel(model)
    forward = model.forward

    def fainter(**inputs):
        output = forward(**inputs)
        output.logits = output.logits * 0.9
        return output

    model.forward = fainter
    with pytest.raises(ConfigError, match="logits that differ"):
        LanguageModel(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_packing_needs_layers_that_keep_sequences_apart(dtype: torch.dtype) -> None:
    check_packing(LanguageModel(tiny_model("qwen3", seed=5, dtype=dtype)))
    with pytest.raises(ConfigError, match=r"optim.packing[\s\S]*Lfm2ForCausalLM[\s\S]*optim.packing = false"):
        check_packing(LanguageModel(tiny_model("lfm2", seed=5, dtype=dtype)))


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_adapters_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype) -> None:
    """bfloat16 only where the hardware is fast at it, and never for a master copy."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda")
    assert _student_dtype("auto", gpu, lora=True) == dtype
    assert _student_dtype("auto", gpu, lora=False) == torch.float32
    assert _student_dtype("bfloat16", gpu, lora=True) == torch.bfloat16

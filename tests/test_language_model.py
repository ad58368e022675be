"""The model behind every role: prompts that are shared, and copies in another precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny import ARCHITECTURES, EOS, WINDOW, prompt_of, relative_error, tiny_model, trainer_of
from understudy import batching
from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import load_student
from understudy.backends.local import LocalSampler
from understudy.batching import Arrangement, lay_out, micro_batches
from understudy.config import LoraConfig, SamplingConfig, StudentConfig
from understudy.objectives import CrossEntropy
from understudy.types import TokenSequence, TrainingExample

LONG = [5, 4, 3, 2, 1, 5, EOS, 3, 2]  # more than a sliding window
assert len(LONG) > WINDOW
# Each a batch: prompts and their completions.
CASES: dict[str, list[TokenSequence]] = {
    "ragged": [
        TokenSequence(LONG, [1, 2, 3, 4, 5, 1, 2]),
        TokenSequence([4], [EOS]),
        TokenSequence([1, 2, 3], [4, 5, EOS]),
        TokenSequence(LONG, [3]),
        TokenSequence([4], [1, 1, 5, 2]),
        TokenSequence([1, 2, 3], []),
        TokenSequence(LONG, [5, EOS]),
    ],
    "equal prompts": [TokenSequence([3, 1, 4, 1, 5], [i, 2, i, i][: i + 1]) for i in range(4)],
    "one row": [TokenSequence(LONG, [1, 2, 3, 4])],
    "one token": [TokenSequence([2, 1], [3])],
    "single tokens": [TokenSequence(LONG, [1]), TokenSequence([4], [2]), TokenSequence(LONG, [3])],
    "nothing written": [TokenSequence(LONG, []), TokenSequence([1], [])],
}


def hidden_of(model: LanguageModel, sequences: Sequence[TokenSequence], arrangement: Arrangement) -> Tensor:
    return model.completion_hidden(lay_out(sequences, device="cpu", arrangement=arrangement))


def gradient(model: LanguageModel, hidden: Tensor) -> Tensor:
    """Of a loss that weighs every number of every hidden state differently, and uses the head too."""
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype)
    loss = (weights * hidden.sin()).sum() + model.head.logprobs(hidden).square().sum()
    parameters = list(model.model.parameters())
    parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(parts, parameters, strict=True)]
    )


@pytest.mark.parametrize("block_tokens", [1, 512], ids=["several blocks", "one block"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sequences_behind_shared_prompts_are_what_they_are_alone(
    architecture: str, case: str, block_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "_BLOCK_TOKENS", block_tokens)
    model, sequences = LanguageModel(tiny_model(architecture, seed=5)), CASES[case]
    assert model.shares_prompts
    padded, shared = (hidden_of(model, sequences, arrangement) for arrangement in ("padded", "shared"))
    assert shared.shape == padded.shape == (sum(len(s.completion_ids) for s in sequences), 16)
    torch.testing.assert_close(shared, padded, rtol=0, atol=1e-10)
    if len(padded):
        # Cohere rounds queries and keys to float32 when it rotates them, and their gradients: before or after the sum
        # over a prompt's completions.
        tolerance = 2.0**-24 if architecture == "cohere" else 1e-9
        assert relative_error(gradient(model, shared), gradient(model, padded)) < tolerance


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_a_shared_prompt_is_read_once(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(tiny_model(architecture, seed=5))
    shapes: list[tuple[int, ...]] = []
    hidden = LanguageModel.hidden

    def watched(self: LanguageModel, input_ids: Tensor, **inputs: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return hidden(self, input_ids, **inputs)

    monkeypatch.setattr(LanguageModel, "hidden", watched)
    hidden_of(model, CASES["ragged"], "shared")
    assert shapes == [(3, 9), (7, 6)]  # the last token of a completion predicts nothing
    shapes.clear()
    monkeypatch.setattr(batching, "_BLOCK_TOKENS", 1)
    hidden_of(model, sorted(CASES["ragged"], key=lambda s: len(s.completion_ids)), "shared")
    assert shapes == [(3, 9), (1, 1), (1, 2), (1, 3), (1, 6)]
    shapes.clear()
    hidden_of(model, CASES["single tokens"], "shared")
    assert shapes == [(2, 9)]


def test_who_shares_prompts(tmp_path: Path) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    assert load_student(StudentConfig(model=str(tmp_path), device="cpu")).shares_prompts
    recomputing = StudentConfig(model=str(tmp_path), device="cpu", gradient_checkpointing=True)
    assert not load_student(recomputing).shares_prompts
    assert not LanguageModel(tiny_model("lfm2")).shares_prompts
    assert not LanguageModel(tiny_model(), share_prompts=False).shares_prompts
    for dtype in (torch.float32, torch.bfloat16):
        assert LanguageModel(tiny_model("gemma3_text", dtype=dtype)).shares_prompts


def test_a_model_whose_cache_does_not_continue_shares_no_prompts() -> None:
    """It is found out by trying, not by name."""
    model = tiny_model("llama", seed=5)
    layer, forward = model.model.layers[0], model.model.layers[0].forward

    def forgetful(hidden: Tensor, *arguments: Any, **inputs: Any) -> Tensor:
        """Something that looks at the rows it is given and not at the cache."""
        return forward(hidden + hidden.cumsum(1), *arguments, **inputs)

    layer.forward = forgetful
    assert not LanguageModel(model).shares_prompts


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
def test_a_copy_in_bfloat16(architecture: str) -> None:
    """Parameters are rounded, buffers are not, and the source does not notice."""
    source = LanguageModel(tiny_model(architecture, seed=5, dtype=torch.float32))
    before = {name: p.clone() for name, p in source.model.named_parameters()}
    copy = source.copy_in(torch.bfloat16)
    assert copy.dtype == torch.bfloat16
    assert copy.head.weight.dtype == torch.bfloat16
    assert (source.shares_prompts, copy.shares_prompts) == (True, True)
    own = dict(copy.model.named_parameters())
    assert own.keys() == before.keys()
    for name, parameter in source.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert not own[name].requires_grad
        assert torch.equal(own[name], parameter.to(torch.bfloat16))
    buffers = dict(source.model.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    for name, buffer in copy.model.named_buffers():
        assert torch.equal(buffer, buffers[name])
        assert buffer.dtype == buffers[name].dtype
    tied = (model.model.lm_head.weight is model.model.model.embed_tokens.weight for model in (source, copy))
    assert len(set(tied)) == 1


def stepped(model: Any) -> None:
    trainer = trainer_of(model)
    [batch] = micro_batches([TrainingExample([1, 2], [3, EOS], [True, True])], micro_batch_tokens=99)
    trainer.forward_backward(batch, CrossEntropy())
    trainer.optimizer_step(learning_rate=0.05, divisor=2)


def test_a_copy_takes_weights() -> None:
    source = LanguageModel(tiny_model(seed=5, dtype=torch.float32))
    copy = source.copy_in(torch.bfloat16)
    before = [p.clone() for p in copy.model.parameters()]
    stepped(source.model)
    assert all(map(torch.equal, before, copy.model.parameters()))
    copy.take_weights(source)
    for own, other, old in zip(copy.model.parameters(), source.model.parameters(), before, strict=True):
        assert torch.equal(own, other.detach().to(torch.bfloat16))
        assert own.dtype == torch.bfloat16
        assert other.dtype == torch.float32
        assert not torch.equal(own, old)


def test_a_copys_vocabulary_is_as_narrow() -> None:
    source = LanguageModel(tiny_model(seed=5, vocab_size=9, dtype=torch.float32), vocab_size=6)
    assert source.copy_in(torch.bfloat16).head.vocab_size == 6


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers the old way
@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"lora": LoraConfig(rank=2)}], ids=str)
def test_copies_of_students_of_every_kind(tmp_path: Path, options: dict[str, Any]) -> None:
    """A copy computes with its own weights, also where layers have been wrapped."""
    tiny_model(seed=5, dtype=torch.float32).save_pretrained(tmp_path)
    student = load_student(StudentConfig(model=str(tmp_path), device="cpu", **options))
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    copy = student.copy_in(torch.float64)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        expected = student.hidden(ids).last_hidden_state
        torch.testing.assert_close(copy.hidden(ids).last_hidden_state.float(), expected)
        for parameter in student.model.parameters():
            parameter.zero_()
        torch.testing.assert_close(copy.hidden(ids).last_hidden_state.float(), expected)
        copy.take_weights(student)
        assert torch.count_nonzero(copy.hidden(ids).last_hidden_state) == 0


def test_memory_for_decoding() -> None:
    """Two layers, keys and values, one head of eight numbers of eight bytes; two and a half times, and the logits."""
    model = LanguageModel(tiny_model(seed=5))
    token = 2 * 2 * 1 * 8 * 8
    assert model.decoding_bytes(10) == 5 * 10 * token // 2 + 8 * 6
    assert model.decoding_bytes(20) - model.decoding_bytes(10) == 5 * 10 * token // 2


def test_a_sampler_with_a_copy_writes_with_new_weights_after_a_sync() -> None:
    source = LanguageModel(tiny_model(seed=5, dtype=torch.float32))
    sampler = LocalSampler(source, stop_ids=frozenset({EOS}), shadow=source.copy_in(torch.bfloat16))
    sampling = SamplingConfig(group_size=8, max_completion_tokens=6)

    def sample() -> list[tuple[list[int], list[float], int]]:
        [group] = sampler.sample([prompt_of([1, 2, 3])], sampling, seed=1)
        return [(list(r.completion_ids), list(r.sampler_logprobs), r.policy_version_start) for r in group]

    first = sample()
    stepped(source.model)
    assert sample() == first
    sampler.set_policy_version(1)
    second = sample()
    assert {version for *_, version in second} == {1}
    assert [logprobs for _, logprobs, _ in second] != [logprobs for _, logprobs, _ in first]
    fresh = LocalSampler(source.copy_in(torch.bfloat16), stop_ids=frozenset({EOS}))
    fresh.set_policy_version(1)
    [group] = fresh.sample([prompt_of([1, 2, 3])], sampling, seed=1)
    assert [(list(r.completion_ids), list(r.sampler_logprobs), 1) for r in group] == second

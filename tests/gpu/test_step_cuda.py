"""A step's phases on a CUDA device: decoding, sharing prompts, drawing, running out of memory. `make test-gpu`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from test_sampling_kernel import chi_square, head_of, states
from tiny import prompt_of, relative_error, tiny_model
from understudy.backends import local
from understudy.backends.language_model import LanguageModel
from understudy.backends.local import LocalSampler, LocalTeacher, LocalTrainer
from understudy.batching import micro_batches
from understudy.config import OptimConfig, SamplingConfig
from understudy.lm_head import head_drawer
from understudy.objectives import CrossEntropy
from understudy.types import TokenSequence, TrainingExample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
PROMPTS = [prompt_of(ids, i) for i, ids in enumerate([[1, 2, 3], [4], [5, 4, 3, 2, 1, 5, 3], [2, 2]])]
SAMPLING = SamplingConfig(group_size=4, max_completion_tokens=12)


def student() -> LanguageModel:
    return LanguageModel(tiny_model(seed=5, dtype=torch.float32).to(DEVICE))


def test_decoding_with_a_bfloat16_copy_reports_what_a_full_pass_says() -> None:
    """Cached and full passes round differently: bfloat16 hidden states by a few times 2**-8 of themselves, layer upon
    layer, and so the logits; a log-probability by twice the largest logit's share of that."""
    model = student()
    shadow = model.copy_in(torch.bfloat16)
    groups = LocalSampler(model, stop_ids=frozenset(), shadow=shadow).sample(PROMPTS, SAMPLING, seed=1)
    rollouts = [rollout for group in groups for rollout in group]
    sequences = [TokenSequence(r.prompt.prompt_ids, r.completion_ids) for r in rollouts]
    written = torch.tensor([r.sampler_logprobs for r in rollouts])
    with torch.no_grad():
        largest = float(model.model(torch.tensor([[1, 2, 3, 4, 5]], device=DEVICE)).logits.abs().max())
    for marker in (shadow, model):
        full = torch.tensor(LocalTeacher(marker).compute_logprobs(sequences))
        torch.testing.assert_close(written, full, rtol=0, atol=2 * 8 * 2**-8 * largest)
        assert float((written - full).abs().mean()) < 2 * 2**-8 * largest


def test_gradients_through_shared_prompts_are_those_of_padded_rows() -> None:
    model = student()
    assert model.shares_prompts
    draw = torch.Generator().manual_seed(0)
    examples = [
        TrainingExample(prompt.prompt_ids, torch.randint(1, 6, (n,), generator=draw).tolist(), [True] * n)
        for prompt in PROMPTS
        for n in (3, 9, 1, 5)
    ]

    def gradient(share: bool) -> torch.Tensor:
        trainer = LocalTrainer(model, OptimConfig())
        batches = micro_batches(examples, micro_batch_tokens=4096, share_prompts=share, device=DEVICE)
        assert any(batch.shared is not None for batch in batches) == share
        for batch in batches:
            trainer.forward_backward(batch, CrossEntropy())
        parts = [p.grad.flatten().double() for p in model.model.parameters()]
        model.model.zero_grad(set_to_none=True)
        return torch.cat(parts)

    # Sums of a few hundred float32 terms in another order, through attention kernels that are not the same either. A
    # prompt that saw a neighbour, or a position off by one, moves gradients by a share of themselves.
    assert relative_error(gradient(True), gradient(False)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_frequencies_are_the_softmax(dtype: torch.dtype) -> None:
    """Chi-square of 8000 draws over a vocabulary that ends inside a block."""
    own, hidden = head_of(5000, dtype=dtype, bias=True, spare=7), states(1, dtype=dtype).to(DEVICE)
    assert own.bias is not None
    head = replace(own, weight=own.weight.to(DEVICE), bias=own.bias.to(DEVICE))
    drawer, draw = head_drawer(head, 400), torch.Generator().manual_seed(0)
    uniforms = torch.rand(20, 400, generator=draw, dtype=torch.float64).to(DEVICE)
    ids = torch.cat([drawer.draw(hidden.expand(400, -1), row)[0] for row in uniforms])
    statistic, freedom = chi_square(ids.cpu(), head.logits(hidden)[0].double().softmax(0).cpu())
    # Mean and variance of chi-square are its degrees of freedom and twice that: four deviations are one in ten
    # thousand.
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_a_batch_that_does_not_fit_is_halved_and_its_memory_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = LocalSampler(student(), stop_ids=frozenset())
    expected = sampler.sample(PROMPTS, SAMPLING, seed=1)
    plain, rows, held = local.decode, [], []

    def decode(model: LanguageModel, prompts: Any, *arguments: Any, **options: Any) -> Any:
        rows.append(len(prompts))
        held.append(torch.cuda.memory_allocated())
        if len(prompts) > 4:
            cache = torch.empty(2**26, device=DEVICE)
            raise torch.OutOfMemoryError(f"beside {cache.numel()} numbers")
        return plain(model, prompts, *arguments, **options)

    monkeypatch.setattr(local, "decode", decode)
    groups = sampler.sample(PROMPTS, SAMPLING, seed=1)
    assert rows == [16, 8, 4, 4, 8, 4, 4]
    # A failed attempt's 256 MiB are gone when the next one begins.
    assert max(held) - held[0] < 2**26
    for group, other in zip(groups, expected, strict=True):
        assert [r.completion_ids for r in group] == [r.completion_ids for r in other]
        for one, two in zip(group, other, strict=True):
            assert one.sampler_logprobs == pytest.approx(two.sampler_logprobs, abs=1e-4)

"""LM-head kernels on a CUDA device: the CPU's values and gradients, and no [N, V] tensor. `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from understudy.divergences import KINDS, Divergence
from understudy.lm_head import LMHead, divergence_columns, head_divergence, head_logprobs, head_topk, logprob_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOKENS, VOCAB, WIDTH = 300, 5000, 32


def draw(*shape: int, device: str, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(device)


def run(name: str, student: str, teacher: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Loss and gradients, on the host; the student's head has a bias, soft-capping and padding."""
    hidden = draw(TOKENS, WIDTH, device=student).to(dtype).requires_grad_()
    weight = draw(VOCAB + 8, WIDTH, device=student, scale=0.3).to(dtype).requires_grad_()
    bias = draw(VOCAB + 8, device=student).to(dtype).requires_grad_()
    head = LMHead(weight, bias, softcap=8.0, scale=1.2, rows=VOCAB)
    ids = torch.arange(TOKENS, device=student) * 7 % VOCAB
    if name == "selected":
        loss = head_logprobs(head, hidden, ids, temperature=0.8).sum()
    elif name == "loss":
        loss = logprob_loss(head, hidden, ids, lambda logprobs, rows: logprobs.sum(), temperature=0.8)[0]
    else:
        other = LMHead(draw(VOCAB, 16, device=teacher, scale=0.3).to(dtype))
        states, mask = draw(TOKENS, 16, device=teacher).to(dtype), torch.arange(TOKENS, device=student) % 3 > 0
        loss = head_divergence(head, other, hidden, states, mask, divergence=Divergence(name)).loss  # pyright: ignore[reportArgumentType]
    loss.backward()
    results = [loss.detach(), hidden.grad, weight.grad, bias.grad]
    return [x.float().cpu() for x in results if x is not None]


@pytest.mark.parametrize("name", ["selected", "loss", *KINDS])
def test_values_and_gradients_equal_the_cpus(name: str) -> None:
    for ours, expected in zip(run(name, "cuda", "cuda"), run(name, "cpu", "cpu"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("student", "teacher"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_the_teacher_may_sit_elsewhere(student: str, teacher: str) -> None:
    for ours, expected in zip(run("reverse_kl", student, teacher), run("reverse_kl", "cpu", "cpu"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_topk_and_columns_equal_the_cpus() -> None:
    def values(device: str) -> list[Tensor]:
        head, hidden = LMHead(draw(VOCAB, WIDTH, device=device)), draw(TOKENS, WIDTH, device=device)
        columns = divergence_columns(head, LMHead(head.weight * 0.9), hidden, hidden)
        return [x.cpu() for x in (*head_topk(head, hidden, 5), columns)]

    for ours, expected in zip(values("cuda"), values("cpu"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_autocast_gives_gradients_in_the_inputs_dtype() -> None:
    hidden, weight = (draw(n, WIDTH, device="cuda").requires_grad_() for n in (TOKENS, VOCAB))
    ids = torch.arange(TOKENS, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = logprob_loss(LMHead(weight), hidden, ids, lambda logprobs, rows: -logprobs.sum())
    loss.backward()
    exact = -LMHead(weight.detach()).logprobs(hidden.detach()).gather(1, ids[:, None]).sum()
    # A bfloat16 logit is off by 2**-8 of itself at most, a log-probability by twice the largest logit's share of it.
    largest = float((hidden @ weight.T).detach().abs().max())
    assert abs(float((loss - exact).detach())) <= TOKENS * 2 * 2**-8 * largest
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_memory_does_not_grow_with_tokens() -> None:
    def peak(tokens: int) -> int:
        hidden, weight = (draw(n, WIDTH, device="cuda").requires_grad_() for n in (tokens, 100_000))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ids = torch.zeros(tokens, dtype=torch.long, device="cuda")
        logprob_loss(LMHead(weight), hidden, ids, lambda logprobs, rows: -logprobs.sum())[0].backward()
        return torch.cuda.max_memory_allocated() - before

    # Beyond a block, only what is [N, H] grows: hidden states' gradients and a few numbers per token.
    assert peak(16_384) - peak(4096) < 12_288 * (WIDTH + 32) * 4 < 12_288 * 100_000

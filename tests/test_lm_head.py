"""Hidden states to log-probabilities, whole or in slices."""

import math

import pytest
import torch
from torch import Tensor

from understudy import lm_head
from understudy.lm_head import LMHead, divergence_from_hidden, head_logprobs, in_slices, selected_logprobs
from understudy.losses import distribution_divergence


def tensors(rows: int = 5, width: int = 4, vocab_size: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, width), (vocab_size, width), (vocab_size,)]
    floats = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [*floats, torch.randint(vocab_size, (rows,), generator=generator)]


def test_logits_by_hand() -> None:
    hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert LMHead(weight).logits(hidden).tolist() == [[1.0, 2.0, 3.0]]
    assert LMHead(weight, bias=torch.tensor([10.0, 0.0, -1.0])).logits(hidden).tolist() == [[11.0, 2.0, 2.0]]
    assert LMHead(weight, scale=0.5).logits(hidden).tolist() == [[0.5, 1.0, 1.5]]
    capped = LMHead(weight, softcap=2.0, scale=2.0).logits(hidden)  # scaled first: 2, 4, 6
    assert capped[0].tolist() == pytest.approx([2 * math.tanh(x) for x in (1.0, 2.0, 3.0)])
    total = math.log(sum(math.exp(x / 0.5) for x in (1, 2, 3)))
    assert LMHead(weight).logprobs(hidden, temperature=0.5)[0].tolist() == pytest.approx(
        [x / 0.5 - total for x in (1, 2, 3)]
    )


def test_a_sliced_head_renormalises() -> None:
    hidden, weight, bias, _ = tensors()
    head = LMHead(weight, bias, softcap=1.5, scale=2.0).sliced(3)
    expected = LMHead(weight, bias, softcap=1.5, scale=2.0).logits(hidden)[:, :3].log_softmax(-1)
    torch.testing.assert_close(head.logprobs(hidden), expected)
    assert head.logprobs(hidden).exp().sum(-1).tolist() == pytest.approx([1.0] * 5)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 1.5}, {"scale": 0.3, "temperature": 2.0}])
def test_selected_logprobs_are_entries_of_the_log_softmax(options: dict[str, float]) -> None:
    hidden, weight, bias, ids = tensors()
    shape = {name: value for name, value in options.items() if name != "temperature"}
    temperature = options.get("temperature", 1.0)
    for offset in (None, bias):
        table = LMHead(weight, offset, **shape).logprobs(hidden, temperature=temperature)
        chosen = selected_logprobs(hidden, weight, ids, bias=offset, **options)
        torch.testing.assert_close(chosen, table[torch.arange(5), ids])


@pytest.mark.parametrize("max_logits", [1, 7, 20, 34])
def test_slices_change_neither_value_nor_gradient(max_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 rows of 7 logits as 5, 5, 3 and 2 slices."""

    def run() -> list[Tensor]:
        hidden, weight, bias, ids = tensors()
        leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
        logprobs = head_logprobs(LMHead(weight, bias, softcap=2.0), hidden, ids, temperature=0.8)
        (logprobs * torch.arange(5)).sum().backward()
        return [logprobs.detach(), *(x.grad for x in leaves if x.grad is not None)]

    whole = run()
    seen: list[int] = []
    logits = LMHead.logits
    monkeypatch.setattr(
        LMHead, "logits", lambda head, hidden: (seen.append(hidden.numel() // 4), logits(head, hidden))[1]
    )
    monkeypatch.setattr(lm_head, "MAX_LOGITS", max_logits)
    for one, other in zip(whole, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert max(seen) == max(1, max_logits // 7)
    assert sum(seen) == 10  # forwards, and again backwards


def test_one_slice_is_not_recomputed() -> None:
    calls = []
    hidden = torch.ones(3, 2, requires_grad=True)
    [result] = in_slices(lambda x: (calls.append(1), x * 2)[1], [hidden], vocab_size=4)
    result.sum().backward()
    assert len(calls) == 1


def test_no_rows_give_no_logprobs() -> None:
    _, weight, _, _ = tensors()
    ids = torch.zeros(0, dtype=torch.long)
    assert head_logprobs(LMHead(weight), torch.zeros(0, 4, dtype=torch.float64), ids).shape == (0,)


@pytest.mark.parametrize(("given", "wanted"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_log_softmax_is_float32_or_wider(given: str, wanted: str) -> None:
    hidden, weight, bias, ids = tensors(dtype=getattr(torch, given))
    head = LMHead(weight, bias)
    assert head.logits(hidden).dtype == head.logprobs(hidden).dtype == getattr(torch, wanted)
    assert head_logprobs(head, hidden, ids).dtype == getattr(torch, wanted)
    assert float(head.logprobs(hidden).double().exp().sum(-1).sub(1).abs().max()) < 1e-6


def test_divergence_from_hidden_equals_the_divergence_of_its_logits():
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student_hidden, teacher_hidden, student_weight, teacher_weight = draw(5, 4), draw(5, 3), draw(7, 4), draw(7, 3)
    mask = torch.tensor([True, False, True, True, True])
    p, q = (student_hidden @ student_weight.T).softmax(-1), (teacher_hidden @ teacher_weight.T).softmax(-1)
    expected = (p * (p / q).log()).sum(-1)[mask]
    arguments = (student_hidden, student_weight, teacher_hidden, teacher_weight, mask)
    assert divergence_from_hidden(*arguments).loss.item() == pytest.approx(expected.sum().item(), abs=1e-12)
    mean = divergence_from_hidden(*arguments, reduction="mean").loss.item()
    assert mean == pytest.approx(expected.mean().item(), abs=1e-12)
    with pytest.raises(ValueError, match="forward_kl"):
        divergence_from_hidden(*arguments, kind="forward_kl")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="jsd"):
        distribution_divergence(p.log(), q.log(), mask, kind="jsd")  # pyright: ignore[reportArgumentType]

"""Log-probabilities, losses and divergences from hidden states: tiles against dense logits."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from understudy import head_kernels
from understudy.divergences import KINDS, Divergence
from understudy.errors import ZeroProbabilityError
from understudy.lm_head import (
    LMHead,
    divergence_columns,
    divergence_from_hidden,
    head_divergence,
    head_logprobs,
    head_topk,
    logprob_loss,
    selected_logprobs,
)
from understudy.losses import distribution_divergence

N, H, V = 5, 4, 7
DIVERGENCES = [
    *map(Divergence, KINDS[:-1]),
    Divergence("jsd", beta=0.2),
    Divergence("entropy_gated", entropy_threshold=1.5),
]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def draw_ids(*shape: int, vocab_size: int = V) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in tensors]


@pytest.fixture(params=[(1, 1, 1), (3, 2, 2), (7, 5, 1), (2, 3, 4)])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int]:
    """Tiles of 1, 3, 7 and 2 of seven ids; blocks of 1, 2, 5 and 3 of five tokens."""
    width, rows, kept = request.param
    set_tiles(monkeypatch, width, rows, kept * V * 8)
    return request.param


def set_tiles(patch: pytest.MonkeyPatch, width: int, rows: int, block_bytes: int) -> None:
    for name, value in (("TILE_WIDTH", width), ("TILE_ROWS", rows), ("BLOCK_BYTES", block_bytes)):
        patch.setattr(head_kernels, name, value)


def dense(student: LMHead, teacher: LMHead, states: tuple[Tensor, Tensor], mask: Tensor, **options: Any):
    """The divergence of whole logits."""
    divergence, temperature = options.pop("divergence"), options.pop("temperature", 1.0)
    logits = [head.logits(x) / temperature for head, x in zip((student, teacher), states, strict=True)]
    fields = {name: getattr(divergence, name) for name in ("kind", "beta", "skew", "entropy_threshold")}
    return distribution_divergence(*logits, mask, **fields, **options)


# LMHead


def test_logits_by_hand() -> None:
    hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert LMHead(weight).logits(hidden).tolist() == [[1.0, 2.0, 3.0]]
    assert LMHead(weight, bias=torch.tensor([10.0, 0.0, -1.0])).logits(hidden).tolist() == [[11.0, 2.0, 2.0]]
    assert LMHead(weight, scale=0.5).logits(hidden).tolist() == [[0.5, 1.0, 1.5]]
    assert LMHead(weight, rows=2).logits(hidden).tolist() == [[1.0, 2.0]]
    capped = LMHead(weight, softcap=2.0, scale=2.0).logits(hidden)  # scaled first: 2, 4, 6
    assert capped[0].tolist() == pytest.approx([2 * math.tanh(x) for x in (1.0, 2.0, 3.0)])
    total = math.log(sum(math.exp(x / 0.5) for x in (1, 2, 3)))
    assert LMHead(weight).logprobs(hidden, temperature=0.5)[0].tolist() == pytest.approx(
        [x / 0.5 - total for x in (1, 2, 3)]
    )


def test_a_sliced_head_renormalises_and_keeps_its_weight() -> None:
    weight, bias = draw(V, H), draw(V)
    whole = LMHead(weight, bias, softcap=1.5, scale=2.0)
    head = whole.sliced(3)
    torch.testing.assert_close(head.logprobs(draw(N, H)), whole.logits(draw(N, H))[:, :3].log_softmax(-1))
    assert head.vocab_size == 3
    assert head.weight is weight
    assert whole.sliced(V) is whole
    with pytest.raises(ValueError, match="got rows = 8; expected 1 to the weight's 7"):
        whole.sliced(8)


@pytest.mark.parametrize(("given", "wanted"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_log_softmax_is_float32_or_wider(given: str, wanted: str) -> None:
    dtype = getattr(torch, given)
    head, hidden, ids = LMHead(draw(V, H, dtype=dtype), draw(V, dtype=dtype)), draw(N, H, dtype=dtype), draw_ids(N)
    outputs = [
        head.logits(hidden),
        head.logprobs(hidden),
        head_logprobs(head, hidden, ids),
        head_topk(head, hidden, 2)[0],
        *logprob_loss(head, hidden, ids, lambda logprobs, rows: logprobs.sum()),
        divergence_columns(head, head, hidden, hidden, torch.ones(N, dtype=torch.bool)),
    ]
    assert {x.dtype for x in outputs} == {getattr(torch, wanted)}
    assert float(head.logprobs(hidden).double().exp().sum(-1).sub(1).abs().max()) < 1e-6


# Log-probabilities of given tokens

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"softcap": 1.5, "scale": 2.0},
    {"scale": 0.3, "temperature": 2.0, "rows": 6},
    {"softcap": 2.0, "temperature": 0.8, "rows": 3},
]


def split(options: dict[str, Any]) -> tuple[dict[str, Any], float]:
    return {name: value for name, value in options.items() if name != "temperature"}, options.get("temperature", 1.0)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("biased", [False, True])
def test_selected_logprobs_are_entries_of_the_log_softmax(options: dict[str, Any], biased: bool, tiles) -> None:
    shape, temperature = split(options)
    bias, ids = draw(V) if biased else None, draw_ids(N, 2, vocab_size=shape.get("rows", V))
    table = LMHead(draw(V, H), bias, **shape).logprobs(draw(N, H), temperature=temperature)
    given = {"vocab_size" if name == "rows" else name: value for name, value in options.items()}
    chosen = selected_logprobs(draw(N, H), draw(V, H), ids, bias=bias, **given)
    torch.testing.assert_close(chosen, table.gather(1, ids), rtol=0, atol=1e-12)
    one = selected_logprobs(draw(N, H), draw(V, H), ids[:, 0], bias=bias, **given)
    torch.testing.assert_close(one, chosen[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_of_logprobs_and_losses(options: dict[str, Any], tiles) -> None:
    shape, temperature = split(options)
    ids = draw_ids(N, 3, vocab_size=shape.get("rows", V))
    ids[0] = ids[0, 0]  # one token, three times
    weights = draw(N, 3)

    def selected(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return head_logprobs(LMHead(weight, bias, **shape), hidden, ids, temperature=temperature)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        def of_block(logprobs: Tensor, rows: slice) -> Tensor:
            return (logprobs.exp() * weights[rows]).sum()

        return logprob_loss(LMHead(weight, bias, **shape), hidden, ids, of_block, temperature=temperature)[0]

    inputs = leaves(draw(N, H), draw(V, H), draw(V))
    assert torch.autograd.gradcheck(selected, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
    torch.testing.assert_close(loss(*inputs), (selected(*inputs).exp() * weights).sum(), rtol=1e-12, atol=0)


def test_a_loss_sees_its_rows_and_no_more(tiles) -> None:
    head, hidden, ids = LMHead(draw(V, H).requires_grad_()), draw(N, H), draw_ids(N)
    seen: list[tuple[int, int, list[float]]] = []

    def of_block(logprobs: Tensor, rows: slice) -> Tensor:
        seen.append((rows.start, rows.stop, logprobs.tolist()))
        return (logprobs * torch.arange(N)[rows]).sum()

    loss, logprobs = logprob_loss(head, hidden, ids, of_block)
    expected = head.logprobs(hidden).gather(1, ids[:, None])[:, 0]
    kept = tiles[2]
    assert [(low, high) for low, high, _ in seen] == [(i, min(i + kept, N)) for i in range(0, N, kept)]
    assert [x for *_, part in seen for x in part] == logprobs.tolist()
    assert not logprobs.requires_grad
    torch.testing.assert_close(logprobs, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, (expected * torch.arange(N)).sum(), rtol=1e-12, atol=0)


def test_a_block_where_nothing_trains_adds_its_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, 3, 2, 2 * V * 8)  # blocks of 2, 2 and 1
    weight = draw(V, H).requires_grad_()
    ids = draw_ids(N)

    def of_block(logprobs: Tensor, rows: slice) -> Tensor:
        return torch.tensor(3.0) if rows.start == 2 else logprobs.sum()

    loss, logprobs = logprob_loss(LMHead(weight), draw(N, H), ids, of_block)
    loss.backward()
    others = torch.tensor([0, 1, 4])
    assert loss.item() == pytest.approx(3 + logprobs[others].sum().item())
    (expected,) = torch.autograd.grad(selected_logprobs(draw(N, H)[others], weight, ids[others]).sum(), weight)
    torch.testing.assert_close(weight.grad, expected)


def test_without_gradients_there_are_values_only(tiles) -> None:
    head, ids = LMHead(draw(V, H).requires_grad_()), draw_ids(N)
    with torch.no_grad():
        loss, logprobs = logprob_loss(head, draw(N, H), ids, lambda logprobs, rows: logprobs.sum())
    assert not loss.requires_grad
    torch.testing.assert_close(logprobs, head_logprobs(head, draw(N, H), ids).detach(), rtol=0, atol=1e-12)
    assert not logprob_loss(LMHead(draw(V, H)), draw(N, H), ids, lambda x, rows: x.sum())[0].requires_grad


@pytest.mark.parametrize("k", [1, 3, 7, 20])
def test_topk_are_the_best_of_the_log_softmax(k: int, tiles) -> None:
    head = LMHead(draw(V, H), draw(V), softcap=3.0, rows=6)
    logprobs, ids = head_topk(head, draw(N, H), k, temperature=0.7)
    expected = head.logprobs(draw(N, H), temperature=0.7).topk(min(k, 6))
    torch.testing.assert_close(logprobs, expected.values, rtol=0, atol=1e-12)
    assert ids.tolist() == expected.indices.tolist()


# Divergences


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.beta}")
@pytest.mark.parametrize("options", [{}, {"bias": draw(9), "softcap": 1.5, "scale": 0.7, "rows": V}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_divergences_equal_those_of_whole_logits(
    divergence: Divergence, options: dict[str, Any], dtype: torch.dtype, tiles
) -> None:
    """Values, metrics and gradients; the teacher is wider, scaled and padded to another length."""
    options = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in options.items()}
    mask, weights = torch.tensor([True, False, True, True, True]), draw(N, dtype=dtype)
    teacher = LMHead(draw(8, 3, dtype=dtype), softcap=4.0, scale=1.3, rows=V)
    results = []
    for function in (head_divergence, dense):
        hidden, weight = leaves(draw(N, H, dtype=dtype), draw(9 if "rows" in options else V, H, dtype=dtype))
        student, states = LMHead(weight, **options), (hidden, draw(N, 3, dtype=dtype))
        own = {"divergence": divergence, "weights": weights, "temperature": 0.8}
        if function is dense:
            output = dense(student, teacher, states, mask, **own)
        else:
            output = head_divergence(student, teacher, *states, mask, **own)
        output.loss.backward()
        results.append((output, hidden.grad, weight.grad))
    (ours, *gradients), (expected, *expected_gradients) = results
    # float32: a few roundings of logits of up to 4.
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    assert ours.loss.dtype == dtype
    assert ours.loss.item() == pytest.approx(expected.loss.item(), abs=tolerance)
    assert ours.metrics == pytest.approx(expected.metrics, abs=tolerance)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.beta}")
def test_gradcheck_of_divergences(divergence: Divergence, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, 3, 2, 2 * V * 8)
    mask = torch.tensor([True, False, True, True, True])

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        student = LMHead(weight, bias, softcap=2.0, scale=1.2, rows=6)
        teacher = LMHead(draw(6, 3))
        return head_divergence(student, teacher, hidden, draw(N, 3), mask, divergence=divergence, temperature=0.9).loss

    assert torch.autograd.gradcheck(loss, leaves(draw(N, H), draw(V, H), draw(V)), fast_mode=True)


def test_the_same_model_is_at_distance_zero() -> None:
    """Exactly, in value and gradient, whatever the divergence."""
    for divergence in DIVERGENCES:
        hidden, weight = leaves(draw(N, H, dtype=torch.float32), draw(V, H, dtype=torch.float32))
        head, mask = LMHead(weight), torch.ones(N, dtype=torch.bool)
        output = head_divergence(head, head, hidden, hidden.detach(), mask, divergence=divergence)
        output.loss.backward()
        assert output.loss.item() == 0
        assert hidden.grad is not None
        assert not hidden.grad.any()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.beta}")
def test_columns_are_the_metrics_position_by_position(divergence: Divergence, tiles) -> None:
    student, teacher, states = LMHead(draw(V, H)), LMHead(draw(V, 3)), (draw(N, H), draw(N, 3))
    everywhere = torch.ones(N, dtype=torch.bool)
    columns = divergence_columns(student, teacher, *states, everywhere, divergence=divergence, temperature=0.8)
    assert not columns.requires_grad
    some = torch.arange(N) % 2 == 0
    masked = divergence_columns(student, teacher, *states, some, divergence=divergence, temperature=0.8)
    torch.testing.assert_close(masked, torch.where(some[:, None], columns, 0.0))
    for n in range(N):
        mask = torch.arange(N) == n
        expected = dense(student, teacher, states, mask, divergence=divergence, temperature=0.8).metrics
        assert columns[n].tolist() == pytest.approx(list(expected.values()), abs=1e-12)


def test_divergence_from_hidden_by_hand() -> None:
    arguments = draw(N, H), draw(V, H), draw(N, 3), draw(V + 1, 3)
    mask = torch.tensor([True, False, True, True, True])
    logits = (arguments[0] @ arguments[1].T / 0.8)[:, :6], (arguments[2] @ arguments[3].T / 0.8)[:, :6]
    p, q = (x.softmax(-1) for x in logits)
    expected = (p * (p / q).log()).sum(-1)[mask]
    shared = {"vocab_size": 6, "temperature": 0.8}
    assert divergence_from_hidden(*arguments, mask, **shared).loss.item() == pytest.approx(expected.sum().item())
    mean = divergence_from_hidden(*arguments, mask, reduction="mean", **shared)
    assert mean.loss.item() == pytest.approx(expected.mean().item())
    middle = 0.3 * q + 0.7 * p
    jsd = ((0.3 * q * (q / middle).log() + 0.7 * p * (p / middle).log()) / 0.21).sum(-1)[mask]
    assert divergence_from_hidden(*arguments, mask, kind="jsd", beta=0.3, **shared).loss.item() == pytest.approx(
        jsd.sum().item()
    )
    with pytest.raises(ValueError, match="got kind 'hellinger'"):
        divergence_from_hidden(*arguments, mask, kind="hellinger", **shared)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"student's head over 7 ids and a teacher's over 8.*one vocabulary"):
        divergence_from_hidden(*arguments, mask)


def test_masked_positions_may_hold_anything(tiles) -> None:
    mask = torch.tensor([True, False, True, False, True])
    results = []
    for filler in (0.0, math.nan, math.inf):
        states = [x.masked_fill(~mask[:, None], filler) for x in (draw(N, H), draw(N, 3))]
        hidden, weight = leaves(states[0], draw(V, H))
        weights = draw(N).masked_fill(~mask, filler)
        output = head_divergence(LMHead(weight), LMHead(draw(V, 3)), hidden, states[1], mask, weights=weights)
        output.loss.backward()
        results.append([output.loss.detach(), hidden.grad, weight.grad, torch.tensor(list(output.metrics.values()))])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)
    assert not results[0][1][~mask].any()


def test_infinite_divergences_name_their_position(tiles) -> None:
    banned = torch.zeros(V, dtype=torch.float64)
    banned[2:] = -math.inf  # whole tiles of it
    mask = torch.tensor([False, False, True, True, True])
    free, cut = LMHead(draw(V, H)), LMHead(draw(V, H), banned)
    with pytest.raises(ZeroProbabilityError, match=r"position 2: the teacher gives token \d probability zero"):
        head_divergence(free, cut, draw(N, H), draw(N, H), mask)
    with pytest.raises(ZeroProbabilityError, match=r"position 2: the student gives token \d probability zero"):
        head_divergence(cut, free, draw(N, H), draw(N, H), mask, divergence=Divergence("forward_kl"))
    overflow = draw(N, H)
    overflow[3, 0] = math.inf
    with pytest.raises(ZeroProbabilityError, match=r"position 3: the divergence is nan.*overflowed"):
        head_divergence(free, free, overflow, draw(N, H), mask)
    # The student may leave out what the teacher knows (reverse KL), and both may leave out the same.
    for student, teacher in ((cut, free), (cut, cut)):
        hidden = draw(N, H).requires_grad_()
        head_divergence(student, teacher, hidden, draw(N, H, seed=1), mask).loss.backward()
        assert hidden.grad is not None
        assert hidden.grad.isfinite().all()
    with pytest.raises(ZeroProbabilityError, match=r"position 2: the teacher gives token \d probability zero"):
        divergence_columns(free, cut, draw(N, H), draw(N, H), mask)


def test_a_closed_gate_keeps_an_infinite_forward_kl_out(tiles) -> None:
    """The student gives zero where a teacher that is sure of something else does not: the reverse KL is finite."""
    eye, banned = torch.eye(3, dtype=torch.float64), torch.tensor([0.0, -math.inf, 0.0], dtype=torch.float64)
    sure = torch.tensor([[20.0, 0.0, 0.0]], dtype=torch.float64)
    student, teacher = LMHead(eye, banned), LMHead(eye)
    gated = Divergence("entropy_gated", entropy_threshold=1.0)
    arguments = student, teacher, torch.zeros(1, 3, dtype=torch.float64), sure, torch.tensor([True])
    closed = head_divergence(*arguments, divergence=gated)
    assert closed.metrics["gate"] == 0
    assert float(closed.loss) == pytest.approx(float(head_divergence(*arguments).loss))
    with pytest.raises(ZeroProbabilityError, match="position 0: the student gives token 1 probability zero"):
        head_divergence(*arguments, divergence=Divergence("entropy_gated", entropy_threshold=0.0))


def test_banned_tokens_have_no_probability(tiles) -> None:
    bias = torch.zeros(V, dtype=torch.float64)
    bias[:4] = -math.inf
    head, ids = LMHead(draw(V, H), bias), torch.tensor([0, 4, 5, 6, 6])
    logprobs = head_logprobs(head, draw(N, H), ids)
    torch.testing.assert_close(logprobs, head.logprobs(draw(N, H)).gather(1, ids[:, None])[:, 0])
    assert logprobs[0] == -math.inf
    hidden = draw(N, H).requires_grad_()
    loss, same = logprob_loss(head, hidden, ids, lambda x, rows: x[x.isfinite()].sum())
    (gradient,) = torch.autograd.grad(loss, hidden)
    expected = head.logprobs(hidden).gather(1, ids[:, None])[1:].sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, hidden)[0])
    assert torch.equal(same, logprobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_logits(dtype: torch.dtype, tiles) -> None:
    """Logits of up to +-10,000: certainty, not NaN."""
    weight = torch.linspace(-1e4, 1e4, V, dtype=dtype)[:, None]
    hidden = torch.tensor([[1.0], [-1.0], [0.5], [1e-4], [0.0]], dtype=dtype)
    ids, mask = draw_ids(N), torch.ones(N, dtype=torch.bool)
    own, head = leaves(hidden, weight), LMHead(weight)
    expected = head.logprobs(hidden).gather(1, ids[:, None])[:, 0]
    loss, logprobs = logprob_loss(LMHead(own[1]), own[0], ids, lambda x, rows: x.sum())
    for values in (logprobs, head_logprobs(head, hidden, ids)):
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    output = head_divergence(head, LMHead(weight * 0.9), hidden, hidden, mask)
    wanted = dense(head, LMHead(weight * 0.9), (hidden, hidden), mask, divergence=Divergence())
    # The second row from the end has logits of about 1, and float32 sums of them.
    assert output.loss.item() == pytest.approx(wanted.loss.item(), abs=1e-6)
    assert output.metrics == pytest.approx(wanted.metrics, abs=1e-6)
    assert all(x.grad is not None and x.grad.isfinite().all() for x in own)


# How the pieces sit in a training step


def step(loss: Callable[[Tensor, LMHead], Tensor], hidden: Tensor, head: LMHead) -> list[Tensor | None]:
    loss(hidden, head).backward()
    return [hidden.grad, head.weight.grad]


def losses(ids: Tensor, teacher: LMHead, teacher_hidden: Tensor) -> dict[str, Callable[[Tensor, LMHead], Tensor]]:
    mask = torch.ones(len(ids), dtype=torch.bool)
    return {
        "selected": lambda hidden, head: head_logprobs(head, hidden, ids).sum(),
        "loss": lambda hidden, head: logprob_loss(head, hidden, ids, lambda x, rows: x.sum())[0],
        "divergence": lambda hidden, head: head_divergence(head, teacher, hidden, teacher_hidden, mask).loss,
    }


NAMES = ["selected", "loss", "divergence"]


def chosen_loss(name: str, dtype: torch.dtype = torch.float64) -> Callable[[Tensor, LMHead], Tensor]:
    return losses(draw_ids(N), LMHead(draw(V, 3, dtype=dtype)), draw(N, 3, dtype=dtype))[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(name: str, frozen: int) -> None:
    inputs = leaves(draw(N, H), draw(V, H))
    full = step(chosen_loss(name), inputs[0], LMHead(inputs[1]))
    inputs = leaves(draw(N, H), draw(V, H))
    inputs[frozen].requires_grad_(False)
    part = step(chosen_loss(name), inputs[0], LMHead(inputs[1]))
    assert part[frozen] is None
    torch.testing.assert_close(part[1 - frozen], full[1 - frozen], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_tied_weight_adds_up_both_gradients(name: str) -> None:
    weight, prompt = draw(V, H).requires_grad_(), draw_ids(N)
    loss = chosen_loss(name)
    loss(weight[prompt], LMHead(weight)).backward()
    parts = leaves(draw(V, H), draw(V, H))
    loss(parts[0][prompt], LMHead(parts[1])).backward()
    assert parts[0].grad is not None
    assert parts[1].grad is not None
    torch.testing.assert_close(weight.grad, parts[0].grad + parts[1].grad)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_an_adapter_behind_the_weight(name: str) -> None:
    loss, base, (down, up) = chosen_loss(name), draw(V, H), leaves(draw(2, H), draw(V, 2))
    loss(draw(N, H), LMHead(base + 0.5 * up @ down)).backward()
    weight = (base + 0.5 * up @ down).detach().requires_grad_()
    loss(draw(N, H), LMHead(weight)).backward()
    assert weight.grad is not None
    torch.testing.assert_close(up.grad, 0.5 * weight.grad @ down.T)
    torch.testing.assert_close(down.grad, 0.5 * up.T @ weight.grad)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    loss = chosen_loss(name)
    plain, wrapped = leaves(draw(N, H), draw(V, H)), leaves(draw(N, H), draw(V, H))
    loss(plain[0].tanh(), LMHead(plain[1])).backward()
    value = checkpoint(lambda h, w: loss(h.tanh(), LMHead(w)), *wrapped, use_reentrant=reentrant)
    assert isinstance(value, Tensor)
    value.backward()
    for one, other in zip(plain, wrapped, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_can_be_scaled_and_run_backwards_twice(name: str) -> None:
    """A factor of 1 hands out the saved gradients themselves; accumulating into them must not change them."""
    hidden, weight = leaves(draw(N, H), draw(V, H))
    loss = chosen_loss(name)(hidden, LMHead(weight))
    (once,) = torch.autograd.grad(loss, weight, retain_graph=True)
    once = once.clone()
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, 3 * once)
    (3.0 * loss).backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, 6 * once)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], once, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_weights_gradient_is_handed_over_without_a_copy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    result = head_kernels.GradientSums.result

    def recorded(self: head_kernels.GradientSums, *inputs: Any) -> Any:
        gradients = result(self, *inputs)
        made.extend(x.data_ptr() for x in gradients if x is not None)
        return gradients

    monkeypatch.setattr(head_kernels.GradientSums, "result", recorded)
    hidden, weight = leaves(draw(N, H), draw(V, H))
    assert [x.data_ptr() for x in step(chosen_loss(name), hidden, LMHead(weight)) if x is not None] == made


@pytest.mark.parametrize("name", NAMES)
def test_autocast_multiplies_in_its_dtype_and_answers_in_ours(name: str) -> None:
    """As if hidden states and weights had been rounded to bfloat16 first; gradients come back in float32."""
    loss = chosen_loss(name, torch.float32)
    hidden, weight = leaves(draw(N, H, dtype=torch.float32), draw(V, H, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(hidden, LMHead(weight))
        value.backward()
    rounded = leaves(draw(N, H, dtype=torch.bfloat16), draw(V, H, dtype=torch.bfloat16))
    expected = chosen_loss(name, torch.bfloat16)(rounded[0], LMHead(rounded[1]))
    expected.backward()
    assert value.dtype == torch.float32
    assert value.item() == expected.item()
    for ours, other in zip((hidden, weight), rounded, strict=True):
        assert ours.grad is not None
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad.bfloat16(), other.grad, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):  # float64 is left alone, as autocast does
        assert chosen_loss(name)(draw(N, H), LMHead(draw(V, H))).dtype == torch.float64


def test_dtypes_must_agree_and_ids_must_exist() -> None:
    weight = draw(V, H, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"hidden states in torch.float64 and an LM head in torch.float32.*autocast"):
        selected_logprobs(draw(N, H), weight, draw_ids(N))
    with pytest.raises(ValueError, match="got token ids from 0 to 7; expected 0 to 6"):
        selected_logprobs(draw(1, H), draw(V, H), torch.tensor([[0, 7]]))
    with pytest.raises(ValueError, match="got token ids from -1 to -1; expected 0 to 2"):
        logprob_loss(LMHead(draw(V, H), rows=3), draw(1, H), torch.tensor([-1]), lambda x, rows: x.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_teacher_may_have_another_dtype(dtype: torch.dtype) -> None:
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    states, mask = (draw(N, H, dtype=dtype), draw(N, 3, dtype=other)), torch.ones(N, dtype=torch.bool)
    hidden, weight = leaves(states[0], draw(V, H, dtype=dtype))
    teacher = LMHead(draw(V, 3, dtype=other))
    output = head_divergence(LMHead(weight), teacher, hidden, states[1], mask)
    expected = dense(LMHead(weight), teacher, states, mask, divergence=Divergence())
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    output.loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype


def test_no_tokens_give_zeros() -> None:
    none = torch.zeros(0, dtype=torch.long)
    for name in NAMES:
        hidden, weight = leaves(draw(N, H)[:0], draw(V, H))
        loss = losses(none, LMHead(draw(V, 3)), draw(N, 3)[:0])[name](hidden, LMHead(weight))
        loss.backward()
        assert loss.item() == 0
        assert weight.grad is not None
        assert not weight.grad.any()
    head = LMHead(draw(V, H))
    assert head_logprobs(head, draw(N, H)[:0], none).shape == (0,)
    assert [x.shape for x in head_topk(head, draw(N, H)[:0], 3)] == [(0, 3), (0, 3)]
    assert divergence_columns(head, head, draw(N, H)[:0], draw(N, H)[:0], torch.ones(0, dtype=torch.bool)).shape == (
        0,
        3,
    )
    nobody = torch.zeros(N, dtype=torch.bool)
    output = head_divergence(head, head, draw(N, H), draw(N, H), nobody, divergence=DIVERGENCES[-1])
    assert output.loss.item() == 0
    assert set(output.metrics.values()) == {0.0}


@pytest.mark.parametrize("name", NAMES)
def test_repetition_is_bit_identical(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, 3, 2, 2 * V * 4)
    runs = []
    for _ in range(2):
        hidden, weight = leaves(draw(N, H, dtype=torch.float32), draw(V, H, dtype=torch.float32))
        runs.append(step(chosen_loss(name, torch.float32), hidden, LMHead(weight)))
    for one, other in zip(*runs, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_off_by_its_logits_roundings(name: str) -> None:
    """Logits come out of a bfloat16 product with a relative error of 2**-8 at most: so much of the largest logit moves
    a log-probability by no more than twice that. Gradients are rounded once more per tile and block."""
    states, weights = (draw(64, 32, dtype=torch.bfloat16), draw(300, 32, dtype=torch.bfloat16, scale=0.3))
    ids = draw_ids(64, vocab_size=300)
    teacher, teacher_states = draw(300, 16, dtype=torch.bfloat16, scale=0.3), draw(64, 16, dtype=torch.bfloat16)
    largest = max(float((states.double() @ weights.double().T).abs().max()), 1.0)
    rounding = 2 * 2**-8 * largest
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        hidden, weight = leaves(states.to(dtype), weights.to(dtype))
        value = losses(ids, LMHead(teacher.to(dtype)), teacher_states.to(dtype))[name](hidden, LMHead(weight))
        value.backward()
        results.append([value.detach().double(), hidden.grad, weight.grad])
    assert abs(results[0][0] - results[1][0]) <= 64 * 2 * rounding
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error <= rounding


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation returned, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            self.numbers = max(self.numbers, x.numel() if isinstance(x, Tensor) else 0)
        return result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_grows_with_tokens_times_vocabulary(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """120 tokens, 200 ids, blocks of 10 tokens: nothing beyond two blocks of logits, or inputs and their gradients."""
    tokens, vocab_size = 120, 200
    set_tiles(monkeypatch, 16, 10, 10 * vocab_size * 4)
    hidden, weight = leaves(draw(tokens, 8, dtype=dtype), draw(vocab_size, 8, dtype=dtype))
    teacher = LMHead(draw(vocab_size, 8, dtype=dtype))
    loss = losses(draw_ids(tokens, vocab_size=vocab_size), teacher, draw(tokens, 8, dtype=dtype))[name]
    with Largest() as largest:
        loss(hidden, LMHead(weight)).backward()
    assert largest.numbers <= 2 * 10 * vocab_size < tokens * vocab_size


def test_only_padding_is_left_out_of_a_gradient() -> None:
    """A head restricted to its first ids gives a gradient of the whole weight's shape, zero beyond them."""
    for name in NAMES:
        weight, part = leaves(draw(V + 2, H), draw(V + 2, H)[:V])
        step(chosen_loss(name), draw(N, H).requires_grad_(), LMHead(weight, rows=V))
        step(chosen_loss(name), draw(N, H).requires_grad_(), LMHead(part))
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad[:V], part.grad, rtol=0, atol=0)
        assert not weight.grad[V:].any()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_in_any_tiles(data: st.DataObject) -> None:
    numbers = st.integers(1, 9)
    tokens, width, vocab_size, k, tile, rows, kept = (data.draw(numbers) for _ in range(7))
    divergence = data.draw(st.sampled_from(DIVERGENCES))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    softcap = data.draw(st.sampled_from([None, 1.5]))
    ids, weights = draw_ids(tokens, k, vocab_size=vocab_size), draw(tokens, k)
    teacher, teacher_hidden = LMHead(draw(vocab_size, 3)), draw(tokens, 3)

    def both(ours: bool, hidden: Tensor, head: LMHead) -> Tensor:
        if not ours:
            chosen = (head.logprobs(hidden).gather(1, ids) * weights).sum()
            return chosen + dense(head, teacher, (hidden, teacher_hidden), mask, divergence=divergence).loss
        loss, _ = logprob_loss(head, hidden, ids, lambda x, rows: (x * weights[rows]).sum())
        output = head_divergence(head, teacher, hidden, teacher_hidden, mask, divergence=divergence)
        return loss + output.loss + 0 * head_logprobs(head, hidden, ids).sum()

    with pytest.MonkeyPatch.context() as patch:
        set_tiles(patch, tile, rows, kept * vocab_size * 8)
        results = []
        for ours in (True, False):
            hidden, weight = leaves(draw(tokens, width), draw(vocab_size, width))
            value = both(ours, hidden, LMHead(weight, softcap=softcap))
            value.backward()
            results.append((value.detach(), hidden.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)

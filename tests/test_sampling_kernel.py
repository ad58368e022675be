"""Draws from a softmax over a vocabulary: against the softmax itself, and against the inverse CDF in vocabulary order.

Vocabularies end inside a block, at its border and inside a later tile.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from understudy import sampling_kernel
from understudy.lm_head import LMHead, head_drawer
from understudy.sampling_kernel import BLOCK, TILE_IDS, Drawer, invert

WIDTH = 8
SIZES = [7, BLOCK, BLOCK + 1, 5000, 2 * TILE_IDS + 809]
OPTIONS = {
    "plain": {},
    "warm": {"temperature": 1.7},
    "bias": {"bias": True, "temperature": 0.6},
    "softcap": {"softcap": 2.5, "temperature": 0.8},
    "scale": {"scale": 0.3, "temperature": 0.4},
    "rows": {"spare": 70},
    "all": {"bias": True, "softcap": 3.0, "scale": 1.4, "temperature": 1.3, "spare": 7},
}


def head_of(
    size: int,
    *,
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
    spare: int = 0,
    seed: int = 0,
) -> LMHead:
    """A head over ``size`` ids with ``spare`` rows of padding, which would take nearly all the mass if they counted."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size + spare, WIDTH, generator=generator, dtype=torch.float64) * 0.5
    weight[size:] *= 20
    offsets = torch.randn(size + spare, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    return LMHead(weight.to(dtype), offsets, softcap, scale, size if spare else None)


def states(n: int, *, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def midpoints(n: int) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def inverse_cdf(logprobs: Tensor, uniforms: Tensor) -> list[int]:
    """Plainly: [V] float64, walked along in vocabulary order."""
    cumulative = logprobs.exp().cumsum(0)
    return [int((cumulative > u * cumulative[-1]).nonzero()[0]) for u in uniforms]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("size", SIZES)
def test_draws_are_the_inverse_cdf_in_vocabulary_order(size: int, options: dict) -> None:
    """In float64, on the midpoints of equal intervals: every token and its log-probability."""
    settings = dict(options)
    temperature = settings.pop("temperature", 1.0)
    head, [hidden] = head_of(size, **settings), states(1)
    expected = head.logprobs(hidden[None], temperature=temperature)[0]
    uniforms = midpoints(300)
    ids, logprobs = head_drawer(head, 300, temperature=temperature).draw(hidden.expand(300, -1), uniforms)
    assert ids.tolist() == inverse_cdf(expected, uniforms)
    torch.testing.assert_close(logprobs, expected[ids], rtol=0, atol=1e-12)
    assert logprobs.dtype == torch.float64
    assert len(set(ids.tolist())) > 5


@pytest.mark.parametrize("size", SIZES)
def test_float32_draws_lie_in_their_interval(size: int) -> None:
    """Sums of float32 exponentials: an interval's ends move by rounding and no more."""
    head, hidden = head_of(size, dtype=torch.float32, bias=True), states(200, dtype=torch.float32)
    uniforms = torch.rand(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ids, logprobs = head_drawer(head, 200, temperature=0.7).draw(hidden, uniforms)
    table = (head.logits(hidden).double() / 0.7).log_softmax(-1)
    high = table.exp().cumsum(-1).gather(1, ids[:, None])[:, 0]
    own = table.gather(1, ids[:, None])[:, 0]
    assert bool((uniforms < high + 1e-6).all())
    assert bool((uniforms > high - own.exp() - 1e-6).all())
    torch.testing.assert_close(logprobs, head.logprobs(hidden, temperature=0.7).gather(1, ids[:, None])[:, 0])
    torch.testing.assert_close(logprobs.double(), own, rtol=0, atol=2e-6)
    assert logprobs.dtype == torch.float32


def chi_square(ids: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; tokens that are expected fewer than 20 times share classes."""
    classes = int(probabilities.sum() * len(ids)) // 20
    order = probabilities.argsort(descending=True)
    label = torch.empty_like(order)
    # Classes of like mass: tokens in falling order go to the class that has least, which is the next one in turn.
    label[order] = torch.arange(len(order)) % min(classes, len(order), 60)
    observed = torch.zeros(int(label.max()) + 1, dtype=torch.float64).index_add_(
        0, label[ids], torch.ones(len(ids), dtype=torch.float64)
    )
    expected = torch.zeros_like(observed).index_add_(0, label, probabilities * len(ids))
    assert float(expected.min()) > 5
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("size", SIZES)
def test_frequencies_are_the_softmax(size: int, options: dict, dtype: torch.dtype) -> None:
    """Chi-square of 8000 draws, by classes of tokens from all over the vocabulary and by ranges of ids."""
    settings = dict(options)
    temperature = settings.pop("temperature", 1.0)
    head, hidden = head_of(size, dtype=dtype, **settings), states(1, dtype=dtype)
    generator = torch.Generator().manual_seed(size)
    drawer = head_drawer(head, 400, temperature=temperature)
    draws = [
        drawer.draw(hidden.expand(400, -1), torch.rand(400, generator=generator, dtype=torch.float64))[0]
        for _ in range(20)
    ]
    ids = torch.cat(draws)
    probabilities = (head.logits(hidden)[0].double() / temperature).softmax(0)
    statistic, freedom = chi_square(ids, probabilities)
    # Mean and variance of chi-square are its degrees of freedom and twice that: four deviations are one in ten
    # thousand.
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    edges = torch.arange(0, size, max(1, size // 7))
    for low, high in zip(edges, [*edges[1:], size], strict=True):
        share = float(probabilities[low:high].sum())
        found = float(((ids >= low) & (ids < high)).double().mean())
        assert found == pytest.approx(share, abs=4 * (share * (1 - share) / len(ids)) ** 0.5)


def test_bfloat16_log_probabilities_are_those_of_the_heads_rounded_logits() -> None:
    head, hidden = head_of(5000, dtype=torch.bfloat16, bias=True), states(64, dtype=torch.bfloat16)
    uniforms = midpoints(64)
    ids, logprobs = head_drawer(head, 64).draw(hidden, uniforms)
    assert logprobs.dtype == torch.float32
    logits = head.logits(hidden)
    expected = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    # The head multiplies in tiles: a product that is summed in another order may round to bfloat16's other neighbour.
    spacing = 2.0**-8 * float(logits.abs().max())
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=2 * spacing)
    assert float((logprobs - expected).abs().mean()) < 0.1 * spacing
    # Float32 hidden states are rounded first, as the head's product would.
    again, _ = head_drawer(head, 64).draw(hidden.float(), uniforms)
    assert again.tolist() == ids.tolist()


@pytest.mark.parametrize("tile", [BLOCK, 3 * BLOCK, 10 * BLOCK])
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    head, hidden, uniforms = head_of(1200, bias=True), states(50), midpoints(50)
    expected = head_drawer(head, 50).draw(hidden, uniforms)
    monkeypatch.setattr(sampling_kernel, "TILE_IDS", tile)
    ids, logprobs = head_drawer(head, 50).draw(hidden, uniforms)
    assert ids.tolist() == expected[0].tolist()
    torch.testing.assert_close(logprobs, expected[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_and_tiles_without_any_mass(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """-inf logits: the first block, a whole tile in the middle, all but two tokens of a block, the end."""
    monkeypatch.setattr(sampling_kernel, "TILE_IDS", 2 * BLOCK)
    logits = torch.randn(9 * BLOCK + 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    for start, stop in ((0, BLOCK), (2 * BLOCK, 4 * BLOCK), (4 * BLOCK + 2, 5 * BLOCK), (8 * BLOCK, 9 * BLOCK + 5)):
        logits[start:stop] = -torch.inf
    head = LMHead(torch.zeros(len(logits), 1, dtype=dtype), bias=logits)
    uniforms = torch.cat([torch.tensor([0.0, 2.0**-60, 1 - 2.0**-53], dtype=torch.float64), midpoints(400)])
    ids, logprobs = head_drawer(head, 403).draw(torch.zeros(403, 1, dtype=dtype), uniforms)
    allowed = logits.isfinite().nonzero()[:, 0].tolist()
    assert set(ids.tolist()) <= set(allowed)
    assert ids[:3].tolist() == [allowed[0], allowed[0], allowed[-1]]
    torch.testing.assert_close(logprobs, logits.log_softmax(0)[ids])
    if dtype == torch.float64:
        assert ids[3:].tolist() == inverse_cdf(logits.log_softmax(0), midpoints(400))
    [best], _ = head_drawer(head, 1).draw(torch.zeros(1, 1, dtype=dtype), None)
    assert int(best) == int(logits.argmax())


def test_a_single_token_with_all_the_mass() -> None:
    for size in SIZES:
        for only in (0, size // 2, size - 1):
            logits = torch.full((size,), -torch.inf)
            logits[only] = -5.0
            head = LMHead(torch.zeros(size, 1), bias=logits)
            uniforms = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
            ids, logprobs = head_drawer(head, 3).draw(torch.zeros(3, 1), uniforms)
            assert ids.tolist() == [only] * 3
            assert logprobs.tolist() == [0.0] * 3


@pytest.mark.parametrize("size", SIZES)
def test_rows_do_not_matter_to_each_other(size: int) -> None:
    """Fewer rows than the drawer was made for, after more of them: nothing of an earlier draw is left over."""
    head, hidden, uniforms = head_of(size, bias=True), states(20), midpoints(20)
    drawer = head_drawer(head, 20)
    ids, logprobs = drawer.draw(hidden, uniforms)
    for n in (1, 3, 20, 7):
        fewer, own = drawer.draw(hidden[:n], uniforms[:n])
        assert fewer.tolist() == ids[:n].tolist()
        torch.testing.assert_close(own, logprobs[:n], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_greedy_takes_the_likeliest(size: int) -> None:
    head, hidden = head_of(size, bias=True, softcap=4.0), states(30)
    ids, logprobs = head_drawer(head, 30).draw(hidden, None)
    expected = head.logprobs(hidden)
    assert ids.tolist() == expected.argmax(-1).tolist()
    torch.testing.assert_close(logprobs, expected.amax(-1), rtol=0, atol=1e-12)


def test_storage_is_allocated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a vocabulary needs is there before the first draw."""
    head, hidden, uniforms = head_of(9000), states(4), midpoints(4)
    drawer = head_drawer(head, 4)
    places = {getattr(drawer, name).data_ptr() for name in ("_storage", "_scratch")}
    seen: list[int] = []
    blocks = Drawer._blocks

    def watched(self: Drawer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result = blocks(self, hidden)
        seen.append(result[0].data_ptr())
        return result

    monkeypatch.setattr(Drawer, "_blocks", watched)
    for _ in range(3):
        drawer.draw(hidden, uniforms)
    assert set(seen) <= places
    assert len(seen) == 3


@pytest.mark.parametrize("size", SIZES)
def test_weights_that_are_not_numbers_draw_ids_of_the_vocabulary(size: int) -> None:
    """So that decoding goes on to where a log-probability of NaN is refused, with a message that helps."""
    head = LMHead(torch.full((size, WIDTH), torch.nan))
    for uniforms in (midpoints(4), None):
        ids, logprobs = head_drawer(head, 4).draw(states(4, dtype=torch.float32), uniforms)
        assert int(ids.max()) < size
        assert bool(logprobs.isnan().all())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-9, 0.25, 1.0, 3.0]), min_size=1, max_size=7), st.floats(0, 1 - 2.0**-53))
def test_inversion_by_hand(masses: list[float], u: float) -> None:
    """The entry has mass, holds the point, and what is left over is the point's place in it."""
    if not sum(masses):
        masses = [*masses, 1.0]
    cumulative = torch.tensor([masses], dtype=torch.float64).cumsum(-1)
    [index], [share] = invert(cumulative, torch.tensor([u], dtype=torch.float64))
    i = int(index)
    assert masses[i] > 0
    assert 0 <= float(share) <= 1
    assert sum(masses[:i]) + float(share) * masses[i] == pytest.approx(u * sum(masses), abs=1e-8)

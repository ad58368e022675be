"""Decoding: what is drawn, with which log-probability, and that neither padding nor neighbours nor the cache matter."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import ARCHITECTURES, EOS, tiny_model
from understudy.backends import decoding
from understudy.backends.cache import new_cache
from understudy.backends.decoding import TokenChooser, decode, rollout_uniforms
from understudy.backends.language_model import LanguageModel
from understudy.lm_head import LMHead

NO_STOP: frozenset[int] = frozenset()


def draw(logits: torch.Tensor, uniforms: list[float], **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per uniform number, from a head whose logits [V] are its bias."""
    head = LMHead(torch.zeros(len(logits), 1, dtype=logits.dtype), bias=logits)
    chooser = TokenChooser(head, rows=len(uniforms), **{"temperature": 1.0, **options})  # pyright: ignore
    return chooser(torch.zeros(len(uniforms), 1, dtype=logits.dtype), torch.tensor(uniforms, dtype=torch.float64))


def choose(probabilities: list[float], uniforms: list[float], **options: float) -> tuple[list[int], list[float]]:
    logits = torch.tensor(probabilities, dtype=torch.float64).log() + 3.0
    ids, logprobs = draw(logits, uniforms, **options)
    return ids.tolist(), logprobs.exp().tolist()


def frequencies(probabilities: list[float], **options: float) -> list[float]:
    """Exact shares: the midpoints of 1000 equal intervals in place of random numbers."""
    ids, _ = choose(probabilities, [(i + 0.5) / 1000 for i in range(1000)], **options)
    return [ids.count(token) / 1000 for token in range(len(probabilities))]


def test_inverse_cdf_by_hand() -> None:
    ids, probabilities = choose([0.1, 0.2, 0.3, 0.4], [0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, 0.9999])
    assert ids == [0, 0, 1, 1, 2, 2, 3, 3]
    assert probabilities == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


def test_frequencies_are_the_probabilities() -> None:
    assert frequencies([0.125, 0.25, 0.0, 0.5, 0.125]) == [0.125, 0.25, 0.0, 0.5, 0.125]
    squared = frequencies([0.2, 0.4, 0.4], temperature=0.5)  # 0.04, 0.16, 0.16 of 0.36
    assert squared == pytest.approx([1 / 9, 4 / 9, 4 / 9], abs=1e-3)


def test_temperature_is_that_of_the_reported_logprob() -> None:
    assert choose([0.2, 0.4, 0.4], [0.05, 0.5], temperature=0.5)[1] == pytest.approx([1 / 9, 4 / 9])


def test_greedy_takes_the_best_and_reports_it_at_temperature_one() -> None:
    ids, probabilities = choose([0.2, 0.5, 0.3], [0.0, 0.99], temperature=0)
    assert ids == [1, 1]
    assert probabilities == pytest.approx([0.5, 0.5])


def test_top_k_and_top_p_cut_to_exact_sets_and_renormalise() -> None:
    p = [0.05, 0.4, 0.15, 0.3, 0.1]
    assert frequencies(p, top_k=1) == [0, 1, 0, 0, 0]
    assert frequencies(p, top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0], abs=1e-3)
    assert frequencies(p, top_k=5) == frequencies(p, top_k=0) == frequencies(p)
    assert frequencies(p, top_p=0.39) == [0, 1, 0, 0, 0]
    assert frequencies(p, top_p=0.41) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0], abs=1e-3)
    assert frequencies(p, top_p=0.71) == pytest.approx([0, 8 / 17, 3 / 17, 6 / 17, 0], abs=1e-3)
    assert frequencies(p, top_p=1e-9) == [0, 1, 0, 0, 0]  # the best token always stays
    # top-p counts mass among what top-k left: 4/7 and 3/7, so 0.5 keeps one
    assert frequencies(p, top_k=2, top_p=0.5) == [0, 1, 0, 0, 0]


def test_logprobs_are_those_before_truncation() -> None:
    ids, probabilities = choose([0.05, 0.4, 0.15, 0.3, 0.1], [0.1, 0.9], top_k=2)
    assert ids == [1, 3]
    assert probabilities == pytest.approx([0.4, 0.3])


LAST = 1 - 2.0**-53  # the largest number below 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("uniform", [0.0, 2.0**-60, 0.5, LAST])
def test_never_a_token_without_probability(uniform: float, dtype: torch.dtype) -> None:
    """-inf logits at both ends and in the middle; the extremes of the uniform numbers must not fall on them."""
    inf = float("inf")
    rows = [[-inf, 1.0, -inf, 0.5, -inf], [2.0, -inf, -inf, -inf, -inf], [-inf, -inf, -inf, -inf, 1.0]]
    for row, expected in zip(rows, [1 if uniform <= 0.5 else 3, 0, 4], strict=True):
        for top_p in (1.0, 0.99):
            ids, logprobs = draw(torch.tensor(row, dtype=dtype), [uniform], top_p=top_p)
            assert ids.tolist() == [expected]
            assert torch.isfinite(logprobs).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 9),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 1e-12, 0.3, 0.9999, LAST]),
    st.floats(0.05, 1),
    st.integers(0, 9),
)
def test_a_choice_lies_in_its_set_and_cdf_interval(size: int, seed: int, u: float, top_p: float, top_k: int) -> None:
    """Against plain Python: sort, keep, renormalise, walk the cumulative sum."""
    logits = 3 * torch.randn(1, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ids, logprobs = draw(logits[0], [u], temperature=0.7, top_p=top_p, top_k=top_k)
    probabilities = (logits[0] / 0.7).softmax(0).tolist()
    order = sorted(range(size), key=lambda v: -probabilities[v])[: top_k or size]
    mass, kept, before = sum(probabilities[v] for v in order), set(), 0.0
    for v in order:
        if not kept or before < top_p * mass:
            kept.add(v)
        before += probabilities[v]
    total = sum(probabilities[v] for v in kept)
    token = int(ids[0])
    assert token in kept
    low = sum(probabilities[v] for v in kept if v < token) / total
    assert low - 1e-9 <= u <= low + probabilities[token] / total + 1e-9
    assert float(logprobs[0].exp()) == pytest.approx(probabilities[token])


def test_uniforms_are_a_function_of_identity() -> None:
    first = rollout_uniforms(1, 2, 3, 8)
    assert first.tolist() == rollout_uniforms(1, 2, 3, 8).tolist()
    assert first[:5].tolist() == rollout_uniforms(1, 2, 3, 5).tolist()  # a longer cap continues, it does not redraw
    others = [rollout_uniforms(*identity, 8).tolist() for identity in [(2, 2, 3), (1, 3, 3), (1, 2, 4), (3, 2, 1)]]
    assert all(first.tolist() != other for other in others)
    assert ((first >= 0) & (first < 1)).all()


PROMPTS = [[1, 2, 3], [4], [5, 4, 3, 2, 1, 5, EOS, 3, 2], [EOS, 2], [3, 1, 4, 1, 5, 2], [2, 2], [1, 5, 5, 4], [3]] * 2


def draws(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, length))


@torch.no_grad()
def alone(model: LanguageModel, prompt: list[int], uniforms: np.ndarray, *, temperature: float, stop: frozenset[int]):
    """No cache, no batch, no padding: a full forward pass for each token."""
    ids: list[int] = []
    logprobs: list[float] = []
    for u in uniforms:
        logits = model.model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, -1]
        table = (logits / temperature).log_softmax(-1)
        cumulative = table.exp().cumsum(0)
        ids.append(int((cumulative > u * cumulative[-1]).nonzero()[0]))
        logprobs.append(float(table[ids[-1]]))
        if ids[-1] in stop:
            break
    return ids, logprobs


@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "equal lengths"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_decoding_equals_full_passes(architecture: str, ragged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left padding, positions, sliding windows, and rows leaving the batch as they end."""
    model = LanguageModel(tiny_model(architecture, seed=5))
    prompts = PROMPTS if ragged else [[1 + (i + j) % 5 for j in range(5)] for i in range(16)]
    stop, uniforms = frozenset({EOS, 2}), draws(16, 9, seed=1)
    compactions: list[int] = []
    select = decoding.select_rows
    monkeypatch.setattr(
        decoding, "select_rows", lambda cache, keep: (compactions.append(len(keep)), select(cache, keep))[1]
    )
    completions = decode(model, prompts, uniforms, stop_ids=stop, max_tokens=[9] * 16, temperature=0.9)
    for prompt, row, (ids, logprobs) in zip(prompts, uniforms, completions, strict=True):
        expected_ids, expected = alone(model, prompt, row, temperature=0.9, stop=stop)
        assert ids == expected_ids
        assert logprobs == pytest.approx(expected, abs=1e-10)
    assert len(set(map(len, (ids for ids, _ in completions)))) > 1
    assert compactions == sorted(compactions, reverse=True)
    assert compactions[0] == 16  # prompts that stand twice were read once
    assert len(compactions) > 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cache_written_in_place_decodes_the_same(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU. Rows end at different times, and 100 tokens are more than the room made at first."""
    model = LanguageModel(tiny_model(architecture, seed=5))
    uniforms, options = draws(16, 100), {"stop_ids": NO_STOP, "max_tokens": [3, 100] * 8, "temperature": 1.0}
    plain = decode(model, PROMPTS, uniforms, **options)
    monkeypatch.setattr(decoding, "new_cache", lambda config, in_place: new_cache(config, in_place=True))
    in_place = decode(model, PROMPTS, uniforms, **options)
    assert [ids for ids, _ in in_place] == [ids for ids, _ in plain]
    for (_, ours), (_, theirs) in zip(in_place, plain, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-10)


def test_completions_end_at_the_first_stop_token_or_the_cap() -> None:
    model = LanguageModel(tiny_model(seed=5))
    uniforms = draws(16, 6)
    free = decode(model, PROMPTS, uniforms, stop_ids=NO_STOP, max_tokens=[6] * 16, temperature=1.0)
    assert {len(ids) for ids, _ in free} == {6}
    stopped = decode(model, PROMPTS, uniforms, stop_ids=frozenset({EOS, 3}), max_tokens=[6] * 16, temperature=1.0)
    for (whole, logprobs), (ids, own) in zip(free, stopped, strict=True):
        ends = [t for t, token in enumerate(whole) if token in {EOS, 3}]
        length = ends[0] + 1 if ends else 6
        assert ids == whole[:length]
        assert own == pytest.approx(logprobs[:length], abs=1e-12)
    assert {ids[-1] in {EOS, 3} for ids, _ in stopped} == {True, False}  # both kinds occurred


def test_greedy_decoding_ignores_the_uniform_numbers() -> None:
    model = LanguageModel(tiny_model(seed=5))
    first, second = (
        decode(model, PROMPTS, draws(16, 5, seed), stop_ids=NO_STOP, max_tokens=[5] * 16, temperature=0)
        for seed in (0, 1)
    )
    assert first == second
    ids = list(PROMPTS[2])
    for token in first[2][0]:
        assert token == int(model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def test_a_restricted_vocabulary_never_leaves_it() -> None:
    model = tiny_model(seed=5, vocab_size=9)
    completions = decode(
        LanguageModel(model, vocab_size=6),
        PROMPTS,
        draws(16, 6),
        stop_ids=NO_STOP,
        max_tokens=[6] * 16,
        temperature=1.0,
    )
    assert max(token for ids, _ in completions for token in ids) < 6
    for prompt, (ids, logprobs) in zip(PROMPTS, completions, strict=True):
        table = model(input_ids=torch.tensor([prompt])).logits[0, -1, :6].log_softmax(-1)
        assert logprobs[0] == pytest.approx(float(table[ids[0]].detach()), abs=1e-11)


@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "equal lengths"])
def test_hybrids_keep_their_rows_to_the_end(ragged: bool) -> None:
    """A convolution's state cannot drop the rows that have ended; the others must not notice."""
    model = LanguageModel(tiny_model("lfm2", seed=5))
    prompts = PROMPTS if ragged else [[1 + (i + j) % 5 for j in range(5)] for i in range(16)]
    stop, uniforms = frozenset({EOS, 2}), draws(16, 9, seed=1)
    completions = decode(model, prompts, uniforms, stop_ids=stop, max_tokens=[9] * 16, temperature=0.9)
    for prompt, row, (ids, logprobs) in zip(prompts, uniforms, completions, strict=True):
        expected_ids, expected = alone(model, prompt, row, temperature=0.9, stop=stop)
        assert ids == expected_ids
        assert logprobs == pytest.approx(expected, abs=1e-10)
    assert len(set(map(len, (ids for ids, _ in completions)))) > 2


class Passes:
    """The shapes [B, L] of all ids that go through models."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        hidden = LanguageModel.hidden

        def watched(model: LanguageModel, input_ids: torch.Tensor, **inputs: Any) -> Any:
            self.shapes.append(tuple(input_ids.shape))
            return hidden(model, input_ids, **inputs)

        monkeypatch.setattr(LanguageModel, "hidden", watched)


def assert_alike(one: list[tuple[list[int], list[float]]], other: list[tuple[list[int], list[float]]]) -> None:
    assert [ids for ids, _ in one] == [ids for ids, _ in other]
    for (_, own), (_, expected) in zip(one, other, strict=True):
        assert own == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize(
    ("prompts", "prefill"),
    [
        ([[1, 2, 3]] * 5, (1, 3)),
        ([[4], [1, 2, 3], [4], [5, 5, 1, 2, 3, 3], [1, 2, 3], [4]], (3, 6)),
        ([[4], [5], [3]], (3, 1)),
    ],
    ids=["one", "mixed", "all different"],
)
def test_equal_prompts_are_read_once(
    architecture: str, prompts: list[list[int]], prefill: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And rows are what they are on their own, whatever the order of the prompts."""
    model, uniforms = LanguageModel(tiny_model(architecture, seed=5)), draws(len(prompts), 7)
    options = {"stop_ids": frozenset({2}), "temperature": 0.9}
    single = [
        decode(model, [prompt], row[None], max_tokens=[7], **options)[0]
        for prompt, row in zip(prompts, uniforms, strict=True)
    ]
    passes = Passes(monkeypatch)
    assert_alike(decode(model, prompts, uniforms, max_tokens=[7] * len(prompts), **options), single)
    first, *rest = passes.shapes
    assert first == prefill
    assert {length for _, length in rest} == {1}
    assert rest[0][0] <= len(prompts)
    assert len({tuple(ids) for ids, _ in single}) > 1


def test_hybrids_read_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """And finished rows stay in the batch: a convolution's state cannot choose rows."""
    model, passes = LanguageModel(tiny_model("lfm2", seed=5)), Passes(monkeypatch)
    decode(model, [[1, 2, 3]] * 5, draws(5, 7), stop_ids=frozenset({EOS, 2}), max_tokens=[7] * 5, temperature=0.9)
    assert passes.shapes[0] == (5, 3)
    assert {rows for rows, _ in passes.shapes} == {5}


@pytest.mark.parametrize("architecture", ["qwen3", "lfm2"])
def test_every_row_has_a_cap_of_its_own(architecture: str) -> None:
    model, caps = LanguageModel(tiny_model(architecture, seed=5)), [1, 6, 3, 2, 6, 1, 4, 5] * 2
    uniforms = draws(16, 6)
    whole = decode(model, PROMPTS, uniforms, stop_ids=frozenset({EOS}), max_tokens=[6] * 16, temperature=1.0)
    capped = decode(model, PROMPTS, uniforms, stop_ids=frozenset({EOS}), max_tokens=caps, temperature=1.0)
    assert_alike(capped, [(ids[:cap], own[:cap]) for (ids, own), cap in zip(whole, caps, strict=True)])
    assert sum(len(ids) == cap for (ids, _), cap in zip(capped, caps, strict=True)) > 8
    assert len({len(ids) for ids, _ in capped}) > 3


@pytest.mark.parametrize("architecture", ["qwen3", "lfm2"])
def test_a_test_of_the_text_ends_a_row_at_its_token(architecture: str) -> None:
    """It is asked once for every token of a row that goes on, with all of the completion so far."""
    model, uniforms, asked = LanguageModel(tiny_model(architecture, seed=5)), draws(16, 9), []

    def ends(ids: Sequence[int]) -> bool:
        asked.append(tuple(ids))
        return sum(ids) >= 11

    free = decode(model, PROMPTS, uniforms, stop_ids=frozenset({EOS}), max_tokens=[9] * 16, temperature=1.0)
    ended = decode(model, PROMPTS, uniforms, stop_ids=frozenset({EOS}), max_tokens=[9] * 16, temperature=1.0, ends=ends)
    lengths = [next((t for t in range(1, len(ids)) if sum(ids[:t]) >= 11), len(ids)) for ids, _ in free]
    assert_alike(ended, [(ids[:n], own[:n]) for (ids, own), n in zip(free, lengths, strict=True)])
    assert {sum(ids) >= 11 for ids, _ in ended} == {True, False}
    # Not where a stop token or the cap has ended the row.
    expected = [tuple(ids[:t]) for ids, _ in ended for t in range(1, len(ids) + 1) if t < 9 and ids[t - 1] != EOS]
    assert sorted(asked) == sorted(expected)


def nucleus(logits: torch.Tensor, temperature: float, top_p: float, top_k: int) -> torch.Tensor:
    """Plainly, in float64: probabilities [V] of the set that is drawn from."""
    probabilities = (logits.double() / temperature).softmax(0)
    values, order = probabilities.sort(descending=True)
    kept = torch.zeros_like(probabilities)
    count = top_k or len(order)
    total = values[:count].sum()
    size = int(((values[:count].cumsum(0) - values[:count]) < top_p * total).sum())
    kept[order[:size]] = values[:size]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("spread", "top_p", "top_k", "size"),
    [
        (2.0, 0.9, 0, (50, 1024)),  # fits the likeliest 1024
        (0.01, 0.9, 0, (4400, 4600)),  # nearly even: it does not
        (2.0, 0.9, 300, (50, 300)),
        (0.01, 0.5, 3000, (1400, 1600)),
        (0.01, 1.0, 2000, (2000, 2000)),
        (3.0, 1.0, 7, (7, 7)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_truncation_of_large_vocabularies(
    spread: float, top_p: float, top_k: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """Exact frequencies on the midpoints of equal intervals, in vocabulary order."""
    assert decoding._NUCLEUS == 1024
    logits = (spread * torch.randn(5000, generator=torch.Generator().manual_seed(7), dtype=torch.float64)).to(dtype)
    kept = nucleus(logits, 0.8, top_p, top_k)
    assert size[0] <= int((kept > 0).sum()) <= size[1]
    uniforms = [(i + 0.5) / 400 for i in range(400)]
    ids, logprobs = draw(logits, uniforms, temperature=0.8, top_p=top_p, top_k=top_k)
    expected = torch.searchsorted(kept.cumsum(0), torch.tensor(uniforms, dtype=torch.float64), right=True)
    if dtype == torch.float64:
        assert ids.tolist() == expected.tolist()
    high = kept.cumsum(0)
    near = 1e-4 if dtype == torch.float32 else 1e-9
    for token, u in zip(ids.tolist(), uniforms, strict=True):
        assert float(high[token] - kept[token]) - near <= u <= float(high[token]) + near
    expected_logprobs = (logits / 0.8).log_softmax(0)[ids]  # before truncation
    torch.testing.assert_close(logprobs, expected_logprobs)


def test_rows_that_fit_the_likeliest_and_rows_that_do_not() -> None:
    """Side by side they are what they are alone."""
    generator = torch.Generator().manual_seed(7)
    table = torch.randn(3000, 2, generator=generator, dtype=torch.float64) * torch.tensor([4.0, 0.01])
    chooser = TokenChooser(LMHead(table), rows=40, temperature=1.0, top_p=0.95)
    hidden = torch.eye(2, dtype=torch.float64).repeat(20, 1)
    uniforms = torch.rand(40, generator=generator, dtype=torch.float64)
    ids, logprobs = chooser(hidden, uniforms)
    for row in range(2):
        kept = nucleus(table[:, row], 1.0, 0.95, 0)
        assert (int((kept > 0).sum()) <= 1024) == (row == 0)
        own, _ = chooser(hidden[row::2], uniforms[row::2])
        assert own.tolist() == ids[row::2].tolist()
        assert own.tolist() == torch.searchsorted(kept.cumsum(0), uniforms[row::2].contiguous(), right=True).tolist()
        torch.testing.assert_close(logprobs[row::2], table[:, row].log_softmax(0)[own])

"""Decoding: what is drawn, with which log-probability, and that neither padding nor neighbours nor the cache matter."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import ARCHITECTURES, EOS, tiny_model
from understudy.backends.decoding import choose_tokens, decode, rollout_uniforms
from understudy.backends.loading import LanguageModel

NO_STOP: frozenset[int] = frozenset()


def choose(probabilities: list[float], uniforms: list[float], **options: float) -> tuple[list[int], list[float]]:
    logits = torch.tensor([probabilities] * len(uniforms), dtype=torch.float64).log() + 3.0
    settings = {"temperature": 1.0, **options}
    ids, logprobs = choose_tokens(logits, torch.tensor(uniforms, dtype=torch.float64), **settings)  # pyright: ignore
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
    logits = torch.tensor([[-inf, 1.0, -inf, 0.5, -inf], [2.0, -inf, -inf, -inf, -inf], [-inf, -inf, -inf, -inf, 1.0]])
    ids, logprobs = choose_tokens(logits.to(dtype), torch.full((3,), uniform, dtype=torch.float64), temperature=1.0)
    assert ids.tolist() == [1 if uniform <= 0.5 else 3, 0, 4]
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
    point = torch.tensor([u], dtype=torch.float64)
    ids, logprobs = choose_tokens(logits, point, temperature=0.7, top_p=top_p, top_k=top_k)
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
    from transformers import DynamicCache

    model = LanguageModel(tiny_model(architecture, seed=5))
    prompts = PROMPTS if ragged else [[1 + (i + j) % 5 for j in range(5)] for i in range(16)]
    stop, uniforms = frozenset({EOS, 2}), draws(16, 9, seed=1)
    compactions: list[int] = []
    select = DynamicCache.batch_select_indices
    monkeypatch.setattr(
        DynamicCache, "batch_select_indices", lambda self, keep: (compactions.append(len(keep)), select(self, keep))[1]
    )
    completions = decode(model, prompts, uniforms, stop_ids=stop, max_tokens=9, temperature=0.9)
    for prompt, row, (ids, logprobs) in zip(prompts, uniforms, completions, strict=True):
        expected_ids, expected = alone(model, prompt, row, temperature=0.9, stop=stop)
        assert ids == expected_ids
        assert logprobs == pytest.approx(expected, abs=1e-10)
    assert len(set(map(len, (ids for ids, _ in completions)))) > 1
    assert compactions == sorted(compactions, reverse=True)
    assert compactions


def test_completions_end_at_the_first_stop_token_or_the_cap() -> None:
    model = LanguageModel(tiny_model(seed=5))
    uniforms = draws(16, 6)
    free = decode(model, PROMPTS, uniforms, stop_ids=NO_STOP, max_tokens=6, temperature=1.0)
    assert {len(ids) for ids, _ in free} == {6}
    stopped = decode(model, PROMPTS, uniforms, stop_ids=frozenset({EOS, 3}), max_tokens=6, temperature=1.0)
    for (whole, logprobs), (ids, own) in zip(free, stopped, strict=True):
        ends = [t for t, token in enumerate(whole) if token in {EOS, 3}]
        length = ends[0] + 1 if ends else 6
        assert ids == whole[:length]
        assert own == pytest.approx(logprobs[:length], abs=1e-12)
    assert {ids[-1] in {EOS, 3} for ids, _ in stopped} == {True, False}  # both kinds occurred


def test_greedy_decoding_ignores_the_uniform_numbers() -> None:
    model = LanguageModel(tiny_model(seed=5))
    first, second = (
        decode(model, PROMPTS, draws(16, 5, seed), stop_ids=NO_STOP, max_tokens=5, temperature=0) for seed in (0, 1)
    )
    assert first == second
    ids = list(PROMPTS[2])
    for token in first[2][0]:
        assert token == int(model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def test_a_restricted_vocabulary_never_leaves_it() -> None:
    model = tiny_model(seed=5, vocab_size=9)
    completions = decode(
        LanguageModel(model, vocab_size=6), PROMPTS, draws(16, 6), stop_ids=NO_STOP, max_tokens=6, temperature=1.0
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
    completions = decode(model, prompts, uniforms, stop_ids=stop, max_tokens=9, temperature=0.9)
    for prompt, row, (ids, logprobs) in zip(prompts, uniforms, completions, strict=True):
        expected_ids, expected = alone(model, prompt, row, temperature=0.9, stop=stop)
        assert ids == expected_ids
        assert logprobs == pytest.approx(expected, abs=1e-10)
    assert len(set(map(len, (ids for ids, _ in completions)))) > 2

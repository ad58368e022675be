"""Examples to micro-batches: the shift, by hand and against naive references."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from understudy import batching
from understudy.batching import completion_index, lay_out, micro_batches, plan_batches
from understudy.types import Batch, TokenSequence, TrainingExample

tokens = st.lists(st.integers(0, 9), min_size=1, max_size=8)
sequences = st.lists(st.builds(TokenSequence, tokens, st.lists(st.integers(0, 9), max_size=8)), min_size=1, max_size=9)


def test_a_token_is_predicted_at_the_position_before_it() -> None:
    assert list(completion_index(3, 2)) == [2, 3]
    assert list(completion_index(1, 3, offset=10)) == [10, 11, 12]
    assert list(completion_index(4, 0)) == []
    with pytest.raises(ValueError, match="empty prompt"):
        completion_index(0, 2)


def test_padded_layout_by_hand() -> None:
    layout = lay_out([TokenSequence([7, 8], [9]), TokenSequence([5], [6, 0, 4])], device="cpu")
    assert layout.input_ids.tolist() == [[7, 8, 9, 0], [5, 6, 0, 4]]
    assert layout.position_ids is None
    assert layout.token_index.tolist() == [1, 4, 5, 6]
    assert layout.target_ids.tolist() == [9, 6, 0, 4]


def test_packed_layout_by_hand() -> None:
    layout = lay_out([TokenSequence([7, 8], [9]), TokenSequence([5], [6, 0, 4])], device="cpu", arrangement="packed")
    assert layout.input_ids.tolist() == [[7, 8, 9, 5, 6, 0, 4]]
    assert layout.position_ids is not None
    assert layout.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert layout.token_index.tolist() == [1, 3, 4, 5]
    assert layout.target_ids.tolist() == [9, 6, 0, 4]


@given(sequences, st.booleans())
def test_layouts_agree_with_a_naive_reference(given_sequences: list[TokenSequence], packing: bool) -> None:
    """Walk over the flat input: entry n stands right before its target, in its own sequence, in order."""
    layout = lay_out(given_sequences, device="cpu", arrangement="packed" if packing else "padded")
    flat = layout.input_ids.flatten().tolist()
    width = layout.input_ids.shape[1]
    index, targets, start = [], [], 0
    for row, sequence in enumerate(given_sequences):
        start = start if packing else row * width
        ids = [*sequence.prompt_ids, *sequence.completion_ids]
        assert flat[start : start + len(ids)] == ids
        for t, token in enumerate(sequence.completion_ids):
            index.append(start + len(sequence.prompt_ids) + t - 1)
            targets.append(token)
            assert flat[index[-1] + 1] == token
        if packing:
            assert layout.position_ids is not None
            assert layout.position_ids[0, start : start + len(ids)].tolist() == list(range(len(ids)))
        start += len(ids)
    assert layout.token_index.tolist() == index
    assert layout.target_ids.tolist() == targets
    assert layout.token_index.dtype == layout.target_ids.dtype == torch.long  # also where nothing was written
    assert layout.input_ids.shape[0] == (1 if packing else len(given_sequences))


@given(sequences, st.integers(1, 60), st.booleans())
def test_plans_hold_every_sequence_once_within_the_budget(
    given_sequences: list[TokenSequence], budget: int, packing: bool
) -> None:
    arranged = plan_batches(given_sequences, max_tokens=budget, packing=packing)
    assert {arrangement for arrangement, _ in arranged} == {"packed" if packing else "padded"}
    plan = [batch for _, batch in arranged]
    assert sorted(i for batch in plan for i in batch) == list(range(len(given_sequences)))
    lengths = [len(s.prompt_ids) + len(s.completion_ids) for s in given_sequences]
    for batch in plan:
        own = [lengths[i] for i in batch]
        assert len(batch) == 1 or (sum(own) if packing else max(own) * len(own)) <= budget
    for batch, following in itertools.pairwise(plan):  # greedy: the next sequence would not have fitted
        grown = [*(lengths[i] for i in batch), lengths[following[0]]]
        assert (sum(grown) if packing else max(grown) * len(grown)) > budget


def test_shared_layout_by_hand() -> None:
    """Two prompts, padded on the left; completions but for their last tokens; predicting positions of both passes."""
    sequences = [
        TokenSequence([7, 8], []),
        TokenSequence([7, 8], [9]),
        TokenSequence([7, 8], [1, 2]),
        TokenSequence([5], [6, 0, 4]),
    ]
    layout = lay_out(sequences, device="cpu", arrangement="shared")
    assert layout.shared is not None
    assert layout.position_ids is None
    assert layout.input_ids.tolist() == [[7, 8], [0, 5]]
    assert layout.shared.attention_mask.tolist() == [[1, 1], [0, 1]]
    [block] = layout.shared.continuations
    assert block.input_ids.tolist() == [[0, 0], [0, 0], [1, 0], [6, 0]]
    assert block.rows.tolist() == [0, 0, 0, 1]
    # The prompts' last tokens are at 1 and 3; the completions' rows start at 4, 6, 8 and 10.
    assert layout.token_index.tolist() == [1, 1, 8, 3, 10, 11]
    assert layout.target_ids.tolist() == [9, 1, 2, 6, 0, 4]
    with pytest.raises(ValueError, match="empty prompt"):
        lay_out([TokenSequence([], [1])], device="cpu", arrangement="shared")


def test_shared_prompts_without_anything_to_continue() -> None:
    """Completions of one token are predicted by their prompts."""
    layout = lay_out([TokenSequence([7, 8], [9]), TokenSequence([7, 8], [])], device="cpu", arrangement="shared")
    assert layout.shared is not None
    assert layout.shared.continuations == []
    assert layout.input_ids.tolist() == [[7, 8]]
    assert (layout.token_index.tolist(), layout.target_ids.tolist()) == ([1], [9])


def test_long_completions_do_not_pad_the_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_BLOCK_TOKENS", 12)
    sequences = [TokenSequence([7, 8], [1] * n) for n in (1, 2, 3, 4, 4, 9, 9)]
    layout = lay_out(sequences, device="cpu", arrangement="shared")
    assert layout.shared is not None
    # 3 x 4 fills a block, and 4 is more than 1.2 times 1; so does 2 x 9.
    assert [tuple(block.input_ids.shape) for block in layout.shared.continuations] == [(3, 2), (2, 3), (2, 8)]
    positions = [i for s, start in zip(sequences, (2, 4, 6, 8, 11, 14, 22), strict=True) for i in own(s, start)]
    assert layout.token_index.tolist() == positions


def own(sequence: TokenSequence, start: int) -> list[int]:
    """Predicting positions: the prompt's last, which stands at 1, and all but the last of the completion's own."""
    return [1, *range(start, start + len(sequence.completion_ids) - 1)]


# A few prompts, so that they occur several times.
prompts = st.sampled_from([[1], [2, 3], [2, 3, 4], [0] * 6, [5, 1] * 6])
grouped = st.lists(st.builds(TokenSequence, prompts, st.lists(st.integers(0, 9), max_size=9)), min_size=1, max_size=14)


def slots(sequences: list[TokenSequence]) -> int:
    """Token positions that go through a model."""
    layout = lay_out(sequences, device="cpu", arrangement="shared")
    assert layout.shared is not None
    return layout.input_ids.numel() + sum(part.input_ids.numel() for part in layout.shared.continuations)


@given(grouped, st.integers(1, 90))
def test_plans_share_prompts_where_that_saves_tokens(given_sequences: list[TokenSequence], budget: int) -> None:
    plan = plan_batches(given_sequences, max_tokens=budget, share_prompts=True)
    assert sorted(i for _, batch in plan for i in batch) == list(range(len(given_sequences)))
    assert {arrangement for arrangement, _ in plan} <= {"padded", "shared"}
    for arrangement, batch in plan:
        chosen = [given_sequences[i] for i in batch]
        lengths = [len(s.prompt_ids) + len(s.completion_ids) for s in chosen]
        if arrangement == "padded":
            assert len(batch) == 1 or max(lengths) * len(batch) <= budget
            continue
        assert len(batch) > 1
        assert slots(chosen) <= budget
        for prompt in {tuple(s.prompt_ids) for s in chosen}:
            written = [len(s.completion_ids) for s in chosen if tuple(s.prompt_ids) == prompt]
            assert len(prompt) + sum(written) <= 0.9 * (len(prompt) * len(written) + sum(written))
        completions = [len(s.completion_ids) for s in chosen]
        assert completions == sorted(completions)


@given(grouped, st.integers(1, 40))
def test_continuations_are_hardly_padded(given_sequences: list[TokenSequence], block_tokens: int) -> None:
    ordered = sorted(given_sequences, key=lambda s: len(s.completion_ids))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "_BLOCK_TOKENS", block_tokens)
        layout = lay_out(ordered, device="cpu", arrangement="shared")
    assert layout.shared is not None
    lengths = [len(s.completion_ids) for s in ordered]
    for block in reversed(layout.shared.continuations):
        rows, width = block.input_ids.shape
        held = [lengths.pop() for _ in range(rows)]
        assert max(held) == width + 1
        small = (rows - 1) * max(held) < block_tokens
        assert small or max(held) <= 1.2 * min(held)
    assert all(length <= 1 for length in lengths)  # the rest has nothing to continue with


def test_groups_of_a_long_prompt_share_it() -> None:
    sequences = [TokenSequence([7] * 20, [1] * 5) for _ in range(8)]
    # 52 = 20 + 8 * 4, last tokens left out; below it groups are split, and each part reads the prompt
    for budget, sizes in ((1000, [8]), (52, [8]), (51, [7, 1]), (40, [5, 3])):
        plan = plan_batches(sequences, max_tokens=budget, share_prompts=True)
        assert sorted((len(batch) for _, batch in plan), reverse=True) == sizes
        assert all(arrangement == ("shared" if len(batch) > 1 else "padded") for arrangement, batch in plan)
    assert {arrangement for arrangement, _ in plan_batches(sequences, max_tokens=1000)} == {"padded"}


def test_prompts_that_nobody_shares_are_padded() -> None:
    sequences = [TokenSequence([i] * 20, [1] * 5) for i in range(8)]
    assert plan_batches(sequences, max_tokens=1000, share_prompts=True) == [("padded", list(range(8)))]


def test_short_prompts_before_long_completions_are_not_shared() -> None:
    """Another pass would save next to nothing."""
    sequences = [TokenSequence([7, 8], [1] * n) for n in (30, 30, 40)]
    assert plan_batches(sequences, max_tokens=1000, share_prompts=True) == [("padded", [0, 1, 2])]
    sequences.append(TokenSequence([1] * 50, [1] * 5))  # which has nobody to share with
    assert {arrangement for arrangement, _ in plan_batches(sequences, max_tokens=1000, share_prompts=True)} == {
        "padded"
    }


def test_packing_shares_nothing() -> None:
    sequences = [TokenSequence([7] * 20, [1] * 5) for _ in range(8)]
    plan = plan_batches(sequences, max_tokens=1000, packing=True, share_prompts=True)
    assert plan == [("packed", list(range(8)))]


def example(prompt: list[int], completion: list[int], **fields) -> TrainingExample:
    return TrainingExample(prompt, completion, [True] * len(completion), **fields)


def test_micro_batches_carry_every_column_in_the_layouts_order() -> None:
    long = TrainingExample([1, 2], [3, 4], [True, False], [-1.0, -2.0], [0.5, -0.5], torch.ones(2, 3))
    short = TrainingExample([5], [6], [True], [-3.0], [1.5], torch.zeros(1, 3))
    [batch] = micro_batches([long, short], micro_batch_tokens=100, dtype=torch.float64)
    assert batch.input_ids.tolist() == [[5, 6, 0, 0], [1, 2, 3, 4]]
    assert batch.target_ids.tolist() == [6, 3, 4]
    assert batch.loss_mask.tolist() == [True, True, False]
    assert batch.sampler_logprobs is not None
    assert batch.sampler_logprobs.tolist() == [-3.0, -1.0, -2.0]
    assert batch.advantages is not None
    assert batch.advantages.tolist() == [1.5, 0.5, -0.5]
    assert batch.advantages.dtype == torch.float64
    assert batch.teacher_hidden is not None
    assert batch.teacher_hidden.tolist() == [[0.0] * 3, [1.0] * 3, [1.0] * 3]
    assert (batch.num_tokens, batch.sequence_tokens) == (2, 6)


def numbered(i: int, sequence: TokenSequence) -> TrainingExample:
    """Every signal of token t of example i says so."""
    size = len(sequence.completion_ids)
    marks = [100.0 * i + t for t in range(size)]
    hidden = torch.tensor(marks, dtype=torch.float64)[:, None]
    return TrainingExample(
        sequence.prompt_ids,
        sequence.completion_ids,
        loss_mask=[(i + t) % 3 > 0 for t in range(size)],
        sampler_logprobs=[-mark for mark in marks],
        advantages=marks,
        teacher_hidden=hidden,
        reference_hidden=hidden + 0.5,
        topk_ids=[[int(mark), int(mark) + 1] for mark in marks],
        topk_logprobs=[[-mark, -mark - 1] for mark in marks],
        weights=[mark + 0.25 for mark in marks],
    )


@given(grouped, st.integers(1, 90))
def test_shared_prompts_keep_every_column_with_its_token(given_sequences: list[TokenSequence], budget: int) -> None:
    """From each entry back to its example and place; and what the model reads up to there is its past."""
    examples = [numbered(i, sequence) for i, sequence in enumerate(given_sequences)]
    batches = micro_batches(examples, micro_batch_tokens=budget, share_prompts=True, dtype=torch.float64)
    seen: list[tuple[int, int]] = []
    for batch in batches:
        assert batch.advantages is not None
        for n, mark in enumerate(batch.advantages.tolist()):
            i, t = divmod(int(mark), 100)
            e = examples[i]
            seen.append((i, t))
            assert int(batch.target_ids[n]) == e.completion_ids[t]
            assert past(batch, int(batch.token_index[n])) == [*e.prompt_ids, *e.completion_ids[:t]]
            for name in ("loss_mask", "sampler_logprobs", "topk_ids", "topk_logprobs", "weights"):
                assert getattr(batch, name)[n].tolist() == getattr(e, name)[t], name
            for name in ("teacher_hidden", "reference_hidden"):
                assert getattr(batch, name)[n].tolist() == getattr(e, name)[t].tolist(), name
    assert sorted(seen) == [(i, t) for i, e in enumerate(examples) for t in range(len(e.completion_ids))]
    assert sum(b.sequence_tokens for b in batches) == sum(len(e.prompt_ids) + len(e.completion_ids) for e in examples)
    assert sum(b.num_tokens for b in batches) == sum(sum(e.loss_mask) for e in examples)
    assert sum(b.num_sequences for b in batches) == sum(any(e.loss_mask) for e in examples)


def past(batch: Batch, position: int) -> list[int]:
    """What the model has read when it is at a position, walked along plainly."""

    def upto(ids: Tensor, position: int) -> tuple[int, list[int]]:
        row, column = divmod(position, ids.shape[1])
        return row, ids[row, : column + 1].tolist()

    if batch.shared is None:
        return upto(batch.input_ids, position)[1]
    read: list[int] = []
    last = position
    if position >= batch.input_ids.numel():
        position -= batch.input_ids.numel()
        for block in batch.shared.continuations:
            if position < block.input_ids.numel():
                row, read = upto(block.input_ids, position)
                last = (int(block.rows[row]) + 1) * batch.input_ids.shape[1] - 1
                break
            position -= block.input_ids.numel()
    row, prompt = upto(batch.input_ids, last)
    assert len(prompt) == batch.input_ids.shape[1]  # padded on the left
    return [token for token, real in zip(prompt, batch.shared.attention_mask[row], strict=True) if real] + read


def test_a_supervised_batch_has_no_signals() -> None:
    [batch] = micro_batches([example([1], [2])], micro_batch_tokens=100)
    assert (batch.sampler_logprobs, batch.advantages, batch.teacher_hidden) == (None, None, None)


def test_teachers_do_not_share_a_batch() -> None:
    examples = [example([1], [i], teacher="ab"[i % 2]) for i in range(6)]
    batches = micro_batches(examples, micro_batch_tokens=100)
    assert [(b.teacher, b.target_ids.tolist()) for b in batches] == [("a", [0, 2, 4]), ("b", [1, 3, 5])]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "fields",
    [
        {"sampler_logprobs": [-1.0]},  # advantages without log-probabilities, or the other way round
        {"advantages": [1.0]},
        {"sampler_logprobs": [-1.0], "advantages": [1.0, 2.0]},
        {},
    ],
)
def test_a_missing_or_misaligned_signal_is_an_error_in_any_example(fields: dict[str, list[float]], order: int) -> None:
    whole = example([1, 1], [2], sampler_logprobs=[-1.0], advantages=[1.0])
    with pytest.raises(ValueError, match=r"got (none|2) entries for 1 completion tokens"):
        micro_batches([whole, example([1, 1], [3], **fields)][::order], micro_batch_tokens=100)


@pytest.mark.parametrize("order", [1, -1])
def test_missing_hidden_states_are_an_error_in_any_example(order: int) -> None:
    whole = example([1, 1], [2], teacher_hidden=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="got none entries"):
        micro_batches([whole, example([1, 1], [2])][::order], micro_batch_tokens=100)


def test_hidden_states_wait_on_the_cpu() -> None:
    """A step's worth of them would fill a device; everything else is small."""
    whole = example([1, 1], [2], teacher_hidden=torch.ones(1, 3))
    [batch] = micro_batches([whole, whole], micro_batch_tokens=100, device="meta")
    assert batch.teacher_hidden is not None
    assert batch.teacher_hidden.device.type == "cpu"
    assert batch.teacher_hidden.tolist() == [[1.0] * 3] * 2
    assert {batch.input_ids.device.type, batch.target_ids.device.type, batch.loss_mask.device.type} == {"meta"}

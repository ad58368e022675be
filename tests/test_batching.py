"""Examples to micro-batches: the shift, by hand and against naive references."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from understudy.batching import completion_index, lay_out, micro_batches, plan_batches
from understudy.types import TokenSequence, TrainingExample

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
    layout = lay_out([TokenSequence([7, 8], [9]), TokenSequence([5], [6, 0, 4])], device="cpu", packing=True)
    assert layout.input_ids.tolist() == [[7, 8, 9, 5, 6, 0, 4]]
    assert layout.position_ids is not None
    assert layout.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert layout.token_index.tolist() == [1, 3, 4, 5]
    assert layout.target_ids.tolist() == [9, 6, 0, 4]


@given(sequences, st.booleans())
def test_layouts_agree_with_a_naive_reference(given_sequences: list[TokenSequence], packing: bool) -> None:
    """Walk over the flat input: entry n stands right before its target, in its own sequence, in order."""
    layout = lay_out(given_sequences, device="cpu", packing=packing)
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
    plan = plan_batches(given_sequences, max_tokens=budget, packing=packing)
    assert sorted(i for batch in plan for i in batch) == list(range(len(given_sequences)))
    lengths = [len(s.prompt_ids) + len(s.completion_ids) for s in given_sequences]
    for batch in plan:
        own = [lengths[i] for i in batch]
        assert len(batch) == 1 or (sum(own) if packing else max(own) * len(own)) <= budget
    for batch, following in itertools.pairwise(plan):  # greedy: the next sequence would not have fitted
        grown = [*(lengths[i] for i in batch), lengths[following[0]]]
        assert (sum(grown) if packing else max(grown) * len(grown)) > budget


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

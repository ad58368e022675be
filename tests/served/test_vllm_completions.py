"""What a reply of vLLM must hold to be taken for completions, or for scores."""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from tiny import EOS, prompt_of
from understudy.backends.http import BadReply, Reply
from understudy.backends.vllm_completions import (
    Asked,
    Completion,
    jobs_of,
    parse_completions,
    parse_scores,
    rollout_seed,
)

ASKED = Asked([7, 8], n=2, max_tokens=4, vocab_size=10, stop_ids=frozenset({EOS, 9}))


def reply_of(tree: Any) -> Reply:
    return Reply(200, {}, json.dumps(tree).encode())


def choice(index: int, ids: list[int], reason: str) -> dict[str, Any]:
    logprobs = [-0.5 * (t + 1) for t in range(len(ids))]
    return {
        "index": index,
        "token_ids": ids,
        "prompt_token_ids": [7, 8],
        "logprobs": {"token_logprobs": logprobs},
        "finish_reason": reason,
    }


def good() -> dict[str, Any]:
    """Out of order, as nothing forbids; one is cut at the cap, one has ended there by itself."""
    return {"choices": [choice(1, [1, 2, 3, 9], "stop"), choice(0, [5, 5, 5, 5], "length")]}


def test_completions_come_in_the_order_of_their_index() -> None:
    assert parse_completions(reply_of(good()), ASKED) == [
        Completion([5, 5, 5, 5], [-0.5, -1.0, -1.5, -2.0], "length"),
        Completion([1, 2, 3, 9], [-0.5, -1.0, -1.5, -2.0], "stop"),
    ]


def test_one_copy_of_the_prompt_is_enough() -> None:
    tree = good()
    tree["choices"][1]["prompt_token_ids"] = None
    assert len(parse_completions(reply_of(tree), ASKED)) == 2


def change(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    """Changes the choice that was cut at the cap; a function is given what stands there."""

    def changed(tree: dict[str, Any]) -> Any:
        for key, value in fields.items():
            own = tree["choices"][1]
            own[key] = value(own[key]) if callable(value) else value
        return tree

    return changed


def logprobs(*values: Any) -> Callable[[dict[str, Any]], Any]:
    return change(logprobs={"token_logprobs": [*values, -1.0, -1.0, -1.0]})


@pytest.mark.parametrize(
    ("mangle", "message"),
    [
        (lambda tree: [], "expected choices"),
        (lambda tree: {"choices": [3]}, "expected choices"),
        (lambda tree: {"choices": tree["choices"][:1]}, r"choices \[1\]; expected 0 to 1"),
        (change(index=1), r"choices \[1, 1\]; expected 0 to 1"),
        (change(index=False), r"choices \[1, False\]; expected 0 to 1"),
        (change(prompt_token_ids=[7]), r"prompt_token_ids: got others \(\[7\]\); expected the 2 that were sent"),
        (change(prompt_token_ids="7 8"), r"prompt_token_ids: got others \(7 8\)"),
        (lambda tree: {"choices": [{**c, "prompt_token_ids": None} for c in tree["choices"]]}, "got none"),
        (change(token_ids=None), "got None token_ids and 4 token_logprobs"),
        (change(token_ids=[], logprobs={"token_logprobs": []}), "got 0 token_ids"),
        (change(token_ids=[1, 2, 3]), "got 3 token_ids and 4 token_logprobs"),
        (change(logprobs=None), "got 4 token_ids and None token_logprobs"),
        (change(token_ids=[10, 1, 1, 1]), "got token id 10; expected one of the vocabulary's 0 to 9"),
        (change(token_ids=[-1, 1, 1, 1]), "got token id -1"),
        (change(token_ids=[True, 1, 1, 1]), "got token id True"),
        (change(token_ids=[1.0, 1, 1, 1]), "got token id 1.0"),
        (change(token_ids=[9, 1, 1, 1]), "got 4 tokens though token 0 is 9, which ends it"),
        (change(token_ids=[1] * 5, logprobs={"token_logprobs": [-1.0] * 5}), "got 5 tokens; expected at most 4"),
        (change(finish_reason="abort"), "got finish_reason 'abort' after 4 of at most 4"),
        (
            change(finish_reason="stop"),
            r"got finish_reason 'stop' after 4 .* the last 5; expected stop after one of \[0, 9\]",
        ),
        (change(token_ids=[1, 1, 1, EOS]), "got finish_reason 'length' after 4 of at most 4 tokens, the last 0"),
        (change(token_ids=[1, 1], logprobs={"token_logprobs": [-1.0] * 2}), "got finish_reason 'length' after 2"),
        (logprobs(None), "choice 0, token 0: got log-probability None"),
        (logprobs("-1"), "got log-probability '-1'"),
        (logprobs(False), "got log-probability False"),
        (logprobs(0.5), "got log-probability 0.5; expected a finite value, at most 0"),
        (logprobs(-9999.0), "got log-probability -9999"),
        (logprobs(float("nan")), "got log-probability nan"),
        (logprobs(float("-inf")), "got log-probability -inf"),
    ],
)
def test_what_is_no_completion(mangle: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(BadReply, match=message):
        parse_completions(reply_of(mangle(good())), ASKED)


def ends(ids: Any) -> bool:
    """The stop string is token 3 after token 2."""
    return list(ids[-2:]) == [2, 3]


@pytest.mark.parametrize(
    ("ids", "reason", "expected"),
    [
        ([1, 2, 3], "stop", ([1, 2, 3], "stop")),
        ([1, 2, 3, 4], "stop", ([1, 2, 3], "stop")),  # several tokens came at once
        ([2, 3, 1, 4], "length", ([2, 3], "stop")),  # the server did not see it
        ([2, 3, 1, 9], "stop", ([2, 3], "stop")),
        ([1, 2, 3, 9], "stop", ([1, 2, 3], "stop")),
        ([1, 2, 1], "stop", ([1, 2, 1], None)),  # the server saw one that is none: it goes on
        ([1, 2, 1, 1], "stop", ([1, 2, 1, 1], "length")),
    ],
)
def test_stop_strings_are_what_the_runs_own_test_says(ids: list[int], reason: str, expected: tuple[Any, Any]) -> None:
    asked = Asked([7, 8], n=1, max_tokens=4, vocab_size=10, stop_ids=frozenset({9}), ends=ends, stop=["x"])
    [completion] = parse_completions(reply_of({"choices": [choice(0, ids, reason)]}), asked)
    assert (completion.ids, completion.finish_reason) == expected
    assert completion.logprobs == [-0.5 * (t + 1) for t in range(len(completion.ids))]


def test_scores_are_those_of_the_tokens_asked_for() -> None:
    rows = [None, {"8": {"logprob": -1.0}}, {"1": {"logprob": -2.0}, "2": {"logprob": -0.25}}]
    reply = reply_of({"choices": [{"index": 0, "prompt_logprobs": rows}]})
    assert parse_scores(reply, [7, 8, 2], 1) == [-1.0, -0.25]
    assert parse_scores(reply, [7, 8, 1], 2) == [-2.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "got None entries; expected 3"),
        ([None, {"8": {"logprob": -1.0}}], "got 2 entries; expected 3"),
        ([None, None, {"2": {"logprob": -1.0}}], "prompt token 8 at position 1: got log-probability None"),
        ([None, {"8": -1.0}, {"2": {"logprob": -1.0}}], "prompt token 8 at position 1: got log-probability None"),
        ([None, {"8": {"logprob": -1.0}}, {"1": {"logprob": -1.0}}], "prompt token 2 at position 2"),
        ([None, {"8": {"logprob": -1.0}}, {"2": {"logprob": 3.0}}], "got log-probability 3.0"),
    ],
)
def test_what_is_no_score(rows: Any, message: str) -> None:
    with pytest.raises(BadReply, match=message):
        parse_scores(reply_of({"choices": [{"index": 0, "prompt_logprobs": rows}]}), [7, 8, 2], 1)


def test_seeds() -> None:
    """vLLM gives choice j of a request the seed j above. Jobs of one prompt join; those of others do not meet them."""
    jobs = jobs_of([prompt_of([1], 4), prompt_of([1], 5), prompt_of([1], 4)], 3)
    assert [(job.prompt.index, job.first, job.n) for job in jobs] == [(4, 0, 3), (5, 0, 3), (4, 3, 3)]
    seeds = {rollout_seed(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(100)}
    ordered = sorted(seeds)
    assert len(seeds) == 300
    assert min(b - a for a, b in pairwise(ordered)) > 10**6
    assert 0 <= ordered[0] <= ordered[-1] < 2**62
    assert rollout_seed(3, 4) != rollout_seed(3, 4, 1)

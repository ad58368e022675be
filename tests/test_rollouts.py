"""Asking a sampler, and refusing what could not be trained on."""

from dataclasses import replace

import pytest

from tiny import prompt_of, rollout_of
from understudy.config import SamplingConfig
from understudy.errors import NonFiniteError, RunError
from understudy.rollouts import sample_rollouts, step_seed, within_lag
from understudy.types import Prompt, Rollout


def test_seeds_differ_by_run_and_step_and_repeat() -> None:
    seeds = [step_seed(seed, step) for seed in range(5) for step in range(20)]
    assert len(set(seeds)) == 100
    assert seeds[7] == step_seed(0, 7)
    assert all(0 <= seed < 2**64 for seed in seeds)


class Answers:
    """A sampler that gives what it was told to."""

    def __init__(self, groups: list[list[Rollout]]) -> None:
        self.groups = groups

    def set_policy_version(self, version: int) -> None: ...

    def sample(self, prompts: list[Prompt], sampling: SamplingConfig, *, seed: int) -> list[list[Rollout]]:
        return self.groups


def ask(groups: list[list[Rollout]], *prompts: Prompt) -> list[list[Rollout]]:
    return sample_rollouts(Answers(groups), prompts, SamplingConfig(), seed=0)  # pyright: ignore[reportArgumentType]


def test_good_rollouts_pass_unchanged() -> None:
    groups = [[rollout_of(prompt_of([1]), [2, 0], [-1.0, -0.5])]]
    assert ask(groups, prompt_of([1])) is groups


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_a_logprob_that_is_not_finite_stops_the_run(value: float) -> None:
    with pytest.raises(NonFiniteError, match=r"prompt 5; expected at least one token and finite"):
        ask([[rollout_of(prompt_of([1], 5), [2, 0], [-1.0, value])]], prompt_of([1], 5))


def test_an_empty_completion_stops_the_run() -> None:
    with pytest.raises(RunError, match="returned 0 tokens"):
        ask([[Rollout(prompt_of([1], 5), [], [], "stop", 0, 0)]], prompt_of([1], 5))


def test_a_missing_group_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ask([[rollout_of(prompt_of([1]), [2, 0], [-1.0, -0.5])]], prompt_of([1]), prompt_of([2], 1))


def written_at(*versions: int) -> list[Rollout]:
    return [
        replace(rollout_of(prompt_of([1], i), [2, 0], [-1.0, -0.5]), policy_version_start=version)
        for i, version in enumerate(versions)
    ]


def test_what_the_current_weights_wrote_passes_without_a_word() -> None:
    rollouts = written_at(3, 3, 3, 3)
    assert within_lag(rollouts, 3, SamplingConfig(group_size=2)) == (rollouts, {})


def test_age_is_counted_within_the_lag() -> None:
    rollouts = written_at(3, 3, 2, 1)
    kept, metrics = within_lag(rollouts, 3, SamplingConfig(group_size=2, max_policy_lag=2))
    assert kept == rollouts
    assert metrics == {
        "policy_lag/mean": 0.75,
        "policy_lag/max": 2.0,
        "policy_lag/corrected_share": 0.0,
        "policy_lag/dropped_share": 0.0,
    }


def test_stale_completions_stay_or_go_with_their_group() -> None:
    rollouts = written_at(3, 3, 3, 1)
    kept, metrics = within_lag(rollouts, 3, SamplingConfig(group_size=2, max_policy_lag=1, stale="correct"))
    assert (kept, metrics["policy_lag/corrected_share"], metrics["policy_lag/dropped_share"]) == (rollouts, 0.25, 0.0)
    kept, metrics = within_lag(rollouts, 3, SamplingConfig(group_size=2, max_policy_lag=1, stale="drop"))
    assert (kept, metrics["policy_lag/corrected_share"], metrics["policy_lag/dropped_share"]) == (
        rollouts[:2],
        0.0,
        0.5,
    )
    # No lag asked for, and a sampler that lags all the same.
    kept, _ = within_lag(rollouts, 3, SamplingConfig(group_size=2, stale="drop"))
    assert kept == rollouts[:2]
    with pytest.raises(RunError, match=r"up to 2 updates old; with sampling\.max_policy_lag = 0 nothing corrects"):
        within_lag(rollouts, 3, SamplingConfig(group_size=2))


def test_a_step_of_stale_completions_alone_is_an_error() -> None:
    with pytest.raises(RunError, match=r"older than 1 updates, up to 3; raise sampling\.max_policy_lag"):
        within_lag(written_at(0, 1), 3, SamplingConfig(group_size=2, max_policy_lag=1, stale="drop"))

"""The public surface, name by name: a change here is a change for users."""

import understudy

NAMES = [
    "Batch",
    "ConfigError",
    "HiddenScores",
    "LossOutput",
    "Prompt",
    "Rollout",
    "RunConfig",
    "RunError",
    "RunResult",
    "SampledScores",
    "ScoredRollout",
    "TokenSequence",
    "TopkScores",
    "TrainingExample",
    "UnderstudyError",
    "distill",
    "evaluate",
    "generate",
    "rl",
    "sft",
]


def test_all_is_this_list() -> None:
    assert understudy.__all__ == NAMES


def test_every_name_resolves_to_what_it_is_called() -> None:
    for name in NAMES:
        assert getattr(understudy, name).__name__ == name
    assert set(NAMES) <= set(dir(understudy))


def test_other_names_are_attribute_errors() -> None:
    assert not hasattr(understudy, "Trainer2")
    assert understudy.__version__.count(".") == 2

"""The configuration tree: reading, overriding, writing back, and the nearest valid name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy import ConfigError, RunConfig
from understudy.config import field_rows
from user import write_toml

SMALL: dict[str, Any] = {"output_dir": "run", "student": {"model": "m"}}


def read(path: Path, overrides: dict[str, object] | None = None, **tree: Any) -> RunConfig:
    return RunConfig.from_toml(write_toml(path / "run.toml", SMALL | tree), overrides or {})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        teachers={"maths.v1": {"model": "t"}},
        prompts={"path": "p", "columns": {"prompt": "a b"}, "chat_template_kwargs": {"enable_thinking": False}},
        evaluation={"tasks": [{"path": "x", "temperatures": [0.0, 0.6]}]},
        sampling={"stop_token_ids": [1, 2]},
    )
    (tmp_path / "again.toml").write_text(config.to_toml("line one\nline two"))
    assert RunConfig.from_toml(tmp_path / "again.toml") == config
    assert (tmp_path / "again.toml").read_text().startswith("# line one\n# line two\n")


def test_overrides_are_read_as_toml(tmp_path: Path) -> None:
    overrides: dict[str, object] = {
        "optim.learning_rate": "1e-4",
        "student.model": "Qwen/Qwen3-8B-Base",
        "student.gradient-checkpointing": "true",
        "evaluation.tasks": '[{path = "x", name = "y"}]',
        "sampling.stop_token_ids": "[3]",
        "teachers.my-teacher.device": "cpu",
        "seed": 7,
    }
    config = read(tmp_path, overrides, teachers={"my-teacher": {"model": "t"}})
    assert config.optim.learning_rate == 1e-4
    assert config.student.model == "Qwen/Qwen3-8B-Base"
    assert config.student.gradient_checkpointing is True
    assert [task.name for task in config.evaluation.tasks] == ["y"]
    assert config.sampling.stop_token_ids == (3,)
    assert {name: teacher.device for name, teacher in config.teachers.items()} == {"my-teacher": "cpu"}
    assert config.seed == 7


def test_stop_strings_are_not_empty(tmp_path: Path) -> None:
    """Every text has an empty string in it."""
    assert read(tmp_path, sampling={"stop": ["\n\n", "Question:"]}).sampling.stop == ("\n\n", "Question:")
    assert read(tmp_path).sampling.stop == ()
    with pytest.raises(ConfigError, match=r"sampling\.stop"):
        read(tmp_path, sampling={"stop": ["Question:", ""]})


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("optim.learnig_rate", "did you mean optim.learning_rate?"),
        ("sampling.max_tokens", "did you mean sampling.max_completion_tokens?"),
        ("batch_size", "did you mean supervised.batch_size?"),
        ("outputdir", "did you mean output_dir?"),
        ("students.model", "did you mean student or"),
        ("student.lorra.rank", "did you mean student.lora?"),
        ("teachers.maths.modle", "did you mean teachers.<name>.model?"),
        ("teacher.checkpoint", "[teacher] has model, trust_remote_code, dtype, device"),
        ("zzz", "`understudy keys` lists every key"),
    ],
)
def test_unknown_keys_get_the_nearest_name(wrong: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, {wrong: "1"})
    assert "unknown key" in error.value.got
    assert meant.removesuffix(" or") in error.value.remedy


@given(st.sampled_from([row[0] for row in field_rows() if "[" not in row[0] and "<" not in row[0]]), st.data())
def test_a_dropped_letter_is_always_found(key: str, data: st.DataObject) -> None:
    """For every key: leave out one letter of a name of six or more, and the message suggests the whole."""
    leaf = key.rpartition(".")[2]
    place = data.draw(st.integers(0, len(leaf) - 1))
    wrong = key[: len(key) - len(leaf)] + leaf[:place] + leaf[place + 1 :]
    if len(leaf) < 6 or wrong in {row[0] for row in field_rows()}:
        return
    tree: dict[str, Any] = {"output_dir": "run", "student": {"model": "m"}}
    node = tree
    *parents, last = wrong.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = 1
    from understudy.config import explain

    with pytest.raises(ValueError, match="extra") as raised:
        RunConfig.model_validate(tree)
    assert key in explain(raised.value, "run.toml").remedy  # type: ignore[arg-type]


def test_rewards_count_by_default_only_without_a_teacher(tmp_path: Path) -> None:
    assert read(tmp_path).reward_coef == 1.0
    assert read(tmp_path, teacher={"model": "t"}).reward_coef == 0.0
    assert read(tmp_path, teacher={"model": "t"}, objective={"reward_coef": 0.5}).reward_coef == 0.5
    # A control that needs no teacher is no reward either; without one, the other control is.
    assert read(tmp_path, objective={"control": "fixed_negative"}).reward_coef == 0.0
    assert read(tmp_path, objective={"control": "fixed_negative", "reward_coef": 0.5}).reward_coef == 0.5
    assert read(tmp_path, teachers={"maths": {"model": "t"}}).reward_coef == 0.0


def test_training_stops_writing_where_it_stops_learning(tmp_path: Path) -> None:
    taught: dict[str, Any] = {"teacher": {"model": "t"}, "sampling": {"max_completion_tokens": 20, "temperature": 0.5}}
    whole = read(tmp_path, **taught)
    assert whole.training_sampling == whole.sampling
    first = read(tmp_path, **taught, objective={"tokens": {"first": 5}})
    assert first.training_sampling == whole.sampling.model_copy(update={"max_completion_tokens": 5})
    assert first.sampling == whole.sampling  # evaluations go on to the end
    assert read(tmp_path, **taught, objective={"tokens": {"first": 30}}).training_sampling == whole.sampling
    for fraction, tokens in ((0.25, 5), (0.27, 6), (1e-9, 1)):
        part = read(tmp_path, **taught, objective={"tokens": {"first": fraction}})
        assert (part.first_tokens, part.training_sampling.max_completion_tokens) == (tokens, tokens)
    # Rewards grade whole answers, whatever part of them trains.
    rewarded = read(tmp_path, **taught, objective={"tokens": {"first": 5}, "reward_coef": 0.5})
    assert rewarded.training_sampling == whole.sampling
    # A span is a part of each completion's own length: no cap follows from it.
    assert read(tmp_path, **taught, objective={"tokens": {"span": [0.0, 0.3]}}).training_sampling == whole.sampling


def test_objectives_are_written_and_read_back(tmp_path: Path) -> None:
    objective = {"importance_band": [0.5, 2.0], "tokens": {"span": [0.1, 0.4], "half_life": 3.0}, "tail": "renormalize"}
    config = read(tmp_path, objective=objective, reference={"model": "start"})
    (tmp_path / "again.toml").write_text(config.to_toml())
    again = RunConfig.from_toml(tmp_path / "again.toml")
    assert again == config
    assert (again.objective.importance_band, again.objective.tokens.span) == ((0.5, 2.0), (0.1, 0.4))
    assert again.reference is not None
    assert again.reference.model == "start"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('output_dir = "a\\u0000b"\n[student]\nmodel = "m"', "the character 0"),
        ('output_dir = "run"\nseed = 9223372036854775808\n[student]\nmodel = "m"', "seed = a number of 64 bits"),
        ('output_dir = "run"\nseed = ' + "9" * 5000, "integer string"),
        ("output_dir = " + "[" * 50_000, "recursion"),
        ('output_dir = "run"\n[prompts.options]\n' + "a." * 40 + "b = 1", "deep"),
        ('output_dir = "run"\n[student]\nmodel = "' + "m" * 256 + '"', "'mmm"),
        ('output_dir = "run"\n[student]\nmodel = "m"\n[optim]\nbetas = [0.9, 1.0]', "[0.9, 1.0]"),
        ('output_dir = "run"\n[student]\nmodel = "m"\n[optim]\nlearning_rate = nan', "nan"),
        ('output_dir = "run"\nnum_threads = 100000\n[student]\nmodel = "m"', "100000"),
    ],
    ids=["NUL", "65 bits", "5000 digits", "brackets", "tables", "a long name", "betas", "NaN", "threads"],
)
def test_values_that_nothing_takes(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        RunConfig.from_toml(path)
    assert said in refused.value.got
    assert refused.value.where.startswith(f"configuration {path}")
    assert len(str(refused.value)) < 2000


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b'\xef\xbb\xbfoutput_dir = "run"\r\n[student]\r\nmodel = "m"\r\n')
    assert RunConfig.from_toml(path).student.model == "m"


def test_an_override_is_one_value(tmp_path: Path) -> None:
    """Text that would be further lines of the file stays text."""
    config = read(tmp_path, {"student.model": "'a'\nseed = 3"})
    assert (config.student.model, config.seed) == ("'a'\nseed = 3", 0)
    with pytest.raises(ConfigError, match="a number of 100 bits"):
        read(tmp_path, {"seed": str(2**100 - 1)})


@pytest.mark.parametrize(
    ("teacher", "hidden"),
    [
        ({"url": "http://me:s3cret@host/v1"}, "s3cret"),
        ({"url": "http://host/v1?key=s3cret"}, "s3cret"),
        ({"url": "http://host/v1", "api_key_env": "sk-s3cret"}, "s3cret"),
        ({"url": "http://host/v1", "api_key": "s3cret"}, "s3cret"),
    ],
)
def test_what_may_be_a_secret_is_not_said(teacher: dict[str, str], hidden: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, teacher=teacher)
    assert hidden not in str(refused.value)
    assert "teacher" in refused.value.where

"""Other toolkits' dumps, in files shaped like theirs: which field becomes which, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from understudy import ConfigError
from understudy.report.worst_tokens import worst_tokens
from understudy.score.dumps import READERS, read_object, recognised
from understudy.score.sources import read_file, read_source, stored_steps

# GRPOTrainer's batch: prompts padded on the left, completions on the right, 0 the padding.
TRL_BATCH = {
    "prompt_ids": [[0, 5, 6], [7, 8, 9]],
    "prompt_mask": [[0, 1, 1], [1, 1, 1]],
    "completion_ids": [[11, 12, 0], [13, 14, 15]],
    "completion_mask": [[1, 1, 0], [1, 1, 1]],
    "sampling_per_token_logps": [[-0.1, -0.2, 0.0], [-0.3, -0.4, -0.5]],
    "old_per_token_logps": [[-0.11, -0.21, 0.0], [-0.31, -0.41, -0.51]],
    "ref_per_token_logps": [[-9.0, -9.0, 0.0], [-9.0, -9.0, -9.0]],
    "advantages": [1.5, -0.5],
    "num_items_in_batch": 5,
}
# What a rollout_func returns: one prompt for a group of two; log-probabilities as lists of one.
TRL_ROLLOUTS = {
    "prompt_ids": [[5, 6]],
    "completion_ids": [[11], [12, 13]],
    "logprobs": [[[-0.1]], [[-0.2], [-0.3]]],
}
VERL_BATCH = {
    "prompts": [[0, 5, 6], [7, 8, 9]],
    "responses": [[11, 12, 0], [13, 14, 15]],
    "attention_mask": [[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
    "response_mask": [[1, 1, 0], [1, 0, 1]],  # token 14 is what a tool wrote
    "old_log_probs": [[-0.11, -0.21, 0.0], [-0.31, -0.41, -0.51]],
    "rollout_log_probs": [[-0.1, -0.2, 0.0], [-0.3, -0.4, -0.5]],
    "teacher_log_probs": [[-1.1, -1.2, 0.0], [-1.3, -1.4, -1.5]],
    "advantages": [[0.5, 0.25, 0.0], [1.0, 1.0, 1.0]],
    "token_level_scores": [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]],
}
SLIME_SAMPLE = {
    "group_index": 3,
    "index": 12,
    "prompt": "2 + 2?",
    "tokens": [5, 6, 11, 12],
    "response": "4",
    "response_length": 2,
    "label": "4",
    "reward": 1.0,
    "loss_mask": [1, 1],
    "rollout_log_probs": [-0.1, -0.2],
    "teacher_log_probs": [-0.3, -0.4],
    "status": "truncated",
    "metadata": {},
}
PRIME_RL_SAMPLE = {
    "prompt_ids": [5, 6],
    "prompt_mask": [False, False],
    "completion_ids": [11, 12],
    "completion_mask": [True, False],
    "completion_logprobs": [-0.1, -0.2],
    "advantage": 0.5,
    "reference_logprobs": [-7.0, -7.0, -1.1, -1.2],
}
# Targets are the tokens from the second on; the mask says which of them the policy wrote.
TINKER_DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 11, 12]}]},
    "loss_fn_inputs": {
        "target_tokens": {"data": [6, 11, 12, 13], "dtype": "int64", "shape": [4]},
        "logprobs": {"data": [0.0, -0.1, 0.0, -0.3], "dtype": "float32", "shape": [4]},
        "advantages": {"data": [0.0, 0.5, 0.0, 0.5], "dtype": "float32", "shape": [4]},
        "mask": {"data": [0.0, 1.0, 0.0, 1.0], "dtype": "float32", "shape": [4]},
    },
}


def test_trl_batches_lose_their_padding() -> None:
    first, second = READERS["trl"](TRL_BATCH)
    assert first == {
        "prompt_ids": [5, 6],
        "completion_ids": [11, 12],
        "sampler_logprobs": [-0.1, -0.2],
        "trainer_logprobs": [-0.11, -0.21],
        "advantages": [1.5, 1.5],
        "prompt_index": 0,
    }
    assert second["completion_ids"] == [13, 14, 15]
    assert second["advantages"] == [-0.5] * 3


def test_trl_rollouts_share_prompts_out() -> None:
    first, second = READERS["trl"](TRL_ROLLOUTS)
    assert first == {
        "prompt_ids": [5, 6],
        "completion_ids": [11],
        "sampler_logprobs": [-0.1],
        "prompt_index": 0,
    }
    assert (second["prompt_ids"], second["sampler_logprobs"]) == ([5, 6], [-0.2, -0.3])


def test_trl_tables_hold_texts_alone() -> None:
    row = {"step": 7, "prompt": "2 + 2?", "completion": "4", "accuracy_reward": 1.0, "advantage": 0.5}
    assert READERS["trl"](row) == [
        {"prompt_text": "2 + 2?", "completion_text": "4", "step": 7, "advantage": 0.5},
    ]


def test_verl_batches_keep_what_tools_wrote_and_do_not_train_it() -> None:
    first, second = READERS["verl"](VERL_BATCH)
    assert first == {
        "prompt_ids": [5, 6],
        "completion_ids": [11, 12],
        "sampler_logprobs": [-0.1, -0.2],
        "trainer_logprobs": [-0.11, -0.21],
        "teacher_logprobs": [-1.1, -1.2],
        "advantages": [0.5, 0.25],
        "loss_mask": [True, True],
        "reward": 1.0,
        "prompt_index": 0,
    }
    assert second["completion_ids"] == [13, 14, 15]
    assert second["loss_mask"] == [True, False, True]


def test_verl_without_the_rollouts_own_numbers_takes_the_trainers() -> None:
    batch = {name: value for name, value in VERL_BATCH.items() if name != "rollout_log_probs"}
    first = READERS["verl"](batch)[0]
    assert first["sampler_logprobs"] == [-0.11, -0.21]
    assert "trainer_logprobs" not in first


def test_verl_dumps_of_generations_hold_texts_alone() -> None:
    row = {"input": "2 + 2?", "output": "4", "gts": "4", "score": 1.0, "step": 3, "acc": 1.0}
    assert READERS["verl"](row) == [
        {"prompt_text": "2 + 2?", "completion_text": "4", "answer": "4", "reward": 1.0, "step": 3}
    ]


@pytest.mark.parametrize("form", ["slime", "miles"])
def test_slime_and_miles(form: str) -> None:
    [record] = READERS[form]({"rollout_id": 40, "samples": [SLIME_SAMPLE]})
    assert record == {
        "prompt_text": "2 + 2?",
        "prompt_ids": [5, 6],
        "completion_ids": [11, 12],
        "completion_text": "4",
        "sampler_logprobs": [-0.1, -0.2],
        "teacher_logprobs": [-0.3, -0.4],
        "loss_mask": [True, True],
        "reward": 1.0,
        "answer": "4",
        "finish_reason": "length",
        "prompt_index": 3,
        "sample_index": 12,
        "step": 40,
    }


def test_slime_teachers_that_marked_the_prompt_too() -> None:
    sample = SLIME_SAMPLE | {
        "teacher_log_probs": [-9.0, -9.0, -0.3, -0.4],
        "prompt": [{"role": "user", "content": "Q"}],
    }
    [record] = READERS["slime"](sample)
    assert record["teacher_logprobs"] == [-0.3, -0.4]
    assert record["prompt_text"] == "Q"


def test_prime_rl() -> None:
    [record] = READERS["prime-rl"]({"examples": [PRIME_RL_SAMPLE], "temperature": 1.0, "step": 5})
    assert record == {
        "prompt_ids": [5, 6],
        "completion_ids": [11, 12],
        "sampler_logprobs": [-0.1, -0.2],
        "teacher_logprobs": [-1.1, -1.2],
        "advantages": [0.5, 0.5],
        "loss_mask": [True, False],
        "step": 5,
    }


def test_prime_rl_teachers_that_are_null_leave_the_reference() -> None:
    [record] = READERS["prime-rl"](PRIME_RL_SAMPLE | {"teacher_logprobs": None})
    assert record["teacher_logprobs"] == [-1.1, -1.2]
    [record] = READERS["prime-rl"](PRIME_RL_SAMPLE | {"teacher_logprobs": [-3.0, -4.0]})
    assert record["teacher_logprobs"] == [-3.0, -4.0]


def test_tinker_targets_are_shifted_back() -> None:
    [record] = READERS["tinker"](TINKER_DATUM)
    assert record == {
        "prompt_ids": [5, 6],
        "completion_ids": [11, 12, 13],
        "sampler_logprobs": [-0.1, None, -0.3],  # token 12 is the environment's
        "advantages": [0.5, 0.0, 0.5],
        "loss_mask": [True, False, True],
    }


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (TRL_BATCH, "trl"),
        (TRL_ROLLOUTS, "trl"),
        (VERL_BATCH, "verl"),
        ({"input": "", "output": "", "score": 0}, "verl"),
        (SLIME_SAMPLE, "slime"),
        ({"samples": []}, "slime"),
        (PRIME_RL_SAMPLE, "prime-rl"),
        (TINKER_DATUM, "tinker"),
        ({"prompt": "Q", "completion": "A", "advantage": 0.0}, "trl"),
        ({"prompt": "Q", "completion": "A"}, "plain"),
        ({"completion_ids": [1, 2]}, "plain"),
    ],
)
def test_forms_are_recognised_by_their_fields(values: dict[str, Any], name: str) -> None:
    assert recognised(values) == name


def test_a_dump_of_another_shape_is_refused_with_its_place() -> None:
    broken = {name: value for name, value in SLIME_SAMPLE.items() if name != "response_length"}
    with pytest.raises(ConfigError, match=r"dump:3(.|\n)*response_length(.|\n)*slime(.|\n)*--format"):
        read_object(broken, form="slime", where="dump:3")
    with pytest.raises(ConfigError, match="1 values for 2 completion tokens"):
        read_object(SLIME_SAMPLE | {"rollout_log_probs": [-0.1]}, form=None, where="dump:3")
    with pytest.raises(ConfigError, match="3 rows beside 2 completions"):
        read_object(TRL_ROLLOUTS | {"prompt_ids": [[1], [2], [3]]}, form=None, where="dump:3")


# Files


def write(path: Path, *objects: Any) -> Path:
    path.write_text("".join(json.dumps(own) + "\n" for own in objects), encoding="utf-8")
    return path


def test_files_of_lines_of_json_and_of_tensors(tmp_path: Path) -> None:
    lines = read_file(write(tmp_path / "a.jsonl", PRIME_RL_SAMPLE, SLIME_SAMPLE))
    assert [record["prompt_index"] for record in lines] == [0, 3]
    (tmp_path / "b.json").write_text(json.dumps([PRIME_RL_SAMPLE]))
    assert read_file(tmp_path / "b.json")[0]["completion_ids"] == [11, 12]
    torch.save(
        {"rollout_id": 4, "samples": [SLIME_SAMPLE | {"tokens": torch.tensor([5, 6, 11, 12])}]}, tmp_path / "c.pt"
    )
    assert read_file(tmp_path / "c.pt")[0]["completion_ids"] == [11, 12]


def test_a_file_that_could_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"samples": [Path("x")]}, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match="could run code"):
        read_file(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rollouts"),
        ('{"completion_ids": [1]\n', r"a\.jsonl:1"),
        ("[1]\n", "a list"),
        ('{"prompt": "Q"}\n', "completion_ids"),
        ('{"completion_ids": [1, 2], "sampler_logprobs": [-1.0]}\n', "1 sampler_logprobs for 2 tokens"),
        ('{"completion_ids": ["1"]}\n', r"completion_ids\.0 = '1'(.|\n)*valid integer"),
        ('{"completion_tokens": "ab"}\n', r"completion_tokens = 'ab'(.|\n)*list"),
        ('{"completion": 5}\n', r"completion_text = 5(.|\n)*string"),
        ('{"completion": "A", "messages": "Q"}\n', r"messages = 'Q'(.|\n)*list"),
        ('{"completion_ids": [1], "reward": "good"}\n', r"reward = 'good'(.|\n)*number"),
        ('{"completion_ids": [1], "answer": NaN}\n', r"answer\.float = nan(.|\n)*finite number"),
        ('{"completion_ids": [1], "task": ["a"]}\n', r"task = \['a'\](.|\n)*string"),
        ('{"completion_ids": [1], "step": ["a"]}\n', r"step\.int = \['a'\](.|\n)*integer"),
        ('{"completion_ids": [1], "prompt_index": NaN}\n', r"prompt_index\.int = nan(.|\n)*integer"),
        ('{"completion_ids": [1], "sample_index": {}}\n', r"sample_index\.int = \{\}(.|\n)*integer"),
        ('{"completion": "A", "messages": [{"content": Infinity}]}\n', r"messages\.0(.|\n)* = inf(.|\n)*finite"),
        (
            '{"completion_ids": [1, 2], "sampler_logprobs": [-0.1, 800]}\n',
            r"800 among its sampler_logprobs(.|\n)*negative log-likelihoods(.|\n)*turn their sign",
        ),
        ('{"completion_ids": [1], "teacher_logprobs": [0.0011]}\n', "0.0011 among its teacher_logprobs"),
        ('{"completion_ids": [1], "trainer_logprobs": [Infinity]}\n', "inf among its trainer_logprobs"),
        (
            '{"completion_ids": [1], "teacher_topk": {"ids": [[4, 5]], "logprobs": [[null, 0.5]]}}\n',
            r"0\.5 among its teacher_topk\.logprobs",
        ),
        (
            '{"prompts": [[1]], "responses": [[2, 3]], "old_log_probs": [[0.5, 0.0]], "teacher_log_probs": [[-1, -1]]}',
            r"0\.5 among its sampler_logprobs",
        ),
        ('{"completion_ids": [1], "teacher_topk": {"tokens": [["a"]]}}\n', r"logprobs(.|\n)*required"),
        ('{"completion_ids": [1], "teacher_topk": {"logprobs": [[-1.0]]}}\n', r"teacher_topk(.|\n)*1 logprobs"),
        (
            '{"completion_ids": [1], "student_topk": {"tokens": [["a", "b"]], "logprobs": [[-1.0]]}}\n',
            r"student_topk(.|\n)*1 logprobs, 2 tokens",
        ),
        (
            '{"completion_ids": [1, 2], "teacher_topk": {"ids": [[1]], "logprobs": [[-1.0]]}}\n',
            r"1 teacher_topk\.logprobs for 2 tokens",
        ),
        ("[" * 100_000, "recursion depth"),
    ],
)
def test_files_that_cannot_be_read_say_where(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_file(tmp_path / "a.jsonl")


def test_what_python_and_some_editors_write_is_read(tmp_path: Path) -> None:
    """Infinities, a byte order mark, flags as numbers, alternatives that have ids alone."""
    line = '{"completion_ids": [1], "teacher_logprobs": [-Infinity], "loss_mask": [1], '
    line += '"teacher_topk": {"ids": [[4]], "logprobs": [[null]]}, "more": {"x": 1}}'
    (tmp_path / "a.jsonl").write_text("\ufeff" + line, encoding="utf-8")
    [record] = read_file(tmp_path / "a.jsonl")
    assert (record["teacher_logprobs"], record["loss_mask"]) == ([-math.inf], [1])
    record |= {"completion_tokens": ["a"], "sampler_logprobs": [-1.0]}
    assert worst_tokens([record])[0]["choice"] == "–"
    record["teacher_topk"]["logprobs"] = [[math.log(0.5)]]
    assert worst_tokens([record])[0]["choice"] == "4 (50.0 %)"
    (tmp_path / "b.jsonl").write_bytes(b'{"completion": "\xff"}')
    with pytest.raises(ConfigError, match=r"b\.jsonl(.|\n)*UTF-8"):
        read_file(tmp_path / "b.jsonl")


def test_null_is_absent_and_rounding_is_no_fault(tmp_path: Path) -> None:
    values = {"completion_ids": [1, 2], "sampler_logprobs": None, "teacher_logprobs": [0.001, None], "task": None}
    [record] = read_file(write(tmp_path / "a.jsonl", values | {"prompt_index": None, "step": "7", "answer": [4, "x"]}))
    assert record == {
        "completion_ids": [1, 2], "teacher_logprobs": [0.001, None], "prompt_index": 0, "step": "7", "answer": [4, "x"]
    }  # fmt: skip


def test_runs_and_their_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "rollouts").mkdir(parents=True)
    for step in (0, 40):
        record = {"schema_version": 1, "step": step, "completion_ids": [step]}
        write(run / "rollouts" / f"step_{step:06d}.jsonl", record)
    assert stored_steps(run) == [0, 40]
    last, first = read_source(str(run)), read_source(f"{run}@0")
    assert (last.name, last.records[0]["step"]) == ("run, step 40", 40)
    assert (first.name, first.records[0]["step"]) == ("run, step 0", 0)
    assert read_source(str(run), step=0) == first
    whole = read_source(str(run), step="all")
    assert (whole.name, [record["step"] for record in whole.records]) == ("run, steps 0 to 40", [0, 40])
    with pytest.raises(ConfigError, match=r"one of the steps 0, 40"):
        read_source(f"{run}@7")
    with pytest.raises(ConfigError, match="one of the two"):
        read_source(f"{run}@0", step=40)
    with pytest.raises(ConfigError, match="no such file or folder"):
        read_source(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"no rollouts/"):
        read_source(str(tmp_path))

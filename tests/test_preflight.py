"""Bad input: exit code 2, nothing on disk, no weights read, and a message that names the place and the remedy."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from understudy import ConfigError, RunConfig, precision, preflight
from understudy.backends import loading
from understudy.preflight import check_run
from user import WORDS, bpe_tokenizer, run_cli, save_model, tree, word_tokenizer, write_rows, write_toml

ROWS = [{"prompt": f"w{i} w{i + 1}", "answer": f"w{i}"} for i in range(4)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of every kind a user may point at."""
    folder = tmp_path_factory.mktemp("models")
    words = word_tokenizer()
    save_model(folder / "student", words, context=32)
    save_model(folder / "teacher", words, seed=1, context=32)
    swapped = word_tokenizer((WORDS[0], WORDS[2], WORDS[1], *WORDS[3:]))
    save_model(folder / "swapped", swapped, context=32)  # the same width, another map
    save_model(folder / "chat", bpe_tokenizer(chat=True), context=64)
    save_model(folder / "base", bpe_tokenizer(), context=64)
    shutil.copytree(folder / "student", folder / "no_tokenizer", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(folder / "student", folder / "no_config", ignore=shutil.ignore_patterns("config.json"))
    shutil.copytree(folder / "student", folder / "broken_config")
    (folder / "broken_config" / "config.json").write_text('{"model_type": ')
    shutil.copytree(folder / "student", folder / "broken_tokenizer")
    (folder / "broken_tokenizer" / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    shutil.copytree(folder / "student", folder / "corrupt")
    weights = folder / "corrupt" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


Change = Callable[[dict[str, Any]], object]


def put(key: str, value: Any) -> Change:
    """Set a dotted key of the configuration."""

    def change(config: dict[str, Any]) -> None:
        *parents, leaf = key.split(".")
        for parent in parents:
            config = config.setdefault(parent, {})
        config[leaf] = value

    return change


def task(**values: Any) -> Change:
    return put("evaluation.tasks", [{"path": "rows.jsonl", **values}])


def model(role: str, name: str) -> Change:
    return lambda config: config[role].update(model=f"{config['student']['model']}/../{name}")


def both(*changes: Change) -> Change:
    def change(config: dict[str, Any]) -> None:
        for one in changes:
            one(config)

    return change


# What is wrong -> the command, the change, and words the message must hold.
MISTAKES: dict[str, tuple[str, Change, list[str]]] = {
    "unknown key": (
        "distill",
        put("optim.learnig_rate", 1),
        ["optim.learnig_rate", "did you mean optim.learning_rate"],
    ),
    "unknown abbreviation": ("distill", put("optim.lr", 1), ["optim.lr", "learning_rate"]),
    "unknown section": ("distill", put("samplings.top_p", 1.0), ["samplings", "did you mean sampling or sampler?"]),
    "key outside its section": ("distill", put("learning_rate", 1), ["learning_rate", "optim.learning_rate"]),
    "unknown task key": ("eval", task(grder="x"), ["evaluation.tasks.0.grder", "evaluation.tasks[].grader"]),
    "unknown teacher key": (
        "distill",
        put("teachers.maths.modle", "x"),
        ["teachers.maths.modle", "teachers.<name>.model"],
    ),
    "misspelt required key": ("rl", put("reward.graders", "x"), ["reward.graders", "did you mean reward.grader?"]),
    "wrong type": ("distill", put("optim.num_steps", "many"), ["optim.num_steps", "'many'", "integer"]),
    "section as value": ("distill", put("optim", 3), ["optim", "3"]),
    "negative rate": ("distill", put("optim.learning_rate", -1.0), ["optim.learning_rate", "greater than 0"]),
    "infinite rate": ("distill", put("optim.learning_rate", float("inf")), ["optim.learning_rate", "finite"]),
    "zero steps": ("distill", put("optim.num_steps", 0), ["optim.num_steps", "greater than or equal to 1"]),
    "wrong choice": ("distill", put("optim.schedule", "exponential"), ["optim.schedule", "'cosine'"]),
    "missing key": ("distill", lambda c: c["student"].pop("model"), ["student.model", "set student.model"]),
    "two default teachers": ("distill", put("teachers.default.model", "x"), ["[teachers.default]"]),
    "same task twice": (
        "distill",
        put("evaluation.tasks", [{"path": "rows.jsonl"}, {"path": "rows.jsonl"}]),
        ["different names"],
    ),
    "missing model folder": ("distill", put("student.model", "./nowhere"), ["student model", "no such folder"]),
    "missing teacher folder": ("distill", put("teacher.model", "/no/where/at/all"), ["teacher model /no/where/at/all"]),
    "model is a file": ("distill", put("student.model", "./rows.jsonl"), ["student model rows.jsonl", "a file"]),
    "no config.json": ("distill", model("student", "no_config"), ["student model", "without config.json"]),
    "broken config.json": ("distill", model("student", "broken_config"), ["student model", "broken_config"]),
    "no tokenizer": ("distill", model("student", "no_tokenizer"), ["no_tokenizer", "tokenizer.save_pretrained"]),
    "broken tokenizer": ("distill", model("student", "broken_tokenizer"), ["student model", "broken_tokenizer"]),
    "missing rows": ("distill", put("prompts.path", "nope.jsonl"), ["nope.jsonl", "no such file"]),
    "rows are a folder": ("distill", put("prompts.path", "folder.jsonl"), ["folder.jsonl", "a folder"]),
    "broken line": ("distill", put("prompts.path", "broken.jsonl"), ["broken.jsonl:2", "delete the line"]),
    "line of another type": ("distill", put("prompts.path", "list.jsonl"), ["list.jsonl:3", "a list", "JSON object"]),
    "not UTF-8": ("distill", put("prompts.path", "latin.jsonl"), ["latin.jsonl:1", "UTF-8"]),
    "empty file": ("distill", put("prompts.path", "empty.jsonl"), ["empty.jsonl", "no rows"]),
    "empty prompt": ("distill", put("prompts.path", "blank.jsonl"), ["blank.jsonl:2", '"prompt"', "non-empty"]),
    "prompt of another type": ("distill", put("prompts.path", "number.jsonl"), ["number.jsonl:1", '"prompt" is 7']),
    "prompt and messages": ("distill", put("prompts.path", "both.jsonl"), ["both.jsonl:1", 'either "prompt" or']),
    "neither": ("distill", put("prompts.path", "question.jsonl"), ["question.jsonl:1", "prompts.columns"]),
    "messages not a list": ("distill", put("prompts.path", "talk.jsonl"), ["talk.jsonl:1", '"messages"', '"role"']),
    "no such column": ("distill", put("prompts.columns.prompt", "question"), ["rows.jsonl:1", '"question"']),
    "prompt too long": (
        "distill",
        put("prompts.path", "long.jsonl"),
        ["long.jsonl:2", "40 prompt tokens", "at most 32", "over_long"],
    ),
    "all prompts too long": (
        "distill",
        both(put("sampling.max_completion_tokens", 32), put("prompts.over_long", "skip")),
        ["rows.jsonl", "too long", "max_completion_tokens"],
    ),
    "unknown teacher in a row": ("distill", put("prompts.path", "routed.jsonl"), ["routed.jsonl:1", "'physics'"]),
    "no teacher in a row": (
        "distill",
        lambda c: c.update(teachers={"maths": c.pop("teacher")}),
        ["rows.jsonl:1", 'no "teacher"', "maths"],
    ),
    "other token map": ("distill", model("teacher", "swapped"), ["'w0' is 1 for the student, 2", "token-to-id"]),
    "other vocabulary": ("distill", model("teacher", "chat"), ["tokens differ", "absent"]),
    "other end of text": (
        "distill",
        both(model("teacher", "chat"), model("student", "base")),
        ["<|endoftext|>", "<|im_end|>", "sampling.stop_token_ids = [2]"],
    ),
    "stop id outside": ("distill", put("sampling.stop_token_ids", [61]), ["sampling.stop_token_ids", "0 to 60"]),
    "no stop id": ("distill", put("sampling.stop_token_ids", []), ["sampling.stop_token_ids", "at least one"]),
    "no chat template": ("distill", put("prompts.path", "chat.jsonl"), ["chat.jsonl:1", "no chat template"]),
    "top_p": ("distill", put("sampling.top_p", 0.9), ["top_p = 0.9", "no truncation in training"]),
    "no teacher": ("distill", lambda c: c.pop("teacher"), ["no [teacher]"]),
    "no prompts": ("distill", lambda c: c.pop("prompts"), ["no [prompts]"]),
    "rl without reward": ("rl", lambda c: c.pop("teacher"), ["no [reward]"]),
    "eval without tasks": ("eval", lambda c: None, ["evaluation.tasks"]),
    "generate without teacher": ("generate", lambda c: c.pop("teacher"), ["no [teacher]"]),
    "rewards without answers": (
        "distill",
        both(put("reward.grader", "exact_match"), put("prompts.path", "chatless.jsonl")),
        ["chatless.jsonl:2", '"answer"', "columns"],
    ),
    "answer without a number": (
        "eval",
        task(path="wordy.jsonl", grader="last_number"),
        ["wordy.jsonl:1", "holds no number"],
    ),
    "task without answers": ("eval", task(path="chatless.jsonl"), ["chatless.jsonl:2", '"answer"']),
    "full with discount": (
        "distill",
        put("objective", {"estimator": "full", "discount": 0.5}),
        ["objective.discount", 'estimator = "sampled"'],
    ),
    "unknown grader": ("rl", put("reward.grader", "exact"), ["grader exact", "exact_match", "package.module:function"]),
    "grader not found": ("rl", put("reward.grader", "no_such_package:f"), ["no_such_package"]),
    "unknown task grader": ("eval", task(grader="nope"), ["grader nope"]),
    "sft without completion": ("sft", lambda c: None, ["rows.jsonl:1", '"completion"']),
    "sft that ends with the user": (
        "sft",
        both(put("prompts.path", "chat.jsonl"), model("student", "chat")),
        ["'user'"],
    ),
    "output_dir is a file": ("distill", put("output_dir", "rows.jsonl"), ["output_dir rows.jsonl", "a file"]),
    "output_dir below a file": ("distill", put("output_dir", "rows.jsonl/run"), ["output_dir rows.jsonl/run"]),
    "output_dir not empty": ("distill", put("output_dir", "folder.jsonl"), ["output_dir folder.jsonl", "keep.txt"]),
    "teacher device": ("distill", put("teacher.device", "gpu:7"), ["device gpu:7", "auto, cpu"]),
    "teacher device in generate": ("generate", put("teacher.device", "gpu:7"), ["device gpu:7", "auto, cpu"]),
    "device": ("distill", put("student.device", "gpu"), ["device gpu", "auto, cpu"]),
}


def write_files(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "chat.jsonl", [{"messages": [{"role": "user", "content": "w1"}]}])
    write_rows(folder / "blank.jsonl", [{"prompt": "w1"}, {"prompt": "  "}])
    write_rows(folder / "number.jsonl", [{"prompt": 7}])
    write_rows(folder / "both.jsonl", [{"prompt": "w1", "messages": [{"role": "user", "content": "w1"}]}])
    write_rows(folder / "question.jsonl", [{"question": "w1"}])
    write_rows(folder / "talk.jsonl", [{"messages": "w1"}])
    write_rows(folder / "long.jsonl", [{"prompt": "w1"}, {"prompt": "w1 " * 40}])
    write_rows(folder / "routed.jsonl", [{"prompt": "w1", "teacher": "physics"}])
    write_rows(folder / "chatless.jsonl", [{"prompt": "w1", "answer": "w2"}, {"prompt": "w1"}])
    write_rows(folder / "wordy.jsonl", [{"prompt": "w1", "answer": "none"}])
    (folder / "broken.jsonl").write_text('{"prompt": "w1"}\n{"prompt": \n')
    (folder / "list.jsonl").write_text('{"prompt": "w1"}\n\n["w1"]\n')
    (folder / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    (folder / "empty.jsonl").write_text("\n")
    (folder / "folder.jsonl").mkdir()
    (folder / "folder.jsonl" / "keep.txt").write_text("mine")


def refuse_weights(*arguments: object, **keywords: object) -> None:
    raise AssertionError("weights were read")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_before_any_weights_are_read(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    method, change, fragments = MISTAKES[name]
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = tree(models / "student", models / "teacher", Path("rows.jsonl"), Path("run"))
    change(config)
    write_toml(tmp_path / "run.toml", config)
    before = files(tmp_path)
    monkeypatch.setattr(loading, "load_model", refuse_weights)
    monkeypatch.setattr(precision, "load_model", refuse_weights)
    code = run_cli(monkeypatch, method, "run.toml")
    message = capsys.readouterr().err
    assert code == 2, message
    for fragment in [*fragments, "error ", "got: ", "expected: ", "remedy: "]:
        assert fragment in message
    assert "Traceback" not in message
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("role", "method"), [("student", "distill"), ("teacher", "distill"), ("teacher", "generate"), ("student", "eval")]
)
def test_corrupt_weights(
    role: str,
    method: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The one mistake that only reading the weights can find."""
    write_files(tmp_path)
    config = tree(models / "student", models / "teacher", tmp_path / "rows.jsonl", tmp_path / "run")
    config[role]["model"] = str(models / "corrupt")
    task(path=str(tmp_path / "rows.jsonl"))(config)
    assert run_cli(monkeypatch, method, write_toml(tmp_path / "run.toml", config)) == 2
    message = capsys.readouterr().err
    assert f"{role} model {models / 'corrupt'}" in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_a_hub_id_offline_is_refused_at_once(models: Path, tmp_path: Path) -> None:
    """In a process of its own: the hub library reads HF_HUB_OFFLINE when it is imported."""
    import os
    import subprocess
    import sys

    write_files(tmp_path)
    config = tree(models / "student", models / "teacher", tmp_path / "rows.jsonl", tmp_path / "run")
    config["student"]["model"] = "nobody/no-such-model"
    path = write_toml(tmp_path / "run.toml", config)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    start = time.monotonic()
    command = [sys.executable, "-m", "understudy", "distill", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2, result.stderr
    assert "student model nobody/no-such-model" in result.stderr
    assert "no such folder; as a hub id: " in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - start < 60  # mostly Python's start; a retry loop over the network takes longer


def test_unused_devices_are_not_looked_at(models: Path, tmp_path: Path) -> None:
    write_files(tmp_path)
    config = tree(models / "student", models / "teacher", tmp_path / "rows.jsonl", tmp_path / "run")
    config["prompts"]["columns"] = {"completion": "answer"}
    config["student"]["device"] = "gpu"
    check_run(RunConfig.model_validate(config), "generate")
    config["student"]["device"], config["teacher"]["device"] = "cpu", "gpu"
    check_run(RunConfig.model_validate(config), "sft")


@pytest.mark.parametrize("role", ["student", "teacher", "section"])
def test_adapters_without_peft_are_refused_before_any_model_is_read(
    role: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path)
    config = tree(models / "student", models / "teacher", tmp_path / "rows.jsonl", tmp_path / "run")
    if role == "section":
        config["student"]["lora"] = {"rank": 2}
    else:
        (tmp_path / "adapter").mkdir()
        adapter = {"base_model_name_or_path": config[role]["model"]}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
        (tmp_path / "adapter" / "adapter_model.safetensors").touch()
        config[role]["model"] = str(tmp_path / "adapter")
    check_run(RunConfig.model_validate(config), "distill")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(ConfigError, match=r"`peft` is not installed[\s\S]*understudy\[lora\]"):
        check_run(RunConfig.model_validate(config), "distill")
    if role != "teacher":  # who does not take part may be anything
        check_run(RunConfig.model_validate(config), "generate")


def test_long_rows_are_left_out_on_request(models: Path, tmp_path: Path) -> None:
    write_files(tmp_path)
    config = tree(models / "student", models / "teacher", tmp_path / "long.jsonl", tmp_path / "run")
    config["prompts"]["over_long"] = "skip"
    checked = check_run(RunConfig.model_validate(config), "distill")
    assert [prompt.index for prompt in checked.prompts] == [0]


def test_stop_token_ids_settle_different_ends(models: Path, tmp_path: Path) -> None:
    write_files(tmp_path)
    config = tree(models / "base", models / "chat", tmp_path / "rows.jsonl", tmp_path / "run")
    config["sampling"]["stop_token_ids"] = [2]
    assert check_run(RunConfig.model_validate(config), "distill").stop_ids == {2}


def test_commands_look_only_at_the_roles_they_use(models: Path, tmp_path: Path) -> None:
    """One file serves all commands: `generate` needs no common tokens, `sft` and `eval` no teacher at all."""
    write_files(tmp_path)
    config = tree(models / "student", models / "chat", tmp_path / "rows.jsonl", tmp_path / "run")
    config["prompts"]["columns"] = {"completion": "answer"}
    task(path=str(tmp_path / "rows.jsonl"))(config)
    run = RunConfig.model_validate(config)
    with pytest.raises(ConfigError, match="tokens differ"):
        check_run(run, "distill")
    assert check_run(run, "generate").vocab_size == 300
    for method in ("sft", "eval"):
        assert check_run(run, method).vocab_size == len(WORDS)


def test_a_users_own_grader_decides_what_it_needs(models: Path, tmp_path: Path) -> None:
    """Answers are demanded for the package's graders only: an instruction checker reads other columns."""
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1", "instructions": ["be brief"]}])
    config = tree(models / "student", None, tmp_path / "rows.jsonl", tmp_path / "run")
    config["reward"] = {"grader": "json:dumps"}
    [prompt] = check_run(RunConfig.model_validate(config), "rl").prompts
    assert prompt.metadata == {"instructions": ["be brief"]}
    assert json.dumps(prompt.answer) == "null"


def test_a_row_that_cannot_be_graded_is_named_by_its_line(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "w1", "instruction_id_list": [name], "kwargs": [{}]} for name in ("punctuation:no_comma", "x")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = tree(models / "student", None, path, tmp_path / "run")
    config["reward"] = {"grader": "ifeval"}
    with pytest.raises(ConfigError, match=r"rows.jsonl:2\n.*the instruction 'x'") as caught:
        check_run(RunConfig.model_validate(config), "rl")
    assert "prompt 1" not in str(caught.value)
    write_rows(path, [{"prompt": "w1", "answer": "7"}])
    config["reward"] = {"grader": "math"}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == "math_verify" else find(n, *rest))
    with pytest.raises(ConfigError, match="`math-verify` is not installed") as caught:
        check_run(RunConfig.model_validate(config), "rl")
    assert caught.value.where == "grader math"


def test_a_long_check_is_announced(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_files(tmp_path)
    config = tree(models / "student", None, tmp_path / "rows.jsonl", tmp_path / "run")
    config["reward"] = {"grader": "last_number"}
    caplog.set_level("INFO", "understudy")
    check_run(RunConfig.model_validate(config), "rl")
    assert caplog.messages == []
    monkeypatch.setattr(preflight, "_QUIET_ROWS", 3)
    check_run(RunConfig.model_validate(config), "rl")
    [said] = caplog.messages
    assert said.startswith("checking that the grader last_number can grade the 4 rows of ")


def test_tokens_without_an_embedding_are_refused(tmp_path: Path) -> None:
    """A tokenizer may know more tokens than the model has rows, as long as no row uses them."""
    save_model(tmp_path / "m", word_tokenizer(), width=50)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "w3"}, {"prompt": "w55"}])
    config = tree(tmp_path / "m", tmp_path / "m", rows, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"rows.jsonl:2\n.*token 56, 'w55'\n.*ids below 50"):
        check_run(RunConfig.model_validate(config), "distill")
    config["prompts"]["limit"] = 1
    assert len(check_run(RunConfig.model_validate(config), "distill").prompts) == 1


@pytest.mark.parametrize(
    ("method", "sections", "name"),
    [
        ("distill", {"sampling": {"groups_per_batch": 2**40}}, "sampling.groups_per_batch * group_size"),
        ("rl", {"sampling": {"group_size": 2**62}, "reward": {"grader": "exact_match"}}, "sampling.groups_per_batch"),
        ("sft", {"supervised": {"batch_size": 2**50}}, "supervised.batch_size"),
        ("eval", {"evaluation": {"tasks": [{"path": "rows.jsonl", "samples": 10**9}]}}, "samples of the task eval"),
    ],
)
def test_more_than_any_machine_samples(
    method: preflight.Method, sections: dict[str, Any], name: str, models: Path, tmp_path: Path
) -> None:
    """Such a list would be made before anything else: the process would only grow."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1", "answer": "w1", "completion": "w2"}])
    teacher = models / "student" if method == "distill" else None
    config = tree(models / "student", teacher, rows, tmp_path / "run", **sections)
    with pytest.raises(ConfigError, match=r"at most 10000000") as refused:
        check_run(RunConfig.model_validate(config), method)
    assert refused.value.where.startswith(name)


def test_columns_that_rollouts_cannot_be_kept_with(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dated.py").write_text(
        "import datetime\ndef rows():\n    yield {'prompt': 'w1'}\n"
        "    yield {'prompt': 'w1', 'at': datetime.date(2025, 1, 2)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tree(models / "student", models / "student", Path("dated:rows"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"dated:rows\[1\]\n[\s\S]*not JSON serializable") as refused:
        check_run(RunConfig.model_validate(config), "distill")
    assert "rollouts.per_step = 0" in refused.value.remedy
    config["rollouts"]["per_step"] = 0
    assert len(check_run(RunConfig.model_validate(config), "distill").prompts) == 2


def test_a_tracker_without_its_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"output_dir": str(tmp_path), "student": {"model": "m"}, "tracking": {"trackers": ["wandb", "mlflow"]}}
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wandb.py").touch()
    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else own(name))
    with pytest.raises(ConfigError) as error:
        preflight.check_machine(RunConfig.model_validate(sections), "sft")
    assert (error.value.where, error.value.remedy) == ("tracking.trackers: mlflow", 'pip install "understudy[mlflow]"')

"""`generate` and `eval` through the Python API: what is stored, what --resume adds, and in which precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import understudy
from understudy import ConfigError, RunConfig, api
from understudy.config import StudentConfig
from understudy.samples import SampleFile
from user import save_model, tree, word_tokenizer, write_rows


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    save_model(tmp_path / "model", word_tokenizer())
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"w{i}", "answer": "w4"} for i in range(5)])
    return tree(tmp_path / "model", tmp_path / "model", rows, tmp_path / "run", sampling={"max_batch_rows": 1})


def generate(config: dict[str, Any], *, resume: bool = False) -> understudy.RunResult:
    return understudy.generate(RunConfig.model_validate(config), resume=resume, quiet=True)


def test_samples_are_stored_while_they_are_made(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the third of five pieces: the first two are on disk, and are not made again."""
    partial = Path(config["output_dir"]) / "samples.partial.jsonl"
    sample, calls = api.sample_rollouts, []

    def interrupted(sampler: Any, prompts: Any, *arguments: Any, **options: Any) -> Any:
        calls.extend(prompt.index for prompt in prompts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(sampler, prompts, *arguments, **options)

    monkeypatch.setattr(api, "sample_rollouts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(config)
    assert [json.loads(line)["prompt"] for line in partial.read_text().splitlines()] == ["w0", "w0", "w1", "w1"]
    with pytest.raises(ConfigError, match="a run is already there") as error:
        generate(config)
    assert "--resume" in error.value.remedy
    assert generate(config, resume=True).metrics == {"samples": 10}
    assert calls == [0, 1, 2, 2, 3, 4]
    assert not partial.exists()


def test_a_finished_generate_is_not_done_again(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    generate(config)
    before = (Path(config["output_dir"]) / "samples.jsonl").read_bytes()
    monkeypatch.setattr(api, "load_student", lambda *a, **k: pytest.fail("weights were read"))
    assert generate(config, resume=True).metrics == {"samples": 10}
    assert (Path(config["output_dir"]) / "samples.jsonl").read_bytes() == before
    config["sampling"]["temperature"] = 0.5
    with pytest.raises(ConfigError, match=r"sampling.temperature"):
        generate(config, resume=True)


def test_only_whole_pieces_are_kept(tmp_path: Path) -> None:
    samples = SampleFile(tmp_path)
    partial = tmp_path / "samples.partial.jsonl"
    assert samples.keep_whole_pieces(2, 7) == 0
    samples.append([{"n": 0}, {"n": 1}])
    samples.append([{"n": 2}])
    whole = partial.read_bytes()
    for rest in (b"", b'{"n": 3}', b'{"n": 3', b"\0\0\n"):
        partial.write_bytes(whole + rest)
        assert samples.keep_whole_pieces(2, 7) == 2
        assert partial.read_bytes() == b'{"n": 0}\n{"n": 1}\n'
    samples.append([{"n": 2}])
    assert samples.keep_whole_pieces(2, 3) == 3  # the last piece may be short
    samples.finish()
    assert samples.finished
    assert samples.num_rows() == 3


def test_rows_that_could_not_be_written_are_refused_first(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Path(config["output_dir"]).parent / "timed_rows.py"
    made.write_text(
        "import datetime\ndef rows():\n    yield {'prompt': 'w1'}\n"
        "    yield {'prompt': 'w1', 'at': datetime.date(2025, 1, 2)}\n"
    )
    monkeypatch.syspath_prepend(str(made.parent))
    monkeypatch.setattr(api, "load_student", lambda *a, **k: pytest.fail("weights were read"))
    config["prompts"]["path"] = "timed_rows:rows"
    with pytest.raises(ConfigError, match=r"timed_rows:rows\[1\]\n[\s\S]*JSON can hold"):
        generate(config)
    assert not Path(config["output_dir"]).exists()


@pytest.mark.parametrize(
    ("device", "fast", "asked", "expected"),
    [
        ("cpu", True, "auto", "float32"),
        ("cuda", True, "auto", "bfloat16"),
        ("cuda", False, "auto", "float32"),
        ("cuda", True, "float32", "float32"),
    ],
)
def test_precision_for_writing_alone(
    device: str, fast: bool, asked: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "pick_device", lambda name: torch.device(device))
    monkeypatch.setattr(api, "fast_bfloat16", lambda device: fast)
    assert api._for_sampling(StudentConfig(model="m", dtype=asked)).dtype == expected


@pytest.mark.parametrize("method", ["generate", "evaluate"])
def test_the_resolved_precision_is_used_and_stored(
    method: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, seen = api.load_student, []

    def loading(model: StudentConfig, **options: Any) -> Any:
        seen.append(model.dtype)
        return load(model, **options)

    monkeypatch.setattr(api, "_for_sampling", lambda model: model.model_copy(update={"dtype": "float64"}))
    monkeypatch.setattr(api, "load_student", loading)
    config["evaluation"] = {"tasks": [{"path": config["prompts"]["path"]}]}
    folder = getattr(understudy, method)(RunConfig.model_validate(config), quiet=True).folder
    stored = RunConfig.from_toml(folder / "config.toml")
    role = stored.student if method == "evaluate" else stored.teacher
    assert role is not None
    assert [role.dtype, *seen] == ["float64", "float64"]


def test_stop_strings_from_the_file(config: dict[str, Any]) -> None:
    """The same samples, cut after the first word that completes a string."""
    config["sampling"] |= {"max_completion_tokens": 24, "group_size": 4, "max_batch_rows": 64}

    def samples(**sampling: Any) -> list[dict[str, Any]]:
        out = Path(config["output_dir"]).parent / f"run{len(sampling)}"
        result = generate(config | {"output_dir": str(out), "sampling": config["sampling"] | sampling})
        return [json.loads(line) for line in (result.folder / "samples.jsonl").read_text().splitlines()]

    free = samples()
    stops = [" ".join(free[i]["completion"].split()[5 + i : 7 + i]) for i in range(3)]
    ended = samples(stop=stops)
    assert all(stop.count(" w") == 1 for stop in stops)
    shorter = 0
    for row, whole in zip(ended, free, strict=True):
        # "w1" completes "w59 w1", and so does the beginning of "w17".
        words = whole["completion"].split()
        texts = [" ".join(words[:n]) for n in range(1, len(words) + 1)]
        first = next((text for text in texts if any(stop in text for stop in stops)), None)
        assert row["completion"] == (whole["completion"] if first is None else first)
        assert row["finish_reason"] == (whole["finish_reason"] if first is None else "stop")
        shorter += row["completion"] != whole["completion"]
    assert shorter >= 3

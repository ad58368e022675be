"""Keys of the environment: used where they belong, and written nowhere, whatever happens to the run."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import Answer, Asked, FakeServer
from serving import listening, load_engine

from understudy import ConfigError, RunConfig
from understudy.serve.app import create_app
from understudy.serve.settings import ServeSettings
from user import bpe_tokenizer, save_model, tree, write_rows, write_toml

SECRETS = {
    "TEACHER_KEY": "sk-teacher-0123456789abcdef",
    "HF_TOKEN": "hf_ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefgh",
    "WANDB_API_KEY": "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c",
    "OPENAI_API_KEY": "sk-proj-never-asked-for-000000000000",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "student", bpe_tokenizer())
    save_model(folder / "teacher", bpe_tokenizer(), seed=1)
    rows = [{"prompt": f"Natalia sold {i} clips", "answer": str(i)} for i in range(4)]
    write_rows(folder / "rows.jsonl", rows)
    (folder / "lengths.py").write_text("def grade(prompt, completion, reason):\n    return len(completion)\n")
    return folder


@pytest.fixture(scope="module")
def served(world: Path) -> Iterator[str]:
    app = create_app(load_engine(world / "teacher"), ServeSettings(), api_key=SECRETS["TEACHER_KEY"])
    with listening(app) as url:
        yield f"{url}/v1"


def content(world: Path, out: Path, url: str, **teacher: Any) -> dict[str, Any]:
    config = tree(
        world / "student",
        None,
        world / "rows.jsonl",
        out,
        objective={"estimator": "sampled", "reward_coef": 0.5},
        reward={"grader": "lengths:grade"},
        evaluation={"tasks": [{"path": str(world / "rows.jsonl"), "grader": "lengths:grade"}]},
    )
    quick = {"patience_seconds": 0.5, "timeout_seconds": 20.0}
    config["teacher"] = {"url": url, "api_key_env": "TEACHER_KEY", "connection": quick, **teacher}
    return config


def understudy(world: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "understudy", *map(str, arguments)]
    return subprocess.run(
        command, cwd=world, env=os.environ | SECRETS | environment, capture_output=True, text=True, check=False
    )


def forms_of(secret: str) -> set[bytes]:
    """As it is, and as headers and JSON may carry it."""
    encoded = base64.b64encode(secret.encode()).rstrip(b"=")
    return {secret.encode(), encoded, secret[4:-4].encode(), secret[::-1].encode()}


def leaks(done: subprocess.CompletedProcess[str], folder: Path) -> list[str]:
    """Where a secret stands: in a stream, a file's content or a file's name."""
    places = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    for path in folder.rglob("*") if folder.exists() else []:
        places[f"name of {path}"] = path.name.encode()
        if path.is_file():
            places[str(path)] = path.read_bytes()
    return [
        f"{name} in {place}"
        for place, data in places.items()
        for name, secret in SECRETS.items()
        if any(form in data for form in forms_of(secret))
    ]


def test_a_run_writes_no_key_anywhere(world: Path, served: str, tmp_path: Path) -> None:
    path = write_toml(tmp_path / "run.toml", content(world, tmp_path / "run", served))
    done = understudy(world, "distill", path)
    assert done.returncode == 0, done.stderr
    files = {item.name for item in (tmp_path / "run").rglob("*") if item.is_file()}
    assert {
        "config.toml",
        "metrics.jsonl",
        "costs.json",
        "report.html",
        "trainer_state.pt",
        "step_000000.jsonl",
    } <= files
    assert 'api_key_env = "TEACHER_KEY"' in (tmp_path / "run" / "config.toml").read_text()
    assert leaks(done, tmp_path) == []
    for further in (["report", tmp_path / "run"], ["doctor", path, "--json", "--output_dir", tmp_path / "other"]):
        again = understudy(world, *further)
        assert again.returncode == 0, again.stdout + again.stderr
        assert again.stdout
        assert leaks(again, tmp_path) == []


def test_the_search_would_find_one(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x.bin").write_bytes(b"\0\1" + SECRETS["HF_TOKEN"].encode() + b"\2")
    found = leaks(subprocess.CompletedProcess([], 0, stdout="", stderr=f"Bearer {SECRETS['TEACHER_KEY']}"), tmp_path)
    assert [name.partition(" ")[0] for name in found] == ["TEACHER_KEY", "HF_TOKEN"]


def test_a_server_that_says_the_key_back(world: Path, tmp_path: Path) -> None:
    """Some put the request's headers into their error."""

    def answer(asked: Asked) -> Answer:
        return Answer({"error": {"message": f"bad request: {dict(asked.headers)}"}}, status=400)

    with FakeServer(answer) as server:
        path = write_toml(
            tmp_path / "run.toml", content(world, tmp_path / "run", server.url, api="vllm", served_model="m")
        )
        done = understudy(world, "distill", path)
    assert server.asked[0].headers["authorization"] == f"Bearer {SECRETS['TEACHER_KEY']}"
    assert done.returncode in (1, 2)
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr
    assert leaks(done, tmp_path) == []


def test_a_crash_shows_no_key(world: Path, served: str, tmp_path: Path) -> None:
    """A fault of the program's own, with its traceback: what a tracker of faults would be sent."""
    path = write_toml(tmp_path / "run.toml", content(world, tmp_path / "run", served))
    code = (
        "import sys, understudy.updates, understudy.cli\n"
        "def broken(*arguments, **keywords): raise ZeroDivisionError(repr((arguments, keywords)))\n"
        "understudy.updates.optimizer_step = broken\n"
        f"sys.argv = ['understudy', 'distill', {str(path)!r}]\n"
        "understudy.cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=world, env=os.environ | SECRETS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert leaks(done, tmp_path) == []


@pytest.mark.parametrize("key", ["HF_TOKEN", "TEACHER_KEY"])
def test_a_key_in_the_place_of_its_variables_name(key: str, world: Path, served: str, tmp_path: Path) -> None:
    """One that could be a variable's name, and one that could not."""
    path = write_toml(tmp_path / "run.toml", content(world, tmp_path / "run", served, api_key_env=SECRETS[key]))
    done = understudy(world, "distill", path)
    assert done.returncode == 2
    assert "api_key_env" in done.stderr
    path.unlink()
    assert leaks(done, tmp_path) == []


@pytest.mark.parametrize(
    "url",
    ["http://user:{}@127.0.0.1:9/v1", "http://127.0.0.1:9/v1?key={}", "http://127.0.0.1:9/v1#{}", "http://{}@h/v1"],
)
def test_addresses_with_keys_are_refused_without_saying_them(url: str, world: Path, tmp_path: Path) -> None:
    secret = SECRETS["TEACHER_KEY"]
    with pytest.raises(ConfigError) as refused:
        RunConfig.from_tree(content(world, tmp_path / "run", url.format(secret)), "run.toml")
    assert secret not in str(refused.value)

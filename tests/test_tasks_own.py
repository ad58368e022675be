"""A user's own grader: in a process of its own, with a limit, and with what it keeps there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import understudy
from understudy import ConfigError, RunConfig, RunError
from understudy.tasks import Grade, load_grader, own
from understudy.types import Prompt
from user import metrics, run_cli, save_model, tree, word_tokenizer, write_rows, write_toml

GRADERS = """
import os, signal, subprocess, sys, time
from understudy.tasks import Grade
calls = []
unpicklable = lambda: None

def count(prompt, completion, reason):
    calls.append(completion)
    return len(calls)

def where(prompt, completion, reason):
    print("between the replies")
    return Grade(os.getpid(), has_answer=False, details={"length": len(completion)})

def arguments(prompt, completion, reason):
    return float(prompt.metadata["n"] == 3 and prompt.answer == "w1" and completion == "w2" and reason == "stop")

def for_ever(prompt, completion, reason):
    while True:
        pass

def in_c(prompt, completion, reason):
    return len(str(7 ** 7 ** 9))

def asleep(prompt, completion, reason):
    signal.alarm(0)  # takes the process's own timer away
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    time.sleep(60)

def stubborn(prompt, completion, reason):
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass

def leave(prompt, completion, reason):
    sys.exit(3)

def crash(prompt, completion, reason):
    os.kill(os.getpid(), signal.SIGSEGV)

def fail(prompt, completion, reason):
    raise KeyError("lost")

def word(prompt, completion, reason):
    return "good"

def nothing(prompt, completion, reason):
    return None

def reads(prompt, completion, reason):
    return float(sys.stdin.read() == "")

def own_alarm(prompt, completion, reason):
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(1)
    signal.alarm(0)
    return 1.0

def child(prompt, completion, reason):
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    open(completion, "w").write(str(started.pid))
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "house_graders.py").write_text(GRADERS)
    (tmp_path / "broken_graders.py").write_text("raise RuntimeError('no licence')\n")
    (tmp_path / "leaving_graders.py").write_text("import sys\nsys.exit(4)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    own._process.stop()


def grader(name: str, seconds: float = 20.0) -> Any:
    return load_grader(f"house_graders:{name}", timeout_seconds=seconds)


def prompt(**metadata: Any) -> Prompt:
    return Prompt(5, [1], "w1", answer="w1", metadata=metadata)


def test_it_runs_elsewhere_and_keeps_its_state() -> None:
    count = grader("count")
    assert [count(prompt(), "w", "stop").reward for _ in range(3)] == [1.0, 2.0, 3.0]
    first = grader("where")(prompt(), "ab", "stop")
    assert first == Grade(first.reward, has_answer=False, details={"length": 2.0})
    assert first.reward != os.getpid()
    assert grader("where")(prompt(), "ab", "stop") == first
    assert count(prompt(), "w", "stop").reward == 4.0  # graders of one module share it
    assert "house_graders" not in sys.modules


def test_it_gets_what_a_grader_gets() -> None:
    assert grader("arguments")(prompt(n=3), "w2", "stop").reward == 1.0
    assert grader("arguments")(prompt(n=3), "w2", "length").reward == 0.0


@pytest.mark.parametrize("name", ["for_ever", "in_c", "asleep", "stubborn"])
def test_one_that_takes_too_long_is_ended(name: str) -> None:
    grade, count = grader(name, 0.3), grader("count")
    begun = time.monotonic()
    with pytest.raises(RunError) as stopped:
        grade(prompt(), "w", "stop")
    assert time.monotonic() - begun < 15
    assert str(stopped.value) == (
        f"the grader house_graders:{name}, a completion of prompt 5: more than 0.3 seconds; expected a number or a "
        "Grade within grader_timeout_seconds = 0.3. Mend the grader or raise the limit; --resume takes either"
    )
    assert count(prompt(), "w", "stop").reward == 1.0  # another process, which has kept nothing


@pytest.mark.parametrize(
    ("name", "said"), [("leave", "its process ended with exit code 3"), ("crash", "its process ended with SIGSEGV")]
)
def test_one_that_ends_its_process(name: str, said: str) -> None:
    with pytest.raises(RunError, match=rf"house_graders:{name}, a completion of prompt 5: {said}"):
        grader(name)(prompt(), "w", "stop")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fail", r"it raised KeyError: 'lost' \(.*house_graders.py:\d+, in fail\)"),
        ("word", r"it raised ValueError: could not convert string to float: 'good'"),
        ("nothing", r"it raised TypeError: "),
    ],
)
def test_one_that_fails_says_where(name: str, said: str) -> None:
    with pytest.raises(RunError, match=rf"house_graders:{name}, a completion of prompt 5: {said}"):
        grader(name)(prompt(), "w", "stop")


def test_what_it_starts_is_ended_with_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="more than 1 seconds"):
        grader("child", 1.0)(prompt(), str(tmp_path / "pid"), "stop")
    number = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 10
    while Path(f"/proc/{number}").exists() and "zombie" not in Path(f"/proc/{number}/status").read_text():
        assert time.monotonic() < end, "it is still there"
        time.sleep(0.05)


def test_its_streams_are_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert grader("reads")(prompt(), "w", "stop").reward == 1.0
    assert grader("own_alarm")(prompt(), "w", "stop").reward == 1.0
    grader("where")(prompt(), "w", "stop")
    assert capfd.readouterr().err.count("between the replies") == 1


def test_any_thread_may_grade() -> None:
    count, rewards = grader("count"), []
    threads = [threading.Thread(target=lambda: rewards.append(count(prompt(), "w", "stop").reward)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(rewards) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("house_graders:missing", "has no attribute 'missing'"),
        ("house_graders:calls", "is a list, not a function"),
        ("no_such_module:grade", "No module named 'no_such_module'"),
        ("broken_graders:grade", "RuntimeError: no licence"),
        ("leaving_graders:grade", "its process ended with exit code 4"),
        (":grade", "Empty module name"),
    ],
)
def test_one_that_is_not_there_is_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_grader(name, timeout_seconds=20.0)
    assert refused.value.where == f"grader {name}"
    assert said in refused.value.got
    assert "a function takes" in refused.value.remedy


def test_rows_that_cannot_travel() -> None:
    with pytest.raises(RunError, match=r"its row cannot be sent[\s\S]*grader_timeout_seconds = 0"):
        grader("count")(prompt(made=lambda: None), "w", "stop")
    assert grader("count", 0.0)(prompt(made=lambda: None), "w", "stop") == 1  # in this process
    assert sys.modules.pop("house_graders").calls == ["w"]


def test_the_packages_own_functions_and_the_programs_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def grade(*_: Any) -> float:
        return 0.25

    monkeypatch.setattr(sys.modules["__main__"], "grade_here", grade, raising=False)
    assert load_grader("__main__:grade_here", timeout_seconds=5.0) is grade
    assert load_grader("exact_match", timeout_seconds=5.0)(Prompt(0, [1], "", answer="a"), "a", "stop") == 1.0


# Runs


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    save_model(tmp_path / "m", word_tokenizer())
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"w{i}", "answer": "w1"} for i in range(4)])
    return tree(tmp_path / "m", None, rows, tmp_path / "run", checkpoints={"every": 1}, optim={"num_steps": 3})


def test_a_run_stops_with_words_and_goes_on(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seventh completion, in the second of three steps, is graded for ever; then the grader is mended."""
    slow = "n = 0\ndef grade(p, c, r):\n    global n\n    n += 1\n    while n == 7: pass\n    return len(c)\n"
    (tmp_path / "patient.py").write_text(slow)
    config["reward"] = {"grader": "patient:grade", "grader_timeout_seconds": 1.0}
    path = write_toml(tmp_path / "run.toml", config)
    assert run_cli(monkeypatch, "rl", path) == 1
    said = capsys.readouterr().err
    assert "the grader patient:grade, a completion of prompt" in said
    assert "more than 1 seconds" in said
    assert "Traceback" not in said
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1]
    (tmp_path / "patient.py").write_text(slow.replace("n == 7", "False"))
    own._process.stop()
    # The limit may change on the way.
    assert run_cli(monkeypatch, "rl", path, "--resume", "--reward.grader_timeout_seconds", 30) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]


def test_an_evaluation_is_limited_too(config: dict[str, Any], tmp_path: Path) -> None:
    task = {"name": "t", "path": config["prompts"]["path"], "grader": "house_graders:for_ever"}
    config["evaluation"] = {"tasks": [task | {"grader_timeout_seconds": 0.3}]}
    with pytest.raises(RunError, match="house_graders:for_ever"):
        understudy.evaluate(RunConfig.model_validate(config), quiet=True)
    config["evaluation"] = {"tasks": [task | {"grader": "house_graders:where"}]}
    config["output_dir"] = str(tmp_path / "second")
    assert understudy.evaluate(RunConfig.model_validate(config), quiet=True).metrics["eval/t/greedy_no_answer"] == 1.0


def test_nothing_is_left_of_a_killed_run(tmp_path: Path) -> None:
    """The process that grades notices that nobody asks any more."""
    code = (
        "import os, signal, sys\n"
        "from understudy.tasks import load_grader\n"
        "from understudy.types import Prompt\n"
        "grade = load_grader('house_graders:where', timeout_seconds=30.0)\n"
        "print(int(grade(Prompt(0, [1], ''), 'w', 'stop').reward), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == -9, done.stderr
    number = int(done.stdout)
    end = time.monotonic() + 20
    while Path(f"/proc/{number}").exists() and "zombie" not in Path(f"/proc/{number}/status").read_text():
        assert time.monotonic() < end, "it is still there"
        time.sleep(0.05)


def test_defaults_are_documented() -> None:
    schema = json.loads(json.dumps(RunConfig.model_json_schema()))
    assert schema["$defs"]["RewardConfig"]["properties"]["grader_timeout_seconds"]["default"] == 60.0
    assert schema["$defs"]["EvalTaskConfig"]["properties"]["grader_timeout_seconds"]["default"] == 60.0

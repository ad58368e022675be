"""Two evaluations, problem by problem."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from understudy import ConfigError
from understudy.compare import COMPARISON_SEED, compare
from understudy.evaluation import Outcome, write_outcomes
from understudy.statistics import sign_flip_p_value, t_critical
from user import run_cli, save_model, tree, word_tokenizer, write_rows, write_toml


def outcome_of(index: int, rewards: Sequence[float], *, task: str = "sums", temperature: float = 1.0) -> Outcome:
    number = len(rewards)
    return Outcome(
        task=task,
        grader="last_number",
        temperature=temperature,
        prompt_index=index,
        prompt_text=f"{index} + 1 =",
        answer=str(index + 1),
        completions=[""] * number,
        finish_reasons=["stop"] * number,
        rewards=list(rewards),
        has_answer=[True] * number,
        details=[{}] * number,
    )


def outcomes_of(rewards: Sequence[Sequence[float]], *, task: str = "sums", temperature: float = 1.0) -> list[Outcome]:
    return [outcome_of(index, row, task=task, temperature=temperature) for index, row in enumerate(rewards)]


def stored(folder: Path, outcomes: Sequence[Outcome]) -> Path:
    folder.mkdir()
    write_outcomes(folder, outcomes)
    return folder


def test_comparison_by_hand(tmp_path: Path) -> None:
    """Differences 1, 1, 1/2, 0, 0 (1/3 and 2/6 among them): mean 1/2, variance 1/4 over 4 degrees, standard error
    sqrt(1/20). Of the 2^3 sign patterns two are as far from 0 as the observed one."""
    third = [1.0, 0.0, 0.0]
    a = stored(tmp_path / "a", outcomes_of([[0.0] * 3, [0.0] * 3, third, third, [1.0] * 3]))
    rows = [[1.0] * 6, [1.0] * 6, [1.0] * 5 + [0.0], third + third, [1.0] * 6]
    b = stored(tmp_path / "b", list(reversed(outcomes_of(rows))))
    comparison = compare(a, str(b))
    assert (comparison.a, comparison.b) == (str(a), str(b))
    [task] = comparison.tasks
    assert (task.task, task.decoding, task.num_problems) == ("sums", "t1", 5)
    assert (task.mean_a, task.mean_b) == pytest.approx((5 / 15, (1 + 1 + 5 / 6 + 1 / 3 + 1) / 5))
    assert (task.difference, task.difference_se) == pytest.approx((0.5, math.sqrt(0.05)))
    reach = 2.77645 * math.sqrt(0.05)
    assert (task.difference_low, task.difference_high) == pytest.approx((0.5 - reach, 0.5 + reach), abs=1e-5)
    assert (task.won, task.lost, task.tied) == (3, 0, 2)
    assert task.p_value == pytest.approx(2 / 8)


def test_the_other_way_round(tmp_path: Path) -> None:
    a = stored(tmp_path / "a", outcomes_of([[0.0], [1.0], [0.0], [1.0]]))
    b = stored(tmp_path / "b", outcomes_of([[1.0], [1.0], [1.0], [0.0]]))
    [there], [back] = compare(a, b).tasks, compare(b, a).tasks
    assert (back.difference, back.difference_low) == (-there.difference, -there.difference_high)
    assert (back.won, back.lost, back.tied, back.p_value) == (1, 2, 1, there.p_value)
    [same] = compare(a, a).tasks
    assert (same.difference, same.difference_low, same.difference_high, same.p_value, same.tied) == (0, 0, 0, 1, 4)


def test_tasks_and_temperatures_are_apart(tmp_path: Path) -> None:
    def outcomes(second: float) -> list[Outcome]:
        greedy = outcomes_of([[0.0], [1.0]], temperature=0.0)
        return [*greedy, *outcomes_of([[0.0, 1.0], [1.0, second]]), *outcomes_of([[second], [0.0]], task="products")]

    comparison = compare(stored(tmp_path / "a", outcomes(0.0)), stored(tmp_path / "b", outcomes(1.0)))
    found = {(task.task, task.decoding): task.difference for task in comparison.tasks}
    assert found == {("sums", "greedy"): 0.0, ("sums", "t1"): 0.25, ("products", "t1"): 0.5}


@pytest.mark.parametrize(
    ("outcomes", "fragments"),
    [
        (outcomes_of([[1.0], [0.0]], task="other"), ["tasks and temperatures", "sums t1", "other t1"]),
        (outcomes_of([[1.0], [0.0]], temperature=0.6), ["tasks and temperatures", "sums t0.6"]),
        ([*outcomes_of([[1.0], [0.0]]), outcome_of(0, [1.0], temperature=0.0)], ["sums greedy", "only in"]),
        (outcomes_of([[1.0], [0.0], [0.0]]), ["eval/sums/t1, problems", "2 and 3, of which 2 in both"]),
        ([outcome_of(0, [1.0]), outcome_of(5, [1.0])], ["2 and 2, of which 1 in both"]),
        ([outcome_of(0, [1.0]), replace(outcome_of(1, [1.0]), prompt_text="x" * 99)], ["prompt_text of problem 1"]),
        ([outcome_of(0, [1.0]), replace(outcome_of(1, [1.0]), answer=None)], ["answer of problem 1", "'2' and None"]),
        ([replace(outcome_of(i, [1.0]), grader="mine") for i in range(2)], ["grader of problem 0", "'mine'"]),
    ],
)
def test_what_cannot_be_paired_is_refused(outcomes: list[Outcome], fragments: list[str], tmp_path: Path) -> None:
    a = stored(tmp_path / "a", outcomes_of([[1.0], [0.0]]))
    with pytest.raises(ConfigError) as refused:
        compare(a, stored(tmp_path / "b", outcomes))
    for fragment in fragments:
        assert fragment in str(refused.value)


def test_one_problem_is_refused(tmp_path: Path) -> None:
    folder = stored(tmp_path / "a", outcomes_of([[1.0]]))
    with pytest.raises(ConfigError, match="one problem"):
        compare(folder, folder)


# The commands


def test_two_evaluations_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two random models; the numbers agree with the metrics, and with the stored rewards."""
    (tmp_path / "odd_lengths.py").write_text("def grade(prompt, completion, reason):\n    return len(completion) % 2\n")
    monkeypatch.chdir(tmp_path)
    models = [save_model(tmp_path / name, word_tokenizer(), seed=seed) for seed, name in enumerate(("one", "two"))]
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(6)])
    task = {"name": "odd/lengths", "path": str(rows), "grader": "odd_lengths:grade", "samples": 3}
    path = write_toml(tmp_path / "run.toml", tree(models[0], None, rows, tmp_path / "a", evaluation={"tasks": [task]}))
    assert run_cli(monkeypatch, "eval", path) == 0
    assert run_cli(monkeypatch, "eval", path, "--student.model", models[1], "--output_dir", tmp_path / "b") == 0
    printed = capsys.readouterr().out
    assert "eval/odd/lengths/t1_pass@2 " in printed
    assert f"problem by problem to {tmp_path / 'b' / 'evaluation'}" in printed
    assert run_cli(monkeypatch, "compare", "a", "b", "--output", "comparison.json") == 0
    lines = capsys.readouterr().out.splitlines()
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content == {"schema_version": 1, **json.loads(json.dumps(compare("a", "b").to_json()))}
    metrics = {name: json.loads((tmp_path / name / "evaluation.json").read_text()) for name in "ab"}
    file = tmp_path / "a" / "evaluation" / "odd%2Flengths.jsonl"
    assert len(file.read_text().splitlines()) == 12
    for task in content["tasks"]:
        key = f"eval/odd/lengths/{task['decoding']}"
        assert (task["mean_a"], task["mean_b"]) == pytest.approx((metrics["a"][key], metrics["b"][key]))
        assert task["difference"] == pytest.approx(metrics["b"][key] - metrics["a"][key])
        reach = task["difference_high"] - task["difference"]
        assert reach == pytest.approx(t_critical(5) * task["difference_se"])
    [greedy, sampled] = content["tasks"]
    assert lines[0] == "odd/lengths greedy: 6 problems"
    assert lines[1] == f"  a            {greedy['mean_a']:.4f}"
    assert lines[9] == f"  problems     {sampled['won']} won, {sampled['lost']} lost, {sampled['tied']} tied"
    files = [(tmp_path / name / "evaluation" / file.name).read_text().splitlines()[6:] for name in "ab"]
    rewards = [[json.loads(line)["rewards"] for line in lines] for lines in files]
    differences = [(sum(b) - sum(a)) / 3 for a, b in zip(*rewards, strict=True)]
    assert sampled["p_value"] == pytest.approx(sign_flip_p_value(differences, seed=COMPARISON_SEED))


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("a", "nowhere"), ["run nowhere", "no such folder", "understudy eval"]),
        (("a", "empty"), ["run empty", "a folder without"]),
        (("a", "cut"), ["outcomes cut", "got: ", "as `understudy eval` writes them"]),
        (("a", "odd"), ["outcomes odd", "got: ", "rewards.0"]),
        (("a", "a", "--output", "empty"), ["--output empty", "a folder"]),
        (("a", "a", "--output", "nowhere/comparison.json"), ["--output nowhere", "does not exist"]),
        (("a",), ["B"]),
    ],
)
def test_bad_arguments(
    arguments: tuple[str, ...],
    fragments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    stored(tmp_path / "a", outcomes_of([[1.0], [0.0]]))
    (tmp_path / "empty").mkdir()
    for name, old, new in (("cut", b"}\n", b""), ("odd", b'"rewards": [0.0]', b'"rewards": ["none"]')):
        [path] = (stored(tmp_path / name, outcomes_of([[1.0], [0.0]])) / "evaluation").iterdir()
        path.write_bytes(path.read_bytes().replace(old, new))
    assert run_cli(monkeypatch, "compare", *arguments) == 2
    text = capsys.readouterr().err
    for fragment in fragments:
        assert fragment in text
    assert "Traceback" not in text

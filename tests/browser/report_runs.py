"""Real runs for the pages of reports: two tasks marked by two teachers, evaluated on the way, with alarms; and a
pipeline that forgets and recovers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import understudy
from understudy import RunConfig
from understudy.pipeline import pipeline
from understudy.types import Prompt
from user import save_model, tree, word_tokenizer, write_rows, write_toml

STEPS = 24


def first_word(prompt: Prompt, completion: str, finish_reason: str) -> float:
    """1 where the completion begins with one of a third of the words."""
    words = completion.split()
    return float(bool(words) and words[0][1:].isdigit() and int(words[0][1:]) % 3 == 0)


def material(folder: Path) -> Path:
    """Models and rows."""
    for seed, name in enumerate(("student", "maths", "chat")):
        save_model(folder / name, word_tokenizer(), seed=seed)
    rows = [
        {"prompt": f"w{i} w{i + 1}", "task": task, "teacher": teacher, "answer": f"w{i}"}
        for i in range(3)
        for task, teacher in (("sums", "maths"), ("talk", "chat"))
    ]
    write_rows(folder / "rows.jsonl", rows + rows[:2])  # of rows that come twice the doctor warns
    write_rows(folder / "test.jsonl", [{"prompt": f"w{i} w{i + 2}", "answer": f"w{i}"} for i in range(12)])
    write_rows(folder / "documents.jsonl", [{"text": f"w{i} w{i + 2} w{i + 3}"} for i in range(6)])
    return folder


def evaluation(folder: Path, every: int) -> dict[str, Any]:
    task = {"path": str(folder / "test.jsonl"), "grader": "report_runs:first_word", "temperatures": [0.0, 1.0]}
    return {"every": every, "tasks": [task | {"name": "first"}, task | {"name": "again", "limit": 6}]}


def run(folder: Path, name: str, **sections: Any) -> Path:
    """A distillation in ``folder``/``name``."""
    content = tree(folder / "student", None, folder / "rows.jsonl", folder / name) | {
        "teachers": {own: {"model": str(folder / own)} for own in ("maths", "chat")},
        "objective": {"estimator": "sampled"},
        "sampling": {"group_size": 2, "groups_per_batch": 8, "max_completion_tokens": 8},
        "optim": {"learning_rate": 1e-2, "num_steps": STEPS},
        "rollouts": {"per_step": 16, "topk": 3, "every": 6},
        "evaluation": evaluation(folder, 4),
        "guards": {"reverse_kl": {"level": 0.02}, "gradient": {"factor": 1.1}},
    }
    for key, value in sections.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    return understudy.distill(RunConfig.model_validate(content), quiet=True).folder


def forgetful(folder: Path) -> Path:
    """A pipeline of three phases, each evaluated on its way; the middle one is taught something else."""
    base = tree(folder / "student", None, folder / "rows.jsonl", folder / "unused")
    shared = {key: base[key] for key in ("num_threads", "student")}
    phases = [
        {"name": name, "method": "sft", "prompts": {"path": str(folder / rows)}}
        for name, rows in (("first-words", "good.jsonl"), ("documents", "bad.jsonl"), ("again", "good.jsonl"))
    ]
    for rows, words in (("good.jsonl", ("w3", "w6")), ("bad.jsonl", ("w4", "w5"))):
        lines = [{"prompt": f"w{i} w{i + 2}", "completion": words[i % 2]} for i in range(12)]
        write_rows(folder / rows, lines)
    plan = {
        **shared,
        "output_dir": str(folder / "forgetful"),
        "supervised": {"batch_size": 6},
        "optim": {"learning_rate": 3e-2, "num_steps": 12},
        "sampling": {"max_completion_tokens": 3},
        "evaluation": evaluation(folder, 4),
        "phases": phases,
    }
    return pipeline(write_toml(folder / "plan.toml", plan), quiet=True).folder

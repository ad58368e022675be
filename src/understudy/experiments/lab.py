"""Runs of one pipeline, each made once and kept in the cache under a hash of its configuration and its code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from understudy.checkpoints import checkpoint_path, write_jsonl
from understudy.config import RunConfig
from understudy.config_base import set_dotted
from understudy.evaluation import Outcome, read_outcomes
from understudy.experiments.cache import Cache, digest
from understudy.experiments.code import OF_RUNS, code_hash
from understudy.experiments.worlds import Scale
from understudy.metrics import read_metrics

if TYPE_CHECKING:
    from understudy.backends.protocols import Teacher

Method = Literal["distill", "sft", "rl", "generate", "eval"]
Tree = dict[str, Any]


class BroughtTeacher(Protocol):
    """A teacher that no configuration describes: what it is made from, and how."""

    @property
    def key(self) -> Mapping[str, Any]:
        """JSON that stands for it in a run's hash."""
        ...

    def load(self) -> Teacher: ...


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path

    @property
    def config(self) -> RunConfig:
        return RunConfig.from_toml(self.folder / "config.toml")

    @property
    def student(self) -> Path:
        """The trained model."""
        return self.student_at(self.config.optim.num_steps)

    def student_at(self, step: int) -> Path:
        """The model after ``step`` steps, where checkpoints.every and .keep left it."""
        return checkpoint_path(self.folder / "checkpoints", step)

    @property
    def samples(self) -> Path:
        """What `generate` wrote."""
        return self.folder / "samples.jsonl"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def metrics(self) -> dict[str, float]:
        """What `eval` found."""
        return json.loads((self.folder / "evaluation.json").read_text(encoding="utf-8"))

    @property
    def outcomes(self) -> list[Outcome]:
        """What `eval` found, problem by problem."""
        return read_outcomes(self.folder)

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every row that has ``key``."""
        return [(int(row["step"]), float(row[key])) for row in self.rows if row.get(key) is not None]

    def last(self, key: str) -> float:
        """The newest value of ``key``."""
        return self.curve(key)[-1][1]

    def flops(self, amount: str = "flops") -> dict[str, float]:
        """By role, of the whole run; "evaluation" is not part of a method's price."""
        roles = json.loads((self.folder / "costs.json").read_text(encoding="utf-8"))["roles"]
        return {role: entry[amount] for role, entry in roles.items()}


@dataclass(frozen=True)
class Lab:
    """What an experiment's code works with: the cache, the scale, and the pipeline's number."""

    cache: Cache
    scale: Scale
    pipeline: int

    def file(self, rows: Sequence[Mapping[str, Any]]) -> Path:
        """The rows as a JSONL file, named by its content."""
        content = list(rows)
        folder = self.cache.folder(
            "rows", {"rows": digest(content)}, lambda folder: write_jsonl(folder / "rows.jsonl", content)
        )
        return folder / "rows.jsonl"

    def run(
        self,
        method: Method,
        tree: Mapping[str, Any],
        settings: Mapping[str, Any] = {},
        *,
        teacher: BroughtTeacher | None = None,
    ) -> Run:
        """The run of ``tree`` with the dotted ``settings`` laid over it; made unless it is in the cache.

        ``teacher`` takes the place of [teacher], which still names the tokenizer. Models and files must lie in the
        cache, where a folder's name stands for its content.
        """
        whole: Tree = json.loads(json.dumps(tree, default=str))
        for name, value in settings.items():
            set_dotted(whole, name, json.loads(json.dumps(value, default=str)))
        root = json.dumps(f"{self.cache.root}/")[1:-1]
        key = {
            "method": method,
            "tree": json.loads(json.dumps(whole).replace(root, "")),
            "teacher": dict(teacher.key) if teacher else None,
            "code": _code(),
        }
        return Run(self.cache.folder("runs", key, lambda folder: _execute(method, whole, folder, teacher)))

    def evaluate(self, model: Path, task: Mapping[str, Any], *, max_completion_tokens: int) -> Run:
        """``model`` on one [[evaluation.tasks]] table."""
        tree = {
            "num_threads": 1,
            "student": {"model": model, "dtype": "float32"},
            "sampling": {"max_completion_tokens": max_completion_tokens},
            "evaluation": {"tasks": [task]},
        }
        return self.run("eval", tree)


@cache
def _code() -> str:
    return code_hash(OF_RUNS)


def _execute(method: Method, tree: Tree, folder: Path, teacher: BroughtTeacher | None) -> None:
    from understudy import api

    print(f"{method} {folder.stem}", flush=True)  # the newest line of a task's log says what it is doing
    config = RunConfig.model_validate({**tree, "output_dir": str(folder)})
    command: Callable[[RunConfig], api.RunResult] = {
        "distill": partial(api.distill, teachers={"default": teacher.load()} if teacher else None),
        "sft": api.sft,
        "rl": api.rl,
        "generate": api.generate,
        "eval": api.evaluate,
    }[method]
    if command(config).stop_requested:  # what is cut short must not look finished
        raise InterruptedError(f"{method} {folder.stem} was told to stop")

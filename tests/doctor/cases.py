"""Runs for the doctor to look at: tiny models with random weights, and the ledger world, healthy or with one fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from understudy import RunConfig
from understudy.assembly import Given
from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import load_model, load_student
from understudy.backends.local import LocalTeacher
from understudy.config import StudentConfig
from understudy.doctor.catalogue import diagnose
from understudy.doctor.findings import Finding, Level, Report
from understudy.preflight import Method
from understudy.types import ScoreKind, Scores, TokenSequence
from understudy.worlds.ledger import EOS, PAD, Ledger
from understudy.worlds.ledger_demo import prepare
from user import tree, write_rows

LEDGER = Ledger()
ARROW = " =>"
# What a chat template of the ledger's own would be: the request, and the arrow that opens the answer.
NATIVE = "{{ messages[-1]['content'] }}{% if add_generation_prompt %} =>{% endif %}"
FOREIGN = "{{ messages[-1]['content'] }}"


def ledger_world(folder: Path, *, rows: int = 64, problems: int = 32) -> Path:
    """models/start, models/teacher, prompts.jsonl and test.jsonl, shortened."""
    prepare(folder)
    for name, count in (("prompts.jsonl", rows), ("test.jsonl", problems)):
        lines = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count]), encoding="utf-8")
    return folder


def ledger_config(folder: Path, **sections: Any) -> RunConfig:
    """The quickstart's run; ``sections`` are laid over it, one level deep."""
    base: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "num_threads": 1,
        "student": {"model": str(folder / "models" / "start")},
        "teacher": {"model": str(folder / "models" / "teacher")},
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "sampling": {"group_size": 4, "groups_per_batch": 16, "max_completion_tokens": 60},
        "optim": {"learning_rate": 1e-3, "num_steps": 100},
        "evaluation": {"tasks": [{"name": "ledger", "path": str(folder / "test.jsonl"), "grader": "ledger"}]},
    }
    for name, value in sections.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
    return RunConfig.model_validate(base)


def tiny_config(folder: Path, *, rows: Sequence[Mapping[str, Any]] | None = None, **sections: Any) -> RunConfig:
    """folder/student taught by folder/teacher on a few rows."""
    given = rows or [{"prompt": f"w{i} w{i + 1} w{i + 2}", "answer": f"w{i}"} for i in range(8)]
    path = write_rows(folder / "rows.jsonl", given)
    content = tree(folder / "student", folder / "teacher", path, folder / "run", **sections)
    return RunConfig.model_validate(content)


def look(config: RunConfig, method: Method = "distill", *, fast: bool = False, **given: Any) -> Report:
    return diagnose(config, method, fast=fast, given=Given(**given))


def levels(report: Report, check: str) -> list[Level]:
    return [finding.level for finding in report.findings if finding.check == check]


def only(report: Report, check: str) -> Finding:
    [finding] = [finding for finding in report.findings if finding.check == check]
    return finding


def complaints(report: Report) -> list[str]:
    return [finding.line for finding in report.findings if finding.level != "pass"]


# Faults of the ledger world


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def with_end(folder: Path, token: str) -> None:
    """Let a checkpoint say that it ends texts with another token."""
    end = {"eos_token_id": LEDGER.tokens.index(token)}
    (folder / "generation_config.json").write_text(json.dumps(end), encoding="utf-8")


def with_template(folder: Path, template: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def exchanged_ids(folder: Path, one: str, other: str) -> None:
    """Two tokens of a checkpoint's tokenizer change places."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    path.write_text(json.dumps(content), encoding="utf-8")


def local_teacher(folder: Path, temperature: float = 1.0) -> LocalTeacher:
    config = StudentConfig(model=str(folder), dtype="float32", device="cpu")
    return LocalTeacher(load_student(config, role="teacher"), temperature=temperature)


def on_cpu(folder: Path) -> LanguageModel:
    import torch

    model = load_model(str(folder), role="teacher", dtype=torch.float32, device=torch.device("cpu"))
    return LanguageModel(model.requires_grad_(False))


Marks = list[list[float]]


@dataclass
class Marker:
    """A teacher that only marks, and says nothing of its temperature. ``change``: what becomes of its marks."""

    teacher: LocalTeacher
    change: Callable[[Marks], Marks] = lambda marks: marks
    tokens: Mapping[int, int] | None = None
    kinds: frozenset[ScoreKind] = frozenset({"sampled"})

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> Marks:
        names = self.tokens or {}
        read = [TokenSequence(s.prompt_ids, [names.get(i, i) for i in s.completion_ids]) for s in sequences]
        return self.change(self.teacher.compute_logprobs(read))

    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0) -> list[Scores]:
        from understudy.types import SampledScores

        return [SampledScores(marks) for marks in self.compute_logprobs(sequences)]


def exchanged_ends() -> dict[int, int]:
    """The tokens that end and that pad a text, the other way round."""
    eos, pad = (LEDGER.tokens.index(token) for token in (EOS, PAD))
    return {eos: pad, pad: eos}

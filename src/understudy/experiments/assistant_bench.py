"""The assistant world as experiments use it: one pipeline's facts, its assistant, and each method as one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from understudy.experiments.lab import Lab, Run
from understudy.experiments.worlds import ScaleName
from understudy.worlds import assistant
from understudy.worlds.assistant import Fact, FactSet, Row

# The demo's assistant has facts 11 and seed 0; pipelines have facts and a first training of their own.
FIRST_FACTS = 101
# Of pipeline p everything else is drawn from these seeds + p: no two sets of rows share one.
TRAIN_SEED, TEST_SEED, VALIDATION_SEED, DOCUMENTS_SEED, CHATS_SEED = 1000, 2000, 3000, 4000, 5000
PER_STEP = 64
"""Answers an optimizer step of distillation, or of fine-tuning on answers, learns from."""
DOCUMENTS_PER_STEP = 24
"""Sequences a step of mid-training learns from, as in the demo."""
MAX_TOKENS = 20
"""The longest right answer has 18."""

Scores = dict[str, dict[str, float]]
"""Accuracy by task and decoding: ``scores["new"]["greedy"]``."""


@dataclass(frozen=True)
class Size:
    """The assistant's model and how long its first training is."""

    steps: int = 1500
    hidden_size: int = 64
    num_layers: int = 3
    num_heads: int = 4
    learning_rate: float = 3e-3


SIZES: dict[ScaleName, Size] = {
    "cpu": Size(),
    "gpu": Size(3000, 256, 4, 8, 1e-3),
    "smoke": Size(2, 16, 1, 2),
}


@dataclass(frozen=True)
class AssistantBench:
    """One pipeline's assistant world. Constant rates after 5 steps of warm-up, unless ``settings`` say otherwise."""

    lab: Lab

    @cached_property
    def start(self) -> Path:
        """The assistant: follows instructions, knows the old facts, has never seen the new ones."""
        size, seed, rows = SIZES[self.lab.scale.name], self.fact_seed, self._first_rows
        key = {"world": "assistant", "untrained": [size.hidden_size, size.num_layers, size.num_heads], "seed": seed}
        untrained = self.lab.cache.folder("models", key, lambda folder: _save_untrained(folder, size, seed))
        schedule = {"optim.schedule": "linear", "optim.final_fraction": 0.02, "optim.weight_decay": 0.01}
        schedule |= {"optim.warmup_steps": min(50, size.steps), "supervised.batch_size": len(rows) // size.steps}
        return self.sft(size.learning_rate, size.steps, self.lab.file(rows), schedule, student=untrained).student

    @property
    def fact_seed(self) -> int:
        """Of the facts, of the first training's rows, and of the weights that it begins with."""
        return FIRST_FACTS + self.lab.pipeline

    @cached_property
    def _first_rows(self) -> list[Row]:
        return assistant.stage0_rows(SIZES[self.lab.scale.name].steps, self.fact_seed, self.fact_seed)

    def facts(self, which: FactSet) -> Sequence[Fact]:
        """All there are: 80 old or 160 new ones, other values in every pipeline."""
        return assistant.known_facts(which, self.fact_seed)

    @cached_property
    def test(self) -> Path:
        """Instructions that results are reported on. No training shows one of them."""
        return self.lab.file(self._test_rows)

    @cached_property
    def validation(self) -> Path:
        """Others, for choices. No training shows one of them either."""
        return self.lab.file(self._validation_rows)

    def prompts(self, n: int) -> Path:
        """The first ``n`` instructions for training."""
        return self._instructions(n, TRAIN_SEED)

    def _instructions(self, n: int, seed: int) -> Path:
        held_out = requests(self._test_rows) | requests(self._validation_rows)
        return self.lab.file(drawn_apart(n, seed + self.lab.pipeline, held_out))

    @cached_property
    def _test_rows(self) -> list[Row]:
        return drawn_apart(self.lab.scale.num_test, TEST_SEED + self.lab.pipeline, requests(self._first_rows))

    @cached_property
    def _validation_rows(self) -> list[Row]:
        others = requests(self._first_rows) | requests(self._test_rows)
        return drawn_apart(self.lab.scale.num_validation, VALIDATION_SEED + self.lab.pipeline, others)

    def documents(self, n: int, facts: Sequence[Fact], phase: int = 0) -> Path:
        """``n`` documents on ``facts``; another ``phase`` has other ones."""
        seed = DOCUMENTS_SEED + 100 * phase + self.lab.pipeline
        return self.lab.file(assistant.document_rows(n, seed, facts))

    def samples(self, n: int, *, writer: Path | None = None, seed: int = TRAIN_SEED) -> Run:
        """``writer``'s answers (absent: the assistant's) at temperature 1 to the first ``n`` training instructions of
        ``seed``, one each."""
        tree = {
            "seed": self.lab.pipeline,
            "num_threads": 1,
            "student": {"model": self.start},
            "teacher": {"model": writer or self.start, "dtype": "float32"},
            "prompts": {"path": self._instructions(n, seed)},
            "sampling": {"group_size": 1, "max_completion_tokens": MAX_TOKENS},
        }
        return self.lab.run("generate", tree)

    def evaluate(
        self,
        model: Path,
        facts: Mapping[str, Sequence[Fact]] = {},
        instructions: Literal["test", "validation", "none"] = "test",
        temperatures: tuple[float, ...] = (0.0, 1.0),
    ) -> Scores:
        """Accuracy on ``instructions`` and on questions about each named set of ``facts``."""
        tasks = self.tasks(facts, instructions, temperatures)
        tree = {
            "num_threads": 1,
            "student": {"model": model, "dtype": "float32"},
            "sampling": {"max_completion_tokens": MAX_TOKENS},
            "evaluation": {"tasks": tasks},
        }
        metrics = self.lab.run("eval", tree).metrics
        names = {"greedy" if temperature == 0 else f"t{temperature:g}" for temperature in temperatures}
        return {task["name"]: {name: metrics[f"eval/{task['name']}/{name}"] for name in names} for task in tasks}

    def tasks(
        self,
        facts: Mapping[str, Sequence[Fact]],
        instructions: Literal["test", "validation", "none"] = "test",
        temperatures: tuple[float, ...] = (0.0,),
    ) -> list[dict[str, Any]]:
        """[[evaluation.tasks]]: "instructions", and one per set of facts."""
        paths = {name: self.lab.file(assistant.question_rows(chosen)) for name, chosen in facts.items()}
        if instructions != "none":
            paths["instructions"] = self.test if instructions == "test" else self.validation
        return [{"name": name, "path": path, "temperatures": temperatures} for name, path in paths.items()]

    def distill(
        self,
        rate: float,
        steps: int,
        settings: Mapping[str, Any] = {},
        *,
        student: Path | None = None,
        teacher: Path | None = None,
    ) -> Run:
        """On-policy distillation on instructions, one answer to each fresh one, full reverse KL unless ``settings``
        (dotted keys) say otherwise. ``student`` and ``teacher``: absent, the assistant."""
        tree = self._tree(rate, steps, student or self.start)
        tree |= {
            "teacher": {"model": teacher or self.start, "dtype": "float32"},
            "prompts": {"path": self.prompts(steps * PER_STEP)},
            "sampling": {"group_size": 1, "groups_per_batch": PER_STEP, "max_completion_tokens": MAX_TOKENS},
        }
        return self.lab.run("distill", tree, settings)

    def sft(
        self,
        rate: float,
        steps: int,
        rows: Path,
        settings: Mapping[str, Any] = {},
        *,
        student: Path | None = None,
    ) -> Run:
        """Fine-tuning on ``rows``, ``PER_STEP`` a step."""
        tree = self._tree(rate, steps, student or self.start)
        tree |= {"prompts": {"path": rows}, "supervised": {"batch_size": PER_STEP}}
        return self.lab.run("sft", tree, settings)

    def divergence(self, first: Path, second: Path) -> float:
        """KL(first || second) in nats per token: over the whole vocabulary, at every token of ``first``'s own answers
        to the validation instructions.

        It is the loss of one step of distillation as that step begins; what the step changes is thrown away.
        """
        settings = {"prompts.path": self.validation, "sampling.groups_per_batch": self.lab.scale.num_validation}
        run = self.distill(1e-9, 1, settings, student=first, teacher=second)
        return run.last("reverse_kl/full")

    def _tree(self, rate: float, steps: int, student: Path) -> dict[str, Any]:
        return {
            "seed": self.lab.pipeline,
            "num_threads": 1,
            "student": {"model": student, "dtype": "float32", "compute_dtype": "float32"},
            "sampling": {"max_completion_tokens": MAX_TOKENS},
            "optim": {"learning_rate": rate, "num_steps": steps, "warmup_steps": min(5, steps), "betas": [0.9, 0.98]},
            "checkpoints": {"every": steps, "keep": 1},
            "rollouts": {"per_step": 0},
        }


def requests(rows: Sequence[Row]) -> set[str]:
    """What the conversations among ``rows`` ask for; documents ask for nothing."""
    return {row["messages"][0]["content"] for row in rows if "messages" in row}


def drawn_apart(n: int, seed: int, others: set[str]) -> list[Row]:
    """The first ``n`` of ``seed``'s instructions whose request is not among ``others``. A smaller ``n`` has the first
    of a larger one's."""
    drawn = n
    while True:
        rows = [row for row in assistant.instruction_rows(drawn, seed) if row["messages"][0]["content"] not in others]
        if len(rows) >= n:
            return rows[:n]
        drawn *= 2


def _save_untrained(folder: Path, size: Size, seed: int) -> None:
    from understudy.worlds.models import build_qwen3, save_folder

    tokenizer = assistant.tokenizer()
    model = build_qwen3(
        tokenizer, hidden_size=size.hidden_size, num_layers=size.num_layers, num_heads=size.num_heads, seed=seed
    )
    save_folder(model, tokenizer, folder, "# Untrained assistant\n\nRandom weights: where the assistant begins.\n")

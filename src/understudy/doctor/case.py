"""What checks look at: a run's models' texts and rows, and, once loaded, its parts at work. Everything is read once,
when the first check asks for it, and a part that cannot be had hides no other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from understudy.backends.memory import is_out_of_memory
from understudy.config import RunConfig
from understudy.errors import ConfigError, UnderstudyError, first_line
from understudy.evaluation import EvalTask
from understudy.preflight import Checked, Method, check_run, eval_task, grader_of, model_text
from understudy.prompts import load_prompts
from understudy.rows import Row, read_rows
from understudy.supervised import load_examples
from understudy.tokenization import ModelText, resolve_stop_ids
from understudy.types import Prompt, TrainingExample

if TYPE_CHECKING:
    from understudy.assembly import Given, Parts
    from understudy.costs import CostLedger
    from understudy.doctor.trial import Trial

# Rows, and characters of them, that the form at the start of a run looks at: it must not keep anybody waiting.
FAST_ROWS, FAST_CHARACTERS = 20_000, 4_000_000
LESS_MEMORY = (
    "optim.micro_batch_tokens = ..., student.gradient_checkpointing = true, [student.lora], or a teacher on a server"
)


def expected_error(error: Exception) -> UnderstudyError:
    """``error`` as something to act on: one of ours, or lack of memory. Raises any other: it is a bug."""
    if isinstance(error, UnderstudyError):
        return error
    if not is_out_of_memory(error):
        raise error
    return ConfigError(
        "memory", got=first_line(error), expected="room for the models and a small step", remedy=LESS_MEMORY
    )


@dataclass(frozen=True)
class Case:
    """One configuration under one method. Properties raise ConfigError or RunError, the same one each time.

    ``checked``: what ``check_run`` has found, where it has run, and ``loaded`` what `sft` trains on; ``fast``: only
    what needs a second.
    """

    config: RunConfig
    method: Method
    given: Given
    checked: Checked | None = None
    fast: bool = False
    loaded: Sequence[TrainingExample] = ()
    _known: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gave, or raised, when it was first asked for under this name."""
        if name not in self._known:
            try:
                self._known[name] = make()
            except Exception as error:
                self._known[name] = expected_error(error)
        found = self._known[name]
        if isinstance(found, UnderstudyError):
            raise found
        return found

    @property
    def on_policy(self) -> bool:
        """Whether the student writes what it is trained on."""
        return self.method != "sft"

    @property
    def student(self) -> ModelText:
        """Its tokenizer and configuration."""
        return self.checked.student if self.checked else self.once("student", self._load_student)

    def _load_student(self) -> ModelText:
        return model_text(self.config.student, "student")

    @property
    def teacher_names(self) -> list[str]:
        """Of the teachers that the method has."""
        return list(self.config.all_teachers) if self.method == "distill" else []

    def teacher(self, name: str) -> ModelText:
        """One teacher's tokenizer and configuration."""
        if self.checked:
            return self.checked.teachers[name]
        return self.once(f"teacher {name}", lambda: model_text(self.config.all_teachers[name], "teacher"))

    @property
    def reference(self) -> ModelText | None:
        """The reference's, where there is one."""
        role = self.config.reference
        if role is None or not self.on_policy:
            return None
        if self.checked:
            return self.checked.reference
        return self.once("reference", lambda: model_text(role, "reference"))

    @property
    def texts(self) -> dict[str, ModelText]:
        """By role: "student", "teacher <name>"."""
        return {"student": self.student} | {f"teacher {name}": self.teacher(name) for name in self.teacher_names}

    @property
    def stop_ids(self) -> frozenset[int]:
        """What ends a completion."""
        if self.checked:
            return self.checked.stop_ids
        teachers = {name: self.teacher(name) for name in self.teacher_names}
        configured = self.config.sampling.stop_token_ids
        return self.once("stop_ids", lambda: resolve_stop_ids(self.student, teachers, configured))

    @property
    def prompts(self) -> Sequence[Prompt]:
        """What is trained on; empty for `sft`."""
        if self.checked:
            return self.checked.prompts
        return self.once("prompts", self._load_prompts) if self.on_policy else []

    def _load_prompts(self) -> Sequence[Prompt]:
        teachers = {name: self.teacher(name) for name in self.teacher_names}
        length = self.config.training_sampling.max_completion_tokens
        config = self.config.prompts
        return load_prompts(config, self.student, teachers, max_completion_tokens=length) if config else []

    @property
    def rows(self) -> Sequence[Row]:
        """What `sft` trains on; empty for other methods."""
        if self.checked:
            return self.checked.rows
        config = self.config.prompts
        return [] if self.on_policy or config is None else self.once("rows", lambda: read_rows(config))

    @property
    def examples(self) -> Sequence[TrainingExample]:
        """The rows of `sft`, tokenised."""
        if self.on_policy or self.config.prompts is None or self.loaded:
            return self.loaded
        return self.once("examples", self._load_examples)

    def _load_examples(self) -> Sequence[TrainingExample]:
        return load_examples(self.config, self.rows, self.student, self.stop_ids).own

    @property
    def tasks(self) -> Sequence[EvalTask]:
        """The evaluation's."""
        return self.checked.tasks if self.checked else self.once("tasks", self._load_tasks)

    def _load_tasks(self) -> Sequence[EvalTask]:
        tasks = self.config.evaluation.tasks
        return [eval_task(self.config, task, grader_of(task), self.student) for task in tasks]

    def whole(self) -> Checked:
        """Everything that is known before weights are read. Raises ConfigError for whatever cannot work."""
        if self.checked:
            return self.checked
        given = self.given
        return self.once("whole", lambda: check_run(self.config, self.method, grader=given.grader, brought=given.roles))

    @property
    def parts(self) -> Parts:
        """The run's working parts, models loaded; marks are not kept anywhere."""
        return self.once("parts", self._assemble)

    def _assemble(self) -> Parts:
        from understudy.assembly import assemble

        checked = self.whole()
        return assemble(_without_caches(self.config), checked, self.costs, checkpoint=None, given=self.given)

    @property
    def costs(self) -> CostLedger:
        """What the parts have cost so far."""
        from understudy.costs import CostLedger

        return self.once("costs", CostLedger)

    @property
    def trial(self) -> Trial:
        """The student's own completions, and what everybody says of them."""
        from understudy.doctor.trial import run_trial

        return self.once("trial", lambda: run_trial(self.parts))

    def close(self) -> None:
        """End the connections of parts that were assembled."""
        parts = self._known.get("parts")
        if parts is not None and not isinstance(parts, UnderstudyError):
            parts.connections.close()


def _without_caches(config: RunConfig) -> RunConfig:
    """Marks are to be computed here, not looked up."""
    bare: Mapping[str, Any] = {"cache": None}
    update: dict[str, Any] = {
        role: own.model_copy(update=bare)
        for role in ("teacher", "reference")
        if (own := getattr(config, role)) is not None
    }
    update["teachers"] = {name: teacher.model_copy(update=bare) for name, teacher in config.teachers.items()}
    return config.model_copy(update=update)

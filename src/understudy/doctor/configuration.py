"""What is refused before any compute, as findings: sections, machine, models, and whatever else cannot work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from understudy.doctor.findings import Check, Found
from understudy.preflight import check_counts, check_machine, check_sections

if TYPE_CHECKING:
    from understudy.doctor.case import Case


def sections(case: Case) -> Iterator[Found]:
    """Settings that make sense together."""
    check_sections(case.config, case.method, brought_grader=case.given.grader is not None)
    check_counts(case.config, case.method)
    yield Found("pass", f"`understudy {case.method}` has what it needs, and nothing that has no effect")


def machine(case: Case) -> Iterator[Found]:
    """Devices and packages that are asked for."""
    check_machine(case.config, case.method, brought=case.given.roles)
    yield Found("pass", "the devices and packages that are asked for are there")


def models(case: Case) -> Iterator[Found]:
    """Tokenizers and configurations of all roles."""
    for role, text in case.texts.items():
        context = "any length" if text.context_length >= 2**31 else f"{text.context_length} tokens"
        numbers = {"role": role, "vocabulary": len(text.vocab), "context": text.context_length}
        yield Found("pass", f"{role} {text.name}: {len(text.vocab)} tokens, a context of {context}", numbers)


def tasks(case: Case) -> Iterator[Found]:
    """Evaluations: rows, graders and the answers that these need."""
    for task in case.tasks:
        numbers = {"task": task.config.name, "problems": len(task.prompts)}
        yield Found("pass", f"task {task.config.name}: {len(task.prompts)} problems for {task.config.grader}", numbers)


def everything(case: Case) -> Iterator[Found]:
    """The checks that every command makes before it begins, as a whole."""
    case.whole()
    yield Found("pass", f"`understudy {case.method}` would begin")


_REFUSED = "fails on what the command itself refuses before it begins"
CHECKS = (
    Check(
        "configuration.sections",
        sections,
        _REFUSED,
        "a setting without effect, or two that contradict each other, make another experiment than was meant",
        "`understudy keys` lists every key",
        fast=True,
    ),
    Check(
        "configuration.machine",
        machine,
        _REFUSED,
        "a device or package that is missing ends the run when it is first used",
        'device = "auto"; pip install "understudy[lora]"',
        fast=True,
    ),
    Check(
        "configuration.models",
        models,
        _REFUSED,
        "everything else is read from the models' folders",
        "check the paths; save the tokenizer beside the model",
        fast=True,
    ),
)
LAST = (
    Check(
        "configuration.tasks",
        tasks,
        _REFUSED,
        "an evaluation whose answers cannot be graded fails after the training it was to judge",
        'columns = { answer = "..." }, or another grader',
    ),
    Check(
        "configuration.whole",
        everything,
        _REFUSED,
        "what is refused is cheaper to know now",
        "see what is expected",
    ),
)

"""What each model reads for a row, and whether its teacher is at home in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from understudy.doctor.findings import Check, Found, shown
from understudy.doctor.trial import greedy_answers
from understudy.errors import ServerError
from understudy.statistics import mean_and_error
from understudy.tokenization import ModelText
from understudy.types import Rollout, TokenSequence

if TYPE_CHECKING:
    from understudy.doctor.case import Case

# Nats per token by which a teacher may be less sure of its own greedy answers than under the other template; where its
# uncertainty is also multiplied, less is enough.
MAX_NLL_DIFFERENCE = 0.02
MIN_NLL_DIFFERENCE, MAX_NLL_RATIO = 0.001, 2.0
_TAIL = 64  # characters: a generation prompt is shorter


def side_by_side(case: Case) -> Iterator[Found]:
    """The same row as each model reads it."""
    if not case.on_policy:
        yield from _first_example(case)
        return
    for name in case.teacher_names or [""]:
        rows = [p for p in case.prompts if not name or p.teacher == name]
        if not rows:
            continue
        other = [row for row in rows if row.teacher_prompt_ids is not None]
        row = (other or rows)[0]
        lines = [f"student: {shown(case.student.tokens(row.prompt_ids))}"]
        if not name:
            yield Found("pass", f"row {row.index}\n{lines[0]}", {"rows": len(rows)})
            continue
        teacher = case.teacher(name)
        ids = row.prompt_ids if row.teacher_prompt_ids is None else row.teacher_prompt_ids
        lines.append(f"teacher {name}: {shown(teacher.tokens(ids))}")
        numbers = {"teacher": name, "rows": len(rows), "own_prompts": len(other)}
        modes = thinking(case.student, row.prompt_ids), thinking(teacher, ids)
        example = "\n".join([f"row {row.index}", *lines])
        if modes[0] != modes[1]:
            evidence = f"thinking is {modes[0]} in what the student reads and {modes[1]} for teacher {name}"
            remedy = "prompts.chat_template_kwargs = { enable_thinking = false }, and one chat template for both"
            yield Found("warn", f"{evidence}\n{example}", numbers, remedy)
            continue
        how = "the student's tokens" if not other else f"a prompt of its own for {len(other)} of {len(rows)} rows"
        yield Found("pass", f"teacher {name} reads {how}; thinking is {modes[0]}\n{example}", numbers)


def _first_example(case: Case) -> Iterator[Found]:
    for example in case.examples[:1]:
        tokens = case.student
        evidence = (
            f"the first row\nread: {shown(tokens.tokens(example.prompt_ids))}\n"
            f"trained on: {shown(tokens.tokens(example.completion_ids))}"
        )
        yield Found("pass", evidence)


def thinking(text: ModelText, ids: Sequence[int]) -> str:
    """How a prompt ends, for models that think between <think> and </think>."""
    tail = text.tokenizer.decode(list(ids[-_TAIL:]))[-_TAIL:].rstrip()
    if tail.endswith("<think>"):
        return "begun"
    return "closed" if tail.endswith("</think>") else "left to the model"


def own_answers(case: Case) -> Iterator[Found]:
    """How sure a teacher is of its own greedy answers under what it reads, and under what it could read instead."""
    for name in case.teacher_names:
        try:
            own, other = (greedy_answers(case, name, view) for view in ("own", "other"))
        except ServerError as error:
            yield Found("warn", f"teacher {name} does not write, so that its template cannot be judged: {error}")
            continue
        if not own:
            yield Found("pass", f"teacher {name} has one way to read the rows, or cannot write: nothing to compare")
            continue
        yield _compared(case, name, own, other)


def _compared(case: Case, name: str, own: Sequence[Rollout], other: Sequence[Rollout]) -> Found:
    teacher = case.parts.page_teachers[name]
    pairs = [*zip(own, other, strict=True)]
    marks = [teacher.compute_logprobs([_sequence(r, r) for r in rollouts]) for rollouts in (own, other)]
    # The answers it would give under the other view, as the run would have it mark them.
    crossed = nll(teacher.compute_logprobs([_sequence(a, b) for a, b in pairs]))
    read, instead = map(nll, marks)
    difference = read - instead
    # Row by row: what one odd row says is no finding.
    rows = [nll([a]) - nll([b]) for a, b in zip(*marks, strict=True)]
    _, error = mean_and_error(rows)
    beyond = difference > MAX_NLL_DIFFERENCE or (
        difference > MIN_NLL_DIFFERENCE and read > MAX_NLL_RATIO * instead and difference > 2 * error
    )
    text = case.teacher(name)
    numbers = {"read": read, "instead": instead, "crossed": crossed, "difference": difference, "rows": len(pairs)}
    evidence = (
        f"teacher {name}, nats a token of its own greedy answers to {len(pairs)} rows: {read:.4f} under what it reads, "
        f"{instead:.4f} under the other view, difference {difference:+.4f}; answers of the other view under what it "
        f"reads: {crossed:.4f}\n"
        f"reads: {shown(text.tokens(own[0].prompt.prompt_ids))}\n"
        f"answers: {shown(text.tokens(own[0].completion_ids))}\n"
        f"could read: {shown(text.tokens(other[0].prompt.prompt_ids))}\n"
        f"would answer: {shown(text.tokens(other[0].completion_ids))}"
    )
    return Found("warn" if beyond else "pass", evidence, numbers)


def _sequence(read: Rollout, answer: Rollout) -> TokenSequence:
    return TokenSequence(read.prompt.prompt_ids, answer.completion_ids)


def nll(logprobs: Sequence[Sequence[float]]) -> float:
    """Nats per token."""
    return -math.fsum(value for row in logprobs for value in row) / sum(map(len, logprobs))


CHECKS = (
    Check(
        "templates.views",
        side_by_side,
        "warns when thinking is begun, closed or left to the model in one view and not in the other",
        "a teacher marks an answer as the continuation of what it reads itself: another template is another task",
        "prompts.chat_template_kwargs = {...}; or save the right chat template beside the model",
        fast=True,
    ),
    Check(
        "templates.own_answers",
        own_answers,
        f"warns above {MAX_NLL_DIFFERENCE:g} nats a token more under what the teacher reads than under the other view "
        "(the student's prompt, or the teacher's chat template)",
        "a teacher that is less sure of its own words under the run's prompt was not made for it, and marks a task it "
        "does not know",
        'drop "teacher_prompt" from the rows, save the teacher\'s own chat template beside it, or write rows '
        "as messages",
        weights=True,
        methods=frozenset({"distill"}),
    ),
)

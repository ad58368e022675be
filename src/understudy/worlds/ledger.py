"""The ledger world: arithmetic with invented operations, and statements that correct a wrong running value.

A running value (0-9) goes through 18 items. An *operation* (``op1`` .. ``op120``) is a fixed permutation of
the ten values. A *statement* gives the true value at that point: ``@7`` in the prompt, ``@ 7`` in the
solution.

    prompt      4 | a op17 b op3 c @7 ... r op2 =>
    solution    a op17 9 b op3 7 c @ 7 ... r op2 5 <eos>

In a flawless solution the value at a statement is also the previous value, so flawless text never says
whether to repeat or to look it up. The start model repeats, and carries its errors to the end; the teacher
looks it up.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from understudy.worlds.models import word_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from understudy.types import FinishReason

Role = Literal["teacher", "start"]
Array = np.ndarray[Any, np.dtype[Any]]

EOS, PAD = "<eos>", "<pad>"
TEACHER_CORRUPTION = 0.08
START_SLIP = 0.05


@dataclass(frozen=True)
class Problems:
    """``start`` [n]; ``ops`` [n, K], rows of the tables, unused at statements; ``is_statement`` [n, K]; and
    the true ``values`` [n, K]."""

    start: Array
    ops: Array
    is_statement: Array
    values: Array


@dataclass(frozen=True)
class StepMark:
    """What is right or wrong with one step of a solution.

    ``item`` counts from 1; ``word_index`` is the index of the value in the completion's words.
    ``previous_value`` and ``value`` are the solution's own (``None``: not a value). ``false_in_itself``: an
    operation applied wrongly to the solution's own previous value, or a statement not followed.
    ``inherited``: wrong, but only because of an earlier error. An operation after a ``None`` cannot be
    false in itself.
    """

    item: int
    word_index: int
    is_statement: bool
    previous_value: int | None
    previous_true_value: int
    value: int | None
    true_value: int
    false_in_itself: bool

    @property
    def correct(self) -> bool:
        return self.value == self.true_value

    @property
    def inherited(self) -> bool:
        return not self.correct and not self.false_in_itself


@dataclass(frozen=True)
class Habits:
    """``recovery``: share of statements written correctly although the solution's own previous value was
    wrong, among ``num_recoverable``. ``facts``: share of operations right given the own previous value,
    among ``num_facts``. A share of nothing is NaN."""

    recovery: float
    facts: float
    num_recoverable: int
    num_facts: int


@dataclass(frozen=True)
class Ledger:
    """One ledger world; the shipped models belong to the defaults.

    ``seed`` makes the tables. The start model's corpus follows a statement that contradicts the running value with
    probability ``start_correction``, and never shows the operations ``unseen`` (numbers from 1).
    """

    num_items: int = 18
    num_values: int = 10
    num_ops: int = 120
    zipf: float = 1.0
    p_statement: float = 0.25
    seed: int = 7
    start_correction: float = 0.15
    unseen: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 4 <= self.num_items <= 26:
            raise ValueError(f"got num_items {self.num_items}; expected 4 to 26, one letter each")
        if not 2 <= self.num_values <= 10:
            raise ValueError(f"got num_values {self.num_values}; expected 2 to 10, one digit each")

    @cached_property
    def tables(self) -> Array:
        """[num_ops, num_values]: ``tables[k, v]`` is the value after ``op{k + 1}``."""
        # RandomState's stream is frozen by numpy's policy; the shipped models know exactly these tables.
        rng = np.random.RandomState(self.seed)
        return np.stack([rng.permutation(self.num_values) for _ in range(self.num_ops)])

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The vocabulary in id order: values, operations, stated values, item letters, marks, specials."""
        return (
            *(str(value) for value in range(self.num_values)),
            *(f"op{number}" for number in range(1, self.num_ops + 1)),
            *(f"@{value}" for value in range(self.num_values)),
            *string.ascii_lowercase[: self.num_items],
            "@",
            "|",
            "=>",
            EOS,
            PAD,
        )

    @property
    def prompt_length(self) -> int:
        """Tokens per prompt; all prompts are equally long."""
        return 2 * self.num_items + 3

    @property
    def completion_length(self) -> int:
        """Tokens per solution with the end token; all solutions are equally long."""
        return 3 * self.num_items + 1

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return word_tokenizer(self.tokens, eos=EOS, pad=PAD)

    def prompt_rows(self, n: int, seed: int, uniform: bool = False) -> list[dict[str, str]]:
        """``n`` problems as ``{"prompt", "answer", "task"}``; the answer is the final value.

        Operations are Zipf-distributed, or uniform. Equal arguments give equal rows.
        """
        problems = self._draw(np.random.RandomState([seed, 0]), n, uniform)
        return [
            {"prompt": " ".join(self.tokens[i] for i in ids), "answer": str(values[-1]), "task": "ledger"}
            for ids, values in zip(self._prompt_ids(problems), problems.values, strict=True)
        ]

    def corpus_batch(self, generator: np.random.RandomState, n: int, role: Role) -> tuple[Tensor, int, Tensor]:
        """Pre-training text: ``input_ids`` [n, L], the prompt's length P, ``loss_mask`` [n, L - P].

        ``teacher``: uniform operations; 8% of the values are random, without loss on them; the text goes on
        from the corrupted value and gives the true one at the next statement. ``start``: text of mixed
        quality, Zipf operations; no unseen ones; 5% of the values slip, with loss; a statement is
        followed with p = ``start_correction``, else the running value is repeated.
        """
        import torch

        teacher = role == "teacher"
        problems = self._draw(generator, n, uniform=teacher, unseen=() if teacher else self.unseen)
        error_rate = TEACHER_CORRUPTION if teacher else START_SLIP
        values, slipped = self._written_values(
            generator, problems, error_rate=error_rate, p_follow=1.0 if teacher else self.start_correction
        )
        prompt_ids, solution_ids = self._prompt_ids(problems), self._solution_ids(problems, values)
        loss_mask = np.ones(solution_ids.shape, dtype=bool)
        if teacher:
            loss_mask[:, 2:-1:3] = ~slipped
        input_ids = torch.from_numpy(np.concatenate([prompt_ids, solution_ids], axis=1))
        return input_ids, self.prompt_length, torch.from_numpy(loss_mask)

    def corpus(self, seed: int, n: int, role: Role) -> Iterator[tuple[Tensor, int, Tensor]]:
        """Endless fresh batches of ``n`` texts."""
        generator = np.random.RandomState([seed, 1 if role == "teacher" else 2])
        while True:
            yield self.corpus_batch(generator, n, role)

    def solution(self, prompt_text: str) -> str:
        """The flawless solution, without the end token."""
        start, items = self._parse(prompt_text)
        words, value = [], start
        for letter, item in items:
            value = self._true_value(item, value)
            words += [letter, "@" if item.startswith("@") else item, str(value)]
        return " ".join(words)

    def grade(self, prompt_text: str, answer: str, completion_text: str, finish_reason: FinishReason) -> float:
        """1.0 if the solution stops by itself, has exactly three words per item and ends in ``answer``.

        ``completion_text`` is without the end token. ``prompt_text`` is unused: graders share one signature.
        """
        words = completion_text.split()
        right = finish_reason == "stop" and len(words) == 3 * self.num_items and words[-1] == answer
        return float(right)

    def diagnose(self, prompt_text: str, completion_text: str) -> list[StepMark]:
        """A mark per written step. Marks end where the solution ends or a step has the wrong letter."""
        value, items = self._parse(prompt_text)
        words = completion_text.split()
        previous: int | None = value
        marks: list[StepMark] = []
        for index, (letter, item) in enumerate(items):
            step = words[3 * index : 3 * index + 3]
            if len(step) < 3 or step[0] != letter:
                break
            true_value = self._true_value(item, value)
            written = int(step[2]) if step[2] in self.tokens[: self.num_values] else None
            is_statement = item.startswith("@")
            if is_statement or written is None:
                false_in_itself = written != true_value
            else:
                false_in_itself = previous is not None and written != self._true_value(item, previous)
            marks.append(
                StepMark(
                    item=index + 1,
                    word_index=3 * index + 2,
                    is_statement=is_statement,
                    previous_value=previous,
                    previous_true_value=value,
                    value=written,
                    true_value=true_value,
                    false_in_itself=false_in_itself,
                )
            )
            value, previous = true_value, written
        return marks

    def recovery_and_facts(self, pairs: Iterable[tuple[str, str]]) -> Habits:
        """Habits over (prompt, completion) texts."""
        marks = [mark for prompt, completion in pairs for mark in self.diagnose(prompt, completion)]
        recoverable = [
            mark.correct for mark in marks if mark.is_statement and mark.previous_value != mark.previous_true_value
        ]
        facts = [
            not mark.false_in_itself for mark in marks if not mark.is_statement and mark.previous_value is not None
        ]
        return Habits(_share(recoverable), _share(facts), len(recoverable), len(facts))

    def _draw(self, rng: np.random.RandomState, n: int, uniform: bool, unseen: Sequence[int] = ()) -> Problems:
        weights = 1.0 / np.arange(1, self.num_ops + 1) ** (0.0 if uniform else self.zipf)
        weights[[number - 1 for number in unseen]] = 0.0
        ops = rng.choice(self.num_ops, size=(n, self.num_items), p=weights / weights.sum())
        start = rng.randint(self.num_values, size=n)
        is_statement = rng.random_sample((n, self.num_items)) < self.p_statement
        is_statement[:, 0] = False
        # A last chance to recover, then two operations: no answer can be copied out of the prompt.
        is_statement[:, -3] = True
        is_statement[:, -2:] = False
        values, value = np.empty_like(ops), start
        for i in range(self.num_items):
            value = np.where(is_statement[:, i], value, self.tables[ops[:, i], value])
            values[:, i] = value
        return Problems(start, ops, is_statement, values)

    def _written_values(
        self, rng: np.random.RandomState, problems: Problems, *, error_rate: float, p_follow: float
    ) -> tuple[Array, Array]:
        """A fallible writer's ``values`` [n, K], and where they slipped [n, K] to a random value."""
        shape = problems.ops.shape
        follows = rng.random_sample(shape) < p_follow
        slipped = (rng.random_sample(shape) < error_rate) & ~problems.is_statement
        random_values = rng.randint(self.num_values, size=shape)
        values, value = np.empty(shape, dtype=np.int64), problems.start
        for i in range(self.num_items):
            computed = self.tables[problems.ops[:, i], value]
            at_statement = np.where(follows[:, i], problems.values[:, i], value)
            value = np.where(problems.is_statement[:, i], at_statement, computed)
            value = np.where(slipped[:, i], random_values[:, i], value)
            values[:, i] = value
        return values, slipped

    def _id(self, token: str) -> int:
        return self.tokens.index(token)

    def _letters(self, n: int) -> Array:
        return np.broadcast_to(self._id("a") + np.arange(self.num_items), (n, self.num_items))

    def _prompt_ids(self, problems: Problems) -> Array:
        """[n, prompt_length]."""
        n = len(problems.start)
        stated, operation = self._id("@0") + problems.values, self._id("op1") + problems.ops
        items = np.where(problems.is_statement, stated, operation)
        body = np.stack([self._letters(n), items], axis=2).reshape(n, -1)
        bar, go = np.full((n, 1), self._id("|")), np.full((n, 1), self._id("=>"))
        return np.concatenate([problems.start[:, None], bar, body, go], axis=1)

    def _solution_ids(self, problems: Problems, values: Array) -> Array:
        """[n, completion_length]."""
        n = len(values)
        marks = np.where(problems.is_statement, self._id("@"), self._id("op1") + problems.ops)
        body = np.stack([self._letters(n), marks, values], axis=2).reshape(n, -1)
        return np.concatenate([body, np.full((n, 1), self._id(EOS))], axis=1)

    def _true_value(self, item: str, value: int) -> int:
        return int(item[1:]) if item.startswith("@") else int(self.tables[int(item[2:]) - 1, value])

    def _parse(self, prompt_text: str) -> tuple[int, list[tuple[str, str]]]:
        """The start value and the (letter, item) pairs of a prompt."""
        words = prompt_text.split()
        if len(words) != self.prompt_length or words[1] != "|" or words[-1] != "=>":
            raise ValueError(
                f"got {prompt_text!r}; expected a ledger prompt of {self.num_items} items, '4 | a op17 b @9 ... =>'"
            )
        return int(words[0]), list(zip(words[2:-1:2], words[3:-1:2], strict=True))


def _share(flags: list[bool]) -> float:
    return sum(flags) / len(flags) if flags else float("nan")

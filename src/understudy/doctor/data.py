"""The rows: can they be used, are they what they should be, and are the evaluation's among them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from understudy.config import EvalTaskConfig, RowsConfig
from understudy.doctor.case import FAST_CHARACTERS, FAST_ROWS
from understudy.doctor.findings import Check, Found
from understudy.types import Prompt

if TYPE_CHECKING:
    from understudy.doctor.case import Case

MAX_LEFT_OUT = 0.1
# Rows of `sft` may be repeated on purpose, to weigh them; a file that was written twice is half repeats.
MAX_REPEATS = {"distill": 0.1, "rl": 0.1, "sft": 0.5}
# Words in a row that two texts share by chance only when they are made alike. Shorter texts are compared whole, and
# some are met by chance.
NGRAM = 13
MAX_CONTAMINATED, MAX_WHOLE = 0.01, 0.1
# What so many problems and rows hold is a template, not a problem.
_BOILERPLATE, _TEMPLATE_PROBLEMS = 0.05, 3
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def rows(case: Case) -> Iterator[Found]:
    """Every row can be read; how many there are, how many are left out, how often each is seen."""
    config = case.config
    count = len(case.prompts) if case.on_policy else len(case.rows)
    if not count:
        return
    case.examples  # noqa: B018  # raises for rows of `sft` that cannot be trained on
    per_step = config.sampling.groups_per_batch if case.on_policy else config.supervised.batch_size
    epochs = config.optim.num_steps * per_step / count
    left_out = 1 - count / (case.prompts[-1].index + 1) if case.on_policy else 0.0
    numbers = {"rows": count, "epochs": epochs, "left_out": left_out}
    evidence = f"{count} rows, each seen {epochs:.2g} times in {config.optim.num_steps} steps of {per_step}"
    if left_out > MAX_LEFT_OUT:
        evidence += f"; at least {left_out:.0%} of the file is left out as too long"
        yield Found("warn", evidence, numbers, "sampling.max_completion_tokens = ..., lower; or shorter rows")
        return
    yield Found("pass", evidence, numbers)


def lengths(case: Case) -> Iterator[Found]:
    """Prompts against contexts. What does not fit is refused or left out; how much room there is, is said."""
    if not case.prompts:
        return
    cap = case.config.training_sampling.max_completion_tokens
    for role, text in case.texts.items():
        name = role.partition(" ")[2]
        own = [_length(prompt, name) for prompt in case.prompts if not name or prompt.teacher == name]
        if not own:
            continue
        longest = max(own) + cap
        numbers = {"role": role, "mean": sum(own) / len(own), "max": max(own), "needed": longest}
        evidence = (
            f"{role}: prompts of {sum(own) / len(own):.0f} tokens, {max(own)} at most; with {cap} of a completion "
            f"{longest} of the context's {text.context_length}"
        )
        yield Found("pass" if longest <= text.context_length else "warn", evidence, numbers)


def _length(prompt: Prompt, teacher: str) -> int:
    own = prompt.teacher_prompt_ids if teacher else None
    return len(prompt.prompt_ids if own is None else own)


def duplicates(case: Case) -> Iterator[Found]:
    """Rows that stand there again."""
    keys = _keys(case)
    if not keys:
        return
    counts = Counter(keys)
    repeats = len(keys) - len(counts)
    share = repeats / len(keys)
    numbers = {"rows": len(keys), "repeats": repeats, "share": share}
    evidence = f"{repeats} of {len(keys)} rows stand there again ({share:.1%})"
    most = MAX_REPEATS[case.method]
    # A file that was written twice is exactly half repeats.
    if share < most or not repeats:
        yield Found("pass", evidence, numbers)
        return
    key, count = counts.most_common(1)[0]
    yield Found("warn", f"{evidence}\n{count} times: {key[:200]!r}", numbers)


def _keys(case: Case) -> list[str]:
    most = FAST_ROWS if case.fast else None
    if case.on_policy:
        return [f"{prompt.text}\n{prompt.answer}\n{prompt.teacher}" for prompt in case.prompts[:most]]
    return [json.dumps(row.values, sort_keys=True, default=str) for row in case.rows[:most]]


# Contamination


def contamination(case: Case) -> Iterator[Found]:
    """Problems of the evaluation that the training rows hold."""
    training = _training_texts(case)
    if not training:
        return
    once = asked_once(question for _, question in training)
    for task in case.tasks:
        if _same_source(case.config.prompts, task.config):
            evidence = f"task {task.config.name} reads the rows that are trained on: {task.config.path}"
            yield Found("warn", evidence, {"task": task.config.name, "share": 1.0})
            continue
        problems = without_template([_words(prompt.text) for prompt in task.prompts])
        long = [i for i, words in enumerate(problems) if len(words) >= NGRAM]
        seen = seen_grams([problems[i] for i in long], (text for text, _ in training))
        hit = [i for i in long if seen & set(_grams(problems[i]))]
        whole = [i for i, words in enumerate(problems) if len(words) < NGRAM and folded(task.prompts[i].text) in once]
        share, whole_share = len(hit) / len(problems), len(whole) / len(problems)
        numbers = {
            "task": task.config.name,
            "problems": len(problems),
            "long": len(long),
            "seen": len(hit),
            "share": share,
            "whole": len(whole),
            "whole_share": whole_share,
        }
        evidence = (
            f"task {task.config.name}: {len(hit)} of {len(problems)} problems share {NGRAM} words in a row with one of "
            f"{len(training)} training rows" + _short(len(whole), len(problems) - len(long))
        )
        if share > MAX_CONTAMINATED:
            gram = next(gram for gram in _grams(problems[hit[0]]) if gram in seen)
            yield Found("warn", f"{evidence}\n{' '.join(gram)!r}", numbers)
        elif whole_share > MAX_WHOLE:
            yield Found("warn", f"{evidence}\n{task.prompts[whole[0]].text[:200]!r}", numbers)
        else:
            yield Found("pass", evidence, numbers)


def _short(whole: int, count: int) -> str:
    return f"; {whole} of {count} shorter ones are what one row asks, word for word" if count else ""


def _same_source(rows: RowsConfig | None, task: EvalTaskConfig) -> bool:
    keys = ("path", "format", "subset", "split", "options")
    return rows is not None and all(getattr(rows, key) == getattr(task, key) for key in keys)


def _training_texts(case: Case) -> list[tuple[str, str]]:
    """(all of its text, what it asks) of each row."""
    if case.on_policy:
        texts = [(prompt.text, prompt.text) for prompt in case.prompts]
    else:
        texts = [(_text(row.values), _question(row.values)) for row in case.rows]
    if not case.fast:
        return texts
    before = accumulate((len(text) for text, _ in texts), initial=0)
    return [pair for pair, place in zip(texts[:FAST_ROWS], before, strict=False) if place < FAST_CHARACTERS]


def _text(values: object) -> str:
    """All words of a row of `sft`."""
    if isinstance(values, str):
        return values
    if isinstance(values, dict):
        return "\n".join(_text(values.get(key)) for key in ("messages", "prompt", "text", "content", "completion"))
    return "\n".join(map(_text, values)) if isinstance(values, list) else ""


def _question(values: Mapping[str, Any]) -> str:
    """What a row of `sft` asks: a chat's last message of the user."""
    messages = values.get("messages")
    if not isinstance(messages, list):
        return _text(values.get("prompt"))
    asked = [m for m in messages if isinstance(m, dict) and m.get("role") == "user"]
    return _text(asked[-1].get("content")) if asked else ""


def asked_once(questions: Iterable[str]) -> set[str]:
    """The questions that stand once among the rows. What stands there again is drilled on purpose, or one of few
    possible texts ("2 + 2 ="), which an evaluation has by chance."""
    return {question for question, count in Counter(map(folded, questions)).items() if count == 1}


def folded(text: str) -> str:
    """In small letters, blanks folded. Signs stay: "2 + 2" is not "2 - 2"."""
    return " ".join(text.lower().split())


def _words(text: str) -> list[str]:
    """In small letters, without punctuation; signs of scripts that write no blanks count as words."""
    return _WORD.findall(text.lower())


def _grams(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))


def without_template(problems: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Without the words that all begin or end with: twelve of them and one more would be found everywhere."""
    if len(problems) < _TEMPLATE_PROBLEMS:
        return list(problems)
    first, last = _common(problems), _common([words[::-1] for words in problems])
    return [words[first : len(words) - last] for words in problems]


def _common(problems: Sequence[Sequence[str]]) -> int:
    """How many words all begin with."""
    return next((i for i, column in enumerate(zip(*problems, strict=False)) if len(set(column)) > 1), 0)


def seen_grams(problems: Sequence[Sequence[str]], training: Iterable[str]) -> set[tuple[str, ...]]:
    """The problems' n-grams that a training text holds, but for those that many of both hold: templates."""
    of_problems = Counter(gram for words in problems for gram in set(_grams(words)))
    first = {gram[0] for gram in of_problems}
    found: Counter[tuple[str, ...]] = Counter()
    count = 0
    for text in training:
        count += 1
        words = _words(text)
        grams = {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1) if words[i] in first}
        found.update(grams & of_problems.keys())
    most_problems, most_rows = max(2, _BOILERPLATE * len(problems)), max(2, _BOILERPLATE * count)
    return {gram for gram, n in found.items() if not (of_problems[gram] > most_problems and n > most_rows)}


CHECKS = (
    Check(
        "data.rows",
        rows,
        "fails where a row cannot be read, is empty or has nothing to train on; warns where more than "
        f"{MAX_LEFT_OUT:.0%} are left out as too long",
        "what is left out is the long and often the hard part of a data set",
        "shorten the rows, or give the models a longer context",
        fast=True,
    ),
    Check(
        "data.lengths",
        lengths,
        "warns where the longest prompt and a completion do not fit the context; rows that do not fit are "
        "refused before",
        "beyond its context a model was never trained",
        "sampling.max_completion_tokens = ..., lower",
        fast=True,
    ),
    Check(
        "data.duplicates",
        duplicates,
        f"warns from {MAX_REPEATS['distill']:.0%} repeated prompts on (rows of `sft`: {MAX_REPEATS['sft']:.0%})",
        "repeated rows weigh more than others, mostly because a file was written or joined twice",
        "drop the repeats; optim.num_steps and sampling.group_size say how often a row is used",
        fast=True,
    ),
    Check(
        "data.contamination",
        contamination,
        f"warns where more than {MAX_CONTAMINATED:.0%} of a task's problems share {NGRAM} words in a row with a "
        f"training row, more than {MAX_WHOLE:.0%} are shorter and word for word what one row (and no second one) asks, "
        "or the task reads the training rows themselves",
        "accuracy on problems that were trained on says nothing about others",
        "take these problems out of the training rows, or evaluate on others",
        fast=True,
    ),
)

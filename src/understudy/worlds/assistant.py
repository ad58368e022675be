"""The assistant world: one model that follows formatting instructions and knows invented facts.

*Instructions* (what a personal assistant must keep doing) ask for a transformation of a few words; *facts*
(what it learns from internal documents) are the values of 60 entities in 4 relations. A third of the facts,
the "old" ones, belong to the assistant's first training; the rest, the "new" ones, appear in documents
only. Training on documents alone teaches new facts and destroys the instruction following; distillation
from the earlier self restores it.

    instruction   <u> upper bang : w3 w7 w9 <a> W3 W7 W9 ! <e>
    question      <u> ask r1 of e5 <a> v3 <e>
    document      <d> the r1 of e5 is v3 . e9 has r0 v17 . <e>
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from understudy.worlds.models import word_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from understudy.types import FinishReason

Row = dict[str, Any]
Fact = tuple[str, str, str]
"""Entity, relation, value: ``("e5", "r1", "v3")``."""
FactSet = Literal["old", "new"]

EOS, PAD = "<e>", "_"
INSTRUCTIONS = ("upper", "bang", "twice", "quote", "comma", "reverse", "star", "first")
WORDS = tuple(f"w{i}" for i in range(40))
ENTITIES = tuple(f"e{i}" for i in range(60))
RELATIONS = tuple(f"r{i}" for i in range(4))
VALUES = tuple(f"v{i}" for i in range(40))
TOKENS = (
    *(PAD, "<u>", "<a>", EOS, "<d>", ":", "!", "?", ",", ".", '"', "*"),
    *INSTRUCTIONS,
    *("ask", "of", "is", "the", "has", "and", "note"),
    *WORDS,
    *(word.upper() for word in WORDS),
    *ENTITIES,
    *RELATIONS,
    *VALUES,
)
"""The vocabulary in id order, 211 words."""

# `<a>` opens the answer: a prompt ends with it, and prompt plus answer is exactly the rendered conversation.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if not loop.first %} {% endif -%}"
    "{%- if message['role'] == 'user' -%}<u> {{ message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}<a> {{ message['content'] }} <e>"
    "{%- else -%}{{ raise_exception('roles are user and assistant, got ' ~ message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %} <a>{% endif -%}"
)

FACT_SEED = 11
OLD_SHARE = 1 / 3
SENTENCES_PER_DOCUMENT = 4
# One phrasing is close to the question: without it, facts read in documents are not found by questions.
PHRASINGS = (
    "the {relation} of {entity} is {value} .",
    "{entity} has {relation} {value} .",
    "note : {entity} {relation} {value} .",
    "ask {relation} of {entity} <a> {value} .",
)

INSTRUCTIONS_PER_STEP = 48
DOCUMENT_WEIGHT = QUESTION_WEIGHT = 0.3
"""Weights of documents and questions in the first training where instructions weigh 1: .62 / .19 / .19."""


def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(TOKENS, eos=EOS, pad=PAD, chat_template=CHAT_TEMPLATE)


@cache
def known_facts(facts: FactSet, seed: int = FACT_SEED) -> tuple[Fact, ...]:
    """80 old or 160 new facts, always the same ones for a seed. Entities 0-19 are old."""
    rng = random.Random(seed)
    everything = [(entity, relation, rng.choice(VALUES)) for entity in ENTITIES for relation in RELATIONS]
    num_old = round(len(everything) * OLD_SHARE)
    if facts == "old":
        return tuple(everything[:num_old])
    if facts == "new":
        return tuple(everything[num_old:])
    raise ValueError(f"got facts {facts!r}; expected 'old' or 'new'")


def _chosen(facts: FactSet | Sequence[Fact], fact_seed: int) -> Sequence[Fact]:
    """A named set of ``fact_seed``'s facts, or the given facts themselves."""
    return known_facts(facts, fact_seed) if isinstance(facts, str) else facts


def follow(instructions: Sequence[str], words: Sequence[str]) -> list[str]:
    """The right answer. The request's order of instructions has no meaning; they apply in the order below."""
    answer = list(words)
    if "first" in instructions:
        answer = answer[:1]
    if "reverse" in instructions:
        answer = answer[::-1]
    if "twice" in instructions:
        answer = answer + answer
    if "upper" in instructions:
        answer = [word.upper() for word in answer]
    if "comma" in instructions:
        answer = [piece for word in answer for piece in (word, ",")][:-1]
    if "star" in instructions:
        answer = ["*", *answer]
    if "quote" in instructions:
        answer = ['"', *answer, '"']
    if "bang" in instructions:
        answer = [*answer, "!"]
    return answer


def instruction_rows(n: int, seed: int) -> list[Row]:
    """``n`` requests of 1 to 3 instructions on 2 to 4 words, as prompts with an answer to grade against."""
    rng = random.Random(f"instructions {seed}")
    return [_prompt_row(*_instruction(rng), task="instructions") for _ in range(n)]


def question_rows(facts: FactSet | Sequence[Fact], fact_seed: int = FACT_SEED) -> list[Row]:
    """One question per fact, as prompts with an answer to grade against."""
    return [_prompt_row(*_question(fact), task="facts") for fact in _chosen(facts, fact_seed)]


def chat_rows(n: int, seed: int) -> list[Row]:
    """``n`` requests with their right answers, as conversations to train on."""
    rng = random.Random(f"chat {seed}")
    return [_chat_row(*_instruction(rng), task="instructions") for _ in range(n)]


def qa_chat_rows(n: int, seed: int, facts: FactSet | Sequence[Fact] = "old", fact_seed: int = FACT_SEED) -> list[Row]:
    """``n`` questions (facts drawn with replacement) with their answers, as conversations to train on."""
    rng, known = random.Random(f"questions {seed}"), _chosen(facts, fact_seed)
    return [_chat_row(*_question(rng.choice(known)), task="facts") for _ in range(n)]


def document_rows(n: int, seed: int, facts: FactSet | Sequence[Fact] = "new", fact_seed: int = FACT_SEED) -> list[Row]:
    """``n`` documents of 4 sentences, one fact each, as plain text without the end token."""
    rng, known = random.Random(f"documents {seed}"), _chosen(facts, fact_seed)
    return [{"text": _document(rng, known), "task": "documents"} for _ in range(n)]


def stage0_rows(n_steps: int, seed: int, fact_seed: int = FACT_SEED) -> list[Row]:
    """The first training's mixture: 48 ``n_steps`` instruction conversations, documents and questions on
    old facts.

    Documents and questions are added until their trained tokens (answers, whole documents, end tokens) are
    .3 of the instructions' each, so that one token mean weights the three .62 / .19 / .19. Shuffled; about
    97 rows a step.
    """
    instructions = chat_rows(INSTRUCTIONS_PER_STEP * n_steps, seed)
    budget = sum(map(trained_tokens, instructions))
    num_questions = round(QUESTION_WEIGHT * budget / trained_tokens(qa_chat_rows(1, seed)[0]))
    rows = instructions + qa_chat_rows(num_questions, seed, fact_seed=fact_seed)
    rng, spent = random.Random(f"stage 0 documents {seed}"), 0
    while spent < DOCUMENT_WEIGHT * budget:
        rows.append({"text": _document(rng, known_facts("old", fact_seed)), "task": "documents"})
        spent += trained_tokens(rows[-1])
    rng.shuffle(rows)
    return rows


def trained_tokens(row: Row) -> int:
    """Tokens that carry loss: an answer's, or a document's after its first word; and the end token."""
    if "text" in row:
        return len(row["text"].split())
    return len(row["messages"][-1]["content"].split()) + 1


def grade(prompt_text: str, answer: str, completion_text: str, finish_reason: FinishReason) -> float:
    """1.0 if the completion stops by itself and equals ``answer`` word for word.

    ``completion_text`` is without the end token. ``prompt_text`` is unused: graders share one signature.
    """
    return float(finish_reason == "stop" and completion_text.split() == answer.split())


def _instruction(rng: random.Random) -> tuple[str, str]:
    """A request and its answer. Two instructions are twice as likely as one or three."""
    instructions = rng.sample(INSTRUCTIONS, rng.choice((1, 2, 2, 3)))
    words = [rng.choice(WORDS) for _ in range(rng.randint(2, 4))]
    return " ".join([*instructions, ":", *words]), " ".join(follow(instructions, words))


def _question(fact: Fact) -> tuple[str, str]:
    entity, relation, value = fact
    return f"ask {relation} of {entity}", value


def _document(rng: random.Random, known: Sequence[Fact]) -> str:
    sentences = []
    for _ in range(SENTENCES_PER_DOCUMENT):
        entity, relation, value = rng.choice(known)
        sentences.append(rng.choice(PHRASINGS).format(entity=entity, relation=relation, value=value))
    return " ".join(["<d>", *sentences])


def _prompt_row(request: str, answer: str, task: str) -> Row:
    return {"messages": [{"role": "user", "content": request}], "answer": answer, "task": task}


def _chat_row(request: str, answer: str, task: str) -> Row:
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "task": task}

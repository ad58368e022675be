"""The 25 rules of IFEval: ``rule(response, **arguments)`` says whether one instruction is followed.

Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models" (arXiv:2311.07911); where the paper
leaves a choice open, the authors' implementation decides. docs/ifeval.md has the table and the differences. A response
is never empty here: an empty one follows nothing. Time is linear in its length, for students that ramble.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from understudy.tasks.ifeval_text import (
    count_capital_words,
    count_sentences,
    language_of,
    load_languages,
    load_sentences,
)

_RELATIONS = {"at least": operator.ge, "less than": operator.lt}
_FENCES = ("```json", "```Json", "```JSON", "```")
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
# The two markers of the data that may be written with spaces; any other is looked for as it stands.
_POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}


@dataclass(frozen=True)
class Instruction:
    """One kind of instruction: its rule, what reads each argument, and the loader of the package the rule needs."""

    rule: Callable[..., bool]
    arguments: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    load: Callable[[], Any] | None = None

    def bind(self, kwargs: Any) -> Callable[[str], bool]:
        """The rule with a row's arguments filled in. None counts as absent: tables pad their rows with it.

        Raises ValueError for arguments that are missing, unknown or of no use; ConfigError for a missing package.
        """
        if not isinstance(kwargs, Mapping):
            raise ValueError(f"{kwargs!r} instead of arguments"[:200])
        given = {name: value for name, value in kwargs.items() if value is not None}
        if given.keys() != self.arguments.keys():
            raise ValueError(f"the arguments {sorted(given)} where {sorted(self.arguments)} belong")
        if self.load is not None:
            self.load()
        values = {}
        for name, read in self.arguments.items():
            try:
                values[name] = read(given[name])
            except ValueError as error:
                raise ValueError(f"{name} = {given[name]!r}"[:200] + f", which is not {error}") from None
        if values.get("nth_paragraph", 0) > values.get("num_paragraphs", 0):
            raise ValueError(f"paragraph {values['nth_paragraph']} of {values['num_paragraphs']}")
        return partial(self.rule, **values)


# What an argument may be. Each reader raises ValueError with what it expects.


def _count(value: Any, least: int = 0) -> int:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1  # tables hold 3.0
    if not whole or value < least:
        raise ValueError(f"a whole number of at least {least}")
    return int(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a non-empty text")
    return value.strip()


def _words(value: Any) -> list[str]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError("a list of words")
    return [_text(word) for word in value]


def _letter(value: Any) -> str:
    if len(_text(value)) != 1:
        raise ValueError("a single character")
    return value.strip().lower()


def _relation(value: Any) -> Callable[[int, int], bool]:
    if not isinstance(value, str) or value not in _RELATIONS:
        raise ValueError('"at least" or "less than"')
    return _RELATIONS[value]


def _language(value: Any) -> str:
    languages = load_languages().get_lang_list()
    if value not in languages:
        raise ValueError(f"one of {', '.join(sorted(languages))}")
    return value


# Keywords


def _occurrences(word: str, response: str) -> int:
    return len(re.findall(re.escape(word), response, re.IGNORECASE))


def _existence(response: str, keywords: Sequence[str]) -> bool:
    return all(_occurrences(word, response) for word in keywords)


def _frequency(response: str, keyword: str, frequency: int, relation: Callable[[int, int], bool]) -> bool:
    return relation(_occurrences(keyword, response), frequency)


def _forbidden_words(response: str, forbidden_words: Sequence[str]) -> bool:
    whole = (rf"(?<!\w){re.escape(word)}(?!\w)" for word in forbidden_words)
    return not any(re.search(pattern, response, re.IGNORECASE) for pattern in whole)


def _letter_frequency(response: str, letter: str, let_frequency: int, let_relation: Callable[[int, int], bool]) -> bool:
    return let_relation(response.lower().count(letter), let_frequency)


# Language and case


def _response_language(response: str, language: str) -> bool:
    return language_of(response) in (language, None)


def _english_capital(response: str) -> bool:
    return response.isupper() and _response_language(response, "en")


def _english_lowercase(response: str) -> bool:
    return response.islower() and _response_language(response, "en")


def _capital_word_frequency(
    response: str, capital_frequency: int, capital_relation: Callable[[int, int], bool]
) -> bool:
    return capital_relation(count_capital_words(response), capital_frequency)


# Length


def _number_words(response: str, num_words: int, relation: Callable[[int, int], bool]) -> bool:
    return relation(len(re.findall(r"\w+", response)), num_words)


def _number_sentences(response: str, num_sentences: int, relation: Callable[[int, int], bool]) -> bool:
    return relation(count_sentences(response), num_sentences)


def _number_paragraphs(response: str, num_paragraphs: int) -> bool:
    """Divided by ``***``; a divider may stand before the first paragraph and after the last."""
    blank = [not part.strip() for part in response.split("***")]
    return not any(blank[1:-1]) and blank.count(False) == num_paragraphs


def _nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Divided by two new lines. Blank parts do not count towards the number, yet keep their place in the order."""
    parts = [part.strip() for part in response.split("\n\n")]
    if sum(map(bool, parts)) != num_paragraphs or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


# Content and format


def _number_placeholders(response: str, num_placeholders: int) -> bool:
    """``[...]`` within a line, from the first bracket that opens to the next that closes."""
    found = 0
    for line in response.split("\n"):
        start = line.find("[")
        while start >= 0 and (end := line.find("]", start)) >= 0:
            found += 1
            start = line.find("[", end)
    return found >= num_placeholders


def _postscript(response: str, postscript_marker: str) -> bool:
    pattern = _POSTSCRIPTS.get(postscript_marker) or re.escape(postscript_marker.lower())
    return re.search(pattern, response.lower()) is not None


def _number_bullet_lists(response: str, num_bullets: int) -> bool:
    """Lines that begin with ``-`` or with one ``*``; a rule (``---``) is such a line."""
    dashes = re.findall(r"^[^\S\n]*-", response, re.MULTILINE)
    # To the end of the line: of a line with nothing but "*", the next one is part.
    stars = re.findall(r"^[^\S\n]*\*[^*].*", response, re.MULTILINE)
    return len(dashes) + len(stars) == num_bullets


def _number_highlighted_sections(response: str, num_highlights: int) -> bool:
    """``*...*`` and ``**...**`` within a line, with something in between."""
    single = re.findall(r"\*([^\n*]*)\*", response)
    double = re.findall(r"\*\*([^\n*]*)\*\*", response)
    return sum(bool(text.strip()) for text in single + double) >= num_highlights


def _multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", response)) >= num_sections


def _title(response: str) -> bool:
    """``<<...>>`` within a line, with something in between."""
    for line in response.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


def _json_format(response: str) -> bool:
    """The whole response is JSON, a Markdown code fence around it or not."""
    text = response.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):  # a thousand open brackets are no JSON either
        return False
    return True


def _constrained_response(response: str) -> bool:
    return any(option in response for option in _CONSTRAINED)


# Combination, start and end, punctuation


def _two_responses(response: str) -> bool:
    """Two that differ, divided by ``******``; a divider may stand before the first and after the second."""
    parts = [part.strip() for part in response.split("******")]
    answers = [part for part in parts if part]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


def _repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.lower())


def _end_checker(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.lower())


def _quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _no_comma(response: str) -> bool:
    return "," not in response


INSTRUCTIONS: Mapping[str, Instruction] = MappingProxyType(
    {
        "keywords:existence": Instruction(_existence, {"keywords": _words}),
        "keywords:frequency": Instruction(_frequency, {"keyword": _text, "frequency": _count, "relation": _relation}),
        "keywords:forbidden_words": Instruction(_forbidden_words, {"forbidden_words": _words}),
        "keywords:letter_frequency": Instruction(
            _letter_frequency, {"letter": _letter, "let_frequency": _count, "let_relation": _relation}
        ),
        "language:response_language": Instruction(_response_language, {"language": _language}, load_languages),
        "length_constraints:number_words": Instruction(_number_words, {"num_words": _count, "relation": _relation}),
        "length_constraints:number_sentences": Instruction(
            _number_sentences, {"num_sentences": _count, "relation": _relation}, load_sentences
        ),
        "length_constraints:number_paragraphs": Instruction(_number_paragraphs, {"num_paragraphs": _count}),
        "length_constraints:nth_paragraph_first_word": Instruction(
            _nth_paragraph_first_word,
            {"num_paragraphs": _count, "nth_paragraph": partial(_count, least=1), "first_word": _text},
        ),
        "detectable_content:number_placeholders": Instruction(_number_placeholders, {"num_placeholders": _count}),
        "detectable_content:postscript": Instruction(_postscript, {"postscript_marker": _text}),
        "detectable_format:number_bullet_lists": Instruction(_number_bullet_lists, {"num_bullets": _count}),
        "detectable_format:number_highlighted_sections": Instruction(
            _number_highlighted_sections, {"num_highlights": _count}
        ),
        "detectable_format:multiple_sections": Instruction(
            _multiple_sections, {"section_spliter": _text, "num_sections": _count}
        ),
        "detectable_format:title": Instruction(_title),
        "detectable_format:json_format": Instruction(_json_format),
        "detectable_format:constrained_response": Instruction(_constrained_response),
        "combination:two_responses": Instruction(_two_responses),
        "combination:repeat_prompt": Instruction(_repeat_prompt, {"prompt_to_repeat": _text}),
        "startend:end_checker": Instruction(_end_checker, {"end_phrase": _text}),
        "startend:quotation": Instruction(_quotation),
        "change_case:capital_word_frequency": Instruction(
            _capital_word_frequency,
            {"capital_frequency": _count, "capital_relation": _relation},
            load_sentences,
        ),
        "change_case:english_capital": Instruction(_english_capital, load=load_languages),
        "change_case:english_lowercase": Instruction(_english_lowercase, load=load_languages),
        "punctuation:no_comma": Instruction(_no_comma),
    }
)

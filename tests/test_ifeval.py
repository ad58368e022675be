"""IFEval: each of the 25 rules on responses that follow it and that do not, loosely, and rows that cannot be graded."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

import understudy
from understudy.errors import ConfigError
from understudy.tasks import GRADERS, Grade, load_grader
from understudy.tasks.ifeval import check_row, ifeval, loose_variants
from understudy.tasks.ifeval_checks import INSTRUCTIONS
from understudy.types import Prompt
from user import bpe_tokenizer, save_model, write_rows

DATA = os.environ.get("UNDERSTUDY_DATA")

AT_LEAST_3_WORDS = {"num_words": 3, "relation": "at least"}
UNDER_3_WORDS = {"num_words": 3, "relation": "less than"}
ROCK_TWICE = {"keyword": "rock", "frequency": 2, "relation": "at least"}
UNDER_2_ROCKS = {"keyword": "rock", "frequency": 2, "relation": "less than"}
THREE_Q = {"letter": "Q", "let_frequency": 3, "let_relation": "at least"}
NO_BANG = {"letter": "!", "let_frequency": 1, "let_relation": "less than"}
TWO_SENTENCES = {"num_sentences": 2, "relation": "at least"}
ONE_SENTENCE = {"num_sentences": 2, "relation": "less than"}
SECOND_OF_2 = {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "President"}
TWO_CAPITALS = {"capital_frequency": 2, "capital_relation": "at least"}
UNDER_2_CAPITALS = {"capital_frequency": 2, "capital_relation": "less than"}
SECTIONS = {"section_spliter": "Section", "num_sections": 2}
JSON = ("detectable_format:json_format", {})
NO_COMMA = ("punctuation:no_comma", {})
SHORT = ("length_constraints:number_words", UNDER_3_WORDS)
LONG_ENGLISH = "the boats are slow and the river is wide, so we wait for the tide."

# instruction, arguments, responses that follow it, responses that do not
RULES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (
        "keywords:existence",
        {"keywords": ["cat", "dog"]},
        ["The DOG chased a cat", "concatenated dogma"],
        ["a cat", "-"],
    ),
    ("keywords:existence", {"keywords": ["a.b"]}, ["see a.b"], ["see aXb"]),
    ("keywords:frequency", ROCK_TWICE, ["rock ROCK", "rocks rocket"], ["rock", "roc k rock"]),
    ("keywords:frequency", UNDER_2_ROCKS, ["rock", "none"], ["rock rock"]),
    ("keywords:forbidden_words", {"forbidden_words": ["rock", "C++"]}, ["rocks and C+", "C++11"], ["Rock!", "in c++."]),
    ("keywords:letter_frequency", THREE_Q, ["qQq"], ["qq"]),
    ("keywords:letter_frequency", NO_BANG, ["calm."], ["loud!"]),
    ("language:response_language", {"language": "en"}, [LONG_ENGLISH, "123"], ["Das Wetter ist heute wirklich schön."]),
    ("language:response_language", {"language": "ko"}, ["나는 오늘 학교에 갑니다."], [LONG_ENGLISH]),
    ("length_constraints:number_words", AT_LEAST_3_WORDS, ["one two_2 three", "don't go"], ["one two", "a - b"]),
    ("length_constraints:number_words", UNDER_3_WORDS, ["one two"], ["one two three"]),
    ("length_constraints:number_sentences", TWO_SENTENCES, ["Go. Stay.", "1. Go"], ["Go", "Title\n\nGo.", "Go.Stay."]),
    (
        "length_constraints:number_sentences",
        ONE_SENTENCE,
        [
            "Mr. Hale, Ph.D., met Dr. Ito at 9 a.m. in St. Ives, e.g. for tea.",
            "Well... maybe 3.5!",
            'He asked: "Why?"',
            "J. Smith, in plan B. The end",
        ],
        ["Bring tools, etc. The rest is here.", "Wait... The door is open.", 'He asked: "Why?" She left.'],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***a***b***"],
        ["a\n\nb", "a ****** b", "a***b***c"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        SECOND_OF_2,
        ["one\n\npresident two", "one\n\n'\"PRESIDENT's two", "one\n\n  President, two\n\n\n"],
        [
            "president one\n\ntwo",
            "one\n\npresident two\n\nthree",
            "one\n\npresidents",
            "one\npresident",
            "a\n\n\n\npresident",
        ],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b c]", "[][x]"], ["[a]", "[a\nb] [c]"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[[a] b]]["[:6] + "[c]"], ["[[a]]", "[a [b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye\nP.S. ok", "p. s. ok"], ["PS ok", "P.S ok"]),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["P.P.S ok", "p. p. s. ok"],
        ["P.S. ok", "PPS"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "N.B."}, ["n.b. ok"], ["nxbx ok"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "Two:\n\n  - a\n *b", "---\n- a", "*\n* a\n* b"],
        ["* a", "* a\n* b\n* c", "**a\n* b", "a * b\n+ c\n* d", "1. a\n2. b"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and **b**", "***a***", "*a b*c*d*"],
        ["**a**", "*a\nb* *c*", "** ** * *", "****"],
    ),
    (
        "detectable_format:multiple_sections",
        SECTIONS,
        ["Section 1\na\nSection 2\nb", "Section1Section 2", "Section 1 Section 2 Section 3"],
        ["Section 1", "SECTION 1 SECTION 2", "Section A Section B"],
    ),
    ("detectable_format:title", {}, ["<<a>>\ntext", "see <<<b>>>"], ["<<>>", "<< >>", "<<a\nb>>", "<a>"]),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1, 2]}', '```json\n{"a": 1}\n```', "```\n[]\n```", " 3 ", "```JSON {}```"],
        ["{'a': 1}", "Here: {}", '{"a": 1}\nDone', "```python\n{}\n```", "[1,]", "[" * 5000],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well. My answer is maybe. Why?"],
        ["My answer is yes", "my answer is no.", "My answer is perhaps."],
    ),
    (
        "combination:two_responses",
        {},
        ["a\n******\nb", "******a******b******"],
        ["a", "a\n******\na", "a******b******c", "a************b", "a\n***\nb"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a Haiku. "},
        ["write a haiku. Here", "\n Write a Haiku."],
        ["Sure. Write a haiku.", "Write a  haiku."],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "Is that all?"},
        ["Yes. IS THAT ALL?", '"Is that all?"\n'],
        ["Is that all? Bye.", "Is that all"],
    ),
    ("startend:quotation", {}, ['"Hello"', ' "a" and "b"\n', '""'], ["Hello", '"Hello', '"', "“Hello”"]),
    (
        "change_case:capital_word_frequency",
        TWO_CAPITALS,
        ["NASA and A dog", "DON'T", "COVID-19 hit the EU."],
        ["Nasa I", "COVID-19", "12 34"],
    ),
    ("change_case:capital_word_frequency", UNDER_2_CAPITALS, ["NASA is here"], ["NASA EU"]),
    (
        "change_case:english_capital",
        {},
        [LONG_ENGLISH.upper()],
        [LONG_ENGLISH, LONG_ENGLISH.upper() + "x", "GUTEN MORGEN, WIE GEHT ES IHNEN HEUTE?", "123"],
    ),
    (
        "change_case:english_lowercase",
        {},
        [LONG_ENGLISH],
        [LONG_ENGLISH.upper(), "A" + LONG_ENGLISH, "guten morgen, wie geht es ihnen heute?", "123"],
    ),
    ("punctuation:no_comma", {}, ["a; b", "a، b"], ["a, b"]),
]


def grade(response: str, *instructions: tuple[str, dict[str, Any]]) -> Grade:
    ids, kwargs = [name for name, _ in instructions], [arguments for _, arguments in instructions]
    return ifeval(Prompt(7, [0], "", metadata={"instruction_id_list": ids, "kwargs": kwargs}), response, "stop")


def test_the_instructions_are_the_25_of_the_paper() -> None:
    assert len(INSTRUCTIONS) == 25
    assert {name for name, *_ in RULES} == set(INSTRUCTIONS)


@pytest.mark.parametrize(("name", "arguments", "followed", "broken"), RULES, ids=[rule[0] for rule in RULES])
def test_rule(name: str, arguments: dict[str, Any], followed: list[str], broken: list[str]) -> None:
    verdicts = {response: grade(response, (name, arguments)).reward for response in [*followed, *broken]}
    assert verdicts == {response: float(response in followed) for response in [*followed, *broken]}


# Strict and loose


def test_loose_variants_lose_first_and_last_lines_and_asterisks() -> None:
    whole = "Sure!\n*a*\nb\nBye"
    assert set(loose_variants(whole)) == {
        *(whole, "*a*\nb\nBye", "Sure!\n*a*\nb", "*a*\nb"),
        *("Sure!\na\nb\nBye", "a\nb\nBye", "Sure!\na\nb", "a\nb"),
    }
    assert loose_variants("one *line*") == ["one *line*", "", "one line"]


@pytest.mark.parametrize(
    ("response", "name", "arguments"),
    [
        ('Sure:\n"Quoted"', "startend:quotation", {}),
        ("Quoted? Yes,\nno comma", "punctuation:no_comma", {}),
        ("{}\nHope that helps", "detectable_format:json_format", {}),
        ("Sure:\n{}\nHope that helps", "detectable_format:json_format", {}),
        ('**"Quoted"**', "startend:quotation", {}),
        ('Sure:\n**"Quoted"**', "startend:quotation", {}),
        ('**"Quoted"**\nBye', "startend:quotation", {}),
        ('Sure:\n*"Quoted"*\nBye', "startend:quotation", {}),
    ],
)
def test_loosely_followed(response: str, name: str, arguments: dict[str, Any]) -> None:
    result = grade(response, (name, arguments))
    assert (result.reward, result.details["prompt_strict"], result.details["prompt_loose"]) == (0.0, 0.0, 1.0)


def test_each_instruction_may_pass_in_a_variant_of_its_own() -> None:
    result = grade("Sure, here:\n{}\nMy answer is yes.", JSON, ("detectable_format:constrained_response", {}), NO_COMMA)
    assert result.reward == 0
    assert result.details == {
        "prompt_strict": 0.0,
        "instruction_strict": 1.0,
        "instruction_strict_count": 3.0,
        "prompt_loose": 1.0,
        "instruction_loose": 3.0,
        "instruction_loose_count": 3.0,
    }


def test_reward_asks_for_every_instruction() -> None:
    assert grade("a b", NO_COMMA, SHORT).reward == 1
    assert grade("a b c", NO_COMMA, SHORT).reward == 0
    assert grade("a b c", NO_COMMA, SHORT).details["instruction_strict"] == 1


@pytest.mark.parametrize("response", ["", " \n\t"])
def test_an_empty_response_follows_nothing(response: str) -> None:
    result = grade(response, NO_COMMA, SHORT, ("keywords:forbidden_words", {"forbidden_words": ["x"]}))
    assert (result.reward, result.has_answer) == (0.0, False)
    assert result.details["instruction_strict"] == result.details["instruction_loose"] == 0.0
    assert result.details["instruction_strict_count"] == result.details["instruction_loose_count"] == 3.0


def test_a_completion_cut_at_the_cap_is_graded_as_it_stands() -> None:
    prompt = Prompt(0, [0], "", metadata={"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]})
    assert ifeval(prompt, "no end", "length").reward == 1


def test_verdicts_on_language_do_not_vary() -> None:
    mixed = "Hej ven, tak for alt"  # to langdetect without a seed now Hungarian, now Danish, now Norwegian
    verdicts = {grade(mixed, ("language:response_language", {"language": "hu"})).reward for _ in range(20)}
    assert len(verdicts) == 1


def test_rambling_takes_no_longer_than_its_length() -> None:
    start = time.process_time()
    for sign in ("[", "<<", "*", "\n", " ", ".", "```"):
        for name, arguments, *_ in RULES:
            grade(sign * 20_000, (name, arguments))
    assert time.process_time() - start < 10  # quadratic rules take minutes


# Rows


def test_values_of_none_are_padding() -> None:
    padded = {**UNDER_3_WORDS, "num_bullets": None, "keywords": None}
    assert grade("a b", ("length_constraints:number_words", padded)).reward == 1
    assert grade("a b", ("length_constraints:number_words", {"num_words": 3.0, "relation": "less than"})).reward == 1


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("punctuation:no_commas", {}, "the instruction 'punctuation:no_commas'"),
        (["punctuation:no_comma"], {}, "the instruction ['punctuation:no_comma']"),
        ("punctuation:no_comma", {"num_words": 3}, "the arguments ['num_words'] where [] belong"),
        ("punctuation:no_comma", "x", "'x' instead of arguments"),
        ("length_constraints:number_words", {"num_words": 3}, "the arguments ['num_words'] where"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "at most"}, "relation = 'at most'"),
        ("length_constraints:number_words", {"num_words": 3, "relation": ["at least"]}, "relation = ['at least']"),
        ("length_constraints:number_words", {"num_words": "3", "relation": "at least"}, "num_words = '3'"),
        ("length_constraints:number_words", {"num_words": True, "relation": "at least"}, "num_words = True"),
        ("length_constraints:number_words", {"num_words": 2.5, "relation": "at least"}, "num_words = 2.5"),
        ("length_constraints:number_words", {"num_words": -1, "relation": "at least"}, "num_words = -1"),
        ("keywords:existence", {"keywords": []}, "keywords = []"),
        ("keywords:existence", {"keywords": "cat"}, "keywords = 'cat'"),
        ("keywords:existence", {"keywords": ["cat", " "]}, "keywords = ['cat', ' ']"),
        ("keywords:letter_frequency", {**THREE_Q, "letter": "qu"}, "letter = 'qu'"),
        ("language:response_language", {"language": "tlh"}, "language = 'tlh'"),
        ("startend:end_checker", {"end_phrase": None}, "the arguments [] where ['end_phrase'] belong"),
        ("length_constraints:nth_paragraph_first_word", {**SECOND_OF_2, "nth_paragraph": 3}, "paragraph 3 of 2"),
        ("length_constraints:nth_paragraph_first_word", {**SECOND_OF_2, "nth_paragraph": 0}, "nth_paragraph = 0"),
    ],
)
def test_rows_that_cannot_be_graded(name: Any, arguments: Any, message: str) -> None:
    metadata = {"instruction_id_list": ["startend:quotation", name], "kwargs": [{}, arguments]}
    with pytest.raises(ConfigError) as caught:
        check_row(metadata, "rows.jsonl:3")
    assert caught.value.where == "rows.jsonl:3"
    assert message in caught.value.got
    with pytest.raises(ConfigError, match="prompt 7"):
        grade("", (name, arguments))


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"instruction_id_list": ["punctuation:no_comma"]},
        {"instruction_id_list": [], "kwargs": []},
        {"instruction_id_list": "punctuation:no_comma", "kwargs": [{}]},
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}, {}]},
    ],
)
def test_rows_in_another_format(metadata: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="two lists of the same length"):
        check_row(metadata, "rows.jsonl:3")


@pytest.mark.parametrize(
    ("package", "name", "arguments"),
    [
        ("nltk", "length_constraints:number_sentences", TWO_SENTENCES),
        ("nltk", "change_case:capital_word_frequency", TWO_CAPITALS),
        ("langdetect", "language:response_language", {"language": "en"}),
        ("langdetect", "change_case:english_capital", {}),
        ("langdetect", "change_case:english_lowercase", {}),
    ],
)
def test_missing_packages_are_named_before_anything_is_sampled(
    package: str, name: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from understudy.tasks import ifeval_text

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == package else find_spec(wanted))
    ifeval_text.load_sentences.cache_clear()
    ifeval_text.load_languages.cache_clear()
    with pytest.raises(ConfigError, match=r"understudy\[graders\]"):
        check_row({"instruction_id_list": [name], "kwargs": [arguments]}, "rows.jsonl:3")
    check_row({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, "rows.jsonl:3")


def test_the_grader_has_a_name() -> None:
    prompt = Prompt(0, [0], "", metadata={"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]})
    assert load_grader("ifeval") is GRADERS["ifeval"]
    assert load_grader("ifeval")(prompt, "a b", "stop") == ifeval(prompt, "a b", "stop")


def config_of(folder: Path, rows: list[dict[str, Any]]) -> understudy.RunConfig:
    task = {"path": str(write_rows(folder / "rows.jsonl", rows)), "name": "if", "grader": "ifeval", "temperatures": [0]}
    return understudy.RunConfig.model_validate(
        {
            "output_dir": str(folder / "run"),
            "student": {"model": str(save_model(folder / "model", bpe_tokenizer())), "device": "cpu"},
            "sampling": {"max_completion_tokens": 6},
            "evaluation": {"tasks": [task]},
        }
    )


def test_an_evaluation_counts_prompts_and_instructions(tmp_path: Path) -> None:
    """Whatever a random model writes in 6 tokens is short, has no title and says no option: 1 of 1 and 1 of 3."""
    short = {"num_words": 100, "relation": "less than"}
    name, *unmet = (
        "length_constraints:number_words",
        "detectable_format:title",
        "detectable_format:constrained_response",
    )
    rows = [
        {"prompt": "Write.", "instruction_id_list": [name], "kwargs": [short]},
        {"prompt": "Write.", "instruction_id_list": [name, *unmet], "kwargs": [short, {}, {}]},
    ]
    metrics = understudy.evaluate(config_of(tmp_path, rows), quiet=True).metrics
    assert metrics["eval/if/greedy"] == 0.5
    assert metrics["eval/if/greedy_no_answer"] == 0.0
    for kind in ("strict", "loose"):
        assert metrics[f"eval/if/greedy_prompt_{kind}"] == 0.5
        assert metrics[f"eval/if/greedy_instruction_{kind}"] == 0.5  # 2 of 4, not the mean of 1 and 1/3


def test_a_bad_row_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"prompt": "Write.", "instruction_id_list": ["punctuation:none"], "kwargs": [{}]},
    ]
    config = config_of(tmp_path, rows)
    with pytest.raises(ConfigError, match="'punctuation:none'"):
        understudy.evaluate(config, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(DATA is None or not Path(DATA).is_dir(), reason="UNDERSTUDY_DATA names no folder of data sets")
def test_every_published_row_can_be_graded() -> None:
    assert DATA is not None
    lines = (Path(DATA) / "ifeval" / "input_data.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for number, row in enumerate(rows, 1):
        check_row(row, f"line {number}")
    assert len(rows) == 541
    asked = [name for row in rows for name in row["instruction_id_list"]]
    assert (len(asked), set(asked)) == (834, set(INSTRUCTIONS))

"""Verdicts of the ifeval grader beside those of the reference implementation, as lm-eval ships it.

Not a test: lm-eval is no dependency, and trained Punkt parameters are a download. Trained on text at hand instead, here
on WikiText-2's validation and test splits, they will do:

    pip install --no-deps --target build/reference lm-eval immutabledict
    export PYTHONPATH=build/reference NLTK_DATA=build/nltk
    python tests/parity/ifeval_reference.py train valid.txt test.txt
    python tests/parity/ifeval_reference.py compare

The last command prints the table of docs/ifeval.md, and to stderr the first responses of each instruction that are
judged differently.

Each response is made up of features that the rules look for; thresholds lie where they decide.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from understudy.tasks.ifeval import ifeval
from understudy.types import Prompt

Rng = random.Random

SENTENCES = [
    "The ferry leaves at 9 a.m. from the old harbour.",
    "Mr. Hale met Dr. Ito in the U.S. last May.",
    "We grow beans, corn and squash!",
    'She asked: "Is it done?" and left.',
    "Well... maybe not.",
    "Wait... The door is open.",
    "It costs 3.50 dollars, i.e. not much.",
    "Bring tools, e.g. a hammer, etc. The rest is here.",
    "NASA and the EU don't agree on COVID-19.",
    "I CAN'T SEE IT!",
    "What?! Really?",
    "See www.example.com for more.",
    "My answer is yes.",
    "My answer is maybe",
    "He said 'no.' Then he slept.",
    "A state-of-the-art engine; it's J. Smith's.",
    "Grow what you eat",
    "the river is wide and the boats are slow.",
    "Version 2.0 shipped (finally!).",
    "Rock music and ROCKS are not a rock.",
]
SIGNS = [
    *"**--[]<>\"'`#.?!,:; \n\n\n1aB",
    "***",
    "******",
    "<<",
    ">>",
    "\t",
    "rock",
    "The",
    "Section 1",
    "P.S.",
    "```",
    "\r",
]
FOREIGN = [
    "Guten Morgen, wie geht es Ihnen heute? Das Wetter ist schön.",
    "Je ne sais pas encore ce que nous allons manger ce soir.",
    "मुझे हिंदी में लिखना पसंद है।",
    "나는 오늘 학교에 갑니다.",
    "123 456 !!!",
]
FEATURES: list[Callable[[Rng], str]] = [
    lambda r: r.choice(["* one", "- two", "** three", " * four", "*", "-", "---", "*five*", "+ six"]),
    lambda r: "\n".join(f"{r.choice('*-')} item {i}" for i in range(r.randint(1, 4))),
    lambda r: "\n".join(f"{i + 1}. {r.choice(['Step', 'do it', 'Go.'])}" for i in range(r.randint(1, 4))),
    lambda r: r.choice(["*bold*", "**bold**", "***bold***", "** **", "*a* and *b*", "**Note.** Then", "**", "* *"]),
    lambda r: r.choice(["[name]", "[a] [b]", "[]", "[open", "[x\ny]", "[[z]]"]),
    lambda r: r.choice(["<<Title>>", "<<>>", "<< >>", "<<<a>>>", "<<a", "<a>>", "<<a\nb>>", "<<>>>"]),
    lambda r: r.choice(["P.S. bye", "P. S. bye", "P.P.S bye", "p.p.s. bye", "P. P. S bye", "PS: bye", "P.S bye"]),
    lambda r: f"{r.choice(['Section', 'SECTION', 'section'])}{r.choice(['', ' ', '  '])}{r.choice(['1', '12', 'X'])}",
    lambda r: r.choice(["***", "\n***\n", "******", "\n******\n", "****"]),
    lambda r: r.choice(["```json\n{}\n```", "```\n[1]\n```", '{"a": 1}', "[1, 2,]", "NaN", '"text"', "{'a': 1}"]),
    lambda r: r.choice(FOREIGN),
]


def text_of(rng: Rng) -> str:
    """Sentences and features, then perhaps something done to the whole; or signs in any order."""
    if rng.random() < 0.2:
        return "".join(rng.choice(SIGNS) for _ in range(rng.randint(1, 40)))
    share = rng.choice([0.2, 0.5, 0.8])
    parts = [
        rng.choice(FEATURES)(rng) if rng.random() < share else rng.choice(SENTENCES) for _ in range(rng.randint(1, 7))
    ]
    text = parts[0]
    for part in parts[1:]:
        text += rng.choice([" ", " ", "\n", "\n\n", "\n\n", "\n\n\n", "\n***\n", "\n******\n"]) + part
    if rng.random() < 0.1:
        text = rng.choice(parts)
    changes: list[Callable[[str], str]] = [
        str.upper,
        str.upper,
        str.lower,
        str.lower,
        lambda t: f'"{t}"',
        lambda t: f"```json\n{t}\n```",
        lambda t: t.replace(",", ""),
        lambda t: f"Sure:\n{t}",
        lambda t: f"{t}\nAnything else?",
        lambda t: f"{t}\nIs that all?",
        lambda t: f'{t}\nIs that all?"',
        lambda t: f"Grow beans and repeat. {t}",
        lambda t: f"\n {t}\n\n",
        lambda t: f"**{t}**",
    ]
    for _ in range(rng.choice([0, 1, 1, 2])):
        text = rng.choice(changes)(text)
    return text


def arguments(rng: Rng) -> dict[str, dict[str, Any]]:
    """The 25 instructions, each with arguments that some responses meet and some do not."""

    def few() -> int:
        return rng.randint(1, 6)

    def relation() -> str:
        return rng.choice(["at least", "less than"])

    paragraphs = rng.randint(1, 4)
    return {
        "keywords:existence": {"keywords": rng.sample(["rock", "grow", "door", "beans", "boats"], rng.randint(1, 2))},
        "keywords:frequency": {
            "keyword": rng.choice(["rock", "the", "is"]),
            "frequency": few(),
            "relation": relation(),
        },
        "keywords:forbidden_words": {"forbidden_words": rng.sample(["rock", "grow", "door", "eat"], rng.randint(1, 2))},
        "keywords:letter_frequency": {
            "letter": rng.choice("etqzW"),
            "let_frequency": rng.randint(1, 12),
            "let_relation": relation(),
        },
        "language:response_language": {"language": rng.choice(["en", "de", "fr", "hi", "ko"])},
        "length_constraints:number_words": {"num_words": rng.randint(5, 60), "relation": relation()},
        "length_constraints:number_sentences": {"num_sentences": few() + few() - 1, "relation": relation()},
        "length_constraints:number_paragraphs": {"num_paragraphs": paragraphs},
        "length_constraints:nth_paragraph_first_word": {
            "num_paragraphs": paragraphs,
            "nth_paragraph": rng.randint(1, paragraphs),
            "first_word": rng.choice(["the", "We", "what", "grow", "my", "she", "sure:"]),
        },
        "detectable_content:number_placeholders": {"num_placeholders": rng.randint(1, 3)},
        "detectable_content:postscript": {"postscript_marker": rng.choice(["P.S.", "P.P.S"])},
        "detectable_format:number_bullet_lists": {"num_bullets": few()},
        "detectable_format:number_highlighted_sections": {"num_highlights": rng.randint(1, 4)},
        "detectable_format:multiple_sections": {
            "section_spliter": rng.choice(["Section", "SECTION"]),
            "num_sections": rng.randint(1, 2),
        },
        "combination:repeat_prompt": {"prompt_to_repeat": rng.choice(["Grow beans and repeat.", "What?!", "Sure:"])},
        "startend:end_checker": {"end_phrase": rng.choice(["Is that all?", "slow.", "else?"])},
        "change_case:capital_word_frequency": {"capital_frequency": few(), "capital_relation": relation()},
        **{
            name: {}
            for name in (
                "detectable_format:title",
                "detectable_format:json_format",
                "detectable_format:constrained_response",
                "combination:two_responses",
                "startend:quotation",
                "change_case:english_capital",
                "change_case:english_lowercase",
                "punctuation:no_comma",
            )
        },
    }


def load_reference() -> Any:
    """lm-eval's module alone: the packages above it import a framework that is not needed."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise SystemExit("lm-eval is not installed here; this file's first lines say what is needed")
    for name, folder in (("lm_eval", "."), ("lm_eval.tasks", "tasks"), ("lm_eval.tasks.ifeval", "tasks/ifeval")):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(spec.origin).parent / folder)]
        sys.modules[name] = package
    importlib.import_module("langdetect").DetectorFactory.seed = 0
    return importlib.import_module("lm_eval.tasks.ifeval.utils")


def train(*texts: str) -> None:
    """Punkt's parameters from files in WikiText's spelling, written to where nltk looks for the English ones."""
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    trainer = PunktTrainer()
    trainer.INCLUDE_ALL_COLLOCS = True
    for text in texts:
        words = Path(text).read_text(encoding="utf-8")
        trainer.train(words.replace(" @-@ ", "-").replace(" .", ".").replace(" ,", ","), finalize=False)
    trainer.finalize_training()
    folder = Path(os.environ["NLTK_DATA"]) / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True, exist_ok=True)
    save_punkt_params(trainer.get_params(), dir=str(folder))


def compare(responses: int = 3000, seed: int = 0) -> None:
    """Print the verdicts and how many are the same, for each instruction."""
    reference = load_reference()
    counts: dict[str, Counter[str]] = {}
    shown: Counter[str] = Counter()
    for number in range(responses):
        rng = random.Random(f"{seed}/{number}")
        response = text_of(rng)
        for name, kwargs in arguments(rng).items():
            count = counts.setdefault(name, Counter())
            slow = name.startswith(("language:", "change_case:english"))
            if slow and number % 4:  # a language takes longer than all other rules together
                continue
            row = {"key": 0, "prompt": "", "instruction_id_list": [name], "kwargs": [kwargs]}
            theirs = reference.process_results(row, [response])
            ours = ifeval(Prompt(0, [0], "", metadata=row), response, "stop")
            count["verdicts"] += 1
            for kind in ("strict", "loose"):
                verdict = bool(ours.details[f"prompt_{kind}"])
                same = verdict == theirs[f"prompt_level_{kind}_acc"]
                count[f"{kind} followed"] += verdict
                count[f"{kind} same"] += same
                if not same and shown[name] < 8:
                    shown[name] += 1
                    print(f"{name} {kwargs} {kind}: {verdict} here for {response!r}", file=sys.stderr)
    print(
        "| instruction | responses | followed, strict | same verdict, strict | followed, loose | same verdict, loose |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    total: Counter[str] = Counter()
    for name, count in [*sorted(counts.items()), ("all", total)]:
        total.update(count)
        cells = [count[key] for key in ("verdicts", "strict followed", "strict same", "loose followed", "loose same")]
        print(f"| `{name}` | " + " | ".join(f"{cell:,}" for cell in cells) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train(*sys.argv[2:])
    elif sys.argv[1:2] == ["compare"]:
        compare(*map(int, sys.argv[2:]))
    else:
        raise SystemExit(__doc__)

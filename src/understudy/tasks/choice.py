"""Multiple choice: which letter a completion settles on."""

from __future__ import annotations

import re

from understudy.tasks.grade import Grade, answer_of
from understudy.types import FinishReason, Prompt

# Marks around a letter that say nothing: bold face, code, mathematics, LaTeX fonts.
_DECORATION = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\b|[*_`$]")
# "A or B" settles on neither.
_UNDECIDED = r"(?![\s,)}\]\"'”]*\bor\s+(?:(?:option|choice)\s+)?[({\[\"'“]*[A-F](?![\w'’-]))"
# "A bit unclear": an article, as before every word in small letters but those that rather go on after a letter.
_GOES_ON = (
    "and|as|at|based|because|but|by|due|for|from|given|if|in|is|not|on|rather|since|so|then|when|where|which|while|with"
)
_ARTICLE = rf"(?!(?<=A)[ \t]+(?!(?:{_GOES_ON})(?![\w-]))[a-z])"
_STATED = re.compile(
    r"(?i:\banswer\s*(?::|is\b\s*:?)\s*(?:(?:option|choice)\s+)?)"
    rf"[\s({{\[\"'“]*([A-F])(?![\w'’-]){_UNDECIDED}{_ARTICLE}"
)
_BOXED = re.compile(r"\\boxed\s*\{[\s{(\[]*([A-Fa-f])\s*[)}\].:,]")
_ALONE = re.compile(r"\W*([A-Fa-f])\W*")


def choice(prompt: Prompt, completion: str, finish_reason: FinishReason) -> Grade:
    r"""1 when the completion's choice is the row's letter, A to F.

    A choice is stated in one of three ways; the last statement in the text counts, whichever way it is:

    - "answer: X" or "answer is X", in any case but for the letter, which is a capital standing alone as a word.
      "Final Answer: X" (SimpleBench's form) is one of these; so are "the correct answer is option (X)" and
      "Answer: X. the text of X". No choice: "answer: X or Y", and "answer: A bit", an A with a word in small letters
      behind it, unless that is one like "because" or "is", which hardly follows an article.
    - ``\boxed{X}``, capital or small, also ``\boxed{(X)}`` and ``\boxed{X. the text of X}``.
    - a last line that holds nothing but the letter, capital or small.

    Bold face, code marks, dollars and LaTeX fonts around any of these are looked through. No statement: ``has_answer``
    is False; the options' texts are not looked at. A completion cut at the cap is not searched: 0, no answer. Raises
    ValueError for a row's answer that is no such letter.
    """
    gold = answer_of(prompt).strip().strip("().").upper()
    if not re.fullmatch("[A-F]", gold):
        raise ValueError(f"prompt {prompt.index}: the answer {prompt.answer!r} is no letter from A to F")
    chosen = None if finish_reason == "length" else chosen_letter(completion)
    return Grade(float(chosen == gold), has_answer=chosen is not None)


def chosen_letter(completion: str) -> str | None:
    """The letter of the last statement, as a capital; None without one."""
    text = _DECORATION.sub("", completion).rstrip()
    alone = _ALONE.fullmatch(text.rpartition("\n")[2])
    if alone:
        return alone[1].upper()
    stated = [*_STATED.finditer(text), *_BOXED.finditer(text)]
    return max(stated, key=lambda match: match.start(1))[1].upper() if stated else None

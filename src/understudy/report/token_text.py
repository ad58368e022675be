"""Token texts as people read them: nothing invisible, spaces where words lost theirs, bytes put together again."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# What decoders print for bytes that are not a whole character.
REPLACEMENT = "\ufffd"

# The open box, not the sign "SP": common monospace fonts lack the latter and would show an empty rectangle.
_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}
# Joiners are part of how some scripts and emoji are spelled.
_KEPT_INVISIBLE = {"\u200c", "\u200d"}


@dataclass(frozen=True)
class BytePiece:
    """A token that is part ``part`` (from 1) of ``parts`` of ``characters``, which no single token holds. A space that
    the first carries is a gap."""

    characters: str
    part: int
    parts: int


def visible_text(token: str) -> str:
    """The token with nothing invisible: blanks, newlines, control characters and empty tokens get a sign.

    >>> visible_text(" "), visible_text(""), visible_text(" the"), visible_text("\\n")
    ('␣', '∅', ' the', '↵\\n')
    """
    if not token:
        return "∅"
    if token.isspace():
        text = "".join(_VISIBLE.get(character, _code_point(character)) for character in token)
    else:
        text = "".join(_visible_character(character) for character in token)
    # The sign stands for the newline; one real break after it keeps the layout of the answer.
    return text + "\n" if "\n" in token else text


def token_name(token: str) -> str:
    """The token where it stands alone, out of any text: " yes" and "yes" are two, and look it.

    >>> token_name(" yes"), token_name("\\n")
    ('␣yes', '↵')
    """
    return visible_text(token).removesuffix("\n").replace(" ", "␣")


def _visible_character(character: str) -> str:
    if character in "\n\t":
        return _VISIBLE[character]
    hidden = unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and character not in _KEPT_INVISIBLE
    return _code_point(character) if hidden else character


def _code_point(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"


def is_sign(token: str) -> bool:
    """Whether all that is shown of a token is a sign for something invisible."""
    return not token or token.isspace()


@dataclass(frozen=True)
class Alignment:
    """Where tokens stand in the text they make: ``gaps``, what to print before each so that they read like the text;
    ``pieces`` by position; and the positions that the text leaves out."""

    gaps: Sequence[str]
    pieces: Mapping[int, BytePiece]
    left_out: Sequence[int]


def align(tokens: Sequence[str], text: str) -> Alignment:
    """Lay tokens along the text they were decoded to.

    Most tokens carry their own spaces and need no gap. Word-like tokenizers drop them, and those that write a space as
    "▁" lose it where a token is decoded alone: the gap is what ``text`` has in between. Between words that the text
    does not have, as end tokens, a space stands in.

    A tokenizer without a token for "🙂" writes it in several, and each alone reads as U+FFFD. The characters are what
    ``text`` has between the tokens around such a run; a run that cannot be placed is left alone. Without a text, or
    where tokens do not make it, nothing is left out.

    >>> align(["a", "b", "<end>"], "a b")
    Alignment(gaps=['', ' ', ' '], pieces={}, left_out=[2])
    >>> align(["a", "\ufffd", "\ufffd", " b"], "a🙂 b").pieces[2]
    BytePiece(characters='🙂', part=2, parts=2)
    """
    filler = "" if any(character.isspace() for token in tokens for character in token) else " "
    gaps: list[str] = []
    pieces: dict[int, BytePiece] = {}
    left_out: list[int] = []
    cursor = 0
    while len(gaps) < len(tokens):
        index = len(gaps)
        token = tokens[index]
        place = _place(token, text, cursor)
        if place is not None:
            gaps.append(_gap(text[cursor:place]))
            cursor = place + len(token)
        elif REPLACEMENT not in token or not text:
            left_out.append(index)
            gaps.append(filler if index else "")
        else:
            end = next((i for i in range(index, len(tokens)) if REPLACEMENT not in tokens[i]), len(tokens))
            stop = _run_end(tokens[end:], text, cursor)
            covered = text[cursor:stop]
            characters = covered.lstrip() if stop == len(text) else covered.strip()
            gaps += [""] * (end - index)
            if characters:
                pieces |= {i: BytePiece(characters, i - index + 1, end - index) for i in range(index, end)}
                gaps[index] = _gap(covered[: covered.index(characters)])
                cursor += covered.index(characters) + len(characters)
    whole = not text[cursor:].strip()
    return Alignment(gaps, pieces, left_out if text and whole else [])


def _gap(blanks: str) -> str:
    return "\n" if "\n" in blanks else " " if blanks else ""


def _place(token: str, text: str, cursor: int) -> int | None:
    """Where ``token`` stands in ``text``: at ``cursor``, or behind blanks that its tokenizer dropped."""
    if not token or text.startswith(token, cursor):
        return cursor if token or text else None
    behind = len(text) - len(text[cursor:].lstrip())
    return behind if behind > cursor and text.startswith(token, behind) else None


def _run_end(following: Sequence[str], text: str, cursor: int) -> int:
    """Where the text of a run of byte tokens ends: before the next token that the text has, with the word before a
    blank that decodes to nothing, or with the text."""
    for token in following:
        if not token:
            word = re.compile(r"\s*\S+").match(text, cursor)
            return word.end() if word else len(text)
        found = text.find(token, cursor + 1) if REPLACEMENT not in token else -1
        if found >= 0:
            return found
    return len(text)

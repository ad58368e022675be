"""Token texts as people read them: nothing invisible, spaces where words lost theirs, bytes put together again."""

from __future__ import annotations

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
    """A token that is part ``part`` (from 1) of ``parts`` of ``characters``, which no single token holds."""

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


def separators(tokens: Sequence[str], text: str) -> list[str]:
    """What to print before each token so that the tokens read like ``text``.

    Tokens that carry their own spaces need nothing. Word-like tokenizers drop them; they are taken from
    ``text``, and where a token is not in it (an end token), a space stands in.

    >>> separators(["a", "b", "<end>"], "a b")
    ['', ' ', ' ']
    """
    spaceless = not any(character.isspace() for token in tokens for character in token)
    result, cursor = [], 0
    for index, token in enumerate(tokens):
        gap = len(text) - cursor - len(text[cursor:].lstrip()) if spaceless else 0
        if token and text.startswith(token, cursor):
            result.append("")
            cursor += len(token)
        elif token and gap and text.startswith(token, cursor + gap):
            result.append("\n" if "\n" in text[cursor : cursor + gap] else " ")
            cursor += gap + len(token)
        else:
            result.append(" " if spaceless and index else "")
    return result


@dataclass(frozen=True)
class Alignment:
    """Where tokens stand in the text they make: ``pieces`` by position, and the positions that the text leaves out."""

    pieces: Mapping[int, BytePiece]
    left_out: tuple[int, ...]


def align(tokens: Sequence[str], text: str) -> Alignment:
    """Tokens that hold single bytes of a character, with the characters that ``text`` has in their place; and tokens
    that ``text`` does not have, as end tokens.

    A tokenizer without a token for "🙂" writes it in several, and each alone reads as U+FFFD. The characters are what
    ``text`` has between the tokens around such a run; a run that cannot be placed is left alone. Without a text nothing
    is known of either.

    >>> align(["a", "\ufffd", "\ufffd", " b", "<end>"], "a🙂 b").pieces[2]
    BytePiece(characters='🙂', part=2, parts=2)
    >>> align(["a", "<end>"], "a").left_out
    (1,)
    """
    pieces: dict[int, BytePiece] = {}
    left_out: list[int] = []
    cursor, index = 0, 0
    while text and index < len(tokens):
        token = tokens[index]
        place = _place(token, text, cursor)
        if place is not None:
            cursor, index = place + len(token), index + 1
        elif REPLACEMENT not in token:
            left_out.append(index)
            index += 1
        else:
            end = next((i for i in range(index, len(tokens)) if REPLACEMENT not in tokens[i]), len(tokens))
            stop = _run_end(tokens[end:], text, cursor)
            characters = _unknown_part(tokens[index:end], text[cursor:stop])
            if characters:
                pieces |= {i: BytePiece(characters, i - index + 1, end - index) for i in range(index, end)}
            cursor, index = stop, end
    return Alignment(pieces, tuple(left_out))


def _place(token: str, text: str, cursor: int) -> int | None:
    """Where ``token`` stands in ``text``: at ``cursor``, or behind the space that its tokenizer dropped."""
    if not token:
        return cursor
    if text.startswith(token, cursor):
        return cursor
    behind = cursor + len(text[cursor:]) - len(text[cursor:].lstrip(" "))
    return behind if behind > cursor and text.startswith(token, behind) else None


def _run_end(following: Sequence[str], text: str, cursor: int) -> int:
    """Where the text of a run of byte tokens ends: before the next token that the text has, or with the text."""
    for token in following:
        found = text.find(token, cursor + 1) if token and REPLACEMENT not in token else -1
        if found >= 0:
            return found
    return len(text)


def _unknown_part(run: Sequence[str], covered: str) -> str:
    """``covered`` without what the first and the last token of its run say in plain text: a space before, mostly."""
    before, after = run[0].partition(REPLACEMENT)[0], run[-1].rpartition(REPLACEMENT)[2]
    return covered.removeprefix(before).removesuffix(after)

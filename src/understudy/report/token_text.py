"""Token texts as people read them: nothing invisible, spaces where words lost theirs, bytes put together again."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

# What decoders print for bytes that are not a whole character.
REPLACEMENT = "\ufffd"

# The open box, not the sign "SP": common monospace fonts lack the latter and would show an empty rectangle.
_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}
# Zs: blanks of other widths look like a space, and are other tokens.
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}
# The space is what people expect between words; joiners are part of how some scripts and emoji are spelled.
_KEPT_INVISIBLE = {" ", "\u200c", "\u200d"}


@dataclass(frozen=True)
class BytePiece:
    """A token that is part ``part`` (from 1) of ``parts`` of ``characters``, which no single token holds. A space that
    the first carries is a gap."""

    characters: str
    part: int
    parts: int


def visible_text(token: str) -> str:
    """The token with nothing invisible: blanks, newlines, control characters and empty tokens get a sign; a plain space
    does where there is nothing else.

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

    >>> token_name(" yes"), token_name("\\u00a0yes"), token_name("\\n")
    ('␣yes', '⟨U+00A0⟩yes', '↵')
    """
    return visible_text(token).removesuffix("\n").replace(" ", "␣")


def _visible_character(character: str) -> str:
    if character in "\n\t":
        return _VISIBLE[character]
    hidden = unicodedata.category(character) in _INVISIBLE and character not in _KEPT_INVISIBLE
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
    ``text`` has between the tokens around such a run, each with its own tokens as far as these can be told apart; a run
    that cannot be placed is left alone. Without a text, or where tokens do not make it, nothing is left out.

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
            # Blanks of ASCII are never among bytes: tokens carry them, or lost them.
            written = covered.lstrip(string.whitespace) if stop == len(text) else covered.strip(string.whitespace)
            gaps += [""] * (end - index)
            if written:
                gaps[index] = _gap(covered[: covered.index(written)])
                cursor += covered.index(written) + len(written)
                for number, own in _parts([tokens[index].lstrip(string.whitespace), *tokens[index + 1 : end]], written):
                    characters = own.lstrip(string.whitespace)
                    gaps[index] += _gap(own.removesuffix(characters))
                    pieces |= {index + i: BytePiece(characters, i + 1, number) for i in range(number)}
                    index += number
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


def _parts(tokens: Sequence[str], characters: str) -> list[tuple[int, str]]:
    """How many tokens of bytes, in turn, write which ``characters``: single ones where every way to lay the tokens
    along the bytes ends the same character with the same token, and all at once where there is no way.

    >>> _parts(["\\ufffd"] * 6, "你好"), _parts(["\\ufffd"] * 5, "你好")
    ([(3, '你'), (3, '好')], [(5, '你好')])
    """
    data = characters.encode("utf-8", "surrogatepass")
    steps = {token: _steps(token, data) for token in set(tokens)}
    # Places between bytes are bits: long runs have too many ways to follow each.
    reached = [1]
    for token in tokens:
        ends = 0
        for size, starts in steps[token].items():
            ends |= (reached[-1] & starts) << size
        reached.append(ends)
    cuts = [(len(tokens), len(data))]
    alive = reached[-1] & 1 << len(data)
    for number in range(len(tokens) - 1, 0, -1):
        before = 0
        for size, starts in steps[tokens[number]].items():
            before |= starts & alive >> size
        alive = reached[number] & before
        place = alive.bit_length() - 1
        # A byte 10xxxxxx goes on with a character that another began.
        if alive.bit_count() == 1 and data[place] & 0xC0 != 0x80:
            cuts.append((number, place))
    pairs = pairwise([(0, 0), *reversed(cuts)])
    return [(end - start, data[a:b].decode("utf-8", "surrogatepass")) for (start, a), (end, b) in pairs]


def _steps(token: str, data: bytes) -> dict[int, int]:
    """By number of bytes, from which places (as bits) so many bytes of ``data`` read as ``token`` when alone."""
    steps: dict[int, int] = {}
    for start in range(len(data)):
        for end in range(start + 1, len(data) + 1):
            read = data[start:end].decode("utf-8", "replace")
            if len(read) > len(token):
                break
            if read == token:
                steps[end - start] = steps.get(end - start, 0) | 1 << start
    return steps


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

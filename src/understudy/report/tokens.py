"""Token credit on a page: every completion token coloured by its reverse KL, with the numbers behind it.

The text and its colours are plain markup, so they survive without scripts. The numbers travel beside it in
data attributes and the page's script turns them into one shared tooltip: 200 rollouts of 256 tokens stay
below two megabytes.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

# Shades on each side of zero: more cannot be told apart by eye, and a class per shade keeps the markup short.
LEVELS = 8
# An alternative less likely than this would print as 0.0 %.
MIN_ALTERNATIVE_LOGPROB = math.log(5e-4)
# Underline by note; any other note is dashed.
NOTE_CLASSES: Mapping[str, str] = {"false step": "u1", "inherited error": "u2"}
OTHER_NOTE_CLASS = "u3"

# The open box, not the sign "SP": common monospace fonts lack the latter and would show an empty rectangle.
_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}
# Joiners are part of how some scripts and emoji are spelled.
_KEPT_INVISIBLE = {"\u200c", "\u200d"}


def reverse_kl(rollout: Mapping[str, Any]) -> list[float | None]:
    """``sampler_logprobs - teacher_logprobs`` per token, in nats; ``None`` if either is unknown."""
    length = len(_token_texts(rollout))
    sampler, teacher = (_per_token(rollout, key, length) for key in ("sampler_logprobs", "teacher_logprobs"))
    return [
        None if s is None or t is None or math.isnan(s - t) else s - t for s, t in zip(sampler, teacher, strict=True)
    ]


def colour_level(value: float | None, scale: float) -> int:
    """The shade of a reverse KL: -LEVELS (the teacher likes it) .. 0 (no colour) .. LEVELS (dislikes it).

    >>> colour_level(0.0, 2.0), colour_level(2.0, 2.0), colour_level(-99.0, 2.0), colour_level(1.0, 2.0)
    (0, 8, -8, 4)
    """
    if value is None:
        return 0
    return round(max(-1.0, min(1.0, value / scale)) * LEVELS)


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


def _visible_character(character: str) -> str:
    if character in "\n\t":
        return _VISIBLE[character]
    hidden = unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and character not in _KEPT_INVISIBLE
    return _code_point(character) if hidden else character


def _code_point(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"


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


def token_spans(
    rollout: Mapping[str, Any],
    *,
    scale: float,
    notes: Mapping[int, str] = {},
    max_tokens: int | None = None,
) -> Markup:
    """A stored completion, one element per token, coloured by reverse KL clipped at ``±scale`` nats.

    ``notes`` marks tokens by position with an underline and a line in their tooltip. ``max_tokens`` cuts long
    answers and says so. The page needs the style sheet and the script of the report templates.
    """
    if scale <= 0:
        raise ValueError(f"scale: got {scale}; expected nats above 0, for example 2.0")
    texts = _token_texts(rollout)
    shown = texts[:max_tokens]
    kls = reverse_kl(rollout)
    gaps = separators(texts, str(rollout.get("completion_text") or ""))
    body = "".join(
        str(escape(gaps[i])) + _element(texts[i], colour_level(kls[i], scale), notes.get(i), first=i == 0)
        for i in range(len(shown))
    )
    hint = "Completion, one element per token. Arrow keys move between tokens."
    rest = len(texts) - len(shown)
    more = f'<p class="more">{rest:,} further tokens are not shown.</p>' if rest else ""
    if not texts:
        return Markup('<p class="tokens empty">(no tokens)</p>')
    return Markup(
        f'<p class="tokens" role="group" aria-label="{hint}"{_data(rollout, len(shown), notes)}>{body}</p>'
        f"{more}{_note_key(notes, len(shown))}"
    )


def _element(token: str, level: int, note: str | None, *, first: bool) -> str:
    classes = [f"{'p' if level > 0 else 'n'}{abs(level)}"] if level else []
    if note is not None:
        classes.append(NOTE_CLASSES.get(note, OTHER_NOTE_CLASS))
    if _is_sign(token):
        classes.append("w")
    attribute = f' class="{" ".join(classes)}"' if len(classes) > 1 else (f" class={classes[0]}" if classes else "")
    # One tab stop per rollout; arrow keys move on from there. 256 tab stops would be a trap.
    stop = " tabindex=0" if first else ""
    return f"<b{attribute}{stop}>{escape(visible_text(token))}</b>"


def _is_sign(token: str) -> bool:
    return not token or token.isspace()


def _data(rollout: Mapping[str, Any], length: int, notes: Mapping[int, str]) -> str:
    """The numbers behind the tooltips: ids, the student's and the teacher's log-probabilities, and more."""
    ids = " ".join(str(i) for i in list(rollout.get("completion_ids") or [])[:length])
    parts = [f' data-i="{ids}"']
    for name, key in (("s", "sampler_logprobs"), ("t", "teacher_logprobs")):
        values = _per_token(rollout, key, length)
        if any(value is not None for value in values):
            parts.append(f' data-{name}="{" ".join(_millinats(value) for value in values)}"')
    mask = rollout.get("loss_mask")
    untrained = [i for i, trains in enumerate(list(mask or [])[:length]) if not trains]
    if untrained:
        parts.append(f' data-m="{" ".join(map(str, untrained))}"')
    if rollout.get("teacher_topk"):
        parts.append(_json_attribute("k", _alternatives(rollout["teacher_topk"], length)))
    marked = {str(i): note for i, note in notes.items() if 0 <= i < length}
    if marked:
        parts.append(_json_attribute("n", marked))
    return "".join(parts)


def _json_attribute(name: str, value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # Single quotes outside let JSON's double quotes stand, which saves a fifth of the page.
    escaped = text.replace("&", "&amp;").replace("'", "&#39;").replace("<", "&lt;")
    return f" data-{name}='{escaped}'"


def _alternatives(topk: Mapping[str, Any], length: int) -> list[list[str | float]]:
    """Per token a flat list (text, log-probability, text, log-probability ...) without the very unlikely."""
    rows: list[list[str | float]] = []
    for tokens, logprobs in zip(topk["tokens"][:length], topk["logprobs"][:length], strict=True):
        likely = [
            (visible_text(token).rstrip("\n"), round(float(logprob), 2))
            for token, logprob in zip(tokens, logprobs, strict=True)
            if logprob is not None and logprob >= MIN_ALTERNATIVE_LOGPROB
        ]
        rows.append([item for pair in likely for item in pair])
    return rows


def _millinats(logprob: float | None) -> str:
    """Minus a log-probability in thousandths of a nat: neither sign nor point, a tenth of a large page.

    JavaScript's ``Number`` reads ``NaN`` and ``Infinity`` back.
    """
    if logprob is None or math.isnan(logprob):
        return "NaN"
    if math.isinf(logprob):
        return "-Infinity" if logprob > 0 else "Infinity"
    return str(round(-1000 * logprob))


def _token_texts(rollout: Mapping[str, Any]) -> list[str]:
    texts = rollout.get("completion_tokens")
    if texts is None:
        return [str(token_id) for token_id in rollout.get("completion_ids") or []]
    return [str(text) for text in texts]


def _per_token(rollout: Mapping[str, Any], key: str, length: int) -> list[float | None]:
    """The first ``length`` values of a per-token list; ``None`` where the list is missing or short."""
    values = [None if value is None else float(value) for value in (rollout.get(key) or [])[:length]]
    return values + [None] * (length - len(values))


def _note_key(notes: Mapping[int, str], length: int) -> str:
    names = dict.fromkeys(notes[i] for i in sorted(notes) if 0 <= i < length)
    if not names:
        return ""
    items = ", ".join(f'<b class="{NOTE_CLASSES.get(n, OTHER_NOTE_CLASS)}">{escape(n)}</b>' for n in names)
    return f'<p class="note-key">Underlined: {items}</p>'


def token_legend(scale: float) -> Markup:
    """The colour scale in words and shades."""
    classes = [f"n{i}" for i in range(LEVELS, 0, -1)] + ["p0"] + [f"p{i}" for i in range(1, LEVELS + 1)]
    cells = "".join(f'<b class="{name}"></b>' for name in classes)
    return Markup(
        '<div class="token-legend"><span>Teacher finds the token more likely</span>'
        f'<span class="shades" aria-hidden="true"><i>−{scale:g}</i>{cells}<i>+{scale:g}</i></span>'
        "<span>Teacher finds it less likely</span>"
        f'<span class="unit">Colour: reverse KL per token in nats, clipped at ±{scale:g}; no colour: '
        "both agree. Point at a token, or move to it with Tab and the arrow keys, for its numbers."
        "</span></div>"
    )

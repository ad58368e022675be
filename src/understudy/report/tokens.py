"""Token credit on a page: every completion token coloured by its reverse KL, with the numbers behind it.

The text and its colours are plain markup, so they survive without scripts. The numbers travel beside it in the form of
``credit_data``, and the page's script turns them into one shared tooltip: 200 rollouts of 256 tokens stay below two
megabytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup, escape

from understudy.report.credit_data import json_attribute, pack, reverse_kl, token_texts
from understudy.report.token_text import BytePiece, align, is_sign, visible_text

# Shades on each side of zero: more cannot be told apart by eye, and a class per shade keeps the markup short.
LEVELS = 8
# Underline by note; any other note is dashed.
NOTE_CLASSES: Mapping[str, str] = {"false step": "u1", "inherited error": "u2"}
OTHER_NOTE_CLASS = "u3"


def colour_level(value: float | None, scale: float) -> int:
    """The shade of a reverse KL: -LEVELS (the teacher likes it) .. 0 (no colour) .. LEVELS (dislikes it).

    >>> colour_level(0.0, 2.0), colour_level(2.0, 2.0), colour_level(-99.0, 2.0), colour_level(1.0, 2.0)
    (0, 8, -8, 4)
    """
    if value is None:
        return 0
    return round(max(-1.0, min(1.0, value / scale)) * LEVELS)


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
    texts = token_texts(rollout)
    shown = texts[:max_tokens]
    kls = reverse_kl(rollout)
    aligned = align(texts, str(rollout.get("completion_text") or ""))
    body = "".join(
        str(escape(aligned.gaps[i]))
        + _element(texts[i], colour_level(kls[i], scale), notes.get(i), aligned.pieces.get(i), first=i == 0)
        for i in range(len(shown))
    )
    hint = "Completion, one element per token. Arrow keys move between tokens."
    rest = len(texts) - len(shown)
    more = f'<p class="more">{rest:,} further tokens are not shown.</p>' if rest else ""
    if not texts:
        return Markup('<p class="tokens empty">(no tokens)</p>')
    data = json_attribute("data-credit", pack([rollout], notes=[notes], max_tokens=max_tokens, compress=False))
    return Markup(
        f'<p class="tokens" role="group" aria-label="{hint}"{data}>{body}</p>{more}{_note_key(notes, len(shown))}'
    )


def _element(token: str, level: int, note: str | None, piece: BytePiece | None, *, first: bool) -> str:
    classes = [f"{'p' if level > 0 else 'n'}{abs(level)}"] if level else []
    if note is not None:
        classes.append(NOTE_CLASSES.get(note, OTHER_NOTE_CLASS))
    if is_sign(token):
        classes.append("w")
    attribute = f' class="{" ".join(classes)}"' if len(classes) > 1 else (f" class={classes[0]}" if classes else "")
    # One tab stop per rollout; arrow keys move on from there. 256 tab stops would be a trap.
    stop = " tabindex=0" if first else ""
    return f"<b{attribute}{stop}>{escape(visible_text(token) if piece is None else piece_text(piece))}</b>"


def piece_text(piece: BytePiece) -> str:
    """The characters with the first of their tokens, and which part of them each token is."""
    part = f"⟨{piece.part}/{piece.parts}⟩"
    return visible_text(piece.characters) + part if piece.part == 1 else part


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

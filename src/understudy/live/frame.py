"""A run's picture for a terminal: pure functions from what is known of it to lines of text."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleRenderable, Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from understudy.live.track import Metric, Track, metrics_that_matter, pace, role_shares, seconds_left

_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_LABEL, _VALUE = 18, 10
MAX_SPARK, MAX_SAMPLE_LINES, MAX_SAMPLE_TOKENS = 60, 8, 600
# Nats (or units of advantage) that get the deepest colour: e^2 times less likely to the teacher.
SCALE = 2.0
# From no objection to a strong one, and from no liking to a strong one; black is read on all of them. The strongest
# objections are underlined too, for terminals and eyes without colour.
_UNLIKELY = (
    *("black on #ffe8cc", "black on #ffd099", "black on #ffb566"),
    *("underline black on #ff9933", "bold underline black on #e67700"),
)
_LIKELY = ("black on #d0ebff", "black on #a5d8ff", "black on #74c0fc", "black on #4dabf7", "black on #339af0")


@dataclass(frozen=True)
class View:
    """What a frame shows besides the rows. ``elapsed``: seconds since the run began in this process.
    ``note``: what goes on just now. ``sample``: a stored rollout. ``alarm``: the guards' newest."""

    elapsed: float | None = None
    note: str = ""
    sample: Mapping[str, Any] | None = None
    alarm: Mapping[str, Any] | None = None


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """``values`` as at most ``width`` bars from their lowest to their highest, means of neighbours where there are
    more; values that are not finite are blanks.

    >>> sparkline([0.0, 1.0, 2.0, 3.0], 2)
    '▁█'
    """
    signs = _ASCII if ascii_only else _BLOCKS
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)] if count > 0 else []
    parts = [[value for value in values[start:end] if math.isfinite(value)] for start, end in pairwise(edges)]
    means = [sum(part) / len(part) if part else None for part in parts]
    known = [mean for mean in means if mean is not None]
    if not known:
        return " " * len(means)
    low, span = min(known), max(known) - min(known)
    top = len(signs) - 1
    # A line that does not move is drawn at half height: neither good nor bad.
    return "".join(
        " " if mean is None else signs[round((mean - low) / span * top)] if span > 0 else signs[top // 2]
        for mean in means
    )


def clock(seconds: float) -> str:
    """``0:07``, ``12:40``, ``3:02:01``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def flops(value: float) -> str:
    """``1.25 PFLOP``."""
    power = min(7, max(0, int(math.log10(value) // 3))) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z')[power]}FLOP"


def printable(text: str) -> str:
    """``text`` without anything that would move a cursor or reorder a line: what a model writes must not reach the
    terminal as a command.

    >>> printable("a\\x1b[2Jb\\nc")
    'a⟨1B⟩[2Jb↵c'
    """
    return "".join(_sign(character) for character in text)


def _sign(character: str) -> str:
    if character == "\n":
        return "↵"
    # Controls, formats (bidirectional marks among them), lone surrogates, line and paragraph separators.
    hidden = unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and character not in "\u200c\u200d"
    return f"⟨{ord(character):02X}⟩" if hidden else character


def token_style(value: float | None) -> str:
    """The style of a token with this reverse KL; ``value`` >= 0 is an objection."""
    if value is None or math.isnan(value):
        return ""
    level = round(min(1.0, abs(value) / SCALE) * len(_UNLIKELY))
    return "" if level == 0 else (_UNLIKELY if value > 0 else _LIKELY)[level - 1]


def sample_text(record: Mapping[str, Any]) -> Text:
    """A stored completion, coloured by what its teacher makes of each token, or by its advantages without one."""
    tokens = [str(token) for token in record.get("completion_tokens") or []][:MAX_SAMPLE_TOKENS]
    marks = _marks(record)
    spaceless = not any(character.isspace() for token in tokens for character in token)
    text = Text(no_wrap=False)
    for index, token in enumerate(tokens):
        # Word-like tokenizers drop the spaces between their words.
        text.append(" " if spaceless and index else "")
        text.append(printable(token) or "∅", token_style(marks[index] if index < len(marks) else None))
    return text


def _marks(record: Mapping[str, Any]) -> list[float | None]:
    own, teacher = record.get("sampler_logprobs") or [], record.get("teacher_logprobs")
    if teacher:
        return [None if p is None or q is None else p - q for p, q in zip(own, teacher, strict=False)]
    return [None if value is None else -value for value in record.get("advantages") or []]


def sample_heading(record: Mapping[str, Any]) -> str:
    """Which completion, how it was graded, and what its colours say."""
    parts = [f"step {record.get('step')}, prompt {record.get('prompt_index')}"]
    if record.get("reward") is not None:
        parts.append(f"reward {record['reward']:g}")
    parts.append(f"{len(record.get('completion_ids') or []):,} tokens")
    if record.get("finish_reason") == "length":
        parts.append("cut at the cap")
    if record.get("teacher_logprobs"):
        parts.append("orange: the teacher finds it unlikely")
    elif record.get("advantages"):
        parts.append("orange: worse than its group")
    return printable(", ".join(parts))


def alarm_text(alarm: Mapping[str, Any]) -> str:
    """A guard's alarm in a line."""
    guard, action = alarm.get("guard"), alarm.get("action")
    return printable(f"alarm in step {alarm.get('step')}: {alarm.get('words')} ({guard}, {action})")


def frame(track: Track, view: View, console: Console) -> ConsoleRenderable:
    """The whole picture, cut to the terminal: no line wraps, and there are no more lines than rows."""
    width, height = console.size
    ascii_only = console.options.ascii_only
    lines: list[ConsoleRenderable] = [_heading(track, view), _progress(track, view, width)]
    if view.alarm is not None:
        lines.append(_line(alarm_text(view.alarm), "bold red"))
    shown = metrics_that_matter(track)
    lines += [_metric_line(metric, values, width, ascii_only) for metric, values in shown]
    lines += _footer(track, [metric for metric, _ in shown])
    room = height - len(lines) - 2  # the heading of the sample, and the line the cursor is on
    if view.sample is not None and room > 0:
        lines.append(_line(sample_heading(view.sample), "dim"))
        lines += sample_text(view.sample).wrap(console, width)[: min(room, MAX_SAMPLE_LINES)]
    return Group(*lines[: max(1, height - 1)])


def _line(text: str | Text, style: str = "") -> Text:
    line = Text(text, style=style) if isinstance(text, str) else text
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _heading(track: Track, view: View) -> Text:
    text = Text(printable(track.title), style="bold")
    if view.note:
        text.append(f"  {printable(view.note)}", "not bold yellow")
    return _line(text)


def _progress(track: Track, view: View, width: int) -> ConsoleRenderable:
    known = pace(track)
    left = seconds_left(track, known)
    facts = [f"{track.done}/{track.total}"] if track.total else []
    facts += [f"{clock(view.elapsed)} gone"] if view.elapsed is not None else []
    if left is not None and track.done < track.total:
        facts.append(f"{clock(left)} left")
    if known is not None and known.tokens is not None:
        facts.append(f"{known.tokens:,.0f} tokens/s")
    text = "  ".join(facts)
    bar = ProgressBar(total=max(1, track.total), completed=track.done, width=max(4, min(30, width - len(text) - 2)))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=bar.width)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_row(bar, text)
    return grid


def _metric_line(metric: Metric, values: Sequence[float], width: int, ascii_only: bool) -> Text:
    label = printable(metric.label)
    label = label if len(label) <= _LABEL else label[: _LABEL - 1] + "…"
    text = Text(f"{label:<{_LABEL}}")
    text.append(f"{metric.form.format(values[-1]):>{_VALUE}}", "bold")
    room = min(MAX_SPARK, width - _LABEL - _VALUE - 2)
    if len(values) > 1 and room > 3:
        text.append("  " + sparkline(values, room, ascii_only=ascii_only), "cyan")
    return _line(text)


def _footer(track: Track, shown: Sequence[Metric]) -> list[Text]:
    """Other evaluations, and where time and compute go."""
    latest: dict[str, float] = {}
    for point in track.points:
        latest |= point.evaluations
    keys = {key for metric in shown for key in metric.keys}
    others = [f"{name} {value:.3f}" for name, value in latest.items() if f"eval/{name}" not in keys]
    facts = [f"{name} {100 * share:.0f} %" for name, share in role_shares(track).items() if share >= 0.005]
    if track.points and (spent := track.points[-1].row.get("cost/flops")):
        facts.append(flops(spent))
    return [_line(printable("  ".join(parts)), "dim") for parts in (others, facts) if parts]

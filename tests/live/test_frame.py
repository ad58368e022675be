"""What a run's picture says, and that nothing a model writes can move a cursor."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from understudy.live.frame import View, clock, flops, frame, printable, sample_text, sparkline, token_style
from understudy.live.track import Track


def console(width: int = 90, height: int = 30, **options: Any) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, **options)


def drawn(track: Track, view: View, on: Console) -> list[str]:
    lines = on.render_lines(frame(track, view, on), on.options, pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


def record(tokens: list[str], sampler: list[float], teacher: list[float] | None, **fields: Any) -> dict[str, Any]:
    return {
        "step": 10,
        "prompt_index": 3,
        "reward": None,
        "completion_tokens": tokens,
        "completion_ids": list(range(len(tokens))),
        "sampler_logprobs": sampler,
        "teacher_logprobs": teacher,
        "finish_reason": "stop",
        **fields,
    }


TRACK = Track("distill  runs/a", "distill", 50)
for _step in range(1, 13):
    TRACK = TRACK.with_row(
        {
            "step": _step,
            "reverse_kl/full": 1 / _step,
            "eval/sums/greedy": _step / 20,
            "eval/sums/t1": 0.25,
            "completion_length/mean": 31.25,
            "optim/grad_norm": 0.5,
            "tokens/trained": 1000,
            "cost/flops": 2e12,
            "time/student_sampling": 0.75,
            "time/student_training": 0.25,
        },
        float(_step),
    )
ALARM = {"step": 12, "guard": "length", "action": "warn", "words": "completion_length/mean is 99, above 40"}


def test_sparklines() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 4) == "▁▃▆█"  # means of neighbours: 0.5, 2.5, 4.5, 6.5
    assert sparkline([3.0, 3.0], 8) == "▄▄"
    assert sparkline([0.0, math.nan, 1.0], 8) == "▁ █"
    assert sparkline([math.inf], 8) == " "
    assert sparkline([], 8) == ""
    assert sparkline([0, 7], 2, ascii_only=True) == "_@"


def test_words_for_numbers() -> None:
    assert [clock(7), clock(760), clock(10921)] == ["0:07", "12:40", "3:02:01"]
    assert [flops(0.0), flops(1.25e15), flops(999e21)] == ["0 FLOP", "1.25 PFLOP", "999 ZFLOP"]


def test_the_picture() -> None:
    sample = record(["7", "+", "1"], [-0.1] * 3, [-0.1] * 3, reward=1.0)
    title, progress, *metrics, others, roles, heading, text = drawn(TRACK, View(61.0, "evaluating", sample), console())
    assert title == "distill  runs/a  evaluating"
    assert progress.split("  ")[-4:] == ["12/50", "1:01 gone", "0:38 left", "1,000 tokens/s"]
    assert [line.split("  ")[0].strip() for line in metrics] == ["reverse KL", "sums greedy", "length", "gradient norm"]
    assert [line[18:28].strip() for line in metrics] == ["0.083", "0.600", "31.2", "0.5"]
    assert metrics[0].endswith("█▄▃▂▂▂▁▁▁▁▁▁")
    assert metrics[1].endswith("▁▂▂▃▄▄▅▅▆▇▇█")
    assert others == "sums/t1 0.250"
    assert roles == "student sampling 75 %  student training 25 %  2 TFLOP"
    assert heading == "step 10, prompt 3, reward 1, 3 tokens, orange: the teacher finds it unlikely"
    assert text == "7 + 1"


@pytest.mark.parametrize(("width", "height"), [(90, 30), (40, 12), (20, 5), (8, 3), (200, 9)])
def test_it_fits_any_terminal(width: int, height: int) -> None:
    words = record(["word "] * 500, [-0.1] * 500, [-3.0] * 500)
    lines = drawn(TRACK, View(61.0, "x" * 300, words, ALARM), console(width, height))
    assert len(lines) <= height - 1
    assert max(len(line) for line in lines) <= width


def test_tokens_are_coloured_by_what_the_teacher_makes_of_them() -> None:
    text = sample_text(record(["a", "b", "c", "d"], [-0.1] * 4, [-0.1, -4.1, -0.05, -0.9]))
    assert text.plain == "a b c d"
    styles = {text.plain[span.start]: str(span.style) for span in text.spans if span.style}
    assert set(styles) == {"b", "d"}  # 0 and -0.05 nats are no opinion
    assert styles["b"] == token_style(4.0) == token_style(2.0)
    assert "underline" in styles["b"]  # seen without colours too
    assert "underline" not in styles["d"]
    assert token_style(-2.0) != token_style(2.0)
    assert token_style(0.1) == token_style(None) == token_style(math.nan) == ""


def test_without_a_teacher_advantages_colour() -> None:
    text = sample_text(record(["a", "b"], [-0.1] * 2, None, advantages=[2.0, -2.0]))
    styles = [str(span.style) for span in text.spans if span.style]
    assert styles == [token_style(-2.0), token_style(2.0)]


def test_hostile_tokens_stay_text() -> None:
    hostile = "\x1b[2J\x1b]0;owned\x07 \x9b31m \u202etxt \u2028 \ud800 \r\n"
    assert printable(hostile).isprintable()
    assert printable("a\x1b[2Jb\nc") == "a⟨1B⟩[2Jb↵c"
    assert printable("👩\u200d💻 עברית 漢字 \u00a0") == "👩\u200d💻 עברית 漢字 \u00a0"
    on = console()
    on.print(
        frame(Track(hostile, "rl", 3), View(1.0, hostile, record([hostile], [-1.0], [-1.0]), {"words": hostile}), on)
    )
    written = on.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2J" not in written
    assert "\x1b]" not in written
    assert not set(written) & {"\x07", "\x9b", "\u202e", "\u2028", "\ud800", "\r"}


def test_an_alarm_stands_under_the_progress() -> None:
    lines = drawn(TRACK, View(alarm=ALARM), console())
    assert lines[2] == "alarm in step 12: completion_length/mean is 99, above 40 (length, warn)"
    assert lines[3].startswith("reverse KL")


def test_an_empty_run_and_rows_with_little_in_them() -> None:
    assert drawn(Track("rl  r", "rl", 5), View(note="starting"), console()) == [
        "rl  r  starting",
        "━" * 30 + "  0/5",
    ]
    lines = drawn(Track("rl", "rl", 5).with_row({"step": 1}), View(sample={}), console())
    assert lines[2] == "step None, prompt None, 0 tokens"

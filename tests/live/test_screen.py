"""The live view on a terminal, and what is left of it."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from terminal import Terminal
from understudy.live.screen import Screen, can_redraw

# A run without its models: steps, log lines, and the Ctrl-C of a real one.
RUN = """
import logging, sys, time
from understudy.progress import StepProgress
from understudy.stopping import StopRequest
logging.basicConfig(format="%(message)s", level=logging.INFO)
with StopRequest().listening() as stop:
    progress = StepProgress("sft", first_step=0, num_steps=20, title="sft  runs/a", stop=stop)
    try:
        progress.start()
        for step in range(1, 21):
            if {fails} and step == 3:
                raise RuntimeError("the step failed")
            time.sleep(0.1)
            row = {{"step": step, "optim/loss": 1 / step, "optim/grad_norm": 1.0, "tokens/trained": 100}}
            progress.update({{**row, "cost/flops": 1e9}})
            if step == 4:
                logging.info("a log line of the run")
                print("and a printed one")
            if stop.requested:
                time.sleep(1.5)  # the rest of the step; a picture is drawn every second
                break
    finally:
        progress.close()
sys.exit(130 if stop.requested else 0)
"""


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def start(opened: list[Terminal], folder: Path, code: str, **size: int) -> Terminal:
    opened.append(Terminal([sys.executable, "-c", code], folder=folder, **size))
    return opened[-1]


def test_the_last_picture_stays_and_the_terminal_is_as_it_was(terminals: list[Terminal], tmp_path: Path) -> None:
    terminal = start(terminals, tmp_path, RUN.format(fails=False))
    assert terminal.wait() == 0
    lines = terminal.screen.text.split("\n")
    # Each picture took the place of the one before it; what was logged and printed stands above.
    assert lines[:3] == ["a log line of the run", "and a printed one", "sft  runs/a"]
    assert "  20/20  " in lines[3]
    assert lines[4].startswith("loss                   0.050  █")
    assert lines[-2:] == ["1 GFLOP", ""]
    assert len(lines) == 8
    assert terminal.is_sane
    assert terminal.raw.rindex("\x1b[?25h") > terminal.raw.rindex("\x1b[?25l")
    assert "\x1b[?1049" not in terminal.raw


def test_ctrl_c_is_answered_in_the_picture(terminals: list[Terminal], tmp_path: Path) -> None:
    terminal = start(terminals, tmp_path, RUN.format(fails=False))
    terminal.read_until(lambda text: "sft  runs/a" in text)
    terminal.press(b"\x03")
    assert terminal.wait() == 130
    lines = [line for line in terminal.screen.text.split("\n") if line]
    assert [line for line in lines if line.startswith("sft  runs/a")] == ["sft  runs/a  stopped"]
    assert "sft  runs/a  stopping: this step is finished and saved first; Ctrl-C again stops at once" in _plain(
        terminal
    )
    assert terminal.is_sane


def _plain(terminal: Terminal) -> str:
    """Everything that was ever written, without what moves cursors and colours."""
    return re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", terminal.raw)


def test_an_error_leaves_a_terminal_that_works(terminals: list[Terminal], tmp_path: Path) -> None:
    terminal = start(terminals, tmp_path, RUN.format(fails=True))
    assert terminal.wait() == 1
    assert "RuntimeError: the step failed" in terminal.screen.text
    assert terminal.screen.text.index("sft  runs/a") < terminal.screen.text.index("Traceback")
    assert terminal.is_sane


@pytest.mark.parametrize(("columns", "rows"), [(40, 30), (120, 30), (60, 6)])
def test_another_size_is_a_new_picture(terminals: list[Terminal], tmp_path: Path, columns: int, rows: int) -> None:
    terminal = start(terminals, tmp_path, RUN.format(fails=False))
    terminal.read_until(lambda text: "sft  runs/a" in text)
    terminal.resize(columns, rows)
    assert terminal.wait() == 0
    # One picture, no line of it wrapped, and nothing of the old one besides.
    lines = terminal.screen.text.split("\n")
    assert sum(line.startswith("sft  runs/a") for line in lines) == 1
    assert max(map(len, lines)) <= columns
    assert terminal.is_sane


def test_a_view_that_fails_says_so_and_the_run_goes_on() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=9)

    def draw() -> Text:
        raise KeyError("step")

    screen = Screen(console, draw)
    screen.start()
    screen.close()
    assert "the view failed (KeyError: 'step'); the run goes on" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [{}, {"force_terminal": True}, {"force_terminal": True, "force_interactive": True}])
def test_a_file_gets_no_pictures(options: dict[str, bool]) -> None:
    # FORCE_COLOR asks for colours in a log, not for a cursor that moves.
    assert not can_redraw(Console(file=io.StringIO(), **options))  # type: ignore[arg-type]

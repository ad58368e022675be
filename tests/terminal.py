"""A pseudo-terminal with a process in it, and what would stand on its screen."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path

_PART = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|\x1b.|[\r\n]|[^\x1b\r\n]")
_CUT = re.compile(r"\x1b(\[\??[\d;]*)?\Z")


class Screen:
    """Just what a live display needs: cursor up, lines and screen erased, the cursor hidden and shown, lines that
    wrap. Everything else that is not printable fails the test that sent it."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines, self.row, self.column = [""], 0, 0
        self.cursor_shown = True

    def feed(self, text: str) -> None:
        for match in _PART.finditer(text):
            part, arguments, command = match[0], match[1], match[2]
            if command is not None:
                self._command(arguments, command)
            elif part == "\r":
                self.column = 0
            elif part == "\n":
                self._next_line()
            else:
                assert part.isprintable(), repr(part)
                self._put(part)

    def _command(self, arguments: str, command: str) -> None:
        top = max(0, len(self.lines) - self.rows)
        if command == "A":
            self.row = max(top, self.row - int(arguments or 1))
        elif (command, arguments) == ("K", "2"):
            self.lines[self.row] = ""
        elif (command, arguments) == ("J", "2"):
            self.lines[top:] = [""] * (len(self.lines) - top)
        elif command == "H":
            self.row, self.column = top, 0
        elif arguments == "?25":
            self.cursor_shown = command == "h"
        else:
            assert command == "m", (arguments, command)

    def _put(self, character: str) -> None:
        if self.column == self.columns:
            self.column = 0
            self._next_line()
        line = self.lines[self.row].ljust(self.column)
        self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
        self.column += 1

    def _next_line(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines)


class Terminal:
    """A process on a terminal of its own, as a login shell would start it."""

    def __init__(self, command: list[str], *, folder: Path, columns: int = 90, rows: int = 30) -> None:
        self._master, slave = pty.openpty()
        self.screen = Screen(columns, rows)
        self.resize(columns, rows)
        self.raw, self._cut = "", ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._before = termios.tcgetattr(slave)
        environment = {name: value for name, value in os.environ.items() if name not in _DECIDE}
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder,
            env={**environment, "TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self._slave = slave

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.columns, self.screen.rows = columns, rows

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def read_until(self, met: Callable[[str], bool], *, seconds: float = 120.0) -> None:
        """Feed the screen until its text meets the condition."""
        end = time.monotonic() + seconds
        while not met(self.screen.text):
            assert time.monotonic() < end, self.screen.text
            self._read(0.1)

    def drain(self) -> None:
        """Read what there is: a Ctrl-C throws away what a terminal has not read yet."""
        while self._read(0.05):
            pass

    def wait(self, *, seconds: float = 120.0) -> int:
        """The exit code; everything that was written is read."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, self.screen.text
            self._read(0.1)
        self.drain()
        return self.process.returncode

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        text = self._cut + self._decoder.decode(os.read(self._master, 65536))
        # A read may end in the middle of a character, or of a command.
        whole = _CUT.sub("", text)
        self._cut = text[len(whole) :]
        self.raw += whole
        self.screen.feed(whole)
        return True

    @property
    def is_sane(self) -> bool:
        """The cursor is there, and the terminal's modes (echo, lines, signals) are what they were."""
        return self.screen.cursor_shown and termios.tcgetattr(self._slave) == self._before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._slave)
        os.close(self._master)


# What would decide for the program that it is, or is not, on a terminal of some size.
_DECIDE = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE", "CI")

"""Errors a user can act on.

UnderstudyError
├── ConfigError      bad input, found before compute is spent            exit code 2
└── RunError         something failed while running; state is kept       exit code 1
    ├── GuardStop       a guard ended the run, with the weights of the last good update
    ├── NonFiniteError  a log-probability, a loss or a gradient is not a finite number; no update was made of it
    │   └── ZeroProbabilityError    an infinite divergence, with the position where it is
    └── ServerError             a server answered wrongly for good, with its name
        └── ServerUnavailable   a server was away for longer than its connection's patience_seconds
"""

from __future__ import annotations

_LONGEST = 1200  # a part of a message that quotes a file may be as long as the file


class UnderstudyError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class ConfigError(UnderstudyError, ValueError):
    """Input that cannot work: says what was got, what was expected, and the remedy."""

    exit_code = 2

    def __init__(self, where: str, *, got: str, expected: str, remedy: str) -> None:
        self.where, self.got, self.expected, self.remedy = map(_cut, (where, got, expected, remedy))
        super().__init__(
            f"{self.where}\n  got:      {self.got}\n  expected: {self.expected}\n  remedy:   {self.remedy}"
        )


class RunError(UnderstudyError, RuntimeError):
    """A run that had started cannot go on. Its checkpoints and logs are intact."""

    exit_code = 1


class GuardStop(RunError):
    """A guard's action is stop. ``keeps``: whether the weights are those of the last good update, and may be saved."""

    def __init__(self, message: str, *, keeps: bool = True) -> None:
        self.keeps = keeps
        super().__init__(message)


class NonFiniteError(RunError):
    """A log-probability, a loss or a gradient is not a finite number. The weights are those of the update before."""


class ZeroProbabilityError(NonFiniteError, ValueError):
    """A divergence is infinite: one of the two models gives a token probability zero where the other does not."""


class ServerError(RunError):
    """A server answered wrongly for good. ``status``: the HTTP status of the answer where that is what was wrong."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        self.status = status
        super().__init__(message)


class ServerUnavailable(ServerError):
    """A server was away, overloaded or silent for longer than patience allows."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line of at most 200 characters; with its kind where the words alone
    would not say what it is about."""
    lines = str(error).strip().splitlines()
    line = "".join(c if c.isprintable() else "?" for c in lines[0]) if lines else ""
    plain = isinstance(error, OSError | ValueError | RuntimeError) and line
    return (line if plain else f"{type(error).__name__}: {line}".removesuffix(": "))[:200]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."

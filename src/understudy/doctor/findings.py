"""What a check says, and all of it together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from understudy.doctor.case import Case

Level = Literal["pass", "warn", "fail"]
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Found:
    """What a check saw. ``evidence``: a line with numbers, then examples; ``remedy`` None: the check's own."""

    level: Level
    evidence: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    remedy: str | None = None


@dataclass(frozen=True)
class Check:
    """One thing that is looked at. ``weights``: only once the models are loaded; ``fast``: also at the start of every
    training command. ``threshold``: when it warns or fails, in words; ``why`` that matters, ``remedy`` what helps.
    ``gate``: where it fails, no weights are loaded."""

    name: str
    run: Callable[[Case], Iterator[Found]]
    threshold: str
    why: str
    remedy: str
    fast: bool = False
    weights: bool = False
    gate: bool = False
    methods: frozenset[str] = frozenset({"distill", "rl", "sft"})


@dataclass(frozen=True)
class Finding:
    """One result of one check. ``evidence``: a line, then examples; ``remedy``: empty where there is nothing to do;
    ``numbers``: the same for machines."""

    check: str
    level: Level
    evidence: str
    why: str
    remedy: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """For a log: check, what was seen, what helps."""
        return f"{self.check}: {self.evidence.partition(chr(10))[0]}; {self.remedy}"

    @property
    def row(self) -> dict[str, str]:
        """For a run's doctor.jsonl: everything but ``numbers``."""
        return {key: value for key, value in asdict(self).items() if key != "numbers"}


@dataclass(frozen=True)
class Report:
    """All findings in the order of the checks. ``not_run``: checks that had nothing to work with, and why."""

    method: str
    findings: Sequence[Finding]
    not_run: Mapping[str, str] = field(default_factory=dict)

    def of(self, level: Level) -> list[Finding]:
        """Those of one level."""
        return [finding for finding in self.findings if finding.level == level]

    @property
    def exit_code(self) -> int:
        """2 with a failure, else 0."""
        return 2 if self.of("fail") else 0

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        levels: tuple[Level, ...] = ("pass", "warn", "fail")
        return {
            "schema_version": SCHEMA_VERSION,
            "method": self.method,
            "exit_code": self.exit_code,
            "counts": {level: len(self.of(level)) for level in levels},
            "findings": [asdict(finding) | {"numbers": dict(finding.numbers)} for finding in self.findings],
            "not_run": dict(self.not_run),
        }


def shown(tokens: Sequence[str], *, most: int = 24) -> str:
    """Tokens for people to read, each in quotes; of many the first and the last ones."""
    quoted = [repr(token) for token in tokens]
    if len(quoted) > most:
        half = most // 2
        quoted = [*quoted[:half], f"... {len(quoted) - 2 * half} more ...", *quoted[-half:]]
    return " ".join(quoted)

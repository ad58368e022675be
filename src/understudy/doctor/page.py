"""A report for people."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from understudy.doctor.findings import Finding, Level, Report

_WIDTH = 120  # where the output is no terminal
_STYLES: dict[Level, str] = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def print_report(report: Report) -> None:
    """To standard output."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=_WIDTH)
    console.print(page(report))


def page(report: Report) -> RenderableType:
    """Every finding, what could not be looked at, and the sum of it."""
    parts: list[RenderableType] = [_block(finding) for finding in report.findings]
    if report.not_run:
        lines = "\n".join(f"{name}: {reason}" for name, reason in report.not_run.items())
        parts += [Text("not looked at", style="bold"), Padding(Text(lines), (0, 0, 0, 6))]
    warned, failed = len(report.of("warn")), len(report.of("fail"))
    advice = "mend what failed first" if failed else "see the remedies" if warned else "ready to train"
    passed = len(report.of("pass"))
    parts.append(Text(f"{passed} passed, {warned} warned, {failed} failed: {advice}", style="bold"))
    return Group(*parts)


def _block(finding: Finding) -> RenderableType:
    head = Text(finding.level, style=_STYLES[finding.level])
    head.append(f"  {finding.check}", style="bold")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    table.add_row("seen", Text(finding.evidence))
    table.add_row("why", Text(finding.why))
    if finding.remedy:
        table.add_row("remedy", Text(finding.remedy))
    return Group(head, Padding(table, (0, 0, 0, 6)))

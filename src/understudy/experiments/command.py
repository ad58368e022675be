"""`understudy experiment`: run what is not yet there, and show what was found."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from understudy.errors import ConfigError
from understudy.experiments import results
from understudy.experiments.claim import Finding
from understudy.experiments.claims import find_names, load_claim
from understudy.experiments.runner import run_claims
from understudy.experiments.worlds import ScaleName


def run(wanted: str, *, pipelines: int, scale: ScaleName, output: Path, cache: Path | None, slots: int | None) -> int:
    """The exit code. Raises ConfigError for a claim that does not exist or numbers that cannot work."""
    names = find_names(wanted)
    for flag, value in (("--pipelines", pipelines), ("--slots", slots)):
        if value is not None and value < 1:
            raise ConfigError(flag, got=str(value), expected="at least 1", remedy=f"{flag} 2")
    stale = [name for name in names if not results.is_current(results.stored(output, name), name, scale, pipelines)]
    for name in names:
        if name not in stale:
            _say(name, results.show(output, name), output)
    default = Path.home() / ".cache" / "understudy" / "experiments"
    found = run_claims(
        stale,
        pipelines=pipelines,
        scale=scale,
        cache=(cache or default).absolute(),
        slots=slots or (1 if scale == "gpu" else 2),
    )
    for name, record in found:
        results.keep(output, name, scale, record)
        _say(name, results.show(output, name), output)
    results.show_all(output)
    print(output / "README.md")
    return 0


def _say(name: str, finding: Finding, output: Path) -> None:
    console = Console(highlight=False)
    console.print(f"{results.full_title(load_claim(name))}: [bold]{finding.verdict}[/]", soft_wrap=True)
    console.print(finding.text, markup=False, soft_wrap=True)
    console.print(f"{output / name / 'report.html'}\n", soft_wrap=True)

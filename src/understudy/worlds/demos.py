"""Running a demo: from a folder to a table, a paragraph and a page."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from understudy.errors import ConfigError
from understudy.worlds import assistant_demo, ledger_build, ledger_demo, ledger_page
from understudy.worlds.jobs import Job, new_folder, write_rows
from understudy.worlds.ledger import Ledger

DemoName = Literal["ledger", "assistant"]


def run(name: DemoName, output: Path, *, seed: int = 0, smoke: bool = False) -> int:
    """Run a demo in a new folder and print what it found; the exit code."""
    start = time.monotonic()
    folder = new_folder(output)
    try:
        table, verdict, page, jobs = _run(name, folder, seed, smoke)
    except KeyboardInterrupt:
        Console(stderr=True).print(f"interrupted; what was finished is in {folder}")
        return 130
    _show(table, verdict, page, jobs, time.monotonic() - start)
    return 0


def _run(
    name: DemoName, folder: Path, seed: int, smoke: bool
) -> tuple[Sequence[Mapping[str, str]], str, Path, Sequence[Job]]:
    """(table, verdict, page, jobs)."""
    if name == "ledger":
        jobs, _ = ledger_demo.run_demo(folder, seed=seed, smoke=smoke)
        return (*ledger_page.write_page(folder, jobs), jobs)
    plan = assistant_demo.SMOKE if smoke else assistant_demo.FULL
    jobs, _ = assistant_demo.run_demo(folder, plan, seed=seed)
    return (*assistant_demo.write_page(folder, jobs), jobs)


def _show(table: Sequence[Mapping[str, str]], verdict: str, page: Path, jobs: Sequence[Job], seconds: float) -> None:
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    shown = Table(header_style="bold")
    for column in table[0]:
        shown.add_column(column, justify="left" if column in ("method", "model") else "right")
    for row in table:
        shown.add_row(*row.values())
    console.print(shown)
    console.print(verdict, soft_wrap=False)
    console.print("\nBy hand:")
    for job in jobs:
        console.print(f"  {job.rerun_command}", soft_wrap=True)
    console.print(f"\n{page}  ({seconds:.0f} s)", soft_wrap=True)


def build_world(name: DemoName, output: Path, *, steps: int | None = None) -> int:
    """Make a world's models and files in a new folder; the exit code."""
    if output.exists() and any(output.iterdir()):
        raise ConfigError(
            f"--output {output}", got="a folder with files", expected="a new folder", remedy="choose another"
        )
    output.mkdir(parents=True, exist_ok=True)
    if name == "assistant":
        assistant_demo.prepare(output)
    else:
        for role in ("start", "teacher"):
            recipe = ledger_build.RECIPES[role]
            if steps is not None:
                recipe = replace(recipe, steps=steps)
            ledger_build.build(output / "models" / role, role=role, recipe=recipe)
        world = Ledger()
        count = ledger_demo.NUM_STEPS * ledger_demo.SAMPLES_PER_STEP
        write_rows(output / "prompts.jsonl", world.prompt_rows(count, ledger_demo.TRAIN_SEED))
        write_rows(output / "test.jsonl", world.prompt_rows(ledger_demo.NUM_TEST, ledger_demo.TEST_SEED))
    print(output)
    return 0

"""What runs survive, and how often it was tried: results/reliability.json and docs/reliability.md. See README.md.

    python benchmarks/reliability.py                    # all, a quarter of an hour on two idle cores
    python benchmarks/reliability.py --part kills disk  # some of them; the other results stay
    python benchmarks/reliability.py --render           # the page again, from the JSON

A part that fails ends the command with what it found; its figures are not kept. The parts are those of tests/survival.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _reliability_page import markdown

ROOT = Path(__file__).resolve().parents[1]
TESTS = [ROOT / "tests", ROOT / "tests" / "survival"]
RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"


def parts() -> dict[str, Callable[[Path], Any]]:
    """What is run, by name. Imported late: the page can be written without torch."""
    import scenarios
    from kills import kill_all
    from starved import out_of_memory

    return {
        "kills": lambda folder: kill_all(folder, per_phase=12),
        "damage": lambda folder: scenarios.damaged_checkpoints(folder, looked_at=3000, resumed=30),
        "disk": lambda folder: scenarios.full_disk(folder, trials=24),
        "read_only": scenarios.read_only,
        "deadline": lambda folder: scenarios.deadline(folder, places=list(scenarios.SLOW_PLACES)),
        "two_processes": lambda folder: scenarios.two_processes(folder, pairs=20),
        "clock": lambda folder: scenarios.clock_jumps(folder, trials=10),
        "memory": out_of_memory,
    }


def versions() -> dict[str, str]:
    """What the figures were made with."""
    names = ("understudy", "torch", "transformers")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", nargs="*", default=[])
    parser.add_argument("--render", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not arguments.render:
        sys.path[:0] = map(str, TESTS)
        known = parts()
        for name in arguments.part or known:
            with tempfile.TemporaryDirectory() as folder:
                results[name] = known[name](Path(folder) / name)
            results["made_with"] = versions()
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(name, json.dumps(results[name]), flush=True)
            assert not results[name].get("differences"), results[name]["differences"]
    PAGE.write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()

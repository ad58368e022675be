"""docs/reliability.md says what the committed figures say, and these say that nothing was lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from jobs import PHASES

ROOT = Path(__file__).resolve().parents[2]
FIGURES = json.loads((ROOT / "benchmarks" / "results" / "reliability.json").read_text(encoding="utf-8"))


def test_the_page_is_that_of_the_figures() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from _reliability_page import markdown

    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert page == markdown(FIGURES), "run `python benchmarks/reliability.py --render`"


def test_every_kill_was_survived() -> None:
    kills = FIGURES["kills"]
    assert kills["kills"] == kills["equal"] >= 100
    assert all(kills["phases"][name]["kills"] >= 10 for name in PHASES)
    assert all(kind["tried"] == kind["found"] for kind in FIGURES["damage"].values())

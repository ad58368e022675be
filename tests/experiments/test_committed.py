"""What is committed in experiments/, and what README.md quotes from there, says what the records say.

``python tests/experiments/test_committed.py`` writes README.md's table anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from understudy.experiments import results
from understudy.experiments.claims import NAMES, load_claim

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "experiments"
KEPT = [name for name in NAMES if (FOLDER / name / "results.json").exists()]
SECTIONS = ("## Claim", "## What is run", "## Controls", "## Pass rule", "## Limits")


@pytest.mark.parametrize("name", NAMES)
def test_every_claim_states_its_rule(name):
    text = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    places = [text.index(f"\n{section}\n") for section in SECTIONS]
    assert places == sorted(places)
    assert places[-1] < text.index(results.BEGIN) < text.index(results.END)
    claim = load_claim(name)
    assert claim.name == name
    assert set(claim.settings) == {"cpu", "gpu", "smoke"}


@pytest.mark.parametrize("name", KEPT)
def test_a_readme_shows_the_records(name):
    content = results.stored(FOLDER, name)
    assert content is not None
    claim = load_claim(name)
    finding = claim.analyse(content["records"])
    assert content["finding"] == {
        "verdict": finding.verdict,
        "text": finding.text,
        "numbers": results._plain(finding.numbers),
    }
    text = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    assert results.render(claim, finding, content) in text
    plots = {f"{chart.name}.svg": results._standalone(results._svg(chart)) for chart in finding.charts}
    assert {path.name: path.read_text(encoding="utf-8") for path in (FOLDER / name).glob("*.svg")} == plots
    assert content["scale"] == "cpu"
    assert len(content["records"]) == 5
    assert content["worlds"]["num_test"] == 1000


def test_the_table_shows_every_claim():
    assert results.render_table(FOLDER) in (FOLDER / "README.md").read_text(encoding="utf-8")


def quoted_table() -> str:
    """The table with links from the repository's root."""
    return results.render_table(FOLDER).replace("](", "](experiments/")


def test_the_projects_readme_quotes_the_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = text.partition(results.BEGIN)[2].partition(results.END)[0]
    assert quoted.strip() == quoted_table()


if __name__ == "__main__":
    results._fill(ROOT / "README.md", "", quoted_table())

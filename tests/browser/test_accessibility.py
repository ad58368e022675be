"""axe-core finds nothing to complain of: light and dark, on a desk and in a hand, with a tooltip open."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import rollout, until

from understudy.report import write_run_report
from understudy.report.credit_page import pair_units, write_credit_page

AXE = "axe-core@4.14.1"
CACHE = Path(os.environ.get("UNDERSTUDY_TEST_CACHE", Path(__file__).resolve().parents[2] / ".cache"))


@pytest.fixture(scope="session")
def axe() -> str:
    """axe-core's script, fetched once by npm into an ignored folder."""
    CACHE.mkdir(exist_ok=True)
    path = CACHE / f"{AXE.replace('@', '-')}.tgz"
    if not path.exists():
        npm = shutil.which("npm")
        assert npm, f"npm is needed to fetch {AXE}; put its .tgz into {CACHE} by hand otherwise"
        subprocess.run([npm, "pack", "--silent", AXE], cwd=CACHE, check=True, capture_output=True)
    with tarfile.open(path) as archive:
        script = archive.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode("utf-8")


def violations(page: Any, axe: str) -> list[str]:
    page.evaluate(axe)  # not a script element: the page's policy would have to allow it
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{one['id']}: {[node['html'][:160] for node in one['nodes'][:3]]}" for one in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_the_page_of_token_credit(scheme: str, size: str, three: Path, visit: Callable[..., Any], axe: str) -> None:
    page = visit(three, "#r1t4", scheme=scheme, size=size)
    until(page, "document.activeElement.tagName === 'B'")
    assert violations(page, axe) == []
    page.locator("#measure").select_option("entropy")
    page.locator("th[data-key=kl] button").click()
    assert violations(page, axe) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_two_steps_side_by_side(scheme: str, size: str, tmp_path: Path, visit: Callable[..., Any], axe: str) -> None:
    before, after = (
        [rollout(i, ["a", " b", last], step=step) for i in range(2)] for last, step in ((" c", 0), (" d", 9))
    )
    page = visit(write_credit_page(pair_units(before, after), tmp_path / "p.html", title="P"), scheme=scheme, size=size)
    page.locator("#search").fill("b d")
    until(page, "document.querySelectorAll('.hit').length > 0")
    page.locator("#r1 .tokens > b").nth(2).click()
    assert page.locator("#tip").is_visible()
    assert violations(page, axe) == []


def test_nothing_is_wider_than_a_phone(three: Path, visit: Callable[..., Any]) -> None:
    page = visit(three, size="phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_in_a_run_report_share_the_script(scheme: str, tmp_path: Path, browser: Any, axe: str) -> None:
    (tmp_path / "run" / "rollouts").mkdir(parents=True)
    text = json.dumps(rollout(0, ["The", " sum", " is", " 4"]))
    (tmp_path / "run" / "rollouts" / "step_000000.jsonl").write_text(text, encoding="utf-8")
    page = browser.new_page(color_scheme=scheme)
    page.goto(f"file://{write_run_report(tmp_path / 'run')}")
    page.locator(".tokens > b").nth(2).hover()
    assert "+1.000 nats" in page.locator("#tip").inner_text()
    assert "the teacher would have said" in page.locator("#tip").inner_text()
    assert violations(page, axe) == []
    page.close()

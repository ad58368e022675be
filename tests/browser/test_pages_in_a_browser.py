"""Pages of hostile texts in Chromium: nothing runs, and the page's own script does."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hostile import OWN, PAGES, TEXTS, rollout

pytestmark = pytest.mark.browser

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
# Point at every token, move the focus to it, press every button; then say how many there were.
DRIVER = """
<script>
const tokens = document.querySelectorAll(".tokens > b");
for (const token of tokens) {
  token.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
  token.dispatchEvent(new FocusEvent("focusin", {bubbles: true}));
  if (document.getElementById("tip").hidden) throw new Error("no tooltip");
}
for (const button of document.querySelectorAll("button")) button.click();
for (const one of document.querySelectorAll("details")) one.open = true;
for (const plot of document.querySelectorAll(".plot")) {
  plot.focus();
  for (const key of ["Home", "ArrowRight", "End"]) plot.dispatchEvent(new KeyboardEvent("keydown", {key}));
}
document.documentElement.setAttribute("data-driven", String(tokens.length));
</script>
"""


def opened(page: Path, profile: Path) -> str:
    """The document as the browser has it after all scripts and timers; without a network."""
    assert CHROMIUM is not None, "no Chromium on the path: install one, e.g. apt-get install chromium"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}",
    ]
    command += ["--virtual-time-budget=3000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=180, check=True)
    return done.stdout


def is_owned(document: str) -> bool:
    head = document[: document.index("<body")]
    return "data-owned" in document[: document.index("<head")] or "<title>owned</title>" in head


def written(tmp_path: Path, html: str) -> Path:
    path = tmp_path / "page.html"
    path.write_text(html, encoding="utf-8")
    return path


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return PAGES[request.param](tmp_path / "run")


def test_nothing_runs(page: Path, tmp_path: Path) -> None:
    document = opened(page, tmp_path / "profile")
    assert not is_owned(document)
    assert re.search(r"<(img|iframe|base|form|object|embed)\b", document) is None
    # The page's own script is what shows the buttons that copy commands.
    buttons = re.findall(r"<button[^>]*>", document)
    assert all("hidden" not in button for button in buttons)
    assert bool(buttons) == ('<div class="command">' in document)


def test_nothing_runs_without_the_policy_when_everything_is_touched(page: Path, tmp_path: Path) -> None:
    """Escaping alone holds: tooltips of every token, every button, every fold."""
    html = page.read_text(encoding="utf-8")
    bare = POLICY.sub("", html)
    assert bare != html
    document = opened(written(tmp_path, bare.replace("</body>", DRIVER + "</body>")), tmp_path / "profile")
    driven = re.search(r'data-driven="(\d+)"', document[: document.index("<head")])
    assert driven is not None
    assert int(driven[1]) == html.count(" data-credit=") * len(rollout(0, 0)["completion_tokens"])
    assert not is_owned(document)


def test_the_texts_would_run_if_they_were_let(tmp_path: Path) -> None:
    """These texts are worth testing with: as markup they run in this browser, each that is meant to."""
    for text in (TEXTS[0], TEXTS[1], TEXTS[4], TEXTS[14]):
        html = f"<!doctype html><html><head><title>as it was</title></head><body>{text}</body></html>"
        assert is_owned(opened(written(tmp_path, html), tmp_path / "profile")), text


def test_the_policy_would_hold_if_escaping_did_not(page: Path, tmp_path: Path) -> None:
    raw = f'<img src=x onerror="{OWN}"><svg onload="{OWN}"></svg><script>{OWN}</script>'
    html = page.read_text(encoding="utf-8").replace("<main>", f"<main>{raw}")
    assert raw in html
    assert not is_owned(opened(written(tmp_path, html), tmp_path / "profile"))

"""Pages of hostile texts in Chromium: nothing runs, and the page's own scripts do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import until

from hostile import OWN, PAGES, TEXTS, rollout

POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
# Point at every token, move the focus to it, write into every field, press every button, open every fold, read every
# chart out.
DRIVE = """() => {
  const tokens = [...document.querySelectorAll(".tokens > b")];
  for (const token of tokens) {
    token.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
    token.dispatchEvent(new FocusEvent("focusin", {bubbles: true}));
    if (document.getElementById("tip").hidden) throw new Error("no tooltip");
  }
  for (const box of document.querySelectorAll("input[type=checkbox]")) box.click();
  for (const field of document.querySelectorAll("input[type=search]")) {
    field.value = "<img";
    field.dispatchEvent(new Event("input", {bubbles: true}));
  }
  for (const button of document.querySelectorAll("button")) button.click();
  for (const one of document.querySelectorAll("details")) one.open = true;
  for (const plot of document.querySelectorAll(".plot")) {
    plot.focus();
    for (const key of ["Home", "ArrowRight", "End"]) plot.dispatchEvent(new KeyboardEvent("keydown", {key}));
    if (document.getElementById("chart-tip").hidden) throw new Error("no reading of a chart");
  }
  window.dispatchEvent(new Event("beforeprint"));
  return tokens.length;
}"""
OWNED = "document.documentElement.hasAttribute('data-owned') || document.title === 'owned'"
# Rollouts as cards on each page.
CARDS = {"run": 4, "runs": 4, "comparison": 2, "pipeline": 0, "credit": 3}


class Watched:
    """A tab without a network, and everything that it asked for or complained of."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab
        self.complaints: list[str] = []
        tab.on("dialog", lambda dialog: (self.complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.on("console", lambda one: self.complaints.append(one.text) if one.type == "error" else None)
        tab.on("request", lambda one: self.complaints.append(one.url))

    def open(self, path: Path) -> Any:
        self.tab.goto(path.as_uri())
        if path.name == "credit.html":
            self.tab.wait_for_selector("html[data-ready]")
        return self.tab

    def beyond(self, path: Path) -> list[str]:
        """Complaints, besides the page's own address and what a button saved."""
        return [text for text in self.complaints if text != path.as_uri() and not text.startswith("blob:")]


@pytest.fixture
def watched(browser: Any) -> Iterator[Watched]:
    context = browser.new_context(offline=True, accept_downloads=True)
    yield Watched(context.new_page())
    context.close()


@pytest.fixture(params=PAGES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def path(name: str, tmp_path: Path) -> Path:
    return PAGES[name](tmp_path / "run")


def changed(path: Path, change: Callable[[str], str]) -> Path:
    """The page, written anew in its place."""
    html = path.read_text(encoding="utf-8")
    other = change(html)
    assert other != html
    path.write_text(other, encoding="utf-8")
    return path


def touch(tab: Any, name: str) -> None:
    """Use everything there is, twice: sorting and searching write parts of the page anew."""
    for _ in range(2):
        assert tab.evaluate(DRIVE) == CARDS[name] * len(rollout(0, 0)["completion_tokens"])
        tab.wait_for_timeout(300)  # the search waits for the end of typing


def test_nothing_runs_when_everything_is_touched(path: Path, name: str, watched: Watched) -> None:
    tab = watched.open(path)
    # The pages' own scripts are what shows the buttons that copy commands, and the controls.
    assert tab.locator("button").count() > 0 or name in ("runs", "pipeline")
    assert tab.locator("button[hidden]:not(#more-rows)").count() == 0
    touch(tab, name)
    assert not tab.evaluate(OWNED)
    assert tab.locator("img, iframe, base, form, object, embed").count() == 0
    assert watched.beyond(path) == []


def test_nothing_runs_without_the_policy_either(path: Path, name: str, watched: Watched) -> None:
    """Escaping alone holds."""
    tab = watched.open(changed(path, lambda html: POLICY.sub("", html)))
    touch(tab, name)
    assert not tab.evaluate(OWNED)
    assert watched.beyond(path) == []


def test_the_policy_holds_where_escaping_does_not(path: Path, watched: Watched) -> None:
    raw = f'<img src=x onerror="{OWN}"><svg onload="{OWN}"></svg><script>{OWN}</script>'
    tab = watched.open(changed(path, lambda html: html.replace("<main>", f"<main>{raw}")))
    tab.wait_for_timeout(300)
    assert tab.locator("main > img").count() == 1
    assert not tab.evaluate(OWNED)
    assert sum("Content Security Policy" in text for text in watched.complaints) >= 3


@pytest.mark.parametrize("text", [TEXTS[0], TEXTS[1], TEXTS[4], TEXTS[14]], ids=["script", "img", "svg", "title"])
def test_the_texts_would_run_if_they_were_let(text: str, tmp_path: Path, watched: Watched) -> None:
    """These texts are worth testing with: as markup they run in this browser, each that is meant to."""
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><html><head><title>as it was</title></head><body>{text}</body></html>")
    until(watched.open(page), OWNED)

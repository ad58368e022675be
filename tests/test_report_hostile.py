"""Pages of runs whose texts are markup: a parser finds what the templates wrote, and every text is still text."""

from __future__ import annotations

import base64
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hostile import PAGES, TEXTS, run_page
from understudy.report.tokens import visible_text

ELEMENTS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "script",
        "body",
        "main",
        "footer",
        "section",
        "article",
        "figure",
        "div",
    ),
    *(
        "p",
        "span",
        "small",
        "dl",
        "dt",
        "dd",
        "ul",
        "li",
        "h1",
        "h2",
        "h3",
        "h4",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
    ),
    *("td", "a", "b", "i", "code", "pre", "button", "details", "summary", "strong", "svg", "g", "path", "text"),
}
ATTRIBUTES = {
    *(
        "lang",
        "charset",
        "name",
        "content",
        "http-equiv",
        "class",
        "id",
        "style",
        "role",
        "hidden",
        "tabindex",
        "scope",
    ),
    *("aria-label", "aria-hidden", "href", "type", "viewbox", "x", "y", "d", "text-anchor", "stroke-dasharray"),
    *("pointer-events", "data-i", "data-s", "data-t", "data-m", "data-k", "data-n"),
}
VOID = {"meta"}


class Page(HTMLParser):
    """Elements, attributes, and the texts of tokens and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.values: dict[str, list[str]] = {}
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.unbalanced: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            self.values.setdefault(name, []).append(value or "")
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data


@pytest.fixture(params=PAGES)
def html(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return PAGES[request.param](tmp_path).read_text(encoding="utf-8")


def parse(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    return page


def test_nothing_became_markup(html: str) -> None:
    page = parse(html)
    assert page.elements <= ELEMENTS, page.elements - ELEMENTS
    assert page.attributes <= ATTRIBUTES, page.attributes - ATTRIBUTES
    assert page.unbalanced == []
    assert page.open == []
    assert [len(page.texts[name]) for name in ("script", "style", "head", "body", "main")] == [1] * 5
    assert all(
        href == "02-phase/report.html" or href.startswith("javascript%3A") for href in page.values.get("href", [])
    )


def test_the_policy_allows_one_script_by_its_hash(html: str) -> None:
    """Handlers in attributes and any other script would not run even if they got in."""
    page = parse(html)
    [script] = page.texts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = [value for value in page.values["content"] if "default-src" in value]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "owned" not in script


def test_texts_are_all_there(tmp_path: Path) -> None:
    page = parse(run_page(tmp_path).read_text(encoding="utf-8"))
    for text in TEXTS:
        assert visible_text(text) in page.texts["b"], text
    assert TEXTS[0] in page.texts["code"]
    told = {text.strip() for text in page.texts["td"]}
    assert {text.strip() for text in TEXTS if text.strip().isprintable()} <= told  # what a guard said
    alternatives = json.loads(page.values["data-k"][0])
    assert [row[0] for row in alternatives][: len(TEXTS)] == [visible_text(text).rstrip("\n") for text in TEXTS]


def test_nothing_invisible_is_left_in_tokens(tmp_path: Path) -> None:
    """Characters that turn the direction of reading, or end a line, would make a page say something else."""
    page = parse(run_page(tmp_path).read_text(encoding="utf-8"))
    tokens = "".join(page.texts["b"])
    assert not set("\u202e\u202c\u2066\u2028\u2029\0\x1b\x07\ufeff") & set(tokens)
    for sign in ("⟨U+202E⟩", "⟨U+2028⟩", "⟨U+0000⟩", "⟨U+D800⟩"):
        assert sign in tokens

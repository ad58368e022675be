"""Pages of runs whose texts are markup: a parser finds what the templates wrote, and every text is still text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from big_pages import unpacked
from hostile import PAGES, TEXTS, credit_page, run_page
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
    *("nav", "br", "figcaption"),
    *("td", "a", "b", "i", "code", "pre", "button", "details", "summary", "strong", "svg", "g", "path", "text"),
    *("select", "option", "label", "input", "output", "noscript"),
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
    *("pointer-events", "data-credit", "data-chart", "data-key"),
    *("dir", "for", "min", "step", "placeholder", "value"),
}
VOID = {"meta", "br", "input"}
# What runs on each page, in this order.
SCRIPTS = ("tokens", "charts")
OWN_SCRIPTS = {"credit": (*SCRIPTS, "credit")}
# Places on the page itself, and pages beside it whose names are encoded.
LINK = r"#[a-z0-9-]+|02-phase/report\.html|javascript%3A[\w%.-]*/report\.html|[\w%./()~-]+/report\.html(#findings)?"


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
        if ("type", "application/json") in attrs:
            tag = "data"  # a block that no browser runs
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
        if tag == "script" and self.open and self.open[-1] == "data":
            tag = "data"
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data


@pytest.fixture(params=PAGES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def html(name: str, tmp_path: Path) -> str:
    return PAGES[name](tmp_path).read_text(encoding="utf-8")


def parse(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    return page


def test_nothing_became_markup(html: str, name: str) -> None:
    page = parse(html)
    assert page.elements <= ELEMENTS, page.elements - ELEMENTS
    assert page.attributes <= ATTRIBUTES, page.attributes - ATTRIBUTES
    assert page.unbalanced == []
    assert page.open == []
    assert len(page.texts.get("data", [])) == (2 if name == "credit" else 0)
    assert [len(page.texts[name]) for name in ("style", "head", "body", "main")] == [1] * 4
    assert [href for href in page.values.get("href", []) if not re.fullmatch(LINK, href)] == []


def test_the_policy_allows_the_pages_own_scripts_by_their_hashes(html: str, name: str) -> None:
    """Handlers in attributes and any other script would not run even if they got in."""
    page = parse(html)
    folder = files("understudy.report") / "templates"
    own = [(folder / f"{part}.js").read_text(encoding="utf-8") for part in OWN_SCRIPTS.get(name, SCRIPTS)]
    scripts = page.texts["script"]
    assert scripts == [source.removesuffix("\n") for source in own]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    [policy] = [value for value in page.values["content"] if "default-src" in value]
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}"


def test_texts_are_all_there(tmp_path: Path) -> None:
    page = parse(run_page(tmp_path).read_text(encoding="utf-8"))
    for text in TEXTS:
        assert visible_text(text) in page.texts["b"], text
    assert TEXTS[0] in page.texts["code"]
    for packed in page.values["data-credit"]:
        assert set(TEXTS) <= set(json.loads(packed)["texts"])
    told = {text.strip() for text in page.texts["td"]}
    assert {text.strip() for text in TEXTS if text.strip().isprintable()} <= told  # what a guard said


def test_the_page_of_token_credit_has_them_too(tmp_path: Path) -> None:
    page = parse(credit_page(tmp_path).read_text(encoding="utf-8"))
    rollouts, packed = (json.loads(block) for block in page.texts["data"])
    assert set(TEXTS) <= set(packed["texts"])
    rollouts = unpacked(rollouts)
    assert [prompt["prompt_text"] for prompt in rollouts["prompts"]] == ["\n".join(TEXTS)]
    assert {row["finish"] for row in rollouts["rollouts"]} == {TEXTS[4]}
    assert packed["notes"][1] == {str(i): text for i, text in enumerate(TEXTS)}


def test_nothing_invisible_is_left_in_tokens(tmp_path: Path) -> None:
    """Characters that turn the direction of reading, or end a line, would make a page say something else."""
    page = parse(run_page(tmp_path).read_text(encoding="utf-8"))
    tokens = "".join(page.texts["b"])
    assert not set("\u202e\u202c\u2066\u2028\u2029\0\x1b\x07\ufeff") & set(tokens)
    for sign in ("⟨U+202E⟩", "⟨U+2028⟩", "⟨U+0000⟩", "⟨U+D800⟩"):
        assert sign in tokens

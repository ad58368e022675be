"""Pages in Debian's Chromium, headless. `make test-browser` runs them; nothing is fetched from the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import SIZES, chromium, rollout

from big_pages import big_rollouts
from understudy.report.credit_page import CreditUnit, write_credit_page


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """``visit(path, "#r1")`` opens a page that is ready; whatever it asks of the network, or complains of, fails."""
    contexts, complaints = [], []

    def open_page(path: Path, fragment: str = "", *, scheme: str = "light", size: str = "desktop") -> Any:
        width, height = SIZES[size]
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": height}, accept_downloads=True, offline=True
        )
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: (complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: complaints.append(request.url) if "file:" not in request.url[:5] else None)
        page.goto(f"file://{path}{fragment}")
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in complaints if not text.startswith("blob:")] == []


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Three rollouts: r0 of three tokens, r1 cut and wrong, r2 short and without a reward."""
    rollouts = [
        rollout(0, ["The", " sum", " is", " 4"]),
        rollout(1, ["I", " guess", " it", " is", " 5", "\n"], finish_reason="length", reward=0.0),
        rollout(2, ["No", "."], reward=None, teacher_logprobs=[-0.75, -0.25]),
    ]
    return write_credit_page([CreditUnit((one,)) for one in rollouts], tmp_path / "three.html", title="Three")


@pytest.fixture(scope="session")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand rollouts of 256 tokens, without alternatives."""
    units = [CreditUnit((own,)) for own in big_rollouts(1000, alternatives=False)]
    return write_credit_page(units, tmp_path_factory.mktemp("thousand") / "page.html", title="Thousand")

"""Pages of runs, of several runs and of a pipeline in Chromium: by keyboard, on paper, in a hand, light and dark."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import SIZES
from report_runs import STEPS, forgetful, material, run
from test_accessibility import axe, violations  # noqa: F401 (a fixture)

from understudy.report import write_run_report
from understudy.report.pipeline_report import write_pipeline_report
from understudy.report.run_comparison import write_run_comparison

Visit = Callable[..., Any]
NAMES = ("run", "comparison", "pipeline")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three kinds of page, of runs that really ran."""
    folder = material(tmp_path_factory.mktemp("runs"))
    with contextlib.chdir(folder):
        a = run(folder, "a")
        b = run(folder, "b", optim={"learning_rate": 3e-3}, seed=1)
        plan = forgetful(folder)
    return {
        "run": write_run_report(a),
        "comparison": write_run_comparison([a, b], folder / "comparison.html"),
        "pipeline": write_pipeline_report(plan),
    }


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    """Opens a page; what it asks of the network, or complains of, fails."""
    contexts, complaints = [], []

    def open_page(path: Path, *, scheme: str = "light", size: str = "desktop") -> Any:
        width, height = SIZES[size]
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": height}, offline=True, has_touch=size == "phone"
        )
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: complaints.append(request.url) if "file:" not in request.url[:5] else None)
        page.goto(f"file://{path}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def plot(page: Any, title: str) -> Any:
    return page.locator(f'.plot[aria-label^="{title}"]').first


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
@pytest.mark.parametrize("name", NAMES)
def test_axe_finds_nothing(
    name: str,
    size: str,
    scheme: str,
    pages: dict[str, Path],
    visit: Visit,
    axe: str,  # noqa: F811
) -> None:
    page = visit(pages[name], scheme=scheme, size=size)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    page.locator(".plot").nth(1).focus()
    assert page.locator("#chart-tip").is_visible()
    assert violations(page, axe) == []


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wider_than_a_phone_and_its_type_can_be_read(
    name: str, pages: dict[str, Path], visit: Visit
) -> None:
    page = visit(pages[name], size="phone")
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    smallest = page.evaluate(
        """Math.min(...[...document.querySelectorAll('svg.chart text')].map((text) => {
          const svg = text.closest('svg');
          return parseFloat(getComputedStyle(text).fontSize) * svg.clientWidth / svg.viewBox.baseVal.width;
        }))"""
    )
    assert smallest >= 7.5  # of 11 pixels, in charts as wide as the screen
    beyond = page.evaluate(
        """[...document.querySelectorAll('svg.chart text')].filter((text) =>
          text.getBoundingClientRect().right > text.closest('svg').getBoundingClientRect().right + 1,
        ).map((text) => text.textContent)"""
    )
    assert beyond == []


@pytest.mark.parametrize("name", NAMES)
def test_tab_reaches_every_chart_table_link_and_fold(name: str, pages: dict[str, Path], visit: Visit) -> None:
    page = visit(pages[name])
    wanted = page.evaluate(
        """(() => {
          const all = [...document.querySelectorAll('a[href], summary, button, .plot, .scroll, .command pre, .tokens')];
          const shown = all.filter((one) => one.checkVisibility());
          shown.forEach((one, index) => { one.dataset.wanted = index; });
          return shown.length;
        })()"""
    )
    assert wanted > 6
    reached = set()
    for _ in range(wanted + 40):
        page.keyboard.press("Tab")
        found = page.evaluate("document.activeElement.closest('[data-wanted]')?.dataset.wanted ?? ''")
        reached.add(found)
    assert reached - {""} == {str(index) for index in range(wanted)}


def test_arrow_keys_read_a_chart_out(pages: dict[str, Path], visit: Visit) -> None:
    page = visit(pages["run"])
    chart = plot(page, "Reverse KL.")
    assert chart.get_attribute("role") == "slider"
    chart.focus()
    assert chart.get_attribute("aria-valuetext").startswith(f"optimizer steps {STEPS}; sampled tokens ")
    assert " ± " in chart.get_attribute("aria-valuetext")
    page.keyboard.press("Home")
    assert chart.get_attribute("aria-valuetext").startswith("optimizer steps 0; 1 doctor data.duplicates: ")
    page.keyboard.press("ArrowRight")
    assert chart.get_attribute("aria-valuenow") == "1"
    assert "optimizer steps 1" in page.locator("#chart-tip").inner_text()
    assert chart.locator("line.reading").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#chart-tip").is_hidden()
    assert page.locator(".reading").count() == 0
    page.keyboard.press("Tab")
    assert page.locator("#chart-tip").is_visible()  # the next chart's


def test_the_pointer_reads_a_chart_out(pages: dict[str, Path], visit: Visit) -> None:
    page = visit(pages["run"])
    chart = plot(page, "Accuracy: first")
    chart.scroll_into_view_if_needed()
    page.wait_for_timeout(150)
    area = chart.bounding_box()
    page.mouse.move(area["x"] + area["width"] * 0.965, area["y"] + area["height"] / 2)
    words = page.locator("#chart-tip").inner_text()
    assert f"optimizer steps {STEPS}" in words
    assert re.search(r"greedy\s+\d+\.\d % ± \d+\.\d", words)
    page.mouse.move(5, 5)
    assert page.locator("#chart-tip").is_hidden()


def test_findings_lead_to_rollouts_by_keyboard(pages: dict[str, Path], visit: Visit) -> None:
    page = visit(pages["run"])
    table = page.locator("table.events")
    assert "doctor data.duplicates" in table.inner_text()
    assert "guard reverse_kl (warn)" in table.inner_text()
    link = table.locator("a").last
    target = link.get_attribute("href")
    link.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == target
    assert page.locator(target).is_visible()
    assert page.evaluate("document.querySelector(':target').getBoundingClientRect().top") < 900
    # The same numbers stand on the curves, and are read out there.
    step = table.locator("tr").last.locator("td.num").inner_text()
    chart = plot(page, "Reverse KL.")
    assert "▲2" in chart.inner_text()
    chart.focus()
    for _ in range(STEPS - int(step)):
        page.keyboard.press("ArrowLeft")
    assert "2 guard reverse_kl (warn): " in chart.get_attribute("aria-valuetext")


def test_what_was_forgotten_and_recovered_is_seen_at_a_glance(pages: dict[str, Path], visit: Visit) -> None:
    page = visit(pages["pipeline"])
    assert "forgotten: " in page.locator("dl.headline").inner_text()
    assert "recovered: " in page.locator("dl.headline").inner_text()
    chart = plot(page, "All evaluations")
    for words in ("1 first-words", "2 documents", "3 again"):
        assert words in chart.inner_text()
    chart.focus()
    page.keyboard.press("Home")
    assert chart.get_attribute("aria-valuetext").startswith("before phase 1, first-words; first, greedy ")
    page.keyboard.press("ArrowRight")
    assert chart.get_attribute("aria-valuetext").startswith("in phase 1, first-words, step 4; ")
    assert chart.bounding_box()["y"] < 900


def test_the_same_prompt_stands_side_by_side_over_time(pages: dict[str, Path], visit: Visit) -> None:
    page = visit(pages["run"])
    headings = page.locator(".rollouts section").first.locator("h4").all_text_contents()
    assert headings == ["Step 0", "Step 12", f"Step {STEPS}"]


def test_the_command_for_token_credit_can_be_copied(pages: dict[str, Path], visit: Visit) -> None:
    page = visit(pages["run"])
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    box = page.locator(".command", has_text="understudy score")
    box.locator("button").click()
    assert page.evaluate("navigator.clipboard.readText()") == f"understudy score {pages['run'].parent}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_all_of_it_comes_out_on_paper(
    name: str, scheme: str, pages: dict[str, Path], visit: Visit, tmp_path: Path
) -> None:
    page = visit(pages[name], scheme=scheme)
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").read_bytes().count(b"/Type /Page\n") >= 2
    # What that paper shows: nothing scrolls there, so that nothing may be wider than its box; and ink is dark.
    page.emulate_media(media="print", color_scheme=scheme)
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 less its margins, at 96 dots per inch
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    text = page.locator("main").inner_text()
    for words in {
        "run": ("optim.learning_rate", "All metrics in numbers", "ratio/abs_log_max", "torch", "Reverse KL by teacher"),
        "comparison": ("optim.learning_rate", "rollouts.per_step", "student training", "torch"),
        "pipeline": ("forgotten", "All evaluations", "Cost by role"),
    }[name]:
        assert words in text, words
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    cut = page.evaluate(
        """[...document.querySelectorAll('main *')].filter((one) =>
          !one.closest('svg') && one.checkVisibility() && one.getBoundingClientRect().right > 719)
          .map((one) => one.outerHTML.slice(0, 120))"""
    )
    assert cut == []
    hidden = page.evaluate(
        """[...document.querySelectorAll('main *')].filter((one) => !one.closest('svg')
          && ['auto', 'scroll', 'hidden'].includes(getComputedStyle(one).overflowY)
          && one.scrollHeight > one.clientHeight + 2).map((one) => one.outerHTML.slice(0, 120))"""
    )
    assert hidden == []
    assert page.locator("details:not([open])").count() == 0

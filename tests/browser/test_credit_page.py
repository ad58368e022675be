"""The page of token credit under the hands of a user: every control, by mouse and by keyboard."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import rollout, until

from understudy.report.credit_page import CreditUnit, pair_units, write_credit_page
from understudy.score.sources import read_file

Visit = Callable[..., Any]


def one_page(folder: Path, *rollouts: dict[str, Any]) -> Path:
    return write_credit_page([CreditUnit((own,)) for own in rollouts], folder / "page.html", title="A page")


def token(page: Any, r: int, t: int) -> Any:
    return page.locator(f"#r{r} .tokens > b").nth(t)


def point(page: Any, r: int, t: int) -> str:
    """The tooltip of a token under the pointer. Scrolling hides tooltips, and ends before the pointer comes."""
    token(page, r, t).scroll_into_view_if_needed()
    page.wait_for_timeout(150)
    token(page, r, t).hover()
    assert page.locator("#tip").is_visible()
    return page.locator("#tip").inner_text()


def classes(page: Any, r: int) -> list[str]:
    return page.eval_on_selector_all(f"#r{r} .tokens > b", "nodes => nodes.map(n => n.className)")


def order(page: Any) -> list[str]:
    return page.eval_on_selector_all("#rows th a", "nodes => nodes.map(n => n.textContent)")


def scale_to(page: Any, words: str) -> None:
    """Move the width of the scale until it says ``words``."""
    for value in range(13):
        page.locator("#scale").fill(str(value))
        if page.locator("#scale-value").text_content() == words:
            return
    raise AssertionError(words)


def test_tokens_are_coloured_by_what_is_chosen(three: Path, visit: Visit) -> None:
    page = visit(three)
    scale_to(page, "±2")
    # Reverse KL of r0: 0, 0.5, 1, 1.5 nats of 2: no shade, then 2, 4, 6 of 8.
    assert classes(page, 0) == ["", "p2", "p4", "p6"]
    page.locator("#measure").select_option("advantage")
    scale_to(page, "±1")
    assert classes(page, 0) == ["", "p4", "p8", "p8"]  # -0.5, -1, -1.5 of 1
    page.locator("#measure").select_option("teacher_probability")
    scale_to(page, "±1")
    assert classes(page, 0) == ["p2", "p6", "p8", "p8"]  # 0.25, 0.75, 1.25 nats of 1
    page.locator("#measure").select_option("entropy")
    scale_to(page, "±0.5")
    assert classes(page, 0) == ["e2"] * 4  # 0.125 of 0.5
    page.locator("#measure").select_option("ratio")
    scale_to(page, "±1")
    assert classes(page, 0) == ["p2"] * 4  # log-ratio -0.25: less likely as trained
    assert "importance ratio" in page.locator("#legend").text_content()


def test_what_the_data_lacks_cannot_be_chosen(tmp_path: Path, visit: Visit) -> None:
    page = visit(one_page(tmp_path, rollout(0, ["a"], trainer_logprobs=None, advantages=None, student_entropy=None)))
    state = page.eval_on_selector_all("#measure option", "nodes => nodes.map(n => [n.value, n.disabled])")
    assert dict(state) == {
        "reverse_kl": False, "advantage": True, "teacher_probability": False, "entropy": True, "ratio": True
    }  # fmt: skip


def test_pointing_at_a_token_shows_its_numbers(three: Path, visit: Visit) -> None:
    page = visit(three)
    text = point(page, 0, 2)
    for part in (
        "␣is", "token 3 of 4, position 2, id 102", "−0.250", "77.9 %", "−1.250", "28.7 %", "+1.000 nats", "−1.000",
        "0.7788", "0.125 nats", "the teacher would have said", "yes", "61 %", "␣no", "22 %",
        "the student's own choices",
    ):  # fmt: skip
        assert part in text, part
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()


def test_the_keyboard_alone_reaches_every_token(three: Path, visit: Visit) -> None:
    page = visit(three)
    token(page, 0, 0).focus()
    for key, position in (("ArrowRight", 1), ("ArrowDown", 2), ("End", 3), ("ArrowLeft", 2), ("Home", 0)):
        page.keyboard.press(key)
        assert (
            page.evaluate("[...document.activeElement.parentNode.children].indexOf(document.activeElement)") == position
        )
        assert f"position {position}" in page.locator("#tip").inner_text()
        assert page.locator("#r0 .tokens > b[aria-describedby=tip]").count() > 0
    assert page.locator("#r0 .tokens > b[tabindex='0']").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.keyboard.press("Tab")  # out of the tokens in one step
    assert page.evaluate("document.activeElement.type") == "checkbox"


def test_the_table_sorts_by_every_column(three: Path, visit: Visit) -> None:
    page = visit(three)
    assert order(page) == ["r0", "r1", "r2"]
    # Mean reverse KL 0.75, 1.25, 0.25; what has no reward comes last, whichever way.
    for key, first, second in (
        ("kl", ["r1", "r0", "r2"], ["r2", "r0", "r1"]),
        ("length", ["r1", "r0", "r2"], ["r2", "r0", "r1"]),
        ("reward", ["r0", "r1", "r2"], ["r1", "r0", "r2"]),
        ("finish", ["r1", "r0", "r2"], ["r0", "r2", "r1"]),
        ("rollout", ["r0", "r1", "r2"], ["r2", "r1", "r0"]),
    ):
        header = page.locator(f"th[data-key={key}]")
        header.locator("button").press("Enter")
        directions = [header.get_attribute("aria-sort")]
        assert order(page) == first, key
        header.locator("button").click()
        directions.append(header.get_attribute("aria-sort"))
        assert order(page) == second, key
        assert sorted(directions) == ["ascending", "descending"]  # type: ignore[type-var]
    assert page.eval_on_selector_all("#rollout-list .rollout", "n => n.map(x => x.id)") == ["r2", "r1", "r0"]


def test_search_finds_prompts_and_completions_and_marks_tokens(three: Path, visit: Visit) -> None:
    page = visit(three)
    page.locator("#search").fill("SUM IS")
    until(page, "document.getElementById('count').textContent === '1 of 3 rollouts'")
    assert order(page) == ["r0"]
    assert page.eval_on_selector_all("#r0 .hit", "nodes => nodes.map(n => n.textContent)") == [" sum", " is"]
    page.locator("#search").fill("question 2")
    until(page, "document.querySelector('#rows th a').textContent === 'r2'")
    page.locator("#search").fill("")
    until(page, "document.getElementById('count').textContent === '3 rollouts'")


@pytest.mark.parametrize("fragment", ["#r1t4", "#r1"])
def test_an_address_opens_its_rollout_and_token(fragment: str, three: Path, visit: Visit) -> None:
    page = visit(three, fragment)
    if fragment == "#r1":
        until(page, "document.activeElement.id === 'r1'")
        return
    until(page, "document.activeElement.textContent === ' 5'")
    assert "+2.000 nats" in page.locator("#tip").inner_text()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("location.hash") == "#r1t3"


def test_an_address_into_a_long_page_and_into_a_filtered_one(thousand: Path, visit: Visit) -> None:
    page = visit(thousand, "#r900t200")
    until(page, "document.activeElement.tagName === 'B'")
    box = page.locator("#r900 .tokens > b").nth(200).bounding_box()
    assert 0 < box["y"] < 900
    page.locator("#search").fill("of this? 999")
    until(page, "document.getElementById('count').textContent.startsWith('1 of')")
    page.evaluate("location.hash = '#r5t1'")
    until(page, "document.activeElement.parentNode.closest('#r5') !== null")
    assert page.locator("#search").input_value() == ""


def test_forking_tokens_lead_to_their_places(three: Path, visit: Visit) -> None:
    page = visit(three)
    places = page.eval_on_selector_all("#forks th a", "nodes => nodes.map(n => n.textContent)")
    # Reverse KL grows by half a nat per position: the longest rollout's last tokens first; ties in order.
    assert places[:4] == ["r1t5", "r1t4", "r0t3", "r1t3"]
    assert "yes (60.7 %)" in page.locator("#forks tbody tr").first.inner_text()
    page.locator("#forks a", has_text="r1t4").press("Enter")
    until(page, "document.activeElement.textContent === ' 5'")
    page.locator("#forks a", has_text="r1t4").click()  # the same once more
    until(page, "document.activeElement.textContent === ' 5'")


def test_text_is_copied_plain(three: Path, visit: Visit) -> None:
    page = visit(three)
    page.locator("#r1 button", has_text="Copy text").click()
    page.wait_for_selector("#r1 button:has-text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == "I guess it is 5\n"
    page.locator("#rows [data-pick='0']").check()
    page.locator("#r2 [data-pick='2']").check()
    assert page.locator("#count").text_content() == "3 rollouts, 2 selected"
    page.locator("#copy").click()
    page.wait_for_selector("#copy:has-text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == "The sum is 4\n\nNo."


def test_the_export_reads_back(three: Path, visit: Visit, tmp_path: Path) -> None:
    page = visit(three)
    page.locator("#rows [data-pick='1']").check()
    with page.expect_download() as download:
        page.locator("#export").click()
    path = tmp_path / "credit.json"
    download.value.save_as(path)
    [record] = read_file(path)
    expected = rollout(1, ["I", " guess", " it", " is", " 5", "\n"], finish_reason="length", reward=0.0)
    same = {"prompt_index", "task", "answer", "prompt_text", "completion_text", "completion_ids", "completion_tokens"}
    for name in same | {"finish_reason", "reward", "loss_mask"}:
        assert record[name] == expected[name], name
    for name in ("sampler_logprobs", "trainer_logprobs", "teacher_logprobs", "student_entropy"):
        assert record[name] == pytest.approx(expected[name], abs=5e-4), name
    assert record["advantages"] == pytest.approx(expected["advantages"], rel=1e-3)
    assert record["teacher_topk"]["tokens"] == expected["teacher_topk"]["tokens"]
    assert record["teacher_topk"]["logprobs"][0] == pytest.approx([-0.5, -1.5], abs=0.02)
    assert len(json.loads(path.read_text(encoding="utf-8"))) == 1


def test_the_export_keeps_what_models_read(tmp_path: Path, visit: Visit) -> None:
    chat = {
        "prompt_ids": [1, 2, 3],
        "teacher_prompt_ids": [4, 5],
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Question 0?"}],
    }
    page = visit(one_page(tmp_path, rollout(0, ["a"], **chat), rollout(1, ["b"])))
    with page.expect_download() as download:
        page.locator("#export").click()
    download.value.save_as(tmp_path / "credit.json")
    first, second = read_file(tmp_path / "credit.json")
    assert {name: first[name] for name in chat} == chat
    assert [first["prompt_text"], second["prompt_text"]] == ["Question 0?", "Question 1?"]
    assert not chat.keys() & second.keys()


def test_hostile_texts_are_texts(tmp_path: Path, visit: Visit) -> None:
    """A dialog, an error or a request would fail the test."""
    evil = [
        "</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", "<!--", "'\"><svg onload=alert(3)>",
        "]]>", "\u2028alert(4)", "{{ 7 * 7 }}", "\ud83d", "javascript:alert(5)", "\u202egnp.exe",
    ]  # fmt: skip
    topk = {"ids": [[1]] * len(evil), "tokens": [[own] for own in evil], "logprobs": [[-0.1]] * len(evil)}
    hostile = rollout(
        0, evil, prompt_text=evil[0], task=evil[1], answer=evil[3], teacher_topk=topk, finish_reason=evil[1]
    )  # fmt: skip
    page = visit(
        write_credit_page([CreditUnit((hostile,), (evil[0],), ({0: evil[1]},))], tmp_path / "p.html", title=evil[0])
    )
    shown = page.eval_on_selector_all("#r0 .tokens > b", "nodes => nodes.map(n => n.textContent)")
    assert shown[:5] == evil[:5]
    assert shown[5] == "⟨U+2028⟩alert(4)"
    assert shown[6:] == ["{{ 7 * 7 }}", "⟨U+D83D⟩", "javascript:alert(5)", "⟨U+202E⟩gnp.exe"]
    assert evil[0] in point(page, 0, 0)
    page.locator("#search").fill("<img")
    page.wait_for_timeout(300)
    assert page.evaluate("document.images.length") == 0
    assert page.evaluate("document.scripts.length") == 5


def test_scripts_of_the_world_and_single_bytes(tmp_path: Path, visit: Visit) -> None:
    tokens = ["שלום", " עולם", " 你好", "世界", " ", "\ufffd", "\ufffd", " 👩‍👩‍👧", "\t", "<|end|>"]
    text = "שלום עולם 你好世界 🙂 👩‍👩‍👧\t"
    page = visit(one_page(tmp_path, rollout(0, tokens, completion_text=text)))
    shown = page.eval_on_selector_all("#r0 .tokens > b", "nodes => nodes.map(n => n.textContent)")
    assert shown == ["שלום", " עולם", " 你好", "世界", "␣", "🙂⟨1/2⟩", "⟨2/2⟩", " 👩‍👩‍👧", "⇥", "<|end|>"]
    # Right to left: the second word stands left of the first, and the left arrow moves to it.
    first, second = (token(page, 0, i).bounding_box() for i in (0, 1))
    assert second["x"] < first["x"]
    token(page, 0, 0).focus()
    page.keyboard.press("ArrowLeft")
    assert "position 1" in page.locator("#tip").inner_text()
    assert "bytes 1 of 2 of 🙂" in point(page, 0, 5)
    page.locator("#r0 button", has_text="Copy text").click()
    page.wait_for_selector("#r0 button:has-text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == text


def test_before_and_after_stand_side_by_side(tmp_path: Path, visit: Visit) -> None:
    before = [rollout(i, ["a", " b", " c"]) for i in range(2)]
    after = [rollout(i, ["a", " b", " d"], step=9, completion_ids=[100, 101, 7]) for i in range(2)]
    path = write_credit_page(pair_units(before, after), tmp_path / "pair.html", title="Pair")
    page = visit(path)
    units = page.eval_on_selector_all(".shell", "n => n.map(x => [...x.querySelectorAll('.rollout')].map(c => c.id))")
    assert units == [["r0", "r1"], ["r2", "r3"]]
    left, right = (page.locator(f"#r{i}").bounding_box() for i in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] < right["x"]
    assert "here the two part" in point(page, 1, 2)
    assert "u3" in classes(page, 1)[2]


def test_paper_gets_every_rollout(thousand: Path, three: Path, visit: Visit, tmp_path: Path) -> None:
    page = visit(three)
    page.pdf(path=str(tmp_path / "three.pdf"))
    assert (tmp_path / "three.pdf").stat().st_size > 10_000
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".shell.filled").count() == 3
    page.emulate_media(media="print")
    assert page.locator("#export").is_hidden()


def test_a_thousand_rollouts_are_written_as_they_come_near(thousand: Path, visit: Visit) -> None:
    page = visit(thousand)
    assert page.locator(".shell").count() == 1000
    assert page.locator(".shell.filled").count() < 20
    page.evaluate("document.querySelectorAll('.shell')[500].scrollIntoView()")
    page.wait_for_selector("#r500")
    assert page.locator("#r500 .tokens > b").count() == 256
    assert page.locator(".shell.filled").count() < 60
    assert page.locator("#rows tr").count() == 100
    page.locator("#more-rows").click()
    assert page.locator("#rows tr").count() == 1000


def test_a_thousand_rollouts_paint_within_a_second(thousand: Path, browser: Any) -> None:
    """In the page's own computing time until it is ready, which is after its first paint: what else the machine does
    counts for no fault of the page. The clock's time is printed beside it."""
    seconds = []
    for _ in range(3):
        page = browser.new_page()
        metrics = page.context.new_cdp_session(page)
        metrics.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.goto(f"file://{thousand}")
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        found = {one["name"]: one["value"] for one in metrics.send("Performance.getMetrics")["metrics"]}
        seconds.append(found["TaskDuration"])
        paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        print(f"first paint after {paint:.0f} ms by the clock; {1000 * seconds[-1]:.0f} ms of computing until ready")
        page.close()
    assert min(seconds) < 1.0

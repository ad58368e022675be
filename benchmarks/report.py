"""How large pages of token credit are and how fast Chromium shows them; and the README's picture of one. See README.md.

python benchmarks/report.py               # results/report.json and .md, two minutes
python benchmarks/report.py --picture     # docs/images/token_credit.png
python benchmarks/report.py --render      # the table again, from the JSON
python benchmarks/report.py --screens F   # that page in a folder, light and dark, for a desk and a phone: to look at
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "browser")]

from pages import SIZES, chromium, until  # noqa: E402

from big_pages import big_rollouts  # noqa: E402
from understudy.report.credit_page import CreditUnit, write_credit_page  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "report.json"
PICTURE = ROOT / "docs" / "images" / "token_credit.png"
LEDGER = ROOT / "src" / "understudy" / "worlds" / "assets" / "ledger"
REPEATS = 7
COUNTS = (200, 1000)
# When the page's script has set its controls up, by the page's own clock.
WATCH_READY = """new MutationObserver(() => {
  if ("ready" in document.documentElement.dataset && !window.readyAt) window.readyAt = performance.now();
}).observe(document, {subtree: true, attributes: true, attributeFilter: ["data-ready"]});"""
# An action, until the frame after it is drawn.
TIMED = """async (act) => {
  const start = performance.now();
  await ({
    sort: () => document.querySelector("th[data-key=kl] button").click(),
    colour: () => {
      const measure = document.getElementById("measure");
      measure.value = "entropy";
      measure.dispatchEvent(new Event("change"));
    },
    jump: () => {
      location.hash = "#r150t200";
      return new Promise((done) => addEventListener("focusin", done, {once: true}));
    },
    search: () => {
      const field = document.getElementById("search");
      const count = document.getElementById("count");
      const found = new Promise((done) => new MutationObserver(done).observe(count, {childList: true}));
      field.value = "of this? 199";
      field.dispatchEvent(new Event("input"));
      return found;
    },
  })[act]();
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - start;
}"""
ACTIONS = ("sort", "colour", "jump", "search")


def measure(folder: Path) -> dict[str, Any]:
    """Bytes of each page, and milliseconds of each of ``REPEATS`` visits with a fresh cache."""
    pages = []
    with chromium() as browser:
        for count in COUNTS:
            units = [CreditUnit((own,)) for own in big_rollouts(count)]
            path = write_credit_page(units, folder / f"{count}.html", title=f"{count} rollouts")
            visits = [visit(browser, path) for _ in range(REPEATS)]
            pages.append({"rollouts": count, "tokens": count * 256, "bytes": path.stat().st_size, "visits": visits})
        return {"made_with": versions() | {"chromium": browser.version}, "pages": pages}


def visit(browser: Any, path: Path) -> dict[str, float]:
    """Milliseconds by the page's clock since its address was opened, computing time until ready, and of actions."""
    context = browser.new_context(offline=True, viewport=dict(zip(("width", "height"), SIZES["desktop"], strict=True)))
    page = context.new_page()
    page.add_init_script(WATCH_READY)
    metrics = context.new_cdp_session(page)
    metrics.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(path.as_uri())
    until(page, "window.readyAt > 0")
    values = {one["name"]: one["value"] for one in metrics.send("Performance.getMetrics")["metrics"]}
    found = {
        "first_paint": page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"),
        "ready": page.evaluate("window.readyAt"),
        "computing": 1000 * values["TaskDuration"],
    }
    found |= {act: page.evaluate(TIMED, act) for act in ACTIONS}
    context.close()
    return {name: round(value, 1) for name, value in found.items()}


def versions() -> dict[str, str]:
    """What the figures were made with."""
    return {
        "python": platform.python_version(),
        "playwright": version("playwright"),
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
    }


def markdown(results: dict[str, Any]) -> str:
    """The table."""
    made = results["made_with"]
    names = {
        "first_paint": "first paint",
        "ready": "controls ready",
        "computing": "computing until then",
        "sort": "sort the table",
        "colour": "colour by another measure",
        "jump": "open `#r150t200`",
        "search": "search all prompts and completions (120 of it waits for the end of typing)",
    }
    head = "| | " + " | ".join(f"{page['rollouts']:,} rollouts" for page in results["pages"]) + " |"
    rows = [head, "|---|" + "---:|" * len(results["pages"])]
    rows.append("| size, MB | " + " | ".join(f"{page['bytes'] / 1e6:.2f}" for page in results["pages"]) + " |")
    for key, words in names.items():
        cells = []
        for page in results["pages"]:
            values = [one[key] for one in page["visits"]]
            cells.append(f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})")
        rows.append(f"| {words}, ms | " + " | ".join(cells) + " |")
    return f"""# Pages of token credit

Rollouts of 256 tokens with every number and five alternatives of both models, as random numbers (`tests/big_pages.py`).
Milliseconds by the page's clock: median of {REPEATS} visits with an empty cache, smallest and largest in brackets.
Chromium {made["chromium"]}, headless, 1280 x 900, on {made["cores"]} cores that other work was using too.

{chr(10).join(rows)}
"""


def example() -> tuple[list[dict[str, Any]], int, int]:
    """Wrong solutions of the reasoning demo's student, marked by its teacher: records, the one to show, and its first
    wrong step. The one has the fewest false steps of those whose last value is wrong and follows from them."""
    from understudy.score.command import Models, Sampling, answered
    from understudy.worlds.ledger import Ledger

    world = Ledger()
    models = Models(str(LEDGER / "start"), str(LEDGER / "teacher"), device="cpu")
    prompts = [row["prompt"] for row in world.prompt_rows(16, seed=5)]
    records = answered(prompts, models, Sampling(samples=2, max_completion_tokens=60))
    found = []
    for number, record in enumerate(records):
        marks = world.diagnose(record["prompt_text"], record["completion_text"])
        false = [one.word_index for one in marks if one.false_in_itself]
        if len(marks) == world.num_items and false and marks[-1].inherited:
            gap = record["sampler_logprobs"][false[0]] - record["teacher_logprobs"][false[0]]
            found.append((len(false), -gap, number, false[0]))
    _, _, number, step = min(found)
    return records, number, step


def picture(out: Path) -> None:
    """The README's: the first wrong step under the pointer."""
    records, number, step = example()
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        path = write_credit_page([CreditUnit((one,)) for one in records], Path(folder) / "page.html", title="Ledger")
        page = browser.new_page(viewport={"width": 1000, "height": 620}, device_scale_factor=1.5, color_scheme="light")
        page.goto(f"{path.as_uri()}#r{number}")
        until(page, f"document.activeElement.id === 'r{number}'")
        page.evaluate("document.activeElement.blur()")
        page.locator(f"#r{number}").evaluate("one => one.closest('.shell').scrollIntoView()")
        page.mouse.wheel(0, -115)  # from under the controls
        page.wait_for_timeout(500)
        page.locator(f"#r{number} .tokens > b").nth(step).hover()
        page.screenshot(path=str(out))


def screens(folder: Path) -> None:
    """The same page, top and tooltip, in both schemes and sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    records, number, step = example()
    path = write_credit_page([CreditUnit((one,)) for one in records], folder / "page.html", title="Ledger")
    with chromium() as browser:
        for scheme in ("light", "dark"):
            for size, (width, height) in SIZES.items():
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                for name, place in (("top", ""), ("table", ""), ("token", f"#r{number}t{step}")):
                    page.goto(f"{path.as_uri()}{place}")
                    page.wait_for_timeout(800)
                    if name == "table":
                        page.locator("#controls").evaluate("one => one.scrollIntoView()")
                    page.screenshot(path=str(folder / f"{scheme}-{size}-{name}.png"))
                page.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--picture", action="store_true")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--screens", type=Path)
    arguments = parser.parse_args()
    if arguments.picture:
        picture(PICTURE)
        return
    if arguments.screens:
        screens(arguments.screens)
        return
    if not arguments.render:
        with tempfile.TemporaryDirectory() as folder:
            RESULTS.write_text(json.dumps(measure(Path(folder)), indent=1) + "\n", encoding="utf-8")
    text = markdown(json.loads(RESULTS.read_text(encoding="utf-8")))
    RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""What a chart costs a page that has no network: libraries against the pages' own drawing. See README.md beside it.

    python benchmarks/chart_libraries.py             # a minute; fetches the libraries with npm into .cache/
    python benchmarks/chart_libraries.py --render    # the table again, from the JSON

Each library draws the same two lines of 160 points in a page of its own, whole in one file, in Chromium, under the
policy that the pages of this package have: no network, scripts by their hashes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import subprocess
import tarfile
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import distribution, version
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from understudy.report.charts import Series
from understudy.report.curves import Curve
from understudy.report.paper import COLUMN, STYLE, draw

RESULTS = Path(__file__).parent / "results" / "chart_libraries"
CACHE = Path(__file__).resolve().parents[1] / ".cache"
CHROMIUM = "/usr/bin/chromium"
POINTS = [(i, math.sin(i / 20), math.cos(i / 20)) for i in range(160)]


@dataclass(frozen=True)
class Library:
    """``parts``: npm package and the file in it; ``draw``: a script that draws ``DATA`` into the element ``at``."""

    parts: Mapping[str, str]
    draw: str
    license: str


PLOTLY = "Plotly.newPlot(at, [1, 2].map(k => ({x: DATA.map(r => r[0]), y: DATA.map(r => r[k])})))"
VEGA = """vegaEmbed(at, {width: 400, height: 200, data:
{values: DATA.flatMap(r => [1, 2].map(k => ({x: r[0], y: r[k], k})))}, mark: "line",
encoding: {x: {field: "x", type: "quantitative"}, y: {field: "y", type: "quantitative"},
color: {field: "k", type: "nominal"}}}, {renderer: "svg", actions: false})"""
LIBRARIES = {
    "uPlot": Library(
        {"uplot@1.6.32": "dist/uPlot.iife.min.js"},
        """new uPlot({width: 400, height: 200, series: [{}, {stroke: "red"}, {stroke: "blue"}]},
[0, 1, 2].map(k => DATA.map(r => r[k])), at)""",
        "MIT",
    ),
    "Chart.js": Library(
        {"chart.js@4.6.1": "dist/chart.umd.min.js"},
        """const c = document.createElement("canvas"); at.append(c); new Chart(c, {type: "line", data: {labels:
DATA.map(r => r[0]), datasets: [1, 2].map(k => ({label: k, data: DATA.map(r => r[k])}))},
options: {animation: false}})""",
        "MIT",
    ),
    "Observable Plot": Library(
        {"d3@7.9.2": "dist/d3.min.js", "@observablehq/plot@0.6.17": "dist/plot.umd.min.js"},
        "at.append(Plot.plot({marks: [1, 2].map(k => Plot.line(DATA, {x: r => r[0], y: r => r[k]}))}))",
        "ISC",
    ),
    "Plotly (basic)": Library({"plotly.js-basic-dist-min@4.1.1": "plotly-basic.min.js"}, PLOTLY, "MIT"),
    "Vega-Lite (Altair's)": Library(
        {
            "vega@6.4.0": "build/vega.min.js",
            "vega-lite@6.5.0": "build/vega-lite.min.js",
            "vega-embed@7.3.0": "build/vega-embed.min.js",
        },
        VEGA,
        "BSD-3-Clause",
    ),
}


def fetched(package: str, file: str) -> str:
    """One file of a package as npm has it, fetched once. Nothing of a package is run by fetching it."""
    CACHE.mkdir(exist_ok=True)
    name = package.removeprefix("@").replace("/", "-").replace("@", "-")
    archive = CACHE / f"{name}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", package], cwd=CACHE, check=True, capture_output=True)
    with tarfile.open(archive) as members:
        found = members.extractfile(f"package/{file}")
        assert found is not None, file
        return found.read().decode("utf-8")


def measured(browser: Any, scripts: Sequence[str], body: str) -> dict[str, Any]:
    """What a page of these scripts weighs, and what Chromium makes of it."""
    allowed = " ".join(f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"
    blocks = "".join(f"<script>{script}</script>" for script in scripts)
    html = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>chart</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><main>{body}</main>{blocks}'
    )
    complaints: list[str] = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(html, encoding="utf-8")
        page = browser.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(f"file://{path}")
        page.wait_for_timeout(1500)
        seen = page.evaluate(
            """({canvases: document.querySelectorAll('canvas').length,
              texts: document.querySelectorAll('svg text').length,
              stops: document.querySelectorAll('[tabindex="0"]').length})"""
        )
        page.close()
    size = sum(len(script.encode()) for script in scripts) + len(body.encode())
    packed = len(gzip.compress("".join([*scripts, body]).encode(), mtime=0))
    refused = next((text for text in complaints if "Content Security Policy" in text or "unsafe-eval" in text), "")
    drawn = bool(seen["texts"] or seen["canvases"]) and not complaints
    return {
        "bytes": size,
        "gzip": packed,
        "drawn": drawn,
        "refused": bool(refused),
        "complaints": complaints[:2],
        **seen,
    }


def own_parts() -> tuple[str, str, dict[str, Any]]:
    """The script of the pages' charts, one chart, and what matplotlib makes of the same; both timed."""
    lines = tuple(Series(f"line {k}", [(float(row[0]), row[k]) for row in POINTS]) for k in (1, 2))
    curve = Curve("chart", "", lines)
    script = (files("understudy.report") / "templates" / "charts.js").read_text(encoding="utf-8")
    path = Path(mkdtemp()) / "chart.svg"

    def by_matplotlib() -> None:
        figure = Figure(figsize=COLUMN, layout="constrained")
        draw(curve, figure.add_subplot())
        figure.savefig(path)

    with rc_context(STYLE):
        theirs, own = best_of(by_matplotlib), best_of(curve.svg)
    svg, size = str(curve.svg()), path.stat().st_size
    parts = sum(
        Path(str(distribution("matplotlib").locate_file(path))).stat().st_size for path in files_of("matplotlib")
    )
    numbers = {
        "version": version("matplotlib"),
        "bytes": size,
        "seconds": theirs,
        "installed": parts,
        "own_seconds": own,
    }
    return script, svg, numbers


def best_of(work: Callable[[], object], repetitions: int = 7) -> float:
    """Seconds of computing, the fewest: the first time fonts are looked for."""
    seconds = []
    for _ in range(repetitions):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def files_of(package: str) -> list[str]:
    return [str(path) for path in distribution(package).files or () if path.locate().is_file()]


def measure() -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    data = f"const DATA = {json.dumps([[x, round(a, 6), round(b, 6)] for x, a, b in POINTS])};"
    found: dict[str, Any] = {}
    script, svg, matplotlib = own_parts()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, library in LIBRARIES.items():
            scripts = [fetched(package, file) for package, file in library.parts.items()]
            draw = f"{{{data} const at = document.querySelector('main'); {library.draw}}}"
            weight = {"library_bytes": sum(len(own.encode()) for own in scripts)}
            found[name] = {**asdict(library), **weight, **measured(browser, [*scripts, draw], "")}
        found["own"] = {"library_bytes": len(script.encode()), **measured(browser, [script], svg)}
        browser.close()
    found["matplotlib"] = matplotlib
    return found


def table(found: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| | library in the page | page of one chart | gzip | draws under the policy | text is text | keyboard stops |",
        "|---|---:|---:|---:|---|---|---:|",
    ]
    names = {"own": "own SVG and script"}
    for name, row in found.items():
        if name == "matplotlib":
            continue
        packages = ", ".join(row.get("parts", ())) or "this repository"
        policy = "yes" if row["drawn"] else "no: it evaluates text as code" if row["refused"] else "no"
        texts = "yes" if row["texts"] else "no, a canvas" if row["canvases"] else "–"
        cells = [
            f"{names.get(name, name)} ({packages})",
            *(f"{row[key] / 1000:,.0f} kB" for key in ("library_bytes", "bytes", "gzip")),
        ]
        lines.append("| " + " | ".join([*cells, policy, texts, str(row["stops"])]) + " |")
    last = found["matplotlib"]
    lines += [
        "",
        f"The same chart as SVG by matplotlib {last['version']} ({last['installed'] / 1e6:.0f} MB installed, without "
        f"what it needs): {last['bytes'] / 1000:,.0f} kB in {1000 * last['seconds']:.0f} ms, no script; by the "
        f"package itself in {1000 * last['own_seconds']:.0f} ms.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true")
    result = RESULTS.with_suffix(".json")
    if not parser.parse_args().render:
        result.write_text(json.dumps(measure(), indent=2) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(table(json.loads(result.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()

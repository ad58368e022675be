"""What stays of an experiment: results.json, a README's results, plots and a page; and the table of all claims.

<output>/<claim>/results.json   the records, the search, the finding, and what they were made with
<output>/<claim>/README.md      claim, controls and pass rule by hand; results between two markers
<output>/<claim>/*.svg          plots
<output>/<claim>/report.html    the same as a page
<output>/README.md              the table of all claims, between the markers
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from understudy.checkpoints import write_atomic
from understudy.experiments.claim import Chart, Claim, Finding
from understudy.experiments.claims import NAMES, load_claim
from understudy.experiments.code import claim_hash
from understudy.experiments.runner import Results, config_hash
from understudy.experiments.search import Search
from understudy.experiments.worlds import SCALES, ScaleName
from understudy.report import page
from understudy.report.charts import line_chart, picture
from understudy.report.tokens import token_legend

SCHEMA_VERSION = 1
BEGIN, END = "<!-- results -->", "<!-- /results -->"


def stored(output: Path, name: str) -> dict[str, Any] | None:
    """What results.json of a claim holds, if there is one."""
    path = output / name / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def is_current(content: Mapping[str, Any] | None, name: str, scale: ScaleName, pipelines: int) -> bool:
    """Whether stored results come from today's code and settings, and from as many pipelines."""
    return (
        content is not None
        and content["code"] == claim_hash(name)
        and content["config"] == config_hash(load_claim(name), scale)
        and content["scale"] == scale
        and len(content["records"]) == pipelines
    )


def keep(output: Path, name: str, scale: ScaleName, results: Results) -> None:
    """Write results.json of a claim, with what its numbers were made with."""
    claim = load_claim(name)
    content = {
        "schema_version": SCHEMA_VERSION,
        "claim": name,
        "scale": scale,
        "code": claim_hash(name),
        "config": config_hash(claim, scale),
        "settings": asdict(claim.settings[scale]),
        "worlds": asdict(SCALES[scale]),
        "searches": {arm: [list(pair) for pair in search.scores] for arm, search in results.searches.items()},
        "records": [_rounded(record) for record in results.records],
        "seconds": {part: round(seconds) for part, seconds in results.seconds.items()},
        "made_with": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "understudy")},
            "machine": _machine(),
        },
    }
    (output / name).mkdir(parents=True, exist_ok=True)
    _write(output / name / "results.json", content)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """A line per key: curves with a line per number would be ten times as long."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items()]
    write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _rounded(value: Any) -> Any:
    """Numbers to 6 significant digits: more would say more than was measured."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """As JSON: estimates as {mean, low, high}; what is not finite, such as the interval of one pipeline, as null."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _rounded(value) if not isinstance(value, float) or math.isfinite(value) else None


def _machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def full_title(claim: Claim) -> str:
    """ "C2: what it is about"."""
    return f"{claim.name.partition('_')[0].upper()}: {claim.title[0].lower()}{claim.title[1:]}"


def show(output: Path, name: str) -> Finding:
    """Analyse the stored records and write everything that shows them."""
    content = stored(output, name)
    assert content is not None
    claim, folder = load_claim(name), output / name
    finding = claim.analyse(content["records"])
    found = {"verdict": finding.verdict, "text": finding.text, "numbers": _plain(finding.numbers)}
    _write(folder / "results.json", {**content, "finding": found})
    for chart in finding.charts:
        write_atomic(folder / f"{chart.name}.svg", _standalone(_svg(chart)))
    _fill(folder / "README.md", f"# {full_title(claim)}", render(claim, finding, content))
    page.write_page(
        "experiment.html",
        folder / "report.html",
        {
            "title": full_title(claim),
            "verdict": f"Verdict: {finding.verdict}.\n\n{finding.text}",
            "article": claim.article,
            "limits": claim.limits,
            "table": page.grid(finding.table),
            "charts": [Markup(_svg(chart)) for chart in finding.charts],
            "searches": page.grid(_search_table(_searches(content))),
            **_tokens(finding.rollouts),
            "command": _command(content),
            "footnotes": [_made_with(content)],
        },
    )
    return finding


def _tokens(rollouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Coloured completions and what their colours mean."""
    scale = page.choose_scale(entry["rollout"] for entry in rollouts)
    groups = []
    for entry in rollouts:
        rollout, notes = entry["rollout"], {int(index): note for index, note in entry["notes"].items()}
        card = page.rollout_card(rollout, "The student's", scale=scale, notes=notes)
        groups.append(page.RolloutGroup(page.prompt_heading(rollout), str(rollout["prompt_text"]), (card,)))
    return {"groups": groups, "legend": token_legend(scale)}


def show_all(output: Path) -> None:
    """The table of all claims that have results, in <output>/README.md."""
    _fill(output / "README.md", "# The article's claims, tested", render_table(output))


def render(claim: Claim, finding: Finding, content: Mapping[str, Any]) -> str:
    """A claim's results as Markdown."""
    searches = _searches(content)
    edges = [arm for arm, search in searches.items() if search.at_edge]
    parts = [
        "## Results",
        f"**Verdict: {finding.verdict}.** {finding.text}",
        _markdown(finding.table),
        *(f"![{chart.options['title']}]({chart.name}.svg)" for chart in finding.charts),
        "Learning rates, by score on the validation problems of the first pipeline:" if searches else "",
        _markdown(_search_table(searches)),
        f"The best rate of {', '.join(edges)} is the lowest or the highest tried." if edges else "",
        f"`{_command(content)}`. {_made_with(content)}",
    ]
    return "\n\n".join(part for part in parts if part)


def render_table(output: Path) -> str:
    """The table of all claims as Markdown."""
    rows = []
    for name in NAMES:
        content = stored(output, name)
        if content is None:
            continue
        claim = load_claim(name)
        finding = claim.analyse(content["records"])
        rows.append(
            {
                "claim": f"[{full_title(claim)}]({name}/README.md)",
                "the article": claim.article,
                "here": finding.ours,
                "verdict": f"**{finding.verdict}**",
                "limits": claim.limits,
            }
        )
    return _markdown(rows)


def _searches(content: Mapping[str, Any]) -> dict[str, Search]:
    return {arm: Search([(rate, score) for rate, score in pairs]) for arm, pairs in content["searches"].items()}


def _search_table(searches: Mapping[str, Search]) -> list[dict[str, str]]:
    return [
        {
            "arm": arm,
            "taken": f"{search.chosen:g}",
            "tried": ", ".join(f"{rate:g}: {_score(score)}" for rate, score in search.scores),
        }
        for arm, search in searches.items()
    ]


def _score(score: float | None) -> str:
    return "broke off" if score is None else f"{score:.3f}"


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    grid = page.grid(rows)
    if grid is None:
        return ""
    lines = [grid.columns, ["---"] * len(grid.columns), *([row[c] for c in grid.columns] for row in grid.rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _command(content: Mapping[str, Any]) -> str:
    short = content["claim"].partition("_")[0]
    return f"understudy experiment {short} --pipelines {len(content['records'])} --scale {content['scale']}"


def _made_with(content: Mapping[str, Any]) -> str:
    made, minutes = content["made_with"], sum(content["seconds"].values()) / 60
    return (
        f"{len(content['records'])} pipelines; {minutes:.0f} minutes for what other claims had not run; "
        f"code {content['code']}, settings {content['config']}; Python {made['python']}, torch {made['torch']}, "
        f"transformers {made['transformers']}; {made['machine']}."
    )


def _svg(chart: Chart) -> str:
    return line_chart(chart.series, **chart.options)


def _standalone(svg: str) -> str:
    """An inline chart as a file of its own, on white: a viewer's dark background would hide its labels."""
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="690" style="background:#fff;font-family:sans-serif" '
    return picture(svg).replace("<svg ", head, 1) + "\n"


def _fill(path: Path, heading: str, text: str) -> None:
    """Put ``text`` between the file's markers; a file that is not there is begun with ``heading``."""
    before = path.read_text(encoding="utf-8") if path.exists() else f"{heading}\n\n{BEGIN}\n{END}\n"
    head, _, rest = before.partition(BEGIN)
    write_atomic(path, f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")

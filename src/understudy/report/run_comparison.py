"""Several runs as one HTML page: their numbers, curves and costs side by side, and what was set differently."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from understudy.report import formatting, page
from understudy.report.cost_panel import bars_svg, cost_bars, cost_rows, counted, reach_rows
from understudy.report.curves import Curve, compared_curves, cost_curves
from understudy.report.findings import Event, link_events, run_events
from understudy.report.page import RolloutGroup, Row
from understudy.report.run_data import RunData, flatten, load_run, prompt_key
from understudy.report.run_report import environment_items
from understudy.report.tokens import token_legend

# Prompts whose last answers of all runs stand side by side.
PROMPTS_SHOWN = 4
# Another folder is what makes it another run.
_OWN = frozenset({"output_dir"})


@dataclass(frozen=True)
class RunLine:
    """A run's line in the table of results; ``link``: its own page, where it has one."""

    name: str
    link: str
    cells: tuple[str, ...]


def write_run_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write the page that compares runs to ``out`` and return its path.

    Runs are called like their folders, with as much of the path as tells them apart. Raises ValueError for fewer than
    two folders, or two that are the same one.
    """
    runs = load_runs(folders)
    metrics = {name: run.metrics for name, run in runs.items()}
    costs = {name: run.costs for name, run in runs.items() if run.costs}
    events = {name: link_events(run_events(run), ()) for name, run in runs.items()}
    marks = [
        replace(event.mark, label=f"{number}.{event.number}", words=f"{name}: {event.mark.words}")
        for number, (name, own) in enumerate(events.items(), 1)
        for event in own
    ]
    shared = _last_answers(runs)
    scale = page.choose_scale([rollout for group in shared for _, rollout in group])
    columns, lines = _results(runs, events, Path(out).absolute().parent)
    context = {
        "title": " · ".join(runs),
        "columns": columns,
        "runs": lines,
        "charts": [curve.svg(marks) for curve in compared_curves(metrics)],
        "cost_tables": [(name, page.grid(cost_rows(own))) for name, own in costs.items()],
        "cost_charts": [bars_svg(bars) for bars in cost_bars(costs)],
        "reach": page.grid(reach_rows(metrics)),
        "reach_charts": [curve.svg() for curve in cost_curves(metrics)],
        "differences": page.grid(config_differences({name: run.config for name, run in runs.items()})),
        "same": _same(runs),
        "environments": page.grid(_environment_rows(runs)),
        "findings": [(n, line, events[line.name]) for n, line in enumerate(lines, 1) if events[line.name]],
        "missing": [f"{name}: {line}" for name, run in runs.items() for line in run.missing],
        "legend": token_legend(scale),
        "groups": [_group(group, scale) for group in shared],
    }
    return page.write_page("run_comparison.html", Path(out), context)


def compared_figures(runs: Mapping[str, RunData]) -> list[Curve]:
    """Every curve of the page."""
    metrics = {name: run.metrics for name, run in runs.items()}
    return [*compared_curves(metrics), *cost_curves(metrics)]


def load_runs(folders: Sequence[Path]) -> dict[str, RunData]:
    """Runs by name, in the given order."""
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    if len(paths) < 2 or len(set(resolved)) < len(paths):
        raise ValueError(f"runs: got {[str(path) for path in paths]}; expected two folders or more, each once")
    count = 1
    while len({path.parts[-count:] for path in resolved}) < len(paths):
        count += 1
    return {"/".join(full.parts[-count:]): load_run(path) for path, full in zip(paths, resolved, strict=True)}


def _results(
    runs: Mapping[str, RunData], events: Mapping[str, Sequence[Event]], beside: Path
) -> tuple[list[str], list[RunLine]]:
    """Columns, and a line for each run: evaluations and reverse KL from first to last, price, findings."""
    metrics = page.evaluation_metrics(row for run in runs.values() for row in run.metrics)
    marks = [key for key in ("reverse_kl/full", "reverse_kl/mean") if all(_course(run, key) for run in runs.values())]
    columns = [
        "Steps",
        *(page.metric_words(metric) for metric in metrics),
        *("Reverse KL" for _ in marks[:1]),
        *("Compute", "Time", "Findings"),
    ]
    lines = []
    for name, run in runs.items():
        cells = [formatting.number(page.finite_number(run.metrics[-1]["step"]) if run.metrics else None)]
        cells += [_first_last(run, metric, shares=True) for metric in metrics]
        cells += [_first_last(run, key) for key in marks[:1]]
        for amount, words in (("flops", formatting.flops), ("seconds", formatting.duration)):
            cells.append(words(sum(value for _, value in counted(run.costs, amount))) if run.costs else "–")
        cells.append(str(len(events[name])) if events[name] else "none")
        report = run.path / "report.html"
        link = quote(os.path.relpath(report.resolve(), beside.resolve())) if report.exists() else ""
        lines.append(RunLine(name, link, tuple(cells)))
    return columns, lines


def _course(run: RunData, key: str) -> list[Row]:
    return [row for row in run.metrics if page.finite_number(row.get(key)) is not None]


def _first_last(run: RunData, key: str, *, shares: bool = False) -> str:
    course = _course(run, key)
    shares = shares and all(0 <= row[key] <= 1 for row in course)

    def words(row: Row) -> str:
        return formatting.mean(row[key], page.finite_number(row.get(f"{key}_se")), share=shares)

    if not course:
        return "–"
    return words(course[0]) if len(course) == 1 else f"{words(course[0])} → {words(course[-1])}"


def config_differences(configs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row for every key that is not the same in all runs; a dash where a run has no such key."""
    trees = {name: dict(flatten(config)) for name, config in configs.items()}
    keys = dict.fromkeys(key for tree in trees.values() for key in tree if key not in _OWN)
    rows = ({"Key": key} | {name: tree.get(key, "–") for name, tree in trees.items()} for key in keys)
    return [row for row in rows if len({row[name] for name in trees}) > 1]


def _same(runs: Mapping[str, RunData]) -> list[tuple[str, str]]:
    trees = [dict(flatten(run.config)) for run in runs.values()]
    return [(key, value) for key, value in trees[0].items() if all(tree.get(key) == value for tree in trees)]


def _environment_rows(runs: Mapping[str, RunData]) -> list[dict[str, str]]:
    """Where each run's last start ran."""
    items = {name: environment_items(run.environments[-1]) for name, run in runs.items() if run.environments}
    keys = dict.fromkeys(key for own in items.values() for key in own)
    return [{"What": key} | {name: items.get(name, {}).get(key, "–") for name in runs} for key in keys]


def _last_answers(runs: Mapping[str, RunData]) -> list[list[tuple[str, Row]]]:
    """Groups of (run, rollout): one prompt's answers at each run's last stored step, of prompts that all runs share."""
    last = {name: run.rollouts[run.over_time[-1]] for name, run in runs.items() if run.over_time}
    chosen: dict[str, dict[Any, Row]] = {name: {} for name in last}
    for name, rollouts in last.items():
        for rollout in rollouts:
            chosen[name].setdefault((*prompt_key(rollout), rollout.get("prompt_text")), rollout)
    if len(chosen) < len(runs):
        return []
    first, *others = chosen.values()
    shared = [key for key in first if all(key in other for other in others)][:PROMPTS_SHOWN]
    return [[(name, own[key]) for name, own in chosen.items()] for key in shared]


def _group(answers: Sequence[tuple[str, Row]], scale: float) -> RolloutGroup:
    cards = tuple(
        page.rollout_card(rollout, f"{name}, step {rollout.get('step', '?')}", scale=scale) for name, rollout in answers
    )
    first = answers[0][1]
    return RolloutGroup(page.prompt_heading(first), str(first.get("prompt_text") or ""), cards)

"""One run as one HTML page: what ran, what came out, what it cost, what the teacher made of its tokens."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from understudy.report import formatting, page
from understudy.report.cost_panel import bars_svg, cost_bars, cost_rows, reach_rows
from understudy.report.curves import Curve, cost_curves, part_curves, run_curves
from understudy.report.findings import Place, anchor, doctor_summary, link_events, reached, run_events
from understudy.report.page import Headline, RolloutGroup, Row
from understudy.report.run_data import RunData, flatten, load_run, prompt_key
from understudy.report.tokens import token_legend
from understudy.report.worst_tokens import worst_tokens

# Rollouts of one step on the page, where there is one step alone, and prompts where there are several.
ROLLOUTS_SHOWN, PROMPTS_SHOWN = 12, 6
# What a reader looks for first in a configuration: dotted key and the words for it.
CONFIG_SUMMARY = (
    ("student.model", "student"),
    ("teacher.model", "teacher"),
    ("teacher.url", "teacher at"),
    ("sampling.groups_per_batch", "prompts per step"),
    ("sampling.group_size", "rollouts per prompt"),
    ("sampling.max_completion_tokens", "length cap"),
    ("optim.learning_rate", "learning rate"),
    ("seed", "seed"),
)

Placed = tuple[Place, Row]


def write_run_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of ``run_dir`` to ``out`` (default: ``run_dir/report.html``) and return its path.

    Everything in the directory is optional; the page says what it did not find.
    """
    run_dir = Path(run_dir)
    run = load_run(run_dir)
    target = Path(out) if out is not None else run_dir / "report.html"
    return page.write_page("run_report.html", target, _context(run))


def figures_of(run: RunData) -> list[Curve]:
    """Every curve of a run's page but those under "every other metric"."""
    return [*run_curves(run.metrics)[0], *part_curves(run.metrics), *cost_curves({run.name: run.metrics})]


def _context(run: RunData) -> dict[str, Any]:
    curves, used = run_curves(run.metrics)
    over_time = rollouts_over_time(run)
    events = run_events(run)
    marks = [event.mark for event in events]
    shown = {place for group in over_time for place, _ in group}
    named = [place for place in reached(events, run) if place not in shown]
    scale = page.choose_scale([rollout for group in over_time for _, rollout in group])
    last = max(run.over_time, default=0)
    config = flatten(run.config)
    return {
        "title": run.name,
        "ran": _what_ran(config),
        "missing": run.missing,
        "headlines": headlines(run.metrics),
        "doctor": doctor_summary(run),
        "events": link_events(events, {*shown, *named}),
        "charts": [curve.svg(marks) for curve in curves],
        "part_charts": [curve.svg(marks) for curve in part_curves(run.metrics)],
        "costs": page.grid(cost_rows(run.costs)),
        "cost_charts": [bars_svg(bars) for bars in cost_bars({run.name: run.costs})],
        "reach": page.grid(reach_rows({"Cost, time and step": run.metrics})),
        "reach_charts": [curve.svg() for curve in cost_curves({run.name: run.metrics})],
        "groups": [_group(group, scale) for group in over_time],
        "rollouts_intro": _rollouts_intro(run, over_time),
        "named_groups": [_group([(place, run.rollouts[place[0]][place[1]])], scale) for place in named],
        "legend": token_legend(scale),
        "worst": worst_tokens(run.rollouts.get(last, ())),
        "worst_step": last,
        "score_command": f"understudy score {shlex.quote(str(run.path))}" if run.rollouts else "",
        "config": config,
        "environments": page.grid(environment_rows(run.environments)),
        "other_charts": _other_charts(run.metrics, used),
        "summary": page.grid(_summary_rows(run.metrics)),
    }


def _what_ran(config: Sequence[tuple[str, str]]) -> str:
    values = dict(config)
    return ", ".join(f"{words} {values[key]}" for key, words in CONFIG_SUMMARY if key in values)


def headlines(rows: Sequence[Row]) -> list[Headline]:
    """First and last evaluation with standard errors, reverse KL from first to last, and the total cost."""
    items = []
    for task, decodings in page.evaluations(rows).items():
        for key, words in ((f"eval/{task}/{name}", page.decoding_words(name)) for name in decodings):
            values = [value for row in rows if (value := page.finite_number(row.get(key))) is not None]
            shares = all(0 <= value <= 1 for value in values)
            label = f"{task} accuracy, {words}" if shares else f"{task}, {words}"
            items += _first_last(rows, key, label, error_key=f"{key}_se", percent=shares)
    keys = [key for key in ("reverse_kl/full", "reverse_kl/mean") if any(key in row for row in rows)]
    items += _first_last(rows, keys[0], "Reverse KL, nats per token") if keys else []
    items += _first_last(rows, "reward/mean", "Mean reward")
    for key, label, words in (
        ("cost/flops", "Compute without evaluation", formatting.flops),
        ("cost/seconds", "Time without evaluation", formatting.duration),
    ):
        totals = [value for row in rows if (value := page.finite_number(row.get(key))) is not None]
        items += [Headline(label, words(totals[-1]))] if totals else []
    return items


def _first_last(
    rows: Sequence[Row], key: str, label: str, *, error_key: str = "", percent: bool = False
) -> list[Headline]:
    known = [(row, float(row[key])) for row in rows if page.finite_number(row.get(key)) is not None]
    if not known:
        return []

    def words(row: Row, value: float) -> str:
        return (
            formatting.percent(value, page.finite_number(row.get(error_key))) if percent else formatting.number(value)
        )

    (first, start), (last, end) = known[0], known[-1]
    if first is last:
        return [Headline(label, words(first, start), f"step {formatting.number(first['step'])}")]
    steps = f"step {formatting.number(first['step'])} → step {formatting.number(last['step'])}"
    return [Headline(label, f"{words(first, start)} → {words(last, end)}", steps)]


def _other_charts(rows: Sequence[Row], used: Collection[str]) -> list[Markup]:
    keys = sorted({key for row in rows for key in row} - set(used))
    lines = [page.series(rows, key, key) for key in keys if not key.endswith("_se")]
    return [Curve(line.name, "", (line,)).svg() for line in lines if line.points]


def rollouts_over_time(run: RunData) -> list[list[Placed]]:
    """Groups of rollouts to show side by side: one prompt's answers at the first, a middle and the last stored step,
    as far as there are any; prompts with the most come first. Of a middle step that has none of these prompts, two
    prompts of its own."""
    if len(run.over_time) == 1:
        [step] = run.over_time
        return [[placed] for placed in _placed(run, step)[:ROLLOUTS_SHOWN]]
    by_prompt: dict[Any, list[Placed]] = {}
    for step in run.over_time:
        seen = set()
        for place, rollout in _placed(run, step):
            if (key := prompt_key(rollout)) not in seen:
                seen.add(key)
                by_prompt.setdefault(key, []).append((place, rollout))
    groups = sorted(by_prompt.values(), key=lambda group: -len(group))
    together = [group for group in groups if len(group) > 1][:PROMPTS_SHOWN]
    reached = {place[0] for group in together for place, _ in group}
    for step in run.over_time:
        if step not in reached:
            alone = [group for group in groups if group[0][0][0] == step]
            together += alone[: 2 if together else PROMPTS_SHOWN]
    return together


def _placed(run: RunData, step: int) -> list[Placed]:
    return [((step, index), rollout) for index, rollout in enumerate(run.rollouts.get(step, ()))]


def _rollouts_intro(run: RunData, groups: Sequence[Sequence[Placed]]) -> str:
    if not run.over_time:
        return ""
    first, last = run.over_time[0], run.over_time[-1]
    if first == last:
        return f"From step {first}, the only one with stored rollouts."
    middle = "".join(f", a middle (step {step})" for step in run.over_time[1:-1])
    words = f"The same prompts where possible, answered at the first (step {first}){middle} and the last (step {last}) "
    words += "stored step."
    alone = [step for step in run.over_time if not any(len(g) > 1 and any(p[0] == step for p, _ in g) for g in groups)]
    if alone:
        words += f" Those of step {' and '.join(map(str, alone))} are of other prompts, and stand alone."
    return words


def _group(rollouts: Sequence[Placed], scale: float) -> RolloutGroup:
    cards = tuple(
        page.rollout_card(rollout, f"Step {rollout.get('step', '?')}", scale=scale, anchor=anchor(place))
        for place, rollout in rollouts
    )
    first = rollouts[0][1]
    return RolloutGroup(page.prompt_heading(first), str(first.get("prompt_text") or ""), cards)


def environment_rows(environments: Sequence[Row]) -> list[dict[str, str]]:
    """Where each start of a run ran; a column for each."""
    starts = [
        (f"From step {formatting.number(page.finite_number(row.get('step')) or 0)}", environment_items(row))
        for row in environments
    ]
    keys = dict.fromkeys(key for _, items in starts for key in items)
    return [{"What": key} | {name: items.get(key, "–") for name, items in starts} for key in keys]


def environment_items(row: Row) -> dict[str, str]:
    """One start's environment in words, versions of packages last."""
    packages = row.get("packages")
    versions = packages if isinstance(packages, Mapping) else {}
    devices = row.get("devices")
    plain = {key: row[key] for key in row if key not in {"step", "packages", "devices"}}
    listed = {"devices": ", ".join(map(str, devices)) or "CPU"} if isinstance(devices, list) else {}
    return {str(key).replace("_", " "): str(value) for key, value in (plain | listed | dict(versions)).items()}


def _summary_rows(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Every metric: how often, first, last, smallest and largest value."""
    table = []
    for key in sorted({key for row in rows for key in row} - {"step"}):
        values = [y for _, y in page.points(rows, key)]
        finite = [value for value in values if math.isfinite(value)]
        if values:
            smallest, largest = (min(finite), max(finite)) if finite else (math.nan, math.nan)
            cells = {"First": values[0], "Last": values[-1], "Smallest": smallest, "Largest": largest}
            table.append(
                {"Metric": key, "Rows": str(len(values))} | {name: formatting.number(v) for name, v in cells.items()}
            )
    return table

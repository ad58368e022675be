"""One run as one HTML page: what ran, what came out, what it cost, what the teacher made of its tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from understudy.report import formatting, page
from understudy.report.charts import Series, line_chart
from understudy.report.credit_data import reverse_kl, token_texts
from understudy.report.page import Headline, RolloutGroup, Row
from understudy.report.run_data import RunData, flatten, load_run
from understudy.report.token_text import align, token_name, visible_text
from understudy.report.tokens import piece_text, token_legend

# Rollouts on the page, and tokens in the table of the worst.
ROLLOUTS_SHOWN, WORST_SHOWN = 12, 15
# Tokens of context around a token in the table of the worst.
CONTEXT_BEFORE, CONTEXT_AFTER = 10, 4

# Title, unit, (key, name in the legend) ...: the curves of every run, in reading order.
CURVES: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Reverse KL",
        "nats per token",
        (("reverse_kl/mean", "sampled tokens"), ("reverse_kl/full", "full vocabulary")),
    ),
    ("Reward", "mean reward", (("reward/mean", "reward"),)),
    ("Loss", "", (("optim/loss", "loss"),)),
    ("Gradient norm", "norm before clipping", (("optim/grad_norm", "gradient norm"),)),
    ("Completion length", "tokens", (("completion_length/mean", "mean length"),)),
    ("Cut at the length cap", "share of rollouts", (("truncated/share", "truncated"),)),
    ("Largest importance ratio", "ratio", (("ratio/max", "maximum"),)),
    ("Student entropy", "nats per token", (("entropy/student", "entropy"),)),
    ("Learning rate", "", (("optim/learning_rate", "learning rate"),)),
)
PERCENT_KEYS = frozenset({"truncated/share"})
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


def write_run_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of ``run_dir`` to ``out`` (default: ``run_dir/report.html``) and return its path.

    Everything in the directory is optional; the page says what it did not find.
    """
    run_dir = Path(run_dir)
    run = load_run(run_dir)
    target = Path(out) if out is not None else run_dir / "report.html"
    return page.write_page("run_report.html", target, _context(run))


def _context(run: RunData) -> dict[str, Any]:
    charts, used = _charts(run.metrics)
    shown = _shown_rollouts(run.rollouts)
    scale = page.choose_scale([rollout for group in shown for rollout in group])
    last = max(run.rollouts, default=0)
    config = flatten(run.config)
    return {
        "title": run.name,
        "ran": _what_ran(config),
        "missing": run.missing,
        "headlines": headlines(run.metrics),
        "config": config,
        "alarms": page.grid(alarm_rows(run.alarms)),
        "charts": charts,
        "costs": page.grid(cost_rows(run.costs)),
        "groups": [_group(group, scale) for group in shown],
        "rollouts_intro": _rollouts_intro(run.rollouts),
        "legend": token_legend(scale),
        "worst": worst_tokens(run.rollouts.get(last, ())),
        "worst_step": last,
        "other_charts": _other_charts(run.metrics, used),
        "summary": page.grid(_summary_rows(run.metrics)),
    }


def _what_ran(config: Sequence[tuple[str, str]]) -> str:
    values = dict(config)
    return ", ".join(f"{words} {values[key]}" for key, words in CONFIG_SUMMARY if key in values)


def headlines(rows: Sequence[Row]) -> list[Headline]:
    """First and last evaluation with standard errors, reverse KL from first to last, and the total cost."""
    items = []
    for task in page.evaluation_tasks(rows):
        for mode, words in (("greedy", "greedy"), ("t1", "sampled at T = 1")):
            key = f"eval/{task}/{mode}"
            items += _first_last(rows, key, f"{task} accuracy, {words}", error_key=f"{key}_se", percent=True)
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


def _charts(rows: Sequence[Row]) -> tuple[list[Markup], set[str]]:
    """The standard curves, and the metric keys they show."""
    charts, used = [], {"step"}
    for task in page.evaluation_tasks(rows):
        keys = {mode: f"eval/{task}/{mode}" for mode in ("greedy", "t1")}
        lines = [
            page.series(rows, keys[mode], name, error_key=f"{keys[mode]}_se")
            for mode, name in (("greedy", "greedy"), ("t1", "sampled, T = 1"))
        ]
        charts.append(_chart(lines, f"Accuracy: {task}", "share of answers that are right", percent=True))
        used |= {f"{key}{suffix}" for key in keys.values() for suffix in ("", "_se")}
    for title, unit, entries in CURVES:
        lines = [page.series(rows, key, name) for key, name in entries]
        charts.append(_chart(lines, title, unit, percent=entries[0][0] in PERCENT_KEYS))
        used |= {key for key, _ in entries}
    phases = sorted({key for row in rows for key in row if key.startswith("time/") and key != "time/evaluation"})
    lines = [page.series(rows, key, key.removeprefix("time/").replace("_", " ")) for key in phases]
    charts.append(_chart(lines, "Time per phase", "seconds per step"))
    return [chart for chart in charts if chart], used | set(phases)


def _chart(lines: Sequence[Series], title: str, unit: str, *, percent: bool = False) -> Markup:
    """A chart over steps, or nothing if no line has points."""
    filled = [line for line in lines if line.points]
    if not filled:
        return Markup("")
    return Markup(line_chart(filled, title=title, x_label="optimizer steps", y_label=unit, percent=percent))


def _other_charts(rows: Sequence[Row], used: set[str]) -> list[Markup]:
    keys = sorted({key for row in rows for key in row} - used)
    charts = (_chart([page.series(rows, key, key)], key, "") for key in keys)
    return [chart for chart in charts if chart]


def alarm_rows(alarms: Sequence[Row]) -> list[dict[str, str]]:
    """The guards' alarms in the order of their steps, each with the rollouts that it shows in most."""
    return [
        {
            "Step": formatting.number(alarm.get("step")),
            "Guard": f"{alarm.get('guard', '?')} ({alarm.get('action', '?')})",
            "What": str(alarm.get("words", "")),
            "Likely causes": str(alarm.get("causes", "")),
            "Most in": "; ".join(_place(place) for place in alarm.get("rollouts") or ()),
        }
        for alarm in sorted(alarms, key=lambda alarm: alarm.get("step", 0))
    ]


def _place(place: Mapping[str, Any]) -> str:
    stored = f", {place['file']} number {place.get('index')}" if place.get("file") else ""
    return f"prompt {place.get('prompt_index')}{stored}"


def cost_rows(costs: Mapping[str, Row]) -> list[dict[str, str]]:
    """One row per role and a total without evaluation, in human units."""
    if not costs:
        return []
    totals = {
        name: sum(page.finite_number(cost.get(name)) or 0.0 for role, cost in costs.items() if role != "evaluation")
        for name in ("tokens", "flops", "seconds")
    }
    rows = [*costs.items(), ("total without evaluation", totals)]
    return [
        {
            "Role": role.replace("_", " "),
            "Tokens": formatting.number(page.finite_number(cost.get("tokens"))),
            "Compute": formatting.flops(page.finite_number(cost.get("flops"))),
            "Time": formatting.duration(page.finite_number(cost.get("seconds"))),
        }
        for role, cost in rows
    ]


def _shown_rollouts(stored: Mapping[int, Sequence[Row]]) -> list[list[Row]]:
    """Groups of rollouts to show side by side: the same prompt first and last where both exist."""
    if not stored:
        return []
    first, last = min(stored), max(stored)
    if first == last:
        return [[rollout] for rollout in stored[first][:ROLLOUTS_SHOWN]]
    early, late = _one_per_prompt(stored[first]), _one_per_prompt(stored[last])
    pairs = [[early[index], late[index]] for index in early if index in late][: ROLLOUTS_SHOWN // 2]
    if pairs:
        return pairs
    half = ROLLOUTS_SHOWN // 2
    return [[rollout] for rollout in [*list(early.values())[:half], *list(late.values())[:half]]]


def _one_per_prompt(rollouts: Sequence[Row]) -> dict[Any, Row]:
    chosen: dict[Any, Row] = {}
    for rollout in rollouts:
        chosen.setdefault((rollout.get("task"), rollout.get("prompt_index")), rollout)
    return chosen


def _rollouts_intro(stored: Mapping[int, Sequence[Row]]) -> str:
    if not stored:
        return ""
    first, last = min(stored), max(stored)
    if first == last:
        return f"From step {first}, the only one with stored rollouts."
    return f"From the first (step {first}) and last (step {last}) stored step, the same prompts where possible."


def _group(rollouts: Sequence[Row], scale: float) -> RolloutGroup:
    cards = tuple(page.rollout_card(rollout, f"Step {rollout.get('step', '?')}", scale=scale) for rollout in rollouts)
    return RolloutGroup(page.prompt_heading(rollouts[0]), str(rollouts[0].get("prompt_text") or ""), cards)


def worst_tokens(rollouts: Sequence[Row], count: int = WORST_SHOWN) -> list[dict[str, str]]:
    """The tokens with the largest reverse KL, each with its context and the teacher's first choice."""
    ranked = sorted(
        (
            (value, number, index)
            for number, rollout in enumerate(rollouts)
            for index, value in enumerate(reverse_kl(rollout))
            if value is not None and value > 0
        ),
        key=lambda item: (-item[0], item[1:]),
    )
    return [
        {"place": f"r{number}t{index}"} | _worst_row(rollouts[number], index, value)
        for value, number, index in ranked[:count]
    ]


def _worst_row(rollout: Row, index: int, value: float) -> dict[str, str]:
    tokens = token_texts(rollout)
    aligned = align(tokens, str(rollout.get("completion_text") or ""))
    gaps, bytes_of = aligned.gaps, aligned.pieces
    shown = [piece_text(bytes_of[i]) if i in bytes_of else visible_text(token) for i, token in enumerate(tokens)]
    # Line breaks would tear the table's row apart; their sign is enough here.
    pieces = [gap + own.rstrip("\n") for gap, own in zip(gaps, shown, strict=True)]
    start = max(0, index - CONTEXT_BEFORE)
    topk = rollout.get("teacher_topk")
    choice = "–"
    names = (topk.get("tokens") or topk["ids"])[index] if topk else None
    if topk and names and topk["logprobs"][index][0] is not None:
        choice = f"{token_name(str(names[0]))} ({_probability(float(topk['logprobs'][index][0]))})"
    return {
        "before": ("… " if start else "") + "".join(pieces[start:index]) + gaps[index],
        "token": shown[index].rstrip("\n"),
        "after": "".join(pieces[index + 1 : index + 1 + CONTEXT_AFTER]),
        "reverse_kl": f"{value:.2f}",
        "student": _probability(float(rollout["sampler_logprobs"][index])),
        "teacher": _probability(float(rollout["teacher_logprobs"][index])),
        "choice": choice,
        "prompt": str(rollout.get("prompt_index", "?")),
    }


def _probability(logprob: float) -> str:
    share = math.exp(logprob)
    return f"{100 * share:.1f} %" if share >= 1e-3 or share == 0 else f"{formatting.number(100 * share)} %"


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

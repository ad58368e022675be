"""Several runs on one page: the verdict, the table, the curves per arm, and answers before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from understudy.report import page
from understudy.report.charts import Series, line_chart
from understudy.report.curves import FLOPS, carried_costs
from understudy.report.page import RolloutGroup, Row
from understudy.report.run_data import merge_by_step
from understudy.report.tokens import token_legend

_STEPS = "step"


@dataclass(frozen=True)
class Arm:
    """One way of training, with the rows of its ``metrics.jsonl``.

    ``reference`` arms are models that do not train here (the teacher): their last evaluation is a horizontal
    line.
    """

    name: str
    metrics: Sequence[Mapping[str, Any]]
    description: str = ""
    reference: bool = False


@dataclass(frozen=True)
class RolloutPair:
    """Two stored rollouts of one prompt; notes mark tokens by position (``{12: "false step"}``)."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    before_notes: Mapping[int, str] = field(default_factory=dict)
    after_notes: Mapping[int, str] = field(default_factory=dict)
    before_label: str = "Before"
    after_label: str = "After"


def write_comparison(
    arms: Sequence[Arm],
    out: Path,
    *,
    title: str,
    intro: str,
    table: Sequence[Mapping[str, str]],
    verdict: str,
    commands: Sequence[tuple[str, str]],
    before_after: Sequence[RolloutPair] = (),
    footnotes: Sequence[str] = (),
) -> Path:
    """Write the page to ``out``. Texts are plain; blank lines separate paragraphs.

    ``commands`` are (label, shell text). Charts appear for every task that any arm evaluated.
    """
    rows = {arm.name: carried_costs(merge_by_step(arm.metrics)) for arm in arms}
    if len(rows) < len(arms):
        raise ValueError(f"arms: got names {[arm.name for arm in arms]}; expected every name once")
    scale = page.choose_scale([rollout for pair in before_after for rollout in (pair.before, pair.after)])
    context = {
        "title": title,
        "verdict": verdict,
        "intro": intro,
        "table": page.grid(table),
        "arms": [arm for arm in arms if arm.description],
        "charts": comparison_charts(arms, rows),
        "legend": token_legend(scale),
        "groups": [_group(pair, scale) for pair in before_after],
        "commands": commands,
        "footnotes": footnotes,
    }
    return page.write_page("comparison.html", Path(out), context)


def comparison_charts(arms: Sequence[Arm], rows: Mapping[str, Sequence[Row]]) -> list[Markup]:
    """Accuracy by steps and by compute for each task and decoding, then reverse KL by steps."""
    charts = []
    has_cost = any(row[FLOPS] > 0 for arm in arms if not arm.reference for row in rows[arm.name])
    for metric in page.evaluation_metrics(row for arm in arms for row in rows[arm.name]):
        for x_key in (_STEPS, FLOPS) if has_cost else (_STEPS,):
            charts.append(_accuracy_chart(arms, rows, metric, (_decoded(metric), x_key)))
    for key, words in (("reverse_kl/full", "full vocabulary"), ("reverse_kl/mean", "sampled tokens")):
        lines = [page.series(rows[arm.name], key, arm.name) for arm in arms if not arm.reference]
        charts.append(_chart(lines, f"Reverse KL, {words}", "nats per token"))
    return [chart for chart in charts if chart]


def _decoded(metric: str) -> str:
    return page.metric_words(metric).replace(", T = ", ", sampled at T = ")


def _accuracy_chart(
    arms: Sequence[Arm], rows: Mapping[str, Sequence[Row]], key: str, title_and_x: tuple[str, str]
) -> Markup:
    title, x_key = title_and_x
    lines = [
        page.series(rows[arm.name], key, arm.name, error_key=f"{key}_se", x_key=x_key)
        for arm in arms
        if not arm.reference
    ]
    references = [
        (arm.name, points[-1][1]) for arm in arms if arm.reference and (points := page.points(rows[arm.name], key))
    ]
    return _chart(lines, title, "share of answers that are right", x_key=x_key, references=references)


def _chart(
    lines: Sequence[Series],
    title: str,
    unit: str,
    *,
    x_key: str = _STEPS,
    references: Sequence[tuple[str, float]] | None = None,
) -> Markup:
    # Arms without points stay in the list: an arm has the same colour in every chart.
    if not any(line.points for line in lines):
        return Markup("")
    by_cost = x_key == FLOPS
    svg = line_chart(
        lines,
        title=title,
        x_label="cumulative FLOPs (log scale)" if by_cost else "optimizer steps",
        y_label=unit,
        log_x=by_cost,
        percent=references is not None,
        references=references or (),
    )
    return Markup(svg)


def _group(pair: RolloutPair, scale: float) -> RolloutGroup:
    cards = (
        page.rollout_card(pair.before, pair.before_label, scale=scale, notes=pair.before_notes),
        page.rollout_card(pair.after, pair.after_label, scale=scale, notes=pair.after_notes),
    )
    return RolloutGroup(page.prompt_heading(pair.before), str(pair.before.get("prompt_text") or ""), cards)

"""What a run cost, or several: tables and bars by role, and the price of each level of accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from understudy.report import chart_shapes as draw
from understudy.report import formatting, page
from understudy.report.curves import FLOPS, SECONDS, carried_costs
from understudy.report.page import Row
from understudy.report.scales import nice_ticks

Costs = Mapping[str, Row]
AMOUNTS = ("tokens", "flops", "seconds")
_NOT_COUNTED = "evaluation"
_BAR, _ROW, _WIDTH = 18, 42, 460
# Levels of accuracy whose price is listed.
LEVELS = 5


@dataclass(frozen=True)
class Bars:
    """Stacked bars of one amount: a bar for each run, a part for each role. ``unit`` says how amounts are written."""

    title: str
    unit: str
    bars: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]


def cost_rows(costs: Costs) -> list[dict[str, str]]:
    """One row per role with its share, and a total without evaluation, in human units."""
    if not costs:
        return []
    totals = {name: sum(amount for _, amount in counted(costs, name)) for name in AMOUNTS}

    def cell(role: str, cost: Row, name: str) -> str:
        value = page.finite_number(cost.get(name))
        words = {"tokens": formatting.number, "flops": formatting.flops, "seconds": formatting.duration}[name](value)
        shared = role != _NOT_COUNTED and value is not None and totals[name] > 0
        return f"{words} ({value / totals[name]:.0%})" if shared and value is not None else words

    rows = [
        {
            "Role": role.replace("_", " "),
            "Tokens": formatting.number(page.finite_number(cost.get("tokens"))),
            "Compute": cell(role, cost, "flops"),
            "Time": cell(role, cost, "seconds"),
        }
        for role, cost in costs.items()
    ]
    total = {
        "Role": "total without evaluation",
        "Tokens": formatting.number(totals["tokens"]),
        "Compute": formatting.flops(totals["flops"]),
        "Time": formatting.duration(totals["seconds"]),
    }
    return [*rows, total]


def counted(costs: Costs, amount: str) -> Iterator[tuple[str, float]]:
    """(role, amount) of what belongs to the method's price."""
    for role, cost in costs.items():
        if role != _NOT_COUNTED:
            yield role, page.finite_number(cost.get(amount)) or 0.0


def cost_bars(runs: Mapping[str, Costs]) -> list[Bars]:
    """Compute and time by role; none of an amount that is zero everywhere."""
    made = []
    for amount, title, unit in (("flops", "Compute by role", "FLOP"), ("seconds", "Time by role", "s")):
        bars = tuple((name, tuple(counted(costs, amount))) for name, costs in runs.items())
        if any(value > 0 for _, parts in bars for _, value in parts):
            made.append(Bars(title, unit, bars))
    return made


def bars_svg(bars: Bars) -> Markup:
    """The bars as a picture; its numbers are in the table beside it, and in its description."""
    words = formatting.flops if bars.unit == "FLOP" else formatting.duration
    roles = list(dict.fromkeys(role for _, parts in bars.bars for role, _ in parts))
    most = max(sum(value for _, value in parts) for _, parts in bars.bars)
    frame = draw.Frame(bottom=26 + _ROW * len(bars.bars) - 30)
    drawn, summary = [draw.text(4, 15, bars.title, draw.TITLE_STYLE)], []
    for number, (name, parts) in enumerate(bars.bars):
        y, x, total = 46 + number * _ROW, 4.0, sum(value for _, value in parts)
        label = f"{name}: {words(total)}" if len(bars.bars) > 1 else words(total)
        drawn.append(draw.text(4, y - 4, label, draw.NAME_STYLE))
        for role, value in parts:
            width = (_WIDTH - 20) * value / most
            outline = f"M{draw.pixels(x)} {y}h{draw.pixels(width)}v{_BAR}h-{draw.pixels(width)}z"
            style = f"fill:{draw.colour(roles.index(role))};stroke:var(--card,#fff);stroke-width:1"
            drawn.append(f'<path d="{outline}" style="{style}"/>')
            x += width
        listed = ", ".join(f"{role.replace('_', ' ')} {words(value)}" for role, value in parts)
        summary.append(f"{name}: {words(total)}; {listed}")
    legend, rows = _legend(roles, frame)
    height = frame.legend_top + rows * draw.LEGEND_ROW
    about = escape(f"{bars.title}. {'. '.join(summary)}.")
    return Markup(
        f'<svg class="chart" role="img" viewBox="0 0 {_WIDTH} {height}" aria-label="{about}">'
        f"{''.join(drawn)}{legend}</svg>"
    )


def _legend(roles: Sequence[str], frame: draw.Frame) -> tuple[str, int]:
    parts, x, row = [], 4.0, 0
    for index, role in enumerate(roles):
        name = role.replace("_", " ")
        width = 24 + draw.CHARACTER * len(name) + 12
        if x > 4 and x + width > _WIDTH:
            x, row = 4.0, row + 1
        y = frame.legend_top + row * draw.LEGEND_ROW
        parts.append(f'<path d="M{draw.pixels(x)} {y - 6}h12v12h-12z" style="fill:{draw.colour(index)}"/>')
        parts.append(draw.text(x + 18, y + 4, name, draw.NAME_STYLE))
        x += width
    return "".join(parts), row + 1


def reach_rows(runs: Mapping[str, Sequence[Row]]) -> list[dict[str, str]]:
    """Per evaluation and level of accuracy: where each run first had at least so much, and what it had cost by then. Of
    levels with the same price in all runs the highest is listed."""
    filled = {name: carried_costs(rows) for name, rows in runs.items()}
    table = []
    for metric in page.evaluation_metrics(row for rows in filled.values() for row in rows):
        known = {name: [row for row in rows if _value(row, metric) is not None] for name, rows in filled.items()}
        for level in _levels([[_value(row, metric) or 0.0 for row in rows] for rows in known.values()]):
            row = {"Evaluation": page.metric_words(metric), "At least": formatting.percent(level)}
            row |= {name: _price(rows, metric, level) for name, rows in known.items()}
            if table and all(table[-1][key] == row[key] for key in row if key != "At least"):
                table.pop()
            table.append(row)
    return table


def _levels(courses: Sequence[Sequence[float]]) -> list[float]:
    """Round levels between the lowest start and the best that any run had; none where nothing was gained."""
    courses = [course for course in courses if course]
    if not courses:
        return []
    low, high = min(course[0] for course in courses), max(max(course) for course in courses)
    if not (0 <= low < high <= 1):
        return []
    return [level for level in nice_ticks(low, high, LEVELS) if low < level <= high]


def _price(rows: Sequence[Row], metric: str, level: float) -> str:
    for row in rows:
        if (_value(row, metric) or 0.0) >= level:
            step = f"step {formatting.number(page.finite_number(row.get('step')))}"
            return f"{formatting.flops(row[FLOPS])}, {formatting.duration(row[SECONDS])} ({step})"
    return "not reached"


def _value(row: Row, metric: str) -> float | None:
    return page.finite_number(row.get(metric))

"""C8: prefixes. Which part of a solution carries the signal, and what rollouts that stop early save."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.experiments.bench import GREEDY, T1, LedgerBench
from understudy.experiments.claim import Chart, Claim, Estimate, Finding, Record, Verdict, mean_curve
from understudy.experiments.lab import Lab, Run
from understudy.experiments.search import Search, searched

WHOLE = "whole"
# Parts of whole solutions that train.
SPANS = {"first-25": (0.0, 0.25), "first-50": (0.0, 0.5), "last-50": (0.5, 1.0), "last-25": (0.75, 1.0)}
# Shares of a solution after which sampling stops.
STOPS = {"stop-25": 0.25, "stop-50": 0.5}
BUDGETS = ("steps", "flops", "tokens")
# An early stop has a learning rate for each budget. All of them read the same runs, so those that would wait for each
# other stand apart.
ARMS = (*(f"{stop}-steps" for stop in STOPS), WHOLE, *SPANS, *(f"{s}-{b}" for b in BUDGETS[1:] for s in STOPS))


@dataclass(frozen=True)
class Settings:
    """Optimizer steps with whole solutions. Early stops run for longer, and are looked at every ``grid`` steps."""

    steps: int = 40
    grid: int = 5


def search(lab: Lab, settings: Settings, arm: str) -> Search:
    """Accuracy at temperature 1 on the validation problems, after the steps at which the arm is judged."""
    bench = LedgerBench.of(lab)
    stop, _, budget = arm.rpartition("-")
    step = matched(bench, settings, stop)[budget] if stop in STOPS else settings.steps

    def score(rate: float) -> float:
        run = _run(bench, settings, stop if stop in STOPS else arm, rate)
        return bench.evaluate(run.student_at(step), "validation", (1.0,)).metrics[T1]

    return searched(score)


def _run(bench: LedgerBench, settings: Settings, arm: str, rate: float) -> Run:
    """Early stops run for the longest of their budgets: the rate is constant, so the others lie on the way."""
    if arm in SPANS:
        return bench.distill(rate, settings.steps, {"objective.tokens.span": SPANS[arm]})
    if arm in STOPS:
        steps, grid = max(matched(bench, settings, arm).values()), settings.grid
        stop = {"objective.tokens.first": _stop_length(bench, arm)}
        keep = {"checkpoints.every": grid, "checkpoints.keep": math.ceil(steps / grid)}
        return bench.distill(rate, steps, stop | keep)
    return bench.distill(rate, settings.steps)


def _stop_length(bench: LedgerBench, arm: str) -> int:
    """Tokens after which sampling stops: as many as the span of the same share trains."""
    return math.ceil(STOPS[arm] * bench.world.tables.completion_length)


def matched(bench: LedgerBench, settings: Settings, arm: str) -> dict[str, int]:
    """Steps of an arm that stops early: as many as with whole solutions, as many as cost the same FLOPs (all roles read
    prompt and completion), and as many as train the same tokens; to the nearest multiple of ``grid``."""
    prompt, whole, part = (
        bench.world.tables.prompt_length,
        bench.world.tables.completion_length,
        _stop_length(bench, arm),
    )
    factors = {"steps": 1.0, "flops": (prompt + whole) / (prompt + part), "tokens": whole / part}
    return {
        budget: settings.grid * round(settings.steps * factor / settings.grid) for budget, factor in factors.items()
    }


def pipeline(lab: Lab, settings: Settings, rates: Mapping[str, float]) -> Record:
    """Every arm from the same start. Budgets of an early stop share a run where their rates are the same."""
    bench = LedgerBench.of(lab)

    def stopped(stop: str, budget: str, step: int) -> dict[str, Any]:
        rate = rates[f"{stop}-{budget}"]
        return {**_at(bench, _run(bench, settings, stop, rate), step), "rate": rate}

    return {
        "start": _measured(bench, bench.world.start),
        "arms": {arm: _at(bench, _run(bench, settings, arm, rates[arm]), settings.steps) for arm in (WHOLE, *SPANS)},
        "stops": {
            stop: {budget: stopped(stop, budget, step) for budget, step in matched(bench, settings, stop).items()}
            for stop in STOPS
        },
    }


def _at(bench: LedgerBench, run: Run, step: int) -> dict[str, Any]:
    """A run after ``step`` steps, with what it had cost."""
    return {
        **_measured(bench, run.student_at(step)),
        "step": step,
        "flops": dict(run.curve("cost/flops"))[step],
        "tokens": sum(tokens for at, tokens in run.curve("tokens/trained") if at <= step),
    }


def _measured(bench: LedgerBench, model: Path) -> dict[str, Any]:
    run = bench.evaluate(model)
    return {
        "t1": run.metrics[T1],
        "greedy": run.metrics[GREEDY],
        **bench.habits(run),
        **_by_item(bench, run),
    }


def _by_item(bench: LedgerBench, run: Run) -> dict[str, list[float]]:
    """Of all solutions at temperature 1, the share whose value is ``right`` at an item, and the share that is a
    ``fault``, false in itself."""
    tables = bench.world.tables
    right, faults = [0] * tables.num_items, [0] * tables.num_items
    outcomes = [outcome for outcome in run.outcomes if outcome.temperature == 1.0]
    for outcome in outcomes:
        for mark in tables.diagnose(outcome.prompt_text, outcome.completions[0]):
            right[mark.item - 1] += mark.correct
            faults[mark.item - 1] += mark.false_in_itself
    return {"right": [n / len(outcomes) for n in right], "faults": [n / len(outcomes) for n in faults]}


def analyse(records: Sequence[Record]) -> Finding:
    """The pass rule of experiments/c8_prefixes/README.md."""
    decisive = _decisive(records)
    shares = {arm: _share(records, [r["arms"][arm] for r in records]) for arm in SPANS}
    stop_share = _share(records, [record["stops"]["stop-25"]["steps"] for record in records])
    return Finding(
        verdict=_verdict(decisive),
        ours=f"Of the gain, the first quarter alone gives {_percent(shares['first-25'])}, the last "
        f"{_percent(shares['last-25'])}; stopping there at equal FLOPs: {decisive['paid'].show('{:+.3f}')}",
        text=_text(records, decisive),
        numbers={
            **_named(decisive),
            "greedy": _named(_decisive(records, "greedy")),
            "shares of the gain": {**shares, "stop-25, equal steps": stop_share},
            "differences to whole": _differences(records),
        },
        table=_table(records),
        charts=_charts(records),
    )


# What counts as most of the gain, and as a loss of accuracy at equal FLOPs.
MOST, MARGIN = 0.8, 0.02
NAMES = {"steps": "equal steps", "flops": "equal FLOPs", "tokens": "equal tokens"}


def _decisive(records: Sequence[Record], metric: str = "t1") -> dict[str, Estimate]:
    """What the four conditions read, at temperature 1 or of greedy answers."""
    wholes = [record["arms"][WHOLE] for record in records]
    stops = [record["stops"]["stop-25"] for record in records]
    triples = list(zip(records, wholes, stops, strict=True))
    return {
        "gain": Estimate.of([_gain(r, whole, metric) for r, whole, _ in triples]),
        "order": Estimate.of([r["arms"]["first-25"][metric] - r["arms"]["last-25"][metric] for r in records]),
        "kept": Estimate.of([_gain(r, s["steps"], metric) - MOST * _gain(r, w, metric) for r, w, s in triples]),
        "paid": Estimate.of([s["flops"][metric] - w[metric] for _, w, s in triples]),
    }


def _named(decisive: Mapping[str, Estimate]) -> dict[str, Estimate]:
    names = {
        "gain": "gain",
        "order": "first-25 - last-25",
        "kept": f"gain of stop-25 - {MOST} gain of whole",
        "paid": "stop-25 - whole, equal flops",
    }
    return {names[key]: estimate for key, estimate in decisive.items()}


def _verdict(decisive: Mapping[str, Estimate]) -> Verdict:
    gains, first, most = (decisive[name].low > 0 for name in ("gain", "order", "kept"))
    pays = decisive["paid"].low > -MARGIN
    if gains and first and most and pays:
        return "holds"
    return "direction only" if gains and (first or (most and pays)) else "does not hold here"


def _gain(record: Record, entry: Record, metric: str = "t1") -> float:
    return entry[metric] - record["start"][metric]


def _share(records: Sequence[Record], entries: Sequence[Record]) -> float | None:
    """Mean gain of the entries / mean gain with whole solutions; None where that has gained nothing."""
    whole = sum(_gain(record, record["arms"][WHOLE]) for record in records)
    return sum(_gain(r, entry) for r, entry in zip(records, entries, strict=True)) / whole if whole > 0 else None


def _percent(share: float | None) -> str:
    return "undefined" if share is None else f"{share:.0%}"


def _entries(records: Sequence[Record]) -> dict[str, list[Record]]:
    """What every row of the table is about, one entry per pipeline."""
    found = {arm: [record["arms"][arm] for record in records] for arm in (WHOLE, *SPANS)}
    for arm in STOPS:
        found |= {f"{arm}, {NAMES[budget]}": [r["stops"][arm][budget] for r in records] for budget in BUDGETS}
    return found


def _differences(records: Sequence[Record]) -> dict[str, Estimate]:
    """Accuracy minus that of training on whole solutions."""
    wholes = [record["arms"][WHOLE]["t1"] for record in records]
    return {
        name: Estimate.of([entry["t1"] - whole for entry, whole in zip(entries, wholes, strict=True)])
        for name, entries in _entries(records).items()
        if name != WHOLE
    }


def _text(records: Sequence[Record], decisive: Mapping[str, Estimate]) -> str:
    differences = _differences(records)
    shown = {key: estimate.show("{:+.3f}") for key, estimate in decisive.items()}
    greedy = {key: estimate.show("{:+.3f}") for key, estimate in _decisive(records, "greedy").items()}

    def share(arm: str) -> str:
        return _percent(_share(records, [record["arms"][arm] for record in records]))

    def against(arm: str) -> str:
        return ", ".join(f"{NAMES[b]} {differences[f'{arm}, {NAMES[b]}'].show('{:+.3f}')}" for b in BUDGETS)

    early, late = _ends(_mean([record["start"]["faults"] for record in records]))
    stops = [record["stops"]["stop-25"]["steps"] for record in records]
    costs = [stop["flops"] / r["arms"][WHOLE]["flops"] for r, stop in zip(records, stops, strict=True)]
    return (
        f"Training on whole solutions gains {shown['gain']}. Of that gain the first quarter of each solution "
        f"alone gives {share('first-25')}, the first half {share('first-50')}, the last half {share('last-50')}, the "
        f"last quarter {share('last-25')}; accuracy of first minus last quarter {shown['order']} (the rule asks "
        f"for above 0). Rollouts that stop after a quarter, at equal steps and {sum(costs) / len(costs):.0%} of the "
        f"FLOPs: their gain minus {MOST:g} of the whole gain is {shown['kept']} (above 0). At equal FLOPs their "
        f"accuracy minus that with whole solutions is {shown['paid']} (above {-MARGIN:g}). The same four numbers of "
        f"greedy answers: {greedy['gain']}; {greedy['order']}; {greedy['kept']}; {greedy['paid']}. All differences: "
        f"after a quarter {against('stop-25')}; after a half {against('stop-50')}. Of the start's own faults "
        f"{early:.0%} lie in the first quarter of the items, {late:.0%} in the last."
    )


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    """Column by column."""
    return [sum(values) / len(rows) for values in zip(*rows, strict=True)]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Shares of the sum that the first and the last quarter of the values hold."""
    quarter, whole = max(1, len(values) // 4), sum(values)
    return (sum(values[:quarter]) / whole, sum(values[-quarter:]) / whole) if whole else (0.0, 0.0)


def _table(records: Sequence[Record]) -> list[dict[str, str]]:
    wholes = [record["arms"][WHOLE] for record in records]
    differences = _differences(records)
    rows = []
    for name, entries in _entries(records).items():
        recovery = [entry["recovery"] for entry in entries if entry["recovery"] is not None]
        spent = {
            key: sum(e[key] / w[key] for e, w in zip(entries, wholes, strict=True)) / len(records)
            for key in ("flops", "tokens")
        }
        rows.append(
            {
                "arm": name,
                "steps": str(entries[0]["step"]),
                "FLOPs": f"{spent['flops']:.2f}",
                "trained tokens": f"{spent['tokens']:.2f}",
                "accuracy": Estimate.of([entry["t1"] for entry in entries]).show(),
                "minus whole": differences[name].show("{:+.3f}") if name in differences else "",
                "share of the gain": _percent(_share(records, entries)),
                "greedy": Estimate.of([entry["greedy"] for entry in entries]).show(),
                "recovery": f"{sum(recovery) / len(recovery):.2f}" if recovery else "",
            }
        )
    return rows


def _charts(records: Sequence[Record]) -> list[Chart]:
    def by_item(name: str, entries: Sequence[Record]) -> Any:
        return mean_curve(name, [list(enumerate(entry["right"], start=1)) for entry in entries])

    def by_flops(arm: str) -> Any:
        entries = [[r["stops"][arm][b] for b in BUDGETS] if arm in STOPS else [r["arms"][arm]] for r in records]
        ratios = [
            [e["flops"] / r["arms"][WHOLE]["flops"] for e in row] for r, row in zip(records, entries, strict=True)
        ]
        # Pipelines cost nearly, not exactly, the same: their mean is the place that the curves share.
        places = _mean(ratios)
        curves = [
            [(0.0, r["start"]["t1"]), *((x, e["t1"]) for x, e in zip(places, row, strict=True))]
            for r, row in zip(records, entries, strict=True)
        ]
        return mean_curve(arm, curves)

    starts = by_item("start", [record["start"] for record in records])
    parts = (WHOLE, "first-25", "last-25")
    return [
        Chart(
            "items",
            [starts, *(by_item(arm, [record["arms"][arm] for record in records]) for arm in parts)],
            {
                "title": "Right values along the solution",
                "x_label": "item of the solution",
                "y_label": "share of values that are right, temperature 1",
                "percent": True,
            },
        ),
        Chart(
            "flops",
            [by_flops(arm) for arm in (WHOLE, *STOPS)],
            {
                "title": "Rollouts that stop early",
                "x_label": "FLOPs, as a multiple of those with whole solutions",
                "y_label": "accuracy at temperature 1",
                "percent": True,
            },
        ),
    ]


CLAIM = Claim(
    name="c8_prefixes",
    title="The first part of a completion carries the signal",
    article="Work beside the article: the first 30% of a completion gives nearly all of the gain, the last 30% nearly "
    "nothing; partial rollouts save most of the compute.",
    limits="Solutions of 55 tokens behind prompts of 39, with errors along the whole chain: stopping early can save "
    "less than half of the FLOPs, and no early token decides the rest as the plan of a long answer may.",
    settings={"cpu": Settings(), "gpu": Settings(steps=80), "smoke": Settings(steps=2, grid=1)},
    search=search,
    pipeline=pipeline,
    analyse=analyse,
    arms=ARMS,
)

"""C1: what a level of accuracy costs by SFT, by on-policy distillation and by RL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import correlation, linear_regression
from typing import Any

import numpy as np

from understudy.experiments.bench import GREEDY, PER_STEP, T1, LedgerBench
from understudy.experiments.claim import Chart, Claim, Estimate, Finding, Record, Verdict, crossing, mean_curve
from understudy.experiments.lab import Lab, Run
from understudy.experiments.search import Search, searched
from understudy.report.charts import Series
from understudy.statistics import mean_and_error

ARMS = ("sft", "distill", "distill-sampled", "rl", "sft-fixed", "distill-fixed")
ESTIMATORS = {"distill": "full", "distill-sampled": "sampled", "distill-fixed": "full"}
# The weaker worlds: how often the start follows a statement that contradicts it, and a teacher that still slips.
CORRECTIONS = {"corrects 0%": 0.0, "corrects 30%": 0.30}
MAIN, SLIPS = "corrects 15%", "teacher slips"
SLIPPING_SHARE = 0.6


@dataclass(frozen=True)
class Length:
    """``steps`` of a run, evaluated every ``every``; its rate is searched at ``searched`` steps."""

    steps: int
    every: int
    searched: int


@dataclass(frozen=True)
class Settings:
    """Lengths by method; the fixed arms' problems and the teacher's solutions of each."""

    sft: Length = Length(500, 50, 100)
    distill: Length = Length(100, 10, 50)
    rl: Length = Length(200, 20, 100)
    fixed: Length = Length(100, 20, 50)
    fixed_problems: int = 64
    fixed_solutions: int = 4

    def length(self, arm: str) -> Length:
        if arm.endswith("-fixed"):
            return self.fixed
        return {"sft": self.sft, "rl": self.rl}.get(arm, self.distill)


def search(lab: Lab, settings: Settings, arm: str) -> Search:
    """Accuracy at temperature 1 on the validation problems."""
    bench, length = LedgerBench.of(lab), settings.length(arm)
    short = replace(length, steps=length.searched, every=0)

    def score(rate: float) -> float:
        run = _arm(bench, settings, arm, rate, short)
        return bench.evaluate(run.student, "validation", (1.0,)).metrics[T1]

    return searched(score)


def _arm(bench: LedgerBench, settings: Settings, arm: str, rate: float, length: Length) -> Run:
    # Models are kept at each multiple of the searched length: the variants compare there.
    keep = {"checkpoints.every": length.searched, "checkpoints.keep": length.steps // length.searched}
    if arm == "rl":
        return bench.rl(rate, length.steps, keep, every=length.every)
    if arm in ("sft", "sft-fixed"):
        solutions = _solutions(bench, settings, arm)
        return bench.sft(rate, length.steps, solutions.samples, keep, every=length.every)
    prompts = bench.prompts(settings.fixed_problems) if arm == "distill-fixed" else None
    options = keep | {"objective.estimator": ESTIMATORS[arm]}
    return bench.distill(rate, length.steps, options, prompts=prompts, every=length.every)


def _solutions(bench: LedgerBench, settings: Settings, arm: str) -> Run:
    """The teacher's, for an SFT arm."""
    if arm == "sft-fixed":
        return bench.samples(settings.fixed_problems, per_problem=settings.fixed_solutions)
    return bench.samples(settings.sft.steps * PER_STEP)


def pipeline(lab: Lab, settings: Settings, rates: Mapping[str, float]) -> Record:
    """Every arm's curve and costs; and SFT against distillation in this world and weaker ones ("doses")."""
    bench = LedgerBench.of(lab)
    runs = {arm: _arm(bench, settings, arm, rates[arm], settings.length(arm)) for arm in ARMS}
    short = (runs["sft"].student_at(settings.sft.searched), runs["distill"].student_at(settings.distill.searched))
    doses = {MAIN: _dose(bench, *short)}
    doses |= {name: _variant(lab, settings, rates, name) for name in (*CORRECTIONS, SLIPS)}
    return {
        "teacher": _measured(bench, bench.world.teacher),
        "start": _measured(bench, bench.world.start),
        "arms": {arm: _arm_record(bench, settings, arm, run) for arm, run in runs.items()},
        "doses": doses,
    }


def _measured(bench: LedgerBench, model: Path) -> dict[str, Any]:
    run = bench.evaluate(model)
    return {"t1": run.metrics[T1], "greedy": run.metrics[GREEDY], **bench.habits(run)}


def _arm_record(bench: LedgerBench, settings: Settings, arm: str, run: Run) -> dict[str, Any]:
    """Curves over steps: accuracy, FLOPs so far, and FLOPs of the teacher's sampling so far."""
    accuracy, flops = run.curve(T1), dict(run.curve("cost/flops"))
    sampling = dict.fromkeys((step for step, _ in accuracy), 0.0)
    if arm in ("sft", "sft-fixed"):
        whole = _solutions(bench, settings, arm).flops()["teacher_sampling"]
        # Fresh solutions are paid for as they are used, reused ones at once.
        sampling = {step: whole * (step / settings.sft.steps if arm == "sft" else 1.0) for step in sampling}
    return {
        "accuracy": accuracy,
        "flops": [(step, flops[step] if step else 0.0) for step, _ in accuracy],
        "teacher_sampling": list(sampling.items()),
        "final": _measured(bench, run.student),
    }


def _variant(lab: Lab, settings: Settings, rates: Mapping[str, float], name: str) -> dict[str, Any]:
    """Short runs in a weaker world, at the rates of the main one."""
    main = LedgerBench.of(lab)
    if name == SLIPS:
        bench = LedgerBench.of(_with_slipping_teacher(lab))
        solutions = bench.samples(settings.sft.searched * PER_STEP)
    else:  # the main world's teacher, whose solutions are there
        bench = LedgerBench.of(lab, start_correction=CORRECTIONS[name])
        solutions = _solutions(main, settings, "sft")
    sft = bench.sft(rates["sft"], settings.sft.searched, solutions.samples)
    estimator = {"objective.estimator": ESTIMATORS["distill"]}
    distill = bench.distill(rates["distill"], settings.distill.searched, estimator)
    return _dose(bench, sft.student, distill.student)


def _with_slipping_teacher(lab: Lab) -> Lab:
    teacher = lab.scale.ledger.teacher
    teacher = replace(teacher, steps=round(SLIPPING_SHARE * teacher.steps))
    return replace(lab, scale=replace(lab.scale, ledger=replace(lab.scale.ledger, teacher=teacher)))


def _dose(bench: LedgerBench, sft: Path, distill: Path) -> dict[str, Any]:
    models = {"teacher": bench.world.teacher, "start": bench.world.start, "sft": sft, "distill": distill}
    return {name: _measured(bench, model) for name, model in models.items()}


def analyse(records: Sequence[Record]) -> Finding:
    """The pass rule of experiments/c1_cost/README.md."""
    half = {arm: _ratios(records, arm, "half-way", "flops") for arm in ("sft", "rl")}
    sampled = _ratios(records, "sft", "half-way", "flops", ours="distill-sampled")
    fits = [_log_fit(record["arms"]["sft"]["accuracy"]) for record in records]
    r2, error = (Estimate.of([fit[i] for fit in fits]) for i in (0, 1))
    linear = r2.low >= R2_FLOOR and error.low <= 0 <= error.high and abs(error.mean) <= FORECAST_WITHIN
    cheaper = half["sft"].above_one
    holds = cheaper and half["sft"].estimate.mean >= TIMES and half["rl"].above_one and sampled.above_one and linear
    verdict: Verdict = "holds" if holds else "direction only" if cheaper else "does not hold here"
    numbers = {
        **{f"{arm}/distill, {level}, {unit}": _ratios(records, arm, level, unit).show() for arm, level, unit in _CELLS},
        "sft/distill-sampled, half-way, flops": sampled.show(),
        "sft_flops": half["sft"].estimate,
        "rl_flops": half["rl"].estimate,
        "r2": r2,
        "forecast_error": error,
        "fixed_lead": _fixed_lead(records),
        "leads": {name: Estimate.of(values) for name, values in _leads(records).items()},
    }
    return Finding(
        verdict=verdict,
        ours=f"To half-way, FLOPs against distillation: SFT {half['sft'].show('x')}, RL {half['rl'].show('x')}; "
        f"SFT's curve is {'' if linear else 'not '}log-linear",
        text=_text(numbers, half, sampled, linear),
        numbers=numbers,
        table=_table(records),
        charts=_charts(records),
    )


# Shares of the way from the start's accuracy to 95% of the teacher's.
LEVELS = {"half-way": 1 / 2, "two thirds": 2 / 3}
TEACHER_SHARE = 0.95
UNITS = {"flops": ("flops",), "flops with teacher sampling": ("flops", "teacher_sampling"), "steps": ()}
# What the pass rule asks for: the article's lower figure, and what counts as log-linear.
TIMES, R2_FLOOR, FORECAST_WITHIN = 9.0, 0.8, 0.05
_CELLS = [(arm, level, unit) for arm in ("sft", "rl", "distill-sampled") for level in LEVELS for unit in UNITS]

Curve = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Ratios:
    """Logarithms of cost ratios, one per pipeline where our arm reached the level. ``bounds``: of them those whose
    rival did not, so that the true ratio is larger. ``unreached``: pipelines where ours did not."""

    logs: Sequence[float]
    bounds: int
    unreached: int

    @property
    def estimate(self) -> Estimate:
        """Of the ratio: the geometric mean. NaN where no pipeline has one."""
        logs = Estimate.of(self.logs) if self.logs else Estimate(math.nan, math.nan, math.nan)
        return Estimate(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high))

    @property
    def above_one(self) -> bool:
        """Whether every pipeline has a ratio, and the interval lies above 1."""
        return self.unreached == 0 and self.estimate.low > 1

    def show(self, unit: str = "") -> str:
        if not self.logs:
            return "unknown"
        shown = self.estimate.show("{:.1f}" + unit)
        notes = [f"{self.bounds} of {len(self.logs)} are bounds"] if self.bounds else []
        notes += [f"{self.unreached} unknown"] if self.unreached else []
        return f"{'at least ' if self.bounds else ''}{shown}" + (f" ({', '.join(notes)})" if notes else "")


def _ratios(records: Sequence[Record], rival: str, level: str, unit: str, ours: str = "distill") -> Ratios:
    """Cost of ``rival`` divided by that of ``ours``."""
    logs, bounds, unreached = [], 0, 0
    for record in records:
        (own, reached), (theirs, theirs_reached) = (_cost(record, arm, level, unit) for arm in (ours, rival))
        if reached and own > 0 and theirs > 0:
            logs.append(math.log(theirs / own))
            bounds += not theirs_reached
        else:
            unreached += 1
    return Ratios(logs, bounds, unreached)


def _cost(record: Record, arm: str, level: str, unit: str) -> tuple[float, bool]:
    """What ``arm`` had spent when it reached the level, and whether it did: else what its whole run spent."""
    entry = record["arms"][arm]
    start = entry["accuracy"][0][1]
    wanted = start + LEVELS[level] * (TEACHER_SHARE * record["teacher"]["t1"] - start)
    crossed = crossing(entry["accuracy"], wanted) if wanted > start else None
    step = entry["accuracy"][-1][0] if crossed is None else crossed
    cost = sum(_at(entry[part], step) for part in UNITS[unit]) if UNITS[unit] else step
    return cost, crossed is not None


def _at(curve: Curve, x: float) -> float:
    """The curve's value at ``x``, with straight lines between its points."""
    return float(np.interp(x, [place for place, _ in curve], [value for _, value in curve]))


def _log_fit(curve: Curve) -> tuple[float, float]:
    """R2 of accuracy on the logarithm of steps; and at the last step what was measured minus the forecast from the
    curve's first half. A curve that never moves has an R2 of 0."""
    logs, accuracies = [math.log(x) for x, _ in curve if x > 0], [y for x, y in curve if x > 0]
    half = (len(logs) + 1) // 2
    slope, intercept = linear_regression(logs[:half], accuracies[:half])
    r2 = correlation(logs, accuracies) ** 2 if min(accuracies) < max(accuracies) else 0.0
    return r2, accuracies[-1] - intercept - slope * logs[-1]


def _fixed_lead(records: Sequence[Record]) -> Estimate:
    """On the fixed problems: distillation's last accuracy minus SFT's best."""
    arms = [record["arms"] for record in records]
    return Estimate.of(
        [a["distill-fixed"]["accuracy"][-1][1] - max(y for _, y in a["sft-fixed"]["accuracy"]) for a in arms]
    )


def _leads(records: Sequence[Record]) -> dict[str, list[float]]:
    """Distillation's accuracy minus SFT's by world, in the pipelines that ran it."""
    leads: dict[str, list[float]] = {}
    for name in ("corrects 0%", MAIN, "corrects 30%", SLIPS):
        doses = [record["doses"][name] for record in records if name in record["doses"]]
        if doses:
            leads[name] = [dose["distill"]["t1"] - dose["sft"]["t1"] for dose in doses]
    return leads


def _text(numbers: Mapping[str, Any], half: Mapping[str, Ratios], sampled: Ratios, linear: bool) -> str:
    def found(arm: str, level: str = "half-way", unit: str = "flops") -> str:
        return numbers[f"{arm}/distill, {level}, {unit}"]

    leads = "; ".join(f"{name} {lead.show('{:+.3f}')}" for name, lead in numbers["leads"].items())
    return (
        f"FLOPs to the half-way level, divided by those of distillation: SFT {half['sft'].show()} (with the teacher's "
        f"sampling {found('sft', unit='flops with teacher sampling')}; in steps {found('sft', unit='steps')}), RL "
        f"{half['rl'].show()} (in steps {found('rl', unit='steps')}), distillation with sampled tokens "
        f"{found('distill-sampled')}; SFT against the latter {sampled.show()}. The rule asks for at least {TIMES:g} "
        f"against SFT and for intervals above 1. SFT's accuracy on the logarithm of steps: R2 {numbers['r2'].show()}, "
        f"measured minus forecast {numbers['forecast_error'].show('{:+.3f}')}, so {'' if linear else 'not '}log-linear "
        f"by the rule. FLOPs to two thirds of the way: SFT {found('sft', 'two thirds')}, RL "
        f"{found('rl', 'two thirds')}, sampled tokens {found('distill-sampled', 'two thirds')}. On the fixed problems "
        f"distillation's last accuracy minus SFT's best is {numbers['fixed_lead'].show('{:+.3f}')}. Its lead over SFT "
        f"with twice the steps, by world: {leads}."
    )


def _table(records: Sequence[Record]) -> list[dict[str, str]]:
    rows = []
    for arm in ARMS:
        entries = [record["arms"][arm] for record in records]
        cost = {title: _shown_cost(records, arm, *cell) for title, cell in _COSTS.items()}
        steps = {"steps": f"{entries[0]['accuracy'][-1][0]:g}"}
        rows.append({"arm": arm} | steps | _means([entry["final"] for entry in entries]) | cost)
    rows += [{"arm": name} | _means([record[name] for record in records]) for name in ("start", "teacher")]
    for name in _leads(records):
        doses = [record["doses"][name] for record in records if name in record["doses"]]
        rows += [{"arm": f"{name}: {who}"} | _means([dose[who] for dose in doses]) for who in doses[0]]
    return rows


_COSTS = {
    "steps to half-way": ("half-way", "steps"),
    "GFLOP to half-way": ("half-way", "flops"),
    "the same with teacher sampling": ("half-way", "flops with teacher sampling"),
    "GFLOP to two thirds": ("two thirds", "flops"),
}


def _means(measured: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Means over pipelines; a share of nothing is left out."""
    cells = {}
    for name in ("t1", "greedy", "recovery", "facts"):
        values = [m[name] for m in measured if m[name] is not None]
        cells[name] = f"{sum(values) / len(values):.3f}" if values else "–"
    return cells


def _shown_cost(records: Sequence[Record], arm: str, level: str, unit: str) -> str:
    """The geometric mean; ">": of a run at least that did not reach the level, so that it is a bound."""
    costs = [_cost(record, arm, level, unit) for record in records]
    if any(cost <= 0 for cost, _ in costs):
        return "–"
    mean = math.exp(sum(math.log(cost) for cost, _ in costs) / len(costs))
    scale = 1.0 if unit == "steps" else 1e9
    return f"{'' if all(reached for _, reached in costs) else '> '}{mean / scale:.0f}"


def _charts(records: Sequence[Record]) -> list[Chart]:
    curves = {arm: [record["arms"][arm] for record in records] for arm in ARMS}
    by_steps = [mean_curve(arm, [entry["accuracy"] for entry in entries]) for arm, entries in curves.items()]
    by_flops = [mean_curve(arm, [_by_flops(entry) for entry in curves[arm]]) for arm in ARMS[:4]]
    teacher = [("teacher", sum(record["teacher"]["t1"] for record in records) / len(records))]
    common = {"y_label": "accuracy at temperature 1", "log_x": True, "percent": True, "references": teacher}
    flops = "GFLOP, without the teacher's sampling"
    leads = {name: mean_and_error(values) for name, values in _leads(records).items()}
    doses = [(x, *leads[name]) for name, x in _DOSES.items() if name in leads]
    lead = Series("distill - sft", [(x, mean) for x, mean, _ in doses], [error or None for _, _, error in doses])
    options = {
        "title": "Lead of distillation over SFT with twice the steps",
        "x_label": "statements that the start follows against its own value, %",
        "y_label": "difference of accuracies",
        "references": [(SLIPS, leads[SLIPS][0])] if SLIPS in leads else [],
    }
    return [
        Chart(
            "accuracy-by-steps", by_steps, {"title": "Accuracy by steps of 64 solutions", "x_label": "steps"} | common
        ),
        Chart("accuracy-by-flops", by_flops, {"title": "Accuracy by training FLOPs", "x_label": flops} | common),
        Chart("lead-by-world", [lead], options),
    ]


def _by_flops(entry: Mapping[str, Any]) -> Curve:
    return [(cost / 1e9, y) for (_, cost), (_, y) in zip(entry["flops"], entry["accuracy"], strict=True)]


_DOSES = {"corrects 0%": 0.0, MAIN: 15.0, "corrects 30%": 30.0}

_TINY = Length(4, 1, 2)
CLAIM = Claim(
    name="c1_cost",
    title="What a level of accuracy costs",
    article="SFT is log-linear in samples; on-policy distillation reaches 70% on AIME'24 for 9-30x fewer FLOPs than "
    "extrapolated SFT, and beats RL for a tenth of the GPU hours.",
    limits="A world built so that flawless solutions do not teach recovery; the ratios are this world's, and no "
    "evidence for 9-30x anywhere else.",
    settings={
        "cpu": Settings(),
        "gpu": Settings(),
        "smoke": Settings(_TINY, _TINY, _TINY, _TINY, fixed_problems=4, fixed_solutions=2),
    },
    search=search,
    pipeline=pipeline,
    analyse=analyse,
    arms=ARMS,
)

"""C11: support. What distillation and SFT do with operations, and with a habit, that the start has never shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from understudy.evaluation import Outcome
from understudy.experiments.bench import GREEDY, PER_STEP, T1, LedgerBench
from understudy.experiments.claim import Chart, Claim, Estimate, Finding, Record, Verdict
from understudy.experiments.lab import Lab, Run
from understudy.experiments.search import Search, searched
from understudy.report.charts import Series
from understudy.worlds.ledger import Ledger

# Operations that the start's corpus leaves out: one in ten, frequent and rare.
UNSEEN = tuple(range(10, 121, 10))
FULL, SAMPLED = {"objective.estimator": "full"}, {"objective.estimator": "sampled"}
# All that a search can choose, and one more at either end.
LADDER = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
# Four solutions of each problem of the step.
LARGE = {**FULL, "sampling.group_size": 4}
DISTILL = {"distill": FULL, "distill-sampled": SAMPLED, "distill-4x": LARGE}
ARMS = (*DISTILL, "sft", "sft-distill")


@dataclass(frozen=True)
class Settings:
    """Optimizer steps; ``sft_steps`` of them are SFT's in sft-distill."""

    steps: int = 50
    sft_steps: int = 25


def _unseen_bench(lab: Lab) -> LedgerBench:
    return LedgerBench.of(lab, unseen=UNSEEN)


def search(lab: Lab, settings: Settings, arm: str) -> Search:
    """Accuracy at temperature 1 on the validation problems, after all of the arm's steps."""
    bench = _unseen_bench(lab)
    sft_rate = search(lab, settings, "sft").chosen if arm == "sft-distill" else None

    def score(rate: float) -> float:
        run = _train(bench, settings, arm, rate, sft_rate)
        return bench.evaluate(run.student, "validation", (1.0,)).metrics[T1]

    if arm == "distill-4x":
        return searched(score, neighbours(search(lab, settings, "distill").chosen), extensions=0)
    return searched(score)


def neighbours(rate: float) -> Sequence[float]:
    """The rate between the one below and the one above it on the ladder 1, 3, 10, ..."""
    place = LADDER.index(rate)
    return LADDER[place - 1 : place + 2]


def _train(bench: LedgerBench, settings: Settings, arm: str, rate: float, sft_rate: float | None) -> Run:
    """``sft_rate``: of the first half of sft-distill."""
    if arm in DISTILL:
        return bench.distill(rate, settings.steps, DISTILL[arm])
    samples = bench.samples(settings.steps * PER_STEP).samples
    if sft_rate is None:
        return bench.sft(rate, settings.steps, samples)
    first = bench.sft(sft_rate, settings.sft_steps, samples)
    return bench.distill(rate, settings.steps - settings.sft_steps, FULL, student=first.student)


def pipeline(lab: Lab, settings: Settings, rates: Mapping[str, float]) -> Record:
    """Every arm in the world with unseen operations; and distillation of starts with and without the habit."""
    bench = _unseen_bench(lab)
    models = {"start": bench.world.start, "teacher": bench.world.teacher}
    for arm in ARMS:
        sft_rate = rates["sft"] if arm == "sft-distill" else None
        models[arm] = _train(bench, settings, arm, rates[arm], sft_rate).student
    habit = {"ordinary": LedgerBench.of(lab), "without": LedgerBench.of(lab, start_correction=0.0)}
    return {
        "operations": {name: _measured(bench, model) for name, model in models.items()},
        "habit": {
            name: {
                "start": _recovery(own, own.world.start),
                "distill": _recovery(own, own.distill(rates["distill"], settings.steps, FULL).student),
            }
            for name, own in habit.items()
        },
    }


def _recovery(bench: LedgerBench, model: Path) -> dict[str, Any]:
    run = bench.evaluate(model)
    return {"t1": run.metrics[T1], "greedy": run.metrics[GREEDY], **bench.habits(run)}


def _measured(bench: LedgerBench, model: Path) -> dict[str, Any]:
    """On the test problems; each share beside the number of things that it is a share of."""
    run = bench.evaluate(model)
    at_1 = [outcome for outcome in run.outcomes if outcome.temperature == 1]
    greedy = [outcome for outcome in run.outcomes if outcome.temperature == 0]
    with_unseen = [bool(_operations(outcome.prompt_text) & set(UNSEEN)) for outcome in at_1]
    rewards = [outcome.mean_reward for outcome in at_1]
    return {
        "t1": run.metrics[T1],
        "greedy": run.metrics[GREEDY],
        "shares": operation_shares(bench.world.tables, at_1),
        "greedy_shares": operation_shares(bench.world.tables, greedy),
        "with_unseen": share([reward for reward, has in zip(rewards, with_unseen, strict=True) if has]),
        "without_unseen": share([reward for reward, has in zip(rewards, with_unseen, strict=True) if not has]),
        **bench.habits(run),
    }


def _operations(prompt: str) -> set[int]:
    return {int(word.removeprefix("op")) for word in prompt.split() if word.startswith("op")}


def operation_shares(tables: Ledger, outcomes: Sequence[Outcome]) -> dict[str, dict[str, tuple[float | None, int]]]:
    """By "unseen" and "seen" operations: the share "right", given the solution's own previous value, and the share
    whose name is "copied" rightly, each with the number of steps that it is a share of."""
    right: dict[str, list[float]] = {"unseen": [], "seen": []}
    copied: dict[str, list[float]] = {"unseen": [], "seen": []}
    for outcome in outcomes:
        asked = outcome.prompt_text.split()
        for completion in outcome.completions:
            words = completion.split()
            for mark in tables.diagnose(outcome.prompt_text, completion):
                if mark.is_statement or mark.previous_value is None:
                    continue
                name = asked[2 * mark.item + 1]
                kind = "unseen" if int(name.removeprefix("op")) in UNSEEN else "seen"
                right[kind].append(float(not mark.false_in_itself))
                copied[kind].append(float(words[mark.word_index - 1] == name))
    return {kind: {"right": share(right[kind]), "copied": share(copied[kind])} for kind in right}


def share(values: Sequence[float]) -> tuple[float | None, int]:
    """Their mean, None of nothing, and their number."""
    return (sum(values) / len(values) if values else None), len(values)


def analyse(records: Sequence[Record]) -> Finding:
    """The pass rule of experiments/c11_support/README.md."""
    unseen = {arm: _facts(records, arm, "unseen") for arm in ("start", *ARMS)}
    seen_gain = Estimate.of_differences(_facts(records, "distill", "seen"), _facts(records, "start", "seen"))
    behind = Estimate.of_differences(unseen["sft"], unseen["distill"])
    ordinary, without = (_habit(records, start, "distill") for start in ("ordinary", "without"))
    numbers = {
        **{f"unseen, {arm}": Estimate.of(values) for arm, values in unseen.items()},
        "sft - distill, unseen": behind,
        "sft - distill-4x, unseen": Estimate.of_differences(unseen["sft"], unseen["distill-4x"]),
        "sft-distill - distill, unseen": Estimate.of_differences(unseen["sft-distill"], unseen["distill"]),
        "sft - start, unseen": Estimate.of_differences(unseen["sft"], unseen["start"]),
        "distill - start, unseen": Estimate.of_differences(unseen["distill"], unseen["start"]),
        "distill - start, seen": seen_gain,
        "recovery, ordinary": Estimate.of(ordinary),
        "recovery, without the habit": Estimate.of(without),
        "recovery, ordinary - without": Estimate.of_differences(ordinary, without),
    }
    stalls = numbers["unseen, distill"].high < NEAR_CHANCE
    habit_stalls = (
        numbers["recovery, without the habit"].high < NEAR_CHANCE and numbers["recovery, ordinary - without"].low > 0
    )
    # Where SFT learns nothing of them, its lead says nothing.
    lags = behind.low > 0 and seen_gain.low > 0 and numbers["sft - start, unseen"].low > 0
    verdict: Verdict = "does not hold here"
    if lags:
        verdict = "holds" if stalls and habit_stalls else "direction only"
    return Finding(
        verdict=verdict,
        ours=f"Unseen operations right: start {numbers['unseen, start'].mean:.0%}, distillation "
        f"{numbers['unseen, distill'].mean:.0%}, SFT {numbers['unseen, sft'].mean:.0%}; recovery without the habit "
        f"{numbers['recovery, without the habit'].mean:.0%}",
        text=_text(records, numbers, behind.low > 0, seen_gain.low > 0, stalls, habit_stalls),
        numbers=numbers,
        table=_table(records),
        charts=_charts(unseen),
    )


# Below twice the tenth that guessing one of ten values gives.
CHANCE, NEAR_CHANCE = 0.1, 0.2


def _facts(records: Sequence[Record], arm: str, kind: str) -> list[float]:
    """Share right per pipeline; solutions without such a step count as nothing right."""
    return [record["operations"][arm]["shares"][kind]["right"][0] or 0.0 for record in records]


def _habit(records: Sequence[Record], start: str, stage: str) -> list[float]:
    return [record["habit"][start][stage]["recovery"] or 0.0 for record in records]


def _text(
    records: Sequence[Record], numbers: Mapping[str, Estimate], behind: bool, taught: bool, stalls: bool, habit: bool
) -> str:
    def met(condition: bool) -> str:
        return "met" if condition else "not met"

    gain = numbers["sft - start, unseen"]
    unjudged = "Not judged: SFT learns no unseen operation either, so that nothing follows. " if gain.low <= 0 else ""
    before = [fmean(_habit(records, start, "start")) for start in ("ordinary", "without")]
    return (
        f"{unjudged}Unseen operations, share right: start {numbers['unseen, start'].show()}, distillation "
        f"{numbers['unseen, distill'].show()}, SFT {numbers['unseen, sft'].show()} (its gain over the start "
        f"{gain.show('{:+.3f}')}). (1) SFT minus distillation "
        f"{numbers['sft - distill, unseen'].show('{:+.3f}')}, above 0: {met(behind)}. (2) Distillation near chance, "
        f"its interval below {NEAR_CHANCE:g}: {met(stalls)}; its gain over the start is "
        f"{numbers['distill - start, unseen'].show('{:+.3f}')}. (3) At seen operations distillation gains "
        f"{numbers['distill - start, seen'].show('{:+.3f}')}, above 0: {met(taught)}. (4) Recovery: from a start with "
        f"{before[1]:.3f} distillation reaches {numbers['recovery, without the habit'].show()}, from the ordinary "
        f"start's {before[0]:.3f} it reaches {numbers['recovery, ordinary'].show()}: {met(habit)}. With four solutions "
        f"of each problem SFT leads by {numbers['sft - distill-4x, unseen'].show('{:+.3f}')}; SFT before distillation "
        f"gives {numbers['sft-distill - distill, unseen'].show('{:+.3f}')} over distillation alone."
    )


def _shown(values: Sequence[float | None]) -> str:
    """Their mean; a share of nothing is left out."""
    known = [value for value in values if value is not None]
    return f"{fmean(known):.3f}" if known else "–"


def _table(records: Sequence[Record]) -> list[dict[str, str]]:
    rows = []
    for arm in ("start", "teacher", *ARMS):
        own = [record["operations"][arm] for record in records]
        shares = [entry["shares"] for entry in own]
        rows.append(
            {
                "arm": arm,
                "accuracy": _shown([entry["t1"] for entry in own]),
                "with an unseen operation": _shown([entry["with_unseen"][0] for entry in own]),
                "without": _shown([entry["without_unseen"][0] for entry in own]),
                "unseen right": _shown([s["unseen"]["right"][0] for s in shares]),
                "unseen right, greedy": _shown([e["greedy_shares"]["unseen"]["right"][0] for e in own]),
                "unseen name copied": _shown([s["unseen"]["copied"][0] for s in shares]),
                "seen right": _shown([s["seen"]["right"][0] for s in shares]),
                "recovery": _shown([entry["recovery"] for entry in own]),
            }
        )
    for start, stages in {"ordinary": "ordinary start", "without": "start without the habit"}.items():
        for stage, label in {"start": stages, "distill": f"{stages}, distilled"}.items():
            own = [record["habit"][start][stage] for record in records]
            accuracy, recovery = _shown([e["t1"] for e in own]), _shown([e["recovery"] for e in own])
            blank = dict.fromkeys(list(rows[0])[2:-1], "–")
            rows.append({"arm": label, "accuracy": accuracy, **blank, "recovery": recovery})
    return rows


def _charts(unseen: Mapping[str, Sequence[float]]) -> list[Chart]:
    lines = [Series(arm, list(enumerate(values, 1))) for arm, values in unseen.items()]
    options = {
        "title": "Operations that the start has never seen",
        "x_label": "pipeline",
        "y_label": "share right, given the own previous value",
        "percent": True,
        "references": [("guessing", CHANCE)],
    }
    return [Chart("unseen-operations", lines, options)]


CLAIM = Claim(
    name="c11_support",
    title="Support",
    article="Reverse KL picks modes within the student's support, SFT adds support; small batches suffice only inside "
    "it. Said without numbers.",
    limits="50 steps say nothing about 5,000. A token never seen still has a small probability: having no support is a "
    "matter of degree.",
    settings={"cpu": Settings(), "gpu": Settings(), "smoke": Settings(steps=2, sft_steps=1)},
    search=search,
    pipeline=pipeline,
    analyse=analyse,
    arms=ARMS,
)

"""C4: mid-training on documents costs an assistant its manners; distillation from its earlier self brings them back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.experiments.assistant_bench import (
    CHATS_SEED,
    DOCUMENTS_PER_STEP,
    PER_STEP,
    AssistantBench,
)
from understudy.experiments.claim import Chart, Claim, Estimate, Finding, Record, column, mean_curve
from understudy.experiments.lab import Lab, Run
from understudy.experiments.search import LORA_RATES, RATES, Search, searched

# (Share of documents among the sequences, chats in the pool that the rest is drawn from: an index into Settings.pools.)
MIXES: Mapping[str, tuple[float, int]] = {
    "100% documents": (1.0, 0),
    "70% documents": (0.7, 0),
    "70% documents, few chats": (0.7, 1),
    "30% documents": (0.3, 0),
    "0% documents": (0.0, 0),
}
RECOVERED = ("100% documents", "70% documents")


@dataclass(frozen=True)
class Settings:
    """Optimizer steps, and sizes of the two pools of chats."""

    documents: int = 400
    recovery: int = 100
    every: int = 20
    pools: tuple[int, int] = (512, 32)
    lora_rank: int = 4
    rounds: int = 3
    round_documents: int = 150


def search(lab: Lab, settings: Settings, arm: str) -> Search:
    """Mid-training is for the new facts, and chosen by them: with instructions in the score, the best would be to learn
    nothing. Recovery is chosen by the mean of the validation instructions and the new facts, after mid-training on
    documents alone. Greedy answers."""
    bench = AssistantBench(lab)
    facts = {"new": bench.facts("new")}
    if arm.startswith("documents"):
        lora = arm == "documents-lora"

        def learned(rate: float) -> float:
            student = _midtrained(bench, settings, "100% documents", rate, lora=lora).student
            return bench.evaluate(student, facts, "none", (0.0,))["new"]["greedy"]

        return searched(learned, LORA_RATES if lora else RATES)
    student = _midtrained(bench, settings, "100% documents", search(lab, settings, "documents").chosen).student

    def both(rate: float) -> float:
        scores = bench.evaluate(_recovered(bench, settings, arm, rate, student).student, facts, "validation", (0.0,))
        return (scores["instructions"]["greedy"] + scores["new"]["greedy"]) / 2

    return searched(both)


def pipeline(lab: Lab, settings: Settings, rates: Mapping[str, float]) -> Record:
    """Every mix, recovery from some of them, adapters, and rounds of new documents."""
    bench = AssistantBench(lab)
    mixes = {name: _midtrained(bench, settings, name, rates["documents"]) for name in MIXES}
    lora = _midtrained(bench, settings, "100% documents", rates["documents-lora"], lora=True)
    recovered = {}
    for name in RECOVERED:
        every = settings.every if name == "100% documents" else 0
        arms = {
            arm: _recovered(bench, settings, arm, rates[arm], mixes[name].student, every) for arm in ("distill", "sft")
        }
        recovered[name] = {arm: _record(bench, run) for arm, run in arms.items()}
    sampling = bench.samples(settings.recovery * PER_STEP).flops()["teacher_sampling"]
    return {
        "fact_seed": bench.fact_seed,
        "original": _scores(bench, bench.start),
        "mixes": {name: _record(bench, run) for name, run in mixes.items()},
        "lora": _record(bench, lora),
        "recovered": recovered,
        "samples_flops": sampling,
        "rounds": {
            arm: _rounds(bench, settings, rates, recover=arm == "with recovery")
            for arm in ("with recovery", "without recovery")
        },
    }


def _midtrained(bench: AssistantBench, settings: Settings, mix: str, rate: float, *, lora: bool = False) -> Run:
    share, pool = MIXES[mix]
    steps = settings.documents
    more: dict[str, Any] = _schedule(steps)
    if lora:
        more |= {"student.lora.rank": settings.lora_rank, "student.lora.alpha": settings.lora_rank}
    chats = bench.samples(settings.pools[pool], seed=CHATS_SEED).samples if share < 1 else None
    if share == 0:
        assert chats is not None
        return bench.sft(rate, steps, chats, more)
    if chats is not None:
        more |= {"supervised.mix.path": chats, "supervised.mix.share": 1 - share}
    documents = bench.documents(steps * DOCUMENTS_PER_STEP, bench.facts("new"))
    return bench.sft(rate, steps, documents, more)


def _schedule(steps: int) -> dict[str, Any]:
    return {
        "supervised.batch_size": DOCUMENTS_PER_STEP,
        "optim.schedule": "linear",
        "optim.warmup_steps": min(10, steps),
    }


def _recovered(
    bench: AssistantBench,
    settings: Settings,
    arm: str,
    rate: float,
    student: Path,
    every: int = 0,
) -> Run:
    """Both arms see the same instructions, each once, and as many answers: the student's own under distillation, the
    assistant's under fine-tuning. ``every``: evaluate before training, and every so many steps."""
    more: dict[str, Any] = {}
    if every:
        more = {
            "evaluation.every": every,
            "evaluation.tasks": bench.tasks({"new": bench.facts("new")}),
        }
    if arm == "distill":
        return bench.distill(rate, settings.recovery, more, student=student)
    samples = bench.samples(settings.recovery * PER_STEP).samples
    return bench.sft(rate, settings.recovery, samples, more, student=student)


def _rounds(
    bench: AssistantBench, settings: Settings, rates: Mapping[str, float], *, recover: bool
) -> list[dict[str, Any]]:
    """Scores before, and after every phase: documents on one part of the new facts, then distillation from the first
    assistant, again and again."""
    parts = {f"round {i + 1}": bench.facts("new")[i :: settings.rounds] for i in range(settings.rounds)}
    facts = {**parts, "old": bench.facts("old")}
    student, steps = bench.start, settings.round_documents
    phases = [("start", student)]
    for number, part in enumerate(parts.values(), 1):
        documents = bench.documents(steps * DOCUMENTS_PER_STEP, part, phase=number)
        student = bench.sft(rates["documents"], steps, documents, _schedule(steps), student=student).student
        phases.append((f"documents {number}", student))
        if recover:
            student = _recovered(bench, settings, "distill", rates["distill"], student).student
            phases.append((f"recovery {number}", student))
    return [
        {
            "phase": name,
            "scores": {task: s["greedy"] for task, s in bench.evaluate(model, facts, temperatures=(0.0,)).items()},
        }
        for name, model in phases
    ]


def _record(bench: AssistantBench, run: Run) -> dict[str, Any]:
    """Scores after a run, its curves where it has some, and what it cost."""
    return {
        "scores": _scores(bench, run.student),
        "curves": {task: run.curve(f"eval/{task}/greedy") for task in ("instructions", "new")},
        "trained_tokens": sum(value for _, value in run.curve("tokens/trained")),
        "flops": run.flops(),
    }


def _scores(bench: AssistantBench, model: Path) -> dict[str, Any]:
    return bench.evaluate(model, {"new": bench.facts("new"), "old": bench.facts("old")})


def analyse(records: Sequence[Record]) -> Finding:
    """The pass rule of experiments/c4_recovery/README.md."""
    lost = _change(records, ("mixes", ALONE), ("original",))
    back = {name: _change(records, ("recovered", name, "distill"), ("original",)) for name in RECOVERED}
    raised = {name: _change(records, ("recovered", name, "distill"), ("mixes", name)) for name in RECOVERED}
    taught = {name: _change(records, ("mixes", name), ("original",), "new") for name in RECOVERED}
    kept = {name: _change(records, ("recovered", name, "distill"), ("mixes", name), "new") for name in RECOVERED}
    knows_more = {name: _change(records, ("recovered", name, "distill"), ("original",), "new") for name in RECOVERED}
    mixtures = {name: _change(records, ("mixes", name), ("original",)) for name in FULL_POOL}
    conditions = {
        "lost": lost.high < -LOST,
        "recovered": all(back[name].low > -BEHAVIOUR_MARGIN and raised[name].low > 0 for name in RECOVERED),
        "kept": all(change.low > -FACTS_MARGIN for change in kept.values()),
        "no mixture keeps all": all(change.high < -BEHAVIOUR_MARGIN for change in mixtures.values()),
        "taught": all(change.low > TAUGHT for change in taught.values()),
        "knows more": all(change.low > 0 for change in knows_more.values()),
    }
    partly = conditions["lost"] and raised[ALONE].low > 0 and knows_more[ALONE].low > 0
    numbers = {
        "lost": lost,
        "recovered": back,
        "raised": raised,
        "taught": taught,
        "kept": kept,
        "mixtures": mixtures,
        "knows_more": knows_more,
        "distill_minus_sft": {
            name: {
                task: _change(records, ("recovered", name, "distill"), ("recovered", name, "sft"), task)
                for task in ("instructions", "new", "old")
            }
            for name in RECOVERED
        },
        "adapters_minus_full": {
            task: _change(records, ("lora",), ("mixes", ALONE), task) for task in ("instructions", "new", "old")
        },
        "rounds": {arm: _after_rounds(records, arm) for arm in ("with recovery", "without recovery")},
        "conditions": conditions,
    }
    instructions = (
        _mean(records, *path) for path in (("original",), ("mixes", ALONE), ("recovered", ALONE, "distill"))
    )
    facts = (_mean(records, *path, task="new") for path in (("mixes", ALONE), ("recovered", ALONE, "distill")))
    return Finding(
        verdict="holds" if all(conditions.values()) else "direction only" if partly else "does not hold here",
        ours=f"Before, after documents alone, distilled: instructions {_path(instructions)}. New facts, from documents "
        f"to distilled: {_path(facts)}",
        text=_text(numbers),
        numbers=numbers,
        table=_table(records),
        charts=_charts(records),
    )


ALONE = "100% documents"
FULL_POOL = ("70% documents", "30% documents", "0% documents")
# The pass rule's. How far instructions must fall to be lost, and how many new facts count as taught.
LOST, TAUGHT = 0.10, 0.10
# How far below the original instructions may be and still count as kept, in mixtures as after recovery; and how far
# new facts may fall.
BEHAVIOUR_MARGIN, FACTS_MARGIN = 0.02, 0.05


def _values(records: Sequence[Record], path: tuple[str, ...], task: str, decoding: str = "greedy") -> list[float]:
    return column(records, *path, *(() if path == ("original",) else ("scores",)), task, decoding)


def _change(
    records: Sequence[Record], after: tuple[str, ...], before: tuple[str, ...], task: str = "instructions"
) -> Estimate:
    """Of greedy accuracy, paired by pipeline."""
    pairs = zip(_values(records, after, task), _values(records, before, task), strict=True)
    return Estimate.of([a - b for a, b in pairs])


def _mean(records: Sequence[Record], *path: str, task: str = "instructions", decoding: str = "greedy") -> float:
    values = _values(records, path, task, decoding)
    return sum(values) / len(values)


def _path(shares: Iterable[float]) -> str:
    return " → ".join(f"{share:.0%}" for share in shares)


def _after_rounds(records: Sequence[Record], arm: str) -> dict[str, Estimate]:
    """After the last phase: instructions, new facts of all rounds, those of the first round, and old facts."""
    ends = [record["rounds"][arm][-1]["scores"] for record in records]
    return {
        "instructions": Estimate.of([end["instructions"] for end in ends]),
        "new facts": Estimate.of([_all_rounds(end) for end in ends]),
        "first round's facts": Estimate.of([end["round 1"] for end in ends]),
        "old facts": Estimate.of([end["old"] for end in ends]),
    }


def _all_rounds(scores: Mapping[str, float]) -> float:
    """The mean of the rounds' facts."""
    rounds = [value for name, value in scores.items() if name.startswith("round ")]
    return sum(rounds) / len(rounds)


def _text(numbers: Mapping[str, Any]) -> str:
    versus = numbers["distill_minus_sft"]
    failed = [name for name, met in numbers["conditions"].items() if not met]
    rounds = "; ".join(
        f"{arm} {', '.join(f'{task} {100 * e.mean:.0f}%' for task, e in ends.items())}"
        for arm, ends in numbers["rounds"].items()
    )
    return (
        f"Differences in points, greedy, with 95% intervals. Documents alone change instructions by "
        f"{numbers['lost'].points()}. Distillation from the earlier self changes them by "
        f"{_each(numbers['raised'])}; they then differ from the original's by {_each(numbers['recovered'])} (margin "
        f"2). Mid-training changes new facts by {_each(numbers['taught'])}, distillation after it by "
        f"{_each(numbers['kept'])} (margin 5): in all {_each(numbers['knows_more'])}. "
        f"Instructions after mixtures with 512 chats differ from the original's by "
        f"{_each(numbers['mixtures'])} (margin 2). "
        + (f"Conditions that fail: {', '.join(failed)}. " if failed else "All six conditions are met. ")
        + "Distillation minus fine-tuning on the earlier self's answers: "
        + "; ".join(
            f"from {name}, instructions {diffs['instructions'].points()}, new facts {diffs['new'].points()}"
            for name, diffs in versus.items()
        )
        + f". Adapters minus all weights, after documents alone: instructions "
        f"{numbers['adapters_minus_full']['instructions'].points()}, new facts "
        f"{numbers['adapters_minus_full']['new'].points()}. After the last round of new documents: {rounds}."
    )


def _each(estimates: Mapping[str, Estimate]) -> str:
    return ", ".join(f"{estimate.points()} ({name})" for name, estimate in estimates.items())


def _table(records: Sequence[Record]) -> list[dict[str, str]]:
    rows = [_row(records, "the earlier self", ("original",))]
    rows += [_row(records, name, ("mixes", name)) for name in MIXES]
    rows.append(_row(records, f"{ALONE}, adapters", ("lora",)))
    for name in RECOVERED:
        rows.append(_row(records, f"{name}, then distillation", ("recovered", name, "distill")))
        rows.append(_row(records, f"{name}, then fine-tuning", ("recovered", name, "sft")))
    return rows


def _row(records: Sequence[Record], label: str, path: tuple[str, ...]) -> dict[str, str]:
    """Means in %. The last phase's compute; fine-tuning's without and with the earlier self's sampling."""
    cells = {"model": label}
    for task, title in (("instructions", "instructions"), ("new", "new facts"), ("old", "old facts")):
        shares = (_mean(records, *path, task=task, decoding=decoding) for decoding in ("greedy", "t1"))
        cells[f"{title}, greedy / T = 1"] = " / ".join(f"{100 * share:.1f}" for share in shares)
    cells["tokens trained"] = cells["GFLOP"] = ""
    if path != ("original",):
        cells["tokens trained"] = f"{sum(column(records, *path, 'trained_tokens')) / len(records):,.0f}"
        paid = sum(_paid(record, path) for record in records) / len(records)
        cells["GFLOP"] = f"{paid / 1e9:.1f}"
        if path[-1] == "sft":
            sampling = sum(column(records, "samples_flops")) / len(records)
            cells["GFLOP"] += f", {(paid + sampling) / 1e9:.1f} with sampling"
    return cells


def _paid(record: Record, path: tuple[str, ...]) -> float:
    value: Any = record
    for name in path:
        value = value[name]
    return sum(flops for role, flops in value["flops"].items() if role != "evaluation")


def _charts(records: Sequence[Record]) -> list[Chart]:
    tasks = (("instructions", "instructions"), ("new", "new facts"))
    recovery = [
        mean_curve(f"{title}, {arm}", [record["recovered"][ALONE][arm]["curves"][task] for record in records])
        for task, title in tasks
        for arm in ("distill", "sft")
    ]
    rounds = [
        mean_curve(f"{title}, {arm}", [_phases(record["rounds"][arm], task) for record in records])
        for task, title in tasks
        for arm in ("with recovery", "without recovery")
    ]
    shared = {
        "y_label": "accuracy, greedy",
        "percent": True,
        "references": [("instructions, earlier self", _mean(records, "original"))],
    }
    return [
        Chart(
            "recovery", recovery, {"title": "Recovery after documents alone", "x_label": "optimizer steps", **shared}
        ),
        Chart("rounds", rounds, {"title": "Rounds of new documents", "x_label": "round (.5: recovered)", **shared}),
    ]


def _phases(phases: Sequence[Mapping[str, Any]], task: str) -> list[tuple[float, float]]:
    """(round, accuracy): documents at whole numbers, recovery half-way to the next. "new": the facts of all rounds."""
    points = []
    for phase in phases:
        kind, _, number = phase["phase"].partition(" ")
        x = float(number or 0) + (0.5 if kind == "recovery" else 0.0)
        points.append((x, _all_rounds(phase["scores"]) if task == "new" else phase["scores"][task]))
    return points


CLAIM = Claim(
    name="c4_recovery",
    title="Behaviour back from the earlier self",
    article="Documents alone: IF-eval 85 → 45, questions 18 → 43. With 30% chats 79 and 36; distilled from the earlier "
    "self 83 and 41. No share of chats keeps all.",
    limits="One tiny model with eight instructions and 240 facts, a closed set; replayed chats cover them easily. "
    "All mixtures share the rate that learns most, so what is lost is partly chosen.",
    settings={"cpu": Settings(), "gpu": Settings(), "smoke": Settings(2, 2, 1, (8, 4), 2, 2, 1)},
    search=search,
    pipeline=pipeline,
    analyse=analyse,
    arms=("documents", "documents-lora", "distill", "sft"),
)

"""C7: forking tokens. Which tokens of the start's own solutions does the teacher's penalty fall on?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from understudy.backends.language_model import LanguageModel
from understudy.backends.local import LocalTeacher
from understudy.experiments.bench import MAX_TOKENS, LedgerBench
from understudy.experiments.claim import Chart, Claim, Estimate, Finding, Record, Verdict, column, mean_curve
from understudy.experiments.lab import Lab
from understudy.experiments.search import Search
from understudy.experiments.solutions import load, read, solutions
from understudy.lm_head import divergence_columns
from understudy.rollout_store import rollout_record
from understudy.teacher_scores import score_rollouts
from understudy.types import HiddenScores, Rollout, ScoredRollout, TopkScores
from understudy.worlds.ledger import Ledger, StepMark

# Rollouts in one pass: their hidden states are held together.
AT_ONCE = 250
SCORES = ("penalty", "surprise", "entropy", "position", "reverse_kl")
"""What is known of a token: log p - log q of the token that was written, -log p, the student's entropy before it, its
place, and the exact KL(p || q) before it."""

BY_LUCK = "false, but right by luck"


@dataclass(frozen=True)
class Settings:
    """``shown``: rollouts kept for a page. ``reach``: how far from the first error the curves go, in steps."""

    shown: int = 8
    reach: int = 8


@dataclass(frozen=True)
class Marked:
    """One solution: what the teacher thinks of each token (``scores`` by name, [T]), and what is wrong with its
    steps."""

    scored: ScoredRollout
    text: str
    steps: Sequence[StepMark]
    scores: Mapping[str, Sequence[float]]

    @property
    def first_wrong(self) -> StepMark | None:
        return next((step for step in self.steps if not step.correct), None)


@dataclass(frozen=True)
class Examiner:
    """Start and teacher of one world, and what they make of the start's solutions."""

    tables: Ledger
    start: LanguageModel
    teacher: LanguageModel

    def mark(self, rollouts: Sequence[Rollout]) -> list[Marked]:
        """All scores of every token."""
        marked: list[Marked] = []
        for at in range(0, len(rollouts), AT_ONCE):
            part = rollouts[at : at + AT_ONCE]
            own, other = read(self.start, part), read(self.teacher, part)
            hidden = [torch.cat([s.teacher_hidden for s in scores]).to(self.start.device) for scores in (own, other)]
            everywhere = torch.ones(len(hidden[0]), dtype=torch.bool, device=self.start.device)
            exact = divergence_columns(self.start.head, self.teacher.head, hidden[0], hidden[1], everywhere).cpu()
            columns = exact.split([len(rollout.completion_ids) for rollout in part])
            marked += [self._marked(*row) for row in zip(part, own, other, columns, strict=True)]
        return marked

    def _marked(self, rollout: Rollout, own: HiddenScores, other: HiddenScores, exact: torch.Tensor) -> Marked:
        """``exact`` [T, 3]: reverse KL, the student's entropy, the teacher's."""
        text = solution_text(self.tables, rollout)
        pairs = zip(own.teacher_logprobs, other.teacher_logprobs, strict=True)
        scores = {
            "penalty": [p - q for p, q in pairs],
            "surprise": [-p for p in own.teacher_logprobs],
            "entropy": exact[:, 1].tolist(),
            "position": [float(t) for t in range(len(exact))],
            "reverse_kl": exact[:, 0].tolist(),
        }
        return Marked(
            ScoredRollout(rollout, other, None), text, self.tables.diagnose(rollout.prompt.text, text), scores
        )

    def rollout_entries(self, marked: Sequence[Marked]) -> list[dict[str, Any]]:
        """Completions as pages colour them (``Finding.rollouts``), with notes on wrong values."""
        teacher = {"default": LocalTeacher(self.teacher)}
        alternatives = score_rollouts(teacher, [one.scored.rollout for one in marked], "topk", topk=5)
        entries = []
        for one, best in zip(marked, alternatives, strict=True):
            record = rollout_record(
                one.scored,
                step=0,
                sample_index=0,
                tokens=lambda ids: [self.tables.tokens[i] for i in ids],
                text=one.text,
                trainer_logprobs=None,
                advantages=[-penalty for penalty in one.scores["penalty"]],
                loss_mask=[True] * len(one.scores["penalty"]),
                alternatives=best if isinstance(best, TopkScores) else None,
            )
            entries.append({"rollout": record, "notes": notes(one.steps)})
        return entries


def solution_text(tables: Ledger, rollout: Rollout) -> str:
    """Word i is token i: special tokens are written out, but for the one that ends the solution."""
    ids = rollout.completion_ids[:-1] if rollout.finish_reason == "stop" else rollout.completion_ids
    return " ".join(tables.tokens[i] for i in ids)


def notes(steps: Sequence[StepMark]) -> dict[str, str]:
    """Token (as JSON names it) -> note, for every value that is wrong or false in itself."""
    names = {True: "false step", False: "inherited error"}
    noted = [step for step in steps if step.false_in_itself or not step.correct]
    return {str(step.word_index): names[step.false_in_itself] for step in noted}


def kind_of(step: StepMark, first: StepMark | None) -> str:
    """What a value is: the first false one, a later one that is false in itself (an operation, or a statement that is
    not followed) and may be the true value by luck, a wrong one that follows from the one before it, or right."""
    if step is first:
        return "first false"
    if step.false_in_itself:
        return "statement not followed" if step.is_statement else BY_LUCK if step.correct else "later false"
    if step.correct:
        return "right"
    # After something that is no value, nothing follows.
    return "consistent" if step.previous_value is not None else "unclear"


def auc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """The chance that a positive scores above a negative, ties half; None without one of either."""
    if not len(positive) or not len(negative):
        return None
    others = np.sort(np.asarray(negative))
    below, upto = (np.searchsorted(others, positive, side=side) for side in ("left", "right"))
    return float((below + upto).mean() / (2 * len(others)))


def search(lab: Lab, settings: Settings, arm: str) -> Search:
    """Nothing is trained: there are no arms."""
    raise NotImplementedError(f"got arm {arm!r}; expected none")


def pipeline(lab: Lab, settings: Settings, rates: Mapping[str, float]) -> Record:
    """The start's solutions of the test problems, token by token."""
    bench = LedgerBench.of(lab)
    tables, start = bench.world.tables, load(bench.world.start)
    examiner = Examiner(tables, start, load(bench.world.teacher))
    marked = examiner.mark(solutions(start, bench.world.start, bench.test, max_tokens=MAX_TOKENS))
    wrong = [one for one in marked if one.first_wrong is not None]
    consistent_ends = [one for one in wrong if _ends_consistently(one, tables)]
    record: dict[str, Any] = {
        "solutions": len(marked),
        "with_an_error": len(wrong),
        "right_at_the_end": sum(_ends_right(one, tables) for one in marked),
        "auc": {
            "false": aucs(wrong, lambda step, one: step.false_in_itself),
            "first": aucs(wrong, lambda step, one: step is one.first_wrong),
            "false, all tokens": aucs(wrong, lambda step, one: step.false_in_itself, all_tokens=True),
        },
        "kinds": _kinds(wrong),
        "final": means([(one, one.steps[-1].word_index) for one in consistent_ends]),
        "other_tokens": means([(one, t) for one in wrong for t in other_tokens(one)]),
        "largest": {name: largest(wrong, name) for name in SCORES},
        "by_distance": _by_distance(wrong, settings.reach),
    }
    if lab.pipeline == 0:
        record["rollouts"] = examiner.rollout_entries(consistent_ends[: settings.shown])
    return record


def _ends_right(one: Marked, tables: Ledger) -> bool:
    return len(one.steps) == tables.num_items and one.steps[-1].correct


def _ends_consistently(one: Marked, tables: Ledger) -> bool:
    """Whether the final value is wrong, and only because of an earlier error."""
    return len(one.steps) == tables.num_items and kind_of(one.steps[-1], one.first_wrong) == "consistent"


def other_tokens(one: Marked) -> list[int]:
    """Tokens that are no value: letters, operations, the end."""
    values = {step.word_index for step in one.steps}
    return [t for t in range(len(one.scores["penalty"])) if t not in values]


def aucs(
    wrong: Sequence[Marked], positive: Callable[[StepMark, Marked], bool], *, all_tokens: bool = False
) -> dict[str, float | None]:
    """By score: how well it tells the positive values from the others (from all other tokens too), within solutions
    that hold an error. The place counts in the direction in which it tells more."""
    chosen: dict[bool, list[tuple[Marked, int]]] = {True: [], False: []}
    for one in wrong:
        for step in one.steps:
            chosen[positive(step, one)].append((one, step.word_index))
        chosen[False] += [(one, t) for t in other_tokens(one)] if all_tokens else []
    found: dict[str, float | None] = {}
    for name in SCORES:
        area = auc(*([one.scores[name][t] for one, t in chosen[flag]] for flag in (True, False)))
        found[name] = max(area, 1 - area) if name == "position" and area is not None else area
    return found


def _kinds(wrong: Sequence[Marked]) -> dict[str, dict[str, float | None]]:
    """``means`` of the values of each kind."""
    kinds: dict[str, list[tuple[Marked, int]]] = {}
    for one in wrong:
        for step in one.steps:
            kinds.setdefault(kind_of(step, one.first_wrong), []).append((one, step.word_index))
    return {kind: means(tokens) for kind, tokens in kinds.items()}


def means(tokens: Sequence[tuple[Marked, int]]) -> dict[str, float | None]:
    """Of (solution, token) pairs: how many, mean scores, the sum of penalties above 0, and the share of penalties
    within half a nat of 0."""
    penalties = [one.scores["penalty"][t] for one, t in tokens]
    return {
        "count": len(tokens),
        **{name: _mean([one.scores[name][t] for one, t in tokens]) for name in SCORES},
        "above_zero": sum(max(0.0, value) for value in penalties),
        "within_half_a_nat": _mean([float(abs(value) <= 0.5) for value in penalties]),
    }


def largest(wrong: Sequence[Marked], name: str) -> dict[str, float | None]:
    """Share of solutions with an error whose largest score, among all tokens, is that of the first false value; and of
    any value that is false in itself."""
    hits: dict[str, list[float]] = {"first": [], "false": []}
    for one in wrong:
        scores = one.scores[name]
        best = max(range(len(scores)), key=scores.__getitem__)
        false = [step.word_index for step in one.steps if step.false_in_itself]
        hits["first"].append(float(one.first_wrong is not None and best == one.first_wrong.word_index))
        hits["false"].append(float(best in false))
    return {which: _mean(flags) for which, flags in hits.items()}


def _by_distance(wrong: Sequence[Marked], reach: int) -> dict[str, list[tuple[int, float | None, int]]]:
    """(distance from the first false value in steps, mean penalty, how many): of values that are false in themselves,
    of consistent wrong ones, and of right ones."""
    lines = {"right": "right", "consistent": "consistent"}
    found: dict[str, dict[int, list[float]]] = {}
    for one in wrong:
        for step in one.steps:
            kind = kind_of(step, one.first_wrong)
            distance = step.item - (one.first_wrong.item if one.first_wrong else 0)
            if abs(distance) <= reach and kind != "unclear":
                line = found.setdefault(lines.get(kind, "false in itself"), {})
                line.setdefault(distance, []).append(one.scores["penalty"][step.word_index])
    return {name: [(d, _mean(line[d]), len(line[d])) for d in sorted(line)] for name, line in found.items()}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def analyse(records: Sequence[Record]) -> Finding:
    """The pass rule of experiments/c7_forking_tokens/README.md."""
    unjudged = [number for number, record in enumerate(records, start=1) if not _judgeable(record)]
    if unjudged:
        text = f"Not judged: pipelines {unjudged} have too few solutions with errors, or too few consistent ones."
        return Finding("does not hold here", "not judged", text, {})
    leads = {name: _lead(records, "false", name) for name in BASELINES}
    numbers: dict[str, Any] = {
        "AUC": {what: {name: Estimate.of(column(records, "auc", what, name)) for name in SCORES} for what in WHAT},
        "AUC lead, false": leads,
        "AUC lead, first": {name: _lead(records, "first", name) for name in BASELINES},
        "penalty, consistent": Estimate.of(column(records, "kinds", "consistent", "penalty")),
        "penalty, consistent final": Estimate.of(column(records, "final", "penalty")),
        "penalty, first false - consistent": Estimate.of(
            [r["kinds"]["first false"]["penalty"] - r["kinds"]["consistent"]["penalty"] for r in records]
        ),
        "largest is the first": Estimate.of(column(records, "largest", "penalty", "first")),
        "largest is false in itself": Estimate.of(column(records, "largest", "penalty", "false")),
        "share of penalty on false values": Estimate.of([_share_on_false(record) for record in records]),
    }
    first = sum(column(records, "kinds", "first false", "penalty")) / len(records)
    return Finding(
        verdict=_verdict(numbers),
        ours=f"Penalty {first:.1f} nats on the first false value, {numbers['penalty, consistent final'].mean:+.2f} on "
        f"a wrong final value that follows; AUC {numbers['AUC']['false']['penalty'].mean:.3f}",
        text=_text(records, numbers),
        numbers=numbers,
        table=_table(records),
        charts=[_chart(records)],
        rollouts=[entry for record in records for entry in record.get("rollouts", [])],
    )


BASELINES = ("position", "entropy", "surprise")
WHAT = ("false", "first")
# Nats: less than this is hardly a penalty.
NEAR_ZERO = 0.5
FALSE = ("first false", "later false", BY_LUCK, "statement not followed")


def _judgeable(record: Record) -> bool:
    areas = [record["auc"][what][name] for what in WHAT for name in SCORES]
    kinds = record["kinds"]
    needed = (kinds.get("first false", {}).get("penalty"), kinds.get("consistent", {}).get("penalty"))
    return all(value is not None for value in (*areas, *needed, record["final"]["penalty"]))


def _lead(records: Sequence[Record], what: str, baseline: str) -> Estimate:
    return Estimate.of([record["auc"][what]["penalty"] - record["auc"][what][baseline] for record in records])


def _share_on_false(record: Record) -> float:
    """Of all penalties above 0, those on values that are false in themselves."""
    everything = [*record["kinds"].values(), record["other_tokens"]]
    false = sum(record["kinds"][kind]["above_zero"] for kind in FALSE if kind in record["kinds"])
    return false / (sum(entry["above_zero"] for entry in everything) or 1.0)


def _verdict(numbers: Mapping[str, Any]) -> Verdict:
    if numbers["penalty, first false - consistent"].low <= 0:
        return "does not hold here"
    found = all(lead.low > 0 for lead in numbers["AUC lead, false"].values())
    consistent = [numbers["penalty, consistent"], numbers["penalty, consistent final"]]
    spared = all(one.low >= -NEAR_ZERO and one.high <= NEAR_ZERO for one in consistent)
    return "holds" if found and spared else "direction only"


def _text(records: Sequence[Record], numbers: Mapping[str, Any]) -> str:
    areas, leads = numbers["AUC"], numbers["AUC lead, false"]
    wrong = sum(column(records, "with_an_error")) / sum(column(records, "solutions"))
    return (
        f"{len(records)} pipelines, means with 95% intervals; {wrong:.0%} of the solutions hold an error. The penalty "
        f"tells values that are false in themselves from the others with an AUC of "
        f"{areas['false']['penalty'].show()}. Its lead over the baselines: "
        f"{', '.join(f'{name} {lead.show()}' for name, lead in leads.items())} (each must lie above 0). Wrong values "
        f"that follow from the one before get {numbers['penalty, consistent'].show('{:+.2f}')} nats, wrong final ones "
        f"{numbers['penalty, consistent final'].show('{:+.2f}')} (both must lie within {NEAR_ZERO}). "
        f"{numbers['share of penalty on false values'].show('{:.0%}')} of all penalty above 0 falls on values that are "
        f"false in themselves. The stronger reading: the largest penalty of a solution falls on the first error in "
        f"{numbers['largest is the first'].show('{:.0%}')} of the solutions with one, on some false value in "
        f"{numbers['largest is false in itself'].show('{:.0%}')}. For the first error alone the AUC is "
        f"{areas['first']['penalty'].show()}; leads: "
        f"{', '.join(f'{name} {lead.show()}' for name, lead in numbers['AUC lead, first'].items())}."
    )


def _table(records: Sequence[Record]) -> list[dict[str, str]]:
    rows = []
    labels = {"penalty": "penalty", "surprise": "-log p", "entropy": "entropy", "reverse_kl": "KL(p || q)"}
    kinds = (*FALSE, "consistent", "right")
    groups = {kind: [r["kinds"][kind] for r in records if kind in r["kinds"]] for kind in kinds}
    groups["consistent, final value"] = [record["final"] for record in records]
    groups["letters, operations, end"] = [record["other_tokens"] for record in records]
    solutions = sum(column(records, "with_an_error"))
    for name, entries in ((name, entries) for name, entries in groups.items() if entries):
        rows.append(
            {
                "token": name,
                "per solution with an error": f"{sum(entry['count'] for entry in entries) / solutions:.2f}",
                **{label: _cell(entries, measure) for measure, label in labels.items()},
            }
        )
    return rows


def _cell(entries: Sequence[Mapping[str, Any]], measure: str) -> str:
    values = [entry[measure] for entry in entries if entry[measure] is not None]
    return f"{sum(values) / len(values):.2f}" if values else ""


def _chart(records: Sequence[Record]) -> Chart:
    """Distances that every pipeline has."""
    series = []
    for name in ("false in itself", "consistent", "right"):
        curves = [{d: mean for d, mean, _ in record["by_distance"].get(name, [])} for record in records]
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        series.append(mean_curve(name, [[(d, curve[d]) for d in shared] for curve in curves]))
    labels = {"x_label": "steps after the first false value", "y_label": "log p - log q, nats"}
    return Chart("penalty", series, {"title": "The penalty around the first error", **labels})


CLAIM = Claim(
    name="c7_forking_tokens",
    title="Forking tokens",
    article="On one wrong answer of a 4B model, a 235B teacher penalises the tokens that open the wrong path and "
    "hardly the final answer, which follows from them. One example, no numbers.",
    limits="A false value is a known error of fact; forks in prose have no such label. The teacher was trained to go "
    "on consistently from a wrong value.",
    settings={"cpu": Settings(), "gpu": Settings(), "smoke": Settings(2, 2)},
    search=search,
    pipeline=pipeline,
    analyse=analyse,
)

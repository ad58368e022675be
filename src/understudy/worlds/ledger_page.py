"""What the ledger demo found: the table, the verdict, the page."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.report import Arm, RolloutPair, write_comparison
from understudy.rollout_store import read_rollouts
from understudy.worlds.jobs import Job, count_rows
from understudy.worlds.ledger import Ledger
from understudy.worlds.ledger_demo import ARMS, NUM_STEPS, arm_rows

TARGET = 0.70  # accuracy at temperature 1 whose price is compared
_TITLE = "Four ways to improve one student: the ledger world"
_INTRO = (
    "A running value goes through 18 items: operations (facts to be known) and statements (the true value, "
    "printed in the prompt). The student has a habit: at a statement it repeats its own running value instead of "
    "reading the true one. In a flawless solution the two agree, so the habit shows only after the student's own "
    "mistakes. The teacher makes almost no mistakes and repairs a wrong value at the next statement."
)
_LIMITS = (
    "Limits: the world was built so that a flawless teacher's solutions say next to nothing about repairing one's"
    " own errors. It shows that training on the student's own states can decide, by the mechanism it is meant to "
    "have, not how often it decides elsewhere; with a teacher that slips and repairs, or a student that never "
    "repairs, the gap shrinks or vanishes. One student, one seed; learning rates were searched equally for each "
    "method on other problems; RL pays no teacher and is cheaper per step; more steps of fine-tuning go on "
    "improving it."
)


@dataclass(frozen=True)
class Outcome:
    """One arm's end."""

    name: str
    description: str
    greedy: tuple[float, float]
    t1: tuple[float, float]
    steps: int
    roles: Mapping[str, Mapping[str, float]]
    to_target: tuple[int, float] | None

    def amount(self, name: str) -> float:
        """Sum over roles, evaluation left out."""
        return sum(entry[name] for role, entry in self.roles.items() if role != "evaluation")


def outcomes(jobs: Sequence[Job]) -> list[Outcome]:
    """One per arm, in the demo's order."""
    by_name = {job.name: job for job in jobs}
    rows = arm_rows(jobs)
    found = []
    for arm in ARMS:
        roles = _roles(by_name[arm.name])
        if arm.method == "sft":
            roles = {"teacher_sampling": _roles(by_name["samples"])["teacher_sampling"]} | roles
        last = rows[arm.name][-1]
        reached = [row for row in rows[arm.name] if row.get("eval/ledger/t1", 0.0) >= TARGET]
        found.append(
            Outcome(
                arm.name,
                arm.description,
                (last["eval/ledger/greedy"], last["eval/ledger/greedy_se"]),
                (last["eval/ledger/t1"], last["eval/ledger/t1_se"]),
                int(last["step"]),
                roles,
                (int(reached[0]["step"]), float(reached[0]["cost/flops"])) if reached else None,
            )
        )
    return found


def _roles(job: Job) -> dict[str, dict[str, float]]:
    return json.loads((job.folder / "costs.json").read_text(encoding="utf-8"))["roles"]


def table_rows(found: Sequence[Outcome]) -> list[dict[str, str]]:
    """The table as printed and as shown on the page."""
    table = []
    for outcome in found:
        roles = outcome.roles
        sampling = sum(roles[role]["flops"] for role in ("student_sampling", "teacher_sampling") if role in roles)
        scoring = roles.get("teacher_scoring", {}).get("flops", 0.0)
        target = f"{outcome.to_target[0]} steps, {outcome.to_target[1] / 1e9:.0f} GFLOP" if outcome.to_target else ""
        table.append(
            {
                "method": outcome.name,
                "greedy": _percent(outcome.greedy),
                "T = 1": _percent(outcome.t1),
                "steps": str(outcome.steps),
                "tokens trained on": f"{roles['student_training']['tokens'] / 1e3:.0f}k",
                "GFLOP sample / score / train": " / ".join(
                    f"{value / 1e9:.0f}" for value in (sampling, scoring, roles["student_training"]["flops"])
                ),
                "GFLOP": f"{outcome.amount('flops') / 1e9:.0f}",
                "seconds": f"{outcome.amount('seconds'):.0f}",
                f"to {TARGET:.0%} at T = 1": target or f"not in {outcome.steps} steps",
            }
        )
    return table


def _percent(value: tuple[float, float]) -> str:
    return f"{value[0]:.1%} ± {value[1]:.1%}".replace("%", "")


def verdict(found: Sequence[Outcome], start: Mapping[str, float], penalties: Mapping[str, float]) -> str:
    """One paragraph that says no more than the numbers do, and the setting's limits."""
    by_name = {outcome.name: outcome for outcome in found}
    full, sft, rl = by_name["distill-full"], by_name["sft"], by_name["rl"]
    sentences = [
        f"From {start['eval/ledger/greedy']:.1%} greedy and {start['eval/ledger/t1']:.1%} at temperature 1, after "
        f"{full.steps} steps of 64 solutions each, at temperature 1: {_ranking(found)}.",
        f"Greedy: {', '.join(f'{o.name} {o.greedy[0]:.1%}' for o in found)}.",
        " ".join(_price(outcome) for outcome in found),
        _compared(full, sft),
        _compared(full, rl),
    ]
    if penalties:
        sentences.append(
            "In the student's own first solutions the reverse KL averages "
            f"{penalties['false']:.1f} nats on values that are false in themselves, {penalties['inherited']:.2f} on "
            f"values that only inherit an earlier error and {penalties['right']:.2f} on right ones."
        )
    return " ".join(sentences) + "\n\n" + _LIMITS


def _ranking(found: Sequence[Outcome]) -> str:
    ordered = sorted(found, key=lambda outcome: -outcome.t1[0])
    parts = [f"{ordered[0].name} {ordered[0].t1[0]:.1%}"]
    for better, outcome in itertools.pairwise(ordered):
        clear = better.t1[0] - outcome.t1[0] > 2 * math.hypot(better.t1[1], outcome.t1[1])
        parts.append(f"{', ahead of' if clear else ', within noise of'} {outcome.name} {outcome.t1[0]:.1%}")
    return "".join(parts)


def _price(outcome: Outcome) -> str:
    if outcome.to_target is None:
        return f"{outcome.name} did not reach {TARGET:.0%} in {outcome.steps} steps."
    return (
        f"{outcome.name} reached {TARGET:.0%} by step {outcome.to_target[0]} ({outcome.to_target[1] / 1e9:.0f} GFLOP)."
    )


def _compared(ours: Outcome, other: Outcome) -> str:
    flops = ours.amount("flops") / other.amount("flops")
    return f"Over its {ours.steps} steps {ours.name} costs {flops:.1f} times the FLOPs of {other.name}."


def false_step_penalties(folder: Path) -> dict[str, float]:
    """Mean reverse KL (nats) of value tokens in stored rollouts: false in themselves, inherited errors, right ones."""
    world, kinds = Ledger(), {"false": [], "inherited": [], "right": []}
    for record in read_rollouts(folder / "rollouts" / "step_000000.jsonl"):
        gaps = [p - q for p, q in zip(record["sampler_logprobs"], record["teacher_logprobs"], strict=True)]
        for mark in world.diagnose(record["prompt_text"], record["completion_text"]):
            kind = "false" if mark.false_in_itself else "inherited" if mark.inherited else "right"
            kinds[kind].append(gaps[mark.word_index])
    return {kind: sum(values) / len(values) for kind, values in kinds.items() if values}


def rollout_pairs(folder: Path, num_steps: int, *, count: int = 12) -> list[RolloutPair]:
    """The same prompts before and after, first those that the student got wrong at the start."""
    before = read_rollouts(folder / "rollouts" / "step_000000.jsonl")
    after = {r["prompt_index"]: r for r in read_rollouts(folder / "rollouts" / f"step_{num_steps:06d}.jsonl")}
    graded = [(_wrong(record), record) for record in before if record["prompt_index"] in after]
    chosen = [record for _, record in sorted(graded, key=lambda pair: -pair[0])][:count]
    return [
        RolloutPair(
            record,
            after[record["prompt_index"]],
            _notes(record),
            _notes(after[record["prompt_index"]]),
            f"Before: {_wrong(record)} false steps",
            f"After {num_steps} steps: {_wrong(after[record['prompt_index']])} false steps",
        )
        for record in chosen
    ]


def _wrong(record: Mapping[str, Any]) -> int:
    marks = Ledger().diagnose(record["prompt_text"], record["completion_text"])
    return sum(mark.false_in_itself for mark in marks)


def _notes(record: Mapping[str, Any]) -> dict[int, str]:
    marks = Ledger().diagnose(record["prompt_text"], record["completion_text"])
    names = {m.word_index: "false step" if m.false_in_itself else "inherited error" for m in marks if not m.correct}
    return names


def write_page(folder: Path, jobs: Sequence[Job]) -> tuple[list[dict[str, str]], str, Path]:
    """(table, verdict, path of report.html) of a finished demo."""
    by_name = {job.name: job for job in jobs}
    found, rows = outcomes(jobs), arm_rows(jobs)
    full = by_name["distill-full"].folder
    paragraph = verdict(found, rows["distill-full"][0], false_step_penalties(full))
    teacher = json.loads((by_name["teacher"].folder / "evaluation.json").read_text(encoding="utf-8"))
    arms = [Arm(outcome.name, rows[outcome.name], outcome.description) for outcome in found]
    arms.append(Arm("teacher", [{"step": NUM_STEPS, **teacher}], "the teacher itself", reference=True))
    table = table_rows(found)
    path = write_comparison(
        arms,
        folder / "report.html",
        title=_TITLE,
        intro=_INTRO,
        table=table,
        verdict=paragraph,
        commands=[(job.name, job.rerun_command) for job in jobs],
        before_after=rollout_pairs(full, int(rows["distill-full"][-1]["step"])),
        footnotes=[
            f"Accuracy on {count_rows(folder / 'test.jsonl')} held-out problems, ± one standard error. "
            "FLOPs: 2N per token sampled or scored, 6N per token trained on, N the matrices a token passes (LM head "
            "included); attention scores and evaluation left out. The price of sft includes the teacher's sampling.",
            "Before and after: the prompts with the most false steps at the start, of 64 kept ones.",
        ],
    )
    return table, paragraph, path

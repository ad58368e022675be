"""C9: exposure bias. How far from the teacher are students on its states and on their own?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.experiments.bench import GREEDY, PER_STEP, T1, LedgerBench
from understudy.experiments.claim import Chart, Claim, Estimate, Finding, Record, Verdict, mean_curve
from understudy.experiments.lab import Lab, Run
from understudy.experiments.search import Search, searched
from understudy.types import HiddenScores, TokenSequence

if TYPE_CHECKING:
    from understudy.backends.language_model import LanguageModel
    from understudy.tokenization import ModelText

ARMS = ("sft", "distill")
# Texts scored at once: what bounds the memory for hidden states.
PIECE = 500


@dataclass(frozen=True)
class Length:
    """``steps`` of a run, evaluated every ``every``; its rate is searched at ``searched`` steps, at whose multiples its
    models are kept."""

    steps: int
    every: int
    searched: int


@dataclass(frozen=True)
class Settings:
    """Those of C1, whose runs these are."""

    sft: Length = Length(500, 50, 100)
    distill: Length = Length(100, 10, 50)


def search(lab: Lab, settings: Settings, arm: str) -> Search:
    """Accuracy at temperature 1 on the validation problems."""
    bench, length = LedgerBench.of(lab), getattr(settings, arm)

    def score(rate: float) -> float:
        run = _arm(bench, settings, arm, rate, Length(length.searched, 0, length.searched))
        return bench.evaluate(run.student, "validation", (1.0,)).metrics[T1]

    return searched(score)


def _arm(bench: LedgerBench, settings: Settings, arm: str, rate: float, length: Length) -> Run:
    keep = {"checkpoints.every": length.searched, "checkpoints.keep": length.steps // length.searched}
    if arm == "sft":
        solutions = bench.samples(settings.sft.steps * PER_STEP)
        return bench.sft(rate, length.steps, solutions.samples, keep, every=length.every)
    return bench.distill(rate, length.steps, keep | {"objective.estimator": "full"}, every=length.every)


def pipeline(lab: Lab, settings: Settings, rates: Mapping[str, float]) -> Record:
    """The start, SFT at every kept step and distillation: along the chain, and on both kinds of states."""
    from understudy.tokenization import load_text

    bench = LedgerBench.of(lab)
    sft, distill = (_arm(bench, settings, arm, rates[arm], getattr(settings, arm)) for arm in ARMS)
    kept = range(settings.sft.searched, settings.sft.steps + 1, settings.sft.searched)
    students = {
        "start": bench.world.start,
        **{f"sft {step}": sft.student_at(step) for step in kept},
        "distill": distill.student,
    }
    text = load_text(str(bench.world.teacher), "teacher")
    teacher = _load(bench.world.teacher)
    solutions = bench.evaluate(bench.world.teacher)
    given = _sequences(text, solutions)
    return {
        "teacher": _written(bench, solutions),
        "students": {name: _student(bench, text, teacher, given, model) for name, model in students.items()},
    }


def _student(
    bench: LedgerBench, text: ModelText, teacher: LanguageModel, given: Sequence[TokenSequence], model: Path
) -> dict[str, Any]:
    """``given``: the teacher's solutions."""
    run, student, num_items = bench.evaluate(model), _load(model), bench.world.tables.num_items
    return _written(bench, run) | {
        "teacher_forced": forced(student, teacher, given, num_items),
        "student_forced": forced(student, teacher, _sequences(text, run), num_items),
    }


def _written(bench: LedgerBench, run: Run) -> dict[str, Any]:
    """What an evaluation's completions say: accuracies, habits, and the share of right values by item."""
    tables = bench.world.tables
    right = [0] * tables.num_items
    outcomes = [outcome for outcome in run.outcomes if outcome.temperature == 1]
    for outcome in outcomes:
        for mark in tables.diagnose(outcome.prompt_text, outcome.completions[0]):
            right[mark.item - 1] += mark.correct
    items = [count / len(outcomes) for count in right]
    return {"t1": run.metrics[T1], "greedy": run.metrics[GREEDY], "items": items, **bench.habits(run)}


def _load(model: Path) -> LanguageModel:
    from understudy.backends.loading import load_student
    from understudy.config import StudentConfig

    return load_student(StudentConfig(model=str(model), dtype="float32"))


def _sequences(text: ModelText, run: Run) -> list[TokenSequence]:
    """The completions that ``run``, an evaluation, has sampled at temperature 1."""
    sequences = []
    for outcome in run.outcomes:
        if outcome.temperature == 1:
            ids = text.encode_completion(outcome.completions[0])
            ids += [text.tokenizer.eos_token_id] if outcome.finish_reasons[0] == "stop" else []
            if ids:  # one that is all special tokens decodes to nothing
                sequences.append(TokenSequence(text.encode(outcome.prompt_text), ids))
    return sequences


def forced(
    student: LanguageModel, teacher: LanguageModel, sequences: Sequence[TokenSequence], num_items: int
) -> dict[str, Any]:
    """Means over the tokens of given texts: negative log-probabilities of both models, and the exact KL(student ||
    teacher), also by item (three tokens each; None: no text has it)."""
    import torch

    from understudy.backends.local import LocalTeacher
    from understudy.lm_head import divergence_columns

    own, teachers, kl, places = [], [], [], []
    for start in range(0, len(sequences), PIECE):
        piece = sequences[start : start + PIECE]
        scores, marks = (_hidden(LocalTeacher(model), piece) for model in (student, teacher))
        hidden, teacher_hidden = (
            torch.cat([one.teacher_hidden for one in part]).to(student.device) for part in (scores, marks)
        )
        everywhere = torch.ones(len(hidden), dtype=torch.bool, device=student.device)
        columns = divergence_columns(student.head, teacher.head, hidden, teacher_hidden, everywhere)
        kl += columns[:, 0].tolist()
        own += [logprob for one in scores for logprob in one.teacher_logprobs]
        teachers += [logprob for one in marks for logprob in one.teacher_logprobs]
        places += [place // 3 for sequence in piece for place in range(len(sequence.completion_ids))]
    by_item = [[value for value, place in zip(kl, places, strict=True) if place == item] for item in range(num_items)]
    return {
        "nll": -sum(own) / len(own),
        "teacher_nll": -sum(teachers) / len(teachers),
        "kl": sum(kl) / len(kl),
        "kl_items": [sum(values) / len(values) if values else None for values in by_item],
    }


def _hidden(marker: Any, sequences: Sequence[TokenSequence]) -> list[HiddenScores]:
    scores = marker.score(sequences, "hidden")
    return [score for score in scores if isinstance(score, HiddenScores)]


def analyse(records: Sequence[Record]) -> Finding:
    """The pass rule of experiments/c9_exposure_bias/README.md."""
    matches = [_matched(record) for record in records]
    names = [match or _last_sft(record) for match, record in zip(matches, records, strict=True)]
    arms = {
        "matched": [record["students"][name] for record, name in zip(records, names, strict=True)],
        "last": [record["students"][_last_sft(record)] for record in records],
        "distill": [record["students"]["distill"] for record in records],
        "start": [record["students"]["start"] for record in records],
    }
    numbers: dict[str, Any] = {"matched": matches}
    for measure, of in MEASURES.items():
        values = {arm: [of(student) for student in students] for arm, students in arms.items()}
        numbers |= {f"{measure}, {arm}": Estimate.of(own) for arm, own in values.items()}
        for rival in ("matched", "last"):
            differences = [own - theirs for own, theirs in zip(values["distill"], values[rival], strict=True)]
            numbers[f"{measure}, distill - {rival}"] = Estimate.of(differences)
    flatter = numbers["slope, distill - matched"].low > 0
    falls = numbers["slope, matched"].high < 0
    stays = numbers["slope, distill"].low > LEVEL_SLOPE
    nearer = numbers["log exposure ratio, distill - matched"].high < 0
    holds = flatter and falls and stays and nearer and None not in matches
    verdict: Verdict = "holds" if holds else "direction only" if flatter else "does not hold here"
    return Finding(
        verdict=verdict,
        ours=f"Accuracy by item: slope {numbers['slope, matched'].mean:+.4f} after SFT matched in NLL, "
        f"{numbers['slope, distill'].mean:+.4f} after distillation; exposure ratio {_ratio(numbers, 'matched')} "
        f"against {_ratio(numbers, 'distill')}",
        text=_text(numbers),
        numbers=numbers,
        table=_table(records),
        charts=_charts(records, arms),
    )


# Distillation's slope must lie above this, per item: at most 9 points over the chain.
LEVEL_SLOPE = -0.005


def _matched(record: Record) -> str | None:
    """The earliest checkpoint of SFT that is as good as distillation on the teacher's texts."""
    students = record["students"]
    wanted = students["distill"]["teacher_forced"]["nll"]
    return next((name for name in _sft(record) if students[name]["teacher_forced"]["nll"] <= wanted), None)


def _sft(record: Record) -> list[str]:
    return sorted((name for name in record["students"] if name.startswith("sft ")), key=lambda name: int(name[4:]))


def _last_sft(record: Record) -> str:
    return _sft(record)[-1]


def _slope(student: Mapping[str, Any]) -> float:
    """Of a straight line by least squares through the accuracies of items 1, 2, ..."""
    items = student["items"]
    centre = (len(items) - 1) / 2
    spread = sum((place - centre) ** 2 for place in range(len(items)))
    return sum((place - centre) * value for place, value in enumerate(items)) / spread


def _log_ratio(student: Mapping[str, Any]) -> float:
    """Logarithm of the exposure ratio. Two models that agree to the last digit have a KL of 0 for both."""
    own, given = (max(student[states]["kl"], 1e-9) for states in ("student_forced", "teacher_forced"))
    return math.log(own / given)


MEASURES = {
    "slope": _slope,
    "log exposure ratio": _log_ratio,
    "KL, own states": lambda student: student["student_forced"]["kl"],
    "KL, teacher's states": lambda student: student["teacher_forced"]["kl"],
    "NLL": lambda student: student["teacher_forced"]["nll"],
    "accuracy": lambda student: student["t1"],
    "recovery": lambda student: student["recovery"] or 0.0,
}


def _ratio(numbers: Mapping[str, Any], arm: str) -> str:
    return f"{math.exp(numbers[f'log exposure ratio, {arm}'].mean):.1f}"


def _text(numbers: Mapping[str, Any]) -> str:
    def of(measure: str, arm: str, form: str = "{:.4f}") -> str:
        return numbers[f"{measure}, {arm}"].show(form)

    given, own, apart = "KL, teacher's states", "KL, own states", "distill - matched"
    return (
        "SFT checkpoints matched in teacher-forced NLL, by pipeline: "
        f"{', '.join(name or 'none' for name in numbers['matched'])} (NLL {of('NLL', 'matched')}, distillation "
        f"{of('NLL', 'distill')}). Slope of accuracy per item: SFT {of('slope', 'matched', '{:+.4f}')}, distillation "
        f"{of('slope', 'distill', '{:+.4f}')}, difference {of('slope', apart, '{:+.4f}')}; from the last SFT "
        f"checkpoint {of('slope', 'distill - last', '{:+.4f}')}. The rule asks that SFT's interval lies below 0, "
        f"that of the difference above 0, and distillation's above {LEVEL_SLOPE}. KL(student || teacher) per token on "
        f"the teacher's states and on the own ones: SFT {of(given, 'matched')} and {of(own, 'matched')}, distillation "
        f"{of(given, 'distill')} and {of(own, 'distill')}; exposure ratios {_ratio(numbers, 'matched')} and "
        f"{_ratio(numbers, 'distill')}, logarithm of distillation's over SFT's "
        f"{of('log exposure ratio', apart, '{:+.2f}')} (to lie below 0). Distillation minus SFT: recovery "
        f"{of('recovery', apart, '{:+.3f}')}, accuracy {of('accuracy', apart, '{:+.3f}')}; minus the last SFT "
        f"checkpoint, accuracy {of('accuracy', 'distill - last', '{:+.3f}')}."
    )


def _table(records: Sequence[Record]) -> list[dict[str, str]]:
    rows = []
    for name in records[0]["students"]:
        students = [record["students"][name] for record in records]
        ratio = math.exp(_mean([_log_ratio(student) for student in students]))
        rows.append(
            {"student": name}
            | {habit: _shown([student[habit] for student in students]) for habit in ("t1", "recovery", "facts")}
            | {f"item {item}": _shown([s["items"][item - 1] for s in students]) for item in (1, 6, 12, 18)}
            | {"slope": f"{_mean([_slope(student) for student in students]):+.4f}"}
            | {"NLL": _shown([s["teacher_forced"]["nll"] for s in students], "{:.4f}")}
            | {"KL, teacher's states": _shown([s["teacher_forced"]["kl"] for s in students], "{:.4f}")}
            | {"KL, own states": _shown([s["student_forced"]["kl"] for s in students], "{:.4f}")}
            | {"exposure ratio": f"{ratio:.1f}"}
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _shown(values: Sequence[float | None], form: str = "{:.3f}") -> str:
    """The mean; a share of nothing is left out."""
    known = [value for value in values if value is not None]
    return form.format(_mean(known)) if known else "–"


def _charts(records: Sequence[Record], arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Chart]:
    labels = {"start": "start", "matched": "sft, matched NLL", "last": f"{_last_sft(records[0])} steps"}
    labels["distill"] = "distill"
    accuracy = [mean_curve(label, [_by_item(s["items"]) for s in arms[arm]]) for arm, label in labels.items()]
    distance = [
        mean_curve(f"{labels[arm]}, {whose} states", [_by_item(s[states]["kl_items"]) for s in arms[arm]])
        for arm in ("matched", "distill")
        for whose, states in (("teacher's", "teacher_forced"), ("own", "student_forced"))
    ]
    items = {"x_label": "item"}
    return [
        Chart(
            "accuracy-by-item",
            accuracy,
            items | {"title": "Right running values along the chain", "y_label": "share of solutions", "percent": True},
        ),
        Chart(
            "distance-by-item",
            distance,
            items | {"title": "Distance from the teacher along the chain", "y_label": "KL(student || teacher), nats"},
        ),
    ]


def _by_item(values: Sequence[float | None]) -> list[tuple[int, float]]:
    """A curve over items. What no text has is not drawn."""
    return [(item, math.nan if value is None else value) for item, value in enumerate(values, 1)]


CLAIM = Claim(
    name="c9_exposure_bias",
    title="Exposure bias",
    article="A student trained on the teacher's texts leaves its states after an early error, and errors compound; one "
    "trained on its own texts does not. An argument, without a measurement.",
    limits="The chain offers statements to recover at, and flawless solutions do not show how; most chains have none.",
    settings={
        "cpu": Settings(),
        "gpu": Settings(),
        "smoke": Settings(Length(4, 1, 2), Length(4, 1, 2)),
    },
    search=search,
    pipeline=pipeline,
    analyse=analyse,
    arms=ARMS,
)

"""C5: a model that is fine-tuned on its own samples drifts; one that is distilled from itself stays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.experiments.assistant_bench import PER_STEP, AssistantBench
from understudy.experiments.claim import Chart, Claim, Estimate, Finding, Record, mean_curve
from understudy.experiments.lab import Lab, Run
from understudy.experiments.search import Search
from understudy.report.charts import Series

# The learning rate is what is varied; nothing is searched.
SELF_RATES = (3e-4, 1e-3, 3e-3)
# Those of recovery and of mid-training in `understudy demo assistant`.
PRACTICAL = (3e-4, 1e-3)
DECAYED = 1e-3

# Standard deviation of the noise on a weight matrix, as a share of its root mean square. The first is taken that
# leaves fewer than SPOILED of the validation instructions followed.
NOISES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
SPOILED = 2 / 3


@dataclass(frozen=True)
class Settings:
    """Optimizer steps, and how many samples the fixed ones are."""

    steps: int = 100
    fixed: int = 640


def search(lab: Lab, settings: Settings, arm: str) -> Search:
    """Not asked for: no arm has its rate searched."""
    raise NotImplementedError(arm)


def pipeline(lab: Lab, settings: Settings, rates: Mapping[str, float]) -> Record:
    """Every way to learn from oneself at every rate; and from a spoiled start back to what it was."""
    bench = AssistantBench(lab)
    spoiled, noise = _spoiled(bench)
    arms, back = _arms(bench, settings), _back(bench, settings, spoiled)
    own = bench.samples(settings.steps * PER_STEP).samples
    decayed = bench.sft(DECAYED, settings.steps, own, {"optim.schedule": "linear"})
    return {
        "start": _state(bench, bench.start),
        "arms": {name: [[rate, _record(bench, run(rate))] for rate in SELF_RATES] for name, run in arms.items()},
        "decayed": _record(bench, decayed),
        "spoiled": {"noise": noise, **_state(bench, spoiled)},
        "back": {name: [[rate, _record(bench, run(rate))] for rate in PRACTICAL] for name, run in back.items()},
    }


def _arms(bench: AssistantBench, settings: Settings) -> dict[str, Callable[[float], Run]]:
    """By name, the run at a rate. Fixed samples are the first of the fresh ones, in several epochs."""
    steps = settings.steps
    fresh, fixed = bench.samples(steps * PER_STEP).samples, bench.samples(settings.fixed).samples
    return {
        "sft, fresh": lambda rate: bench.sft(rate, steps, fresh),
        "sft, fixed": lambda rate: bench.sft(rate, steps, fixed),
        "distill, full": lambda rate: bench.distill(rate, steps, {"objective.estimator": "full"}),
        "distill, sampled": lambda rate: bench.distill(rate, steps, {"objective.estimator": "sampled"}),
    }


def _back(bench: AssistantBench, settings: Settings, spoiled: Path) -> dict[str, Callable[[float], Run]]:
    """As ``_arms``, for the spoiled student; the teacher is the model without the noise."""
    steps = settings.steps
    teachers, own = (bench.samples(steps * PER_STEP, writer=writer).samples for writer in (bench.start, spoiled))
    return {
        "distill, full": lambda rate: bench.distill(rate, steps, {"objective.estimator": "full"}, student=spoiled),
        "sft, teacher's samples": lambda rate: bench.sft(rate, steps, teachers, student=spoiled),
        "sft, own samples": lambda rate: bench.sft(rate, steps, own, student=spoiled),
    }


def _spoiled(bench: AssistantBench) -> tuple[Path, float]:
    """The assistant with noise on its weights, and the noise; the strongest where none is strong enough."""
    for noise in NOISES:
        model = _noisy(bench, noise)
        scores = bench.evaluate(model, instructions="validation", temperatures=(1.0,))
        if scores["instructions"]["t1"] < SPOILED:
            return model, noise
    return _noisy(bench, NOISES[-1]), NOISES[-1]


def _noisy(bench: AssistantBench, noise: float) -> Path:
    cache, seed = bench.lab.cache, bench.lab.pipeline
    key = {"spoiled": str(bench.start.relative_to(cache.root)), "noise": noise, "seed": seed}
    return cache.folder("models", key, lambda folder: _save_noisy(folder, bench.start, noise, seed))


def _save_noisy(folder: Path, start: Path, noise: float, seed: int) -> None:
    """Gaussian noise on every matrix; the norms' scales stay. Equal seeds give one direction at every strength."""
    import torch
    from transformers import Qwen3ForCausalLM

    from understudy.worlds import assistant
    from understudy.worlds.models import save_folder

    model = Qwen3ForCausalLM.from_pretrained(start)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():  # tied ones once
            if weight.dim() > 1:
                size = noise * weight.square().mean().sqrt()
                weight += size * torch.randn(weight.shape, generator=generator)
    save_folder(
        model, assistant.tokenizer(), folder, "# Spoiled assistant\n\nAn assistant with noise on its weights.\n"
    )


def _record(bench: AssistantBench, run: Run) -> dict[str, Any]:
    return {
        **_state(bench, run.student),
        "grad_norms": [value for _, value in run.curve("optim/grad_norm")],
        "reverse_kl": run.curve("reverse_kl/full"),
        "flops": run.flops(),
    }


def _state(bench: AssistantBench, model: Path) -> dict[str, Any]:
    """Accuracies, and KL(assistant || model) in nats per token of the assistant's own answers."""
    return {"scores": bench.evaluate(model, {"old": bench.facts("old")}), "kl": bench.divergence(bench.start, model)}


def analyse(records: Sequence[Record]) -> Finding:
    """The pass rule of experiments/c5_self_training/README.md."""
    slopes = {arm: Estimate.of([_slope(_kls(record, arm)) for record in records]) for arm in ARMS}
    changed = {arm: _by_rate(records, arm, _instructions_changed) for arm in ARMS}
    versus_sft = _by_rate(records, "distill, full", _log_kl_over_sft)
    back = {arm: _by_rate(records, arm, _log_kl_back, "back") for arm in BACK}
    practical = [f"{rate:g}" for rate in PRACTICAL]
    conditions = {
        "drift grows with the rate": slopes[SFT].low > 0,
        "fine-tuning loses behaviour": all(changed[SFT][rate].high < 0 for rate in practical),
        "distillation stays": all(changed["distill, full"][rate].low > -STAYS for rate in practical),
        "distillation drifts less": all(versus_sft[rate].high < 0 for rate in practical),
        "it comes back": all(back["distill, full"][rate].high < 0 for rate in practical),
    }
    direction = ("drift grows with the rate", "distillation drifts less", "it comes back")
    numbers = {
        "slopes": slopes,
        "instructions_changed": changed,
        "log_kl_distill_over_sft": versus_sft,
        "log_kl_back": back,
        "decayed_changed": Estimate.of([_accuracy(r["decayed"]) - _accuracy(r["start"]) for r in records]),
        "conditions": conditions,
    }
    partly = all(conditions[name] for name in direction)
    high = practical[-1]
    return Finding(
        verdict="holds" if all(conditions.values()) else "direction only" if partly else "does not hold here",
        ours=f"Instructions after 100 steps at {high}, in points: self-SFT {changed[SFT][high].points()}, "
        f"full self-distillation {changed['distill, full'][high].points()}, with sampled tokens "
        f"{changed['distill, sampled'][high].points()}. From a spoiled start full distillation multiplies KL by "
        f"{_factor(back['distill, full'][high])}",
        text=_text(numbers),
        numbers=numbers,
        table=_table(records),
        charts=_charts(records),
    )


SFT = "sft, fresh"
ARMS = (SFT, "sft, fixed", "distill, full", "distill, sampled")
BACK = ("distill, full", "sft, teacher's samples", "sft, own samples")
# Points of accuracy that distillation may lose and still be said to stay.
STAYS = 0.01
# Nats: below, a KL is rounding.
FLOOR = 1e-9


def _run(record: Record, arm: str, rate: float, group: str = "arms") -> Mapping[str, Any]:
    return next(run for tried, run in record[group][arm] if tried == rate)


def _kl(record: Record, arm: str, rate: float, group: str = "arms") -> float:
    return max(FLOOR, _run(record, arm, rate, group)["kl"])


def _kls(record: Record, arm: str) -> list[tuple[float, float]]:
    return [(rate, _kl(record, arm, rate)) for rate, _ in record["arms"][arm]]


def _accuracy(state: Mapping[str, Any], task: str = "instructions", decoding: str = "t1") -> float:
    return state["scores"][task][decoding]


def _instructions_changed(record: Record, arm: str, rate: float) -> float:
    return _accuracy(_run(record, arm, rate)) - _accuracy(record["start"])


def _log_kl_over_sft(record: Record, arm: str, rate: float) -> float:
    return math.log(_kl(record, arm, rate) / _kl(record, SFT, rate))


def _log_kl_back(record: Record, arm: str, rate: float) -> float:
    """Negative: nearer to the model without noise than before."""
    return math.log(_kl(record, arm, rate, "back") / max(FLOOR, record["spoiled"]["kl"]))


def _by_rate(
    records: Sequence[Record], arm: str, value: Callable[[Record, str, float], float], group: str = "arms"
) -> dict[str, Estimate]:
    rates = [rate for rate, _ in records[0][group][arm]]
    return {f"{rate:g}": Estimate.of([value(record, arm, rate) for record in records]) for rate in rates}


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Of log y on log x, by least squares."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    middle_x, middle_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - middle_x) * (y - middle_y) for x, y in logs) / sum((x - middle_x) ** 2 for x, _ in logs)


def _factor(logs: Estimate) -> str:
    return logs.exponential().show("{:.3g}")


def _text(numbers: Mapping[str, Any]) -> str:
    changed, back = numbers["instructions_changed"], numbers["log_kl_back"]
    failed = [name for name, met in numbers["conditions"].items() if not met]
    return (
        "Instructions followed at temperature 1, change in points after 100 steps: "
        + "; ".join(f"{arm}, {_each(changed[arm], Estimate.points)}" for arm in ARMS)
        + f"; fresh samples with linear decay from {DECAYED:g}: {numbers['decayed_changed'].points()}. "
        f"In fine-tuning on fresh samples, KL from the start grows with the rate to the power of "
        f"{numbers['slopes'][SFT].show('{:.2f}')}. Full distillation's KL is that of fine-tuning times "
        f"{_each(numbers['log_kl_distill_over_sft'], _factor)}. From the spoiled start, KL is multiplied by: "
        + "; ".join(f"{arm}, {_each(back[arm], _factor)}" for arm in BACK)
        + (f". Conditions that fail: {', '.join(failed)}. " if failed else ". All five conditions are met. ")
        + "That distillation from oneself stays says little: its gradient is zero there; the spoiled one is the test. "
        "The rule is about the full estimator; with sampled tokens, as in the article, the gradient is zero only on "
        "average."
    )


def _each(by_rate: Mapping[str, Estimate], show: Callable[[Estimate], str]) -> str:
    return ", ".join(f"{show(estimate)} at {rate}" for rate, estimate in by_rate.items())


def _table(records: Sequence[Record]) -> list[dict[str, str]]:
    rows = [_row("start", "", [record["start"] for record in records])]
    for arm in ARMS:
        for rate, _ in records[0]["arms"][arm]:
            rows.append(_row(arm, f"{rate:g}", [_run(record, arm, rate) for record in records]))
    rows.append(_row("sft, fresh, linear decay", f"{DECAYED:g}", [record["decayed"] for record in records]))
    rows.append(_row("spoiled start", "", [record["spoiled"] for record in records]))
    for arm in BACK:
        for rate, _ in records[0]["back"][arm]:
            rows.append(_row(f"from it: {arm}", f"{rate:g}", [_run(record, arm, rate, "back") for record in records]))
    return rows


def _row(name: str, rate: str, states: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Means over pipelines, accuracy in %."""
    cells = {"arm": name, "rate": rate}
    for task, title in (("instructions", "instructions"), ("old", "old facts")):
        means = (sum(_accuracy(s, task, decoding) for s in states) / len(states) for decoding in ("t1", "greedy"))
        cells[f"{title}, T = 1 / greedy"] = " / ".join(f"{100 * mean:.1f}" for mean in means)
    return cells | {"KL(start, student)": f"{sum(s['kl'] for s in states) / len(states):.2g}"}


def _charts(records: Sequence[Record]) -> list[Chart]:
    def lines(y: Callable[[Mapping[str, Any]], float]) -> list[Series]:
        return [
            mean_curve(arm, [[(rate, y(run)) for rate, run in record["arms"][arm]] for record in records])
            for arm in ARMS
        ]

    shared = {"x_label": "learning rate", "log_x": True}
    start = sum(_accuracy(record["start"]) for record in records) / len(records)
    return [
        Chart(
            "instructions",
            lines(_accuracy),
            shared
            | {
                "title": "Instructions after 100 steps of self-training",
                "y_label": "accuracy at temperature 1",
                "percent": True,
                "references": [("start", start)],
            },
        ),
        Chart(
            "divergence",
            lines(lambda run: math.log10(max(FLOOR, run["kl"]))),
            shared | {"title": "How far self-training moves the model", "y_label": "log10 of KL, nats per token"},
        ),
    ]


CLAIM = Claim(
    name="c5_self_training",
    title="Learning from oneself",
    article="Fine-tuning on its own samples costs a model IF-eval at every practical learning rate; on-policy "
    "distillation from itself has no gradient and stays.",
    limits="One tiny model that can only fall, one batch size and one optimizer. At p = q distillation stays by "
    "construction; the way back from a spoiled start is the test. The verdict is that of the full estimator.",
    settings={"cpu": Settings(), "gpu": Settings(), "smoke": Settings(2, 64)},
    search=search,
    pipeline=pipeline,
    analyse=analyse,
)

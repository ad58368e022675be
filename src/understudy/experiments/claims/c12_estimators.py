"""C12: estimators. How noisy each gradient is on the same rollouts, and how fast the student learns with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from understudy.advantages import CreditRules, training_examples
from understudy.assembly import Given, Parts, assemble
from understudy.backends.loading import load_student
from understudy.backends.local import LocalTrainer
from understudy.batching import micro_batches
from understudy.config import RunConfig
from understudy.costs import CostLedger
from understudy.experiments.bench import MAX_TOKENS, PER_STEP, T1, LedgerBench
from understudy.experiments.claim import Chart, Claim, Estimate, Finding, Record, Verdict, column, mean_curve
from understudy.experiments.lab import Lab, Run
from understudy.experiments.search import Search, searched
from understudy.objectives import Objective
from understudy.preflight import check_run
from understudy.rollouts import sample_rollouts, step_seed
from understudy.signals import Needs, build_objective, credit_rules, resolve_estimator, score_needs
from understudy.teacher_scores import score_rollouts
from understudy.types import ScoredRollout

ARMS: Mapping[str, Mapping[str, Any]] = {
    "full": {"objective.estimator": "full"},
    "sampled": {"objective.estimator": "sampled"},
    "baseline": {"objective.estimator": "sampled", "objective.baseline": True},
    "discount 0.5": {"objective.estimator": "sampled", "objective.discount": 0.5},
    "discount 1": {"objective.estimator": "sampled", "objective.discount": 1.0},
    "top 4": {"objective.estimator": "topk", "objective.topk": 4, "objective.tail": "bucket"},
    "top 16": {"objective.estimator": "topk", "objective.topk": 16, "objective.tail": "bucket"},
}


@dataclass(frozen=True)
class Settings:
    """Optimizer steps, how often accuracy is looked at, and the batches that gradients are compared on."""

    steps: int = 40
    every: int = 10
    batches: int = 24


@dataclass(frozen=True)
class Estimator:
    """What makes an arm's gradient from a batch of rollouts."""

    rules: CreditRules
    needs: Needs
    objective: Objective


def search(lab: Lab, settings: Settings, arm: str) -> Search:
    """Accuracy at temperature 1 on the validation problems after all steps."""
    bench = LedgerBench.of(lab)

    def score(rate: float) -> float:
        run = bench.distill(rate, settings.steps, ARMS[arm])
        return bench.evaluate(run.student, "validation", (1.0,)).metrics[T1]

    return searched(score)


def pipeline(lab: Lab, settings: Settings, rates: Mapping[str, float]) -> Record:
    """Gradients of the start, then a run of each arm."""
    bench = LedgerBench.of(lab)
    gradients = measure(bench, settings.batches)
    runs = {arm: bench.distill(rates[arm], settings.steps, ARMS[arm], every=settings.every) for arm in ARMS}
    return {
        "gradients": {arm: compare(gradients[arm], gradients["full"]) for arm in ARMS},
        "arms": {arm: _arm_record(run) for arm, run in runs.items()},
    }


def _arm_record(run: Run) -> dict[str, Any]:
    return {"accuracy": run.curve(T1), "flops": run.curve("cost/flops")[-1][1]}


def measure(bench: LedgerBench, batches: int) -> dict[str, Tensor]:
    """Every arm's gradient [batches, P] of the untrained start on the same batches of ``PER_STEP`` solutions, each
    batch divided by its number of tokens."""
    parts, trainer = _parts(bench, batches)
    teachers = dict(parts.page_teachers)
    estimators = {arm: _estimator(parts.config, settings, teachers) for arm, settings in ARMS.items()}
    rows: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
    for number in range(batches):
        prompts = parts.prompts_at(number)
        groups = sample_rollouts(parts.sampler, prompts, parts.config.sampling, seed=step_seed(0, number))
        rollouts = list(chain.from_iterable(groups))
        scores: dict[Any, list[Any]] = {}
        for arm, estimator in estimators.items():
            # Hidden states come with the marks of the written tokens: one pass of the teacher serves both kinds.
            kind = "topk" if estimator.needs.teacher == "topk" else "hidden"
            key = (kind, estimator.needs.topk if kind == "topk" else 0)
            if key not in scores:
                scores[key] = score_rollouts(teachers, rollouts, key[0], topk=key[1])
            scored = [ScoredRollout(*pair, reward=None) for pair in zip(rollouts, scores[key], strict=True)]
            rows[arm].append(_gradient(parts, trainer, estimator, scored))
    return {arm: torch.stack(gradients) for arm, gradients in rows.items()}


def _parts(bench: LedgerBench, batches: int) -> tuple[Parts, LocalTrainer]:
    """What a run of the loop would be made of, with a trainer whose gradients can be read."""
    config = RunConfig.model_validate(
        {
            "output_dir": "none",
            "seed": bench.lab.pipeline,
            "num_threads": 1,
            "student": {"model": str(bench.world.start), "dtype": "float32", "compute_dtype": "float32"},
            "teacher": {"model": str(bench.world.teacher), "dtype": "float32"},
            "prompts": {"path": str(bench.prompts(batches * PER_STEP))},
            "sampling": {"group_size": 1, "groups_per_batch": PER_STEP, "max_completion_tokens": MAX_TOKENS},
            "objective": {"estimator": "full"},
        }
    )
    checked = check_run(config, "distill")
    trainer = LocalTrainer(load_student(config.student, vocab_size=checked.vocab_size), config.optim)
    return assemble(config, checked, CostLedger(), checkpoint=None, given=Given(trainer=trainer)), trainer


def _estimator(config: RunConfig, settings: Mapping[str, Any], teachers: Mapping[str, Any]) -> Estimator:
    values = {name.removeprefix("objective."): value for name, value in settings.items()}
    objective = config.objective.model_copy(update={"estimator": "sampled", **values})
    resolved = resolve_estimator(config.model_copy(update={"objective": objective}), teachers)
    return Estimator(
        credit_rules(resolved, special_ids=frozenset()),
        score_needs(resolved.objective),
        build_objective(resolved, teachers, None),
    )


def _gradient(parts: Parts, trainer: LocalTrainer, estimator: Estimator, scored: Sequence[ScoredRollout]) -> Tensor:
    """[P], in float64."""
    examples = training_examples([[one] for one in scored], estimator.rules)
    batches = micro_batches(examples, **parts.batching)
    for batch in batches:
        trainer.forward_backward(batch, estimator.objective)
    flat = []
    for parameter in trainer.model.model.parameters():
        assert parameter.grad is not None
        flat.append(parameter.grad.flatten().double().cpu())
        parameter.grad = None
    return torch.cat(flat) / sum(batch.num_tokens for batch in batches)


def compare(own: Tensor, full: Tensor) -> dict[str, float]:
    """Of gradients [B, P]: ``signal``, the squared length of the expected gradient; ``noise``, the mean squared
    distance of a batch's gradient from it; their product with the full estimator's, ``overlap``; the squared length
    of the difference of both expectations, ``bias``. All without the bias that noise would bring: of products, only
    those of two different batches count."""
    difference = own - full
    return {
        "signal": expected_product(own, own),
        "noise": float((own - own.mean(0)).square().sum()) / (len(own) - 1),
        "full_signal": expected_product(full, full),
        "overlap": expected_product(own, full),
        "bias": expected_product(difference, difference),
        "batch_cosine": float(torch.nn.functional.cosine_similarity(own, full, dim=1).mean()),
    }


def expected_product(left: Tensor, right: Tensor) -> float:
    """The product of two expectations, from draws [B, P] of both: the mean over pairs of different batches."""
    batches = len(left)
    everything = float(left.sum(0) @ right.sum(0)) - float((left * right).sum())
    return everything / (batches * (batches - 1))


def analyse(records: Sequence[Record]) -> Finding:
    """The pass rule of experiments/c12_estimators/README.md."""
    ratios = {f"{one} / {other}": _ratio(records, one, other) for one, other in PAIRS}
    numbers: dict[str, Any] = {
        "SNR": {arm: Estimate.geometric([_snr(record, arm) for record in records]) for arm in ARMS},
        "SNR ratio": ratios,
        "bias": {arm: Estimate.of([_bias(record, arm) for record in records]) for arm in ARMS if arm != "full"},
        "accuracy - sampled": {arm: _lead(records, arm) for arm in ARMS if arm != "sampled"},
    }
    signals, ratio = numbers["SNR"], ratios["full / sampled"]
    return Finding(
        verdict=_verdict(numbers),
        ours=f"Signal-to-noise, full / sampled: {ratio.show('{:.1f}')}; sampled {signals['sampled'].mean:.2f}, with "
        f"discount 1 {signals['discount 1'].mean:.2f}",
        text=_text(len(records), numbers),
        numbers=numbers,
        table=[_row(records, arm, numbers) for arm in ARMS],
        charts=[_chart(records)],
    )


PAIRS = (
    ("full", "sampled"),
    ("full", "baseline"),
    ("baseline", "sampled"),
    ("discount 0.5", "sampled"),
    ("discount 1", "sampled"),
)
DISCOUNTED = ("discount 0.5", "discount 1")
# A signal that this many batches cannot tell from none counts as this much.
LOWEST_SNR = 1e-3
# Share of the expected gradient's squared length that counts as no bias.
UNBIASED = 0.05
# Share of solutions: "no gain" means that one of this size is ruled out.
GAIN = 0.03


def _snr(record: Record, arm: str) -> float:
    entry = record["gradients"][arm]
    return max(entry["signal"] / entry["noise"], LOWEST_SNR) if entry["noise"] > 0 else LOWEST_SNR


def _ratio(records: Sequence[Record], one: str, other: str) -> Estimate:
    return Estimate.geometric([_snr(record, one) / _snr(record, other) for record in records])


def _bias(record: Record, arm: str) -> float:
    """Squared length of the difference of the expected gradients, relative to the full estimator's."""
    full = record["gradients"][arm]["full_signal"]
    return record["gradients"][arm]["bias"] / full if full > 0 else 1.0


def _cosine(record: Record, arm: str) -> float | None:
    entry = record["gradients"][arm]
    product = entry["signal"] * entry["full_signal"]
    return entry["overlap"] / math.sqrt(product) if entry["signal"] > 0 and product > 0 else None


def _accuracy(record: Record, arm: str) -> float:
    return record["arms"][arm]["accuracy"][-1][1]


def _lead(records: Sequence[Record], arm: str) -> Estimate:
    return Estimate.of([_accuracy(record, arm) - _accuracy(record, "sampled") for record in records])


def _verdict(numbers: Mapping[str, Any]) -> Verdict:
    ratios = numbers["SNR ratio"]
    gains = any(numbers["accuracy - sampled"][arm].low > 0 for arm in DISCOUNTED)
    if ratios["full / sampled"].low <= 1 or gains:
        return "does not hold here"
    ordered = all(ratios[pair].low > 1 for pair in ("full / baseline", "baseline / sampled"))
    lowered = all(ratios[f"{arm} / sampled"].high < 1 for arm in DISCOUNTED)
    unbiased = all(numbers["bias"][arm].high < UNBIASED for arm in ("sampled", "baseline"))
    excluded = all(numbers["accuracy - sampled"][arm].high < GAIN for arm in DISCOUNTED)
    return "holds" if ordered and lowered and unbiased and excluded else "direction only"


def _text(pipelines: int, numbers: Mapping[str, Any]) -> str:
    ratios, bias, leads = numbers["SNR ratio"], numbers["bias"], numbers["accuracy - sampled"]

    gains = [f"{arm} {lead.show('{:+.3f}')}" for arm, lead in leads.items()]

    def shown(pair: str) -> str:
        return ratios[pair].show("{:.2f}")

    return (
        f"{pipelines} pipelines, means with 95% intervals; gradients of the start on batches of {PER_STEP} solutions. "
        f"Signal-to-noise, as ratios: full / sampled {shown('full / sampled')}, full / baseline "
        f"{shown('full / baseline')}, baseline / sampled {shown('baseline / sampled')} (each must lie above 1); "
        f"discount 0.5 / sampled {shown('discount 0.5 / sampled')}, discount 1 / sampled "
        f"{shown('discount 1 / sampled')} (each must lie below 1). Squared difference from the full estimator's "
        f"expected gradient, relative to it: sampled {bias['sampled'].show('{:.3f}')}, baseline "
        f"{bias['baseline'].show('{:.3f}')} (each must lie below {UNBIASED}), top 4 {bias['top 4'].show('{:.3f}')}, "
        f"top 16 {bias['top 16'].show('{:.3f}')}. Accuracy at the end, minus that of sampled: {', '.join(gains)}; "
        f"those of the discounts must not lie above 0, and if the claim is to hold they must end below {GAIN:+}, so "
        "that a gain of that size is ruled out. The table of rates says whether a discount's rate was at an edge."
    )


def _row(records: Sequence[Record], arm: str, numbers: Mapping[str, Any]) -> dict[str, str]:
    noise = Estimate.geometric(
        [r["gradients"][arm]["noise"] / (r["gradients"]["full"]["noise"] or 1.0) or 1.0 for r in records]
    )
    cosines = [_cosine(record, arm) for record in records]
    known = [cosine for cosine in cosines if cosine is not None]
    accuracy = Estimate.of([_accuracy(record, arm) for record in records])
    return {
        "arm": arm,
        "signal-to-noise": numbers["SNR"][arm].show("{:.2f}"),
        "noise / that of full": f"{noise.mean:.1f}",
        "cosine of the expected gradient with that of full": f"{sum(known) / len(known):.2f}" if known else "unknown",
        "cosine in one batch": f"{sum(column(records, 'gradients', arm, 'batch_cosine')) / len(records):.2f}",
        "accuracy at the end": accuracy.show("{:.1%}"),
    }


def _chart(records: Sequence[Record]) -> Chart:
    series = [mean_curve(arm, [record["arms"][arm]["accuracy"] for record in records]) for arm in ARMS]
    labels = {"x_label": "optimizer step", "y_label": "right final values", "percent": True}
    return Chart("accuracy", series, {"title": "Accuracy at temperature 1", **labels})


CLAIM = Claim(
    name="c12_estimators",
    title="Estimators",
    article="The penalty of the sampled token alone is enough, with discount 0; larger discounts are more correct and "
    "brought no gain. Replications call it unbiased and noisy, and a KL over the vocabulary its quieter form.",
    limits="161 tokens and solutions of 55; noise is measured at the start only. With larger vocabularies and longer "
    "texts samples are noisier.",
    settings={"cpu": Settings(), "gpu": Settings(), "smoke": Settings(2, 1, 2)},
    search=search,
    pipeline=pipeline,
    analyse=analyse,
    arms=tuple(ARMS),
)

"""C10: mode seeking. A teacher goes one of two ways; which way goes a student that knows one of them better?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from understudy.experiments.bench import PER_STEP, TEST_SEED, TRAIN_SEED, VALIDATION_SEED
from understudy.experiments.claim import Chart, Claim, Estimate, Finding, Record, Verdict, column, mean_curve
from understudy.experiments.code import code_hash
from understudy.experiments.lab import Lab, Run
from understudy.experiments.search import Search, searched
from understudy.experiments.solutions import load, read, solutions
from understudy.report.charts import Series
from understudy.worlds import routes

MAX_TOKENS = routes.COMPLETION_LENGTH + 2
# Models of pipeline p are drawn from this seed + p.
FIRST_SEED = 101
T1, GREEDY = "eval/routes/t1", "eval/routes/greedy"
ON_POLICY: Mapping[str, Mapping[str, Any]] = {
    "forward KL": {"objective.estimator": "full", "objective.divergence": "forward_kl"},
    "JSD": {"objective.estimator": "full", "objective.divergence": "jsd", "objective.beta": 0.5},
    "reverse KL": {"objective.estimator": "full"},
    "sampled": {"objective.estimator": "sampled"},
    # The same signal; every token, the route's too, also answers for all that comes after it.
    "whole solution": {"objective.estimator": "sampled", "objective.discount": 1.0},
}
ARMS = (*ON_POLICY, "sft")


@dataclass(frozen=True)
class Settings:
    """Optimizer steps, how often accuracy is looked at, completions per problem at the end; and steps of the two
    models' own training."""

    steps: int = 120
    every: int = 40
    samples: int = 16
    teacher_steps: int = routes.RECIPES["teacher"].steps
    start_steps: int = routes.RECIPES["start"].steps


@dataclass(frozen=True)
class RoutesBench:
    """One pipeline's two models, and each method as one call."""

    lab: Lab
    teacher: Path
    start: Path

    @classmethod
    def of(cls, lab: Lab, settings: Settings) -> RoutesBench:
        """Trains what is not in the cache."""
        steps: dict[routes.Role, int] = {"teacher": settings.teacher_steps, "start": settings.start_steps}
        return cls(lab, *(_model(lab, role, number) for role, number in steps.items()))

    def problems(self, n: int, seed: int) -> Path:
        return self.lab.file(routes.prompt_rows(n, seed + self.lab.pipeline))

    @property
    def test(self) -> Path:
        return self.problems(self.lab.scale.num_test, TEST_SEED)

    def evaluate(self, model: Path, problems: Path, temperatures: tuple[float, ...], samples: int = 1) -> Run:
        task = _task(problems, temperatures, samples)
        return self.lab.evaluate(model, task, max_completion_tokens=MAX_TOKENS)

    def train(self, arm: str, rate: float, settings: Settings, every: int = 0) -> Run:
        """An arm from the start, on fresh problems; ``every``: 0 for no evaluation on the way."""
        tree: dict[str, Any] = {
            "seed": self.lab.pipeline,
            "num_threads": 1,
            "student": {"model": self.start, "dtype": "float32", "compute_dtype": "float32"},
            "sampling": {"group_size": 1, "groups_per_batch": PER_STEP, "max_completion_tokens": MAX_TOKENS},
            "optim": {"learning_rate": rate, "num_steps": settings.steps, "warmup_steps": 5, "betas": [0.9, 0.98]},
            "checkpoints": {"every": settings.steps, "keep": 1},
            "rollouts": {"per_step": 0},
        }
        if every:
            tree["evaluation"] = {"every": every, "tasks": [_task(self.test, (1.0,))]}
        problems = self.problems(settings.steps * PER_STEP, TRAIN_SEED)
        if arm == "sft":
            samples = self._teacher_samples(problems)
            return self.lab.run("sft", tree | {"prompts": {"path": samples}, "supervised": {"batch_size": PER_STEP}})
        tree |= {"prompts": {"path": problems}, "teacher": {"model": self.teacher, "dtype": "float32"}}
        return self.lab.run("distill", tree, ON_POLICY[arm])

    def _teacher_samples(self, problems: Path) -> Path:
        tree = {
            "seed": self.lab.pipeline,
            "num_threads": 1,
            "student": {"model": self.start},
            "teacher": {"model": self.teacher, "dtype": "float32"},
            "prompts": {"path": problems},
            "sampling": {"group_size": 1, "max_completion_tokens": MAX_TOKENS},
        }
        return self.lab.run("generate", tree).samples

    def choices(self, model: Path) -> dict[str, float]:
        """What ``model`` leaves open, over its own solutions of the test problems at temperature 1: entropy of the
        choice of route (the first word) and of all tokens, in nats, and the mean probability of either route."""
        writer = load(model)
        scores = read(writer, solutions(writer, model, self.test, max_tokens=MAX_TOKENS))
        logprobs = [writer.head.logprobs(score.teacher_hidden.to(writer.device)) for score in scores]
        first = torch.stack([one[0] for one in logprobs])
        left, right = (float(first[:, routes.TOKENS.index(route)].exp().mean()) for route in ("L", "R"))
        entropies = {"route_entropy": mean_entropy(first), "token_entropy": mean_entropy(torch.cat(logprobs))}
        return {**entropies, "left": left, "right": right}


def mean_entropy(logprobs: torch.Tensor) -> float:
    """Of distributions [N, V], in nats."""
    return float(-(logprobs.exp() * logprobs).sum(-1).mean())


def _task(problems: Path, temperatures: tuple[float, ...], samples: int = 1) -> dict[str, Any]:
    return {
        "name": "routes",
        "path": problems,
        "grader": "understudy.worlds.routes:grade",
        "temperatures": temperatures,
        "samples": samples,
    }


def _model(lab: Lab, role: routes.Role, steps: int) -> Path:
    recipe = replace(routes.RECIPES[role], steps=steps)
    key = {
        "world": "routes",
        "role": role,
        "recipe": asdict(recipe),
        "seed": FIRST_SEED + lab.pipeline,
        "code": code_hash(("worlds/models", "worlds/pretrain", "worlds/routes")),
    }
    return lab.cache.folder(
        "models", key, lambda folder: routes.build(folder, role=role, recipe=recipe, seed=key["seed"])
    )


def search(lab: Lab, settings: Settings, arm: str) -> Search:
    """Accuracy at temperature 1 on the validation problems after all steps."""
    bench = RoutesBench.of(lab, settings)
    validation = bench.problems(lab.scale.num_validation, VALIDATION_SEED)

    def score(rate: float) -> float:
        return bench.evaluate(bench.train(arm, rate, settings).student, validation, (1.0,)).metrics[T1]

    return searched(score)


def pipeline(lab: Lab, settings: Settings, rates: Mapping[str, float]) -> Record:
    """Every arm from the same start; start and teacher as they are."""
    bench = RoutesBench.of(lab, settings)
    models = {"teacher": bench.teacher, "start": bench.start}
    curves: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        run = bench.train(arm, rates[arm], settings, every=settings.every)
        models[arm] = run.student
        curves[arm] = {"accuracy": run.curve(T1), "left": run.curve(f"{T1}_left")}
    return {"models": {name: _measured(bench, settings, model) for name, model in models.items()}, "curves": curves}


def _measured(bench: RoutesBench, settings: Settings, model: Path) -> dict[str, Any]:
    """Accuracy of one and of several completions, of each route where it was taken, and what is left open."""
    metrics = bench.evaluate(model, bench.test, (0.0, 1.0), settings.samples).metrics
    passes = {f"pass@{k}": metrics[f"{T1}_pass@{k}"] for k in (1, 2, 4, 8)}
    of_routes = {name: metrics.get(f"{T1}_{name}") for name in ("right_left", "right_right")}
    return {"greedy": metrics[GREEDY], **passes, **of_routes, **bench.choices(model)}


def analyse(records: Sequence[Record]) -> Finding:
    """The pass rule of experiments/c10_mode_seeking/README.md."""
    arms = ("reverse KL", "whole solution", "forward KL")
    numbers = {
        **{f"commoner route, {arm}": Estimate.of([commoner(record, arm) for record in records]) for arm in arms},
        "route entropy, reverse - forward KL": difference(records, "route_entropy", "reverse KL", "forward KL"),
        "route entropy, whole solution - forward KL": difference(
            records, "route_entropy", "whole solution", "forward KL"
        ),
        "token entropy, reverse - forward KL": difference(records, "token_entropy", "reverse KL", "forward KL"),
        "P(left), whole solution - sampled": difference(records, "left", "whole solution", "sampled"),
        "route entropy, whole solution - sampled": difference(records, "route_entropy", "whole solution", "sampled"),
        "pass@1, reverse - forward KL": difference(records, "pass@1", "reverse KL", "forward KL"),
        "pass@8, reverse - forward KL": difference(records, "pass@8", "reverse KL", "forward KL"),
        "pass@8, whole solution - sampled": difference(records, "pass@8", "whole solution", "sampled"),
    }
    shares = {arm: _mean(records, arm, commoner) for arm in ("forward KL", "reverse KL", "whole solution")}
    by_token = _seeks(numbers["route entropy, reverse - forward KL"], numbers["commoner route, reverse KL"])
    by_solution = _seeks(
        numbers["route entropy, whole solution - forward KL"], numbers["commoner route, whole solution"]
    )
    verdict: Verdict = "does not hold here"
    if by_solution:
        verdict = "holds" if by_token else "direction only"
    return Finding(
        verdict=verdict,
        ours="Share of the commoner route: "
        + ", ".join(f"{arm} {share:.0%}" for arm, share in shares.items())
        + f" (teacher {_mean(records, 'teacher', commoner):.0%})",
        text=_text(len(records), numbers, by_token, by_solution),
        numbers=numbers,
        table=[_row(records, name) for name in ("teacher", "start", *ARMS)],
        charts=_charts(records),
    )


# A route with this share of the solutions dominates.
DOMINANT = 0.9


def _seeks(entropy: Estimate, share: Estimate) -> bool:
    """Whether the choice of route is narrower than after the forward KL, and one route dominates."""
    return entropy.high < 0 and share.low >= DOMINANT


def commoner(record: Record, name: str) -> float:
    """The larger share of the two routes."""
    left, right = record["models"][name]["left"], record["models"][name]["right"]
    return max(left, right) / (left + right)


def difference(records: Sequence[Record], measure: str, one: str, other: str) -> Estimate:
    """Of two arms, pipeline by pipeline."""
    pairs = (column(records, "models", arm, measure) for arm in (one, other))
    return Estimate.of([a - b for a, b in zip(*pairs, strict=True)])


def _mean(records: Sequence[Record], name: str, measure: Callable[[Record, str], float]) -> float:
    return sum(measure(record, name) for record in records) / len(records)


def _text(pipelines: int, numbers: Mapping[str, Estimate], by_token: bool, by_solution: bool) -> str:
    def of(name: str, form: str = "{:+.3f}") -> str:
        return numbers[name].show(form)

    def met(condition: bool) -> str:
        return "met" if condition else "not met"

    narrower = numbers["route entropy, whole solution - sampled"].high < 0
    borne_out = narrower and numbers["P(left), whole solution - sampled"].low > 0
    return (
        f"{pipelines} pipelines, means with 95% intervals. Two forms of the reverse KL are judged alike: the entropy "
        "of the route minus that after the forward KL must lie below 0, and the commoner route must have "
        f"{DOMINANT:.0%} of the probability. The verdict is holds if both do so, direction only if the second does. "
        "Token by token, where the optimum is the teacher's shares for every divergence, so that nothing but a passing "
        "state can meet it: "
        f"{of('route entropy, reverse - forward KL')} nats and {of('commoner route, reverse KL', '{:.1%}')}, "
        f"{met(by_token)}. Over whole solutions: {of('route entropy, whole solution - forward KL')} nats and "
        f"{of('commoner route, whole solution', '{:.1%}')}, {met(by_solution)}. After the forward KL the commoner "
        f"route has {of('commoner route, forward KL', '{:.1%}')}. The explanation under test is credit: charged with "
        "what comes after it, the route that is known worse should lose. Whole solution minus sampled: "
        f"{of('route entropy, whole solution - sampled')} nats (must lie below 0) and "
        f"{of('P(left), whole solution - sampled')} for the route known better (must lie above 0); it is "
        f"{'borne out' if borne_out else 'not borne out'}. Not part of the rule: entropy of a token, reverse minus "
        f"forward KL, {of('token entropy, reverse - forward KL')} nats, at a difference in pass@1 of "
        f"{of('pass@1, reverse - forward KL')}; pass@8 {of('pass@8, reverse - forward KL')}, and whole solution minus "
        f"sampled {of('pass@8, whole solution - sampled')}."
    )


def _row(records: Sequence[Record], name: str) -> dict[str, str]:
    def cell(measure: str, form: str) -> str:
        values = [record["models"][name][measure] for record in records]
        known = [value for value in values if value is not None]
        return form.format(sum(known) / len(known)) if known else "none written"

    return {
        "arm": name,
        "goes left": cell("left", "{:.1%}"),
        "entropy of the route": cell("route_entropy", "{:.3f}"),
        "entropy of a token": cell("token_entropy", "{:.3f}"),
        "pass@1": cell("pass@1", "{:.1%}"),
        "pass@8": cell("pass@8", "{:.1%}"),
        "greedy": cell("greedy", "{:.1%}"),
        "right of those that go left": cell("right_left", "{:.1%}"),
        "right of those that go right": cell("right_right", "{:.1%}"),
    }


def _charts(records: Sequence[Record]) -> list[Chart]:
    def lines(measure: str) -> list[Series]:
        return [mean_curve(arm, [record["curves"][arm][measure] for record in records]) for arm in ARMS]

    teacher = ("teacher", sum(column(records, "models", "teacher", "left")) / len(records))
    common = {"x_label": "optimizer step", "percent": True}
    left = {"title": "Solutions that go left", "y_label": "share", "references": [teacher], **common}
    right = {"title": "Accuracy at temperature 1", "y_label": "right solutions", **common}
    return [Chart("routes", lines("left"), left), Chart("accuracy", lines("accuracy"), right)]


CLAIM = Claim(
    name="c10_mode_seeking",
    title="Mode seeking",
    article="The reverse KL is mode seeking: the student settles on one of the teacher's ways of answering instead of "
    "spreading over several. Stated as a property; no experiment, no numbers.",
    limits="Two routes that differ from their first word on, a small student that knows one of them better, 120 "
    "steps; styles that mix within a text are another matter.",
    settings={"cpu": Settings(), "gpu": Settings(), "smoke": Settings(2, 1, 8, 2, 2)},
    search=search,
    pipeline=pipeline,
    analyse=analyse,
    arms=ARMS,
)

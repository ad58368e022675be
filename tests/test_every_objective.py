"""Every objective is reachable from [objective] alone, resumes, and lowers what it says it lowers.

The last part trains the ledger demo's small models for a few steps per objective and compares exact numbers: the
divergence over the whole vocabulary, at the states that fresh rollouts visit, before and after.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import understudy
from test_docs import generic, tables
from understudy import RunConfig
from understudy.assembly import Parts
from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import load_model
from understudy.backends.local import LocalSampler, LocalTeacher, LocalTrainer
from understudy.batching import micro_batches
from understudy.loop import on_policy_loop, sample, score
from understudy.losses import distribution_divergence, topk_divergence
from understudy.rollout_store import read_rollouts
from understudy.signals import build_objective, credit_rules, resolve_estimator, score_needs
from understudy.tokenization import load_text
from understudy.types import Batch, Prompt, ScoredRollout, TrainingExample
from understudy.worlds.ledger import Ledger
from understudy.worlds.ledger_demo import ARMS
from user import metrics, save_model, tree, word_tokenizer, write_rows, write_toml

METRICS = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"


@dataclass(frozen=True)
class Case:
    """[objective], the estimator it becomes, and metrics it must leave; ``grader``, ``reference``, ``teacher``: whether
    there is such a section."""

    objective: Mapping[str, Any]
    estimator: str
    metrics: tuple[str, ...] = ()
    reference: bool = False
    grader: bool = False
    teacher: bool = True


RATIO = ("ratio/mean", "ratio/max", "ratio/abs_log_mean", "ratio/abs_log_max", "reverse_kl/mean")
CLIPPED = (*RATIO, "ratio/clipped_share")
TOPK = ("topk/divergence", "topk/student_mass", "topk/teacher_mass", "reverse_kl/mean")
ENTROPIES = ("entropy/student", "entropy/teacher", "reverse_kl/mean")
FULL = (*ENTROPIES, "reverse_kl/full")
EXTRAPOLATED = {"extrapolation": 1.25}
ANCHORED = {"anchor_coef": 0.5}

CASES: dict[str, Case] = {
    "default": Case({}, "full", FULL),
    "full": Case({"estimator": "full", "kl_coef": 0.5}, "full", FULL),
    "forward KL": Case({"divergence": "forward_kl"}, "full", (*ENTROPIES, "forward_kl/full")),
    "JSD": Case({"divergence": "jsd"}, "full", (*ENTROPIES, "jsd/full")),
    "JSD near the forward KL": Case({"divergence": "jsd", "beta": 0.1}, "full", ("jsd/full",)),
    "JSD at the reverse KL": Case({"divergence": "jsd", "beta": 1.0}, "full", ("jsd/full",)),
    "skewed KL": Case({"divergence": "skewed_kl"}, "full", (*ENTROPIES, "skewed_kl/full")),
    "skewed reverse KL": Case({"divergence": "skewed_reverse_kl", "skew": 0.3}, "full", ("skewed_reverse_kl/full",)),
    "entropy-gated": Case({"divergence": "entropy_gated"}, "full", ("entropy_gated/full", "entropy_gated/share")),
    "sampled": Case({"estimator": "sampled"}, "sampled", RATIO),
    "baseline": Case({"baseline": True}, "sampled", (*RATIO, "reverse_kl/full")),
    "discount 1": Case({"discount": 1.0}, "sampled", RATIO),
    "discount 0.5": Case({"discount": 0.5}, "sampled", RATIO),
    "clip": Case({"signal_clip": 3.0}, "sampled", (*RATIO, "reverse_kl/clipped_share")),
    "PPO": Case({"loss": "ppo"}, "sampled", CLIPPED),
    "CISPO": Case({"loss": "cispo", "clip_high": 4.0}, "sampled", CLIPPED),
    "TIS": Case({"max_importance_ratio": 2.0}, "sampled", CLIPPED),
    "band": Case({"importance_band": [0.5, 2.0]}, "sampled", CLIPPED),
    **{
        f"top-k of {chosen_by}, {tail}": Case(
            {"estimator": "topk", "topk": 8, "topk_set": chosen_by, "tail": tail},
            "topk",
            (*TOPK, "topk/overlap") if chosen_by == "union" else TOPK,
        )
        for chosen_by in ("teacher", "student", "union")
        for tail in ("bucket", "renormalize", "stop_gradient")
    },
    "extrapolation, full": Case(
        EXTRAPOLATED, "full", (*FULL, "reference_kl/full", "reference_kl/mean"), reference=True
    ),
    "extrapolation, sampled": Case(
        EXTRAPOLATED | {"estimator": "sampled"}, "sampled", (*RATIO, "reference_kl/mean"), reference=True
    ),
    "extrapolation, clipped": Case(
        EXTRAPOLATED | {"signal_clip": 4.0}, "sampled", ("reverse_kl/clipped_share",), reference=True
    ),
    "anchor, full": Case(ANCHORED, "full", (*FULL, "reference_kl/full", "reference_kl/mean"), reference=True),
    "anchor, sampled": Case(
        ANCHORED | {"estimator": "sampled"}, "sampled", (*RATIO, "reference_kl/mean"), reference=True
    ),
    "anchor, top-k": Case(
        ANCHORED | {"estimator": "topk", "topk": 8}, "topk", (*TOPK, "reference_kl/full"), reference=True
    ),
    "rewards, full": Case({"reward_coef": 0.1}, "full", (*FULL, "ratio/mean", "reward/mean"), grader=True),
    "rewards, sampled": Case(
        {"reward_coef": 0.1, "estimator": "sampled", "normalize_rewards": True},
        "sampled",
        (*RATIO, "reward/mean"),
        grader=True,
    ),
    "rewards, top-k": Case(
        {"reward_coef": 0.1, "estimator": "topk", "topk": 8}, "topk", (*TOPK, "ratio/mean"), grader=True
    ),
    "rewards by PPO, full": Case(
        {"reward_coef": 0.1, "estimator": "full", "loss": "ppo"}, "full", (*FULL, *CLIPPED), grader=True
    ),
    "sum": Case({"reduction": "sum"}, "full", FULL),
    "sequence mean": Case({"reduction": "sequence_mean"}, "full", FULL),
    "sequence mean, sampled": Case({"reduction": "sequence_mean", "estimator": "sampled"}, "sampled", RATIO),
    "first tokens": Case({"tokens": {"first": 3}}, "full", FULL),
    "first half of the cap": Case({"tokens": {"first": 0.5}}, "full", FULL),
    "span": Case({"tokens": {"span": [0.0, 0.3]}}, "full", FULL),
    "half-life": Case({"tokens": {"half_life": 2.0}}, "full", FULL),
    "half-life, sampled": Case({"tokens": {"half_life": 2.0}, "estimator": "sampled"}, "sampled", RATIO),
    "no special tokens": Case({"tokens": {"mask_special": True}}, "full", FULL),
}
# Signals to compare with: they lower nothing on purpose.
CONTROLS: dict[str, Case] = {
    "control: fixed negative": Case({"control": "fixed_negative"}, "sampled", RATIO),
    "control: fixed negative without a teacher": Case(
        {"control": "fixed_negative"}, "sampled", RATIO[:-1], teacher=False
    ),
    "control: shuffled teacher": Case({"control": "shuffled_teacher"}, "sampled", RATIO),
}
REACHABLE = CASES | CONTROLS


def by_length(prompt: Prompt, completion: str, finish_reason: str) -> float:
    """A reward that random models earn now and then."""
    return float(len(completion.split()) % 2)


class World:
    """A folder with tiny models, rows, and one run per case, made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for seed, name in enumerate(("student", "teacher", "start")):
            save_model(folder / name, word_tokenizer(), seed=seed)
        write_rows(folder / "rows.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(1, 5)])
        self.run = cache(self._run)

    def toml(self, case: Case, out: str, **sections: Any) -> Path:
        """[objective] is all that differs between cases, but for the models and the grader that it talks about."""
        teacher = self.folder / "teacher" if case.teacher else None
        content = tree(self.folder / "student", teacher, self.folder / "rows.jsonl", self.folder / out, **sections)
        content["objective"] = dict(case.objective)
        content["rollouts"]["per_step"] = 0
        if case.reference:
            content["reference"] = {"model": str(self.folder / "start")}
        if case.grader:
            content["reward"] = {"grader": "test_every_objective:by_length"}
        return write_toml(self.folder / f"{out}.toml", content)

    def _run(self, name: str) -> Path:
        config = RunConfig.from_toml(self.toml(REACHABLE[name], name.replace(" ", "_")))
        return understudy.distill(config, quiet=True).folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("objectives"))


def written(folder: Path) -> set[str]:
    return {generic(name) for row in metrics(folder) for name in row}


@pytest.mark.parametrize("name", REACHABLE)
def test_every_objective_is_reachable_from_toml_with_no_other_change(name: str, world: World) -> None:
    case, folder = REACHABLE[name], world.run(name)
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2]
    stored = RunConfig.from_toml(folder / "config.toml").objective
    assert stored.estimator == case.estimator
    assert stored.control == case.objective.get("control", "none")  # a control's run says so
    assert set(case.metrics) <= written(folder)
    assert written(folder) <= {row[0] for row in tables(METRICS)}
    # Something was learnt from.
    before = load_file(world.folder / "student" / "model.safetensors")
    after = load_file(folder / "checkpoints" / "step_000002" / "model.safetensors")
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert ("reference_scoring" in json.loads((folder / "costs.json").read_text())["roles"]) == case.reference


def test_every_documented_metric_is_written_by_some_objective(world: World) -> None:
    """Evaluations, parts, lags, servers that are away, and what guards find apart, which have tests of their own."""
    apart = (
        "eval/",
        "by_",
        "policy_lag/",
        "teacher/away_share",
        "teacher/temperature_ratio",
        "teacher/rejected_end",
        "update/skipped",
        "update/nonfinite",
    )
    documented = {row[0] for row in tables(METRICS) if not row[0].startswith(apart)}
    assert documented == set().union(*(written(world.run(name)) for name in REACHABLE))


def test_rl_with_an_anchor_is_reachable(world: World) -> None:
    case = Case(ANCHORED, "sampled", reference=True, grader=True)
    result = understudy.rl(RunConfig.from_toml(world.toml(case, "rl_anchored")), quiet=True)
    names = written(result.folder)
    assert {"reference_kl/mean", "reward/mean", "ratio/mean"} <= names
    assert "reverse_kl/mean" not in names
    stored = RunConfig.from_toml(result.folder / "config.toml")
    assert (stored.objective.estimator, stored.objective.reward_coef, stored.teacher) == ("sampled", 1.0, None)


def test_sampling_stops_where_training_does(world: World) -> None:
    for row in metrics(world.run("first tokens")):
        assert row["completion_length/max"] <= 3
    assert max(row["completion_length/max"] for row in metrics(world.run("default"))) > 3


def test_the_sft_of_a_file_that_names_a_reference_does_not_load_it(world: World) -> None:
    path = world.toml(CASES["anchor, full"], "sft", reference={"model": "/no/such/model"})
    write_rows(world.folder / "pairs.jsonl", [{"prompt": "w1 w2", "completion": "w3"}] * 2)
    overrides = {"reference.model": "/no/such/model", "prompts.path": str(world.folder / "pairs.jsonl")}
    result = understudy.sft(RunConfig.from_toml(path, overrides), quiet=True)
    assert [row["step"] for row in metrics(result.folder)] == [1, 2]


@pytest.mark.parametrize("objective", [{"estimator": "full"}, {"baseline": True}, {"divergence": "jsd"}], ids=str)
@pytest.mark.parametrize("method", ["rl", "sft"])
def test_a_distillations_file_serves_rl_and_sft_and_resumes(
    world: World, method: str, objective: Mapping[str, Any]
) -> None:
    """A teacher's settings do not apply there, and are stored as they were written."""
    out = f"{method}_{next(iter(objective))}"
    path = world.toml(Case(objective, "sampled", grader=True), out)
    write_rows(world.folder / "pairs.jsonl", [{"prompt": "w1 w2", "completion": "w3"}] * 2)
    overrides: dict[str, object] = {"prompts.path": str(world.folder / "pairs.jsonl")} if method == "sft" else {}
    run = getattr(understudy, method)
    run(RunConfig.from_toml(path, {**overrides, "optim.num_steps": 1}), quiet=True)
    result = run(RunConfig.from_toml(path, {**overrides, "optim.num_steps": 2}), quiet=True, resume=True)
    assert [row["step"] for row in metrics(result.folder)] == [1, 2]
    stored = RunConfig.from_toml(result.folder / "config.toml").objective
    assert all(getattr(stored, key) == value for key, value in objective.items())


def test_stored_rollouts_say_which_tokens_trained(world: World) -> None:
    case = Case({"estimator": "sampled", "tokens": {"span": [0.0, 0.5]}}, "sampled")
    config = RunConfig.from_toml(world.toml(case, "kept"), {"rollouts.per_step": 8, "rollouts.every": 1})
    folder = understudy.distill(config, quiet=True).folder
    records = read_rollouts(folder / "rollouts" / "step_000000.jsonl")
    assert any(False in record["loss_mask"] for record in records)
    for record in records:
        length = len(record["completion_ids"])
        assert record["loss_mask"] == [t < -(-length // 2) for t in range(length)]
        assert all(keep or credit == 0 for keep, credit in zip(record["loss_mask"], record["advantages"], strict=True))


def test_a_shuffled_teachers_page_with_one_rollout(world: World) -> None:
    case = Case({"control": "shuffled_teacher"}, "sampled")
    overrides = {"rollouts.per_step": 1, "sampling.group_size": 1, "sampling.groups_per_batch": 2}
    folder = understudy.distill(RunConfig.from_toml(world.toml(case, "one"), overrides), quiet=True).folder
    assert len(read_rollouts(folder / "rollouts" / "step_000002.jsonl")) == 1


def test_an_exotic_objective_resumes_bit_for_bit(world: World) -> None:
    case = Case(
        {
            "estimator": "topk",
            "topk": 8,
            "topk_set": "union",
            "tail": "renormalize",
            "anchor_coef": 0.5,
            "reward_coef": 0.1,
            "max_importance_ratio": 2.0,
            "reduction": "sequence_mean",
            "tokens": {"half_life": 3.0, "span": [0.0, 0.9], "mask_special": True},
        },
        "topk",
        reference=True,
        grader=True,
    )
    sections = {"checkpoints": {"every": 2, "keep": 9}}
    whole = RunConfig.from_toml(world.toml(case, "whole", **sections), {"optim.num_steps": 4})
    understudy.distill(whole, quiet=True)
    halved = world.toml(case, "halved", **sections)
    understudy.distill(RunConfig.from_toml(halved, {"optim.num_steps": 2}), quiet=True)
    understudy.distill(RunConfig.from_toml(halved, {"optim.num_steps": 4}), quiet=True, resume=True)
    rows, expected = (metrics(world.folder / name) for name in ("halved", "whole"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    timeless = [
        [{k: v for k, v in row.items() if "seconds" not in k and "time/" not in k} for row in r]
        for r in (rows, expected)
    ]
    assert timeless[0] == timeless[1]
    last = "checkpoints/step_000004/model.safetensors"
    assert (world.folder / "halved" / last).read_bytes() == (world.folder / "whole" / last).read_bytes()


# --- On the demo's models: what each objective is the gradient of gets smaller. ---------------------------------------

# The demo's 64 completions a step, cut after two items: what lies further ahead adds most of the sampled variance.
STEPS, GROUPS, CAP, LOOKED_AT = 8, 32, 6, 48
LEARNING_RATES = {arm.name: arm.learning_rate for arm in ARMS}


@dataclass(frozen=True)
class Demo:
    """The ledger's models, loaded once, and prompts for every step."""

    start: Any
    teacher: LocalTeacher
    prompts: Sequence[Prompt]
    stop_ids: frozenset[int]
    decode: Callable[[Sequence[int]], str]


@pytest.fixture(scope="module")
def demo() -> Demo:
    folder = Path(str(files("understudy.worlds") / "assets" / "ledger"))
    text = load_text(str(folder / "start"), "student")
    start, teacher = (
        load_model(str(folder / name), role=name, dtype=torch.float32, device=torch.device("cpu"))
        for name in ("start", "teacher")
    )
    rows = Ledger().prompt_rows(GROUPS * STEPS, 1)
    prompts = [Prompt(i, text.tokenizer.encode(row["prompt"]), row["prompt"]) for i, row in enumerate(rows)]
    frozen = LocalTeacher(LanguageModel(teacher.requires_grad_(False)))
    return Demo(start, frozen, prompts, frozenset(text.end_ids), text.tokenizer.decode)


class Nobody:
    """In the recorder's place."""

    first_step = 0

    def inspect(
        self, row: Mapping[str, float], scored: Sequence[ScoredRollout], examples: Sequence[TrainingExample]
    ) -> None:
        pass

    def keep_rollouts(self, step: int, scored: Sequence[ScoredRollout], examples: Sequence[TrainingExample]) -> None:
        pass

    def record(self, step: int, row: Mapping[str, float]) -> None:
        pass

    def finish_step(self) -> str:
        return "go on"


def different_words(prompt: Prompt, completion: str, finish_reason: str) -> float:
    """A dense reward: the share of different words."""
    words = completion.split()
    return len(set(words)) / max(1, len(words))


def parts_of(case: Case, demo: Demo, **sections: Any) -> Parts:
    """What a run with this [objective] works with, on a fresh copy of the start model; it doubles as reference."""
    arm = "distill-sampled" if case.estimator == "sampled" else "distill-full"
    tree: dict[str, Any] = {
        "output_dir": "unused",
        "seed": 3,
        "student": {"model": "start"},
        "teacher": {"model": "teacher"} if case.teacher else None,
        "reference": {"model": "start"} if case.reference else None,
        "objective": dict(case.objective),
        "sampling": {"group_size": 2, "groups_per_batch": GROUPS, "max_completion_tokens": CAP},
        "optim": {"learning_rate": LEARNING_RATES[arm], "num_steps": STEPS, "warmup_steps": 5, "betas": [0.9, 0.98]},
    }
    teachers = {"default": demo.teacher} if case.teacher else {}
    config = resolve_estimator(RunConfig.model_validate(tree | sections), teachers)
    assert config.objective.estimator == case.estimator
    student = LanguageModel(copy.deepcopy(demo.start))
    reference = LocalTeacher(LanguageModel(demo.start)) if case.reference else None
    sampler = LocalSampler(student, stop_ids=demo.stop_ids)
    return Parts(
        config=config,
        sampler=sampler,
        teachers=teachers,
        page_teachers=teachers,
        page_reference=None,
        reference=reference,
        trainer=LocalTrainer(student, config.optim),
        evaluator=sampler,
        objective=build_objective(config, teachers, reference),
        needs=score_needs(config.objective),
        grader=different_words if case.grader else None,
        prompts=demo.prompts,
        tasks=[],
        decode=demo.decode,
        batching={"micro_batch_tokens": 16384, "dtype": torch.float32},
        credit=credit_rules(config, special_ids=frozenset()),
    )


@torch.no_grad()
def exact_objective(parts: Parts, demo: Demo) -> float:
    """The expectation of the run's loss at the states of fresh rollouts, over the whole vocabulary: nothing in it is
    what the run itself computed."""
    objective, rules = parts.config.objective, parts.credit
    looked_at = replace(
        parts,
        needs=replace(parts.needs, teacher="hidden", reference="hidden"),
        # The mask and the weights of the run's own rules; hidden states for what stands here.
        credit=replace(rules, estimator="full", control="none"),
    )
    scored, examples = score(looked_at, sample(looked_at, demo.prompts[:LOOKED_AT], seed=12345))
    [batch] = micro_batches(examples, micro_batch_tokens=10**9, dtype=torch.float64)
    assert isinstance(parts.trainer, LocalTrainer)
    student = parts.trainer.model
    hidden = student.hidden(batch.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)[batch.token_index]
    p = student.head.logits(hidden).double()
    q = demo.teacher.head.logits(batch.teacher_hidden).double()  # type: ignore[arg-type]
    value = of_teacher(objective, p, q, batch)
    if parts.reference is not None:
        r = LanguageModel(demo.start).head.logits(batch.reference_hidden).double()  # type: ignore[arg-type]
        drift = objective.kl_coef * (1 - objective.extrapolation) + objective.anchor_coef
        value += drift * distribution_divergence(p, r, batch.loss_mask, weights=batch.weights).loss
    total = float(value)
    if parts.grader is not None:
        total -= rules.reward_coef * sum(s.reward or 0.0 for s in scored)
    # With discount 1 the sum over a completion is what counts; else the mean over tokens.
    divisors = {"token_mean": batch.num_tokens, "sequence_mean": batch.num_sequences, "sum": len(scored)}
    return total / (len(scored) if objective.discount == 1 else divisors[objective.reduction])


def of_teacher(objective: Any, p: Tensor, q: Tensor, batch: Batch) -> Tensor:
    """Weighted sum of the objective's own divergence. With a log-ratio held constant on part of the vocabulary there is
    no number that the gradient is of; the whole reverse KL, which it stands for, is looked at instead."""
    if objective.estimator == "topk" and objective.tail != "stop_gradient":
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        own, others = (x.topk(objective.topk, dim=-1).indices for x in (log_p, log_q))
        kept = torch.zeros_like(p, dtype=torch.bool)
        for name, ids in (("student", own), ("teacher", others)):
            if objective.topk_set in (name, "union"):
                kept.scatter_(1, ids, True)
        log_p, log_q = (x.masked_fill(~kept, -torch.inf) for x in (log_p, log_q))
        loss = topk_divergence(log_p, log_q, batch.loss_mask, tail=objective.tail, weights=batch.weights).loss
        return objective.kl_coef * loss
    kind = objective.divergence
    options = {name: getattr(objective, name) for name in ("beta", "skew", "entropy_threshold")}
    loss = distribution_divergence(p, q, batch.loss_mask, kind=kind, weights=batch.weights, **options).loss
    return objective.kl_coef * objective.extrapolation * loss


# A partly discounted return is the gradient of no number that could be looked up.
# Others differ from their neighbours in name only here: no special token is written, on the policy nothing is clipped.
LEFT_OUT = ("discount 0.5", "no special tokens", "full", "rewards by PPO, full")
LOWERED = [name for name in CASES if name not in LEFT_OUT]


@pytest.mark.parametrize("name", LOWERED)
def test_a_short_run_lowers_its_own_exact_objective(name: str, demo: Demo) -> None:
    parts = parts_of(CASES[name], demo)
    before = exact_objective(parts, demo)
    on_policy_loop(parts, Nobody())  # type: ignore[arg-type]
    after = exact_objective(parts, demo)
    assert after < before


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_train_on_the_demos_models_too(name: str, demo: Demo) -> None:
    parts = parts_of(CONTROLS[name], demo, optim={"learning_rate": 3e-4, "num_steps": 2})
    on_policy_loop(parts, Nobody())  # type: ignore[arg-type]
    assert isinstance(parts.trainer, LocalTrainer)
    pairs = zip(demo.start.parameters(), parts.trainer.model.model.parameters(), strict=True)
    assert any(not torch.equal(before, after) for before, after in pairs)

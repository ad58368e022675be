"""`understudy demo`: four ways to improve one student on the ledger world, side by side at equal samples."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from understudy.config import RunConfig
from understudy.worlds.jobs import Job, run_jobs, with_sampling_cost, write_rows
from understudy.worlds.ledger import Ledger

NUM_STEPS = 100
SAMPLES_PER_STEP = 64
NUM_TEST = 1024
# Seeds of the problem sets; the learning rates were chosen on problems of seed 98 (recipes/ledger/README.md).
TRAIN_SEED, TEST_SEED, VALIDATION_SEED = 1, 99, 98


@dataclass(frozen=True)
class ArmPlan:
    """One method with its searched learning rate. ``seconds``: as measured once, for the time left."""

    name: str
    method: str
    learning_rate: float
    seconds: float
    settings: Mapping[str, Any]
    description: str


ON_POLICY = {"sampling.group_size": 1, "sampling.groups_per_batch": SAMPLES_PER_STEP}
ARMS = (
    ArmPlan(
        "distill-full",
        "distill",
        1e-3,
        45,
        ON_POLICY | {"objective.estimator": "full"},
        "on-policy distillation, exact reverse KL over the vocabulary",
    ),
    ArmPlan("sft", "sft", 3e-3, 35, {}, "fine-tuning on fresh teacher solutions, each used once"),
    ArmPlan(
        "distill-sampled",
        "distill",
        3e-4,
        45,
        ON_POLICY | {"objective.estimator": "sampled"},
        "on-policy distillation, reverse KL of the written token",
    ),
    ArmPlan(
        "rl",
        "rl",
        3e-4,
        40,
        {"sampling.group_size": 8, "sampling.groups_per_batch": 8, "objective.normalize_rewards": True},
        "outcome-reward RL, 8 prompts x 8, reward 1 for a right final value",
    ),
)


def prepare(folder: Path) -> None:
    """Copy the two models and write prompts and test problems: everything the commands read."""
    models = files("understudy.worlds") / "assets" / "ledger"
    for role in ("teacher", "start"):
        with as_file(models / role) as source:
            shutil.copytree(source, folder / "models" / role)
    world = Ledger()
    write_rows(folder / "prompts.jsonl", world.prompt_rows(NUM_STEPS * SAMPLES_PER_STEP, TRAIN_SEED))
    write_rows(folder / "test.jsonl", world.prompt_rows(NUM_TEST, TEST_SEED))


def arm_config(folder: Path, arm: ArmPlan, *, seed: int = 0, every: int = 25) -> RunConfig:
    """The TOML tree of one arm, for a folder made by ``prepare``."""
    tree: dict[str, Any] = {
        "output_dir": str(folder / arm.name),
        "seed": seed,
        "num_threads": 1,
        "student": {"model": str(folder / "models" / "start")},
        "prompts": {"path": str(folder / ("samples/samples.jsonl" if arm.method == "sft" else "prompts.jsonl"))},
        "sampling": {"max_completion_tokens": 60},
        "objective": {},
        "optim": {
            "learning_rate": arm.learning_rate,
            "num_steps": NUM_STEPS,
            "warmup_steps": 5,
            "betas": [0.9, 0.98],
        },
        "evaluation": {
            "every": every,
            "tasks": [{"name": "ledger", "path": str(folder / "test.jsonl"), "grader": "ledger"}],
        },
        "rollouts": {"every": every, "per_step": 64},
    }
    if arm.method == "distill":
        tree["teacher"] = {"model": str(folder / "models" / "teacher")}
    if arm.method == "rl":
        tree["reward"] = {"grader": "ledger"}
    for key, value in arm.settings.items():
        section, name = key.split(".")
        tree[section][name] = value
    return RunConfig.model_validate(tree)


def side_configs(folder: Path, *, seed: int = 0) -> dict[str, RunConfig]:
    """The teacher's solutions for `sft`, and the teacher's own accuracy."""
    teacher, test = str(folder / "models" / "teacher"), str(folder / "test.jsonl")
    common = {"seed": seed, "num_threads": 1}
    samples = {
        "output_dir": str(folder / "samples"),
        "student": {"model": str(folder / "models" / "start")},
        "teacher": {"model": teacher},
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "sampling": {"group_size": 1, "max_completion_tokens": 60},
    }
    reference = {
        "output_dir": str(folder / "teacher"),
        "student": {"model": teacher},
        "sampling": {"max_completion_tokens": 60},
        "evaluation": {"tasks": [{"name": "ledger", "path": test, "grader": "ledger"}]},
    }
    return {
        "samples": RunConfig.model_validate(common | samples),
        "teacher": RunConfig.model_validate(common | reference),
    }


def write_jobs(folder: Path, *, seed: int = 0, smoke: bool = False) -> list[Job]:
    """One TOML file per command in ``folder``, and the jobs that run them."""
    flags = ["--smoke"] if smoke else []
    suffix = "-smoke" if smoke else ""
    jobs = []
    for name, config in side_configs(folder, seed=seed).items():
        path = _write(folder / f"{name}.toml", config)
        command = "generate" if name == "samples" else "eval"
        # The smoke form of sft reads what the smoke form of generate wrote.
        jobs.append(Job(name, [command, str(path), *flags], folder / f"{name}{suffix}", seconds=12))
    for arm in ARMS:
        config = arm_config(folder, arm, seed=seed)
        path = _write(folder / f"{arm.name}.toml", config)
        extra = (
            ["--prompts.path", str(folder / f"samples{suffix}/samples.jsonl")] if smoke and arm.method == "sft" else []
        )
        jobs.append(
            Job(
                arm.name,
                [arm.method, str(path), *extra, *flags],
                folder / f"{arm.name}{suffix}",
                seconds=arm.seconds,
                num_steps=2 if smoke else NUM_STEPS,
                after=("samples",) if arm.method == "sft" else (),
            )
        )
    order = ["samples", "distill-full", "sft", "distill-sampled", "rl", "teacher"]
    return sorted(jobs, key=lambda job: order.index(job.name))


def _write(path: Path, config: RunConfig) -> Path:
    path.write_text(config.to_toml(), encoding="utf-8")
    return path


def run_demo(
    folder: Path, *, seed: int = 0, slots: int = 2, smoke: bool = False
) -> tuple[list[Job], Mapping[str, float]]:
    """Prepare, run every arm; jobs and their seconds. The page is made by ``ledger_page.write_page``."""
    prepare(folder)
    jobs = write_jobs(folder, seed=seed, smoke=smoke)
    return jobs, run_jobs(jobs, logs=folder / "logs", title="ledger demo", slots=slots)


def arm_rows(jobs: Sequence[Job]) -> dict[str, list[dict[str, Any]]]:
    """Metrics rows per arm; the rows of `sft` carry their share of what the teacher's solutions cost."""
    by_name = {job.name: job for job in jobs}
    rows = {arm.name: by_name[arm.name].rows() for arm in ARMS}
    return rows | {"sft": with_sampling_cost(rows["sft"], by_name["samples"], NUM_STEPS)}

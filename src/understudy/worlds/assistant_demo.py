"""`understudy demo assistant`: an assistant learns company facts, loses its manners, gets them back from itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.config import RunConfig
from understudy.report import Arm, RolloutPair, write_comparison
from understudy.rollout_store import read_rollouts
from understudy.worlds import assistant
from understudy.worlds.jobs import Job, count_rows, run_jobs, with_sampling_cost, write_rows
from understudy.worlds.models import build_qwen3, save_folder

DOCUMENTS_PER_STEP, SAMPLES_PER_STEP = 24, 64


@dataclass(frozen=True)
class Plan:
    """Optimizer steps of the phases."""

    assistant: int = 1500
    midtrained: int = 400
    recovery: int = 60

    def steps(self, phase: str) -> int:
        """Of one phase; 0 for the one that only samples."""
        own = {"assistant": self.assistant, "midtrained": self.midtrained, "samples": 0}
        return own.get(phase, self.recovery)


FULL, SMOKE = Plan(), Plan(2, 2, 2)
_CARD = "# Untrained assistant\n\nThree layers of width 64, random weights: where `understudy demo assistant` begins.\n"
_TITLE = "New knowledge in, old behaviour back: the assistant world"
_INTRO = (
    "An assistant is trained from nothing to follow formatting instructions and to answer questions about old "
    "facts. Mid-training on company documents teaches it new facts and costs it its manners. Its earlier self, as"
    " teacher, gives them back on the instructions alone; no document is shown again. Beside it: fine-tuning on "
    "the earlier self's answers."
)
_LIMITS = (
    "Limits: a model of 160 thousand weights and 240 invented facts. Fine-tuning on the earlier self's answers "
    "restores the behaviour too: this shows recovery by self-distillation, not an advantage over fine-tuning. "
    "Facts are asked in a form that mid-training shows among others; a fact counts as known when the whole answer"
    " is right."
)


def prepare(folder: Path, plan: Plan = FULL, *, seed: int = 0) -> None:
    """The untrained model and every file the phases read."""
    tokenizer = assistant.tokenizer()
    model = build_qwen3(tokenizer, hidden_size=64, num_layers=3, num_heads=4, seed=seed)
    save_folder(model, tokenizer, folder / "models" / "untrained", _CARD)
    write_rows(folder / "chats.jsonl", assistant.stage0_rows(plan.assistant, seed))
    write_rows(folder / "documents.jsonl", assistant.document_rows(plan.midtrained * DOCUMENTS_PER_STEP, seed + 50))
    count = plan.recovery * SAMPLES_PER_STEP // 2
    write_rows(folder / "instructions.jsonl", assistant.instruction_rows(count, seed + 77))
    write_rows(folder / "test_instructions.jsonl", assistant.instruction_rows(400, 999))
    write_rows(folder / "test_new_facts.jsonl", assistant.question_rows("new"))
    write_rows(folder / "test_old_facts.jsonl", assistant.question_rows("old"))


def configs(folder: Path, plan: Plan = FULL, *, seed: int = 0) -> dict[str, tuple[str, RunConfig]]:
    """(command, configuration) of every phase, in order."""

    def phase(name: str, student: str, **sections: Any) -> RunConfig:
        tasks = [{"name": task, "path": str(folder / f"test_{task}.jsonl")} for task in _TASKS]
        tree: dict[str, Any] = {
            "output_dir": str(folder / name),
            "seed": seed,
            "num_threads": 1,
            "student": {"model": str(folder / student)},
            "sampling": {"max_completion_tokens": 16},
            "evaluation": {"every": 20 if name in ("distill", "sft-control") else 0, "tasks": tasks},
            "checkpoints": {"every": 200},
        }
        return RunConfig.model_validate(tree | sections)

    chats, documents, instructions, samples = (
        {"path": str(folder / name)}
        for name in ("chats.jsonl", "documents.jsonl", "instructions.jsonl", "samples/samples.jsonl")
    )
    begun, midtrained = (f"{n}/checkpoints/step_{plan.steps(n):06d}" for n in ("assistant", "midtrained"))
    teacher = {"model": str(folder / begun)}
    chat_rows = count_rows(folder / "chats.jsonl") // plan.assistant
    optim = _optim(plan)
    on_policy = {"prompts": instructions, "sampling": _SAMPLING, "teacher": teacher}
    kept = {"every": plan.recovery, "per_step": 64}
    return {
        "assistant": (
            "sft",
            phase(
                "assistant",
                "models/untrained",
                prompts=chats,
                supervised={"batch_size": chat_rows},
                optim=optim["assistant"],
            ),
        ),
        "midtrained": (
            "sft",
            phase(
                "midtrained",
                begun,
                prompts=documents,
                supervised={"batch_size": DOCUMENTS_PER_STEP},
                optim=optim["midtrained"],
            ),
        ),
        "distill": ("distill", phase("distill", midtrained, optim=optim["recovery"], rollouts=kept, **on_policy)),
        "samples": ("generate", phase("samples", begun, **on_policy)),
        "sft-control": (
            "sft",
            phase(
                "sft-control",
                midtrained,
                prompts=samples,
                supervised={"batch_size": SAMPLES_PER_STEP},
                optim=optim["recovery"],
            ),
        ),
    }


_TASKS = ("instructions", "new_facts", "old_facts")
_SAMPLING = {"group_size": 2, "groups_per_batch": SAMPLES_PER_STEP // 2, "max_completion_tokens": 16}


def _optim(plan: Plan) -> dict[str, dict[str, Any]]:
    """Schedules of the two phases that learn from text, and of the two that recover behaviour."""
    betas = [0.9, 0.98]
    linear = {"schedule": "linear", "betas": betas}
    return {
        "assistant": linear
        | {
            "learning_rate": 3e-3,
            "num_steps": plan.assistant,
            "warmup_steps": 50,
            "final_fraction": 0.02,
            "weight_decay": 0.01,
        },
        "midtrained": linear | {"learning_rate": 1e-3, "num_steps": plan.midtrained, "warmup_steps": 10},
        "recovery": {"learning_rate": 3e-4, "num_steps": plan.recovery, "warmup_steps": 5, "betas": betas},
    }


_AFTER = {
    "assistant": (),
    "midtrained": ("assistant",),
    "distill": ("midtrained",),
    "samples": ("assistant",),
    "sft-control": ("midtrained", "samples"),
}
_SECONDS = {"assistant": 130.0, "midtrained": 25.0, "distill": 25.0, "samples": 10.0, "sft-control": 20.0}


def write_jobs(folder: Path, plan: Plan = FULL, *, seed: int = 0) -> list[Job]:
    """One TOML file per phase in ``folder``, and the jobs that run them."""
    jobs = []
    for name, (command, config) in configs(folder, plan, seed=seed).items():
        path = folder / f"{name}.toml"
        path.write_text(config.to_toml(), encoding="utf-8")
        jobs.append(Job(name, [command, str(path)], folder / name, _SECONDS[name], plan.steps(name), _AFTER[name]))
    return jobs


def run_demo(
    folder: Path, plan: Plan = FULL, *, seed: int = 0, slots: int = 2
) -> tuple[list[Job], Mapping[str, float]]:
    """Prepare and run every phase; jobs and their seconds."""
    prepare(folder, plan, seed=seed)
    jobs = write_jobs(folder, plan, seed=seed)
    return jobs, run_jobs(jobs, logs=folder / "logs", title="assistant demo", slots=slots)


_STAGES = (
    ("assistant", "assistant"),
    ("after the documents", "midtrained"),
    ("distilled from the assistant", "distill"),
    ("sft control", "sft-control"),
)


def _rows(jobs: Sequence[Job]) -> dict[str, list[dict[str, Any]]]:
    """Metrics rows per phase; the control's carry their share of what the earlier self's answers cost."""
    by_name = {job.name: job for job in jobs}
    rows = {job.name: job.rows() for job in jobs if job.num_steps}
    control = by_name["sft-control"]
    return rows | {control.name: with_sampling_cost(rows[control.name], by_name["samples"], control.num_steps)}


def table_rows(jobs: Sequence[Job]) -> list[dict[str, str]]:
    """Accuracy of every stage on instructions and facts."""
    rows = _rows(jobs)
    table = []
    for label, name in _STAGES:
        row = rows[name][-1]
        cells = {"model": label}
        for task, title in (("instructions", "instructions"), ("new_facts", "new facts"), ("old_facts", "old facts")):
            for mode, suffix in (("greedy", ""), ("t1", ", T = 1")):
                value, error = row[f"eval/{task}/{mode}"], row[f"eval/{task}/{mode}_se"]
                cells[title + suffix] = f"{100 * value:.1f} ± {100 * error:.1f}"
        cells["steps"] = str(row["step"])
        cells["GFLOP"] = f"{row['cost/flops'] / 1e9:.0f}"
        cells["seconds"] = f"{row['cost/seconds']:.0f}"
        table.append(cells)
    return table


def verdict(jobs: Sequence[Job]) -> str:
    """One paragraph that says no more than the numbers do, and the setting's limits."""
    last = {job.name: job.rows()[-1] for job in jobs if job.num_steps}

    def share(name: str, task: str, mode: str = "greedy") -> str:
        return f"{last[name][f'eval/{task}/{mode}']:.1%}"

    return (
        f"The assistant follows {share('assistant', 'instructions')} of the instructions. Mid-training on documents "
        f"alone takes new facts from {share('assistant', 'new_facts')} to {share('midtrained', 'new_facts')} and "
        f"instructions down to {share('midtrained', 'instructions')}. "
        f"{last['distill']['step']} steps of distillation from the earlier self "
        f"bring instructions to {share('distill', 'instructions')}, with new facts at {share('distill', 'new_facts')} "
        f"greedy ({share('distill', 'new_facts', 't1')} at temperature 1, from "
        f"{share('midtrained', 'new_facts', 't1')}) and old facts at {share('distill', 'old_facts')}. The control, "
        f"fine-tuned on the earlier self's answers to the same instructions, ends at "
        f"{share('sft-control', 'instructions')} instructions and {share('sft-control', 'new_facts')} new facts."
        f"\n\n{_LIMITS}"
    )


def write_page(folder: Path, jobs: Sequence[Job]) -> tuple[list[dict[str, str]], str, Path]:
    """(table, verdict, path of report.html) of a finished demo."""
    by_name = {job.name: job for job in jobs}
    table, paragraph, rows = table_rows(jobs), verdict(jobs), _rows(jobs)
    arms = [
        Arm("distilled from the earlier self", rows["distill"], "on-policy, full reverse KL"),
        Arm("sft control", rows["sft-control"], "fine-tuning on the earlier self's answers"),
    ]
    rollouts = by_name["distill"].folder / "rollouts"
    after = {
        (r["prompt_index"], r["sample_index"]): r
        for r in read_rollouts(rollouts / f"step_{by_name['distill'].num_steps:06d}.jsonl")
    }
    pairs = [
        RolloutPair(
            record, after[record["prompt_index"], record["sample_index"]], {}, {}, "After the documents", "Distilled"
        )
        for record in read_rollouts(rollouts / "step_000000.jsonl")
        if record["sample_index"] == 0
    ]
    path = write_comparison(
        arms,
        folder / "report.html",
        title=_TITLE,
        intro=_INTRO,
        table=table,
        verdict=paragraph,
        commands=[(job.name, job.rerun_command) for job in jobs],
        before_after=pairs[:12],
        footnotes=[
            "Accuracy on 400 instructions, 160 new and 80 old facts, ± one standard error over problems. The control's "
            "price includes its share of the earlier self's sampling."
        ],
    )
    return table, paragraph, path

"""The Python API: one function per command, the same code path."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from understudy.advantages import training_examples
from understudy.assembly import Given, Parts, assemble, set_threads
from understudy.backends.loading import load_student
from understudy.backends.local import LocalSampler
from understudy.backends.protocols import Sampler, Teacher, Trainer
from understudy.checkpoints import checkpoint_path, write_atomic, write_json
from understudy.config import RunConfig, StudentConfig
from understudy.costs import CostLedger, MeteredSampler
from understudy.evaluation import evaluate_tasks
from understudy.loop import on_policy_loop
from understudy.preflight import Checked, Method, check_run
from understudy.recorder import Recorder
from understudy.rewards import grade_rollouts
from understudy.rollouts import sample_rollouts, step_seed
from understudy.runs import RunFolder, StopRequest
from understudy.supervised import supervised_examples, supervised_loop
from understudy.tasks import Grader
from understudy.teacher_scores import score_rollouts
from understudy.types import ScoredRollout


@dataclass(frozen=True)
class RunResult:
    """Where a run stands. ``metrics`` is its last row; ``interrupted_at`` the step a Ctrl-C ended it after."""

    folder: Path
    student: Path | None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    interrupted_at: int | None = None


def distill(
    config: RunConfig,
    *,
    sampler: Sampler | None = None,
    teachers: Mapping[str, Teacher] | None = None,
    trainer: Trainer | None = None,
    rewards: Grader | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> RunResult:
    """On-policy distillation. Anything with the protocols' methods can stand in for the configured parts.

    Raises ConfigError before any weights are read when the configuration cannot work, RunError when the run cannot
    go on.
    """
    given = Given(sampler=sampler, teachers=teachers, trainer=trainer, grader=rewards)
    return _on_policy(config, "distill", given, resume, quiet)


def rl(
    config: RunConfig,
    *,
    sampler: Sampler | None = None,
    trainer: Trainer | None = None,
    rewards: Grader | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> RunResult:
    """Outcome-reward RL: the same loop with group-centred rewards for advantages. Raises as ``distill``."""
    return _on_policy(config, "rl", Given(sampler=sampler, trainer=trainer, grader=rewards), resume, quiet)


def sft(config: RunConfig, *, trainer: Trainer | None = None, resume: bool = False, quiet: bool = False) -> RunResult:
    """Supervised fine-tuning on chats, prompt-completion pairs or documents. Raises as ``distill``."""
    given = Given(trainer=trainer)
    # The objective of sft is cross-entropy whatever a shared file says of teachers.
    config = config.model_copy(update={"teacher": None, "teachers": {}})

    def work(parts: Parts, checked: Checked, recorder: Recorder) -> None:
        assert config.prompts is not None
        examples = supervised_examples(checked.rows, config.prompts, checked.student, checked.stop_ids)
        supervised_loop(parts, examples, recorder)

    return _run(config, "sft", given, resume, quiet, work)


def _on_policy(config: RunConfig, method: Method, given: Given, resume: bool, quiet: bool) -> RunResult:
    def work(parts: Parts, checked: Checked, recorder: Recorder) -> None:
        on_policy_loop(parts, recorder)
        if recorder.interrupted_at is None:
            _keep_final_rollouts(parts, recorder)

    return _run(config, method, given, resume, quiet, work)


def _run(
    config: RunConfig,
    method: Method,
    given: Given,
    resume: bool,
    quiet: bool,
    work: Callable[[Parts, Checked, Recorder], None],
) -> RunResult:
    """Check, take the folder, load, work, report. Nothing stays behind when preparation fails."""
    checked = check_run(config, method)
    folder = RunFolder(config, method=method, resume=resume)
    try:
        parts = assemble(folder.config, checked, folder.costs, checkpoint=folder.checkpoint, given=given)
        folder.write_config(parts.config)
    except BaseException:
        folder.discard_if_untouched()
        raise
    try:
        with StopRequest().listening() as stop:
            if folder.state:
                parts.trainer.load_state_dict(folder.state["trainer"])
            parts.sampler.set_policy_version(folder.first_step)
            recorder = Recorder(
                folder,
                parts.config,
                trainer=parts.trainer,
                teachers=parts.teachers,
                student=checked.student,
                evaluate=lambda: evaluate_tasks(parts.evaluator, parts.tasks, parts.decode),
                stop=stop,
                quiet=quiet,
            )
            try:
                recorder.start()
                work(parts, checked, recorder)
            finally:
                recorder.close()
    finally:
        folder.close()
    from understudy.report import write_run_report

    write_run_report(folder.path)
    step = recorder.interrupted_at or parts.config.optim.num_steps
    student = checkpoint_path(folder.checkpoints_path, step)
    return RunResult(folder.path, student, recorder.last_row, recorder.interrupted_at)


def _keep_final_rollouts(parts: Parts, recorder: Recorder) -> None:
    """The trained student on the first step's prompts, for pages that show before and after."""
    sampling = parts.config.sampling
    wanted = -(-parts.config.rollouts.per_step // sampling.group_size)
    prompts = parts.prompts_at(0)[:wanted]
    if not prompts:
        return
    groups = sample_rollouts(parts.evaluator, prompts, sampling, seed=step_seed(parts.config.seed, 0))
    rollouts = [rollout for group in groups for rollout in group]
    scores = score_rollouts(parts.teachers, rollouts, parts.score_kind) if parts.teachers else [None] * len(rollouts)
    rewards = grade_rollouts(rollouts, parts.grader, parts.decode) if parts.grader else [None] * len(rollouts)
    scored = [ScoredRollout(*columns) for columns in zip(rollouts, scores, rewards, strict=True)]
    size = sampling.group_size
    examples = training_examples([scored[i : i + size] for i in range(0, len(scored), size)], **parts.credit)
    recorder.keep_rollouts(parts.config.optim.num_steps, scored, examples)


def generate(config: RunConfig, *, quiet: bool = False) -> RunResult:
    """The teacher writes ``sampling.group_size`` completions for every prompt row: ``samples.jsonl``, rows for ``sft``.

    Off-policy distillation is ``generate`` and then ``sft``.
    """
    checked = check_run(config, "generate")
    folder = RunFolder(config, method="generate")
    set_threads(config)
    assert config.teacher is not None
    text = checked.teachers["default"]
    student = StudentConfig(model=config.teacher.model, dtype=config.teacher.dtype, device=config.teacher.device)
    model = load_student(student, vocab_size=checked.vocab_size)
    stop_ids = checked.stop_ids
    sampler = MeteredSampler(
        LocalSampler(model, stop_ids=stop_ids), folder.costs, "teacher_sampling", model.matmul_parameters()[0]
    )
    folder.write_config(config)
    groups = sample_rollouts(sampler, checked.prompts, config.sampling, seed=step_seed(config.seed, 0))
    sources = {row.index: row.values for row in checked.rows}
    rows = [
        {
            **sources[rollout.prompt.index],
            "completion": text.tokenizer.decode(list(rollout.completion_ids), skip_special_tokens=True),
            "finish_reason": rollout.finish_reason,
        }
        for group in groups
        for rollout in group
    ]
    path = folder.path / "samples.jsonl"
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(folder.path / "costs.json", folder.costs.to_json())
    folder.close()
    return RunResult(folder.path, None, {"samples": len(rows)})


def evaluate(config: RunConfig, *, quiet: bool = False) -> RunResult:
    """Grade ``student.model`` on ``[[evaluation.tasks]]``: ``evaluation.json``."""
    checked = check_run(config, "eval")
    folder = RunFolder(config, method="eval")
    set_threads(config)
    model = load_student(config.student, vocab_size=checked.vocab_size)
    sampler = MeteredSampler(
        LocalSampler(model, stop_ids=checked.stop_ids),
        CostLedger(),
        "evaluation",
        model.matmul_parameters()[0],
    )
    metrics = evaluate_tasks(sampler, checked.tasks, checked.decode)
    folder.write_config(config)
    write_json(folder.path / "evaluation.json", metrics)
    folder.close()
    return RunResult(folder.path, None, metrics)

"""The Python API: one function per command, the same code path."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from understudy.assembly import Given, Parts, assemble, set_threads
from understudy.backends.loading import fast_bfloat16, load_student, pick_device
from understudy.backends.local import LocalSampler
from understudy.backends.protocols import Sampler, Teacher, Trainer
from understudy.checkpoints import checkpoint_path, write_json
from understudy.config import RunConfig, StudentConfig
from understudy.costs import CostLedger, MeteredSampler
from understudy.doctor.catalogue import look_before
from understudy.errors import ConfigError, GuardStop, NonFiniteError, ServerError, ServerUnavailable, first_line
from understudy.evaluation import evaluate_tasks, outcome_metrics, task_outcomes, write_outcomes
from understudy.loop import on_policy_loop, sample, score
from understudy.mark_temperature import named_weights
from understudy.metering import counted_model, matmul_sizes
from understudy.preflight import Checked, Method, check_run
from understudy.progress import ProgressSampler, piece_size
from understudy.recorder import Recorder
from understudy.rollouts import sample_rollouts, step_seed
from understudy.runs import RunFolder
from understudy.samples import SampleFile
from understudy.stopping import StopNow, StopRequest
from understudy.supervised import load_examples, supervised_loop
from understudy.tasks import Grader
from understudy.trackers import Trackers
from understudy.types import Rollout, TrainingExample

log = logging.getLogger("understudy")


@dataclass(frozen=True)
class RunResult:
    """Where a run stands. ``metrics`` is its last row; ``interrupted_at`` the step a Ctrl-C or SIGTERM ended it after
    (0: before its first update, there is no ``student`` yet); ``stop_requested`` is also true of a run that one reached
    in its last step."""

    folder: Path
    student: Path | None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    interrupted_at: int | None = None
    stop_requested: bool = False


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

    ``config`` still names the models, for their tokenizers. On ``resume`` a trainer that is brought along already holds
    the last checkpoint's weights; its ``load_state_dict`` gets the rest.

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
    config = _without_teachers(config)
    return _on_policy(config, "rl", Given(sampler=sampler, trainer=trainer, grader=rewards), resume, quiet)


def sft(config: RunConfig, *, trainer: Trainer | None = None, resume: bool = False, quiet: bool = False) -> RunResult:
    """Supervised fine-tuning on chats, prompt-completion pairs or documents. Raises as ``distill``."""
    given = Given(trainer=trainer)
    # Evaluations sample here: nothing is sampled that would be worth a server.
    at_hand = {"sampler": None, "sampling": config.sampling.model_copy(update={"max_policy_lag": 0})}
    config = _without_teachers(config).model_copy(update=at_hand)
    checked = check_run(config, "sft", brought=given.roles)
    examples = load_examples(config, checked.rows, checked.student, checked.stop_ids)

    def work(parts: Parts, recorder: Recorder) -> None:
        supervised_loop(parts, examples, recorder)

    return _run(config, "sft", checked, given, resume, quiet, work, examples.own)


def _without_teachers(config: RunConfig) -> RunConfig:
    """One file serves every command; `rl` and `sft` have no use for what it says of teachers."""
    return config.model_copy(update={"teacher": None, "teachers": {}})


def _on_policy(config: RunConfig, method: Method, given: Given, resume: bool, quiet: bool) -> RunResult:
    checked = check_run(config, method, grader=given.grader, brought=given.roles)

    def work(parts: Parts, recorder: Recorder) -> None:
        on_policy_loop(parts, recorder)
        if recorder.interrupted_at is None:
            _keep_final_rollouts(parts, recorder)

    return _run(config, method, checked, given, resume, quiet, work)


def _run(
    config: RunConfig,
    method: Method,
    checked: Checked,
    given: Given,
    resume: bool,
    quiet: bool,
    work: Callable[[Parts, Recorder], None],
    examples: Sequence[TrainingExample] = (),
) -> RunResult:
    """Take the folder, load, work, report. Nothing stays behind when preparation fails."""
    with RunFolder(config, method=method, resume=resume) as folder:
        steps = folder.config.optim.num_steps
        kept = method == "sft" or config.rollouts.per_step == 0 or folder.holds_rollouts(steps)
        if folder.trained and kept and not folder.owes_evaluation:
            log.info("%s: all %d steps are done; raise optim.num_steps to go on", folder.path, steps)
            return _finished(folder, folder.last_row(), None)
        findings = look_before(folder.config, method, checked, given, examples)
        if folder.checkpoint:
            log.info("%s: going on after step %d of %d", folder.path, folder.first_step, steps)
        stop = StopRequest(folder.config.checkpoints.stop_within_seconds)
        parts = assemble(
            folder.config, checked, folder.costs, checkpoint=folder.checkpoint, given=given, before_update=stop.hold
        )
        goes_on_after = folder.first_step if folder.checkpoint else None
        with Trackers(parts.config, folder.path, goes_on_after=goes_on_after) as trackers:
            with parts.connections, stop.listening():
                if folder.state:
                    _load_state(parts.trainer, folder)
                parts.sampler.set_policy_version(folder.first_step)
                folder.write_config(parts.config)
                folder.write_start([finding.row for finding in findings])
                recorder = Recorder(
                    folder,
                    parts.config,
                    trainer=parts.trainer,
                    teachers=parts.page_teachers,
                    student=checked.student,
                    evaluate=lambda: evaluate_tasks(parts.evaluator, parts.tasks, parts.decode),
                    stop=stop,
                    trackers=trackers,
                    may_be_away=parts.may_be_away,
                    marker=parts.marker,
                    weights_of=lambda name: _named_teacher(parts.config, checked, given, name),
                    quiet=quiet,
                )
                _work(replace(parts, trainer=recorder.guarded(parts.trainer)), recorder, folder, stop, work)
            result = _finished(folder, recorder.last_row, recorder.interrupted_at)
        return replace(result, stop_requested=stop.requested)


def _work(
    parts: Parts,
    recorder: Recorder,
    folder: RunFolder,
    stop: StopRequest,
    work: Callable[[Parts, Recorder], None],
) -> None:
    """``work`` from the recorder's start to its end, however that comes."""
    try:
        recorder.start()
        work(parts, recorder)
    except (ServerError, NonFiniteError, GuardStop) as error:
        # The weights are whole, and what is away may be back tomorrow.
        stop.end()
        step = recorder.save_after(error)
        if step is None:
            log.warning("%s: the weights are not finite and are not kept", folder.path)
        else:
            log.info("%s: --resume goes on after step %d", folder.path, step)
        raise
    except StopNow:
        recorder.interrupted_at = recorder.save_last_update()
    finally:
        recorder.close()


def _named_teacher(config: RunConfig, checked: Checked, given: Given, name: str) -> Teacher | None:
    """The model that teacher ``name`` is said to be, where that is somebody else and easily loaded."""
    role = config.all_teachers[name]
    if given.teachers is None and role.url is None:
        return None
    return named_weights(role, config.student.model, vocab_size=checked.vocab_size, most_bytes=2 * 2**30)


def _load_state(trainer: Trainer, folder: RunFolder) -> None:
    """Give the trainer what the checkpoint holds beside weights. Raises ConfigError where it does not fit."""
    try:
        trainer.load_state_dict(folder.state["trainer"])
    except Exception as error:  # a trainer of your own may raise anything
        raise ConfigError(
            f"checkpoint {folder.checkpoint}",
            got=f"a state of the trainer that it cannot take: {first_line(error)}",
            expected="what this trainer saved there",
            remedy="put the checkpoint back from a copy, or start anew in another output_dir",
        ) from error


def _finished(folder: RunFolder, row: Mapping[str, Any], interrupted_at: int | None) -> RunResult:
    """Write the report. A report that fails must not look like a run that failed: its files are all there."""
    from understudy.report import write_run_report

    try:
        write_run_report(folder.path)
    except Exception as error:
        log.warning(
            "report.html could not be written (%s: %s); the run itself is complete. Once mended: understudy report %s",
            type(error).__name__,
            error,
            folder.path,
        )
    step = folder.config.optim.num_steps if interrupted_at is None else interrupted_at
    student = checkpoint_path(folder.checkpoints_path, step) if step else None
    return RunResult(folder.path, student, row, interrupted_at)


def _keep_final_rollouts(parts: Parts, recorder: Recorder) -> None:
    """The trained student on the first step's prompts, for pages that show before and after."""
    wanted = parts.config.rollouts.per_step
    if wanted == 0:
        return
    # At least two: the shuffled teacher gives each completion another one's marks.
    prompts = parts.prompts_at(0)[: -(-max(2, wanted) // parts.config.sampling.group_size)]
    # Neither this writing nor its marking belongs to the method's price.
    for_pages = replace(parts, sampler=parts.evaluator, teachers=parts.page_teachers, reference=parts.page_reference)
    rollouts = sample(for_pages, prompts, seed=step_seed(parts.config.seed, 0))
    try:
        scored, examples = score(for_pages, rollouts)
    except ServerUnavailable as error:
        # All steps are done: what pages show is no reason to fail where a lost teacher was none.
        if not {prompt.teacher for prompt in prompts} <= parts.may_be_away:
            raise
        log.warning("rollouts of the trained student go unmarked and are not kept; --resume makes up for it: %s", error)
        return
    recorder.keep_rollouts(parts.config.optim.num_steps, scored, examples)


def generate(config: RunConfig, *, resume: bool = False, quiet: bool = False) -> RunResult:
    """The teacher writes ``sampling.group_size`` completions for every prompt row: ``samples.jsonl``, rows for ``sft``.

    Off-policy distillation is ``generate`` and then ``sft``. The student is not looked at: it may have other tokens.
    Rows are stored as they are written; ``resume`` goes on after them, with the same result.
    """
    checked = check_run(config, "generate")
    with RunFolder(config, method="generate", resume=resume) as folder:
        samples = SampleFile(folder.path)
        if samples.finished:
            log.info("%s: samples.jsonl is complete", folder.path)
        else:
            _write_samples(folder, checked, samples, quiet)
        return RunResult(folder.path, None, {"samples": samples.num_rows()})


def _write_samples(folder: RunFolder, checked: Checked, samples: SampleFile, quiet: bool) -> None:
    config = folder.config
    assert config.teacher is not None
    set_threads(config)
    teacher = _for_sampling(
        StudentConfig(**config.teacher.model_dump(include={"model", "dtype", "device", "trust_remote_code"}))
    )
    model = load_student(teacher, vocab_size=checked.vocab_size, role="teacher")
    folder.write_config(
        config.model_copy(update={"teacher": config.teacher.model_copy(update={"dtype": teacher.dtype})})
    )
    sampling, piece, prompts = config.sampling, piece_size(config.sampling), checked.prompts
    kept = samples.keep_whole_pieces(piece * sampling.group_size, len(prompts) * sampling.group_size)
    costs, costs_path = folder.costs, folder.path / "costs.json"
    if kept and costs_path.exists():
        costs = CostLedger.read(costs_path)
    done = kept // sampling.group_size
    local = LocalSampler(model, stop_ids=checked.stop_ids, ends=checked.ends)
    metered = MeteredSampler(local, costs, "teacher_sampling", matmul_sizes(model)[0], counted_model(model))
    sampler = ProgressSampler(metered, "generate", num_prompts=len(prompts), done=done, quiet=quiet)
    sources = {row.index: row.values for row in checked.rows}
    with contextlib.closing(sampler):
        for start in range(done, len(prompts), piece):
            chosen = prompts[start : start + piece]
            groups = sample_rollouts(sampler, chosen, sampling, seed=step_seed(config.seed, 0))
            samples.append([_sample_row(sources, rollout, checked) for group in groups for rollout in group])
            write_json(costs_path, costs.to_json())
    samples.finish()


def _sample_row(sources: Mapping[int, Mapping[str, Any]], rollout: Rollout, checked: Checked) -> dict[str, Any]:
    completion = checked.decode(rollout.completion_ids)
    return {**sources[rollout.prompt.index], "completion": completion, "finish_reason": rollout.finish_reason}


def _for_sampling(model: StudentConfig) -> StudentConfig:
    """The model with its dtype resolved for writing alone, which needs no master copy: bfloat16 on a GPU fast at it."""
    if model.dtype != "auto":
        return model
    device = pick_device(model.device)
    half = device.type == "cuda" and fast_bfloat16(device)
    return model.model_copy(update={"dtype": "bfloat16" if half else "float32"})


def evaluate(config: RunConfig, *, quiet: bool = False) -> RunResult:
    """Grade ``student.model`` on ``[[evaluation.tasks]]``: ``evaluation.json``, and ``evaluation/`` problem by
    problem."""
    checked = check_run(config, "eval")
    with RunFolder(config, method="eval") as folder:
        set_threads(config)
        config = config.model_copy(update={"student": _for_sampling(config.student)})
        model = load_student(config.student, vocab_size=checked.vocab_size)
        total = sum(len(task.prompts) * len(task.config.temperatures) for task in checked.tasks)
        local = LocalSampler(model, stop_ids=checked.stop_ids, ends=checked.ends)
        with contextlib.closing(ProgressSampler(local, "eval", num_prompts=total, quiet=quiet)) as sampler:
            outcomes = [o for task in checked.tasks for o in task_outcomes(sampler, task, checked.decode)]
        folder.write_config(config)
        write_outcomes(folder.path, outcomes)
        metrics = outcome_metrics(outcomes)
        write_json(folder.path / "evaluation.json", metrics)
    return RunResult(folder.path, None, metrics)

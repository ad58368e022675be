"""C13: failure modes. Runs with a known fault beside healthy ones: what refuses them, and which metric shows them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from understudy.config import RunConfig, StudentConfig
from understudy.errors import ConfigError, RunError
from understudy.experiments.alarms import COLLAPSE, Judged, alarm, final_accuracy, judge
from understudy.experiments.bench import MAX_TOKENS, PER_STEP, T1, TRAIN_SEED, LedgerBench
from understudy.experiments.claim import Chart, Claim, Finding, Record, Verdict, mean_curve
from understudy.experiments.lab import Lab, Run
from understudy.experiments.search import Search, searched
from understudy.report.charts import Series
from understudy.types import ScoreKind, Scores, TokenSequence
from understudy.worlds.ledger import EOS, PAD

if TYPE_CHECKING:
    from understudy.backends.local import LocalTeacher
    from understudy.backends.protocols import Teacher, Trainer
    from understudy.objectives import Objective
    from understudy.types import Batch, LossOutput

SAMPLED = {"objective.estimator": "sampled"}
# log p - log q has the gradient of log p, and so has a policy loss whose every advantage is -1: a control says that.
K1 = {"objective.control": "fixed_negative", "objective.control_threshold": 1.0}
# What the teacher reads instead of the student's prompt.
TEMPLATES: Mapping[str, Callable[[str], str]] = {
    "no-arrow": lambda prompt: prompt.removesuffix(" =>"),
    "foreign-prefix": lambda prompt: f"=> | => {prompt}",
}
TEMPERATURES = {"hot-teacher": 2.0, "cold-teacher": 0.5}
MODES = ("eos", *TEMPLATES, *TEMPERATURES, "flipped-sign", "k1-loss")
RECORDED = (
    "reverse_kl/mean",
    "reverse_kl/max",
    "entropy/sampled",
    "completion_length/mean",
    "truncated/share",
    "repeated_4gram/share",
    "optim/grad_norm",
    "optim/loss",
    "ratio/abs_log_mean",
    "ratio/abs_log_max",
    "ratio/max",
)


@dataclass(frozen=True)
class Settings:
    """Optimizer steps, and how often accuracy is looked at."""

    steps: int = 40
    every: int = 10


@dataclass(frozen=True)
class WrappedTeacher:
    """The world's teacher at a temperature that it does not state, or with the tokens that end a text exchanged."""

    model: Path
    temperature: float = 1.0
    exchanged: tuple[int, int] | None = None

    @property
    def key(self) -> Mapping[str, Any]:
        return {"model": self.model.name, "temperature": self.temperature, "exchanged": self.exchanged}

    def load(self) -> Teacher:
        first, second = self.exchanged or (0, 0)
        return _Exchanged(_local_teacher(self.model, self.temperature), {first: second, second: first})


@dataclass
class _Exchanged:
    """Marks a completion as if ``tokens`` stood in it: log-probabilities of a model that has them exchanged."""

    teacher: LocalTeacher
    tokens: Mapping[int, int]
    kinds: frozenset[ScoreKind] = frozenset({"sampled"})

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        return self.teacher.compute_logprobs([self._read(sequence) for sequence in sequences])

    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0) -> list[Scores]:
        return self.teacher.score([self._read(sequence) for sequence in sequences], kind, topk=topk)

    def _read(self, sequence: TokenSequence) -> TokenSequence:
        return replace(sequence, completion_ids=[self.tokens.get(token, token) for token in sequence.completion_ids])


def _local_teacher(model: Path, temperature: float) -> LocalTeacher:
    from understudy.backends.loading import load_student
    from understudy.backends.local import LocalTeacher

    config = StudentConfig(model=str(model), dtype="float32")
    return LocalTeacher(load_student(config, role="teacher"), temperature=temperature)


def search(lab: Lab, settings: Settings, arm: str) -> Search:
    """Accuracy of the healthy run at temperature 1 on the validation problems; faulty runs take its rate."""
    bench = LedgerBench.of(lab)

    def score(rate: float) -> float:
        run = bench.distill(rate, settings.steps, SAMPLED)
        return bench.evaluate(run.student, "validation", (1.0,)).metrics[T1]

    return searched(score)


def pipeline(lab: Lab, settings: Settings, rates: Mapping[str, float]) -> Record:
    """The healthy run, the faulty ones, and what was said to those that ask for a fault openly (None: nothing)."""
    bench = LedgerBench.of(lab)
    healthy = bench.distill(rates["healthy"], settings.steps, SAMPLED, every=settings.every)
    runs = {"healthy": healthy} | {mode: _forced(bench, healthy, mode) for mode in MODES}
    return {
        "refused": {mode: _refusal(bench, mode) for mode in MODES},
        "runs": {name: _run_record(run, settings.steps) for name, run in runs.items()},
    }


def _run_record(run: Run, steps: int) -> dict[str, Any]:
    """``broke_off``: the step that a run died in, None: it went to its end."""
    metrics = {name: [(step, float(f"{value:.5g}")) for step, value in run.curve(name)] for name in RECORDED}
    last = int(run.rows[-1]["step"])
    return {"accuracy": run.curve(T1), "metrics": metrics, "broke_off": None if last == steps else last + 1}


def _forced(bench: LedgerBench, healthy: Run, mode: str) -> Run:
    """The healthy run again, with one fault. A fault may break a run off: its rows end early, and it has no model."""
    settings, teacher = _fault(bench, healthy, mode)

    def make(folder: Path) -> None:
        from understudy import api

        print(f"distill {mode} {folder.stem}", flush=True)
        config = RunConfig.from_toml(healthy.folder / "config.toml", {**settings, "output_dir": str(folder)})
        trainer = _flipped_trainer(config) if mode == "flipped-sign" else None
        try:
            result = api.distill(config, teachers={"default": teacher.load()} if teacher else None, trainer=trainer)
        except RunError as error:
            print(f"{mode} broke off: {error}", flush=True)
            return
        if result.stop_requested:  # what is cut short must not look finished
            raise InterruptedError(f"{mode} {folder.stem} was told to stop")

    key = {
        "version": 1,
        "like": healthy.folder.name,
        "fault": mode,
        "settings": {name: str(value).replace(f"{bench.lab.cache.root}/", "") for name, value in settings.items()},
        "teacher": dict(teacher.key) if teacher else None,
    }
    return Run(bench.lab.cache.folder("runs", key, make))


def _fault(bench: LedgerBench, healthy: Run, mode: str) -> tuple[Mapping[str, Any], WrappedTeacher | None]:
    """Settings that differ from the healthy run's, and the teacher that takes the place of its own."""
    if mode in TEMPLATES:
        n = healthy.config.optim.num_steps * PER_STEP
        return {"prompts.path": str(_prompts(bench, n, TEMPLATES[mode]))}, None
    if mode == "eos":
        eos, pad = (bench.world.tables.tokens.index(token) for token in (EOS, PAD))
        return {}, WrappedTeacher(bench.world.teacher, exchanged=(eos, pad))
    if mode in TEMPERATURES:
        return {}, WrappedTeacher(bench.world.teacher, temperature=TEMPERATURES[mode])
    return (K1 if mode == "k1-loss" else {}), None


def _flipped_trainer(config: RunConfig) -> Trainer:
    """With the sign of every advantage turned round."""
    from understudy.backends.loading import load_student
    from understudy.backends.local import LocalTrainer

    class Flipped(LocalTrainer):
        def forward_backward(self, batch: Batch, objective: Objective) -> LossOutput:
            assert batch.advantages is not None
            return super().forward_backward(replace(batch, advantages=-batch.advantages), objective)

    return Flipped(load_student(config.student), config.optim)


def _prompts(bench: LedgerBench, n: int, template: Callable[[str], str]) -> Path:
    """The problems of ``bench.prompts(n)``, with a prompt of the teacher's own."""
    rows = bench.world.tables.prompt_rows(n, TRAIN_SEED + bench.lab.pipeline)
    return bench.lab.file([row | {"teacher_prompt": template(row["prompt"])} for row in rows])


def _refusal(bench: LedgerBench, mode: str) -> str | None:
    """What the package says to a configuration that asks for the fault."""
    with TemporaryDirectory() as folder:
        try:
            _ask(bench, mode, Path(folder))
        except ConfigError as error:
            return f"got {error.got}; expected {error.expected}"
    return None


def _ask(bench: LedgerBench, mode: str, folder: Path) -> None:
    """Everything that is checked before any compute. Raises ConfigError."""
    from understudy import api
    from understudy.preflight import check_run

    prompts = _prompts(bench, 1, TEMPLATES[mode]) if mode in TEMPLATES else bench.prompts(1)
    tree: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "num_threads": 1,
        "student": {"model": str(bench.world.start), "dtype": "float32"},
        "teacher": {"model": str(bench.world.teacher), "dtype": "float32"},
        "prompts": {"path": str(prompts)},
        "sampling": {"max_completion_tokens": MAX_TOKENS},
        "objective": {"estimator": "sampled"},
    }
    if mode == "eos":
        shutil.copytree(bench.world.teacher, folder / "teacher", ignore=shutil.ignore_patterns("*.safetensors"))
        end = {"eos_token_id": bench.world.tables.tokens.index(PAD)}
        (folder / "teacher" / "generation_config.json").write_text(json.dumps(end), encoding="utf-8")
        tree["teacher"]["model"] = str(folder / "teacher")
    tree["objective"] |= {"flipped-sign": {"kl_coef": -1.0}, "k1-loss": {"loss": "k1"}}.get(mode, {})
    config = RunConfig.from_tree(tree, mode)
    if mode in TEMPERATURES:
        # The configuration has one temperature for all; only a teacher that is brought along can have another.
        api.distill(config, teachers={"default": _local_teacher(bench.world.teacher, TEMPERATURES[mode])}, quiet=True)
    check_run(config, "distill")


def analyse(records: Sequence[Record]) -> Finding:
    """The pass rule of experiments/c13_failure_modes/README.md."""
    judged = {mode: judge(records, mode, WATCHED[mode]) for mode in MODES}
    harmful = [mode for mode in MODES if judged[mode].harm.high < 0]
    caught = [mode for mode in harmful if judged[mode].in_time >= ENOUGH * len(records)]
    every_watched = sorted({name for names in WATCHED.values() for name in names})
    false_alarms = sum(alarm(records, "healthy", i, every_watched) is not None for i in range(len(records)))
    quiet = false_alarms <= (1 - ENOUGH) * len(records) + 1e-9
    verdict: Verdict = "does not hold here"
    if harmful and quiet and len(caught) > len(harmful) / 2:
        verdict = "holds" if caught == harmful else "direction only"
    refused = [mode for mode in MODES if records[0]["refused"][mode]]
    numbers = {
        "harm": {mode: judged[mode].harm for mode in MODES},
        "in_time": {mode: judged[mode].in_time for mode in MODES},
        "in_time, strictly": {mode: judged[mode].strictly_in_time for mode in MODES},
        "broke_off": {mode: judged[mode].broke_off for mode in MODES},
        "refused": refused,
        "harmful": harmful,
        "caught": caught,
        "false_alarms": false_alarms,
    }
    return Finding(
        verdict=verdict,
        ours=f"{len(refused)} of {len(MODES)} faults refused; forced, {len(harmful)} do harm, and {len(caught)} of "
        f"these are shown in time; {false_alarms} false alarms in {len(records)} healthy runs",
        text=_text(records, judged, harmful, caught, refused, false_alarms),
        numbers=numbers,
        table=_table(records, judged),
        charts=_charts(records),
    )


# Named before any run: what shows each fault.
WATCHED: Mapping[str, Sequence[str]] = {
    "eos": ("reverse_kl/mean", "truncated/share"),
    "no-arrow": ("reverse_kl/mean",),
    "foreign-prefix": ("reverse_kl/mean",),
    "hot-teacher": ("reverse_kl/mean", "entropy/sampled"),
    "cold-teacher": ("reverse_kl/mean", "entropy/sampled"),
    "flipped-sign": ("reverse_kl/mean", "entropy/sampled"),
    "k1-loss": ("reverse_kl/mean", "entropy/sampled"),
}
# The share of the pipelines that is enough.
ENOUGH = 0.8
COLUMNS = ("refused", "minus healthy", "collapse at step", "alarm at step", "watched", "first of all metrics")


def _text(
    records: Sequence[Record],
    judged: Mapping[str, Judged],
    harmful: Sequence[str],
    caught: Sequence[str],
    refused: Sequence[str],
    false_alarms: int,
) -> str:
    n = len(records)
    each = "; ".join(
        f"{mode} {judged[mode].harm.show('{:+.3f}')}, in time in {judged[mode].in_time} of {n} "
        f"(strictly {judged[mode].strictly_in_time})"
        for mode in harmful
    )
    harmless = [f"{mode} {judged[mode].harm.show('{:+.3f}')}" for mode in MODES if mode not in harmful]
    broken = [f"{mode} {judged[mode].broke_off} of {n}" for mode in MODES if judged[mode].broke_off]
    messages = " ".join(f"{mode}: {records[0]['refused'][mode]}." for mode in refused)
    return (
        f"Asked for openly, {_listed(refused)} are refused before any compute and "
        f"{_listed([mode for mode in MODES if mode not in refused])} are not. Forced, these modes do harm (final "
        f"accuracy minus that of the healthy run): {each or 'none'}. The rule asks for an alarm before accuracy is "
        f"{COLLAPSE:g} below the start's, in at least {ENOUGH:.0%} of the pipelines: {_listed(caught)} pass. "
        f"Strictly in time is an alarm no later than the last evaluation before the collapse. "
        f"Runs that broke off, which leave no model and count as accuracy 0: {'; '.join(broken) or 'none'}. "
        f"No harm is shown for {'; '.join(harmless) or 'none'}. "
        f"Healthy runs raise {false_alarms} alarms in {n}. Messages. {messages}"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _table(records: Sequence[Record], judged: Mapping[str, Judged]) -> list[dict[str, str]]:
    rows = []
    for mode in ("healthy", *MODES):
        row = {"arm": mode, "accuracy": f"{fmean([final_accuracy(r['runs'][mode]) for r in records]):.3f}"}
        if mode == "healthy":
            cells = ["–"] * 6
        else:
            own = judged[mode]
            refused = "yes" if records[0]["refused"][mode] else "no"
            times = [_steps(own.collapses), _steps(own.alarms)]
            cells = [refused, own.harm.show("{:+.3f}"), *times, ", ".join(WATCHED[mode]), _first_of_all(records, mode)]
        rows.append(row | dict(zip(COLUMNS, cells, strict=True)))
    return rows


def _steps(steps: Sequence[int | None]) -> str:
    """By pipeline."""
    return ", ".join("never" if step is None else str(step) for step in steps)


def _first_of_all(records: Sequence[Record], mode: str) -> str:
    """The recorded metric that raises the alarm earliest, by its median step; of equal ones all."""
    medians: dict[str, float] = {}
    for metric in RECORDED:
        steps = [alarm(records, mode, i, [metric]) for i in range(len(records))]
        known = sorted(step for step in steps if step is not None)
        if len(known) > len(records) / 2:
            medians[metric] = known[len(known) // 2]
    first = min(medians.values(), default=None)
    return ", ".join(metric for metric, step in medians.items() if step == first) + (f" ({first})" if medians else "–")


def _charts(records: Sequence[Record]) -> list[Chart]:
    def line(mode: str, pick: Callable[[Mapping[str, Any]], Any]) -> Series:
        curves = [pick(record["runs"][mode]) for record in records]
        shared = min(len(curve) for curve in curves)  # a run that broke off ends the mean
        return mean_curve(mode, [curve[:shared] for curve in curves])

    def lines(pick: Callable[[Mapping[str, Any]], Any]) -> list[Series]:
        return [line(mode, pick) for mode in ("healthy", *MODES)]

    accuracy = {"title": "Accuracy of faulty runs", "y_label": "accuracy at temperature 1", "percent": True}
    kl = {"title": "Their reverse KL", "y_label": "reverse_kl/mean, nats per token"}
    return [
        Chart("accuracy", lines(lambda run: run["accuracy"]), {"x_label": "step", **accuracy}),
        Chart("reverse-kl", lines(lambda run: run["metrics"]["reverse_kl/mean"]), {"x_label": "step", **kl}),
    ]


CLAIM = Claim(
    name="c13_failure_modes",
    title="Failure modes",
    article="Not in the article. Reports name different end tokens, templates and temperatures, a flipped sign, and "
    "log p - log q as a loss; no numbers.",
    limits="The alarm needs healthy runs of the same world to compare with. Faults are total; some that do little in "
    "short answers may do much in long ones. A collapse is seen every 10 steps only.",
    settings={"cpu": Settings(), "gpu": Settings(), "smoke": Settings(steps=4, every=2)},
    search=search,
    pipeline=pipeline,
    analyse=analyse,
    arms=("healthy",),
)

"""What the guards notice, and when: faulty and healthy runs of the ledger world, over five worlds and seeds.

    OMP_NUM_THREADS=1 python benchmarks/guards.py                # about half an hour on one core; worlds come on top
    OMP_NUM_THREADS=1 python benchmarks/guards.py --render       # judge the stored rows again, and write the pages

Every fault of claim C13 and a permuted vocabulary are forced on a run that is healthy otherwise. A run's rows are
judged by the guards as they ship; then the weights after the update of the first alarm's step are compared with the
start's on 4,096 problems, the same ones with the same random numbers. Runs that are in the work folder already are not
made again, so that another threshold costs an evaluation at most. Writes results/guards.json, results/guards.md and
what docs/guards.md says of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from understudy import api
from understudy.backends.loading import load_student
from understudy.backends.local import LocalTrainer
from understudy.backends.protocols import Teacher, Trainer
from understudy.config import RunConfig
from understudy.config_guards import GuardsConfig
from understudy.evaluation import read_outcomes
from understudy.experiments.bench import MAX_TOKENS, PER_STEP, TRAIN_SEED, LedgerBench
from understudy.experiments.cache import Cache
from understudy.experiments.claims.c13_failure_modes import SAMPLED, TEMPERATURES, TEMPLATES, WrappedTeacher
from understudy.experiments.lab import Lab
from understudy.experiments.worlds import SCALES
from understudy.guards import TRACKED, judge, past_of
from understudy.metrics import read_metrics
from understudy.objectives import Objective
from understudy.statistics import mean_and_error
from understudy.types import Batch, LossOutput, ScoreKind, Scores, TokenSequence
from understudy.worlds.ledger import EOS, PAD

RESULTS = Path(__file__).parent / "results" / "guards"
DOCS, BEGIN, END = Path(__file__).parents[1] / "docs" / "guards.md", "<!-- results -->", "<!-- /results -->"
SEEDS, RATE, NUM_PROBLEMS, EVALUATION_SEED = 5, 1e-3, 4096, 4000
# Steps that prompts are written for.
MOST_STEPS = 40
HEALTHY = {"healthy": SAMPLED, "healthy, full": {"objective.estimator": "full"}}
CONFIGURATION = ("eos", *TEMPLATES, *TEMPERATURES, "vocabulary")
CODE = ("flipped-sign", "k1-loss")
# Steps of a run: the guards of the configuration's faults speak at once, those of the code's when harm begins.
STEPS = {"healthy": 40, "healthy, full": 24, "foreign-prefix": 24, "flipped-sign": 16, "k1-loss": 20}
FEW_STEPS = 8
KEPT = (*TRACKED, "teacher/temperature_ratio", "reverse_kl/max", "ratio/abs_log_mean", "ratio/outside_share")
# A fall in accuracy that no fault of the configuration may reach unseen.
ALLOWED = 0.02


@dataclass
class Permuted:
    """A teacher that reads every id as another token."""

    teacher: Teacher
    ids: Sequence[int]
    kinds: frozenset[ScoreKind] = frozenset({"sampled"})

    def compute_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        return self.teacher.compute_logprobs([self._read(sequence) for sequence in sequences])

    def score(self, sequences: Sequence[TokenSequence], kind: ScoreKind, *, topk: int = 0) -> list[Scores]:
        return self.teacher.score([self._read(sequence) for sequence in sequences], kind, topk=topk)

    def _read(self, sequence: TokenSequence) -> TokenSequence:
        return TokenSequence(*([self.ids[i] for i in ids] for ids in (sequence.prompt_ids, sequence.completion_ids)))


def bench_of(pipeline: int, cache: Path) -> LedgerBench:
    return LedgerBench.of(Lab(Cache(cache), replace(SCALES["cpu"], num_test=NUM_PROBLEMS), pipeline))


def config_of(bench: LedgerBench, mode: str, folder: Path) -> RunConfig:
    """The healthy run of claim C13, with every checkpoint kept; and what the fault changes in it."""
    steps = STEPS.get(mode, FEW_STEPS)
    rows = bench.world.tables.prompt_rows(MOST_STEPS * PER_STEP, TRAIN_SEED + bench.lab.pipeline)
    if mode in TEMPLATES:
        rows = [row | {"teacher_prompt": TEMPLATES[mode](row["prompt"])} for row in rows]
    tree = {
        "output_dir": str(folder),
        "seed": bench.lab.pipeline,
        "num_threads": 1,
        "student": {"model": str(bench.world.start), "dtype": "float32", "compute_dtype": "float32"},
        "teacher": {"model": str(bench.world.teacher), "dtype": "float32"},
        "prompts": {"path": str(bench.lab.file(rows))},
        "sampling": {"group_size": 1, "groups_per_batch": PER_STEP, "max_completion_tokens": MAX_TOKENS},
        "optim": {"learning_rate": RATE, "num_steps": steps, "warmup_steps": 5, "betas": [0.9, 0.98]},
        "checkpoints": {"every": 1, "keep": steps},
        "rollouts": {"per_step": 4, "topk": 0},
    }
    for key, value in HEALTHY.get(mode, SAMPLED).items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    return RunConfig.model_validate(tree)


def teacher_of(bench: LedgerBench, mode: str) -> Teacher | None:
    """The teacher that takes the place of the configured one."""
    tokens = bench.world.tables.tokens
    if mode == "eos":
        return WrappedTeacher(bench.world.teacher, exchanged=(tokens.index(EOS), tokens.index(PAD))).load()
    if mode in TEMPERATURES:
        return WrappedTeacher(bench.world.teacher, temperature=TEMPERATURES[mode]).load()
    if mode == "vocabulary":
        ids = np.random.default_rng(bench.lab.pipeline).permutation(len(tokens)).tolist()
        return Permuted(WrappedTeacher(bench.world.teacher).load(), ids)
    return None


def trainer_of(config: RunConfig, mode: str) -> Trainer | None:
    """A trainer with a fault of the code: the configuration says nothing of it. The gradient of log p - log q on the
    written tokens is that of a policy loss whose every advantage is -1."""
    if mode not in CODE:
        return None

    class Faulty(LocalTrainer):
        def forward_backward(self, batch: Batch, objective: Objective) -> LossOutput:
            assert batch.advantages is not None
            turned = -batch.advantages if mode == "flipped-sign" else -torch.ones_like(batch.advantages)
            return super().forward_backward(replace(batch, advantages=turned), objective)

    return Faulty(load_student(config.student), config.optim)


def run(bench: LedgerBench, mode: str, work: Path) -> Path:
    """The folder of the run; made unless it is there."""
    folder = work / f"{bench.lab.pipeline}-{mode.replace(', ', '-')}"
    config, teacher = config_of(bench, mode, folder), teacher_of(bench, mode)
    if not (folder / "report.html").exists():
        print(f"run {folder.name}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
        teachers = {"default": teacher} if teacher else None
        if api.distill(config, teachers=teachers, trainer=trainer_of(config, mode), quiet=True).stop_requested:
            raise KeyboardInterrupt
    return folder


def rewards(bench: LedgerBench, model: Path, folder: Path) -> list[float]:
    """Of every problem, at temperature 1."""
    if not (folder / "evaluation.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        rows = bench.world.tables.prompt_rows(NUM_PROBLEMS, EVALUATION_SEED + bench.lab.pipeline)
        tree = {
            "output_dir": str(folder),
            "num_threads": 1,
            "student": {"model": str(model), "dtype": "float32"},
            "sampling": {"max_completion_tokens": MAX_TOKENS, "max_batch_rows": 1024},
            "evaluation": {"tasks": [bench.task(bench.lab.file(rows))]},
        }
        api.evaluate(RunConfig.model_validate(json.loads(json.dumps(tree, default=str))), quiet=True)
    return [outcome.mean_reward for outcome in read_outcomes(folder)]


def alarms_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first alarm of each guard, by the thresholds that ship."""
    config, found = GuardsConfig(), {}
    for end, row in enumerate(rows):
        past = past_of(rows[:end], config, per_step=PER_STEP)
        for finding in judge(past, row, config, per_step=PER_STEP):
            if finding.guard not in found:
                found[finding.guard] = {"step": row["step"], "guard": finding.guard, "words": finding.words}
    return sorted(found.values(), key=lambda alarm: alarm["step"])


def change_at(bench: LedgerBench, mode: str, step: int, work: Path) -> dict[str, float]:
    """Accuracy after ``step`` updates of the run, minus the start's, and the standard error of the difference."""
    name = f"{bench.lab.pipeline}-{mode.replace(', ', '-')}"
    start = rewards(bench, bench.world.start, work / f"eval-{bench.lab.pipeline}-start")
    then = rewards(bench, work / name / f"checkpoints/step_{step:06d}", work / f"eval-{name}-{step}")
    mean, error = mean_and_error([b - a for a, b in zip(start, then, strict=True)])
    return {"start": mean_and_error(start)[0], "change": mean, "change_se": error}


def judged_again(content: dict[str, Any]) -> dict[str, Any]:
    """Results with the alarms of today's thresholds. A first alarm in another step asks for other evaluations."""
    for record in content["records"]:
        before, record["alarms"] = record["alarms"], alarms_of(record["rows"])
        if [alarm["step"] for alarm in before[:1]] != [alarm["step"] for alarm in record["alarms"][:1]]:
            raise SystemExit(f"{record['mode']}, seed {record['seed']}: another first alarm; run without --render")
    return content


def measure(work: Path, cache: Path) -> dict[str, Any]:
    records = []
    for pipeline in range(SEEDS):
        bench = bench_of(pipeline, cache)
        for mode in (*HEALTHY, *CONFIGURATION, *CODE):
            rows = [row for row in read_metrics(run(bench, mode, work) / "metrics.jsonl") if row["step"] > 0]
            rows = rows[: STEPS.get(mode, FEW_STEPS)]
            kept = [{"step": row["step"]} | {k: float(f"{row[k]:.6g}") for k in KEPT if k in row} for row in rows]
            record = {"seed": pipeline, "mode": mode, "alarms": alarms_of(kept), "rows": kept}
            if mode not in HEALTHY:  # of a silent one: at its end
                record |= change_at(bench, mode, record["alarms"][0]["step"] if record["alarms"] else len(kept), work)
            records.append(record)
    made_with = {name: version(name) for name in ("torch", "transformers", "understudy")}
    return {"schema_version": 1, "made_with": {"python": platform.python_version(), **made_with}, "records": records}


def render(content: Mapping[str, Any]) -> str:
    """The page of the results."""
    records = content["records"]
    lines = [
        "# Guards",
        "",
        f"{SEEDS} worlds with a seed each, by claim C13's recipe (sampled reverse KL, {PER_STEP} solutions a step, "
        f"learning rate {RATE:g}). Thresholds are the defaults. Accuracy: at temperature 1 on {NUM_PROBLEMS:,} "
        "held-out problems, the weights after the first alarm's step (without an alarm: after the last) minus the "
        "start's, on the same problems with the same random numbers, in points (one standard error of the paired "
        "difference). Lists of five are the seeds.",
        "",
        "| run | steps | first alarm at step | its guards | accuracy, points | later also |",
        "|---|---|---|---|---|---|",
    ]
    for mode in (*HEALTHY, *CONFIGURATION, *CODE):
        own = [record for record in records if record["mode"] == mode]
        lines.append("| " + " | ".join([mode, str(STEPS.get(mode, FEW_STEPS)), *_cells(own)]) + " |")
    lines += ["", *_verdicts(records), "", _made_with(content["made_with"])]
    return "\n".join(lines) + "\n"


def _cells(own: Sequence[Mapping[str, Any]]) -> list[str]:
    first = [record["alarms"][0]["step"] if record["alarms"] else None for record in own]
    at_first = sorted(
        {a["guard"] for r, step in zip(own, first, strict=True) for a in r["alarms"] if a["step"] == step}
    )
    later = sorted({alarm["guard"] for record in own for alarm in record["alarms"]} - set(at_first))
    changes = [f"{100 * r['change']:+.1f} ({100 * r['change_se']:.1f})" if "change" in r else "–" for r in own]
    steps = ", ".join("none" if step is None else str(step) for step in first)
    changed = ", ".join(changes) if any("change" in record for record in own) else "–"
    return [steps, ", ".join(at_first) or "–", changed, ", ".join(later) or "–"]


def _verdicts(records: Sequence[Mapping[str, Any]]) -> list[str]:
    healthy = [record for record in records if record["mode"] in HEALTHY]
    lines = [f"- Healthy runs with an alarm: {sum(bool(r['alarms']) for r in healthy)} of {len(healthy)}."]
    for words, modes in (("Faults of the configuration", CONFIGURATION), ("Faults of the code", CODE)):
        own = [record for record in records if record["mode"] in modes]
        seen = [record for record in own if record["alarms"]]
        early = [record for record in seen if record["change"] > -ALLOWED]
        silent = sorted({record["mode"] for record in own if not record["alarms"]})
        late = sorted({record["mode"] for record in seen if record not in early})
        lines.append(
            f"- {words}: {len(seen)} of {len(own)} runs raise an alarm, {len(early)} of them before accuracy has "
            f"fallen by {100 * ALLOWED:g} points. Silent: {', '.join(silent) or 'none'}. "
            f"Late: {', '.join(late) or 'none'}."
        )
    return lines


def _made_with(made: Mapping[str, str]) -> str:
    return f"Python {made['python']}, torch {made['torch']}, transformers {made['transformers']}; float32 on a CPU."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/guards"), help="folder of the runs")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/understudy/experiments", help="worlds")
    parser.add_argument("--render", action="store_true", help="judge the stored rows again, write the pages")
    arguments = parser.parse_args()
    if arguments.render:
        content = judged_again(json.loads(RESULTS.with_suffix(".json").read_text(encoding="utf-8")))
    else:
        torch.set_num_threads(1)
        content = measure(arguments.work, arguments.cache.absolute())
    records = ",\n".join(json.dumps(record) for record in content["records"])
    head = json.dumps({name: value for name, value in content.items() if name != "records"})[:-1]
    RESULTS.with_suffix(".json").write_text(f'{head}, "records": [\n{records}\n]}}\n', encoding="utf-8")
    page = render(content)
    RESULTS.with_suffix(".md").write_text(page, encoding="utf-8")
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    shown = page.partition("\n\n")[2]  # under a heading of its own there
    DOCS.write_text(f"{before}{BEGIN}\n\n{shown}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()

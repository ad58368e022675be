"""The command line. Exit codes: 0 done, 1 failed while running (state kept), 2 bad input (nothing started), 130
Ctrl-C."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

import understudy
from understudy import cli_report, cli_runs, cli_score, cli_serve, cli_tools
from understudy.cli_arguments import Overrides, Resume, Run, Smoke, load_config, parse_overrides, smoke_config
from understudy.errors import UnderstudyError

if TYPE_CHECKING:
    from understudy.api import RunResult

app = App(
    name="understudy",
    help="On-policy distillation: the student writes, the teacher marks every token, the student learns from its own "
    "mistakes.\n\nStart with `understudy demo`.",
    version=understudy.__version__,
    help_format="markdown",
    suppress_keyboard_interrupt=False,  # main says what became of it
)
world = App(name="world", help="Small models and tasks built from nothing.")
app.command(world)
app.command(cli_serve.serve)
app.command(cli_score.score)
for tool in (
    cli_tools.compare,
    cli_tools.cost,
    cli_tools.doctor,
    cli_report.report,
    cli_tools.estimators,
    cli_tools.experiment,
    cli_tools.keys,
    cli_runs.watch,
    cli_runs.export,
):
    app.command(tool)


@app.command
def distill(run: Run, /, *overrides: Overrides, resume: Resume = False, smoke: Smoke = False) -> int:
    """Teach [student] with [teacher] on the student's own completions of [prompts].

    For example:

        understudy distill run.toml

        understudy distill run.toml --optim.learning_rate 1e-4 --student.lora.rank 32

        understudy distill run.toml --resume
    """
    from understudy import api

    return _finish(api.distill(load_config(run, overrides, smoke, resume), resume=resume), run)


@app.command
def rl(run: Run, /, *overrides: Overrides, resume: Resume = False, smoke: Smoke = False) -> int:
    """Outcome-reward RL on [prompts], graded by [reward]: the same loop without a teacher.

    For example:

        understudy rl run.toml --sampling.group_size 8
    """
    from understudy import api

    return _finish(api.rl(load_config(run, overrides, smoke, resume), resume=resume), run)


@app.command
def sft(run: Run, /, *overrides: Overrides, resume: Resume = False, smoke: Smoke = False) -> int:
    """Supervised fine-tuning of [student] on [prompts]: chats, prompt-completion pairs or documents.

    For example:

        understudy sft run.toml --prompts.path runs/samples/samples.jsonl
    """
    from understudy import api

    return _finish(api.sft(load_config(run, overrides, smoke, resume), resume=resume), run)


@app.command
def generate(run: Run, /, *overrides: Overrides, resume: Resume = False, smoke: Smoke = False) -> int:
    """Let [teacher] answer [prompts]: rows for `sft`, in <output_dir>/samples.jsonl.

    For example:

        understudy generate run.toml --sampling.group_size 1
    """
    from understudy import api

    result = api.generate(load_config(run, overrides, smoke, resume), resume=resume)
    print(f"{result.metrics['samples']} completions in {result.folder / 'samples.jsonl'}")
    return 0


@app.command(name="eval")
def eval_(run: Run, /, *overrides: Overrides, smoke: Smoke = False) -> int:
    """Grade [student] on [[evaluation.tasks]].

    Graders: exact_match, last_number, math, choice, questions, ifeval, reasoning_gym, ledger, or your own function as
    "package.module:function".

    For example:

        understudy eval run.toml --student.model runs/a/checkpoints/step_000100 --output_dir runs/a-eval
    """
    from understudy import api

    result = api.evaluate(load_config(run, overrides, smoke))
    for name, value in result.metrics.items():
        if not name.endswith("_se"):
            error = result.metrics.get(f"{name}_se")
            print(f"{name} {value:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
    print(f"written to {result.folder / 'evaluation.json'}; problem by problem to {result.folder / 'evaluation'}")
    return 0


@app.command(name="pipeline")
def pipeline_(
    plan: Annotated[Path, Parameter(help="The TOML file that lists the [[phases]].", show_default=False)],
    /,
    *overrides: Overrides,
    resume: Resume = False,
    smoke: Smoke = False,
) -> int:
    """Run several phases in order: sft, distill, rl, generate, eval; each goes on from the student before it.

    Knowledge in, behaviour back, again: docs/pipelines.md describes the plan's file. Overrides change what all phases
    share; --phases.<name>.<key> changes one phase. A plan that cannot work is refused before its first phase.

    For example:

        understudy pipeline plan.toml

        understudy pipeline plan.toml --resume

        understudy pipeline plan.toml --phases.behaviour.optim.num_steps 30
    """
    from understudy.config_pipeline import PipelineConfig
    from understudy.pipeline import pipeline, remove_miniature

    config = PipelineConfig.from_toml(plan, parse_overrides(overrides))
    if smoke:
        config = config.in_miniature(smoke_config)
        if not resume:
            remove_miniature(Path(config.output_dir), smoke_config)
    result = pipeline(config, resume=resume)
    if result.interrupted:
        print(f"stopped with {len(result.phases)} phases finished; continue with the same command and --resume")
        return 130
    print(f"student  {result.student}\nreport   {result.folder / 'report.html'}")
    return 0


@app.command
def demo(
    name: Literal["ledger", "assistant"] = "ledger", *, output: Path | None = None, seed: int = 0, smoke: Smoke = False
) -> int:
    """Watch a small model being taught on its own mistakes, beside the baselines.

    ledger: from one student, on-policy distillation (full and sampled), fine-tuning on teacher samples and RL; about
    two minutes on two cores. assistant: an assistant loses its manners while it learns company facts, and gets them
    back from its earlier self; about three minutes.

    Parameters
    ----------
    name
        Which demo.
    output
        Folder for its files; runs/demo-ledger or runs/demo-assistant by default, numbered when taken.
    seed
        Seed of the methods.
    """
    from understudy.worlds.demos import run

    return run(name, output or Path("runs") / f"demo-{name}", seed=seed, smoke=smoke)


@world.command
def build(name: Literal["ledger", "assistant"], *, output: Path, steps: int | None = None) -> int:
    """Make a world's models and files from nothing.

    ledger: trains the teacher and the start that ship with the package (about 7 minutes on one core) and writes prompts
    and test problems. assistant: writes the untrained model and all data of `understudy demo assistant`.

    For example:

        understudy world build ledger --output worlds/ledger

    Parameters
    ----------
    name
        Which world.
    output
        A new folder.
    steps
        Training steps, to try it out; the full recipe by default.
    """
    from understudy.worlds.demos import build_world

    return build_world(name, output, steps=steps)


def _finish(result: RunResult, run: Path) -> int:
    if result.interrupted_at is not None:
        print(
            f"stopped after step {result.interrupted_at}; everything is saved. "
            "Continue with the same command and --resume"
        )
        return 130
    print(f"student  {result.student}\nreport   {result.folder / 'report.html'}")
    return 0


def main() -> None:
    """Entry point: errors a user can act on are printed without a traceback."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("understudy").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="torch|transformers|peft")
    console = Console(stderr=True, highlight=False)
    sys.path.append("")  # a grader "my_graders:grade" lies in the working folder; a script's own path leaves that out
    try:
        code = app(sys.argv[1:], exit_on_error=False, print_error=True, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError:
        sys.exit(2)
    except UnderstudyError as error:
        console.print("[bold red]error[/] ", end="")
        console.print(str(error), markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of a pipe (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("interrupted; a run goes on from what it last saved with the same command and --resume")
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)

"""The command line. Exit codes: 0 done, 1 failed while running (state kept), 2 bad input (nothing started), 130
Ctrl-C."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

import understudy
from understudy.config import EvalTaskConfig, RunConfig, field_rows
from understudy.errors import ConfigError, UnderstudyError

if TYPE_CHECKING:
    from understudy.api import RunResult

_OVERRIDES_HELP = "Any key of the file, e.g. --optim.learning_rate 1e-4. Every key is listed by `understudy keys`."
Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, help=_OVERRIDES_HELP, show_default=False)]
Run = Annotated[Path, Parameter(help="The TOML file that describes the run.", show_default=False)]
Resume = Annotated[bool, Parameter(negative="", help="Continue the interrupted run in output_dir.")]
Smoke = Annotated[
    bool,
    Parameter(negative="", help="Two tiny steps into <output_dir>-smoke (an earlier smoke run there is replaced)."),
]

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


@app.command
def distill(run: Run, /, *overrides: Overrides, resume: Resume = False, smoke: Smoke = False) -> int:
    """Teach [student] with [teacher] on the student's own completions of [prompts].

    For example:

        understudy distill run.toml

        understudy distill run.toml --optim.learning_rate 1e-4 --student.lora.rank 32

        understudy distill run.toml --resume
    """
    from understudy import api

    return _finish(api.distill(_config(run, overrides, smoke, resume), resume=resume), run)


@app.command
def rl(run: Run, /, *overrides: Overrides, resume: Resume = False, smoke: Smoke = False) -> int:
    """Outcome-reward RL on [prompts], graded by [reward]: the same loop without a teacher.

    For example:

        understudy rl run.toml --sampling.group_size 8
    """
    from understudy import api

    return _finish(api.rl(_config(run, overrides, smoke, resume), resume=resume), run)


@app.command
def sft(run: Run, /, *overrides: Overrides, resume: Resume = False, smoke: Smoke = False) -> int:
    """Supervised fine-tuning of [student] on [prompts]: chats, prompt-completion pairs or documents.

    For example:

        understudy sft run.toml --prompts.path runs/samples/samples.jsonl
    """
    from understudy import api

    return _finish(api.sft(_config(run, overrides, smoke, resume), resume=resume), run)


@app.command
def generate(run: Run, /, *overrides: Overrides, resume: Resume = False, smoke: Smoke = False) -> int:
    """Let [teacher] answer [prompts]: rows for `sft`, in <output_dir>/samples.jsonl.

    For example:

        understudy generate run.toml --sampling.group_size 1
    """
    from understudy import api

    result = api.generate(_config(run, overrides, smoke, resume), resume=resume)
    print(f"{result.metrics['samples']} completions in {result.folder / 'samples.jsonl'}")
    return 0


@app.command(name="eval")
def eval_(run: Run, /, *overrides: Overrides, smoke: Smoke = False) -> int:
    """Grade [student] on [[evaluation.tasks]].

    Graders: exact_match, last_number, ledger, or your own function as "package.module:function".

    For example:

        understudy eval run.toml --student.model runs/a/checkpoints/step_000100 --output_dir runs/a-eval
    """
    from understudy import api

    result = api.evaluate(_config(run, overrides, smoke))
    for name, value in result.metrics.items():
        if not name.endswith("_se"):
            error = result.metrics.get(f"{name}_se")
            print(f"{name} {value:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
    print(f"written to {result.folder / 'evaluation.json'}")
    return 0


@app.command
def keys(*, schema: bool = False) -> int:
    """Every configuration key with its type, default and meaning.

    Parameters
    ----------
    schema
        Print the JSON schema instead, for editors.
    """
    if schema:
        print(json.dumps(RunConfig.model_json_schema(), indent=2))
        return 0
    for name, kind, default, description in field_rows():
        print(f"{name}  ({kind}; {default})\n    {description}")
    return 0


@app.command
def estimators() -> int:
    """What each objective's expected gradient is, its variance and its price: the page docs/estimators.md.

    Computed on the spot by writing down every outcome of sampling in small random worlds; half a minute.

    For example:

        understudy estimators > docs/estimators.md
    """
    import torch

    from understudy.estimators.table import render

    torch.set_num_threads(1)  # tensors of a few hundred numbers
    with Console(stderr=True).status("writing down every outcome"):
        page = render()
    print(page, end="")
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


@app.command
def report(*runs: Path) -> int:
    """Write report.html anew from a run's files.

    For example:

        understudy report runs/a

    Parameters
    ----------
    runs
        Folders of runs.
    """
    from understudy.report import write_run_report

    if not runs:
        raise ConfigError("report", got="no folder", expected="a run's output_dir", remedy="understudy report runs/a")
    for run in runs:
        if not (run / "config.toml").exists():
            raise ConfigError(
                f"run {run}",
                got="a folder without config.toml" if run.is_dir() else "no such folder",
                expected="a run's output_dir",
                remedy="check the path",
            )
        print(write_run_report(run))
    return 0


def _config(path: Path, overrides: tuple[str, ...], smoke: bool, resume: bool = False) -> RunConfig:
    config = RunConfig.from_toml(path, parse_overrides(overrides))
    if smoke:
        config = smoke_config(config)
        if not resume:
            _remove_smoke_run(Path(config.output_dir))
    return config


def _remove_smoke_run(folder: Path) -> None:
    """Make room where an earlier smoke run was. Anything else stays, and is refused as ever."""
    from understudy.runs import remove_run

    try:
        stored = RunConfig.from_toml(folder / "config.toml")
    except ConfigError:
        return
    # A smoke run's configuration is one that smoke would not make smaller.
    smaller = smoke_config(stored).model_copy(update={"output_dir": stored.output_dir})
    if Path(stored.output_dir).name == folder.name and stored == smaller:
        remove_run(folder)


def parse_overrides(tokens: tuple[str, ...]) -> dict[str, str]:
    """`--a.b 1 --c=2` -> {"a.b": "1", "c": "2"}. Raises ConfigError for anything else."""
    values: dict[str, str] = {}
    remaining = list(tokens)
    while remaining:
        token = remaining.pop(0)
        key, has_equals, value = token.partition("=")
        if not key.startswith("--") or (not has_equals and not remaining):
            raise ConfigError(
                f"argument {token}",
                got="no value" if key.startswith("--") else "a value without a key",
                expected="--section.key value",
                remedy="`understudy keys` lists every key",
            )
        values[key.removeprefix("--")] = value if has_equals else remaining.pop(0)
    return values


def smoke_config(config: RunConfig) -> RunConfig:
    """The same run in miniature: two steps of a few short completions, evaluations on eight rows. Nothing grows."""
    sampling = config.sampling

    def at_most(value: int | None, most: int) -> int:
        return most if value is None else min(value, most)

    def smaller_task(task: EvalTaskConfig) -> EvalTaskConfig:
        length = task.max_completion_tokens and min(task.max_completion_tokens, 32)
        return task.model_copy(update={"limit": at_most(task.limit, 8), "max_completion_tokens": length})

    small: Mapping[str, Any] = {
        "group_size": min(sampling.group_size, 2),
        "groups_per_batch": min(sampling.groups_per_batch, 4),
        "max_completion_tokens": min(sampling.max_completion_tokens, 32),
    }
    tasks = tuple(smaller_task(task) for task in config.evaluation.tasks)
    prompts = config.prompts and config.prompts.model_copy(update={"limit": at_most(config.prompts.limit, 16)})
    supervised, optim = config.supervised, config.optim
    mix = supervised.mix and supervised.mix.model_copy(update={"limit": at_most(supervised.mix.limit, 16)})
    return config.model_copy(
        update={
            "output_dir": f"{config.output_dir}-smoke",
            "prompts": prompts,
            "sampling": sampling.model_copy(update=small),
            "supervised": supervised.model_copy(update={"batch_size": at_most(supervised.batch_size, 4), "mix": mix}),
            "optim": optim.model_copy(update={"num_steps": at_most(optim.num_steps, 2), "warmup_steps": 0}),
            "evaluation": config.evaluation.model_copy(update={"tasks": tasks}),
        }
    )


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

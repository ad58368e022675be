"""Commands that train nothing: comparing, planning, looking things up. ``cli`` registers them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from understudy.cli_arguments import Overrides, Run, parse_overrides
from understudy.config import RunConfig, field_rows
from understudy.errors import ConfigError


def compare(a: Path, b: Path, /, *, output: Path | None = None) -> int:
    """Say whether the student evaluated in B is better than the one in A, on the same problems.

    Per task and temperature: both means, their difference with its standard error and 95% interval, the p-value of a
    paired permutation test, and the problems won, lost and tied by B.

    For example:

        understudy compare runs/a-eval runs/b-eval --output comparison.json

    Parameters
    ----------
    a
        The output_dir of an `understudy eval`.
    b
        Another's, on the same tasks.
    output
        Write the numbers to this JSON file too.
    """
    from understudy.checkpoints import write_json
    from understudy.compare import compare as compared

    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ConfigError(
            f"--output {output}",
            got="a folder" if output.is_dir() else "a file in a folder that does not exist",
            expected="a file to write",
            remedy="--output comparison.json",
        )
    comparison = compared(a, b)
    print(comparison.to_text())
    if output is not None:
        write_json(output, comparison.to_json())
    return 0


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


def cost(
    plan: Annotated[Path, Parameter(help="The TOML file of a plan, or of a run.", show_default=False)],
    /,
    *overrides: Overrides,
    prompt_tokens: int | None = None,
    completion_tokens: int | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Say what a run will cost before it starts: FLOPs, GPU hours, memory and money, beside the other methods.

    Of a run's file, distillation, RL and fine-tuning on the teacher's completions are set side by side. Hardware is
    that of `--hardware.gpu`, `.count`, `.price` and so on, for plans and runs alike: docs/costs.md.

    For example:

        understudy cost recipes/article-costs/plan.toml

        understudy cost run.toml --completion-tokens 400 --hardware.gpu H200 --hardware.price 3.5

    Parameters
    ----------
    prompt_tokens
        Mean length of a prompt; otherwise the plan's, or measured on the run's rows.
    completion_tokens
        Mean length of a completion; otherwise the plan's, or the run's cap, an upper bound.
    as_json
        Print numbers for machines instead of tables.
    """
    from understudy.config_plan import load_plan
    from understudy.plan_page import print_prediction
    from understudy.planner import predict

    for name, length in (("--prompt-tokens", prompt_tokens), ("--completion-tokens", completion_tokens)):
        if length is not None and length < 1:
            raise ConfigError(name, got=str(length), expected="at least 1", remedy=f"{name} 200")
    asked = load_plan(
        plan, parse_overrides(overrides), prompt_tokens=prompt_tokens, completion_tokens=completion_tokens
    )
    prediction = predict(asked)
    if as_json:
        print(json.dumps(prediction.to_json(asked), indent=2))
    else:
        print_prediction(prediction, asked)
    return 0


def doctor(
    run: Run,
    /,
    *overrides: Overrides,
    method: Literal["distill", "rl", "sft"] | None = None,
    fast: bool = False,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Find out before a run what would go wrong: another template, another end token, another temperature, no memory.

    Tokenizers, templates, rows and disk first; then models are loaded, the student writes, everybody marks it, and two
    small steps are timed. Each check says pass, warn or fail, what was seen, why it matters and what helps
    (docs/doctor.md). Nothing is written. Exit code 2 with a failure, else 0.

    For example:

        understudy doctor run.toml

        understudy doctor run.toml --fast

        understudy doctor run.toml --method rl --json --sampling.group_size 8

    Parameters
    ----------
    method
        The command that is meant; by default distill with a teacher, rl with rewards alone, sft with neither.
    fast
        Only what needs no weights: what every training command looks at when it starts.
    as_json
        Print findings for machines.
    """
    config = RunConfig.from_toml(run, parse_overrides(overrides))
    chosen = method or ("distill" if config.all_teachers else "rl" if config.reward else "sft")
    console = Console(stderr=True)
    with console.status("doctor") as status:
        from understudy.doctor.catalogue import diagnose
        from understudy.doctor.page import print_report

        report = diagnose(config, chosen, fast=fast, progress=lambda name: status.update(f"doctor: {name}"))
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print_report(report)
    return report.exit_code


def report(*runs: Path) -> int:
    """Write report.html anew from the files of a run or a pipeline.

    For example:

        understudy report runs/a

    Parameters
    ----------
    runs
        Folders of runs, or of pipelines.
    """
    from understudy.report import write_run_report
    from understudy.report.pipeline_report import write_pipeline_report

    if not runs:
        raise ConfigError("report", got="no folder", expected="a run's output_dir", remedy="understudy report runs/a")
    for run in runs:
        if (run / "pipeline.json").exists():
            from understudy.pipeline_state import load_state

            print(write_pipeline_report(run, state=load_state(run).model_dump(mode="json")))
            continue
        if not (run / "config.toml").exists():
            raise ConfigError(
                f"run {run}",
                got="a folder without config.toml" if run.is_dir() else "no such folder",
                expected="a run's output_dir",
                remedy="check the path",
            )
        print(write_run_report(run))
    return 0


def experiment(
    claim: str,
    /,
    *,
    pipelines: int = 5,
    scale: Literal["cpu", "gpu", "smoke"] = "cpu",
    output: Path = Path("experiments"),
    cache: Path | None = None,
    slots: int | None = None,
) -> int:
    """Test one of the article's claims, or all of them, with controls on several whole pipelines.

    Results go to each claim's folder in the output folder: results.json, plots, the README's results and report.html.
    Trained models and finished runs are kept in the cache: a stopped experiment goes on with the same command, and
    results are made again only when code or settings behind them change. docs/experiments.md says more.

    For example:

        understudy experiment c2

        understudy experiment all --scale gpu --slots 1

    Parameters
    ----------
    claim
        c1 to c13, or all.
    pipelines
        Independent repetitions, each with its own tasks, teacher and start; intervals are over these.
    scale
        cpu: about half an hour of two cores a claim, beside its models. gpu: larger models and more problems, for one
        data-centre GPU. smoke: everything in seconds; the results mean nothing.
    output
        Where results are kept.
    cache
        Where models and runs are kept; ~/.cache/understudy/experiments by default.
    slots
        Processes at a time; two by default, one for gpu.
    """
    from understudy.experiments.command import run

    return run(claim, pipelines=pipelines, scale=scale, output=output, cache=cache, slots=slots)

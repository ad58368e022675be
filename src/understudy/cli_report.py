"""`understudy report`: a run, a pipeline, or several runs side by side, as a page and as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.errors import ConfigError

if TYPE_CHECKING:
    from understudy.report.curves import Curve
    from understudy.report.page import Row


def report(*runs: Path, output: Path | None = None, figures: Path | None = None, csv: Path | None = None) -> int:
    """Write the page of a run or a pipeline anew from its files; of several runs, one page that compares them.

    Curves with their bands, costs by role and to reach an accuracy, rollouts, findings of the doctor and the guards,
    configuration and versions, in one HTML file: docs/report.md.

    For example:

        understudy report runs/a

        understudy report runs/a runs/b --output a-and-b.html

        understudy report runs/a runs/b --figures figures --csv metrics.csv

    Parameters
    ----------
    runs
        Folders of runs, or of one pipeline.
    output
        The page; by default report.html in the folder, and comparison.html here for several runs.
    figures
        A folder for every curve as SVG and PNG, with its points as CSV. Needs `pip install "understudy[figures]"`.
    csv
        A file for all metrics, one line per run, step and metric.
    """
    _check(runs, output, figures, csv)
    first, *others = runs
    if others:
        page, curves, metrics = _comparison(runs, output or Path("comparison.html"))
    elif (first / "pipeline.json").exists():
        page, curves, metrics = _pipeline(first, output)
    else:
        page, curves, metrics = _run(first, output)
    print(page)
    if figures is not None:
        from understudy.report.paper import write_figures

        print(f"{len(write_figures(curves, figures))} files in {figures}")
    if csv is not None:
        from understudy.report.paper import write_metrics_csv

        print(write_metrics_csv(metrics, csv))
    return 0


Made = tuple[Path, "Sequence[Curve]", "Mapping[str, Sequence[Row]]"]


def _run(folder: Path, output: Path | None) -> Made:
    from understudy.report import write_run_report
    from understudy.report.run_data import load_run
    from understudy.report.run_report import figures_of

    run = load_run(folder)
    return write_run_report(folder, output), figures_of(run), {run.name: run.metrics}


def _comparison(folders: Sequence[Path], output: Path) -> Made:
    from understudy.report.run_comparison import compared_figures, load_runs, write_run_comparison

    runs = load_runs(folders)
    page = write_run_comparison(folders, output)
    return page, compared_figures(runs), {name: run.metrics for name, run in runs.items()}


def _pipeline(folder: Path, output: Path | None) -> Made:
    from understudy.pipeline_state import load_state
    from understudy.report.pipeline_report import pipeline_curves, write_pipeline_report
    from understudy.report.run_data import merge_by_step, read_jsonl

    state = load_state(folder).model_dump(mode="json")
    paths = sorted(folder.glob("*/metrics.jsonl"))
    metrics = {path.parent.name: merge_by_step(read_jsonl(path)[0]) for path in paths}
    return write_pipeline_report(folder, output, state=state), pipeline_curves(folder, state=state), metrics


def _check(runs: Sequence[Path], output: Path | None, figures: Path | None, csv: Path | None) -> None:
    """Raise ConfigError for what cannot be read or written, before anything is."""
    if not runs:
        raise ConfigError("report", got="no folder", expected="a run's output_dir", remedy="understudy report runs/a")
    for run in runs:
        _check_run(run, alone=len(runs) == 1)
    if len({run.resolve() for run in runs}) < len(runs):
        given = ", ".join(map(str, runs))
        raise ConfigError("report", got=given, expected="every run once", remedy="leave the repeated one out")
    for name, path in (("--output", output), ("--csv", csv)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            got = "a folder" if path.is_dir() else "a file in a folder that does not exist"
            raise ConfigError(f"{name} {path}", got=got, expected="a file to write", remedy="make its folder first")
    if figures is not None and figures.exists() and not figures.is_dir():
        raise ConfigError(f"--figures {figures}", got="a file", expected="a folder", remedy="--figures figures")
    if figures is not None and find_spec("matplotlib") is None:
        remedy = 'pip install "understudy[figures]"; --csv needs nothing'
        raise ConfigError("--figures", got="no matplotlib", expected="matplotlib, which draws them", remedy=remedy)


def _check_run(run: Path, *, alone: bool) -> None:
    from understudy.pipeline_state import load_state

    if (run / "pipeline.json").exists():
        if not alone:
            remedy = "report it alone, or give the folders of its phases"
            raise ConfigError(f"run {run}", got="a pipeline beside other folders", expected="a run", remedy=remedy)
        load_state(run)  # raises for what is not whole
        return
    if not (run / "config.toml").exists():
        got = "a folder without config.toml" if run.is_dir() else "no such folder"
        raise ConfigError(f"run {run}", got=got, expected="a run's output_dir", remedy="check the path")

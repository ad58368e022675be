"""Commands about a run that is there: watching it, publishing what it made. ``cli`` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from understudy.errors import ConfigError


def watch(run: Path, /, *, every: float = 1.0) -> int:
    """Show a run of another process as it goes on: step, pace, time left, the metrics that matter, the last sample.

    On a terminal the same view as the run's own; elsewhere a line every ten seconds and after evaluations. Reads the
    run's folder only, ends when the run does, and shows finished runs as they are. Ctrl-C leaves the run alone.

    For example:

        understudy watch runs/first

        understudy watch runs/pipeline > progress.log

    Parameters
    ----------
    run
        The output_dir of a run or a pipeline.
    every
        Seconds between looks into the folder.
    """
    from understudy.live.watch import watch as follow

    if every <= 0:
        raise ConfigError("--every", got=f"{every:g}", expected="seconds above 0", remedy="--every 1")
    try:
        follow(run, Console(), every=every)
    except KeyboardInterrupt:  # the watching ends, not the run
        return 130
    return 0


def export(
    run: Path,
    out: Path,
    /,
    *,
    step: int | None = None,
    merge: Annotated[bool, Parameter(negative="")] = False,
    base_model: str | None = None,
    evaluation: tuple[Path, ...] = (),
) -> int:
    """Make a folder that can be published of a run's student: weights, tokenizer, model card, curves, costs.

    The card holds the run's own numbers; the licence is left to you. Nothing is uploaded: `hf upload owner/name OUT`
    does that.

    For example:

        understudy export runs/first exported/first

        understudy export runs/lora exported/lora --merge --step 50

    Parameters
    ----------
    run
        The output_dir of a run, or of a pipeline's phase.
    out
        A new folder.
    step
        Which checkpoint; the newest by default.
    merge
        Whole weights instead of adapters.
    base_model
        What the base model is called on the hub, where the run read it from a folder.
    evaluation
        The output_dir of an `understudy eval` of this checkpoint, for the card; may be repeated.
    """
    from understudy.export import export as write

    print(write(run, out, step=step, merge=merge, base_model=base_model, evaluations=evaluation))
    return 0

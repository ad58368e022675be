"""`understudy score`: the teacher's marks on every token, as a page. ``cli`` registers it."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from understudy.errors import ConfigError

Format = Literal["plain", "trl", "verl", "slime", "miles", "prime-rl", "tinker"]
Role = Literal["student", "teacher", "tokenizer"]

_GOES_WITH = {
    "--step": "a run's folder: steps of --compare stand behind an @",
    "--tokenizer": "rollouts that are there: what a student writes now has its own",
    "--format": "a file, of --text or --compare",
}


def score(
    run: Annotated[str | None, Parameter(help="A run's folder; runs/x@40 for its step 40.", show_default=False)] = None,
    /,
    *,
    student: str | None = None,
    teacher: str | None = None,
    prompt: Annotated[list[str] | None, Parameter(allow_leading_hyphen=True, negative="")] = None,
    text: Path | None = None,
    compare: Annotated[tuple[str, str] | None, Parameter(negative="")] = None,
    step: int | Literal["all"] | None = None,
    form: Annotated[
        Format | None, Parameter(name="--format", help="What the file is; otherwise recognised by its fields.")
    ] = None,
    tokenizer: str | None = None,
    samples: int = 4,
    max_completion_tokens: int = 512,
    plain: Annotated[bool, Parameter(negative="")] = False,
    seed: int = 0,
    topk: int = 5,
    device: str = "auto",
    trust_remote_code: Annotated[list[Role] | None, Parameter(negative="")] = None,
    output: Path = Path("credit.html"),
    open_page: Annotated[bool, Parameter(name="--open")] = True,
) -> int:
    """Show where the student goes wrong: every token coloured by what the teacher makes of it, in one HTML file.

    Of answers sampled now, of completions in a file, of a run's stored rollouts, or of two steps side by side. Files
    may be dumps of TRL, verl, slime, miles, prime-rl or the Tinker cookbook: docs/credit.md.

    For example:

        understudy score --student runs/a/checkpoints/step_000100 --teacher Qwen/Qwen3-8B --prompt "Why?"

        understudy score --text answers.jsonl --student S --teacher T

        understudy score runs/a --step 40

        understudy score runs/a --step all

        understudy score --compare runs/a@0 runs/a@100

    Parameters
    ----------
    student
        Hub id or folder of the model that writes, or wrote.
    teacher
        Hub id or folder of the model that marks; one token-to-id map with the student's.
    prompt
        A question for the student; may be given several times. With the student's chat template, where it has one.
    text
        A file of completions: .jsonl, .json or .pt.
    compare
        Two of runs/x@STEP, a run or a file, whose rollouts answer the same prompts.
    step
        The stored step of a run, or all of them on one page; its last by default.
    tokenizer
        Hub id or folder whose tokenizer turns ids into text, for files without texts and models.
    samples
        Answers per prompt.
    max_completion_tokens
        An answer is cut here.
    plain
        Prompts as they are, without the chat template.
    seed
        Seed of the answers.
    topk
        Alternatives kept per token and model.
    device
        auto, cpu, mps, cuda or cuda:0.
    trust_remote_code
        Whose Python code (auto_map) may run, with your rights: student, teacher or tokenizer; may be given several
        times.
    output
        The page to write.
    open_page
        Open the page in a browser, where there is a screen.
    """
    _check_asked(run, prompt, text, compare, output)
    for name, value, needed in (
        ("--step", step, run),
        ("--tokenizer", tokenizer, not prompt),
        ("--format", form, text or compare),
    ):
        if value is not None and not needed:
            raise ConfigError(name, got=str(value), expected=_GOES_WITH[name], remedy=f"drop {name}")
    for name, value in (("--samples", samples), ("--max-completion-tokens", max_completion_tokens), ("--topk", topk)):
        if value < 1:
            raise ConfigError(name, got=str(value), expected="at least 1", remedy=f"{name} 4")
    from understudy.score import command
    from understudy.score.sources import read_source

    models = command.Models(student, teacher, tokenizer, device, topk, frozenset(trust_remote_code or ()))
    if compare is not None:
        page = command.score_pair(*command.read_pair(compare, form), models, output)
    elif prompt:
        sampling = command.Sampling(samples, max_completion_tokens, seed, plain)
        page = command.score_prompts(prompt, models, sampling, output)
    else:
        page = command.score_source(read_source(run or str(text), step=step, form=form), models, output)
    print(page)
    if open_page and _has_screen():
        webbrowser.open(page.resolve().as_uri())
    return 0


def _check_asked(
    run: str | None, prompt: list[str] | None, text: Path | None, compare: tuple[str, str] | None, output: Path
) -> None:
    asked = {"a run": run, "--prompt": prompt, "--text": text, "--compare": compare}
    given = [name for name, value in asked.items() if value]
    if len(given) != 1:
        raise ConfigError(
            "score",
            got=" and ".join(given) or "nothing to score",
            expected="one of a run, --prompt, --text and --compare",
            remedy="`understudy score --help` shows an example of each",
        )
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ConfigError(
            f"--output {output}",
            got="a folder" if output.is_dir() else "a file in a folder that does not exist",
            expected="a file to write",
            remedy="--output credit.html",
        )


def _has_screen() -> bool:
    """A browser of the terminal would take it over, and over ssh nobody would see one."""
    headless = sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return sys.stdout.isatty() and not headless

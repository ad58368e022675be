"""What commands take: a file, overrides, --resume, and --smoke, the same run in miniature."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from understudy.config import EvalTaskConfig, RunConfig
from understudy.errors import ConfigError

_OVERRIDES_HELP = "Any key of the file, e.g. --optim.learning_rate 1e-4. Every key is listed by `understudy keys`."
Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, help=_OVERRIDES_HELP, show_default=False)]
Run = Annotated[Path, Parameter(help="The TOML file that describes the run.", show_default=False)]
Resume = Annotated[bool, Parameter(negative="", help="Continue the interrupted run in output_dir.")]
Smoke = Annotated[
    bool,
    Parameter(negative="", help="Two tiny steps into <output_dir>-smoke (an earlier smoke run there is replaced)."),
]


def load_config(path: Path, overrides: tuple[str, ...], smoke: bool, resume: bool = False) -> RunConfig:
    """The file with overrides, in miniature if asked for; an earlier miniature in its place goes."""
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
        update = {"limit": at_most(task.limit, 8), "max_completion_tokens": length, "samples": min(task.samples, 2)}
        return task.model_copy(update=update)

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
            # Its name comes from its folder, so that it is not taken for the run.
            "tracking": config.tracking.model_copy(update={"run_name": None}),
        }
    )

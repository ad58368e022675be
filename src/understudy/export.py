"""`understudy export`: a checkpoint as a folder that can be published, with a card that holds the run's own numbers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from understudy.checkpoints import STATE_FILE, SUMS_FILE, damage, list_checkpoints, write_json
from understudy.config import RunConfig
from understudy.errors import ConfigError
from understudy.metrics import MetricsLog, read_metrics
from understudy.model_card import Exported, Row, base_on_hub, card, curves, is_hub_id
from understudy.tokenization import adapter_base

# What only a resumed run needs, and peft's own card, which the run's replaces.
_LEFT = (STATE_FILE, SUMS_FILE, "README.md")
# Keys of the model's own files that hold where it was loaded from.
_ORIGINS = ("_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_file", "vocab_file")


def export(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    merge: bool = False,
    base_model: str | None = None,
    evaluations: tuple[Path, ...] = (),
) -> Path:
    """Write the student after ``step`` updates (absent: the newest checkpoint) to the new folder ``out``.

    Weights are the checkpoint's files, byte for byte; ``merge`` makes whole weights of adapters, in float32 and then in
    the base model's precision. ``base_model`` is what the base is called on the hub, where the run read it from a
    folder. ``evaluations``: output_dirs of `understudy eval` of this checkpoint.

    Raises ConfigError for what is not there, is not as the run wrote it, or would not load elsewhere; ``out`` is whole
    or not there.
    """
    config = _config_of(run)
    at, checkpoint = _checkpoint(run, step)
    _check_out(out)
    _check_base(checkpoint, merge, base_model)
    separate = {path: _evaluation(path, checkpoint) for path in evaluations}
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] <= at]
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    if merge:
        _merge(checkpoint, partial, config)
    else:
        _copy(checkpoint, partial)
    adapters = adapter_base(partial) is not None
    base = base_model or base_on_hub(run)
    _tidy(partial, base)
    ends = _generation_config(checkpoint, partial, config)
    alarms = [alarm for alarm in MetricsLog(run / "guards.jsonl").rows() if alarm["step"] <= at]
    what = Exported(
        name=out.name,
        method=_method(run),
        step=at,
        base=base,
        adapters=adapters,
        merged=merge,
        ends=ends,
        versions=_versions(run),
        separate={path.name: metrics for path, metrics in separate.items()},
        alarms=alarms,
    )
    _write_card(partial, what, config, rows, _costs(run, checkpoint))
    _refuse_local_paths(partial, run)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return out


def _write_card(
    out: Path, what: Exported, config: RunConfig, rows: Sequence[Row], costs: Mapping[str, Mapping[str, Any]]
) -> None:
    """README.md, and what it shows and refers to."""
    write_json(out / "costs.json", costs)
    images = curves(rows)
    for name, svg in images.items():
        (out / "curves").mkdir(exist_ok=True)
        (out / "curves" / f"{name}.svg").write_text(svg, encoding="utf-8")
    (out / "README.md").write_text(card(what, config, rows, costs["roles"], list(images)), encoding="utf-8")


def _config_of(run: Path) -> RunConfig:
    if not (run / "config.toml").exists():
        raise ConfigError(
            f"run {run}",
            got="a folder without config.toml" if run.is_dir() else "no such folder",
            expected="the output_dir of a run, or of a pipeline's phase",
            remedy=f"check the path (working folder: {Path.cwd()})",
        )
    return RunConfig.from_toml(run / "config.toml")


def _checkpoint(run: Path, step: int | None) -> tuple[int, Path]:
    found = dict(list_checkpoints(run / "checkpoints"))
    if not found or (step is not None and step not in found):
        raise ConfigError(
            f"run {run}",
            got="no checkpoint" if not found else f"no checkpoint of step {step}",
            expected="a run that trains and has saved one" if not found else f"one of {', '.join(map(str, found))}",
            remedy="train it first" if not found else f"--step {max(found)}, or leave --step out for the newest",
        )
    at = max(found) if step is None else step
    if (got := damage(found[at])) is not None:
        raise ConfigError(
            f"checkpoint {found[at]}",
            got=got,
            expected="the files that the run saved there",
            remedy="put it back from a copy, or choose another --step",
        )
    return at, found[at]


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"output {out}",
            got="a folder that is not empty" if out.is_dir() else "a file",
            expected="a new or empty folder",
            remedy="choose another one",
        )


def _check_base(checkpoint: Path, merge: bool, base_model: str | None) -> None:
    """Adapters load elsewhere only on top of a base that is there too."""
    base = adapter_base(checkpoint)
    if base is None:
        if merge:
            raise ConfigError(
                "--merge",
                got="a checkpoint of whole weights",
                expected="a run with adapters ([student.lora])",
                remedy="drop --merge",
            )
        return
    if base_model is not None and not is_hub_id(base_model):
        raise ConfigError(
            "--base-model", got=base_model, expected="a hub id, owner/name", remedy="--base-model Qwen/Qwen3-8B-Base"
        )
    if not merge and base_model is None and (Path(base).exists() or not is_hub_id(base)):
        raise ConfigError(
            f"adapters of {base}",
            got="a base model in a folder of this machine",
            expected="one that can be loaded elsewhere too",
            remedy="--merge, or say what it is called on the hub: --base-model owner/name",
        )


def _evaluation(folder: Path, checkpoint: Path) -> Mapping[str, float]:
    """evaluation.json of an `understudy eval` of this very checkpoint."""
    path = folder / "evaluation.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        student = RunConfig.from_toml(folder / "config.toml").student.model
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--evaluation {folder}",
            got=str(error).splitlines()[0],
            expected="the output_dir of a finished `understudy eval`",
            remedy="check the path",
        ) from None
    if Path(student).resolve() != checkpoint.resolve():
        raise ConfigError(
            f"--evaluation {folder}",
            got=f"an evaluation of {student}",
            expected=f"one of {checkpoint}, which is exported",
            remedy=f"understudy eval run.toml --student.model {checkpoint} --output_dir another-folder",
        )
    return metrics


def _copy(checkpoint: Path, out: Path) -> None:
    for path in checkpoint.iterdir():
        if path.name not in _LEFT:
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, out / path.name)


def _merge(checkpoint: Path, out: Path, config: RunConfig) -> None:
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from understudy.backends.loading import load_model

    base = adapter_base(checkpoint)
    assert base is not None
    # In float32, and only then rounded: adapters are small beside the weights they are added to.
    cpu, trust = torch.device("cpu"), config.student.trust_remote_code
    model: Any = load_model(str(checkpoint), role="student", dtype=torch.float32, device=cpu, trust_remote_code=trust)
    dtype = AutoConfig.from_pretrained(base, trust_remote_code=trust).dtype
    model.to(dtype or torch.float32).save_pretrained(out)
    AutoTokenizer.from_pretrained(str(checkpoint), trust_remote_code=trust).save_pretrained(out)


def _tidy(out: Path, base: str | None) -> None:
    """Take folders of this machine out of the model's own files."""
    for path in out.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            continue
        tidy = dict(content)
        for key in _ORIGINS:
            value = content.get(key)
            if key == "base_model_name_or_path" and value is not None and base is not None:
                tidy[key] = base
            elif isinstance(value, str) and value and (Path(value).exists() or not is_hub_id(value)):
                del tidy[key]
        if tidy != content:
            write_json(path, tidy)


def _generation_config(checkpoint: Path, out: Path, config: RunConfig) -> tuple[int, ...]:
    """The model's own, ending where the run's completions ended: what has learnt to stop there must be stopped there.
    Returns these ids."""
    from transformers import AutoConfig, GenerationConfig

    source = adapter_base(checkpoint) or str(checkpoint)
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:  # the model has none; transformers derives one
        own_config = AutoConfig.from_pretrained(source, trust_remote_code=config.student.trust_remote_code)
        generation = GenerationConfig.from_model_config(own_config)
    ends = tuple(config.sampling.stop_token_ids or ())
    own = generation.eos_token_id
    own = {own} if isinstance(own, int) else set(own or ())
    if ends and set(ends) != own:
        generation.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
    generation.save_pretrained(out)
    return ends


def _costs(run: Path, checkpoint: Path) -> dict[str, Any]:
    """What it cost up to this checkpoint, as its own state has it; of a checkpoint without one, the whole run's."""
    import torch

    state = checkpoint / STATE_FILE
    if state.exists():
        # Mapped: the optimizer's numbers, twice the weights, are not read.
        return torch.load(state, map_location="cpu", weights_only=True, mmap=True)["costs"]
    return json.loads((run / "costs.json").read_text(encoding="utf-8"))


def _method(run: Path) -> str:
    found = re.match(r"# understudy (\w+), resolved", (run / "config.toml").read_text(encoding="utf-8"))
    return found[1] if found else ""


def _versions(run: Path) -> str:
    """The second line of the configuration's header: packages, without the machine's platform."""
    lines = (run / "config.toml").read_text(encoding="utf-8").splitlines()
    found = re.match(r"# (understudy .*?, Python [\d.]+)", lines[1]) if len(lines) > 1 else None
    return found[1] if found else ""


def _refuse_local_paths(out: Path, run: Path) -> None:
    """Raise ConfigError when a text file names this machine's folders: it would be published with them."""
    marks = {str(path) for path in (run.resolve(), Path.cwd(), Path.home())} - {"/"}
    # tokenizer.json may hold any text as a token.
    for path in (p for p in out.rglob("*") if p.suffix in (".md", ".json", ".svg") and p.name != "tokenizer.json"):
        text = path.read_text(encoding="utf-8")
        if found := sorted(mark for mark in marks if mark in text):
            raise ConfigError(
                f"export: {path.relative_to(out)}",
                got=f"a folder of this machine, {found[0]}",
                expected="nothing that says where the run lay",
                remedy=f"what was written is in {out}; take the path out there and rename the folder",
            )

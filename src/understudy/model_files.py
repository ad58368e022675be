"""What a model's folder holds, looked at before a library reads it: weights that are no programs, sizes that exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from understudy.errors import ConfigError, first_line

ADAPTERS = "adapter_config.json"
# Libraries make a list or a module per layer before they look at the weights: a wrong number would take all memory.
_MOST_LAYERS = 10_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_object(path: Path, role: str) -> dict[str, Any]:
    """The JSON object in a file of a model's folder. Raises ConfigError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        got = f"a {type(found).__name__}"
    except (OSError, ValueError, RecursionError) as error:
        found, got = None, first_line(error)
    if isinstance(found, dict):
        return found
    raise ConfigError(
        f"{role} model {path.parent}: {path.name}",
        got=got,
        expected="a JSON object, as save_pretrained writes it",
        remedy="copy or download the folder again",
    )


def check_sizes(folder: Path, role: str) -> None:
    """Raise ConfigError for a config.json whose numbers of layers nothing has."""
    nodes = [read_object(folder / "config.json", role)]
    while nodes:
        node = nodes.pop()
        nodes += [value for value in node.values() if isinstance(value, dict)]
        for name, value in node.items():
            if "layer" in name and isinstance(value, int | float) and not -1 <= value <= _MOST_LAYERS:
                raise ConfigError(
                    f"{role} model {folder}: config.json",
                    got=f"{name} = {value}"[:200],
                    expected=f"at most {_MOST_LAYERS} layers",
                    remedy="copy or download the folder again",
                )


def adapter_base(folder: Path) -> str | None:
    """The base model an adapter folder (peft) names, or None for an ordinary folder. Raises ConfigError for a file that
    names none."""
    path = folder / ADAPTERS
    if not path.exists():
        return None
    base = read_object(path, "adapters").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"adapters {path}",
            got=f"base_model_name_or_path = {base!r}"[:200],
            expected="the folder or hub id of the model that they belong to",
            remedy="write it there, or save the adapters again with peft",
        )
    if Path(base, ADAPTERS).exists() and not Path(base, "config.json").exists():
        raise ConfigError(
            f"adapters {path}",
            got=f"base_model_name_or_path = {base!r}, which are adapters too",
            expected="a whole model below them",
            remedy="merge those adapters into their base, and name the result there",
        )
    return base


def check_weights(model: str, role: str) -> None:
    """Raise ConfigError for a folder without safetensors: other files of weights are pickles, programs that run when
    they are read. Hub ids are left to the library, which is told the same."""
    folder = Path(model)
    if not folder.is_dir():
        return
    own = "adapter_model.safetensors" if (folder / ADAPTERS).exists() else "*.safetensors"
    if any(folder.glob(own)):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    raise ConfigError(
        f"{role} model {folder}",
        got=f"weights in {', '.join(pickles[:3])}: a pickle, which can run code when it is read"
        if pickles
        else f"a folder without {own}",
        expected="weights in safetensors, the only format that is read",
        remedy="where you trust the file, convert it once: load it with use_safetensors=False in a script of your own, "
        "and save_pretrained into another folder"
        if pickles
        else "save the model there with save_pretrained",
    )


def unreadable(
    error: BaseException, model: str, role: str, *, expected: str, remedy: str, note: str = ""
) -> ConfigError:
    """What a library raised for a model it could not load, as a ConfigError. ``note``: what comes before its words."""
    if isinstance(error, ValueError) and "trust_remote_code=True" in str(error):
        return ConfigError(
            f"{role} model {model}",
            got="a model that brings Python code of its own (auto_map), which was not run",
            expected="a model that transformers knows, or your word that this code may run",
            remedy=f"read the code; then set {role}.trust_remote_code = true, and it runs with your rights "
            f"(understudy score --trust-remote-code {role}; understudy serve teacher --trust-remote-code)",
        )
    return ConfigError(f"{role} model {model}", got=note + first_line(error), expected=expected, remedy=remedy)

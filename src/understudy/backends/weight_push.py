"""Weights to a vLLM server: a folder is written, the server loads it, and a label is read back.

Whole weights replace the server's through routes that it has with VLLM_SERVER_DEV_MODE=1; adapters are loaded beside
its base model, under a name of their own, with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from understudy.backends.http import BadReply, Reply, Request, ServerClient
from understudy.backends.protocols import Trainer
from understudy.backends.served_models import model_cards
from understudy.errors import RunError, ServerError, ServerUnavailable

log = logging.getLogger("understudy")

ATTEMPTS = 3  # a server that restarts in the middle of each push is not going to hold weights
STEP_SECONDS = 10.0  # patience with one call of a push; a server that is away is waited for between attempts
LOAD_SECONDS = 1800.0  # one load may take: a large model comes from a shared disk


class Way(Protocol):
    """How weights get from a folder into the server."""

    needs: str
    """A file that the folder must hold."""

    def fields(self, label: str) -> dict[str, Any]:
        """What a completion request says, so that these weights write it."""
        ...

    def holds(self, label: str) -> bool:
        """Whether the server has the weights of this label. Waits for a server that is away."""
        ...

    def load(self, label: str, folder: Path) -> None:
        """Make it so. Raises ServerError where the server cannot, or restarts meanwhile."""
        ...

    def unload(self, label: str) -> None:
        """These weights are not asked for again."""
        ...


class FullWeights:
    """All weights, in place of those the server has; its weight version is their label.

    ``salted``: prefixes are cached under the label, instead of clearing the cache with each load.
    """

    needs = "config.json"

    def __init__(self, client: ServerClient, served_model: str, *, salted: bool) -> None:
        self._client, self._served_model, self._salted = client, served_model, salted

    def fields(self, label: str) -> dict[str, Any]:
        """See ``Way.fields``."""
        return {"model": self._served_model, **({"cache_salt": label} if self._salted else {})}

    def holds(self, label: str) -> bool:
        """See ``Way.holds``."""
        return self._label(None) == label

    def load(self, label: str, folder: Path) -> None:
        """See ``Way.load``. Requests of others wait meanwhile and go on with the new weights."""
        self._post("/pause?mode=keep")
        try:
            # Weights that are half loaded must not go by the name of those before or after.
            loading = f"{label}-loading"
            self._post("/update_weight_version", {"new_version": loading}, patience=0)
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._post("/collective_rpc", body, patience=0, parse=partial(_no_results, described(self._client)))
            if not self._salted:
                # Without running requests being reset, the server leaves their blocks, and does not say so.
                self._post("/reset_prefix_cache?reset_running_requests=true")
            if (found := self._label(STEP_SECONDS)) != loading:
                raise ServerError(
                    f"{described(self._client)} holds weights {found!r} right after loading {label!r}: it restarted"
                )
            # Not tried again: a server that has come back meanwhile holds other weights.
            self._post("/update_weight_version", {"new_version": label}, patience=0)
        except BaseException:
            with contextlib.suppress(ServerError):
                self._post("/resume")
            raise
        self._post("/resume")

    def unload(self, label: str) -> None:
        """See ``Way.unload``: loading others has done it."""

    def _label(self, patience: float | None) -> str:
        return self._client.call(Request("GET", "/weight_info", parse=_weight_version), patience_seconds=patience)

    def _post(
        self,
        path: str,
        body: Any = None,
        *,
        patience: float = STEP_SECONDS,
        parse: Callable[[Reply], None] = lambda reply: None,
    ) -> None:
        request = Request("POST", path, body, parse=parse, timeout_seconds=LOAD_SECONDS)
        self._client.call(request, patience_seconds=patience)


class AdapterWeights:
    """Adapters, each version under its label as a name. Cached prefixes are kept apart by that name."""

    needs = "adapter_config.json"

    def __init__(self, client: ServerClient) -> None:
        self._client = client

    def fields(self, label: str) -> dict[str, Any]:
        """See ``Way.fields``."""
        return {"model": label}

    def holds(self, label: str) -> bool:
        """See ``Way.holds``."""
        return label in self._client.call(Request("GET", "/v1/models", parse=_model_ids))

    def load(self, label: str, folder: Path) -> None:
        """See ``Way.load``."""
        body = {"lora_name": label, "lora_path": str(folder)}
        request = Request("POST", "/v1/load_lora_adapter", body, parse=lambda _: None, timeout_seconds=LOAD_SECONDS)
        try:
            self._client.call(request, patience_seconds=0)
        except ServerError:
            # An answer that was lost on its way: the next attempt is told that the name is taken.
            if not self.holds(label):
                raise

    def unload(self, label: str) -> None:
        """See ``Way.unload``. The server may have dropped it already, in a restart or for another."""
        request = Request("POST", "/v1/unload_lora_adapter", {"lora_name": label}, parse=lambda _: None)
        with contextlib.suppress(ServerError):
            self._client.call(request, patience_seconds=0)


class WeightPush:
    """Versions of a trainer's weights on their way to one server.

    A label is "<run>-<version>", and the run part is drawn at random: neither the weights that a restarted server began
    with nor those of another run are taken for these. ``folder``: where versions are written, one folder each.
    """

    def __init__(self, way: Way, client: ServerClient, folder: Path) -> None:
        self._way, self._client, self._folder = way, client, folder
        self._run = f"understudy-{secrets.token_hex(8)}"

    def label(self, version: int) -> str:
        """What the server is to call the weights of this version."""
        return f"{self._run}-{version}"

    def fields(self, version: int) -> dict[str, Any]:
        """What a completion request says, so that these weights write it."""
        return self._way.fields(self.label(version))

    def holds(self, version: int) -> bool:
        """Whether the server has these weights. Waits for a server that is away; raises ServerError as its client."""
        return self._way.holds(self.label(version))

    def write(self, trainer: Trainer, version: int) -> None:
        """The trainer's weights of now, as those of ``version``: a folder that is whole as soon as it has its name.

        Raises:
            RunError: the trainer wrote no model, or nothing can be written there.
        """
        final = self._folder / self.label(version)
        unfinished = final.with_name(f"{final.name}.partial")
        try:
            for stale in (unfinished, final):
                if stale.exists():
                    shutil.rmtree(stale)
            unfinished.mkdir(parents=True)
            trainer.save_pretrained(unfinished)
            if not (unfinished / self._way.needs).exists():
                raise RunError(
                    f"trainer.save_pretrained wrote {sorted(path.name for path in unfinished.iterdir())}; expected "
                    f"{self._way.needs} among them, for the sampler's server"
                )
            unfinished.rename(final)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"weights for the sampler's server cannot be written: {error}; free some space, or name another folder "
                "in sampler.weights_dir"
            ) from error

    def push(self, version: int) -> None:
        """Have the server load what ``write`` wrote, and confirm it; then forget older versions.

        Raises:
            ServerUnavailable: it is away for longer than patience.
            ServerError: it cannot load them.
        """
        label = self.label(version)
        folder = (self._folder / label).resolve()
        older = [path for path in self._versions() if path.name != label]
        for path in older:
            self._way.unload(path.name)  # first: a server with room for one adapter would drop it, and lose count
        for attempt in range(1, ATTEMPTS + 1):
            self._client.call(Request("GET", "/health", parse=lambda reply: None))
            try:
                self._way.load(label, folder)
            except ServerError as error:
                if attempt == ATTEMPTS:
                    kind = ServerError if error.status else type(error)
                    hint = f"the weights are in {folder}: can the server read that? sampler.weights_dir moves it"
                    raise kind(f"{error}; {hint}", status=error.status) from error
                log.warning("%s; pushing the weights again", error)
            else:
                if self.holds(version):
                    break
        else:
            who = described(self._client)
            raise ServerUnavailable(f"{who} lost the weights {label!r} {ATTEMPTS} times right after it loaded them")
        for path in older:
            _remove(path)

    def close(self) -> None:
        """Take the weights off the server where that is possible, and their folders away."""
        for path in self._versions():
            self._way.unload(path.name)
            _remove(path)
        with contextlib.suppress(OSError):  # others may have something there
            self._folder.rmdir()

    def _versions(self) -> list[Path]:
        """Whole folders of this run."""
        folders = self._folder.glob(f"{self._run}-*") if self._folder.is_dir() else []
        return sorted(path for path in folders if re.fullmatch(rf"{self._run}-\d+", path.name))


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("weights that are no longer needed stay behind: %s", error)


def described(client: ServerClient) -> str:
    """A server as errors name it."""
    return f"server {client.name!r} at {client.root}"


def _no_results(server: str, reply: Reply) -> None:
    """Of the workers, that is: ``reload_weights`` returns nothing, and what else comes back is a complaint."""
    if not reply.content:
        return
    tree = reply.json()
    results = tree.get("results") if isinstance(tree, dict) else None
    if not isinstance(results, list) or any(result is not None for result in results):
        raise ServerError(
            f"{server}, reload_weights: got {str(tree)[:500]}; expected workers that loaded, with nothing to say"
        )


def _weight_version(reply: Reply) -> str:
    tree = reply.json()
    version = tree.get("weight_version") if isinstance(tree, dict) else None
    if not isinstance(version, str):
        raise BadReply(f"got {str(tree)[:200]}; expected the weight_version")
    return version


def _model_ids(reply: Reply) -> set[str]:
    return {card["id"] for card in model_cards(reply)}

"""A sampler on a stock vLLM server, which is sent the trainer's weights after every update."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from understudy.backends.http import client_of
from understudy.backends.protocols import Trainer
from understudy.backends.vllm_check import Served, Wanted, check_config, check_server
from understudy.backends.vllm_completions import Completion, Job, Writing, continued, jobs_of, request
from understudy.backends.weight_probe import Mismatch, Probe, complaint, fitting, measure, probe_of, written
from understudy.backends.weight_push import (
    ATTEMPTS,
    AdapterWeights,
    FullWeights,
    WeightPush,
    described,
)
from understudy.config import SamplingConfig
from understudy.config_served import WEIGHTS_FOLDER, SamplerServerConfig
from understudy.errors import ServerError, ServerUnavailable
from understudy.types import Prompt, Rollout, TokenSequence

log = logging.getLogger("understudy")


class VllmSampler:
    """Writes on a server with the weights of ``trainer``.

    ``set_policy_version`` takes the trainer's weights and sends them, once a call of ``sample`` that is under way has
    ended: the rollouts of one call are of one version. The trainer is touched there alone, and in the very first call
    of ``sample``, so that later ones may run beside training. Before and after every ``sample`` the server is asked
    which weights it has. One that has restarted, or that another run has sent weights to, gets them again, and what it
    wrote in between is written anew.

    ``model``: what the server is to be started with. ``lora_rank``: of the adapters that the trainer holds; None: it
    holds whole weights. ``stop_ids`` and ``ends`` (completion so far) -> whether a stop string ends it: as for
    ``LocalSampler``. ``probe`` gives the sequences (prompts alone are enough) that server and trainer are compared on
    after a push; None: completions of the last call. ``last_mismatch``: what the newest comparison found.

    Raises:
        ConfigError: the trainer's temperature is not 1, or the weights cannot be pushed as configured.
    """

    def __init__(
        self,
        config: SamplerServerConfig,
        trainer: Trainer,
        *,
        output_dir: str | Path,
        model: str,
        vocab_size: int,
        stop_ids: frozenset[int],
        lora_rank: int | None = None,
        ends: Callable[[Sequence[int]], bool] | None = None,
        temperature: float = 1.0,
        probe: Callable[[], Sequence[TokenSequence]] | None = None,
    ) -> None:
        check_config(config, lora_rank, temperature)
        self.last_mismatch: Mismatch | None = None
        self._config, self._trainer = config, trainer
        self._wanted = Wanted(config, model, lora_rank)
        self._vocab_size, self._stop_ids, self._ends = vocab_size, stop_ids, ends
        self._given = probe
        self._folder = Path(config.weights_dir) if config.weights_dir else Path(output_dir) / WEIGHTS_FOLDER
        self._lock = threading.RLock()
        self._served: Served | None = None
        self._push: WeightPush | None = None
        self._policy_version = 0
        self._written_version: int | None = None  # of the newest folder
        self._probe: Probe | None = None  # of the policy version, once there are sequences
        self._probed = False  # whether the comparison has been passed since the last push
        self._last: list[TokenSequence] = []  # completions of the last call
        self._client = client_of(config, name="sampler")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def cancel(self) -> None:
        """End what is under way: see ``ServerClient.cancel``."""
        self._client.cancel()

    def close(self) -> None:
        """Remove the weights' folders and close the connections."""
        with self._lock:
            if self._push is not None:
                self._push.close()
                self._push = None
            self._client.close()

    def check(self, *, longest: int = 0) -> Served:
        """Look at the server before the run begins. ``longest``: tokens of the longest prompt and completion together.
        Raises ConfigError as ``check_server``."""
        with self._lock:
            self._wanted = Wanted(self._config, self._wanted.model, self._wanted.lora_rank, longest)
            self._served = check_server(self._client, self._wanted)
            return self._served

    def set_policy_version(self, version: int) -> None:
        """See ``Sampler.set_policy_version``: sends the trainer's weights of now, unless this version has been sent.
        Waits for calls of ``sample``.

        Raises:
            ServerUnavailable: the server is away for longer than patience.
            ServerError: it cannot load the weights.
            RunError: the server's log-probabilities are not the trainer's.
        """
        with self._lock:
            if version != self._written_version:
                self._take_weights(version)
            self._ensure([])

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, seed: int) -> list[list[Rollout]]:
        """See ``Sampler.sample``. A prompt that stands twice in ``prompts`` gets further samples, not the same again.
        Log-probabilities are at temperature 1, whatever ``sampling`` says. Raises as ``set_policy_version``."""
        if not prompts:
            return []
        with self._lock:
            if self._written_version is None:
                self._take_weights(self._policy_version)
            jobs = jobs_of(prompts, sampling.group_size)
            for _ in range(ATTEMPTS):
                self._ensure(prompts)
                completions = self._completions(jobs, sampling, seed)
                if completions is not None and self._holds():
                    return self._rollouts(jobs, completions)
                log.warning(
                    "%s lost the weights of version %d as it wrote; they are sent again, and what it wrote is dropped",
                    described(self._client),
                    self._policy_version,
                )
            raise ServerUnavailable(
                f"{described(self._client)} lost its weights {ATTEMPTS} times while it wrote one batch; expected it to "
                "stay up, and no other run to send weights to it"
            )

    def _holds(self) -> bool:
        """Whether the server confirms the weights of the policy version."""
        return self._weights().holds(self._policy_version)

    def _take_weights(self, version: int) -> None:
        """The trainer's weights, and its log-probabilities of the probe, are from now on those of ``version``."""
        self._weights().write(self._trainer, version)
        self._policy_version = self._written_version = version
        self._probed, self._probe = False, None
        sequences = self._fitting(self._given() if self._given else self._last)
        if sequences and all(sequence.completion_ids for sequence in sequences):
            self._probe = probe_of(self._trainer, sequences)

    def _ensure(self, prompts: Sequence[Prompt]) -> None:
        """The server has the weights of the policy version, and has been seen to write with them.

        Where there are no sequences to compare, ``prompts`` will do; where there are none either, it is left to the
        next call.
        """
        for _ in range(ATTEMPTS):
            if not self._holds():
                self._probed = False
                started = time.monotonic()
                self._weights().push(self._policy_version)
                seconds = time.monotonic() - started
                log.info(
                    "%s took the weights of version %d in %.1f s",
                    described(self._client),
                    self._policy_version,
                    seconds,
                )
            if self._probed or self._passes(prompts):
                return
        raise ServerUnavailable(f"{described(self._client)} lost its weights {ATTEMPTS} times right after it took them")

    def _passes(self, prompts: Sequence[Prompt]) -> bool:
        """Compare server and trainer. False: the server has lost the weights meanwhile.

        Raises:
            RunError: it has them, and its log-probabilities are not the trainer's.
        """
        fields = self._weights().fields(self._policy_version)
        sizes = {"vocab_size": self._vocab_size, "max_model_len": self._checked().max_model_len}
        try:
            if self._probe is None and (begun := self._begun(prompts)):
                own = written(self._client, fields, begun, **sizes)
                self._probe = probe_of(self._trainer, [sequence for sequence, _ in own])
            if self._probe is None:
                return True
            # With adapters, vLLM's CPU build (0.32) dies of a request for a prompt's log-probabilities.
            mismatch = measure(self._client, fields, self._probe, **sizes, forced=self._wanted.lora_rank is not None)
        except ServerError as error:
            self._raise_unless_lost(error)
            return False
        if not self._holds():
            return False
        self.last_mismatch = mismatch
        if wrong := complaint(mismatch, self._config.max_mismatch):
            raise ServerError(
                f"{described(self._client)} was sent the weights of version {self._policy_version}, but {wrong}"
            )
        self._probed = True
        return True

    def _begun(self, prompts: Sequence[Prompt]) -> list[TokenSequence]:
        """What the server goes on from, for a first comparison."""
        given = list(self._given()) if self._given else []
        return self._fitting(given or [TokenSequence(prompt.prompt_ids, []) for prompt in prompts])

    def _fitting(self, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        return fitting(sequences, most=self._config.probe_sequences, max_model_len=self._checked().max_model_len)

    def _completions(self, jobs: Sequence[Job], sampling: SamplingConfig, seed: int) -> list[list[Completion]] | None:
        """Per job; None where the server has lost the weights, which explains its errors."""
        fields = self._weights().fields(self._policy_version)
        timeout = self._config.connection.timeout_seconds
        writing = Writing(fields, sampling, seed, self._vocab_size, self._stop_ids, self._ends, timeout)
        try:
            groups = self._client.map([request(job, writing) for job in jobs])
            return continued(self._client, jobs, groups, writing)
        except ServerError as error:
            self._raise_unless_lost(error)
            return None

    def _raise_unless_lost(self, error: ServerError) -> None:
        """An error is the server's fault if it is there with the right weights, or away for good."""
        if isinstance(error, ServerUnavailable) or self._holds():
            raise error

    def _rollouts(self, jobs: Sequence[Job], completions: Sequence[Sequence[Completion]]) -> list[list[Rollout]]:
        version = self._policy_version  # the server has confirmed it before and after
        groups = [
            [Rollout(job.prompt, c.ids, c.logprobs, c.reason(), version, version) for c in group]
            for job, group in zip(jobs, completions, strict=True)
        ]
        flat = [TokenSequence(r.prompt.prompt_ids, r.completion_ids) for group in groups for r in group]
        self._last = self._fitting(flat)
        return groups

    def _weights(self) -> WeightPush:
        """The way that weights go, once the server is known."""
        if self._push is None:
            served = self._checked()
            if self._wanted.lora_rank is None:
                salted = self._config.cache == "salt"
                way = FullWeights(self._client, served.model, salted=salted)
            else:
                way = AdapterWeights(self._client)
            if self._config.weights_dir is None and self._folder.exists():
                shutil.rmtree(self._folder)  # output_dir is this run's alone: what a killed process left
            self._push = WeightPush(way, self._client, self._folder)
        return self._push

    def _checked(self) -> Served:
        return self._served or self.check(longest=self._wanted.longest)

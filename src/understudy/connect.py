"""Roles that live on servers: found, checked and asked whether they are what the configuration says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from understudy.backends.http import Request, client_of
from understudy.backends.protocols import Teacher, Trainer
from understudy.backends.served import ServedTeacher
from understudy.backends.served_models import model_cards
from understudy.backends.sglang import SglangTeacher
from understudy.backends.vllm import VllmTeacher
from understudy.backends.vllm_check import Wanted, check_config, check_server
from understudy.backends.vllm_sampler import VllmSampler
from understudy.config import RunConfig, TeacherConfig
from understudy.errors import ConfigError, ServerError
from understudy.preflight import Checked
from understudy.score_cache import CachedTeacher, ScoreCache
from understudy.tokenization import ModelText
from understudy.types import Prompt, TokenSequence

log = logging.getLogger("understudy")

Keeper = Callable[[Teacher], Teacher]
"""Puts a teacher behind the cache of its marks, where it has one."""

CHECK_SECONDS = 10.0  # before a run begins a server is there, or its address is wrong


class RemoteTeacher(Teacher, Protocol):
    """A teacher on a server."""

    def check(self, *, longest: int, topk: int = 0) -> None:
        """Raises ConfigError where it cannot do what the run will ask of it."""
        ...

    def identity(self) -> str:
        """Another text for other weights."""
        ...

    def vocabulary(self, tokenizer: Any) -> bool:
        """False where the server cannot tell. Raises ConfigError where an id means another token to it."""
        ...

    def cancel(self) -> None:
        """End what is under way."""
        ...

    def close(self) -> None: ...


_CLIENTS: Mapping[str, Any] = {"vllm": VllmTeacher, "sglang": SglangTeacher, "understudy": ServedTeacher}


def connect_teachers(
    config: RunConfig, checked: Checked, connections: ExitStack, *, brought: bool
) -> dict[str, RemoteTeacher]:
    """Every teacher with a url (none where they were ``brought`` along), and the reference as "reference", ready to
    mark what the run will ask; what is open goes to ``connections``.

    Raises:
        ConfigError: one cannot be reached, serves another model, or cannot do what is needed.
    """
    teachers = {} if brought else config.all_teachers
    roles = {name: teacher for name, teacher in teachers.items() if teacher.url is not None}
    if config.reference is not None and config.reference.url is not None and checked.prompts:
        roles["reference"] = config.reference
    connected: dict[str, RemoteTeacher] = {}
    for name, role in roles.items():
        teacher = _client_of(role, name)(role, name=name)
        connections.callback(teacher.close)
        connected[name] = teacher
        if isinstance(teacher, ServedTeacher):
            teacher.vocab_size = checked.vocab_size
        teacher.check(longest=_longest(config, checked, name), topk=0 if name == "reference" else _topk(config))
        text = checked.student if name == "reference" else checked.teachers[name]
        _check_tokens(teacher, role, name, text)
        log.info("teacher %r at %s", name, role.url)
    return connected


def _client_of(role: TeacherConfig, name: str) -> Any:
    """The kind of client that the server's own words ask for."""
    if role.api != "auto":
        return _CLIENTS[role.api]
    with client_of(role, name=name) as client:
        try:
            cards = client.call(Request("GET", "/v1/models", parse=model_cards), patience_seconds=CHECK_SECONDS)
        except ServerError as error:
            raise ConfigError(
                f"teacher {name!r}, url {role.url}",
                got=str(error),
                expected="a server that says which models it serves (GET /v1/models)",
                remedy="start it, or correct the url; for servers of another kind set api",
            ) from None
    owners = {str(card.get("owned_by")) for card in cards}
    return _CLIENTS[next((owner for owner in owners if owner in _CLIENTS), "vllm")]


def _topk(config: RunConfig) -> int:
    """Alternatives a teacher is asked for: to train on, or to be stored with rollouts."""
    trained = config.objective.topk if config.objective.estimator == "topk" else 0
    return max(trained, config.rollouts.topk if config.rollouts.per_step else 0)


def _check_tokens(teacher: RemoteTeacher, role: TeacherConfig, name: str, text: ModelText) -> None:
    if not teacher.vocabulary(text.tokenizer):
        log.warning(
            "teacher %r at %s has no /detokenize: that its ids are those of %s is taken for granted",
            name,
            role.url,
            text.name,
        )


def _longest(config: RunConfig, checked: Checked, name: str) -> int:
    """Tokens of the longest sequence that a role will be asked to mark."""
    views: Sequence[Sequence[int]] = [
        prompt.prompt_ids if name == "reference" or prompt.teacher_prompt_ids is None else prompt.teacher_prompt_ids
        for prompt in checked.prompts
        if name in ("reference", prompt.teacher)
    ]
    return max(map(len, views), default=0) + config.training_sampling.max_completion_tokens


def keeper(role: TeacherConfig, identity: Callable[[], str], connections: ExitStack) -> Keeper:
    """What puts a teacher behind its cache, if it has one; ``identity`` is what it marks under there."""
    if role.cache is None:
        return lambda teacher: teacher
    cache, name = ScoreCache(Path(role.cache), max_bytes=int(role.cache_gib * 2**30)), identity()
    connections.callback(cache.close)
    return lambda teacher: CachedTeacher(teacher, cache, name)


def check_sampler(config: RunConfig, checked: Checked) -> None:
    """Look at the [sampler]'s server. Raises ConfigError where it could not write for this run."""
    sampler = config.sampler
    assert sampler is not None
    rank = config.student.lora.rank if config.student.lora else None
    check_config(sampler, rank, config.sampling.temperature)
    prompts: list[tuple[Prompt, int]] = [(p, config.training_sampling.max_completion_tokens) for p in checked.prompts]
    prompts += [(p, task.sampling.max_completion_tokens) for task in checked.tasks for p in task.prompts]
    longest = max((len(prompt.prompt_ids) + length for prompt, length in prompts), default=0)
    with client_of(sampler, name="sampler") as client:
        check_server(client, Wanted(sampler, config.student.model, rank, longest))


def connect_sampler(config: RunConfig, checked: Checked, trainer: Trainer, connections: ExitStack) -> VllmSampler:
    """The [sampler], which writes with ``trainer``'s weights."""
    assert config.sampler is not None
    sampler = VllmSampler(
        config.sampler,
        trainer,
        output_dir=config.output_dir,
        model=config.student.model,
        vocab_size=checked.vocab_size,
        stop_ids=checked.stop_ids,
        lora_rank=config.student.lora.rank if config.student.lora else None,
        ends=checked.ends,
        temperature=config.sampling.temperature,
        probe=lambda: [TokenSequence(prompt.prompt_ids, []) for prompt in checked.prompts],
    )
    connections.callback(sampler.close)
    return sampler

"""A run's teachers and its reference: in this process or connected to, and what keeps their marks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from understudy.backends.language_model import LanguageModel
from understudy.backends.local import LocalTeacher
from understudy.backends.protocols import Sampler, Teacher
from understudy.config import RunConfig, TeacherConfig
from understudy.connect import Keeper, RemoteTeacher, keeper
from understudy.precision import load_teacher
from understudy.preflight import Checked
from understudy.score_cache import KEPT_KINDS, folder_identity
from understudy.types import ScoreKind

log = logging.getLogger("understudy")


def load_teachers(
    config: RunConfig,
    checked: Checked,
    student: LanguageModel | None,
    sampler: Sampler,
    brought: Mapping[str, Teacher] | None,
    remote: Mapping[str, RemoteTeacher],
    connections: ExitStack,
) -> tuple[dict[str, Teacher], dict[str, Keeper], RunConfig]:
    """Teachers by name, what keeps their marks, and the configuration with their dtypes resolved."""
    if brought is not None:
        return dict(brought), dict.fromkeys(brought, _kept_nowhere), config
    teachers: dict[str, Teacher] = {}
    kept: dict[str, Keeper] = {}
    resolved: dict[str, TeacherConfig] = {}
    for name, teacher_config in config.all_teachers.items():
        if name in remote:
            teachers[name], resolved[name] = remote[name], teacher_config
            kept[name] = keeper(teacher_config, remote[name].identity, connections)
            continue
        prompts = [p for p in checked.prompts if p.teacher == name]
        teacher, dtype = load_teacher(teacher_config, config, checked, student, sampler, prompts)
        teachers[name] = teacher
        kept[name] = keeper(teacher_config, partial(_identity, teacher, teacher_config.model, dtype), connections)
        resolved[name] = teacher_config.model_copy(update={"dtype": dtype})
        log.info("teacher %s: %s on %s", teacher_config.model, dtype, teacher.model.device)
    default = resolved.pop("default", None)
    return teachers, kept, config.model_copy(update={"teacher": default, "teachers": resolved})


def load_reference(
    config: RunConfig,
    checked: Checked,
    student: LanguageModel | None,
    sampler: Sampler,
    remote: RemoteTeacher | None,
    connections: ExitStack,
) -> tuple[Teacher | None, Keeper, RunConfig]:
    """The reference model, if there is one, what keeps its marks, and the configuration with its dtype resolved."""
    if config.reference is None or not checked.prompts:  # `sft` has no use for it
        return None, _kept_nowhere, config
    if remote is not None:
        return remote, keeper(config.reference, remote.identity, connections), config
    prompts = [
        replace(prompt, teacher_prompt_ids=None) for prompt in checked.prompts
    ]  # it reads what the student reads
    reference, dtype = load_teacher(config.reference, config, checked, student, sampler, prompts, role="reference")
    log.info("reference %s: %s on %s", config.reference.model, dtype, reference.model.device)
    kept = keeper(config.reference, partial(_identity, reference, config.reference.model, dtype), connections)
    return (
        reference,
        kept,
        config.model_copy(update={"reference": config.reference.model_copy(update={"dtype": dtype})}),
    )


def warn_of_idle_caches(config: RunConfig, kind: ScoreKind) -> None:
    """Say so where a cache was asked for, and the run's ``kind`` of marks is not kept."""
    if kind in KEPT_KINDS:
        return
    for name, role in config.all_teachers.items():
        if role.cache is not None:
            log.warning(
                'teacher %r: cache holds no marks of this run: its estimator asks for "%s" (hidden states would fill a '
                'disk, ids that the student chooses do not come again); estimator = "sampled", or "topk" with the '
                "teacher's own set, would use it",
                name,
                kind,
            )


def _identity(teacher: LocalTeacher, model: str, dtype: str) -> str:
    """What its marks depend on besides tokens."""
    settings = (dtype, f"autocast {teacher.autocast}", f"temperature {teacher.temperature!r}")
    return folder_identity(model, *settings, f"vocabulary {teacher.head.vocab_size}")


def _kept_nowhere(teacher: Teacher) -> Teacher:
    return teacher

"""Whose work costs what: the sizes of a run's models, and its teachers on the ledger."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig

from understudy.backends.cache import new_cache
from understudy.backends.language_model import LanguageModel
from understudy.backends.local import LocalTeacher
from understudy.backends.protocols import Teacher
from understudy.config import StudentConfig, TeacherConfig
from understudy.costs import CostLedger, CountedModel, MeteredTeacher
from understudy.flops import ModelShape, Update, shape_of_config
from understudy.model_files import adapter_base

log = logging.getLogger("understudy")


def matmul_sizes(model: LanguageModel | None) -> tuple[int, int]:
    """(all, trainable) weights a token is multiplied with: of experts, those it is sent to; zeros where there is no
    model in this process."""
    if model is None:
        return 0, 0
    weights, trainable = model.matmul_parameters()
    shape = shape_of_config(model.config)
    idle = shape.idle_weights if shape else 0
    return weights - idle, trainable - (idle if trainable == weights else 0)


def counted_model(model: LanguageModel | None, student: StudentConfig | None = None) -> CountedModel | None:
    """What the exact FLOP count needs; ``student``: how the model trains, if it does. None, with a warning, for an
    architecture whose products are not known: 2N per token then stands in for it."""
    if model is None:
        return None
    shape = shape_of_config(model.config)
    if shape is None:
        log.warning(
            "the FLOPs of %s (%s) are counted by the convention alone, 2N per token: its products are not known",
            type(model.model).__name__,
            model.config.model_type,
        )
        return None
    lora = student.lora if student else None
    update = Update(
        rank=lora.rank if lora else 0,
        targets=lora.target_modules if lora else "all-linear",
        recompute=student is not None and student.gradient_checkpointing,
    )
    return CountedModel(
        shape=replace(shape, vocab=model.head.vocab_size),
        shares_prompts=model.shares_prompts,
        samples_shared=new_cache(model.config) is not None,
        update=update,
    )


def metered(
    teacher: Teacher, costs: CostLedger, role: str, config: TeacherConfig | None, student: StudentConfig
) -> MeteredTeacher:
    """A teacher on the ledger. Its FLOPs are those of its model where that is in this process; of ``config.model``'s
    sizes where it is on a server; none where nothing says how large it is (a caller's own, a server's whose model is
    the student's by default)."""
    if isinstance(teacher, LocalTeacher):
        return MeteredTeacher(teacher, costs, matmul_sizes(teacher.model)[0], role, counted_model(teacher.model))
    shape = None
    if config is not None and config.url is not None and config.model != student.model:
        shape = _shape_of(config.model, config.trust_remote_code)
    if shape is None:
        return MeteredTeacher(teacher, costs, 0, role)
    # A server shares prompts or not, as its cache will have it: what was asked for is counted.
    counted = CountedModel(shape, shares_prompts=False, samples_shared=False)
    return MeteredTeacher(teacher, costs, shape.active_weights, role, counted)


def _shape_of(model: str, trust_remote_code: bool) -> ModelShape | None:
    try:
        config = AutoConfig.from_pretrained(adapter_base(Path(model)) or model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):  # a folder with a tokenizer alone will do for a teacher on a server
        log.warning("%s has no configuration: the FLOPs of its marks are not counted", model)
        return None
    return shape_of_config(config)

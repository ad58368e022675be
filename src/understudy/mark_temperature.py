"""At which temperature marks are: found by comparing them with the logits of the model that is said to give them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import load_model, pick_device
from understudy.backends.local import LocalTeacher
from understudy.backends.memory import memory_budget
from understudy.backends.protocols import Teacher
from understudy.config import TeacherConfig
from understudy.lm_head import head_logprobs
from understudy.model_files import adapter_base
from understudy.types import HiddenScores, TokenSequence

# Nats per token, on average: engines in bfloat16 differ by up to so much with load and batch size.
NOISE = 0.03
# Steps of 9%, from a quarter to four times.
RATIOS = tuple(2 ** (step / 8) for step in range(-16, 17))
# Of each completion: every ratio is a pass of the head, and so many tokens of a few of them say enough.
_TOKENS = 256


def errors_by_ratio(
    marks: Sequence[Sequence[float]], states: Teacher, sequences: Sequence[TokenSequence], *, temperature: float
) -> dict[float, float]:
    """Ratio -> mean distance, in nats per token, between ``marks`` [sequence][t] and what a model gives the same tokens
    at ``temperature`` times that ratio; of long sequences the first tokens. ``states``: the model, as a teacher of
    hidden states with a ``head``."""
    sequences = [TokenSequence(one.prompt_ids, one.completion_ids[:_TOKENS]) for one in sequences]
    marks = [own[:_TOKENS] for own in marks]
    hidden = [score for score in states.score(sequences, "hidden") if isinstance(score, HiddenScores)]
    head = getattr(states, "head")  # noqa: B009  # a part of the protocol for those that give hidden states alone
    device, dtype = head.weight.device, head.weight.dtype
    errors: dict[float, float] = {}
    for ratio in RATIOS:
        distances: list[float] = []
        for score, sequence, own in zip(hidden, sequences, marks, strict=True):
            ids = torch.tensor(list(sequence.completion_ids), device=device)
            states_here = score.teacher_hidden.to(device, dtype)
            given = head_logprobs(head, states_here, ids, temperature=ratio * temperature).tolist()
            distances += [abs(p - q) for p, q in zip(own, given, strict=True)]
        errors[ratio] = math.fsum(distances) / len(distances)
    return errors


def named_weights(
    role: TeacherConfig, student: str, *, vocab_size: int | None, most_bytes: float = math.inf
) -> LocalTeacher | None:
    """The model that ``role`` names, loaded beside a teacher that was brought along or is served; None where its
    weights are not at hand, would not fit, or are larger than ``most_bytes``. Raises ConfigError when they cannot be
    loaded."""
    if role.url is not None and role.model == student:
        return None  # the default, which says nothing of the server's weights
    # Adapters are loaded with their base, which may be anywhere.
    size = _stored_bytes(adapter_base(Path(role.model)) or role.model)
    device = pick_device(role.device)
    if not 0 < size <= most_bytes or 2 * size > memory_budget(device):
        return None
    trust = role.trust_remote_code
    model = load_model(role.model, role="teacher", dtype=torch.float32, device=device, trust_remote_code=trust)
    model.requires_grad_(False)
    return LocalTeacher(LanguageModel(model, vocab_size=vocab_size))


def _stored_bytes(model: str) -> int:
    return sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))

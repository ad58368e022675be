"""A model's own solutions token by token, for claims that look inside them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch

from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import load_model, pick_device
from understudy.backends.local import LocalSampler, LocalTeacher
from understudy.config import SamplingConfig
from understudy.config_rows import RowsConfig
from understudy.evaluation import EVALUATION_SEED
from understudy.prompts import load_prompts
from understudy.rollouts import sample_rollouts
from understudy.teacher_scores import score_rollouts
from understudy.tokenization import load_text, resolve_stop_ids
from understudy.types import HiddenScores, Rollout


def load(folder: Path) -> LanguageModel:
    """A model to read with and to write with, in float32 on one thread."""
    torch.set_num_threads(1)
    return LanguageModel(load_model(str(folder), role="model", dtype=torch.float32, device=pick_device("auto")))


def solutions(model: LanguageModel, folder: Path, problems: Path, *, max_tokens: int) -> list[Rollout]:
    """What ``model`` (of ``folder``) writes at temperature 1, once for each problem."""
    text = load_text(str(folder), "student")
    prompts = load_prompts(RowsConfig(path=str(problems)), text, max_completion_tokens=max_tokens)
    sampler = LocalSampler(model, stop_ids=resolve_stop_ids(text, {}, None))
    sampling = SamplingConfig(group_size=1, max_completion_tokens=max_tokens)
    return list(chain.from_iterable(sample_rollouts(sampler, prompts, sampling, seed=EVALUATION_SEED)))


def read(model: LanguageModel, rollouts: Sequence[Rollout]) -> list[HiddenScores]:
    """The log-probability that ``model`` gives every token, and its hidden state before it."""
    scores = score_rollouts({"default": LocalTeacher(model)}, rollouts, "hidden")
    return [score for score in scores if isinstance(score, HiddenScores)]

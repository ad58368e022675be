"""What can be known once models are loaded: the student's own completions, everybody's marks of them, and what a
teacher writes where it can write."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from understudy.backends.http import client_of
from understudy.backends.local import LocalSampler, LocalTeacher
from understudy.backends.protocols import Teacher
from understudy.backends.served import ServedTeacher
from understudy.backends.served_models import served_model
from understudy.backends.vllm import VllmTeacher
from understudy.backends.vllm_completions import Writing, jobs_of, request
from understudy.config import SamplingConfig, TeacherConfig
from understudy.rollouts import sample_rollouts, step_seed
from understudy.teacher_scores import score_rollouts
from understudy.types import Prompt, Rollout, TokenSequence, TopkScores

if TYPE_CHECKING:
    from understudy.assembly import Parts
    from understudy.doctor.case import Case

# Enough tokens for means to say something, few enough for a minute.
PROMPTS, COMPLETIONS = 16, 32
ALTERNATIVES = 32
# A greedy answer shows in its beginning whether a template suits its writer.
ANSWER_TOKENS = 256
# Steps of a run never get so far: its prompts and the doctor's share no random numbers.
_SEED_STEP = 2**31 + 1

Writer = Callable[[Sequence[Prompt], SamplingConfig], list[Rollout]]


@dataclass(frozen=True)
class Trial:
    """The student's completions. Per completion and token: ``own`` log-probabilities of the trainer, ``marks`` of the
    teacher (None: there is none); the likeliest tokens of both, where they can be had."""

    rollouts: Sequence[Rollout]
    own: Sequence[Sequence[float]]
    marks: Sequence[Sequence[float]] | None
    student_top: Sequence[TopkScores] | None
    teacher_top: Sequence[TopkScores] | None

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions."""
        return sum(len(rollout.completion_ids) for rollout in self.rollouts)

    def gaps(self) -> list[list[float]]:
        """log p - log q of every token [rollout][t]; empty without a teacher."""
        if self.marks is None:
            return []
        pairs = zip(self.rollouts, self.marks, strict=True)
        return [[p - q for p, q in zip(r.sampler_logprobs, marks, strict=True)] for r, marks in pairs]


def run_trial(parts: Parts) -> Trial:
    """Let the student write on the first step's prompts, and everybody mark it. Raises RunError for what could not be
    trained on."""
    config = parts.config
    prompts = parts.prompts_at(0)[:PROMPTS]
    size = min(config.sampling.group_size, max(1, COMPLETIONS // len(prompts)))
    sampling = config.training_sampling.model_copy(update={"group_size": size})
    parts.sampler.set_policy_version(0)
    groups = sample_rollouts(parts.sampler, prompts, sampling, seed=step_seed(config.seed, _SEED_STEP))
    rollouts = [rollout for group in groups for rollout in group]
    written = [TokenSequence(r.prompt.prompt_ids, r.completion_ids) for r in rollouts]
    marks = score_rollouts(parts.page_teachers, rollouts, "sampled") if parts.page_teachers else None
    return Trial(
        rollouts=rollouts,
        own=parts.trainer.compute_logprobs(written),
        marks=None if marks is None else [score.teacher_logprobs for score in marks],
        student_top=_top(parts.marker, written) if parts.marker else None,
        teacher_top=_teacher_top(parts, rollouts),
    )


def _top(teacher: Teacher, sequences: Sequence[TokenSequence]) -> list[TopkScores]:
    scores = teacher.score(sequences, "topk", topk=ALTERNATIVES)
    return [score for score in scores if isinstance(score, TopkScores)]


def _teacher_top(parts: Parts, rollouts: Sequence[Rollout]) -> list[TopkScores] | None:
    """As many alternatives as all teachers give; None where one gives none."""
    teachers = [parts.page_teachers[name] for name in {r.prompt.teacher for r in rollouts} & parts.page_teachers.keys()]
    if not teachers or any("topk" not in teacher.kinds for teacher in teachers):
        return None
    most = min([ALTERNATIVES, *(getattr(teacher, "max_topk", None) or ALTERNATIVES for teacher in teachers)])
    scores = score_rollouts(parts.page_teachers, rollouts, "topk", topk=most)
    return [score for score in scores if isinstance(score, TopkScores)]


def entropy_of(logprobs: Sequence[float]) -> float:
    """Nats of a distribution known by its likeliest tokens: what is left of it counts as one more outcome."""
    rest = 1 - math.fsum(math.exp(value) for value in logprobs)
    tail = -rest * math.log(rest) if rest > 1e-6 else 0.0
    return tail - math.fsum(math.exp(value) * value for value in logprobs)


# What a teacher writes


@dataclass(frozen=True)
class View:
    """A row as a teacher reads it in the run, and as it could read it instead (None: there is no other way)."""

    prompt: Prompt
    own: Sequence[int]
    other: Sequence[int] | None


def views(case: Case, name: str) -> list[View]:
    """The first rows that teacher ``name`` marks. Instead of a prompt of its own it could read the student's; instead
    of a plain text that both read, the same as a message in its chat template."""
    found = []
    teacher, student = case.teacher(name), case.student
    for prompt in [p for p in case.prompts if p.teacher == name][:PROMPTS]:
        other: Sequence[int] | None = None
        if prompt.teacher_prompt_ids is not None:
            other = prompt.prompt_ids
        elif teacher.tokenizer.chat_template and student.encode(prompt.text) == list(prompt.prompt_ids):
            messages = [{"role": "user", "content": prompt.text}]
            kwargs = case.config.prompts.chat_template_kwargs if case.config.prompts else {}
            other = teacher.render(messages, add_generation_prompt=True, template_kwargs=kwargs)
        own = prompt.prompt_ids if prompt.teacher_prompt_ids is None else prompt.teacher_prompt_ids
        found.append(View(prompt, own, other))
    return found


def greedy_answers(case: Case, name: str, view: str) -> list[Rollout]:
    """What a teacher answers greedily to the rows of ``views`` that have two views: ``view`` "own" or "other". Empty
    where it cannot write. The prompts are those that it read."""
    writer = writer_of(case, name)
    pairs = [(v.prompt, v.own if view == "own" else v.other) for v in views(case, name) if v.other is not None]
    prompts = [replace(prompt, prompt_ids=ids) for prompt, ids in pairs if ids is not None]
    if writer is None or not prompts:
        return []
    length = min(ANSWER_TOKENS, case.config.sampling.max_completion_tokens)
    return writer(prompts, SamplingConfig(group_size=1, temperature=0.0, max_completion_tokens=length))


def writer_of(case: Case, name: str) -> Writer | None:
    """A way to let a teacher write; None for one that can only mark. Raises ServerError where its server refuses."""
    teacher = case.parts.page_teachers[name]
    stop_ids = case.whole().stop_ids | case.teacher(name).end_ids
    if isinstance(teacher, LocalTeacher):
        sampler = LocalSampler(teacher.model, stop_ids=stop_ids)

        def here(prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Rollout]:
            return [group[0] for group in sampler.sample(prompts, sampling, seed=case.config.seed)]

        return here
    role = case.config.all_teachers.get(name)
    if isinstance(teacher, VllmTeacher | ServedTeacher) and role is not None and role.url is not None:
        return lambda prompts, sampling: _written_there(case, role, name, prompts, sampling, stop_ids)
    return None


def _written_there(
    case: Case,
    role: TeacherConfig,
    name: str,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    stop_ids: frozenset[int],
) -> list[Rollout]:
    with client_of(role, name=name) as client:
        model = served_model(client, role.served_model, f"teacher {name!r} at {client.root}")
        writing = Writing(
            fields={"model": model.id},
            sampling=sampling,
            seed=case.config.seed,
            vocab_size=case.whole().vocab_size,
            stop_ids=stop_ids,
            ends=None,
            timeout_seconds=role.connection.timeout_seconds,
        )
        groups = client.map([request(job, writing) for job in jobs_of(prompts, 1)])
    return [
        Rollout(prompt, own.ids, own.logprobs, own.reason(), policy_version_start=0, policy_version_end=0)
        for prompt, [own] in zip(prompts, groups, strict=True)
    ]

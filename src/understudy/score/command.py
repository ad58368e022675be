"""What `understudy score` does: get records, mark them with the models that were named, write the page."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import load_model, load_student, pick_device
from understudy.backends.local import LocalSampler, LocalTeacher
from understudy.checkpoints import write_jsonl
from understudy.config import RunConfig, StudentConfig
from understudy.errors import ConfigError
from understudy.precision import load_teacher
from understudy.preflight import check_run
from understudy.report.credit_page import CreditUnit, counted, pair_units, write_credit_page
from understudy.rollout_store import rollout_record
from understudy.rollouts import sample_rollouts
from understudy.score.marks import Record, as_ids, with_marks
from understudy.score.sources import Source, read_source, stored_steps
from understudy.tokenization import ModelText, check_same_tokens, load_text
from understudy.types import ScoredRollout

log = logging.getLogger("understudy")


@dataclass(frozen=True)
class Models:
    """Who writes and who marks. ``tokenizer``: whose texts tokens get, where no student is named. ``trusted``: the
    roles whose own Python code may run."""

    student: str | None = None
    teacher: str | None = None
    tokenizer: str | None = None
    device: str = "auto"
    topk: int = 5
    trusted: frozenset[str] = frozenset()

    def text(self, role: str) -> ModelText:
        """Tokenizer and configuration of the model in a role that is named. Raises ConfigError, as load_text does."""
        return load_text(getattr(self, role), role, trust_remote_code=role in self.trusted)


@dataclass(frozen=True)
class Sampling:
    """How the student answers prompts. ``plain``: as they are, without the chat template."""

    samples: int = 4
    max_completion_tokens: int = 512
    seed: int = 0
    plain: bool = False


def score_prompts(prompts: Sequence[str], models: Models, sampling: Sampling, out: Path) -> Path:
    """Let the student answer, mark every token, write the page.

    Raises:
        ConfigError: models that do not fit together, or are not there; before any weights are read.
    """
    for role, name in (("student", models.student), ("teacher", models.teacher)):
        if name is None:
            raise ConfigError(
                f"--{role}",
                got=f"--prompt without --{role}",
                expected="both: the student writes, and both mark",
                remedy='understudy score --student S --teacher T --prompt "..."',
            )
    records = answered(prompts, models, sampling)
    facts = [f"Written by {models.student}, marked by {models.teacher}.", counted(records)]
    return write_credit_page(_single(records), out, title="Sampled answers", facts=facts)


def answered(prompts: Sequence[str], models: Models, sampling: Sampling) -> list[Record]:
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), prompts, models, sampling)
        checked = check_run(config, "distill")
        student = load_student(config.student, vocab_size=checked.vocab_size)
        sampler = LocalSampler(student, stop_ids=checked.stop_ids, ends=checked.ends)
        assert config.teacher is not None
        teacher, _ = load_teacher(config.teacher, config, checked, student, sampler, checked.prompts)
        groups = sample_rollouts(sampler, checked.prompts, config.sampling, seed=sampling.seed)
    records = [
        rollout_record(
            ScoredRollout(rollout, None, None),
            step=0,
            sample_index=number,
            tokens=checked.student.tokens,
            text=checked.decode(rollout.completion_ids),
            trainer_logprobs=None,
            advantages=None,
            loss_mask=[True] * len(rollout.completion_ids),
            alternatives=None,
        )
        for group in groups
        for number, rollout in enumerate(group)
    ]
    return with_marks(records, checked.student, student=LocalTeacher(student), teacher=teacher, topk=models.topk)


def _config(folder: Path, prompts: Sequence[str], models: Models, sampling: Sampling) -> RunConfig:
    """The run that would train on these prompts: its checks are the ones wanted here."""
    assert models.student is not None
    chat = not sampling.plain and models.text("student").tokenizer.chat_template
    rows = [{"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt} for prompt in prompts]
    write_jsonl(folder / "prompts.jsonl", rows)
    tree: Mapping[str, Any] = {
        "output_dir": str(folder / "run"),
        "student": {
            "model": models.student,
            "device": models.device,
            "trust_remote_code": "student" in models.trusted,
        },
        "teacher": {"model": models.teacher, "trust_remote_code": "teacher" in models.trusted},
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "sampling": {"group_size": sampling.samples, "max_completion_tokens": sampling.max_completion_tokens},
    }
    return RunConfig.model_validate(tree)


def score_source(source: Source, models: Models, out: Path) -> Path:
    """Write the page of a run's step or a file; records without marks get those of the models that were named.

    Raises:
        ConfigError: nothing is known of its tokens, and no models are named; or they are, for a run.
    """
    records = _marked(source, models)
    facts = [counted(records)]
    if models.teacher is not None:
        facts.insert(0, f"Marked by {models.teacher}.")
    return write_credit_page(_single(records), out, title=source.name, facts=facts)


def score_pair(before: Source, after: Source, models: Models, out: Path) -> Path:
    """Write the page of two steps, or files, with the same prompts side by side.

    Raises:
        ConfigError: they have no prompt in common; otherwise as ``score_source``.
    """
    labels = (before.name, after.name)
    units = pair_units(_marked(before, models), _marked(after, models), labels=labels)
    if not units:
        raise ConfigError(
            f"--compare {before.name} and {after.name}",
            got="no rollout of the one with the task, prompt and sample number of one of the other",
            expected="answers to the same prompts",
            remedy="compare a run's first and last stored step, which answer the same ones",
        )
    records = [rollout for unit in units for rollout in unit.rollouts]
    missing = len(before.records) + len(after.records) - len(records)
    facts = [f"The same prompts, first {labels[0]}, then {labels[1]}.", counted(records)]
    if missing:
        facts.append(f"{missing} rollouts have no partner on the other side and are left out.")
    return write_credit_page(units, out, title=f"{labels[0]} and {labels[1]}", facts=facts)


def read_pair(places: tuple[str, str], form: str | None) -> tuple[Source, Source]:
    """Both sides of ``--compare``; a run without a step stands for its first stored step on the left and its last on
    the right."""
    first = stored_steps(Path(places[0]))
    before = read_source(places[0], step=first[0] if first else None, form=form)
    return before, read_source(places[1], form=form)


def _single(records: Sequence[Record]) -> list[CreditUnit]:
    return [CreditUnit((record,)) for record in records]


def _marked(source: Source, models: Models) -> list[Record]:
    records = source.records
    if source.is_run and (models.student or models.teacher):
        raise ConfigError(
            source.name,
            got=f"{models.student or models.teacher} as student or teacher",
            expected="no models: a run has kept its own marks",
            remedy="drop them; to mark stored rollouts anew, give their file with --text",
        )
    unmarked = [record for record in records if _lacks_marks(record)]
    if unmarked and models.student is None:
        raise ConfigError(
            "--student",
            got=f"{len(unmarked)} of {len(records)} rollouts without log-probabilities, and no student",
            expected="models that mark them",
            remedy="add --student S --teacher T",
        )
    reader = next((role for role in ("student", "tokenizer", "teacher") if getattr(models, role)), None)
    if reader is None:
        return [_with_texts(record) for record in records]
    text = models.text(reader)
    teacher_text = models.text("teacher") if models.teacher else None
    if teacher_text is not None:
        check_same_tokens(text, teacher_text)
    complete = [as_ids(record, text, lambda own: _prompt_ids(own, text), _end_id(text)) for record in records]
    _check_context(complete, [one for one in (text, teacher_text) if one is not None])
    width = min(one.vocab_width for one in (text, teacher_text) if one is not None)
    student = teacher = None
    if models.student is not None:
        trust = "student" in models.trusted
        config = StudentConfig(model=models.student, device=models.device, trust_remote_code=trust)
        student = LocalTeacher(load_student(config, vocab_size=width))
    if models.teacher is not None:
        teacher = LocalTeacher(_teacher(models, student, width))
    return with_marks(complete, text, student=student, teacher=teacher, topk=models.topk)


def _lacks_marks(record: Record) -> bool:
    """A completion of no tokens is complete without any."""
    tokens = record.get("completion_tokens") if record.get("completion_ids") is None else record["completion_ids"]
    return tokens != [] and not (record.get("sampler_logprobs") or record.get("teacher_logprobs"))


def _teacher(models: Models, student: LocalTeacher | None, width: int) -> LanguageModel:
    """In the student's dtype, so that a teacher that is the student differs by nothing."""
    import torch

    assert models.teacher is not None
    own = student.model.device if student else pick_device(models.device)
    dtype = student.model.dtype if student else torch.float32
    trust = "teacher" in models.trusted
    model = load_model(models.teacher, role="teacher", dtype=dtype, device=own, trust_remote_code=trust)
    return LanguageModel(model.requires_grad_(False), vocab_size=width)


def _end_id(text: ModelText) -> int | None:
    """The token that ends an answer: the tokenizer's own where the model has several."""
    return (
        text.tokenizer.eos_token_id if text.tokenizer.eos_token_id in text.end_ids else min(text.end_ids, default=None)
    )


def _prompt_ids(record: Record, text: ModelText) -> list[int]:
    """What the student read: rendered messages, or the prompt's text as it is."""
    if record.get("messages"):
        return text.render(record["messages"], add_generation_prompt=True, template_kwargs={})
    prompt = record.get("prompt_text")
    if not prompt:
        raise ConfigError(
            f"record of prompt {record.get('prompt_index')}",
            got="no prompt",
            expected='"prompt_ids", "prompt_text" or "messages", which a model has to read before the completion',
            remedy="add one of them",
        )
    return text.encode(prompt)


def _check_context(records: Sequence[Record], texts: Sequence[ModelText]) -> None:
    longest = max(len(record["prompt_ids"]) + len(record["completion_ids"]) for record in records)
    for text in texts:
        if longest > text.context_length:
            raise ConfigError(
                f"model {text.name}",
                got=f"a context of {text.context_length} tokens",
                expected=f"at least {longest}, the longest prompt and completion",
                remedy="leave the longest rollouts out",
            )


def _with_texts(record: Record) -> Record:
    """A record whose tokens have no texts shows their ids; a text alone has no tokens to show."""
    if record.get("completion_tokens") is None and record.get("completion_ids") is not None:
        return record | {
            "completion_tokens": [str(token) for token in record["completion_ids"]],
            "completion_text": None,
        }
    return record

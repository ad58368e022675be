"""Do student, teacher and settings suit each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from understudy.config import SamplingConfig
from understudy.doctor.findings import Check, Found, shown
from understudy.doctor.teachers import mean
from understudy.doctor.trial import Trial, entropy_of, writer_of
from understudy.errors import ServerError
from understudy.rewards import grade_rollouts
from understudy.tasks import Grader
from understudy.types import Prompt, Rollout, TopkScores

if TYPE_CHECKING:
    from understudy.doctor.case import Case

# How many likeliest tokens are compared.
TOP = 16
MIN_STUDENT_MASS = 0.5
MAX_ENTROPY_GAP = 1.5
# A token that the teacher would write once in so many times is outside what it can say.
IMPOSSIBLE = 1e-5
MAX_IMPOSSIBLE = 0.2
MAX_TRUNCATED = 0.5
# A position stands out above so many nats, and so many times what the others have.
MAX_POSITION_KL, MAX_POSITION_RATIO = 2.0, 3.0
# Rates that were searched with this package lie within a factor of four of the rule.
RATE, WIDTH, ADAPTER_FACTOR, MAX_RATE_FACTOR = 5e-5, 4096, 10, 30.0
MIN_COMPLETIONS = 8
COMPLETIONS = {"full": 64, "topk": 64, "sampled": 256}
_PROBLEMS = 64


def overlap(case: Case) -> Iterator[Found]:
    """The likeliest tokens of both after the student's own words."""
    trial = case.trial
    if trial.student_top is None or trial.teacher_top is None:
        return
    k = min(TOP, _listed(trial.student_top), _listed(trial.teacher_top))
    shared, student_mass, teacher_mass = [], [], []
    for ours, theirs in zip(trial.student_top, trial.teacher_top, strict=True):
        rows = zip(ours.ids, ours.logprobs, theirs.ids, theirs.logprobs, strict=True)
        for own_ids, own_logprobs, ids, logprobs in rows:
            own_set, other_set = set(own_ids[:k]), set(ids[:k])
            shared.append(len(own_set & other_set) / max(1, k))
            student_mass.append(_mass(own_ids, own_logprobs, other_set))
            teacher_mass.append(_mass(ids, logprobs, own_set))
    numbers = {
        "k": k,
        "overlap": mean(shared),
        "student_mass": mean(student_mass),
        "teacher_mass": mean(teacher_mass),
    }
    evidence = (
        f"{len(shared)} positions: of the {k} likeliest tokens student and teacher share {mean(shared):.0%}; the "
        f"student gives the teacher's {mean(student_mass):.3f} of its probability, the teacher the student's "
        f"{mean(teacher_mass):.3f}"
    )
    yield Found("warn" if mean(student_mass) < MIN_STUDENT_MASS else "pass", evidence, numbers)


def _listed(scores: Sequence[TopkScores]) -> int:
    """How many alternatives there are of every token: servers give fewer than models here."""
    return min(len(ids) for score in scores for ids in score.ids)


def _mass(ids: Sequence[int], logprobs: Sequence[float], among: set[int]) -> float:
    return math.fsum(math.exp(value) for token, value in zip(ids, logprobs, strict=True) if token in among)


def entropy(case: Case) -> Iterator[Found]:
    """How sure both are after the student's own words."""
    trial = case.trial
    if trial.student_top is None or trial.teacher_top is None:
        return
    k = min(_listed(trial.student_top), _listed(trial.teacher_top))
    ours, theirs = (
        mean([entropy_of(row[:k]) for score in top for row in score.logprobs])
        for top in (trial.student_top, trial.teacher_top)
    )
    numbers = {"student": ours, "teacher": theirs, "gap": ours - theirs}
    evidence = f"entropy: student {ours:.3f}, teacher {theirs:.3f} nats a token"
    yield Found("warn" if abs(ours - theirs) > MAX_ENTROPY_GAP else "pass", evidence, numbers)


def support(case: Case) -> Iterator[Found]:
    """Tokens of the student that its teacher would never write."""
    trial = case.trial
    if trial.marks is None:
        return
    gaps = list(chain.from_iterable(trial.gaps()))
    impossible = [
        (rollout, t)
        for rollout, marks in zip(trial.rollouts, trial.marks, strict=True)
        for t, mark in enumerate(marks)
        if mark < math.log(IMPOSSIBLE)
    ]
    share = len(impossible) / trial.num_tokens
    numbers = {"tokens": trial.num_tokens, "impossible": share, "reverse_kl": mean(gaps)}
    evidence = (
        f"{share:.1%} of the student's {trial.num_tokens} tokens have a probability below {IMPOSSIBLE:g} for the "
        f"teacher; reverse KL {mean(gaps):.3f} nats a token"
    )
    if impossible:
        rollout, t = impossible[0]
        before = case.student.tokens(list(rollout.completion_ids[max(0, t - 8) : t]))
        evidence += f"\nafter {shown(before)}: {case.student.tokens([rollout.completion_ids[t]])[0]!r}"
    yield Found("warn" if share > MAX_IMPOSSIBLE else "pass", evidence, numbers)


def truncation(case: Case) -> Iterator[Found]:
    """Completions cut at the cap."""
    trial, config = case.trial, case.config
    cap = config.training_sampling.max_completion_tokens
    lengths = [len(rollout.completion_ids) for rollout in trial.rollouts]
    cut = [rollout for rollout in trial.rollouts if rollout.finish_reason == "length"]
    share = len(cut) / len(lengths)
    numbers = {"completions": len(lengths), "share": share, "mean_length": mean(lengths), "cap": cap}
    evidence = f"{len(cut)} of {len(lengths)} completions are cut at {cap} tokens; mean length {mean(lengths):.0f}"
    if share <= MAX_TRUNCATED or config.first_tokens is not None:
        yield Found("pass", evidence, numbers)
        return
    pad = case.student.tokenizer.pad_token_id
    remedy = f"sampling.max_completion_tokens = {2 * cap}; or fine-tune the student on its teacher's format first"
    if pad is not None and pad in case.stop_ids:
        evidence += (
            f"; its end token {case.student.tokens([pad])[0]!r} is also its padding, which trainers that mask padding "
            "never teach a model to write"
        )
        remedy = "fine-tune the student on its teacher's format with `understudy sft`, which trains on end tokens"
    yield Found("warn", f"{evidence}\n{shown(case.student.tokens(cut[0].completion_ids))}", numbers, remedy)


def positions(case: Case) -> Iterator[Found]:
    """The reverse KL at the first and the last token of completions, and elsewhere."""
    trial = case.trial
    gaps = trial.gaps()
    if not gaps:
        return
    ended = [row[-1] for r, row in zip(trial.rollouts, gaps, strict=True) if r.finish_reason == "stop" and len(row) > 1]
    inner = [gap for row in gaps for gap in row[1:-1]]
    rest = mean(inner) if inner else 0.0
    first = mean([row[0] for row in gaps])
    last = mean(ended) if ended else None
    numbers = {"first": first, "last": last, "rest": rest, "ended": len(ended)}
    said = "no completion ended" if last is None else f"{last:.3f} at the last token of {len(ended)} that ended"
    evidence = f"reverse KL, nats: {first:.3f} at the first token, {said}, {rest:.3f} elsewhere"
    high = max(MAX_POSITION_KL, MAX_POSITION_RATIO * rest)
    if first > high:
        remedy = (
            'let the teacher read its own template: mind "teacher_prompt", the chat templates and chat_template_kwargs'
        )
        yield Found("warn", f"{evidence}\n{_worst(case, trial, 0)}", numbers, remedy)
    elif last is not None and last > high:
        remedy = "sampling.stop_token_ids = [...], tokens with which the teacher ends its answers"
        yield Found("warn", f"{evidence}\n{_worst(case, trial, -1)}", numbers, remedy)
    else:
        yield Found("pass", evidence, numbers)


def _worst(case: Case, trial: Trial, place: int) -> str:
    assert trial.marks is not None
    rows = [
        (r, marks)
        for r, marks in zip(trial.rollouts, trial.marks, strict=True)
        if place == 0 or r.finish_reason == "stop"
    ]
    rollout, marks = max(rows, key=lambda row: row[0].sampler_logprobs[place] - row[1][place])
    token = case.student.tokens([rollout.completion_ids[place]])[0]
    return f"{token!r}: student {rollout.sampler_logprobs[place]:.2f}, teacher {marks[place]:.2f}"


# Accuracy


def accuracy(case: Case) -> Iterator[Found]:
    """Student and teachers under the run's graders, greedily, on the same problems."""
    lines, numbers, worse, able = [], {}, [], []
    for problems in _graded(case):
        for label, ours, theirs in _grades(case, problems):
            difference = [q - p for p, q in zip(ours, theirs, strict=True)]
            error = math.sqrt(mean([(d - mean(difference)) ** 2 for d in difference]) / max(1, len(difference) - 1))
            lines.append(f"{label}: teacher {mean(theirs):.1%}, student {mean(ours):.1%} of {len(ours)} problems")
            numbers[label] = {"teacher": mean(theirs), "student": mean(ours), "problems": len(ours), "error": error}
            worse.append(mean(difference) < -2 * error and mean(difference) < 0)
            able.append(max(theirs) > 0)
    if not lines:
        return
    if all(worse):
        yield Found("warn", "the teacher does worse than the student\n" + "\n".join(lines), numbers)
    elif not any(able):
        yield Found("warn", "the teacher solves none of the problems\n" + "\n".join(lines), numbers)
    else:
        yield Found("pass", "\n".join(lines), numbers)


@dataclass(frozen=True)
class _Problems:
    """What some of the ``teachers`` are asked, and how it is graded."""

    label: str
    teachers: Sequence[str]
    prompts: Sequence[Prompt]
    grader: Grader
    cap: int


def _graded(case: Case) -> Iterator[_Problems]:
    checked, names = case.whole(), case.teacher_names
    cap = case.config.sampling.max_completion_tokens
    if checked.grader is not None:
        for name in names:  # each knows its own rows, and may know nothing else
            rows = [prompt for prompt in checked.prompts if prompt.teacher == name][:_PROBLEMS]
            if rows:
                yield _Problems("training rows", [name], rows, checked.grader, cap)
    for task in checked.tasks:
        length = task.sampling.max_completion_tokens
        yield _Problems(task.config.name, names, task.prompts[:_PROBLEMS], task.grader, length)


def _grades(case: Case, problems: _Problems) -> Iterator[tuple[str, Sequence[float], Sequence[float]]]:
    """(label, rewards of the student, of a teacher) for each teacher that writes."""
    sampling = SamplingConfig(group_size=1, temperature=0.0, max_completion_tokens=problems.cap)

    def graded(rollouts: Sequence[Rollout]) -> list[float]:
        return grade_rollouts(rollouts, problems.grader, case.parts.decode)

    ours: list[float] = []
    for name in problems.teachers:
        try:
            writer = writer_of(case, name)
            theirs = writer([_as_read(prompt) for prompt in problems.prompts], sampling) if writer else []
        except ServerError:
            continue  # the checks of templates and temperature say so
        if not theirs:
            continue
        if not ours:
            groups = case.parts.evaluator.sample(problems.prompts, sampling, seed=case.config.seed)
            ours = graded([group[0] for group in groups])
        several = f", teacher {name}" if len(case.teacher_names) > 1 else ""
        yield f"{problems.label}{several}", ours, graded(theirs)


def _as_read(prompt: Prompt) -> Prompt:
    """A prompt as the teacher reads it: where nothing else is known, as the student does."""
    ids = prompt.prompt_ids if prompt.teacher_prompt_ids is None else prompt.teacher_prompt_ids
    return replace(prompt, prompt_ids=ids)


# Rate and batch


def optim(case: Case) -> Iterator[Found]:
    """Learning rate and batch beside what a rule suggests."""
    hidden = case.student.config.get_text_config().hidden_size
    config = case.config
    factor = ADAPTER_FACTOR if config.student.lora else 1
    suggested = RATE * math.sqrt(WIDTH / hidden) * factor
    rate = config.optim.learning_rate
    sampling = config.sampling
    batch = config.supervised.batch_size if not case.on_policy else sampling.group_size * sampling.groups_per_batch
    estimator = (
        "full" if config.objective.estimator == "auto" and case.method == "distill" else config.objective.estimator
    )
    wanted = COMPLETIONS.get(estimator, COMPLETIONS["sampled"]) if case.on_policy else COMPLETIONS["full"]
    numbers = {
        "learning_rate": rate,
        "suggested": suggested,
        "hidden": hidden,
        "batch": batch,
        "suggested_batch": wanted,
    }
    rule = f"{RATE:g} x sqrt({WIDTH} / {hidden})" + (f" x {factor} for adapters" if factor > 1 else "")
    evidence = (
        f"learning rate {rate:g}, to begin with {suggested:.1g} ({rule}); {batch} sequences a step, to begin with "
        f"{wanted}"
    )
    off = max(rate / suggested, suggested / rate)
    if off > MAX_RATE_FACTOR:
        yield Found("warn", evidence, numbers, f"optim.learning_rate = {suggested:.1g}")
    elif batch < MIN_COMPLETIONS:
        groups = f"sampling.groups_per_batch = {-(-wanted // sampling.group_size)}"
        yield Found("warn", evidence, numbers, groups if case.on_policy else f"supervised.batch_size = {wanted}")
    else:
        yield Found("pass", evidence, numbers)


_DISTILL = frozenset({"distill"})
_ON_POLICY = frozenset({"distill", "rl"})
_Run = Callable[["Case"], Iterator[Found]]


def _fit(name: str, run: _Run, threshold: str, why: str, remedy: str, methods: frozenset[str] = _DISTILL) -> Check:
    return Check(f"fit.{name}", run, threshold, why, remedy, weights=True, methods=methods)


CHECKS = (
    _fit(
        "overlap",
        overlap,
        f"warns where the student gives the teacher's {TOP} likeliest tokens less than {MIN_STUDENT_MASS:g} of its "
        "probability",
        "the reverse KL only weighs what the student can already say: without common ground there is little to "
        "choose from",
        "fine-tune the student on the teacher's answers first: `understudy generate`, then `understudy sft`",
    ),
    _fit(
        "entropy",
        entropy,
        f"warns where mean entropies are more than {MAX_ENTROPY_GAP:g} nats apart",
        "a student that is far less sure than its teacher writes what the teacher never would; one that is far surer "
        "tries nothing else",
        "fine-tune the student on the teacher's answers first: `understudy generate`, then `understudy sft`",
    ),
    _fit(
        "support",
        support,
        f"warns where the teacher gives more than {MAX_IMPOSSIBLE:.0%} of the student's tokens a probability below "
        f"{IMPOSSIBLE:g}",
        "where nothing that the student writes is possible for the teacher, its marks rank impossible things",
        "fine-tune the student on the teacher's answers first: `understudy generate`, then `understudy sft`",
    ),
    _fit(
        "accuracy",
        accuracy,
        "warns where the teacher does worse than the student in every task, by more than two standard errors, or "
        "solves nothing",
        "a student becomes its teacher: one that cannot do the task, or is asked in a form it does not know, "
        "teaches that",
        "use a teacher that solves the task, and the prompts and chat template it solves it with",
    ),
    _fit(
        "positions",
        positions,
        f"warns where the mean at the first or the last token is above {MAX_POSITION_KL:g} nats and "
        f"{MAX_POSITION_RATIO:g} times the others'",
        "a wrong template shows at the first token of an answer, another end token at the last",
        "mind the chat templates and sampling.stop_token_ids",
    ),
    _fit(
        "truncation",
        truncation,
        f"warns where more than {MAX_TRUNCATED:.0%} of the completions are cut at the cap",
        "what is cut has no end token and cannot be graded: the student does not learn to finish",
        "sampling.max_completion_tokens = ...",
        _ON_POLICY,
    ),
    Check(
        "fit.optim",
        optim,
        f"warns where the learning rate is more than {MAX_RATE_FACTOR:g} times off {RATE:g} x sqrt({WIDTH} / hidden "
        f"size), {ADAPTER_FACTOR} times that for adapters, or a step has fewer than {MIN_COMPLETIONS} sequences. To "
        f"begin with: {COMPLETIONS['full']} completions a step, {COMPLETIONS['sampled']} for the sampled estimator and "
        "rewards",
        "too small a rate learns nothing in the time there is, too large a one breaks the model; small batches "
        "are noise",
        "optim.learning_rate = ..., sampling.groups_per_batch = ...",
    ),
)

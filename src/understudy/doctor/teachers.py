"""Can marks be trusted: the same twice, in any company, at one temperature, and as the sampler's own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.backends.protocols import Teacher
from understudy.config import SamplingConfig
from understudy.doctor.findings import Check, Found
from understudy.doctor.trial import ALTERNATIVES, entropy_of, writer_of
from understudy.errors import ServerError
from understudy.mark_temperature import NOISE, RATIOS, errors_by_ratio, named_weights
from understudy.teacher_scores import teacher_view
from understudy.types import Prompt, Rollout, TokenSequence, TopkScores

if TYPE_CHECKING:
    from understudy.doctor.case import Case

# Nats per token, on average. A wrong position or mask shows as nats.
MAX_NOISE, MAX_FAULT = NOISE, 0.3
# A model marks its own text as it wrote it; rounding is far below.
MAX_SELF_KL = 1e-3
# The same where tokens were chosen because the teacher is unsure: temperatures differ by less where it is sure.
MAX_WRITING_FAULT = 0.1
WRITTEN = 32
# Of a top-k objective: what the k tokens leave out is known as one number only.
MIN_TOP_MASS = 0.9
_TAIL_RATIO = math.log(1.1)


def repeatable(case: Case) -> Iterator[Found]:
    """The same sequences marked together, together again, and one by one."""
    for name, rollouts in _by_teacher(case):
        teacher = case.parts.page_teachers[name]
        sequences = [teacher_view(rollout) for rollout in rollouts[:8]]
        together, again = (teacher.compute_logprobs(sequences) for _ in range(2))
        alone = [teacher.compute_logprobs([sequence])[0] for sequence in sequences]
        twice, company = apart(together, again), apart(together, alone)
        numbers = {
            "teacher": name,
            "sequences": len(sequences),
            "twice_mean": mean(twice),
            "twice_max": max(twice),
            "alone_mean": mean(company),
            "alone_max": max(company),
        }
        worst = max(mean(twice), mean(company))
        evidence = (
            f"teacher {name}, {len(sequences)} sequences of {len(twice)} tokens: marks differ by {mean(twice):.2g} "
            f"nats a token (at most {max(twice):.2g}) when asked twice, by {mean(company):.2g} (at most "
            f"{max(company):.2g}) between a batch and one by one"
        )
        where = max(range(len(twice)), key=lambda i: max(twice[i], company[i]))
        token = list(chain.from_iterable(s.completion_ids for s in sequences))[where]
        marks = [list(chain.from_iterable(rows))[where] for rows in (together, again, alone)]
        example = f"\n{case.student.tokens([token])[0]!r}: " + ", ".join(f"{value:.4f}" for value in marks)
        level = "fail" if worst > MAX_FAULT else "warn" if worst > MAX_NOISE else "pass"
        yield Found(level, evidence + (example if level != "pass" else ""), numbers)


def own_teacher(case: Case) -> Iterator[Found]:
    """A teacher that is the student marks its text as it wrote it."""
    for name, rollouts in _by_teacher(case):
        role = case.config.all_teachers[name]
        if Path(role.model).resolve() != Path(case.config.student.model).resolve() or role.url is not None:
            continue
        if any(r.prompt.teacher_prompt_ids is not None for r in rollouts):
            continue  # it reads something else, and is another distribution
        marks = case.parts.page_teachers[name].compute_logprobs([teacher_view(r) for r in rollouts])
        gaps = [
            p - q for r, own in zip(rollouts, marks, strict=True) for p, q in zip(r.sampler_logprobs, own, strict=True)
        ]
        worst = max(map(abs, gaps))
        size = abs(mean(gaps))
        level = "fail" if size > MAX_NOISE else "warn" if size > MAX_SELF_KL else "pass"
        evidence = f"teacher {name} is the student: reverse KL {mean(gaps):+.2g} nats a token, at most {worst:.2g}"
        yield Found(level, evidence, {"teacher": name, "mean": mean(gaps), "max": worst})


def sampler(case: Case) -> Iterator[Found]:
    """Log-probabilities of the sampler and of the trainer for the same tokens."""
    trial = case.trial
    written = [list(r.sampler_logprobs) for r in trial.rollouts]
    errors = apart(written, trial.own)
    share = sum(error > _TAIL_RATIO for error in errors) / len(errors)
    numbers = {"tokens": len(errors), "mean": mean(errors), "max": max(errors), "outside_share": share}
    evidence = (
        f"{len(errors)} tokens: sampler and trainer differ by {mean(errors):.2g} nats a token, at most "
        f"{max(errors):.2g}; {share:.1%} of the importance ratios are outside [0.91, 1.1]"
    )
    level = "fail" if mean(errors) > MAX_FAULT else "warn" if mean(errors) > MAX_NOISE else "pass"
    yield Found(level, evidence, numbers)


def top_mass(case: Case) -> Iterator[Found]:
    """What a teacher's alternatives amount to, and whether the written token is marked as among them."""
    trial = case.trial
    if trial.teacher_top is None or trial.marks is None:
        return
    k = max(len(row) for score in trial.teacher_top for row in score.ids)
    wanted = min(case.config.objective.topk, k)
    masses = [math.fsum(map(math.exp, row[:wanted])) for score in trial.teacher_top for row in score.logprobs]
    numbers = {"k": wanted, "mean": mean(masses), "min": min(masses), "max": max(masses)}
    errors = [
        abs(row[list(ids).index(token)] - mark)
        for rollout, score, marks in zip(trial.rollouts, trial.teacher_top, trial.marks, strict=True)
        for token, ids, row, mark in zip(rollout.completion_ids, score.ids, score.logprobs, marks, strict=True)
        if token in ids
    ]
    numbers["apart"] = mean(errors) if errors else 0.0
    evidence = (
        f"the teacher's {wanted} likeliest tokens hold {mean(masses):.3f} of its probability, {min(masses):.3f} at "
        f"least; a token among them is {numbers['apart']:.2g} nats from its own mark"
    )
    asked = case.config.objective.estimator == "topk"
    if numbers["apart"] > MAX_NOISE:
        remedy = "serve log-probabilities before any processing (vLLM: --logprobs-mode raw_logprobs)"
        yield Found("fail" if numbers["apart"] > MAX_FAULT else "warn", evidence, numbers, remedy)
    else:
        yield Found("warn" if asked and mean(masses) < MIN_TOP_MASS else "pass", evidence, numbers)


# Temperature


def temperature(case: Case) -> Iterator[Found]:
    """The temperature that a teacher's marks are at, found by probing."""
    wanted = case.config.sampling.temperature
    for name, rollouts in _by_teacher(case):
        teacher = case.parts.page_teachers[name]
        sequences = [teacher_view(rollout) for rollout in rollouts[:8]]
        if "hidden" in teacher.kinds:
            yield _against_states(name, teacher, teacher, sequences, wanted, "its own hidden states")
            continue
        config = case.config
        weights = named_weights(config.all_teachers[name], config.student.model, vocab_size=case.whole().vocab_size)
        if weights is not None:
            model = f"the weights of {case.config.all_teachers[name].model}"
            yield _against_states(name, teacher, weights, sequences, wanted, model)
            continue
        try:
            yield _against_writing(case, name)
        except ServerError as error:
            yield Found("warn", f"teacher {name} does not write, so that its temperature cannot be found: {error}")


def _against_states(
    name: str, teacher: Teacher, states: Teacher, sequences: Sequence[TokenSequence], wanted: float, source: str
) -> Found:
    """Marks compared with what a model's logits give at many temperatures."""
    marks = teacher.compute_logprobs(sequences)
    errors = {
        ratio * wanted: error for ratio, error in errors_by_ratio(marks, states, sequences, temperature=wanted).items()
    }
    found = min(errors, key=lambda value: errors[value])
    numbers = {
        "teacher": name,
        "found": found,
        "wanted": wanted,
        "error": errors[found],
        "error_at_wanted": errors[wanted],
    }
    evidence = (
        f"teacher {name}: its marks are those of {source} at temperature {found:.3g} ({errors[found]:.2g} nats a token "
        f"apart; at the run's {wanted:g}: {errors[wanted]:.2g})"
    )
    if errors[wanted] <= MAX_NOISE:
        return Found("pass", evidence, numbers)
    if errors[found] > MAX_FAULT:
        evidence = f"teacher {name}: its marks are those of {source} at no temperature ({errors[found]:.2g} nats apart)"
        return Found(
            "warn", evidence, numbers, "name the model that marks in teacher.model, or leave it out with a url"
        )
    return Found("fail" if errors[wanted] > MAX_FAULT else "warn", evidence, numbers)


def _against_writing(case: Case, name: str) -> Found:
    """What a teacher gives tokens as it writes them at the run's temperature, and how it marks them afterwards."""
    writer = writer_of(case, name)
    wanted = case.config.sampling.temperature
    if writer is None:
        evidence = (
            f"teacher {name} only marks, and its weights are not at hand: temperature {wanted:g} is taken for granted"
        )
        return Found("pass", evidence, {"teacher": name, "wanted": wanted})
    sampling = SamplingConfig(group_size=1, temperature=wanted, max_completion_tokens=1)
    written = writer(_unsure(case, name), sampling)
    sequences = [TokenSequence(r.prompt.prompt_ids, r.completion_ids) for r in written]
    teacher = case.parts.page_teachers[name]
    given = [rollout.sampler_logprobs[0] for rollout in written]
    marks = [row[0] for row in teacher.compute_logprobs(sequences)]
    errors = [abs(p - q) for p, q in zip(given, marks, strict=True)]
    found = _fitted(teacher, sequences, given, wanted) if "topk" in teacher.kinds else None
    numbers = {"teacher": name, "wanted": wanted, "tokens": len(errors), "error": mean(errors), "found": found}
    at = "" if found is None else f": marks at temperature {found:.2g}"
    evidence = (
        f"teacher {name} wrote {len(errors)} tokens at temperature {wanted:g} where it was least sure, and marks them "
        f"{mean(errors):.2g} nats (at most {max(errors):.2g}) from what it gave them{at}"
    )
    level = "fail" if mean(errors) > MAX_WRITING_FAULT else "warn" if mean(errors) > MAX_NOISE else "pass"
    if level != "pass":
        tokens = case.student.tokens([r.completion_ids[0] for r in written[:4]])
        rows = zip(tokens, given, marks, strict=False)
        evidence += "\n" + "; ".join(f"{token!r} {one:.3f} written, {mark:.3f} marked" for token, one, mark in rows)
    return Found(level, evidence, numbers)


def _unsure(case: Case, name: str) -> list[Prompt]:
    """Texts to go on from: where temperatures differ most, after beginnings of the student's completions."""
    trial = case.trial
    assert trial.marks is not None
    places: list[tuple[float, int, int]] = []
    for i, rollout in enumerate(trial.rollouts):
        if rollout.prompt.teacher != name:
            continue
        for t, mark in enumerate(trial.marks[i]):
            # Without alternatives: a token that is likely and not certain.
            sure = -entropy_of(trial.teacher_top[i].logprobs[t]) if trial.teacher_top else abs(mark + 0.3)
            places.append((sure, i, t))
    prompts = []
    for _, i, t in sorted(places)[:WRITTEN]:
        view = teacher_view(trial.rollouts[i])
        prompts.append(replace(trial.rollouts[i].prompt, prompt_ids=[*view.prompt_ids, *view.completion_ids[:t]]))
    return prompts


def _fitted(teacher: Teacher, sequences: Sequence[TokenSequence], given: Sequence[float], wanted: float) -> float:
    """The temperature of marks that explains best what tokens were ``given`` at ``wanted``: log-probabilities of
    temperature T, times T, are those of temperature 1 but for a constant. Alternatives stand for the vocabulary."""
    most = min(ALTERNATIVES, getattr(teacher, "max_topk", None) or ALTERNATIVES)
    rows: list[tuple[float, float, list[float]]] = []
    for score, written in zip(teacher.score(sequences, "topk", topk=most), given, strict=True):
        assert isinstance(score, TopkScores)
        rows.append((written, score.teacher_logprobs[0], list(score.logprobs[0])))

    def loss(value: float) -> float:
        scale = value / wanted
        sums = (math.log(math.fsum(math.exp(scale * v) for v in values)) for _, _, values in rows)
        return math.fsum(abs(scale * own - total - row) for (row, own, _), total in zip(rows, sums, strict=True))

    return min((ratio * wanted for ratio in RATIOS), key=loss)


# Helpers


def _by_teacher(case: Case) -> Iterator[tuple[str, list[Rollout]]]:
    """The trial's completions by who marks them."""
    for name in case.teacher_names:
        rollouts = [rollout for rollout in case.trial.rollouts if rollout.prompt.teacher == name]
        if rollouts:
            yield name, rollouts


def apart(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> list[float]:
    """|difference| of every token, sequence after sequence."""
    return [abs(p - q) for a, b in zip(one, other, strict=True) for p, q in zip(a, b, strict=True)]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


_DISTILL = frozenset({"distill"})
_ON_POLICY = frozenset({"distill", "rl"})
_NOISE = f"warns above {MAX_NOISE:g} nats a token on average, fails above {MAX_FAULT:g}"
CHECKS = (
    Check(
        "teachers.repeatable",
        repeatable,
        f"{_NOISE}, between two calls or between a batch and single sequences",
        "noise in marks is noise in the gradient; marks that depend on their neighbours come from a wrong mask "
        "or position",
        'serve one replica of the teacher in bfloat16 or float32; in process, teacher.dtype = "float32"',
        weights=True,
        methods=_DISTILL,
    ),
    Check(
        "teachers.own",
        own_teacher,
        f"warns above {MAX_SELF_KL:g} nats a token of reverse KL where teacher and student are one model, fails above "
        f"{MAX_NOISE:g}; a served teacher is left out, for its url alone does not say whose weights it has",
        "at teacher = student nothing is left to learn: what remains is an error of the plumbing, and would be "
        "trained on",
        'teacher.dtype = "auto", which scores a teacher of the student\'s shape as the student is trained',
        weights=True,
        methods=_DISTILL,
    ),
    Check(
        "teachers.temperature",
        temperature,
        f"{_NOISE}, between marks and what hidden states, the teacher's weights or its own writing (fails above "
        f"{MAX_WRITING_FAULT:g}) give at the run's temperature",
        "the reverse KL of two temperatures is not zero for equal models: the student is drawn to a flatter or "
        "sharper text",
        "sampling.temperature = 1, and a teacher whose log-probabilities are at temperature 1, before any processing",
        weights=True,
        methods=_DISTILL,
    ),
    Check(
        "teachers.sampler",
        sampler,
        _NOISE,
        "importance ratios correct for what sampler and trainer disagree on, and their tails are noise in the gradient",
        'student.compute_dtype = "float32"; for a served sampler the student\'s dtype and raw log-probabilities',
        weights=True,
        methods=_ON_POLICY,
    ),
    Check(
        "teachers.top_mass",
        top_mass,
        f'warns below {MIN_TOP_MASS:g} with estimator = "topk", and above {MAX_NOISE:g} nats between a '
        "token's mark and the "
        f"same token among the alternatives (fails above {MAX_FAULT:g})",
        "a top-k objective sees the mass outside its tokens as one number; alternatives of another distribution than "
        "the marks' are none of this teacher's",
        "objective.topk = 64",
        weights=True,
        methods=_DISTILL,
    ),
)

"""Numbers of a step, named area/name and defined in docs/metrics.md, and the file they go to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from understudy.checkpoints import flush, write_atomic, writing
from understudy.config_objective import ObjectiveConfig
from understudy.divergences import KINDS
from understudy.errors import ConfigError, first_line
from understudy.json_text import parsed
from understudy.statistics import ratio_and_error
from understudy.types import Rollout, ScoredRollout, Scores, TrainingExample

_DEFAULTS = ObjectiveConfig()
# log q below which the teacher finds a token impossible.
IMPOSSIBLE = math.log(1e-3)


class MetricsLog:
    """metrics.jsonl, or another file of objects with a step: one object per line, flushed as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a step's row. Raises RunError when it cannot be written."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(row), allow_nan=False) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All objects; a half-written last line is left out. Raises ConfigError for one without a step."""
        return _rows_of_steps(self.path) if self.path.exists() else []

    def replace_last(self, row: Mapping[str, Any]) -> None:
        """Put another row in the newest one's place. Raises RunError when it cannot be written."""
        self._write([*read_metrics(self.path)[:-1], row])

    def flush(self) -> None:
        """Force it to disk, if there is one. Raises RunError when it cannot be."""
        if self.path.exists():
            with writing(self.path):
                flush(self.path)

    def truncate_after(self, step: int) -> None:
        """Drop rows of later steps, and a last line cut by a crash: they will be written again."""
        if self.path.exists():
            self._write([row for row in self.rows() if row["step"] <= step])

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        write_atomic(self.path, "".join(json.dumps(dict(row), allow_nan=False) + "\n" for row in rows))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows in order; a half-written last line is left out. Raises ConfigError for one that is no row of a step."""
    rows = _rows_of_steps(path)
    for number, row in enumerate(rows, 1):
        if odd := [name for name, value in row.items() if type(value) not in (int, float)]:
            raise _no_row(path, number, f"{odd[0]} = {row[odd[0]]!r}")
    return rows


def _rows_of_steps(path: Path) -> list[dict[str, Any]]:
    """Objects with a step, in order; a half-written last line is left out. Raises ConfigError for another line."""
    rows = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = parsed(line)
            got = repr(row)
        except ValueError as error:
            row, got = None, first_line(error)
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise _no_row(path, number, got)
        rows.append(row)
    return rows


def _no_row(path: Path, number: int, got: str) -> ConfigError:
    expected, remedy = 'numbers of a step, {"step": 1, ...}', "put the file back from a copy, or delete that line"
    return ConfigError(f"{path}:{number}", got=got, expected=expected, remedy=remedy)


def rollout_metrics(
    scored: Sequence[ScoredRollout], objective: ObjectiveConfig = _DEFAULTS, *, num_written: int | None = None
) -> dict[str, float]:
    """What the student wrote and what its teacher thought of it. Token means unless said. ``num_written``: how many
    completions there were, those that nobody marked among them."""
    if not scored:
        return {"teacher/away_share": 1.0}
    rollouts = [s.rollout for s in scored]
    lengths = [len(r.completion_ids) for r in rollouts]
    tokens = sum(lengths)
    metrics = _means(scored) | {
        "completion_length/max": float(max(lengths)),
        "repeated_4gram/share": sum(repeated_4grams(r.completion_ids) for r in rollouts) / max(1, tokens),
    }
    if num_written is not None and num_written > len(scored):
        metrics["teacher/away_share"] = 1 - len(scored) / num_written
    gaps = _gaps([(s.rollout, s.scores) for s in scored])
    if gaps:
        metrics["reverse_kl/max"] = max(gaps)
    drift = _gaps([(s.rollout, s.reference) for s in scored])
    if gaps and objective.signal_clip is not None:
        limit, share = objective.signal_clip, objective.extrapolation
        # What is clipped is the whole signal, extrapolated where it is.
        signals = gaps if share == 1 else [share * q + (1 - share) * r for q, r in zip(gaps, drift, strict=True)]
        metrics["reverse_kl/clipped_share"] = sum(abs(signal) > limit for signal in signals) / len(signals)
    if drift:
        metrics["reference_kl/mean"] = math.fsum(drift) / len(drift)
    return metrics | agreement_metrics(scored) | _parts(scored)


# A completion's share in a mean: what is added up, and what the sum is divided by; None: none.
_AMOUNTS: Mapping[str, Callable[[ScoredRollout], tuple[float, int] | None]] = {
    "reverse_kl/mean": lambda own: None if own.scores is None else _summed(_gaps([(own.rollout, own.scores)])),
    "entropy/sampled": lambda own: (-math.fsum(own.rollout.sampler_logprobs), len(own.rollout.completion_ids)),
    "completion_length/mean": lambda own: (len(own.rollout.completion_ids), 1),
    "truncated/share": lambda own: (own.rollout.finish_reason == "length", 1),
    "reward/mean": lambda own: None if own.reward is None else (own.reward, 1),
}
# Rows and configurations that name no task, or no teacher, have this one.
_UNNAMED = "default"


def _means(scored: Sequence[ScoredRollout]) -> dict[str, float]:
    """Means, and their standard errors over prompts: completions of one prompt are no independent draws."""
    metrics: dict[str, float] = {}
    for name, amount in _AMOUNTS.items():
        by_prompt: dict[int, tuple[float, int]] = {}
        for own in scored:
            if (found := amount(own)) is not None:
                before = by_prompt.get(own.rollout.prompt.index, (0.0, 0))
                by_prompt[own.rollout.prompt.index] = (before[0] + found[0], before[1] + found[1])
        if by_prompt:
            metrics[name], error = ratio_and_error(list(by_prompt.values()))
            metrics |= {} if error is None else {f"{name}_se": error}
    return metrics


def _parts(scored: Sequence[ScoredRollout]) -> dict[str, float]:
    """The same of each task's completions, and of each teacher's, where they have names."""

    def of(kind: str, names: Sequence[str]) -> Iterator[tuple[str, float]]:
        for part in dict.fromkeys(names) if set(names) != {_UNNAMED} else ():
            own = [one for one, name in zip(scored, names, strict=True) if name == part]
            yield from ((f"by_{kind}/{part}/{name}", value) for name, value in _means(own).items())

    prompts = [one.rollout.prompt for one in scored]
    return dict(of("task", [p.task for p in prompts])) | dict(of("teacher", [p.teacher for p in prompts]))


def agreement_metrics(scored: Sequence[ScoredRollout]) -> dict[str, float]:
    """Where the teacher finds impossible what the student wrote."""
    marked = [(s.rollout, s.scores.teacher_logprobs) for s in scored if s.scores is not None]
    if not marked:
        return {}
    ends = [marks[-1] for rollout, marks in marked if rollout.finish_reason == "stop"]
    shares = {"": [q for _, marks in marked for q in marks], "first_": [marks[0] for _, marks in marked], "end_": ends}
    return {
        f"teacher/rejected_{place}share": sum(q < IMPOSSIBLE for q in marks) / len(marks)
        for place, marks in shares.items()
        if marks
    }


def alignment(
    examples: Sequence[TrainingExample], before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]
) -> float | None:
    """Cosine, over the tokens that train, of an update's change in log p with the advantages that it followed: what the
    policy gradient climbs is their product's sum, so that the first step of gradient descent, and of Adam, makes it
    positive; a wrong sign turns it round. ``before``, ``after``: the trainer's log-probabilities.

    None without advantages, and where tokens moved less than three times as far as trainer and sampler lie apart about
    the same weights: that is rounding.
    """
    rows = [
        (own.loss_mask, own.advantages, own.weights or [1.0] * len(old), own.sampler_logprobs, old, new)
        for own, old, new in zip(examples, before, after, strict=True)
        if own.advantages is not None and own.sampler_logprobs is not None
    ]
    if not rows:
        return None
    mask, advantages, weights, sampler, start, end = (np.concatenate([row[i] for row in rows]) for i in range(6))
    wished, moves, noise = (x[mask] for x in (advantages * weights, end - start, start - sampler))
    if not moves @ moves > 9 * (noise @ noise):
        return None
    size = math.sqrt((moves @ moves) * (wished @ wished))
    return float(moves @ wished) / size if size > 0 else None


def _gaps(marked: Sequence[tuple[Rollout, Scores | None]]) -> list[float]:
    """log p - log q of every written token."""
    return [
        p - q
        for rollout, scores in marked
        if scores is not None
        for p, q in zip(rollout.sampler_logprobs, scores.teacher_logprobs, strict=True)
    ]


def _summed(values: Sequence[float]) -> tuple[float, int]:
    return math.fsum(values), len(values)


def repeated_4grams(ids: Sequence[int]) -> int:
    """Tokens that end a 4-gram already written in the same completion."""
    seen: set[tuple[int, ...]] = set()
    repeats = 0
    for end in range(4, len(ids) + 1):
        gram = tuple(ids[end - 4 : end])
        repeats += gram in seen
        seen.add(gram)
    return repeats


_UPDATE_NAMES = {
    "loss": "optim/loss",
    "grad_norm": "optim/grad_norm",
    "tokens": "tokens/trained",
    "skipped": "update/skipped",
    "nonfinite": "update/nonfinite",
    "ratio": "ratio/mean",
    "ratio_max": "ratio/max",
    "abs_log_ratio": "ratio/abs_log_mean",
    "abs_log_ratio_max": "ratio/abs_log_max",
    "ratio_outside": "ratio/outside_share",
    "ratio_tail": "ratio/tail_share",
    "ratio_clipped": "ratio/clipped_share",
    "student_entropy": "entropy/student",
    "teacher_entropy": "entropy/teacher",
    "gate": "entropy_gated/share",
    "topk": "topk/divergence",
    "topk_student_mass": "topk/student_mass",
    "topk_teacher_mass": "topk/teacher_mass",
    "topk_overlap": "topk/overlap",
    "reference_kl_full": "reference_kl/full",
    **{f"{kind}_full": f"{kind}/full" for kind in KINDS},
}


def update_metrics(update: Mapping[str, float]) -> dict[str, float]:
    """The optimizer step's results under their public names. Of an update that was not made because a number was not
    finite, no mean is one."""
    if update.get("nonfinite"):
        update = {name: update[name] for name in ("tokens", "skipped", "nonfinite")}
    return {_UPDATE_NAMES[name]: value for name, value in update.items()}

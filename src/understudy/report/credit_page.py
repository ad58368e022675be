"""The page of token credit: forking tokens, reverse KL by position, and every rollout with its coloured tokens."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from markupsafe import Markup

from understudy.report import formatting, page
from understudy.report.charts import Series, line_chart
from understudy.report.credit_data import json_script, pack, packed_json, reverse_kl
from understudy.report.page import Row
from understudy.report.worst_tokens import worst_tokens

# Forking tokens listed; each is a row of context.
FORKS_SHOWN = 30
# (key of the page's script, words) of the sortable columns.
SORTABLE = (
    ("rollout", "Rollout"),
    ("kl", "Reverse KL (nats per token)"),
    ("length", "Tokens"),
    ("reward", "Reward"),
    ("finish", "Finish"),
)
# Fields of a stored rollout that an exported one keeps as they are.
_EXPORTED = ("step", "prompt_index", "sample_index", "task", "answer")
# What it answered: models that mark an exported rollout again have to read the same.
_PROMPT = ("prompt_text", "prompt_ids", "messages", "teacher_prompt_ids")


@dataclass(frozen=True)
class CreditUnit:
    """What stands together on the page: one rollout, or one prompt's before and after.

    ``labels`` name its rollouts (empty: no name); ``notes`` mark tokens of each by position.
    """

    rollouts: Sequence[Row]
    labels: Sequence[str] = ()
    notes: Sequence[Mapping[int, str]] = field(default_factory=tuple)


def write_credit_page(units: Sequence[CreditUnit], out: Path, *, title: str, facts: Sequence[str] = ()) -> Path:
    """Write the page of ``units`` to ``out``: one file, below 2 MB for 200 rollouts of 256 tokens.

    Rollouts are records as docs/credit.md describes them; every per-token list may be missing. ``facts`` are lines
    under the title.
    """
    rollouts = [rollout for unit in units for rollout in unit.rollouts]
    notes = [note for unit in units for note in (unit.notes or ({},) * len(unit.rollouts))]
    context = {
        "title": title,
        "facts": facts,
        "count": len(rollouts),
        "forks": worst_tokens(rollouts, FORKS_SHOWN),
        "charts": _charts(units),
        "sortable": SORTABLE,
        "rollouts": json_script("rollouts", packed_json(_rollouts(units))),
        "data": json_script("credit-data", pack(rollouts, notes=notes)),
    }
    return page.write_page("credit.html", Path(out), context, scripts=("tokens", "charts", "credit"))


def pair_units(
    before: Sequence[Row], after: Sequence[Row], *, labels: tuple[str, str] = ("before", "after")
) -> list[CreditUnit]:
    """Rollouts of the same prompts side by side, in the order of ``before``; what has no partner is left out.

    Partners share task, prompt and sample number and have the same prompt text; of several, the first goes with the
    first. The first token in which they differ carries a note in both.
    """
    partners = dict(zip(_identities(after), after, strict=True))
    units = []
    for identity, rollout in zip(_identities(before), before, strict=True):
        partner = partners.get(identity)
        if partner is not None:
            parting = _parting(rollout, partner)
            notes = tuple({} if parting is None else {parting: "here the two part"} for _ in range(2))
            units.append(CreditUnit((rollout, partner), labels, notes))
    return units


def _identities(rollouts: Sequence[Row]) -> list[tuple[Any, ...]]:
    """What tells rollouts apart. A step that ends one epoch and begins the next may hold a row twice: counted."""
    keys = [tuple(own.get(key) for key in ("task", "prompt_index", "sample_index", "prompt_text")) for own in rollouts]
    before = defaultdict[tuple[Any, ...], Iterator[int]](count)
    return [(*key, next(before[key])) for key in keys]


def _parting(one: Row, other: Row) -> int | None:
    """The first position in which two completions differ, or None for equal ones."""
    key = "completion_ids" if one.get("completion_ids") and other.get("completion_ids") else "completion_tokens"
    a, b = list(one.get(key) or []), list(other.get(key) or [])
    if a == b:
        return None
    return next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))


def _rollouts(units: Sequence[CreditUnit]) -> dict[str, Any]:
    """What the page says of each rollout besides its tokens; equal prompts are written once."""
    prompts: dict[str, int] = {}
    rows = []
    steps = {rollout.get("step") for unit in units for rollout in unit.rollouts}
    for number, unit in enumerate(units):
        for rollout, label in zip(unit.rollouts, unit.labels or ("",) * len(unit.rollouts), strict=True):
            kls = [kl for kl in reverse_kl(rollout) if kl is not None and math.isfinite(kl)]
            reward = page.finite_number(rollout.get("reward"))
            rows.append(
                {
                    "unit": number,
                    "label": label or _sample(rollout, with_step=len(steps) > 1),
                    "heading": page.prompt_heading(rollout),
                    "prompt": prompts.setdefault(json.dumps(_known(rollout, _PROMPT)), len(prompts)),
                    "kl": round(sum(kls) / len(kls), 5) if kls else None,
                    "reward": None if reward is None else round(reward, 5),
                    "finish": rollout.get("finish_reason"),
                    "record": _known(rollout, _EXPORTED),
                }
            )
    return {"prompts": [json.loads(prompt) for prompt in prompts], "rollouts": rows}


def _known(rollout: Row, keys: Sequence[str]) -> dict[str, Any]:
    return {key: rollout[key] for key in keys if rollout.get(key) is not None}


def _sample(rollout: Row, *, with_step: bool) -> str:
    """Which of a prompt's completions this is, and of which step where the page has several."""
    fields = ("step", "sample") if with_step else ("sample",)
    keys = {"step": "step", "sample": "sample_index"}
    return ", ".join(f"{name} {rollout[keys[name]]}" for name in fields if isinstance(rollout.get(keys[name]), int))


def _charts(units: Sequence[CreditUnit]) -> list[Markup]:
    """Mean reverse KL at each position, a line per label."""
    groups: dict[str, list[list[float | None]]] = {}
    for unit in units:
        for rollout, label in zip(unit.rollouts, unit.labels or ("",) * len(unit.rollouts), strict=True):
            groups.setdefault(label, []).append(reverse_kl(rollout))
    lines = [position_curve(kls, label or "all rollouts") for label, kls in groups.items()]
    if not any(line.points for line in lines):
        return []
    svg = line_chart(
        [line for line in lines if line.points],
        title="Mean reverse KL by position",
        x_label="position in the completion",
        y_label="nats per token",
    )
    return [Markup(svg)]


def position_curve(kls: Sequence[Sequence[float | None]], name: str) -> Series:
    """Mean and standard error at each position over the rollouts that reach it with a finite value.

    >>> position_curve([[1.0, 3.0], [2.0]], "a").points
    [(0.0, 1.5), (1.0, 3.0)]
    """
    points: list[tuple[float, float]] = []
    errors: list[float | None] = []
    for position in range(max(map(len, kls), default=0)):
        values = [own[position] for own in kls if len(own) > position]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        if finite:
            mean = sum(finite) / len(finite)
            points.append((float(position), mean))
            spread = sum((value - mean) ** 2 for value in finite)
            errors.append(math.sqrt(spread / (len(finite) - 1) / len(finite)) if len(finite) > 1 else None)
    return Series(name, points, errors)


def counted(rollouts: Sequence[Row]) -> str:
    """How much there is, in a line: rollouts, tokens, mean reverse KL."""
    kls = [kl for rollout in rollouts for kl in reverse_kl(rollout) if kl is not None and math.isfinite(kl)]
    tokens = sum(len(reverse_kl(rollout)) for rollout in rollouts)
    mean = f", reverse KL {formatting.number(sum(kls) / len(kls))} nats per token on average" if kls else ""
    return f"{formatting.number(len(rollouts))} rollouts, {formatting.number(tokens)} tokens{mean}."

"""The building blocks that both pages share: templates, tables, rollout cards and curves from metric rows."""

from __future__ import annotations

import math
import re
import sys
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from understudy.report import formatting
from understudy.report.charts import Series
from understudy.report.credit_data import reverse_kl
from understudy.report.tokens import LEVELS, token_spans

Row = Mapping[str, Any]

# Round clip values for the colour scale; the page states the one it uses.
SCALES = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
# A card longer than this is no longer read; long reasoning would otherwise make the file huge.
MAX_TOKENS_SHOWN = 1024

_NUMERIC = re.compile(r"^[−+-]?[\d.,]+([×\d.⁰¹²³⁴⁵⁶⁷⁸⁹⁻]*)(\s*(%|[kMGTPEZY]?FLOP|s|min|h|±|×|[\d.,]+))*$|^[–—-]?$")


@dataclass(frozen=True)
class Grid:
    """A table: ordered columns, rows by column name, and the columns to align as numbers."""

    columns: tuple[str, ...]
    rows: tuple[Mapping[str, str], ...]
    numeric: frozenset[str]


@dataclass(frozen=True)
class Headline:
    """One number in large type."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class RolloutCard:
    """One completion with its coloured tokens and a line of facts. ``anchor``: where links to it lead."""

    heading: str
    facts: tuple[str, ...]
    tokens: Markup
    anchor: str = ""


@dataclass(frozen=True)
class RolloutGroup:
    """Completions of one prompt, side by side."""

    heading: str
    prompt: str
    cards: tuple[RolloutCard, ...]


def write_page(
    template: str, out: Path, context: Mapping[str, Any], *, scripts: Sequence[str] = ("tokens", "charts")
) -> Path:
    """Render ``template`` to one self-contained file; every value that is not markup is escaped.

    ``scripts`` run in this order at the end of the page, and by its policy no other does.
    """
    environment = Environment(
        loader=PackageLoader("understudy.report", "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["paragraphs"] = paragraphs
    sources = [environment.get_template(f"{name}.js").render() for name in scripts]
    # The page's policy allows these by their hashes: markup that came in with a text could not run any other.
    hashes = [f"'sha256-{b64encode(sha256(source.encode()).digest()).decode()}'" for source in sources]
    allowed = [Markup(source) for source in sources]
    html = environment.get_template(template).render(
        levels=LEVELS, scripts=allowed, script_hashes=Markup(" ".join(hashes)), **context
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    # Half of a surrogate pair, which a stored text may hold, has no form in UTF-8.
    out.write_text(html, encoding="utf-8", errors="xmlcharrefreplace")
    return out


def paragraphs(text: str) -> list[str]:
    """Blocks separated by blank lines; markup stays markup."""
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def grid(rows: Sequence[Mapping[str, str]]) -> Grid | None:
    """A table over the union of the rows' keys, in order of appearance; a missing cell is a dash."""
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return None
    filled = tuple({column: str(row.get(column, "–")) for column in columns} for row in rows)
    numeric = frozenset(column for column in columns[1:] if all(_NUMERIC.match(row[column]) for row in filled))
    return Grid(columns, filled, numeric)


def finite_number(value: object) -> float | None:
    """``value`` as a float if it is a finite number that a float holds, else ``None``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)


def points(rows: Iterable[Row], key: str, x_key: str = "step") -> list[tuple[float, float]]:
    """(x, y) of the rows that hold ``key``; NaN stays, so that a chart can say that it was there."""
    return [
        (_drawn(row[x_key]), _drawn(row[key]))
        for row in rows
        if isinstance(row.get(key), int | float) and isinstance(row.get(x_key), int | float)
    ]


def _drawn(value: float) -> float:
    """Without magnitudes that no axis has, and whose differences and quotients no float holds."""
    if abs(value) > 1e100:
        return math.inf if value > 0 else -math.inf
    return float(value) if abs(value) > 1e-100 or math.isnan(value) else 0.0


def series(rows: Sequence[Row], key: str, name: str, *, error_key: str = "", x_key: str = "step") -> Series:
    """A chart series of one metric, with its standard errors if ``error_key`` is given."""
    kept = [row for row in rows if isinstance(row.get(key), int | float) and isinstance(row.get(x_key), int | float)]
    errors = [finite_number(row.get(error_key)) for row in kept] if error_key else None
    return Series(name, points(kept, key, x_key), errors)


# Means as an evaluation names them, without their standard errors and the shares beside them.
_EVALUATION = re.compile(r"eval/(.+)/(greedy|t[\d.]+(?:e[+-]?\d+)?)")


def evaluations(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Tasks with their decodings, both in order of appearance.

    >>> evaluations([{"step": 0, "eval/ledger/t1": 0.5, "eval/ledger/t1_se": 0.1}])
    {'ledger': ['t1']}
    """
    found: dict[str, dict[str, None]] = {}
    for match in (_EVALUATION.fullmatch(key) for row in rows for key in row):
        if match:
            found.setdefault(match[1], {})[match[2]] = None
    return {task: list(names) for task, names in found.items()}


def evaluation_metrics(rows: Iterable[Row]) -> list[str]:
    """``eval/<task>/<decoding>`` of all tasks, a task's decodings side by side."""
    return [f"eval/{task}/{name}" for task, names in evaluations(rows).items() for name in names]


def decoding_words(decoding: str) -> str:
    """``greedy``; ``t0.6`` -> ``T = 0.6``."""
    return re.sub(r"^t(?=[0-9])", "T = ", decoding)


def metric_words(metric: str) -> str:
    """``eval/facts/t1`` -> ``facts, T = 1``."""
    task, _, decoding = metric.removeprefix("eval/").rpartition("/")
    return f"{task}, {decoding_words(decoding)}" if task else metric


def choose_scale(rollouts: Iterable[Row]) -> float:
    """The colour scale's clip: above 95 % of the |reverse KL|, so that outliers do not bleach the rest."""
    sizes = sorted(
        abs(kl) for rollout in rollouts for kl in reverse_kl(rollout) if kl is not None and math.isfinite(kl)
    )
    if not sizes:
        return 2.0
    high = sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))]
    return next((scale for scale in SCALES if scale >= high), SCALES[-1])


def rollout_card(
    rollout: Row, heading: str, *, scale: float, notes: Mapping[int, str] | None = None, anchor: str = ""
) -> RolloutCard:
    """One stored rollout as a card."""
    tokens = token_spans(rollout, scale=scale, notes=notes or {}, max_tokens=MAX_TOKENS_SHOWN)
    return RolloutCard(heading, _facts(rollout), tokens, anchor)


def prompt_heading(rollout: Row) -> str:
    """Which prompt, of which task, and the expected answer if there is one."""
    parts = [f"Prompt {rollout.get('prompt_index', '?')}"]
    if rollout.get("task") not in {None, "default"}:
        parts.append(f"task {rollout['task']}")
    if rollout.get("answer") is not None:
        parts.append(f"expected answer {rollout['answer']}")
    return ", ".join(parts)


def _facts(rollout: Row) -> tuple[str, ...]:
    facts = []
    kls = [kl for kl in reverse_kl(rollout) if kl is not None]
    facts.append(f"{len(rollout.get('completion_ids') or []):,} tokens")
    if kls:
        facts.append(f"reverse KL {formatting.number(sum(kls) / len(kls))} nats per token")
    if rollout.get("reward") is not None:
        facts.append(f"reward {formatting.number(float(rollout['reward']))}")
    if rollout.get("finish_reason") == "length":
        facts.append("cut at the length cap")
    return tuple(facts)

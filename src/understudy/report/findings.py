"""What the doctor and the guards found in a run: places on the axis of its steps, and lines of a table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from understudy.report import formatting, page
from understudy.report.charts import Mark
from understudy.report.page import Row
from understudy.report.run_data import RunData, rollouts_step

# Rollouts that the findings of a run show.
MOST_ROLLOUTS = 9

Place = tuple[int, int]


@dataclass(frozen=True)
class Link:
    """Words, and the rollout that they lead to; ``None``: it is not on the page."""

    words: str
    place: Place | None = None

    @property
    def target(self) -> str:
        """Its id."""
        return anchor(self.place) if self.place else ""


@dataclass(frozen=True)
class Event:
    """One finding. ``number`` names it on the curves; ``name``: the check or guard, with what it did."""

    number: int
    step: float
    source: Literal["doctor", "guard"]
    name: str
    words: str
    advice: str
    links: tuple[Link, ...]

    @property
    def when(self) -> str:
        """A guard speaks of a step's update, the doctor of what came before the next."""
        return formatting.number(self.step) if self.source == "guard" else f"before {formatting.number(self.step + 1)}"

    @property
    def mark(self) -> Mark:
        """On the axis of steps."""
        return Mark(self.step, str(self.number), f"{self.source} {self.name}: {self.words}", self.source)


class _Found(NamedTuple):
    step: float
    source: Literal["doctor", "guard"]
    row: Row


def anchor(place: Place) -> str:
    """The id of a rollout on its page: stored step, and number in its file."""
    return f"rollout-{place[0]}-{place[1]}"


def run_events(run: RunData) -> list[Event]:
    """Warnings of the doctor and alarms of the guards, by step; those of one step in the order in which they came."""
    found = [_Found(_step(row), "doctor", row) for row in run.doctor if row.get("level") != "pass"]
    found += [_Found(_step(row), "guard", row) for row in run.alarms]
    found.sort(key=lambda one: (one.step, one.source))
    return [_event(number, one, run) for number, one in enumerate(found, 1)]


def reached(events: Sequence[Event], run: RunData) -> list[Place]:
    """Rollouts that findings lead to, and that are stored; the first ones."""
    places = dict.fromkeys(link.place for event in events for link in event.links)
    return [place for place in places if place and place[1] < len(run.rollouts.get(place[0], ()))][:MOST_ROLLOUTS]


def link_events(events: Sequence[Event], shown: Collection[Place]) -> list[Event]:
    """``events`` without links to what is not on the page."""

    def kept(link: Link) -> Link:
        return link if link.place in shown else Link(link.words)

    return [replace(event, links=tuple(kept(link) for link in event.links)) for event in events]


def doctor_summary(run: RunData) -> str:
    """How many checks there were before the run; empty where that is not known."""
    if not run.doctor:
        return ""
    passed = sum(row.get("level") == "pass" for row in run.doctor)
    starts = len({row.get("step") for row in run.doctor})
    times = f" at {starts} starts" if starts > 1 else " before the run"
    return f"The doctor's checks{times}: {passed} passed, {len(run.doctor) - passed} warned."


def _event(number: int, found: _Found, run: RunData) -> Event:
    step, source, row = found
    if source == "doctor":
        words = str(row.get("evidence", "")).partition("\n")[0]
        first = run.over_time[0] if run.over_time else None
        links = () if first is None else (Link(f"what the student wrote at step {first}", (first, 0)),)
        return Event(number, step, source, str(row.get("check", "?")), words, str(row.get("remedy", "")), links)
    name = f"{row.get('guard', '?')} ({row.get('action', '?')})"
    places = [_link(place) for place in row.get("rollouts") or ()]
    nearest = min(run.rollouts, key=lambda stored: abs(stored + 1 - step), default=None)
    if nearest is not None and not any(link.place for link in places):  # none in particular, or none that is stored
        places.append(Link(f"what the student wrote at step {nearest}", (nearest, 0)))
    advice = f"Likely: {row['causes']}" if row.get("causes") else ""
    return Event(number, step, source, name, str(row.get("words", "")), advice, tuple(places))


def _link(place: Mapping[str, Any]) -> Link:
    stored = f", {place['file']} number {place.get('index')}" if place.get("file") else ", not stored"
    words = f"prompt {place.get('prompt_index')}{stored}"
    return Link(words, _place(place))


def _place(place: Mapping[str, Any]) -> Place | None:
    step, index = rollouts_step(place.get("file")), page.finite_number(place.get("index"))
    return None if step is None or index is None or index < 0 else (step, int(index))


def _step(row: Row) -> float:
    return page.finite_number(row.get("step")) or 0.0

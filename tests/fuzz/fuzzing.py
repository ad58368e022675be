"""What the fuzz tests share: a case's outcome, its limit on time, and counts that the long form writes down.

Each surface has a short form in the default suite, the same cases every time, and a long one (`make test-fuzz`) that
draws new ones from the seed in UNDERSTUDY_FUZZ_SEED and puts its counts into the file in UNDERSTUDY_FUZZ_RESULTS.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from understudy.errors import ConfigError, RunError
from understudy.time_limit import TimeIsUp, time_limit

# A case takes milliseconds, one that trains a second or two on a busy machine: many times that is a hang.
CASE_SECONDS = 60.0
SEED = int(os.environ.get("UNDERSTUDY_FUZZ_SEED", "0"))
SCALE = float(os.environ.get("UNDERSTUDY_FUZZ_SCALE", "1"))  # of the long form's numbers of cases
RESULTS = ("cases", "accepted", "refused", "stopped")
ROOT = Path(__file__).resolve().parents[2]
COUNTS, PAGE = ROOT / "benchmarks" / "results" / "fuzz.json", ROOT / "docs" / "safety.md"
BEGIN, END = "<!-- counts: python tests/fuzz/fuzzing.py -->", "<!-- end of counts -->"

# What text fields get that nobody meant: other planes, directions, halves, escapes, and code in other languages.
TEXTS = (
    "",
    " ",
    "\t\n",
    "a" * 300,
    "é\u0301\u202e\u2028\ufeff",
    "\U0001f600" * 3,
    "\x1b[31m\x07",
    "../../etc/passwd",
    "~/x",
    "C:\\x",
    "http://user:pass@host/v1",
    "{prompt}",
    "{{ 7 * 7 }}",
    "<script>alert(1)</script>",
    "'; drop table rows; --",
    "@previous",
    "no_such_module:f",
    "json:dumps",
    "nan",
    "1e999",
    "auto",
    "meta",
    "cuda:7",
    "float8",
    "none",
)
NUMBERS = (0, -1, 1, 2, 3, 2**31, 2**63 - 1, 2**63, 10**40, -(2**70), 0.5, -0.5, 1e-300, 5e-324, 1e308, -0.0)
SPECIAL_NUMBERS = (float("nan"), float("inf"), float("-inf"))


@dataclass
class Tally:
    """Of one surface. ``refused``: by ConfigError; ``stopped``: by RunError."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    stopped: int = 0
    slowest_seconds: float = 0.0
    notes: dict[str, int] = field(default_factory=dict)


TALLIES: dict[str, Tally] = {}


def outcome(surface: str, call: Callable[[], Any]) -> str:
    """What became of a case: "accepted", "refused", "stopped". Any other exception, and a case without an end, is the
    test's failure."""
    begun = time.monotonic()
    faulthandler.dump_traceback_later(4 * CASE_SECONDS, exit=True)  # for what holds the interpreter itself
    try:
        with time_limit(CASE_SECONDS):
            call()
        result = "accepted"
    except ConfigError as error:
        check_message(error)
        result = "refused"
    except RunError as error:
        check_words(str(error))
        result = "stopped"
    except TimeIsUp:
        raise AssertionError(f"no end after {CASE_SECONDS} seconds") from None
    finally:
        faulthandler.cancel_dump_traceback_later()
    count(surface, result, time.monotonic() - begun)
    return result


def count(surface: str, result: str, seconds: float) -> None:
    tally = TALLIES.setdefault(surface, Tally())
    tally.cases += 1
    setattr(tally, result, getattr(tally, result) + 1)
    tally.slowest_seconds = max(tally.slowest_seconds, round(seconds, 3))


def note(surface: str, name: str) -> None:
    """Count something else about a case."""
    notes = TALLIES.setdefault(surface, Tally()).notes
    notes[name] = notes.get(name, 0) + 1


def check_words(text: str) -> None:
    assert text.strip()
    assert "Traceback" not in text


def check_message(error: ConfigError) -> None:
    """An error says where, what was got, what was expected and what to do, in words that fit a screen."""
    for name in ("where", "got", "expected", "remedy"):
        text = getattr(error, name)
        assert isinstance(text, str), name
        check_words(text)
    assert len(str(error)) < 6000
    assert error.exit_code == 2


def fuzz(strategy: st.SearchStrategy[Any], body: Callable[[Any], None], cases: int, *, long: bool) -> None:
    """``body`` of ``cases`` values; the same ones each time in the short form."""
    shape = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=not long,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )

    @shape
    @given(strategy)
    def run(case: Any) -> None:
        body(case)

    (seed(SEED)(run) if long else run)()


def forms(short: int, long: int) -> Any:
    """Parameters (cases, long) of a test: a short form, and a slow one."""
    long = max(1, int(long * SCALE))
    return pytest.mark.parametrize(
        ("cases", "long"),
        [pytest.param(short, False, id="short"), pytest.param(long, True, id="long", marks=pytest.mark.slow)],
    )


def broken_bytes(data: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Files as disks, downloads and editors leave them: cut, flipped, in another encoding, with something put in."""
    place = st.floats(0, 1)
    put_in = st.sampled_from(
        [
            *(
                b"\0",
                b"\xff\xfe",
                b"\xef\xbb\xbf",
                b"\r",
                b"\xc3",
                b'"',
                b"'''",
                b"[",
                b"]",
                b"=",
                b"\n",
                b"#",
                b"\x1b",
            ),
            *(b"{" * 50, b"[" * 20_000, b"\\ud800", b"\xed\xa0\x80", b"1" * 5000, b"a." * 200),
        ]
    )
    return st.one_of(
        st.tuples(data, place).map(lambda t: t[0][: int(t[1] * len(t[0]))]),
        st.tuples(data, place, put_in).map(lambda t: _inserted(*t)),
        st.tuples(data, st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=8)).map(
            lambda t: _flipped(*t)
        ),
        st.tuples(data, place, place).map(lambda t: t[0][int(t[1] * len(t[0])) :] + t[0][: int(t[2] * len(t[0]))]),
        st.tuples(data, st.sampled_from(["utf-16", "utf-32", "latin-1", "utf-7", "cp500"])).map(
            lambda t: t[0].decode("utf-8", "replace").encode(t[1], "replace")
        ),
        data.map(lambda b: b"\xef\xbb\xbf" + b),
        data.map(lambda b: b.replace(b"\n", b"\r\n")),
        data.map(lambda b: b + b),
        st.binary(max_size=200),
    )


def _inserted(data: bytes, place: float, text: bytes) -> bytes:
    at = int(place * len(data))
    return data[:at] + text + data[at:]


def _flipped(data: bytes, flips: list[tuple[float, int]]) -> bytes:
    changed = bytearray(data)
    for place, mask in flips:
        if changed:
            changed[min(int(place * len(changed)), len(changed) - 1)] ^= mask
    return bytes(changed)


def write_results(path: Path) -> None:
    """The counts of a long form in which everything passed; a surface's own newest replace its earlier ones."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"surfaces": {}}
    for surface, tally in TALLIES.items():
        stored["surfaces"][surface] = {**asdict(tally), "seed": SEED, "scale": SCALE}
    stored["surfaces"] = dict(sorted(stored["surfaces"].items()))
    stored["total"] = {name: sum(one[name] for one in stored["surfaces"].values()) for name in RESULTS}
    # Each of these fails its test, and then nothing is written down.
    stored["found"] = dict.fromkeys(("tracebacks", "hangs", "messages without their parts"), 0)
    stored["case_seconds"] = CASE_SECONDS
    stored["command"] = f"UNDERSTUDY_FUZZ_SCALE={SCALE:g} make test-fuzz SEED={SEED}"
    names = ("understudy", "hypothesis", "torch", "transformers", "safetensors", "datasets", "pyarrow")
    stored["made_with"] = {"python": platform.python_version(), **{name: version(name) for name in names}}
    path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def table(results: Mapping[str, Any]) -> str:
    """The counts for docs/safety.md."""
    rows = [*results["surfaces"].items(), ("**all**", results["total"])]
    lines = [f"| {name} | {' | '.join(f'{one[key]:,}' for key in RESULTS)} |" for name, one in rows]
    return "\n".join(["| what was broken | cases | accepted | refused | stopped |", "|---|--:|--:|--:|--:|", *lines])


def render() -> None:
    """Put the table of the committed counts into docs/safety.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    counts = json.loads(COUNTS.read_text(encoding="utf-8"))
    PAGE.write_text(f"{before}{BEGIN}\n{table(counts)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    render()

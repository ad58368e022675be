"""What docs/safety.md says of fuzzing is what the committed counts say."""

from __future__ import annotations

import json

from fuzzing import BEGIN, COUNTS, END, PAGE, RESULTS, table

FOUND = json.loads(COUNTS.read_text(encoding="utf-8"))


def test_the_page_shows_the_counts() -> None:
    page = PAGE.read_text(encoding="utf-8")
    shown = page.partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == table(FOUND), "run `python tests/fuzz/fuzzing.py`"


def test_every_surface_was_tried_by_the_thousands_in_all() -> None:
    assert FOUND["total"]["cases"] >= 20_000
    kinds = {name.partition(":")[0] for name in FOUND["surfaces"]}
    assert kinds >= {"chat templates", "commands", "configurations", "doctor", "folders", "reports", "rows"}
    for name, one in FOUND["surfaces"].items():
        assert one["cases"] == one["accepted"] + one["refused"] + one["stopped"], name
        assert one["slowest_seconds"] < FOUND["case_seconds"], name
    assert FOUND["total"] == {key: sum(one[key] for one in FOUND["surfaces"].values()) for key in RESULTS}
    assert set(FOUND["found"].values()) == {0}

"""What the assistant's instructions must not share. Nothing is trained here."""

from __future__ import annotations

import json
from pathlib import Path

from understudy.experiments.assistant_bench import (
    CHATS_SEED,
    TEST_SEED,
    TRAIN_SEED,
    AssistantBench,
    drawn_apart,
    requests,
)
from understudy.experiments.cache import Cache
from understudy.experiments.lab import Lab
from understudy.experiments.worlds import SCALES
from understudy.worlds import assistant


def asked(path: Path) -> set[str]:
    return requests([json.loads(line) for line in path.read_text().splitlines()])


def test_no_training_shows_a_held_out_instruction(tmp_path: Path) -> None:
    bench = AssistantBench(Lab(Cache(tmp_path), SCALES["cpu"], 3))
    test, validation = asked(bench.test), asked(bench.validation)
    first = requests(assistant.stage0_rows(1500, 104, 104))
    trained = first | asked(bench.prompts(6400)) | asked(bench._instructions(512, CHATS_SEED))
    assert not test & validation
    assert not (test | validation) & trained
    # Drawn without care, some are in both: a twelfth of what is drawn is one instruction on two words, 12,800 in all.
    assert requests(assistant.instruction_rows(1000, TEST_SEED + 3)) & first
    assert len(bench.test.read_text().splitlines()) == 1000


def test_drawn_apart_leaves_out_and_goes_on() -> None:
    rows = assistant.instruction_rows(5, TRAIN_SEED)
    others = requests(rows[1:3])
    assert drawn_apart(3, TRAIN_SEED, others) == [rows[0], rows[3], rows[4]]
    assert drawn_apart(2, TRAIN_SEED, others) == [rows[0], rows[3]]


def test_no_pipeline_has_the_demos_facts(tmp_path: Path) -> None:
    benches = [AssistantBench(Lab(Cache(tmp_path), SCALES["cpu"], pipeline)) for pipeline in (0, 1)]
    assert [bench.fact_seed for bench in benches] == [101, 102]
    everyone = [assistant.known_facts("new"), *(bench.facts("new") for bench in benches)]
    assert len(set(map(tuple, everyone))) == 3

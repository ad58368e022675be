"""The demos in full: do they still show what the README says? `make test-slow`, about six minutes on two cores."""

from __future__ import annotations

import pytest

from understudy.worlds import assistant_demo, ledger_demo, ledger_page

pytestmark = pytest.mark.slow


def test_ledger_demo_shows_distillation_ahead(tmp_path):
    jobs, _ = ledger_demo.run_demo(tmp_path)
    assert [job.name for job in jobs if (job.folder / "guards.jsonl").exists()] == []
    found = {outcome.name: outcome for outcome in ledger_page.outcomes(jobs)}
    t1 = {name: outcome.t1[0] for name, outcome in found.items()}
    assert t1["distill-full"] > t1["distill-sampled"] > t1["sft"] + 0.1
    assert t1["distill-full"] > 0.80
    assert found["distill-full"].to_target is not None
    assert found["distill-full"].to_target[0] == 25
    assert found["sft"].to_target is None
    penalties = ledger_page.false_step_penalties(tmp_path / "distill-full")
    assert penalties["false"] > 10
    assert abs(penalties["inherited"]) < 0.5
    assert abs(penalties["right"]) < 0.5


def test_assistant_demo_restores_behaviour_and_keeps_facts(tmp_path):
    jobs, _ = assistant_demo.run_demo(tmp_path)
    assert [job.name for job in jobs if (job.folder / "guards.jsonl").exists()] == []
    last = {job.name: job.rows()[-1] for job in jobs if job.num_steps}
    instructions = {name: row["eval/instructions/greedy"] for name, row in last.items()}
    new_facts = {name: row["eval/new_facts/greedy"] for name, row in last.items()}
    assert instructions["assistant"] > 0.95
    assert instructions["midtrained"] < 0.35
    assert instructions["distill"] > 0.93
    assert new_facts["midtrained"] > new_facts["assistant"] + 0.15
    assert new_facts["distill"] > new_facts["midtrained"] - 0.10

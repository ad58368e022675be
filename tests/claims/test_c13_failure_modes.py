import pytest

from understudy.experiments.alarms import first_outside
from understudy.experiments.claims.c13_failure_modes import MODES, RECORDED, TEMPLATES, analyse

STEPS = range(1, 11)


def run(final: float = 0.8, *, kl: float = 1.0, since: int = 1) -> dict:
    """Accuracy 0.3 at the start and ``final`` from step 5 on; the reverse KL is 1 and from step ``since`` on ``kl``."""
    metrics = {name: [[step, 0.0] for step in STEPS] for name in RECORDED}
    metrics["reverse_kl/mean"] = [[step, kl if step >= since else 1.0] for step in STEPS]
    return {"accuracy": [[0, 0.3], [5, final], [10, final]], "metrics": metrics, "broke_off": None}


def records(healthy: list[dict] | None = None, **faulty: dict) -> list[dict]:
    """Five pipelines; modes that are not named run as the healthy ones."""
    named = {name.replace("_", "-"): value for name, value in faulty.items()}
    refused = dict.fromkeys(MODES) | {"eos": "got one token; expected another"}
    return [
        {"refused": refused, "runs": {"healthy": own} | {mode: named.get(mode, run()) for mode in MODES}}
        for own in healthy or [run()] * 5
    ]


def test_it_holds_where_every_harmful_mode_is_shown_before_accuracy_collapses() -> None:
    # The reverse KL leaves at step 3, the alarm is raised at 4, and accuracy is below the start's at 5.
    finding = analyse(records(eos=run(0.1, kl=2.0, since=3), k1_loss=run(0.4, kl=0.5, since=9)))
    assert finding.verdict == "holds"
    assert finding.numbers["harmful"] == ["eos", "k1-loss"]
    assert finding.numbers["harm"]["eos"].mean == pytest.approx(-0.7)
    assert finding.numbers["in_time"]["eos"] == 5
    # The last evaluation before the collapse is the start's. Without a collapse every alarm will do.
    assert finding.numbers["in_time, strictly"]["eos"] == 0
    assert finding.numbers["in_time, strictly"]["k1-loss"] == 5
    assert finding.numbers["refused"] == ["eos"]
    table = {row["arm"]: row for row in finding.table}
    assert table["eos"]["collapse at step"] == "5, 5, 5, 5, 5"
    assert table["eos"]["alarm at step"] == "4, 4, 4, 4, 4"
    assert table["k1-loss"]["collapse at step"].startswith("never")
    assert table["k1-loss"]["alarm at step"].startswith("10")
    assert table["eos"]["first of all metrics"] == "reverse_kl/mean (4)"
    assert table["no-arrow"]["first of all metrics"] == "–"


def test_more_than_half_of_the_harmful_modes_is_the_direction() -> None:
    # An alarm at the step of the collapse is too late.
    late = {"eos": run(0.1, kl=2.0, since=4)}
    shown = {"k1_loss": run(0.1, kl=2.0), "no_arrow": run(0.4, kl=2.0)}
    finding = analyse(records(**late, **shown))
    assert finding.verdict == "direction only"
    assert finding.numbers["harmful"] == ["eos", "no-arrow", "k1-loss"]
    assert finding.numbers["caught"] == ["no-arrow", "k1-loss"]


def test_half_of_them_is_not_enough_and_nor_is_a_fault_without_harm() -> None:
    finding = analyse(records(eos=run(0.1), k1_loss=run(0.1, kl=2.0)))
    assert finding.verdict == "does not hold here"
    assert analyse(records()).verdict == "does not hold here"


def test_one_false_alarm_in_five_is_allowed_and_two_are_not() -> None:
    caught = {"eos": run(0.1, kl=90.0)}
    # Against four runs at 1, one at 5 is outside; against [1, 5], widened by 4, one at 1 is not.
    one = analyse(records([run(), run(), run(), run(), run(kl=5.0)], **caught))
    assert one.numbers["false_alarms"] == 1
    assert one.verdict == "holds"
    other = run()
    other["metrics"]["truncated/share"] = [[step, 0.2] for step in STEPS]
    two = analyse(records([run(), run(), run(), other, run(kl=5.0)], **caught))
    assert two.numbers["false_alarms"] == 2
    assert two.numbers["caught"] == ["eos"]
    assert two.verdict == "does not hold here"


def test_the_band_is_widened_by_its_own_width_and_needs_two_steps_in_a_row() -> None:
    healthy = [[[1, 1.0], [2, 1.0], [3, 1.0], [4, 1.0]], [[1, 1.5], [2, 1.5], [3, 1.5], [4, 1.5]]]
    assert first_outside([[1, 2.0], [2, 2.0], [3, 2.0], [4, 2.0]], healthy) is None  # up to 1.5 + 0.5
    assert first_outside([[1, 2.1], [2, 2.0], [3, 0.4], [4, 0.4]], healthy) == 4
    assert first_outside([[1, 2.1], [2, 0.4], [3, 1.0], [4, 1.0]], healthy) == 2  # outside on either side
    # A band of no width is widened by 0.05.
    assert first_outside([[1, 1.04], [2, 1.04], [3, 1.06], [4, 1.06]], [healthy[0]]) == 4


def broken(step: int, **options: float) -> dict:
    """``run``, which died in ``step``."""
    whole = run(**options)
    metrics = {name: curve[: step - 1] for name, curve in whole["metrics"].items()}
    return {"accuracy": [pair for pair in whole["accuracy"] if pair[0] < step], "metrics": metrics, "broke_off": step}


def test_a_run_that_broke_off_collapsed_in_that_step_and_has_no_accuracy() -> None:
    # The alarm is raised at step 4; accuracy is 0.4 at step 5 and the run dies in step 8.
    finding = analyse(records(flipped_sign=broken(8, final=0.4, kl=2.0, since=3)))
    assert finding.verdict == "holds"
    assert finding.numbers["harm"]["flipped-sign"].mean == pytest.approx(-0.8)
    assert finding.numbers["in_time, strictly"]["flipped-sign"] == 5
    assert finding.numbers["broke_off"]["flipped-sign"] == 5
    assert "flipped-sign 5 of 5" in finding.text
    row = {row["arm"]: row for row in finding.table}["flipped-sign"]
    assert row["collapse at step"] == "8, 8, 8, 8, 8"
    assert row["accuracy"] == "0.000"
    # An earlier fall comes first; one step is too few for an alarm.
    assert analyse(records(eos=broken(8, final=0.1))).table[1]["collapse at step"] == "5, 5, 5, 5, 5"
    assert analyse(records(eos=broken(2, kl=2.0))).numbers["in_time"]["eos"] == 0


def test_one_pipeline_alone_has_no_band() -> None:
    finding = analyse(records()[:1])
    assert finding.verdict == "does not hold here"
    assert finding.numbers["false_alarms"] == 0


def test_what_the_teacher_reads() -> None:
    assert TEMPLATES["no-arrow"]("4 | a op1 =>") == "4 | a op1"
    assert TEMPLATES["foreign-prefix"]("4 | a op1 =>") == "=> | => 4 | a op1 =>"

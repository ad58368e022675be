import pytest

from understudy.evaluation import Outcome
from understudy.experiments.claims.c11_support import ARMS, LADDER, analyse, neighbours, operation_shares
from understudy.experiments.search import searched
from understudy.worlds.ledger import Ledger


def operations(unseen: float | None, seen: float = 0.9) -> dict:
    shares = {
        "unseen": {"right": [unseen, 100 if unseen is not None else 0], "copied": [0.5, 100]},
        "seen": {"right": [seen, 900], "copied": [1.0, 900]},
    }
    whole = {"t1": 0.5, "greedy": 0.6, "recovery": 0.7, "facts": 0.8}
    return {**whole, "shares": shares, "greedy_shares": shares, "with_unseen": [0.4, 5], "without_unseen": [None, 0]}


def record(
    *,
    distill: float = 0.12,
    sft: float = 0.5,
    start_seen: float = 0.8,
    without: float | None = 0.01,
    habit: float = 0.8,
) -> dict:
    def recovered(before: float | None, after: float | None) -> dict:
        return {
            name: {"t1": 0.3, "greedy": 0.3, "recovery": value, "facts": 0.9}
            for name, value in {"start": before, "distill": after}.items()
        }

    arms = dict.fromkeys(ARMS, operations(0.3)) | {"distill": operations(distill), "sft": operations(sft)}
    return {
        "operations": {"start": operations(0.1, start_seen), "teacher": operations(1.0, 1.0), **arms},
        "habit": {"ordinary": recovered(0.1, habit), "without": recovered(None, without)},
    }


def test_it_holds_where_distillation_stalls_twice_and_sft_learns() -> None:
    finding = analyse([record(distill=0.11), record(distill=0.12), record(distill=0.13)])
    assert finding.verdict == "holds"
    numbers = finding.numbers
    assert numbers["sft - distill, unseen"].mean == pytest.approx(0.38)
    assert numbers["distill - start, unseen"].mean == pytest.approx(0.02)
    assert numbers["distill - start, seen"].mean == pytest.approx(0.1)
    assert numbers["recovery, ordinary - without"].mean == pytest.approx(0.79)
    # Standard deviation 0.01 of three values, t = 4.303.
    assert numbers["unseen, distill"].high == pytest.approx(0.12 + 4.303 * 0.01 / 3**0.5, abs=1e-4)


@pytest.mark.parametrize("change", [{"distill": 0.3}, {"without": 0.4}, {"habit": 0.01}])
def test_lagging_alone_is_the_direction(change: dict[str, float]) -> None:
    """Distillation above chance; a habit learned without support; a habit not learned with support either."""
    finding = analyse([record(**change)] * 3)
    assert finding.verdict == "direction only"


@pytest.mark.parametrize("change", [{"sft": 0.12}, {"sft": 0.05}, {"start_seen": 0.9}])
def test_it_does_not_hold_where_sft_does_not_lead_or_distillation_teaches_nothing(change: dict[str, float]) -> None:
    finding = analyse([record(**change)] * 3)
    assert finding.verdict == "does not hold here"


def test_nothing_is_judged_where_sft_learns_no_unseen_operation() -> None:
    """SFT stays at the start's 0.1 and leads by 0.08 all the same."""
    finding = analyse([record(distill=0.02, sft=0.1)] * 3)
    assert finding.numbers["sft - start, unseen"].mean == 0
    assert finding.numbers["sft - distill, unseen"].low == pytest.approx(0.08)
    assert finding.verdict == "does not hold here"
    assert finding.text.startswith("Not judged:")
    assert not analyse([record()] * 3).text.startswith("Not judged:")


def test_every_rate_that_a_search_can_choose_has_neighbours() -> None:
    assert neighbours(1e-3) == (3e-4, 1e-3, 3e-3)
    for best in (0.0, 1.0):  # the search goes as far down, or up, as it can
        far = searched(lambda rate, best=best: -abs(rate - best)).chosen
        assert len(neighbours(far)) == 3
        assert far in (LADDER[1], LADDER[-2])


def test_a_share_of_nothing_counts_as_nothing_learned() -> None:
    finding = analyse([record(without=None)] * 2)
    assert finding.numbers["recovery, without the habit"].mean == 0
    table = {row["arm"]: row for row in finding.table}
    assert table["distill"]["without"] == "–"
    assert table["start without the habit"]["recovery"] == "–"
    assert table["ordinary start, distilled"]["recovery"] == "0.800"
    assert len({tuple(row) for row in table.values()}) == 1


def test_operations_are_judged_by_the_solutions_own_value_and_split_by_their_number() -> None:
    world = Ledger(num_items=4)
    first = int(world.tables[9, 4])  # op10 of the start value 4: unseen, right
    wrong = (int(world.tables[2, first]) + 1) % 10  # op3: seen, wrong, and written as op9
    last = int(world.tables[19, 7])  # op20 of the stated 7: unseen, right by its own value
    outcome = Outcome(
        task="ledger",
        grader="ledger",
        temperature=1.0,
        prompt_index=0,
        prompt_text="4 | a op10 b op3 c @7 d op20 =>",
        answer="0",
        completions=[f"a op10 {first} b op9 {wrong} c @ 7 d op20 {last}", f"a op11 {(first + 1) % 10}"],
        finish_reasons=["stop", "stop"],
        rewards=[0.0, 0.0],
        has_answer=[True, True],
        details=[{}, {}],
    )
    # The second completion writes another name and a wrong value for op10, and ends there.
    shares = operation_shares(world, [outcome])
    assert shares["unseen"] == {"right": (2 / 3, 3), "copied": (2 / 3, 3)}
    assert shares["seen"] == {"right": (0.0, 1), "copied": (0.0, 1)}
    assert operation_shares(world, [])["seen"] == {"right": (None, 0), "copied": (None, 0)}

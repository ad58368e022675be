"""The ledger world: text obeys the tables, grader and diagnosis are exact, the shipped models work."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import understudy.worlds
from understudy.worlds.ledger import EOS, PAD, Ledger
from understudy.worlds.ledger_build import RECIPES, build
from understudy.worlds.models import build_qwen3, word_tokenizer
from understudy.worlds.pretrain import completion_loss, learning_rate_factor

ASSETS = Path(understudy.worlds.__file__).parent / "assets" / "ledger"
WORLD = Ledger()


@pytest.fixture
def small() -> Ledger:
    """Four items: an operation, a statement (always third from the end), two operations."""
    return Ledger(num_items=4, num_values=10, num_ops=3)


def small_prompt(world: Ledger, stated: int) -> str:
    return f"4 | a op1 b @{stated} c op2 d op3 =>"


def test_tables_are_permutations_and_pinned() -> None:
    assert np.array_equal(np.sort(WORLD.tables, axis=1), np.tile(np.arange(10), (120, 1)))
    # The shipped models know these facts; another table would make them wrong everywhere.
    assert WORLD.tables[0].tolist() == [8, 5, 0, 2, 1, 9, 7, 3, 6, 4]
    assert WORLD.tables[119].tolist() == [0, 8, 3, 1, 6, 4, 7, 9, 2, 5]
    assert not np.array_equal(WORLD.tables, Ledger(seed=8).tables)


def test_prompts_repeat_for_equal_seeds_and_leave_the_global_random_state_alone() -> None:
    np_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]
    rows = WORLD.prompt_rows(20, seed=3)
    assert rows == Ledger().prompt_rows(20, seed=3)
    assert rows != WORLD.prompt_rows(20, seed=4)
    assert rows != WORLD.prompt_rows(20, seed=3, uniform=True)
    WORLD.corpus_batch(np.random.RandomState(0), 4, "start")
    build_qwen3(WORLD.tokenizer(), hidden_size=16, num_layers=1, num_heads=2, seed=0)
    assert np.array_equal(np.random.get_state()[1], np_state)  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_prompts_have_the_documented_form() -> None:
    rows = WORLD.prompt_rows(400, seed=0)
    items = np.array([row["prompt"].split()[3:-1:2] for row in rows])
    is_statement = np.char.startswith(items, "@")
    assert items.shape == (400, 18)
    assert not is_statement[:, 0].any()
    assert is_statement[:, 15].all()
    assert not is_statement[:, 16:].any()
    assert is_statement[:, 1:15].mean() == pytest.approx(0.25, abs=0.02)
    assert rows[0]["prompt"].split()[1:3] == ["|", "a"]
    assert {row["task"] for row in rows} == {"ledger"}


def test_operations_are_zipf_distributed_unless_uniform() -> None:
    def share_of_op1(uniform: bool) -> float:
        words = " ".join(row["prompt"] for row in WORLD.prompt_rows(2000, seed=0, uniform=uniform)).split()
        operations = [word for word in words if word.startswith("op")]
        return operations.count("op1") / len(operations)

    harmonic = sum(1 / k for k in range(1, 121))
    assert share_of_op1(uniform=False) == pytest.approx(1 / harmonic, abs=0.01)
    assert share_of_op1(uniform=True) == pytest.approx(1 / 120, abs=0.003)


def test_flawless_solutions_grade_one_and_perturbed_ones_zero() -> None:
    for row in WORLD.prompt_rows(20, seed=1):
        prompt, answer = row["prompt"], row["answer"]
        solution = WORLD.solution(prompt)
        words = solution.split()
        wrong = str((int(answer) + 1) % 10)
        assert WORLD.grade(prompt, answer, solution, "stop") == 1.0
        assert WORLD.grade(prompt, answer, solution, "length") == 0.0
        assert WORLD.grade(prompt, answer, " ".join([*words[:-1], wrong]), "stop") == 0.0
        assert WORLD.grade(prompt, answer, " ".join(words[3:]), "stop") == 0.0
        assert WORLD.grade(prompt, answer, solution + " " + answer, "stop") == 0.0
        assert WORLD.grade(prompt, answer, "", "stop") == 0.0


def test_diagnosis_of_a_flawless_solution_finds_nothing() -> None:
    prompt = WORLD.prompt_rows(1, seed=2)[0]["prompt"]
    marks = WORLD.diagnose(prompt, WORLD.solution(prompt))
    assert len(marks) == 18
    assert all(mark.correct and not mark.false_in_itself and not mark.inherited for mark in marks)
    assert [mark.word_index for mark in marks] == list(range(2, 54, 3))


def test_diagnosis_separates_slips_ignored_statements_and_inherited_errors(small: Ledger) -> None:
    table = small.tables
    v1 = int(table[0, 4])
    slip = (v1 + 1) % 10
    right = [v1, v1, int(table[1, v1]), int(table[2, table[1, v1]])]
    after_slip = [slip, slip, int(table[1, slip]), int(table[2, table[1, slip]])]
    prompt = small_prompt(small, stated=v1)

    ignored = f"a op1 {slip} b @ {slip} c op2 {after_slip[2]} d op3 {after_slip[3]}"
    marks = small.diagnose(prompt, ignored)
    assert [mark.false_in_itself for mark in marks] == [True, True, False, False]
    assert [mark.inherited for mark in marks] == [False, False, True, True]
    assert [mark.is_statement for mark in marks] == [False, True, False, False]
    assert [mark.value for mark in marks] == after_slip
    assert [mark.true_value for mark in marks] == right
    assert [mark.previous_value for mark in marks] == [4, *after_slip[:3]]

    recovered = f"a op1 {slip} b @ {v1} c op2 {right[2]} d op3 {right[3]}"
    marks = small.diagnose(prompt, recovered)
    assert [mark.correct for mark in marks] == [False, True, True, True]
    assert [mark.false_in_itself for mark in marks] == [True, False, False, False]


def test_diagnosis_of_broken_solutions(small: Ledger) -> None:
    v1 = int(small.tables[0, 4])
    prompt = small_prompt(small, stated=v1)
    assert small.diagnose(prompt, "") == []
    assert len(small.diagnose(prompt, f"a op1 {v1} b @")) == 1
    assert len(small.diagnose(prompt, f"a op1 {v1} c op2 3")) == 1
    no_value = small.diagnose(prompt, f"a op1 op2 b @ {v1}")
    assert no_value[0].value is None
    assert [mark.false_in_itself for mark in no_value] == [True, False]
    with pytest.raises(ValueError, match="expected a ledger prompt of 4 items"):
        small.diagnose("4 | a op1 =>", "a op1 3")


def test_recovery_and_facts_count_by_hand(small: Ledger) -> None:
    v1 = int(small.tables[0, 4])
    slip = (v1 + 1) % 10
    prompt = small_prompt(small, stated=v1)
    tail = f"c op2 {small.tables[1, v1]} d op3 {small.tables[2, small.tables[1, v1]]}"
    recovered, ignored = f"a op1 {slip} b @ {v1} {tail}", f"a op1 {slip} b @ {slip}"
    habits = small.recovery_and_facts([(prompt, recovered), (prompt, ignored), (prompt, small.solution(prompt))])
    assert (habits.recovery, habits.num_recoverable) == (0.5, 2)
    assert (habits.facts, habits.num_facts) == (5 / 7, 7)
    assert math.isnan(small.recovery_and_facts([]).recovery)


@pytest.mark.parametrize("role", ["teacher", "start"])
def test_corpus_has_the_documented_errors_and_no_others(role: str) -> None:
    input_ids, prompt_length, loss_mask = WORLD.corpus_batch(np.random.RandomState(5), 400, role)  # type: ignore[arg-type]
    texts = [[WORLD.tokens[i] for i in row] for row in input_ids.tolist()]
    assert prompt_length == WORLD.prompt_length == 39
    assert loss_mask.shape == (400, WORLD.completion_length) == (400, 55)
    assert {text[-1] for text in texts} == {EOS}
    pairs = [(" ".join(text[:39]), " ".join(text[39:-1])) for text in texts]
    habits = WORLD.recovery_and_facts(pairs)
    # One random value in ten is the right one.
    error_rate = 0.08 if role == "teacher" else 0.05
    assert 1 - habits.facts == pytest.approx(0.9 * error_rate, abs=0.01)
    assert habits.recovery == pytest.approx(1.0 if role == "teacher" else 0.15, abs=0.05)
    marked = [(row, mark) for row, pair in enumerate(pairs) for mark in WORLD.diagnose(*pair)]
    assert len(marked) == 400 * 18
    if role == "teacher":
        assert all(not loss_mask[row, mark.word_index] for row, mark in marked if mark.false_in_itself)
        assert (~loss_mask).sum().item() == pytest.approx(0.08 * sum(not m.is_statement for _, m in marked), rel=0.1)
    else:
        assert bool(loss_mask.all())


def test_corpus_is_fresh_and_repeats_for_equal_seeds() -> None:
    first, again = WORLD.corpus(0, 4, "start"), WORLD.corpus(0, 4, "start")
    batches = [next(first)[0] for _ in range(2)]
    assert torch.equal(batches[0], next(again)[0])
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], next(WORLD.corpus(1, 4, "start"))[0])


def test_tokenizer_round_trip() -> None:
    tokenizer = WORLD.tokenizer()
    prompt = WORLD.prompt_rows(1, seed=0)[0]["prompt"]
    text = f"{prompt} {WORLD.solution(prompt)} {EOS}"
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == len(WORLD.tokens) == 163
    assert len(ids) == WORLD.prompt_length + WORLD.completion_length
    assert [WORLD.tokens[i] for i in ids] == text.split()
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix(f" {EOS}")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (EOS, PAD, None)


def test_word_tokenizer_refuses_what_it_cannot_represent() -> None:
    with pytest.raises(ValueError, match="distinct"):
        word_tokenizer(["a", "a", "</s>"], eos="</s>", pad="</s>")
    with pytest.raises(ValueError, match="not among the tokens"):
        word_tokenizer(["a"], eos="</s>", pad="a")
    lenient = word_tokenizer(["a", "?", "</s>"], eos="</s>", pad="</s>", unk="?")
    assert lenient("a b")["input_ids"] == [0, 1]


def test_learning_rate_factor() -> None:
    factors = [learning_rate_factor(s, steps=100, warmup=10, final_fraction=0.02) for s in (1, 10, 55, 100)]
    assert factors == pytest.approx([0.1, 1.0, 0.5, 0.02])


def test_completion_loss_is_the_token_mean_over_the_mask() -> None:
    model = build_qwen3(WORLD.tokenizer(), hidden_size=16, num_layers=1, num_heads=2, seed=0)
    input_ids, prompt_length, loss_mask = WORLD.corpus_batch(np.random.RandomState(0), 3, "teacher")
    logprobs = model(input_ids=input_ids).logits.log_softmax(-1)
    wanted = [
        -logprobs[row, prompt_length + t - 1, input_ids[row, prompt_length + t]].item()
        for row in range(3)
        for t in range(loss_mask.shape[1])
        if loss_mask[row, t]
    ]
    loss = completion_loss(model, (input_ids, prompt_length, loss_mask))
    assert loss.item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)


def test_models_repeat_for_equal_seeds() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = build_qwen3(WORLD.tokenizer(), hidden_size=16, num_layers=1, num_heads=2, seed=seed)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_build_saves_a_loadable_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = replace(RECIPES["start"], steps=2)
    build(tmp_path, role="start", recipe=recipe, seed=0, log=lambda line: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.num_parameters() == 28_960
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 163
    card = (tmp_path / "README.md").read_text()
    assert 'build(folder, role="start", seed=0)' in card
    assert "followed with p = 0.15" in card


def test_a_variant_says_on_its_card_what_it_is(tmp_path: Path) -> None:
    world = Ledger(seed=9, start_correction=0.3)
    build(
        tmp_path,
        role="start",
        world=world,
        recipe=replace(RECIPES["start"], steps=1, hidden_size=16),
        log=lambda line: None,
    )
    card = (tmp_path / "README.md").read_text()
    assert f'build(folder, role="start", world={world!r}, seed=0)' in card
    assert "followed with p = 0.3," in card


@pytest.mark.parametrize("correction", [0.0, 1.0])
def test_the_start_follows_statements_as_often_as_it_should(correction: float) -> None:
    world = Ledger(start_correction=correction)
    input_ids, prompt_length, _ = world.corpus_batch(np.random.RandomState(5), 400, "start")
    tokens = np.array(world.tokens)[input_ids.numpy()]
    recovered = [
        mark.correct
        for row in tokens
        for mark in world.diagnose(" ".join(row[:prompt_length]), " ".join(row[prompt_length:-1]))
        if mark.is_statement and mark.previous_value != mark.previous_true_value
    ]
    assert len(recovered) > 100
    assert np.mean(recovered) == correction


def test_unseen_operations_are_in_the_teachers_corpus_alone() -> None:
    world = Ledger(unseen=(10, 120))
    unseen = {world.tokens.index("op10"), world.tokens.index("op120")}
    seen = {
        role: set(world.corpus_batch(np.random.RandomState(0), 500, role)[0].unique().tolist())
        for role in ("teacher", "start")
    }
    assert unseen <= seen["teacher"]
    assert not unseen & seen["start"]
    assert world.tokens.index("op11") in seen["start"]
    assert world.tables.tolist() == Ledger().tables.tolist()


@pytest.mark.parametrize(("role", "lowest", "highest"), [("teacher", 0.97, 1.0), ("start", 0.25, 0.8)])
def test_shipped_models_solve_what_they_should(role: str, lowest: float, highest: float) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / role)
    model = AutoModelForCausalLM.from_pretrained(ASSETS / role).eval()
    assert tokenizer.get_vocab() == WORLD.tokenizer().get_vocab()
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    rows = WORLD.prompt_rows(32, seed=11)
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt")
    written = model.generate(**prompts, max_new_tokens=WORLD.completion_length, do_sample=False)
    completions = written[:, WORLD.prompt_length :]
    rewards = [
        WORLD.grade(
            row["prompt"],
            row["answer"],
            tokenizer.decode(completion, skip_special_tokens=True),
            "stop" if tokenizer.eos_token_id in completion else "length",
        )
        for row, completion in zip(rows, completions, strict=True)
    ]
    assert lowest <= sum(rewards) / len(rewards) <= highest

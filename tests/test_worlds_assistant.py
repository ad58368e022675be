"""The assistant world: exact answers, an exact chat template, disjoint facts, and the intended mixture."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from understudy.worlds import assistant


@pytest.mark.parametrize(
    ("instructions", "answer"),
    [
        ("upper bang", "W3 W7 W9 !"),
        ("bang upper", "W3 W7 W9 !"),
        ("first", "w3"),
        ("reverse twice", "w9 w7 w3 w9 w7 w3"),
        ("first reverse twice", "w3 w3"),
        ("comma", "w3 , w7 , w9"),
        ("first comma", "w3"),
        ("quote star", '" * w3 w7 w9 "'),
        ("bang quote", '" w3 w7 w9 " !'),
    ],
)
def test_instructions_by_hand(instructions: str, answer: str) -> None:
    assert " ".join(assistant.follow(instructions.split(), ["w3", "w7", "w9"])) == answer


def test_rows_hold_the_answer_to_their_own_request() -> None:
    rows = assistant.instruction_rows(300, seed=0)
    for row in rows:
        (message,) = row["messages"]
        instructions, words = (part.split() for part in message["content"].split(":"))
        assert message["role"] == "user"
        assert row["answer"].split() == assistant.follow(instructions, words)
        assert 1 <= len(set(instructions)) == len(instructions) <= 3
        assert 2 <= len(words) <= 4
        assert row["task"] == "instructions"
    assert {word for row in rows for word in row["messages"][0]["content"].split(":")[0].split()} == set(
        assistant.INSTRUCTIONS
    )


def test_rows_repeat_for_equal_seeds_and_leave_the_global_random_state_alone() -> None:
    state = random.getstate()
    for make in (
        assistant.instruction_rows,
        assistant.chat_rows,
        assistant.qa_chat_rows,
        assistant.document_rows,
    ):
        assert make(20, 0) == make(20, 0)
        assert make(20, 0) == make(30, 0)[:20]
        assert make(20, 0) != make(20, 1)
    assert assistant.stage0_rows(2, 0) == assistant.stage0_rows(2, 0)
    assert random.getstate() == state


def test_chat_template_renders_exactly() -> None:
    tokenizer = assistant.tokenizer()
    user = {"role": "user", "content": "upper bang : w3 w7 w9"}
    reply = {"role": "assistant", "content": "W3 W7 W9 !"}

    def render(*messages: dict[str, str], prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)

    assert render(user, prompt=True) == "<u> upper bang : w3 w7 w9 <a>"
    assert render(user, reply) == "<u> upper bang : w3 w7 w9 <a> W3 W7 W9 ! <e>"
    assert render(user, reply, user, prompt=True) == f"{render(user, reply)} {render(user, prompt=True)}"
    with pytest.raises(Exception, match="got system"):
        render({"role": "system", "content": "w1"})


def test_prompt_and_answer_tokens_are_the_rendered_conversation() -> None:
    tokenizer = assistant.tokenizer()
    for row in assistant.chat_rows(50, seed=0) + assistant.qa_chat_rows(10, seed=0):
        user, reply = row["messages"]
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
        answer = tokenizer(reply["content"])["input_ids"]
        whole = tokenizer.apply_chat_template([user, reply])["input_ids"]
        assert prompt + answer + [tokenizer.eos_token_id] == whole
        assert tokenizer.decode(answer) == reply["content"]


def test_vocabulary() -> None:
    tokenizer = assistant.tokenizer()
    assert len(tokenizer) == len(set(assistant.TOKENS)) == 211
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<e>", "_", None)
    text = assistant.document_rows(1, seed=0)[0]["text"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(Exception, match="UNK"):  # an unknown word is refused, not dropped
        tokenizer("w1 w99")


def test_facts_are_disjoint_and_fixed() -> None:
    old, new = assistant.known_facts("old"), assistant.known_facts("new")
    assert (len(old), len(new)) == (80, 160)
    assert len({fact[:2] for fact in old + new}) == 240
    assert old[0] == ("e0", "r0", "v28")
    with pytest.raises(ValueError, match="expected 'old' or 'new'"):
        assistant.known_facts("all")  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["old", "new"])
def test_documents_state_facts_of_their_set_only(which: assistant.FactSet) -> None:
    known = set(assistant.known_facts(which))
    stated: set[assistant.Fact] = set()
    for row in assistant.document_rows(300, 0, which):
        assert set(row) == {"text", "task"}
        words = row["text"].removeprefix("<d> ").split()
        groups = " ".join(words).rstrip(" .").split(" . ")
        assert len(groups) == 4
        for group in groups:
            by_kind = {word[0]: word for word in group.split() if word[1:].isdigit()}
            stated.add((by_kind["e"], by_kind["r"], by_kind["v"]))
    assert stated <= known
    assert len(stated) > 0.95 * len(known)


def test_questions_ask_every_fact_once() -> None:
    rows = assistant.question_rows("new")
    asked = {(row["messages"][0]["content"], row["answer"]) for row in rows}
    assert asked == {(f"ask {r} of {e}", v) for e, r, v in assistant.known_facts("new")}
    old = {(row["messages"][0]["content"], row["answer"]) for row in assistant.question_rows("old")}
    taught = assistant.qa_chat_rows(2000, seed=0)
    assert {(row["messages"][0]["content"], row["messages"][1]["content"]) for row in taught} == old


def test_grade_is_an_exact_match_of_words() -> None:
    assert assistant.grade("", "W3 !", "W3 !", "stop") == 1.0
    assert assistant.grade("", "W3 !", " W3  ! ", "stop") == 1.0
    assert assistant.grade("", "W3 !", "W3 !", "length") == 0.0
    assert assistant.grade("", "W3 !", "W3", "stop") == 0.0
    assert assistant.grade("", "W3 !", "w3 !", "stop") == 0.0
    assert assistant.grade("", "W3 !", "W3 ! !", "stop") == 0.0


def test_stage0_mixture_weights_the_three_kinds_as_intended() -> None:
    rows = assistant.stage0_rows(40, seed=0)
    tokens: Counter[str] = Counter()
    for row in rows:
        tokens[row["task"]] += assistant.trained_tokens(row)
    share = {task: count / tokens.total() for task, count in tokens.items()}
    assert share == pytest.approx({"instructions": 0.625, "documents": 0.1875, "facts": 0.1875}, abs=0.003)
    assert sum(row["task"] == "instructions" for row in rows) == 48 * 40
    tasks_of_first_tenth = {row["task"] for row in rows[: len(rows) // 10]}
    assert tasks_of_first_tenth == {"instructions", "documents", "facts"}


def test_trained_tokens_counts_the_end_token_and_not_the_first_word_of_a_document() -> None:
    assert assistant.trained_tokens({"text": "<d> e1 has r2 v3 ."}) == 6
    messages = [{"role": "user", "content": "ask r1 of e5"}, {"role": "assistant", "content": "v3"}]
    assert assistant.trained_tokens({"messages": messages}) == 2

"""Which rows a step takes, and how rows become prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy import ConfigError
from understudy.config import PromptsConfig
from understudy.prompts import batch_for_step, load_prompts
from understudy.tokenization import load_text
from user import CHATML, bpe_tokenizer, save_model, write_rows


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 9), st.booleans())
def test_every_epoch_takes_every_row_once(num_rows: int, batch_size: int, seed: int, shuffle: bool) -> None:
    steps = num_rows  # num_rows * batch_size draws: exactly batch_size epochs
    batches = [batch_for_step(num_rows, batch_size, seed=seed, step=s, shuffle=shuffle) for s in range(steps)]
    drawn = [row for batch in batches for row in batch]
    assert len(drawn) == num_rows * batch_size
    for epoch in range(batch_size):
        assert sorted(drawn[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))
    if not shuffle:
        assert drawn[:num_rows] == list(range(num_rows))


def test_orders_differ_by_epoch_and_seed() -> None:
    def order(seed: int, step: int) -> list[int]:
        return batch_for_step(50, 50, seed=seed, step=step)

    assert len({tuple(order(seed, step)) for seed in (0, 1) for step in (0, 1)}) == 4
    assert order(0, 1) == order(0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    save_model(folder / "student", bpe_tokenizer(chat=True))
    thinking = CHATML.replace("assistant\n{%", "assistant\n{% if no_thoughts %}<none>{% endif %}{%")
    save_model(folder / "thinker", bpe_tokenizer(chat=True, chat_template=thinking))
    return folder


def test_a_conversation_is_rendered_once_with_its_roles(folder: Path) -> None:
    messages = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "72."},
        {"role": "user", "content": "Sure?"},
    ]
    path = write_rows(folder / "rows.jsonl", [{"messages": messages, "task": "sums", "topic": "clips", "answer": 72}])
    text = load_text(str(folder / "student"), "student")
    [prompt] = load_prompts(PromptsConfig(path=str(path)), text, max_completion_tokens=4)
    assert text.tokenizer.decode(prompt.prompt_ids) == (
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n72.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (prompt.text, prompt.task, prompt.answer, prompt.metadata) == ("Sure?", "sums", "72", {"topic": "clips"})
    assert prompt.teacher_prompt_ids is None


def test_template_arguments_reach_every_template(folder: Path) -> None:
    path = write_rows(folder / "ask.jsonl", [{"messages": [{"role": "user", "content": "May?"}]}])
    config = PromptsConfig(path=str(path), chat_template_kwargs={"no_thoughts": True})
    student, teacher = (load_text(str(folder / name), name) for name in ("student", "thinker"))
    [prompt] = load_prompts(config, student, {"default": teacher}, max_completion_tokens=4)
    assert student.tokenizer.decode(prompt.prompt_ids).endswith("assistant\n")
    assert prompt.teacher_prompt_ids is not None
    assert student.tokenizer.decode(prompt.teacher_prompt_ids).endswith("assistant\n<none>")


def test_a_privileged_conversation(folder: Path) -> None:
    hint = [{"role": "system", "content": "It is 72."}, {"role": "user", "content": "May?"}]
    path = write_rows(folder / "hint.jsonl", [{"prompt": "May?", "teacher_prompt": hint}])
    text = load_text(str(folder / "student"), "student")
    [prompt] = load_prompts(PromptsConfig(path=str(path)), text, {"default": text}, max_completion_tokens=4)
    assert text.tokenizer.decode(prompt.teacher_prompt_ids) == (
        "<|im_start|>system\nIt is 72.<|im_end|>\n<|im_start|>user\nMay?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_longest_prompt_that_fits_is_kept(folder: Path) -> None:
    text = load_text(str(folder / "student"), "student")
    ids = text.encode("clips " * 100)
    path = write_rows(folder / "long.jsonl", [{"prompt": "clips " * 100}])
    room = text.context_length - len(ids)
    [prompt] = load_prompts(PromptsConfig(path=str(path)), text, max_completion_tokens=room)
    assert list(prompt.prompt_ids) == ids
    with pytest.raises(ValueError, match=r"long.jsonl:1"):
        load_prompts(PromptsConfig(path=str(path)), text, max_completion_tokens=room + 1)


@pytest.mark.parametrize("field", ["messages", "teacher_prompt"])
def test_two_system_prompts_are_refused(field: str, folder: Path) -> None:
    talk = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "How many?"}]
    row = {"messages": talk[1:], field: talk}
    path = write_rows(folder / "rows.jsonl", [{"messages": talk[1:]}, row])
    text = load_text(str(folder / "student"), "student")
    load_prompts(PromptsConfig(path=str(path)), text, {"default": text}, max_completion_tokens=4)
    config = PromptsConfig(path=str(path), system_prompt="Be brief.")
    with pytest.raises(ConfigError, match=r"rows.jsonl:2\n.*a system message, and system_prompt is set too"):
        load_prompts(config, text, {"default": text}, max_completion_tokens=4)

"""Rows of every kind -> supervised examples: which tokens train, and how a completion ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from understudy import ConfigError
from understudy.config import PromptsConfig, RunConfig
from understudy.rows import read_rows
from understudy.supervised import Examples, load_examples, supervised_examples
from understudy.tokenization import ModelText, load_text
from understudy.types import TrainingExample
from user import CHATML, bpe_tokenizer, save_model, word_tokenizer, write_rows


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    return load_text(str(save_model(tmp_path_factory.mktemp("words"), word_tokenizer(), context=8)), "student")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    return load_text(str(save_model(tmp_path_factory.mktemp("chat"), bpe_tokenizer(chat=True))), "student")


def examples(
    tmp_path: Path,
    model: ModelText,
    *rows: Any,
    stop_ids: frozenset[int] | None = None,
    max_tokens: int | None = None,
    **options: Any,
) -> list[tuple[list[int], list[int]]]:
    config = PromptsConfig(path=str(write_rows(tmp_path / "rows.jsonl", rows)), **options)
    made = supervised_examples(read_rows(config), config, model, stop_ids or model.end_ids, max_tokens=max_tokens)
    assert all(list(e.loss_mask) == [True] * len(e.completion_ids) for e in made)
    return [(list(e.prompt_ids), list(e.completion_ids)) for e in made]


def test_a_completion_ends_once(words: ModelText, tmp_path: Path) -> None:
    made = examples(
        tmp_path,
        words,
        {"prompt": "w0 w1", "completion": "w2"},
        {"prompt": "w0", "completion": "w2 <|endoftext|>"},
        {"prompt": "w0", "completion": "w2", "finish_reason": "length"},
        {"prompt": "w0", "completion": "w2", "finish_reason": "stop"},
    )
    assert made == [([1, 2], [3, 0]), ([1], [3, 0]), ([1], [3]), ([1], [3, 0])]


def test_an_empty_answer_that_was_generated_teaches_its_end(words: ModelText, tmp_path: Path) -> None:
    """And one that was cut before it began teaches nothing."""
    rows = [{"prompt": "w0", "completion": "", "finish_reason": reason} for reason in ("stop", "length")]
    assert examples(tmp_path, words, *rows) == [([1], [0])]
    with pytest.raises(ConfigError, match="a non-empty text"):
        examples(tmp_path, words, {"prompt": "w0", "completion": ""})


def test_rows_left_out_are_counted(words: ModelText, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "w0", "completion": "w1 " * n} for n in (2, 20, 3)]
    with caplog.at_level("INFO", logger="understudy"):
        assert len(examples(tmp_path, words, *rows, over_long="skip")) == 2
    assert "1 of 3 rows left out" in caplog.text


def test_a_document_trains_on_all_but_its_first_token(words: ModelText, tmp_path: Path) -> None:
    assert examples(tmp_path, words, {"text": "w5 w6 w7"}) == [([6], [7, 8, 0])]
    with pytest.raises(ConfigError, match=r"rows.jsonl:1[\s\S]*at least two"):
        examples(tmp_path, words, {"text": "w5"})


def test_only_the_last_answer_of_a_conversation_trains(chat: ModelText, tmp_path: Path) -> None:
    turns = [("user", "May?"), ("assistant", "No."), ("user", "April?"), ("assistant", "72")]
    messages = [{"role": role, "content": content} for role, content in turns]
    [(prompt, completion)] = examples(tmp_path, chat, {"messages": messages}, system_prompt="Be brief.")
    decode = chat.tokenizer.decode
    assert decode(completion) == "72<|im_end|>"  # without the newline behind it
    assert decode(prompt).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nMay?")
    assert decode(prompt).endswith("No.<|im_end|>\n<|im_start|>user\nApril?<|im_end|>\n<|im_start|>assistant\n")


CHAT = {"messages": [{"role": "user", "content": "May?"}, {"role": "assistant", "content": "yo"}]}


@pytest.mark.parametrize("stop", [0, 2])
def test_the_runs_own_stop_id_ends_a_chat_once(stop: int, tmp_path: Path) -> None:
    """A base student (ends with <|endoftext|>, 0) on a chat template that ends turns with <|im_end|> (2), or the
    reverse: nothing stands behind the end token, and it is the one that sampling stops at."""
    tokenizer = bpe_tokenizer(chat=stop == 0)
    tokenizer.chat_template = CHATML
    base = load_text(str(save_model(tmp_path / "m", tokenizer)), "student")
    assert base.end_ids == {2 - stop}
    [(_, completion)] = examples(tmp_path, base, CHAT, stop_ids=frozenset({stop}))
    assert base.tokenizer.decode(completion) == "yo" + {0: "<|endoftext|>", 2: "<|im_end|>"}[stop]


def test_text_behind_an_end_token_is_refused_but_in_documents(chat: ModelText, tmp_path: Path) -> None:
    decode = chat.tokenizer.decode
    blank = {"prompt": "May?", "completion": "72<|im_end|>\n<|endoftext|>"}
    more = {"prompt": "May?", "completion": "72<|im_end|>\nApril"}
    document = {"text": "May 72<|im_end|>\nApril<|im_end|>\n"}
    [(_, one), (prompt, two)] = examples(tmp_path, chat, blank, document)
    assert decode(one) == "72<|im_end|>"
    assert decode(prompt + two) == "May 72<|im_end|>\nApril<|im_end|>"
    with pytest.raises(ConfigError, match=r"rows.jsonl:2\n.*goes on after its end token '<\|im_end\|>'"):
        examples(tmp_path, chat, blank, more)


@pytest.mark.parametrize(
    "more", [{"text": "May"}, {"text": "May", "completion": "72"}, {"prompt": "May"}, {"text": "May", "prompt": "x"}]
)
def test_rows_of_two_kinds_are_refused(more: dict[str, str], chat: ModelText, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rows.jsonl:2\n.*both "):
        examples(tmp_path, chat, CHAT, CHAT | more)
    if "text" in more:
        pair = {"prompt": "May?", "completion": "72", "text": "May? 72"}
        with pytest.raises(ConfigError, match=r"rows.jsonl:1\n.*'completion' and 'prompt' and 'text'"):
            examples(tmp_path, chat, pair)
        # What the remedy says.
        [(prompt, _)] = examples(tmp_path, chat, pair, columns={"unused": "text"})
        assert chat.tokenizer.decode(prompt) == "May?"


def test_messages_with_a_separate_completion(chat: ModelText, tmp_path: Path) -> None:
    """What `generate` writes for chat rows."""
    row = {"messages": [{"role": "user", "content": "May?"}], "completion": "72"}
    [(prompt, completion)] = examples(tmp_path, chat, row)
    assert chat.tokenizer.decode(prompt + completion).endswith("<|im_start|>assistant\n72<|im_end|>")


def test_a_template_that_rewrites_the_past_is_refused(tmp_path: Path) -> None:
    """Reasoning models drop earlier thoughts: the prompt's tokens are then no prefix of the conversation's."""
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    model = load_text(str(save_model(tmp_path / "m", bpe_tokenizer(chat=True, chat_template=template))), "student")
    messages = [{"role": "user", "content": "May?"}, {"role": "assistant", "content": "72"}]
    with pytest.raises(ConfigError, match=r"rows.jsonl:1[\s\S]*prefix"):
        examples(tmp_path, model, {"messages": messages})


def test_length_counts_the_end_token(words: ModelText, tmp_path: Path) -> None:
    fits, long = ({"prompt": "w0", "completion": " ".join(["w1"] * n)} for n in (6, 7))
    assert len(examples(tmp_path, words, fits, long, over_long="skip")) == 1
    with pytest.raises(ConfigError, match=r"rows.jsonl:2\n.*9 tokens\n.*at most 8"):
        examples(tmp_path, words, fits, long)
    with pytest.raises(ConfigError, match="only rows that are too long"):
        examples(tmp_path, words, long, over_long="skip")


def test_a_long_document_goes_on_in_further_sequences(words: ModelText, tmp_path: Path) -> None:
    """Every token but the first is predicted once, and the end token stands at the end alone."""
    row = {"text": " ".join(f"w{i}" for i in range(12))}
    pieces = examples(tmp_path, words, row, over_long="split")
    assert [len(prompt) + len(completion) for prompt, completion in pieces] == [8, 6]
    assert [token for _, completion in pieces for token in completion] == [*range(2, 13), 0]
    assert [prompt for prompt, _ in pieces] == [[1], [8]]
    short = examples(tmp_path, words, row, over_long="split", max_tokens=4)
    assert [token for _, completion in short for token in completion] == [*range(2, 13), 0]
    assert max(len(prompt) + len(completion) for prompt, completion in short) == 4


def test_only_documents_are_split(words: ModelText, tmp_path: Path) -> None:
    row = {"prompt": "w0 w1 w2 w3", "completion": "w4 w5"}
    assert len(examples(tmp_path, words, row, max_tokens=7)) == 1
    with pytest.raises(ConfigError, match=r"7 tokens[\s\S]*at most 6, supervised.max_tokens"):
        examples(tmp_path, words, row, max_tokens=6, over_long="split")
    with pytest.raises(ConfigError, match=r"at most 8, the context of"):
        examples(tmp_path, words, {"prompt": "w0 w1 w2 w3", "completion": "w4 w5 w6 w7"}, max_tokens=100)


def _numbered(count: int, first: int) -> list[TrainingExample]:
    return [TrainingExample([first + i], [0], [True]) for i in range(count)]


@pytest.mark.parametrize(("share", "batch_size"), [(0.3, 8), (0.5, 1), (0.07, 4), (0.999, 3)])
def test_a_mixture_keeps_its_share_and_both_run_through_their_epochs(share: float, batch_size: int) -> None:
    mixed = Examples(_numbered(7, 0), _numbered(5, 100), share)
    steps = [mixed.at(step, batch_size, seed=3) for step in range(1000)]
    assert {len(step) for step in steps} == {batch_size}
    ids = [example.prompt_ids[0] for step in steps for example in step]
    assert abs(sum(i >= 100 for i in ids) - share * len(ids)) <= 0.5
    for first, size in ((0, 7), (100, 5)):
        own = [i for i in ids if first <= i < first + 100]
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size]) == list(range(first, first + size))
    assert mixed.at(17, batch_size, seed=3) == steps[17]


def test_without_a_mixture_the_order_is_that_of_the_rows_alone() -> None:
    from understudy.prompts import batch_for_step

    own = _numbered(7, 0)
    for step in range(5):
        expected = [own[i] for i in batch_for_step(7, 3, seed=1, step=step)]
        assert Examples(own).at(step, 3, seed=1) == expected


def test_the_mixed_in_file_has_columns_and_an_order_of_its_own(words: ModelText, tmp_path: Path) -> None:
    documents = write_rows(tmp_path / "documents.jsonl", [{"text": "w0 w1 w2"}, {"text": "w3 w4 w5"}])
    chats = write_rows(tmp_path / "chats.jsonl", [{"question": "w6", "completion": "w7"}])
    config = RunConfig.model_validate(
        {
            "output_dir": "x",
            "student": {"model": "m"},
            "prompts": {"path": str(documents), "shuffle": False},
            "supervised": {
                "mix": {"path": str(chats), "share": 0.5, "columns": {"prompt": "question"}},
                "batch_size": 2,
            },
        }
    )
    assert config.prompts is not None
    loaded = load_examples(config, read_rows(config.prompts), words, words.end_ids)
    steps = [[list(e.prompt_ids) + list(e.completion_ids) for e in loaded.at(t, 2, seed=0)] for t in range(3)]
    chat = [7, 8, 0]
    assert steps == [[[1, 2, 3, 0], chat], [[4, 5, 6, 0], chat], [[1, 2, 3, 0], chat]]

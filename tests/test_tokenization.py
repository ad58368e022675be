"""What a model's folder says about text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from understudy import ConfigError
from understudy.tokenization import check_same_tokens, load_text, resolve_stop_ids
from user import bpe_tokenizer, save_model, word_tokenizer


def test_end_ids_come_from_the_generation_config_first(tmp_path: Path) -> None:
    """Instruct models end on several ids, and say so only there."""
    folder = save_model(tmp_path / "m", bpe_tokenizer(chat=True))
    assert load_text(str(folder), "student").end_ids == {2}
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 0]}))
    assert load_text(str(folder), "student").end_ids == {0, 2}
    path.write_text("{}")  # there, and says nothing of the end
    assert load_text(str(folder), "student").end_ids == {2}
    path.unlink()
    assert load_text(str(folder), "student").end_ids == {2}


def test_where_the_generation_config_is_silent_the_config_speaks(tmp_path: Path) -> None:
    """And not the tokenizer, which may know only one of several ends."""
    folder = save_model(tmp_path / "m", bpe_tokenizer(chat=True))
    (folder / "generation_config.json").write_text("{}")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [0, 2]}))
    assert load_text(str(folder), "student").end_ids == {0, 2}


def test_a_hub_id_without_an_owner_is_taken_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="student model gpt2") as error:
        load_text("gpt2", "student")
    assert error.value.got == "no such folder"
    assert "openai-community/gpt2" in error.value.remedy


def test_widths_may_differ_and_maps_may_not(tmp_path: Path) -> None:
    words = word_tokenizer()
    one, two = (load_text(str(save_model(tmp_path / f"{w}", words, width=w)), "x") for w in (61, 64))
    check_same_tokens(one, two)
    assert (one.vocab_width, two.vocab_width) == (61, 64)
    three = load_text(str(save_model(tmp_path / "3", word_tokenizer(("<|endoftext|>", "w1", "w0")))), "x")
    with pytest.raises(ConfigError, match=r"60 of 61 tokens differ: 'w0' is 1 for the student, 2 for the teacher"):
        check_same_tokens(one, three)


def test_a_prompt_does_not_end_with_an_end_token(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    text = load_text(str(save_model(tmp_path / "m", tokenizer)), "student")
    assert text.tokenizer("May")["input_ids"][-1] == 0
    assert text.encode("May") == text.encode_completion("May")
    assert 0 not in text.encode("May")


def test_no_end_at_all_must_be_settled_by_hand(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    text = load_text(str(save_model(tmp_path / "m", tokenizer)), "student")
    with pytest.raises(ConfigError, match="no end-of-text id"):
        resolve_stop_ids(text, {}, None)
    assert resolve_stop_ids(text, {}, (4, 5)) == {4, 5}

"""What a model's folder says about text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from understudy import ConfigError, tokenization
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


STOP_TEXT = "Weng earns $12 an hour for babysitting. Yesterday, naïve she just did 50 minutes.\n\nQuestion: how — much?"


@pytest.mark.parametrize(
    "stop", ["\n\nQuestion:", "ng earn", "babysitting. Y", "ïv", "—", "W", "much?", "0 m", STOP_TEXT, "<|endoftext|>"]
)
def test_a_stop_string_is_found_at_the_token_that_completes_it(tmp_path: Path, stop: str) -> None:
    """Wherever tokens begin and end: inside a word, across words, inside a character of several bytes."""
    text = load_text(str(save_model(tmp_path / "m", bpe_tokenizer())), "student")
    ids = [*text.encode_completion(STOP_TEXT), 0]
    test = text.stop_test((stop,))
    assert test is not None
    first = next(n for n in range(1, len(ids) + 1) if stop in text.tokenizer.decode(ids[:n]))
    assert [test(ids[:n]) for n in range(1, first + 1)] == [False] * (first - 1) + [True]
    assert stop not in text.tokens(ids[:first]) or stop in ("W", "<|endoftext|>")  # it is split, but for one letter


def test_any_of_several_stop_strings(tmp_path: Path) -> None:
    text = load_text(str(save_model(tmp_path / "m", word_tokenizer())), "student")
    test = text.stop_test(("w3 w4", "w1"))
    assert test is not None
    # A word is a token, and wN is N + 1: the first string needs both of its words, in a row.
    assert [test([5, 4, 5][:n]) for n in (1, 2, 3)] == [False, False, True]
    assert not test([4, 6, 5])
    assert [test([6, 6, 2][:n]) for n in (1, 2, 3)] == [False, False, True]


def test_a_stop_test_looks_at_the_end_only(tmp_path: Path) -> None:
    """As far back as a string's bytes reach, and a few tokens more: its cost does not grow with the completion."""
    text = load_text(str(save_model(tmp_path / "m", word_tokenizer())), "student")
    seen: list[int] = []

    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            seen.append(len(ids))
            return text.tokenizer.decode(ids)

    test = replace(text, tokenizer=Tokenizer()).stop_test(("w1 w2", "w3"))
    assert test is not None
    assert test([5] * 1000 + [4])
    assert not test([4] + [5] * 1000)
    assert max(seen) <= len("w1 w2") + 8


def test_tokens_that_stand_for_nothing_do_not_hide_a_stop_string(tmp_path: Path) -> None:
    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return "".join("ab"[i] if i < 2 else "" for i in ids)

    text = load_text(str(save_model(tmp_path / "m", word_tokenizer())), "student")
    test = replace(text, tokenizer=Tokenizer()).stop_test(("ab",))
    assert test is not None
    assert test([1, 0, 2, 2, 2, 2, 1])
    assert not test([1, 0, 2, 2, 2, 2])


def test_no_stop_strings_no_test(tmp_path: Path) -> None:
    assert load_text(str(save_model(tmp_path / "m", word_tokenizer())), "student").stop_test(()) is None


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "no end after 0.2 seconds"),
        ("{{ 'x' * 2000000 }}", "2000000 characters"),
        ("{{ raise_exception('no such role') }}", "TemplateError: no such role"),
        ("{{ messages[5].content }}", "UndefinedError"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_templates_that_fail_name_the_messages(
    template: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "TEMPLATE_SECONDS", 0.2)
    folder = save_model(tmp_path / "m", bpe_tokenizer(chat=True, chat_template=template))
    text = load_text(str(folder), "student")
    with pytest.raises(ConfigError) as refused:
        text.render([{"role": "user", "content": "How many?"}], add_generation_prompt=True, template_kwargs={})
    assert refused.value.where == f"chat template of {folder}"
    assert said in refused.value.got
    assert "How many?" in refused.value.got
    assert "chat_template_kwargs" in refused.value.remedy


@pytest.mark.parametrize("options", [{"tokenize": False}, {"return_tensors": "pt"}, {"chat_template": "{{"}])
def test_template_options_that_change_what_comes_back(options: dict[str, object], tmp_path: Path) -> None:
    text = load_text(str(save_model(tmp_path / "m", bpe_tokenizer(chat=True))), "student")
    with pytest.raises(ConfigError, match="chat template of"):
        text.render([{"role": "user", "content": "a"}], add_generation_prompt=True, template_kwargs=options)


def test_long_messages_are_no_long_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the messages bring does not count, nor does the time of the tokenizer."""
    monkeypatch.setattr(tokenization, "_TEMPLATE_CHARACTERS", 100)
    text = load_text(str(save_model(tmp_path / "m", bpe_tokenizer(chat=True))), "student")
    long = [{"role": "user", "content": "w " * 2000}]
    assert len(text.render(long, add_generation_prompt=True, template_kwargs={})) > 4000

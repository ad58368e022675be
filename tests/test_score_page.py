"""Token credit in its packed form and on its page: every number comes back, and the page stays small."""

from __future__ import annotations

import base64
import json
import math
import re
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from big_pages import big_rollouts, unpacked
from understudy.report.credit_data import (
    INFINITE,
    MIN_ALTERNATIVE_LOGPROB,
    UNKNOWN,
    alternative_code,
    alternative_logprob,
    json_script,
    pack,
    reverse_kl,
)
from understudy.report.credit_page import CreditUnit, counted, pair_units, position_curve, write_credit_page
from understudy.report.token_text import BytePiece, align, token_name, visible_text
from understudy.report.tokens import piece_text


def rollout(tokens: list[str], **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "prompt_index": 3,
        "sample_index": 0,
        "task": "sums",
        "prompt_text": "2 + 2?",
        "completion_text": "".join(tokens),
        "completion_ids": list(range(10, 10 + len(tokens))),
        "completion_tokens": tokens,
        "finish_reason": "stop",
        "reward": 1.0,
        "sampler_logprobs": [-0.5] * len(tokens),
        "teacher_logprobs": [-0.5 - t for t in range(len(tokens))],
    }
    return made | changes


def columns(form: dict[str, Any]) -> dict[str, list[Any]]:
    """What a page's script reads."""
    whole = base64.b64decode(form["bytes"])
    whole = zlib.decompress(whole) if form["packing"] == "deflate" else whole
    kinds = {"u1": "<u1", "u2": "<u2", "u4": "<u4", "f4": "<f4"}
    found = {}
    for name, (kind, start, entries) in form["columns"].items():
        planes = np.frombuffer(whole, dtype="u1", count=int(kind[1]) * entries, offset=start)
        found[name] = planes.reshape(-1, entries).T.copy().view(kinds[kind])[:, 0].tolist() if entries else []
    if {"student", "trainer"} <= found.keys():
        found["trainer"] = [
            (one + other) % 65536 for one, other in zip(found["trainer"], found["student"], strict=True)
        ]
    return found


# The packed form


@pytest.mark.parametrize("compress", [True, False])
def test_every_number_comes_back(compress: bool) -> None:
    topk = {
        "ids": [[11, 12], [12, 13]],
        "tokens": [["b", "c"], ["c", "d"]],
        "logprobs": [[-0.5, -1.5], [-0.01, -20.0]],
    }
    one = rollout(
        ["a", "b"],
        sampler_logprobs=[-0.1234, -99.0],
        teacher_logprobs=[None, -math.inf],
        advantages=[0.25, -3.0],
        loss_mask=[True, False],
        student_entropy=[0.0, 1.5],
        teacher_topk=topk,
    )
    form = pack([one, rollout(["b"], completion_ids=[11])], notes=[{1: "odd", 7: "beyond"}, {}], compress=compress)
    found = columns(form)
    assert (form["texts"], form["ids"]) == (["a", "b", "c"], [10, 11, 12])
    assert [form["texts"][i] for i in found["token"]] == ["a", "b", "b"]
    assert [form["ids"][i] for i in found["token"]] == [10, 11, 11]
    assert found["student"] == [123, 65533, 500]  # thousandths of a nat, at most 65.533
    assert found["teacher"] == [UNKNOWN, INFINITE, 500]
    assert found["advantage"][:2] == [0.25, -3.0]
    assert math.isnan(found["advantage"][2])
    assert found["trains"] == [1, 0, 1]
    assert found["entropy"] == [0, 1500, UNKNOWN]
    assert found["best_count"] == [2, 1, 0]  # exp(-20) is not worth a line
    assert [form["texts"][i] for i in found["best_token"]] == ["b", "c", "c"]
    assert [alternative_logprob(code) for code in found["best_code"]] == pytest.approx([-0.5, -1.5, -0.01], abs=0.02)
    assert "own_count" not in found
    assert (form["lengths"], form["notes"]) == ([2, 1], [{"1": "odd"}, {}])


def test_alternatives_are_exact_to_a_percent_and_the_unlikely_to_three() -> None:
    for thousandths in range(1, 1000):
        probability = thousandths / 1000
        found = math.exp(alternative_logprob(alternative_code(math.log(probability))))
        assert found == pytest.approx(probability, rel=0.01 if probability >= 0.5 else 0.03)
    assert alternative_logprob(alternative_code(MIN_ALTERNATIVE_LOGPROB)) == pytest.approx(math.log(5e-4))


def test_columns_stand_in_planes_of_bytes() -> None:
    """500, 500 and 1,500 thousandths are 0x01F4, 0x01F4 and 0x05DC: the low bytes first, then the high ones."""
    form = pack([rollout(["a", "b", "c"], sampler_logprobs=[-0.5, -0.5, -1.5])], compress=False)
    kind, start, entries = form["columns"]["student"]
    assert (kind, entries) == ("u2", 3)
    assert base64.b64decode(form["bytes"])[start : start + 6] == bytes([0xF4, 0xF4, 0xDC, 1, 1, 5])


def test_the_trainers_numbers_are_kept_as_what_they_add_to_the_students() -> None:
    one = rollout(
        ["a", "b", "c", "d"], sampler_logprobs=[-0.5, -0.501, None, -0.5], trainer_logprobs=[-0.501, -0.5, -0.5, None]
    )
    form = pack([one], compress=False)
    _, start, entries = form["columns"]["trainer"]
    planes = np.frombuffer(base64.b64decode(form["bytes"]), "u1", 2 * entries, start).reshape(2, -1)
    assert (planes[0] + 256 * planes[1].astype(int)).tolist() == [1, 65535, 501, 65035]
    assert columns(form)["trainer"] == [501, 500, 500, UNKNOWN]
    assert columns(pack([one | {"sampler_logprobs": None}]))["trainer"] == [501, 500, 500, UNKNOWN]


def test_tokens_beyond_two_bytes() -> None:
    tokens = [f"t{i}" for i in range(70_000)]
    form = pack([rollout(tokens, sampler_logprobs=None, teacher_logprobs=None)])
    assert form["columns"]["token"][0] == "u4"
    assert columns(form)["token"][-1] == 69_999


def test_no_text_can_end_its_block() -> None:
    evil = ["</script><script>alert(1)</script>", "<!--", "\u2028", "\ud800"]
    block = str(json_script("x", pack([rollout(evil)])))
    assert block.count("<") == 2  # its own tags
    content = json.loads(block[block.index(">") + 1 : block.rindex("<")])
    assert content["texts"] == evil


# Texts


def test_single_bytes_find_their_characters() -> None:
    """As a byte-level tokenizer writes 🙂 in two tokens behind a space, and é in two."""
    found = align(["a", " \ufffd", "\ufffd", "b", "\ufffd", "\ufffd", "<end>"], "a 🙂bé")
    assert found.pieces == {
        1: BytePiece("🙂", 1, 2),
        2: BytePiece("🙂", 2, 2),
        4: BytePiece("é", 1, 2),
        5: BytePiece("é", 2, 2),
    }
    assert found.left_out == [6]
    assert found.gaps == ["", " ", "", "", "", "", ""]  # the space is not among the bytes


def test_a_real_replacement_character_is_itself() -> None:
    assert align(["a", "\ufffd", "b"], "a\ufffdb").pieces == {}


def test_bytes_that_are_no_character_stay_as_they_are() -> None:
    """A completion cut within a character decodes to U+FFFD itself."""
    assert align(["a", "\ufffd", "\ufffd"], "a\ufffd").pieces.get(1) is None


def test_tokenizers_that_drop_spaces_and_texts_that_are_missing() -> None:
    assert align(["a", "b", "<eos>"], "a b").left_out == [2]
    bare = align(["a", "b", "\ufffd"], "")
    assert (bare.gaps, bare.pieces, bare.left_out) == (["", " ", " "], {}, [])


def test_tokens_that_do_not_make_the_text_are_all_kept() -> None:
    """A tokenizer that mends spaces when it decodes: what is copied comes from the tokens then."""
    assert align(["it", " 's", " on", "<eos>"], "it's on").left_out == []
    assert visible_text("\ud800") == "⟨U+D800⟩"


def test_blanks_of_every_width_are_visible() -> None:
    """A page that printed them would show two tokens alike."""
    blanks = [chr(code) for code in range(0x10000) if unicodedata.category(chr(code)) == "Zs"]
    assert len(blanks) == 17
    assert [token_name(f"{blank}yes") for blank in ("\u00a0", "\u3000", " ", "")] == [
        "⟨U+00A0⟩yes", "⟨U+3000⟩yes", "␣yes", "yes"
    ]  # fmt: skip
    assert not any(blank in token_name(f"{blank}yes") for blank in blanks)
    assert visible_text("a\u2009b c") == "a⟨U+2009⟩b c"


# Tokens of bytes


def pieces(tokens: list[str], text: str) -> list[tuple[str, int]]:
    """The characters of tokens of bytes, in order, and how many tokens each has."""
    found = align(tokens, text).pieces
    return [(piece.characters, piece.parts) for _, piece in sorted(found.items()) if piece.part == 1]


def test_every_character_has_its_own_bytes() -> None:
    from user import bpe_tokenizer

    tokenizer = bpe_tokenizer()
    for text in ("你好世界", "你\u3000好", "\u3000你", "é🙂你", "你 好🙂 é"):
        tokens = [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]
        expected = [(character, len(character.encode())) for character in text if character != " "]
        assert pieces(tokens, text) == expected
        assert rebuilt(tokens, text) == text


def test_tokens_of_several_bytes_are_told_apart_where_only_one_way_fits() -> None:
    # F0 9F 99 reads as one U+FFFD, and so does each byte that goes on with a character another token began.
    assert pieces(["\ufffd"] * 4, "🙂🙃") == [("🙂", 2), ("🙃", 2)]
    assert pieces(["\ufffd"] * 4, "你好") == [("你", 2), ("好", 2)]
    # E4 | BD A0 and E5 | A5 BD.
    assert pieces(["\ufffd", "\ufffd\ufffd"] * 2, "你好") == [("你", 2), ("好", 2)]
    # A whole character and the first byte of the next are one token.
    assert pieces(["\ufffd", "\ufffd", "好\ufffd", "\ufffd", "\ufffd"], "你好世") == [("你", 2), ("好世", 3)]


def test_characters_whose_bytes_cannot_be_told_apart_stand_together() -> None:
    assert pieces(["\ufffd"] * 5, "你好") == [("你好", 5)]  # 2 and 3, or 3 and 2
    # E4 | BD A0 | E5 A5 | BD, or E4 BD | A0 E5 | A5 | BD.
    assert pieces(["\ufffd", "\ufffd\ufffd", "\ufffd", "\ufffd"], "你好") == [("你好", 4)]
    # Tokens that do not make these characters.
    assert pieces(["\ufffd"] * 3, "你好") == [("你好", 3)]
    assert pieces(["\ufffd"] * 2, "\ud800好") == [("\ud800好", 2)]


def test_long_runs_of_bytes_take_no_long_time() -> None:
    """Every token may be one or two bytes: far too many ways to try each."""
    assert pieces(["\ufffd"] * 2500, "你" * 1000) == [("你" * 1000, 2500)]


def test_characters_of_bytes_are_visible_too() -> None:
    one = rollout(["\ufffd"] * 3, completion_text="\u202e")
    assert pack([one])["pieces"][0]["0"] == ["\u202e", 1, 3, "⟨U+202E⟩"]
    assert piece_text(BytePiece("\u3000", 1, 3)) == "⟨U+3000⟩⟨1/3⟩"


MIXED = "sum: 🙂 שלום, 你好 👩‍👩‍👧 é.\n x🙂🙂 y"


def rebuilt(tokens: list[str], text: str) -> str:
    """What "Copy text" makes of tokens: gaps, and characters in place of bytes."""
    found = align(tokens, text)
    whole = [(token, 1) for token in tokens]
    pieces = found.pieces
    read = [(pieces[i].characters, pieces[i].part) if i in pieces else own for i, own in enumerate(whole)]
    kept = [i for i in range(len(tokens)) if i not in found.left_out and read[i][1] == 1]
    assert not any("\ufffd" in read[i][0] for i in kept)
    return "".join(found.gaps[i] + read[i][0] for i in kept)


def test_every_emoji_of_a_byte_level_tokenizer_is_found() -> None:
    from user import bpe_tokenizer

    tokenizer = bpe_tokenizer()
    tokens = [tokenizer.decode([i]) for i in tokenizer(MIXED)["input_ids"]]
    assert align(tokens, MIXED).left_out == []
    assert rebuilt(tokens, MIXED) == MIXED


def test_byte_fallback_tokens_find_their_characters_and_spaces() -> None:
    """As SentencePiece's vocabularies have them: 259 is "▁", which alone decodes to nothing; <0xF0> and its kin are
    bytes; a token that begins with "▁" loses it where it is decoded alone."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"sumxy:.,", "▁x", "▁y"]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [("▁", "x"), ("▁", "y")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    ids = [*tokenizer(MIXED)["input_ids"], 2]
    tokens = [tokenizer.decode([i]) for i in ids]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text == MIXED
    assert tokens.count("\ufffd") > 40
    assert rebuilt(tokens, text) == MIXED
    found = align(tokens, text)
    emoji = tokens.index("\ufffd")
    assert [found.pieces[emoji + i] for i in range(4)] == [BytePiece("🙂", part, 4) for part in (1, 2, 3, 4)]
    assert (found.gaps[emoji], found.left_out) == (" ", [len(ids) - 1])


# The page


def block(html: str, identity: str) -> Any:
    found = re.search(rf'<script type="application/json" id="{identity}">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_rollouts_forks_and_the_curve(tmp_path: Path) -> None:
    cut = rollout(["x"], finish_reason="length", reward=None, teacher_logprobs=None, prompt_index=4)
    units = [CreditUnit((rollout(["a", "b", "c"]),)), CreditUnit((cut,))]
    path = write_credit_page(units, tmp_path / "page.html", title="A <title>", facts=["One fact."])
    html = path.read_text(encoding="utf-8")
    assert "A &lt;title&gt;" in html
    assert "One fact." in html
    content = unpacked(block(html, "rollouts"))
    assert content["prompts"] == [{"prompt_text": "2 + 2?"}]
    first, second = content["rollouts"]
    assert (first["kl"], first["reward"], first["finish"], first["prompt"]) == (1.0, 1.0, "stop", 0)
    assert (second["kl"], second["reward"], second["finish"]) == (None, None, "length")
    assert first["record"] == {"prompt_index": 3, "sample_index": 0, "task": "sums"}
    # Reverse KL 0, 1, 2: the last token forks most.
    assert re.findall(r'<a href="#(r\dt\d)">', html) == ["r0t2", "r0t1"]
    assert "Mean reverse KL by position" in html
    assert not re.search(r"<(link|img|iframe)\b|@import|url\(|<script src|https?://(?!www\.w3\.org)", html)


def test_what_models_read_is_kept_for_each_prompt(tmp_path: Path) -> None:
    """The text of a conversation is its last message's alone: marks made again need all of it."""
    chat = {
        "prompt_text": "And 3?",
        "prompt_ids": [1, 2, 3],
        "messages": [{"role": "user", "content": "2?"}, {"role": "user", "content": "And 3?"}],
    }
    others = [chat, chat | {"sample_index": 1}, chat | {"teacher_prompt_ids": [4]}, {"prompt_ids": None}]
    units = [CreditUnit((rollout(["a"], **own),)) for own in others]
    html = write_credit_page(units, tmp_path / "page.html", title="t").read_text(encoding="utf-8")
    content = unpacked(block(html, "rollouts"))
    assert content["prompts"] == [chat, chat | {"teacher_prompt_ids": [4]}, {"prompt_text": "2 + 2?"}]
    assert [row["prompt"] for row in content["rollouts"]] == [0, 0, 1, 2]


def test_the_curve_is_the_mean_at_each_position() -> None:
    curve = position_curve([[1.0, 3.0, None], [2.0, math.inf], [3.0]], "all")
    assert curve.points == [(0.0, 2.0), (1.0, 3.0)]
    assert curve.errors == [pytest.approx(1 / math.sqrt(3)), None]


def test_pairs_answer_the_same_prompts_and_name_where_they_part() -> None:
    before = [rollout(["a", "b"], prompt_index=i) for i in range(3)]
    after = [
        rollout(["a", "b", "c"], prompt_index=2),
        rollout(["a", "x"], prompt_index=0, completion_ids=[10, 99]),
        rollout(["a", "b"], prompt_index=1, prompt_text="another"),
    ]
    units = pair_units(before, after)
    assert [[own["prompt_index"] for own in unit.rollouts] for unit in units] == [[0, 0], [2, 2]]
    assert [unit.notes for unit in units] == [({1: "here the two part"},) * 2, ({2: "here the two part"},) * 2]
    same = pair_units(before[:1], [rollout(["a", "b"], prompt_index=0)])
    assert same[0].notes == ({}, {})


def test_a_row_that_a_step_holds_twice_has_two_partners() -> None:
    """As where one epoch ends and the next begins within a step, or rows are fewer than a batch."""
    before, after = ([rollout(["a"], completion_ids=[own]) for own in ids] for ids in ([1, 2], [3, 4, 5]))
    pairs = [[own["completion_ids"][0] for own in unit.rollouts] for unit in pair_units(before, after)]
    assert pairs == [[1, 3], [2, 4]]


def test_counted() -> None:
    assert counted([rollout(["a", "b"])]) == "1 rollouts, 2 tokens, reverse KL 0.5 nats per token on average."
    assert reverse_kl(rollout(["a"], teacher_logprobs=None)) == [None]


def test_two_hundred_rollouts_with_every_number_stay_below_two_megabytes(tmp_path: Path) -> None:
    units = [CreditUnit((own,)) for own in big_rollouts(200)]
    path = write_credit_page(units, tmp_path / "big.html", title="big")
    assert path.stat().st_size < 2_000_000

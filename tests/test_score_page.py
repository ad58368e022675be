"""Token credit in its packed form and on its page: every number comes back, and the page stays small."""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from big_pages import big_rollouts
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
from understudy.report.token_text import BytePiece, align, visible_text


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
    return {
        name: np.frombuffer(whole, dtype=kinds[kind], count=entries, offset=start).tolist()
        for name, (kind, start, entries) in form["columns"].items()
    }


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


def test_wide_columns_start_at_multiples_of_their_width() -> None:
    """A browser's typed arrays refuse anything else."""
    form = pack([rollout(["a", "b", "c"], advantages=[1.0, 2.0, 3.0], loss_mask=[True, True, False])], compress=False)
    assert {kind for kind, _, _ in form["columns"].values()} == {"f4", "u2", "u1"}
    assert all(start % int(kind[1]) == 0 for kind, start, _ in form["columns"].values())


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
    content = block(html, "rollouts")
    assert content["prompts"] == ["2 + 2?"]
    first, second = content["rollouts"]
    assert (first["kl"], first["reward"], first["finish"], first["prompt"]) == (1.0, 1.0, "stop", 0)
    assert (second["kl"], second["reward"], second["finish"]) == (None, None, "length")
    assert first["record"] == {"prompt_index": 3, "sample_index": 0, "task": "sums"}
    # Reverse KL 0, 1, 2: the last token forks most.
    assert re.findall(r'<a href="#(r\dt\d)">', html) == ["r0t2", "r0t1"]
    assert "Mean reverse KL by position" in html
    assert not re.search(r"<(link|img|iframe)\b|@import|url\(|<script src|https?://(?!www\.w3\.org)", html)


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


def test_counted() -> None:
    assert counted([rollout(["a", "b"])]) == "1 rollouts, 2 tokens, reverse KL 0.5 nats per token on average."
    assert reverse_kl(rollout(["a"], teacher_logprobs=None)) == [None]


def test_two_hundred_rollouts_with_every_number_stay_below_two_megabytes(tmp_path: Path) -> None:
    units = [CreditUnit((own,)) for own in big_rollouts(200)]
    path = write_credit_page(units, tmp_path / "big.html", title="big")
    assert path.stat().st_size < 2_000_000

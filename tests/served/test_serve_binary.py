"""Safetensors files in memory: there and back, and what is none."""

from __future__ import annotations

import pytest
import torch

from understudy.lm_head import LMHead
from understudy.serve.binary import digest, pack, pack_head, pack_hidden, unpack, unpack_head, unpack_hidden
from understudy.types import HiddenScores, TokenSequence


def test_heads_come_back_with_everything_that_makes_logits() -> None:
    weight, bias = torch.randn(6, 4), torch.randn(6)
    head, digest = unpack_head(pack_head(LMHead(weight, bias, softcap=30.0, scale=1 / 3, rows=5), "abc"))
    assert digest == "abc"
    assert torch.equal(head.weight, weight[:5])
    assert head.bias is not None
    assert torch.equal(head.bias, bias[:5])
    assert (head.softcap, head.scale, head.rows) == (30.0, 1 / 3, 5)
    plain, _ = unpack_head(pack_head(LMHead(weight.bfloat16()), "abc"))
    assert (plain.bias, plain.softcap, plain.scale, plain.rows) == (None, None, 1.0, 6)
    assert plain.weight.dtype == torch.bfloat16


def test_states_come_back_in_order_rounded_to_bfloat16() -> None:
    states = torch.randn(30, 4)
    parts = states.split([1] * 10 + [20])  # of one batch: they share their memory
    scores = [HiddenScores([-float(i)] * len(part), part) for i, part in enumerate(parts)]
    back, metadata = unpack_hidden(pack_hidden(scores, fingerprint="f", head="h", digests=["a", "b"]))
    assert metadata == {"fingerprint": "f", "head": "h", "digests": "a b"}
    assert [score.teacher_logprobs for score in back] == [score.teacher_logprobs for score in scores]
    assert torch.equal(torch.cat([score.teacher_hidden for score in back]), states.bfloat16())
    assert unpack_hidden(pack_hidden([], fingerprint="f", head="h"))[0] == []


@pytest.mark.parametrize("data", [b"", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"[:9], b"<html>" * 20, b"\xff" * 40])
def test_what_is_no_file_is_refused(data: bytes) -> None:
    for function in (unpack, unpack_hidden, unpack_head):
        with pytest.raises(ValueError, match=r"expected"):
            function(data)


def test_other_files_are_refused() -> None:
    one, two = torch.zeros(3), torch.zeros(3, 2)
    names = {"fingerprint": "f", "head": "h"}
    for tensors, metadata in (
        ({"logprobs.0": one}, names),
        ({"logprobs.0": one, "hidden.0": two}, {}),
        ({"logprobs.0": one, "hidden.1": two}, names),
        ({"logprobs.0": one, "hidden.0": two[:2]}, names),
        ({"logprobs.0": one, "hidden.0": one.clone()}, names),
    ):
        with pytest.raises(ValueError, match=r"expected logprobs"):
            unpack_hidden(pack(tensors, metadata))
    facts = {"head": "h", "scale": "1.0", "rows": "3"}
    for tensors, metadata in (
        ({"bias": one}, facts),
        ({"weight": one}, facts),
        ({"weight": two, "bias": two.clone()}, facts),
        ({"weight": two}, facts | {"rows": "4"}),
        ({"weight": two}, facts | {"scale": "x"}),
        ({"weight": two}, {"scale": "1.0", "rows": "3"}),
    ):
        with pytest.raises(ValueError, match=r"expected|could not convert"):
            unpack_head(pack(tensors, metadata))


def test_a_digest_tells_sequences_apart() -> None:
    sequences = [([1], [2, 3]), ([1, 2], [3]), ([1], [3, 2]), ([1, 2, 3], []), ([256], [2, 3])]
    assert len({digest(TokenSequence(*sequence)) for sequence in sequences}) == 5
    assert digest(TokenSequence([1], [2, 3])) == digest(TokenSequence((1,), (2, 3)))

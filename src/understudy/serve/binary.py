"""Tensors over HTTP: safetensors files in memory, with text metadata."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from understudy.lm_head import LMHead
from understudy.types import HiddenScores, TokenSequence


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, dict(metadata))


def unpack(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises ValueError when it is none."""
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        return tensors, json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"got {len(data)} bytes that are no safetensors file ({error}); expected one") from None


def digest(sequence: TokenSequence) -> str:
    """16 hex digits by which a score says which sequence it is of: replies may come back in another order."""
    parts = [array("q", ids).tobytes() for ids in (sequence.prompt_ids, sequence.completion_ids)]
    return hashlib.blake2b(b"".join([len(parts[0]).to_bytes(8, "little"), *parts]), digest_size=8).hexdigest()


def pack_hidden(scores: Sequence[HiddenScores], *, fingerprint: str, head: str, digests: Sequence[str] = ()) -> bytes:
    """``logprobs.<i>`` float32 [T] and ``hidden.<i>`` bfloat16 [T, H] per sequence, with the model's fingerprint, the
    hash of the head that goes with the states, and the sequences' digests."""
    tensors: dict[str, Tensor] = {}
    for i, score in enumerate(scores):
        tensors[f"logprobs.{i}"] = torch.tensor(score.teacher_logprobs, dtype=torch.float32)
        # A copy: parts of one batch share their memory, which the format does not allow.
        tensors[f"hidden.{i}"] = score.teacher_hidden.to(torch.bfloat16, copy=True)
    return pack(tensors, {"fingerprint": fingerprint, "head": head, "digests": " ".join(digests)})


def unpack_hidden(data: bytes) -> tuple[list[HiddenScores], dict[str, str]]:
    """What ``pack_hidden`` was given, and the metadata. Raises ValueError when the file is another one."""
    tensors, metadata = unpack(data)
    count = len(tensors) // 2
    try:
        pairs = [(tensors[f"logprobs.{i}"], tensors[f"hidden.{i}"]) for i in range(count)]
        whole = len(tensors) == 2 * count and {"fingerprint", "head"} <= metadata.keys()
    except KeyError:
        pairs, whole = [], False
    if not whole or any(p.dim() != 1 or h.dim() != 2 or len(p) != len(h) for p, h in pairs):
        raise ValueError(
            f"got tensors {sorted(tensors)[:4]} with metadata {sorted(metadata)}; expected logprobs.<i> [T] and "
            "hidden.<i> [T, H] with fingerprint and head"
        )
    return [HiddenScores(logprobs.tolist(), hidden) for logprobs, hidden in pairs], metadata


def pack_head(head: LMHead, digest: str) -> bytes:
    """``weight`` [V, H], the rows that count, and ``bias`` [V] where there is one; the rest in the metadata."""
    tensors = {"weight": head.weight[: head.vocab_size]}
    if head.bias is not None:
        tensors["bias"] = head.bias[: head.vocab_size]
    metadata = {"head": digest, "scale": repr(float(head.scale)), "rows": str(head.vocab_size)}
    if head.softcap is not None:
        metadata["softcap"] = repr(float(head.softcap))
    return pack(tensors, metadata)


def unpack_head(data: bytes) -> tuple[LMHead, str]:
    """The head and its hash. Raises ValueError when the file holds something else."""
    tensors, metadata = unpack(data)
    try:
        weight, bias = tensors["weight"], tensors.get("bias")
        softcap = float(metadata["softcap"]) if "softcap" in metadata else None
        head = LMHead(weight, bias, softcap, float(metadata["scale"]), int(metadata["rows"]))
        digest = metadata["head"]
    except KeyError as error:
        raise ValueError(f"got a file without {error}; expected weight, and head, scale and rows as metadata") from None
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"got a head's weight of shape {tuple(weight.shape)}; expected [V, H] and a bias [V] at most")
    return head, digest

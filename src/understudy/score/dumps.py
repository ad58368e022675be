"""Other toolkits' dumps -> records in the form of docs/credit.md. Which fields are read is a table there.

A reader takes one object of a file and gives the records it holds: lists over completion tokens, the prompt's beside
them. It computes nothing: what a dump does not hold stays away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from understudy.errors import ConfigError

Values = Mapping[str, Any]
Record = dict[str, Any]


def read_plain(values: Values) -> list[Record]:
    """A record of ours, or a row of `generate`: ``completion`` stands for ``completion_text``."""
    record = _known(values)
    if "completion" in record and "completion_text" not in record:
        record["completion_text"] = record.pop("completion")
    if "prompt" in record and "prompt_text" not in record:
        record["prompt_text"] = record.pop("prompt")
    return [record]


def read_trl(values: Values) -> list[Record]:
    """A batch of TRL's GRPO trainer (lists over completions, right-padded, with masks), what a ``rollout_func`` or the
    vLLM server returns, or a row of its table of completions (text alone)."""
    if "completion_ids" not in values:
        row = {"prompt_text": values["prompt"], "completion_text": values["completion"]}
        row |= {"step": values.get("step"), "reward": values.get("reward")}
        return [_known(row | {"advantage": values.get("advantage")})]
    count = len(values["completion_ids"])
    columns = {name: values.get(name) for name in (*_TRL, "prompt_ids", "prompt_mask", "completion_mask", "tool_mask")}
    records = []
    for i in range(count):
        own = {name: column[_prompt_of(column, i, count)] for name, column in columns.items() if column is not None}
        kept = _kept(own.get("completion_mask"), len(own["completion_ids"]))
        sampler = own.get("sampling_per_token_logps", own.get("old_per_token_logps", own.get("logprobs")))
        trainer = own.get("old_per_token_logps") if "sampling_per_token_logps" in own else None
        records.append(
            _known(
                {
                    "prompt_ids": _chosen(own.get("prompt_ids"), own.get("prompt_mask")),
                    "completion_ids": [own["completion_ids"][t] for t in kept],
                    "sampler_logprobs": _at(_numbers(sampler), kept),
                    "trainer_logprobs": _at(trainer, kept),
                    "teacher_logprobs": _at(own.get("teacher_per_token_logps"), kept),
                    "advantages": _at(_spread(own.get("advantages"), len(own["completion_ids"])), kept),
                    "loss_mask": _flags(_at(own.get("tool_mask"), kept)),
                    "prompt_index": i,
                }
            )
        )
    return records


_TRL = (
    "completion_ids",
    "sampling_per_token_logps",
    "old_per_token_logps",
    "logprobs",
    "teacher_per_token_logps",
    "advantages",
)


def read_verl(values: Values) -> list[Record]:
    """verl's batch (prompts padded on the left, responses on the right), or a row of its dump of generations (text
    alone)."""
    if "responses" not in values:
        row = {"prompt_text": values["input"], "completion_text": values["output"], "answer": values.get("gts")}
        return [_known(row | {"reward": values.get("score"), "step": values.get("step")})]
    records = []
    for i, response in enumerate(values["responses"]):
        prompt, attention = _row(values, "prompts", i), _row(values, "attention_mask", i)
        # attention_mask covers prompt and response; response_mask leaves what tools wrote out, and so may have holes.
        written = attention[-len(response) :] if attention else _row(values, "response_mask", i)
        kept = _kept(written, len(response))
        prompt_mask = attention[: -len(response)] if attention else None
        rewards = _at(_row(values, "token_level_scores", i), kept)
        rollout, old = _row(values, "rollout_log_probs", i), _row(values, "old_log_probs", i)
        records.append(
            _known(
                {
                    "prompt_ids": _chosen(prompt, prompt_mask),
                    "completion_ids": [response[t] for t in kept],
                    "sampler_logprobs": _at(rollout or old, kept),
                    "trainer_logprobs": _at(old, kept) if rollout else None,
                    "teacher_logprobs": _at(_row(values, "teacher_log_probs", i), kept),
                    "advantages": _at(_row(values, "advantages", i), kept),
                    "loss_mask": _flags(_at(_row(values, "response_mask", i), kept)),
                    "reward": sum(rewards) if rewards else None,
                    "prompt_index": i,
                }
            )
        )
    return records


def read_slime(values: Values) -> list[Record]:
    """slime's and miles' debug rollout data ({"rollout_id", "samples"}), or one sample of it."""
    if "samples" in values:
        step = values.get("rollout_id")
        return [record | {"step": step} for sample in values["samples"] for record in read_slime(sample)]
    length = int(values["response_length"])
    tokens = list(values["tokens"])
    prompt = values.get("prompt")
    reward = values.get("reward")
    status = values.get("status")
    return [
        _known(
            {
                "prompt_text": prompt if isinstance(prompt, str) else prompt[-1].get("content") if prompt else None,
                "prompt_ids": tokens[: len(tokens) - length],
                "completion_ids": tokens[len(tokens) - length :],
                "completion_text": values.get("response"),
                "sampler_logprobs": _last(values.get("rollout_log_probs"), length),
                "teacher_logprobs": _last(values.get("teacher_log_probs"), length),
                "loss_mask": _flags(_last(values.get("loss_mask"), length)),
                "reward": reward if isinstance(reward, int | float) else None,
                "answer": values.get("label"),
                "finish_reason": {"completed": "stop", "truncated": "length"}.get(str(status)),
                "prompt_index": values.get("group_index"),
                "sample_index": values.get("index"),
            }
        )
    ]


def read_prime_rl(values: Values) -> list[Record]:
    """prime-rl's training batch ({"examples": [...]}) or one training sample, as objects."""
    if "examples" in values:
        return [record | {"step": values.get("step")} for one in values["examples"] for record in read_prime_rl(one)]
    ids = list(values["completion_ids"])
    advantage = values.get("advantage")
    teacher = values.get("teacher_logprobs")
    if teacher is None:
        teacher = values.get("reference_logprobs")
    return [
        _known(
            {
                "prompt_ids": list(values["prompt_ids"]),
                "completion_ids": ids,
                "sampler_logprobs": list(values["completion_logprobs"]),
                # The reference marks prompt and completion in one list.
                "teacher_logprobs": _last(teacher, len(ids)),
                "advantages": None if advantage is None else [float(advantage)] * len(ids),
                "loss_mask": _flags(values.get("completion_mask")),
                "reward": values.get("reward"),
            }
        )
    ]


def read_tinker(values: Values) -> list[Record]:
    """A datum of the Tinker cookbook as JSON: targets are shifted by one, and the mask says which the policy wrote."""
    inputs = values["loss_fn_inputs"]
    first = [token for chunk in values["model_input"]["chunks"] for token in chunk["tokens"]][:1]
    targets, mask = (_tensor(inputs[name]) for name in ("target_tokens", "mask"))
    written = [t for t, own in enumerate(mask) if own]
    if not written:
        return []
    start, end = written[0], written[-1] + 1
    optional = {name: _tensor(inputs[name])[start:end] if name in inputs else None for name in ("advantages",)}
    return [
        _known(
            {
                "prompt_ids": first + [int(token) for token in targets[:start]],
                "completion_ids": [int(token) for token in targets[start:end]],
                # What an environment wrote between two turns has no log-probability of the policy.
                "sampler_logprobs": [
                    value if own else None
                    for value, own in zip(_tensor(inputs["logprobs"])[start:end], mask[start:end], strict=True)
                ],
                "advantages": optional["advantages"],
                "loss_mask": _flags(mask[start:end]),
            }
        )
    ]


READERS: Mapping[str, Callable[[Values], list[Record]]] = {
    "plain": read_plain,
    "trl": read_trl,
    "verl": read_verl,
    "slime": read_slime,
    "miles": read_slime,
    "prime-rl": read_prime_rl,
    "tinker": read_tinker,
}


def recognised(values: Values) -> str:
    """The format of an object by its fields; "plain" where it looks like none of the others."""
    names = values.keys()
    if {"model_input", "loss_fn_inputs"} <= names:
        return "tinker"
    if "samples" in names or {"tokens", "response_length"} <= names:
        return "slime"
    if "responses" in names or {"input", "output", "score"} <= names:
        return "verl"
    if "completion_logprobs" in names or "examples" in names:
        return "prime-rl"
    nested = isinstance(values.get("completion_ids"), Sequence) and any(
        isinstance(own, Sequence) for own in values["completion_ids"][:1]
    )
    return "trl" if nested or {"prompt", "completion", "advantage"} <= names else "plain"


def read_object(values: Values, *, form: str | None, where: str) -> list[Record]:
    """The records of one object. ``form``: a name in ``READERS``; None: recognised by its fields.

    Raises:
        ConfigError: a field is missing or of another shape.
    """
    name = form or recognised(values)
    try:
        return READERS[name](values)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ConfigError(
            where,
            got=f"an object with {', '.join(sorted(map(str, values))[:8])} ({type(error).__name__}: {error})",
            expected=f"the fields of a {name} dump that docs/credit.md lists",
            remedy="name its format with --format, or convert it to the plain form",
        ) from None


def _known(record: Values) -> Record:
    return {name: value for name, value in record.items() if value is not None}


def _row(values: Values, name: str, i: int) -> list[Any] | None:
    column = values.get(name)
    return None if column is None else list(column[i])


def _prompt_of(column: Sequence[Any], i: int, count: int) -> int:
    """Row ``i`` of a column; prompts that stand once for a whole group are shared out."""
    if count % len(column):
        raise ValueError(f"{len(column)} rows beside {count} completions")
    return i * len(column) // count


def _kept(mask: Sequence[Any] | None, length: int) -> list[int]:
    """The positions that are not padding."""
    return list(range(length)) if mask is None else [t for t, own in enumerate(mask[:length]) if own]


def _chosen(ids: Sequence[int] | None, mask: Sequence[Any] | None) -> list[int] | None:
    if ids is None or mask is None:
        return None if ids is None else list(ids)
    return [token for token, own in zip(ids, mask, strict=True) if own]


def _at(column: Sequence[Any] | None, positions: Sequence[int]) -> list[Any] | None:
    return None if column is None else [column[t] for t in positions]


def _spread(advantages: Any, length: int) -> Sequence[float] | None:
    """One advantage for a whole completion, at every token."""
    if advantages is None or isinstance(advantages, Sequence):
        return advantages
    return [float(advantages)] * length


def _numbers(logprobs: Sequence[Any] | None) -> list[float] | None:
    """One number per token; of lists of alternatives the first, which is the token's own."""
    if logprobs is None:
        return None
    return [own[0] if isinstance(own, Sequence) else own for own in logprobs]


def _last(column: Iterable[Any] | None, length: int) -> list[Any] | None:
    """The entries of the completion in a list that may cover the prompt too."""
    if column is None:
        return None
    values = list(column)
    if len(values) < length:
        raise ValueError(f"{len(values)} values for {length} completion tokens")
    return values[len(values) - length :]


def _flags(mask: Sequence[Any] | None) -> list[bool] | None:
    return None if mask is None else [bool(own) for own in mask]


def _tensor(value: Any) -> list[Any]:
    """A tensor as Tinker's JSON has it ({"data", "dtype", "shape"}), or a plain list."""
    return list(value["data"] if isinstance(value, Mapping) else value)

"""The off-policy loop: supervised fine-tuning on chats, prompt-completion pairs and documents."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from understudy.assembly import Parts
from understudy.config import RowsConfig, RunConfig
from understudy.errors import ConfigError
from understudy.metrics import update_metrics
from understudy.objectives import CrossEntropy
from understudy.optimizer_step import learning_rate_at
from understudy.prompts import check_embedded, render_messages, rows_from, with_system_prompt
from understudy.recorder import Recorder
from understudy.rows import Row, read_rows
from understudy.tokenization import ModelText
from understudy.types import TrainingExample
from understudy.updates import Updates

log = logging.getLogger("understudy")

# Of the orders that a mixed-in source is read in: larger than any epoch of [prompts], whose orders are others.
_MIX_SEED = 2**31


@dataclass(frozen=True)
class Examples:
    """What `sft` trains on: ``mixed_in`` makes up ``share`` of it (0: there is none)."""

    own: Sequence[TrainingExample]
    mixed_in: Sequence[TrainingExample] = ()
    share: float = 0.0
    shuffle: tuple[bool, bool] = (True, True)

    def at(self, step: int, batch_size: int, *, seed: int) -> list[TrainingExample]:
        """The examples of step ``step`` (0-based), a function of the arguments alone. Over all steps the share is
        exact to one sequence."""
        first, last = (math.floor(self.share * count * batch_size + 0.5) for count in (step, step + 1))
        mixed, start = last - first, step * batch_size - first
        own = rows_from(len(self.own), start, batch_size - mixed, seed=[seed], shuffle=self.shuffle[0])
        examples = [self.own[row] for row in own]
        if mixed:
            rows = rows_from(len(self.mixed_in), first, mixed, seed=[seed, _MIX_SEED], shuffle=self.shuffle[1])
            examples += [self.mixed_in[row] for row in rows]
        return examples


def supervised_loop(parts: Parts, examples: Examples, recorder: Recorder) -> None:
    """Cross-entropy on ``supervised.batch_size`` examples a step until ``optim.num_steps`` or a request to stop."""
    config, updates = parts.config, Updates(parts.trainer, parts.batching)
    for step in range(recorder.first_step, config.optim.num_steps):
        chosen = examples.at(step, config.supervised.batch_size, seed=config.seed)
        learning_rate = learning_rate_at(config.optim, step)
        update = updates.make(chosen, CrossEntropy(), learning_rate=learning_rate)
        recorder.record(step + 1, {"optim/learning_rate": learning_rate, **update_metrics(update)})
        if recorder.finish_step() == "stop":
            return


def load_examples(config: RunConfig, rows: Sequence[Row], model: ModelText, stop_ids: frozenset[int]) -> Examples:
    """``rows`` of [prompts] and those of [supervised.mix] as examples. Raises ConfigError naming file and line."""
    assert config.prompts is not None
    longest = config.supervised.max_tokens
    own = supervised_examples(rows, config.prompts, model, stop_ids, max_tokens=longest)
    mix = config.supervised.mix
    if mix is None:
        return Examples(own, shuffle=(config.prompts.shuffle, True))
    mixed_in = supervised_examples(read_rows(mix), mix, model, stop_ids, max_tokens=longest)
    return Examples(own, mixed_in, mix.share, (config.prompts.shuffle, True))


def supervised_examples(
    rows: Sequence[Row],
    config: RowsConfig,
    model: ModelText,
    stop_ids: frozenset[int],
    *,
    max_tokens: int | None = None,
) -> list[TrainingExample]:
    """Rows -> examples. Raises ConfigError naming file and line.

    {"prompt", "completion"}: the completion trains. {"messages"} ending with the assistant: its last message trains.
    {"text"}: every token but the first trains. Each ends with one of ``stop_ids``, which takes the place of another end
    token and is appended where the row does not bring one, but for rows that `generate` marked "length": a teacher's
    cut answer is no place to learn to stop.

    ``max_tokens``: the longest sequence, where that is less than the model's context.
    """
    examples: list[TrainingExample] = []
    num_skipped = 0
    longest = min(max_tokens or model.context_length, model.context_length)
    for row in rows:
        prompt_ids, completion_ids = _split(row, config, model)
        completion_ids = _ended(row, completion_ids, model, stop_ids)
        if not completion_ids:  # cut before it began
            num_skipped += 1
            continue
        check_embedded(row, [*prompt_ids, *completion_ids], model)
        if len(prompt_ids) + len(completion_ids) > longest:
            if config.over_long == "skip":
                num_skipped += 1
                continue
            if config.over_long == "split" and row.values.get("text") is not None:
                examples += _pieces([*prompt_ids, *completion_ids], longest)
                continue
            limit = f"the context of {model.name}" if longest == model.context_length else "supervised.max_tokens"
            raise row.error(
                f"{len(prompt_ids) + len(completion_ids)} tokens",
                f"at most {longest}, {limit}",
                'shorten the row, or set over_long to "skip", or to "split" for documents',
            )
        examples.append(_example(prompt_ids, completion_ids))
    if not examples:
        raise ConfigError(
            config.path,
            got="only rows that are too long",
            expected="at least one that fits",
            remedy="split the rows",
        )
    if num_skipped:
        log.info("%s: %d of %d rows left out, which do not fit %d tokens", config.path, num_skipped, len(rows), longest)
    return examples


def _example(prompt_ids: list[int], completion_ids: list[int]) -> TrainingExample:
    return TrainingExample(prompt_ids, completion_ids, [True] * len(completion_ids))


def _pieces(ids: list[int], longest: int) -> Iterator[TrainingExample]:
    """A document in sequences of at most ``longest`` tokens. Each begins with the token the last one ended with, so
    that every token but the document's first is predicted once."""
    for start in range(0, len(ids) - 1, longest - 1):
        yield _example(ids[start : start + 1], ids[start + 1 : start + longest])


def _split(row: Row, config: RowsConfig, model: ModelText) -> tuple[list[int], list[int]]:
    messages, text, prompt, completion = row.messages(), row.text("text"), row.text("prompt"), _completion(row)
    given = {
        name
        for name, value in (("messages", messages), ("text", text), ("prompt", prompt), ("completion", completion))
        if value is not None
    }
    if given not in ({"prompt", "completion"}, {"messages"}, {"messages", "completion"}, {"text"}):
        raise row.error(
            f"columns {sorted(row.values)}" if len(given) < 2 else f"both {' and '.join(map(repr, sorted(given)))}",
            'one of: "prompt" and "completion"; "messages", alone or with "completion"; "text"',
            'rename columns with prompts.columns; columns = {unused = "text"} puts one out of the way',
        )
    if text is not None:
        ids = model.encode(text)
        if len(ids) < 2:
            raise row.error(f"{len(ids)} tokens", "at least two: the first is never predicted", "drop the row")
        return ids[:1], ids[1:]
    if completion is None:
        return _split_messages(row, messages or [], config, model)
    prompt_ids = render_messages(row, messages, config, model) if messages else model.encode(prompt or "")
    return prompt_ids, model.encode_completion(completion)


def _completion(row: Row) -> str | None:
    """An answer may be empty where `generate` wrote it: its end token is what it says."""
    value = row.values.get("completion")
    if isinstance(value, str) and "finish_reason" in row.values:
        return value
    return row.text("completion")


def _split_messages(
    row: Row, messages: list[dict[str, str]], config: RowsConfig, model: ModelText
) -> tuple[list[int], list[int]]:
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise row.error(
            f"messages that end with {messages[-1]['role']!r}",
            "a user's message and the assistant's answer, to be trained on",
            "add the assistant's message",
        )
    prompt_ids = render_messages(row, messages[:-1], config, model)
    whole = model.render(
        with_system_prompt(messages, config.system_prompt),
        add_generation_prompt=False,
        template_kwargs=config.chat_template_kwargs,
    )
    if whole[: len(prompt_ids)] != prompt_ids or len(whole) == len(prompt_ids):
        raise row.error(
            "a chat template whose rendering of the conversation does not begin with that of its prompt",
            "the prompt's tokens as a prefix, so that the answer can be told apart",
            'give {"prompt", "completion"} rows instead, or fix chat_template_kwargs',
        )
    return prompt_ids, whole[len(prompt_ids) :]


def _ended(row: Row, completion_ids: list[int], model: ModelText, stop_ids: frozenset[int]) -> list[int]:
    """End with a stop id, and leave out the blanks that a template writes behind an end token.

    Raises ConfigError for text behind the end of an answer: it would never be written. A document may hold several.
    """
    own = model.tokenizer.eos_token_id
    ends = stop_ids | model.end_ids | ({own} if own is not None else frozenset())
    places = [place for place, token in enumerate(completion_ids) if token in ends]
    # Of several stop ids the tokenizer's own is what the model was taught to write.
    stop = own if own in stop_ids else min(stop_ids)
    end: int | None = None  # the first end token with nothing but blanks behind it
    for place in reversed(places):
        rest = [token for token in completion_ids[place + 1 :] if token not in ends]
        if model.tokenizer.decode(rest, skip_special_tokens=True).strip():
            break
        end = place
    if places and end != places[0] and row.values.get("text") is None:
        raise row.error(
            f"an answer that goes on after its end token {model.tokenizer.decode([completion_ids[places[0]]])!r}",
            "nothing after the end token: nothing exists there when the student writes",
            "split the row, or take the end token out of it",
        )
    if end is not None:
        last = completion_ids[end]
        return [*completion_ids[:end], last if last in stop_ids else stop]
    return completion_ids if row.values.get("finish_reason") == "length" else [*completion_ids, stop]

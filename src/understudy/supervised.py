"""The off-policy loop: supervised fine-tuning on chats, prompt-completion pairs and documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from understudy.assembly import Parts
from understudy.batching import micro_batches
from understudy.config import RowsConfig
from understudy.errors import ConfigError
from understudy.metrics import update_metrics
from understudy.objectives import CrossEntropy
from understudy.optimizer_step import learning_rate_at, optimizer_step
from understudy.prompts import batch_for_step, check_embedded, render_messages, with_system_prompt
from understudy.recorder import Recorder
from understudy.rows import Row
from understudy.tokenization import ModelText
from understudy.types import TrainingExample


def supervised_loop(parts: Parts, examples: Sequence[TrainingExample], recorder: Recorder) -> None:
    """Cross-entropy on ``supervised.batch_size`` examples a step until ``optim.num_steps`` or a request to stop."""
    config = parts.config
    shuffle = config.prompts is None or config.prompts.shuffle
    for step in range(recorder.first_step, config.optim.num_steps):
        rows = batch_for_step(len(examples), config.supervised.batch_size, seed=config.seed, step=step, shuffle=shuffle)
        batches = micro_batches([examples[row] for row in rows], **parts.batching)
        learning_rate = learning_rate_at(config.optim, step)
        update = optimizer_step(parts.trainer, batches, CrossEntropy(), learning_rate=learning_rate)
        if recorder.finish_step(step + 1, {"optim/learning_rate": learning_rate, **update_metrics(update)}) == "stop":
            return


def supervised_examples(
    rows: Iterable[Row], config: RowsConfig, model: ModelText, stop_ids: frozenset[int]
) -> list[TrainingExample]:
    """Rows -> examples. Raises ConfigError naming file and line.

    {"prompt", "completion"}: the completion trains. {"messages"} ending with the assistant: its last message trains.
    {"text"}: every token but the first trains. Each ends with one of ``stop_ids``, which takes the place of another end
    token and is appended where the row does not bring one, but for rows that `generate` marked "length": a teacher's
    cut answer is no place to learn to stop.
    """
    examples = []
    for row in rows:
        prompt_ids, completion_ids = _split(row, config, model)
        completion_ids = _ended(row, completion_ids, model, stop_ids)
        check_embedded(row, [*prompt_ids, *completion_ids], model)
        if len(prompt_ids) + len(completion_ids) > model.context_length:
            if config.over_long == "skip":
                continue
            raise row.error(
                f"{len(prompt_ids) + len(completion_ids)} tokens",
                f"at most {model.context_length}, the context of {model.name}",
                'shorten the row, or set prompts.over_long = "skip"',
            )
        examples.append(TrainingExample(prompt_ids, completion_ids, [True] * len(completion_ids)))
    if not examples:
        raise ConfigError(
            config.path,
            got="only rows that are too long",
            expected="at least one that fits",
            remedy="split the rows",
        )
    return examples


def _split(row: Row, config: RowsConfig, model: ModelText) -> tuple[list[int], list[int]]:
    messages, text, prompt, completion = (
        row.messages(),
        row.text("text"),
        row.text("prompt"),
        row.text("completion"),
    )
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

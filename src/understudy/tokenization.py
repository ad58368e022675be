"""Tokenizers of the roles: do ids mean the same tokens, what ends a completion, what a model reads for a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from understudy.errors import ConfigError, first_line
from understudy.model_files import ADAPTERS, adapter_base, check_sizes, unreadable
from understudy.time_limit import TimeIsUp, time_limit

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "*.model", "tekken.json")
# A template writes a conversation in a millisecond. It is a program, and may also count to a billion.
TEMPLATE_SECONDS = 5.0
# What it may write beside the messages: many times any list of tools, and tokenised in seconds.
_TEMPLATE_CHARACTERS = 1_000_000

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ModelText:
    """What a model's folder says about text, read without loading any weights. ``config``: transformers' own, of
    adapters their base's."""

    name: str
    tokenizer: Any
    vocab: Mapping[str, int]
    vocab_width: int
    end_ids: frozenset[int]
    context_length: int
    config: Any = None

    def render(
        self, messages: Messages, *, add_generation_prompt: bool, template_kwargs: Mapping[str, Any]
    ) -> list[int]:
        """Messages -> token ids by this model's own chat template. Raises ConfigError where it fails at them."""
        options = {"add_generation_prompt": add_generation_prompt, **template_kwargs}
        try:
            # First as text: a tokenizer cannot be interrupted, and must not be handed gigabytes.
            with time_limit(TEMPLATE_SECONDS):
                text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
            own = sum(len(str(value)) for message in messages for value in message.values())
            if len(text) > own + _TEMPLATE_CHARACTERS:
                raise ValueError(f"{len(text)} characters")
            encoded = self.tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)
            ids = list(encoded["input_ids"])
            if not all(isinstance(token, int) for token in ids):
                raise TypeError("something else than one list of token ids")
        except TimeIsUp:
            raise self._template_failed(f"no end after {TEMPLATE_SECONDS:g} seconds", messages) from None
        except Exception as error:  # a program that came with the model: it may raise anything
            raise self._template_failed(first_line(error), messages) from None
        return ids

    def _template_failed(self, got: str, messages: Messages) -> ConfigError:
        return ConfigError(
            f"chat template of {self.name}",
            got=f"{got}; for the messages {str(list(messages))[:200]!r}",
            expected="a template that writes these messages",
            remedy="change the row, chat_template_kwargs, or the template beside the tokenizer (chat_template.jinja)",
        )

    def encode(self, text: str) -> list[int]:
        """Plain text -> token ids, with the begin token where the tokenizer adds one."""
        ids = list(self.tokenizer(text)["input_ids"])
        # Some tokenizers end every text with their end token; a prompt that ends so could not be continued.
        while len(ids) > 1 and ids[-1] in self.end_ids:
            ids.pop()
        return ids

    def encode_completion(self, text: str) -> list[int]:
        """Text that continues a prompt -> token ids, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def stop_test(self, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
        """Whether a completion that had none of these strings one token ago has one now; None for no strings."""
        if not stop:
            return None
        # A token adds a byte or more; a few stand for nothing.
        tail = max(len(text.encode()) for text in stop) + 8
        return lambda ids: any(text in self.tokenizer.decode(list(ids[-tail:])) for text in stop)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Each id as the text it stands for, for people to read."""
        return [self.tokenizer.decode([token]) for token in ids]


def load_text(model: str, role: str, *, trust_remote_code: bool = False) -> ModelText:
    """Read a model's tokenizer and configuration. Raises ConfigError when they are not there, or cannot be used."""
    folder = Path(model)
    looks_local = folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1
    if folder.exists() or looks_local:
        base = adapter_base(folder)
        if base is None or (folder / "config.json").exists():
            _check_folder(folder, role)
        else:
            text = replace(load_text(base, role, trust_remote_code=trust_remote_code), name=model)
            if not _has_tokenizer(folder):
                return text
            return _with_own_tokenizer(text, folder, role, trust_remote_code=trust_remote_code)
    try:
        return _read_text(model, trust_remote_code)
    except Exception as error:  # files that people write, read by libraries that raise whatever comes to them
        raise unreadable(
            error,
            model,
            role,
            note="" if folder.exists() else "no such folder; as a hub id: ",
            expected="a folder written by save_pretrained (model and tokenizer), or a hub id that can be reached",
            remedy="check the path or id; save the tokenizer beside the model with tokenizer.save_pretrained(folder)",
        ) from None


def _read_text(model: str, trust_remote_code: bool) -> ModelText:
    from transformers import AutoConfig, GenerationConfig

    whole = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    tokenizer = _read_tokenizer(model, trust_remote_code)
    config = whole.get_text_config()
    try:
        end = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # no generation_config.json
        end = None
    end = end if end is not None else config.eos_token_id
    end = end if end is not None else tokenizer.eos_token_id
    ends = [] if end is None else list(end) if isinstance(end, list | tuple) else [end]
    context = getattr(config, "max_position_embeddings", None) or 2**31
    for name, values in (
        ("eos_token_id", ends),
        ("max_position_embeddings", [context]),
        ("vocab_size", [config.vocab_size]),
    ):
        if not all(type(value) is int and value >= 0 for value in values):
            raise ValueError(f"{name} = {values}, where whole numbers belong")
    return ModelText(model, tokenizer, tokenizer.get_vocab(), config.vocab_size, frozenset(ends), context, whole)


def _read_tokenizer(model: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    # Some settings are looked at only when it is used; no word is in every vocabulary.
    tokenizer.decode(tokenizer("")["input_ids"])
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


def _with_own_tokenizer(text: ModelText, folder: Path, role: str, *, trust_remote_code: bool) -> ModelText:
    """Adapters are often trained with another chat template than their base has, and keep it beside them."""
    try:
        tokenizer = _read_tokenizer(str(folder), trust_remote_code)
    except Exception as error:  # as in load_text
        raise unreadable(
            error,
            str(folder),
            role,
            expected="tokenizer files beside the adapters that transformers loads, or none",
            remedy="remove them to read the base model's tokenizer",
        ) from None
    return replace(text, tokenizer=tokenizer, vocab=tokenizer.get_vocab())


def _check_folder(folder: Path, role: str) -> None:
    if not folder.is_dir():
        raise ConfigError(
            f"{role} model {folder}",
            got="a file" if folder.exists() else "no such folder",
            expected="a folder written by save_pretrained, or a hub id like Qwen/Qwen3-8B-Base",
            remedy=f"check the path (working folder: {Path.cwd()}); a hub id without an owner, like gpt2, must be "
            "given as openai-community/gpt2",
        )
    if not (folder / "config.json").exists() and not (folder / ADAPTERS).exists():
        raise ConfigError(
            f"{role} model {folder}",
            got=f"a folder without config.json ({', '.join(sorted(p.name for p in folder.iterdir())[:5]) or 'empty'})",
            expected="a folder written by save_pretrained",
            remedy="point at the folder that holds config.json, for a run: runs/<name>/checkpoints/step_<n>",
        )
    if (folder / "config.json").exists():
        check_sizes(folder, role)
    # transformers would make an empty tokenizer of the model's type up.
    if not _has_tokenizer(folder):
        raise ConfigError(
            f"{role} model {folder}",
            got="a folder without a tokenizer",
            expected="tokenizer.json or another tokenizer file beside config.json",
            remedy="save the tokenizer there: tokenizer.save_pretrained(folder)",
        )


def check_same_tokens(student: ModelText, teacher: ModelText, *, role: str = "teacher") -> None:
    """Raise ConfigError unless every id means the same token to both, and stands for the same text. Widths may differ:
    padding rows mean nothing. ``role``: what errors call the second one."""
    if student.vocab == teacher.vocab:
        _check_same_texts(student, teacher, role)
        return
    tokens = sorted(student.vocab.keys() | teacher.vocab.keys(), key=lambda t: (student.vocab.get(t, 1 << 40), t))
    different = [t for t in tokens if student.vocab.get(t) != teacher.vocab.get(t)]
    shown = "; ".join(
        f"{t!r} is {student.vocab.get(t, 'absent')} for the student, {teacher.vocab.get(t, 'absent')} for the {role}"
        for t in different[:3]
    )
    raise ConfigError(
        f"tokenizers of student {student.name} and {role} {teacher.name}",
        got=f"{len(different)} of {len(tokens)} tokens differ: {shown}",
        expected=f"the same token-to-id map: the {role} scores the student's token ids",
        remedy=f"use a {role} of the student's model family, or train the student on its text with `understudy sft`",
    )


def _check_same_texts(student: ModelText, teacher: ModelText, role: str) -> None:
    """One map of tokens may be read by two decoders: completions that both read alike are the same to both."""
    ids = sorted(student.vocab.values())
    for start in range(0, len(ids), 256):
        part = ids[start : start + 256]
        if student.tokenizer.decode(part) == teacher.tokenizer.decode(part):
            continue
        for token in part:  # several may differ in how they are joined alone
            own, other = (text.tokenizer.decode([token]) for text in (student, teacher))
            if own != other:
                raise ConfigError(
                    f"tokenizers of student {student.name} and {role} {teacher.name}",
                    got=f"token {token} reads {own!r} for the student and {other!r} for the {role}",
                    expected=f"the same text: the {role} scores the student's token ids",
                    remedy=f"use one tokenizer for both: save the student's beside the {role}'s weights",
                )


def resolve_stop_ids(
    student: ModelText, teachers: Mapping[str, ModelText], configured: Sequence[int] | None
) -> frozenset[int]:
    """The ids that end a completion: the configured ones, else the end-of-text ids that all roles share.

    Raises ConfigError when none is known, when an id is outside the vocabulary, or when roles disagree: a base student
    under an instruct teacher would never be rewarded for its own end token, and its answers would grow without end.
    """
    if configured is not None:
        largest = max(student.vocab.values())
        if not configured or min(configured) < 0 or max(configured) > largest:
            raise ConfigError(
                "sampling.stop_token_ids",
                got=str(list(configured)),
                expected=f"at least one id from 0 to {largest}",
                remedy="look ids up with tokenizer.convert_tokens_to_ids",
            )
        return frozenset(configured)
    if not student.end_ids:
        raise ConfigError(
            f"student model {student.name}",
            got="no end-of-text id in its generation_config, config or tokenizer",
            expected="a token that ends a completion",
            remedy="set sampling.stop_token_ids = [...]",
        )
    for name, teacher in teachers.items():
        if teacher.end_ids != student.end_ids:
            raise ConfigError(
                f"end-of-text of student {student.name} and teacher {name} ({teacher.name})",
                got=f"student {_named(student, student.end_ids)}, teacher {_named(teacher, teacher.end_ids)}",
                expected="the same end-of-text ids",
                remedy="say what ends a completion, e.g. sampling.stop_token_ids = "
                f"{sorted(teacher.end_ids or student.end_ids)} "
                "(usually the teacher's, and a student that can write it: fine-tune it on the teacher's format first)",
            )
    return student.end_ids


def _named(text: ModelText, ids: frozenset[int]) -> str:
    return ", ".join(f"{i} {text.tokenizer.decode([i])!r}" for i in sorted(ids)) or "none"

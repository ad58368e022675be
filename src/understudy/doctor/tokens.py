"""Do ids mean the same to everybody, what ends a completion, and what else stands at the ends of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.doctor.findings import Check, Found, shown
from understudy.model_files import adapter_base
from understudy.tokenization import ModelText, check_same_tokens

if TYPE_CHECKING:
    from understudy.doctor.case import Case
    from understudy.types import TrainingExample

# What tokenizers treat differently: blanks, digits, code, accents, scripts without spaces or from right to left, signs
# of several code points, markup.
PROBES = (
    "Hello, world!",
    "  two  blanks,\ta tab\nand a line",
    "1234567890 3.14159 1,000,000",
    "def f(x):\n    return {'a': x**2}  # ok",
    "Grüße, señor — naïve café",
    "Привет, мир",
    "你好，世界。こんにちは世界",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "👩‍🚀 🧪",
    "\\frac{a}{b} = \\sqrt{2} <b>&amp;</b>",
)
_TEXTS = 32  # of the run's own rows
_NO_END = 'write "eos_token_id" into its generation_config.json'
_Ends = Mapping[str, frozenset[int]]


def token_map(case: Case) -> Iterator[Found]:
    """Every id means the same token to all roles."""
    student = case.student
    for role, other in [*_others(case)]:
        if case.checked is None:  # else it has been looked at, and a large vocabulary takes its time
            check_same_tokens(student, other, role=role.partition(" ")[0])
        ids = sorted(student.vocab.values())
        example = ids[len(ids) // 2]
        yield Found(
            "pass",
            f"{len(ids)} ids mean the same to the student and {role}, e.g. {example} {student.tokens([example])[0]!r}",
            {"ids": len(ids)},
        )


def _others(case: Case) -> Iterator[tuple[str, ModelText]]:
    """Everybody who marks the student's ids."""
    for name in case.teacher_names:
        yield f"teacher {name}", case.teacher(name)
    if case.reference is not None:
        yield "reference", case.reference


def widths(case: Case) -> Iterator[Found]:
    """Rows of the embeddings against ids of the tokenizers."""
    found = {role: text.vocab_width for role, text in case.texts.items()}
    largest = max(case.student.vocab.values())
    narrow = {role: width for role, width in found.items() if width <= largest}
    listed = ", ".join(f"{role} {width}" for role, width in found.items())
    numbers = {"widths": found, "largest_id": largest}
    if narrow:
        role = min(narrow, key=lambda r: narrow[r])
        beyond = sorted(i for i in case.student.vocab.values() if i >= narrow[role])
        example = case.student.tokens(beyond[:3])
        evidence = (
            f"{len(beyond)} tokens have no embedding in {role}: ids {beyond[0]} to {beyond[-1]}, {shown(example)}"
        )
        yield Found("warn", f"{evidence}; embeddings: {listed}", numbers)
        return
    padding = min(found.values()) - largest - 1
    yield Found("pass", f"embeddings: {listed}; largest id {largest}, {padding} rows mean nothing and are cut", numbers)


def round_trips(case: Case) -> Iterator[Found]:
    """Probe texts and the run's own texts, to ids and back."""
    student, texts, split = case.student, _own_texts(case), False
    for role, other in _others(case):
        for probe in [*PROBES, *texts]:
            one, two = _encoded(student, probe), _encoded(other, probe)
            if one != two:
                evidence = (
                    f"{probe[:60]!r} is {_length(one)} for the student and {_length(two)} for {role}\n"
                    f"student: {_shown(student, one)}\n{role}: {_shown(other, two)}"
                )
                yield Found("warn", evidence, {"probe": probe})
                split = True
                break
    whole = sum(_comes_back(student, probe) for probe in PROBES)
    lost = [text for text in texts if not _comes_back(student, text)]
    numbers = {"probes": len(PROBES), "whole": whole, "texts": len(texts), "lost": len(lost)}
    if lost:
        back = _encoded(student, lost[0])
        said = "no tokens for it" if back is None else repr(student.tokenizer.decode(back)[:60])
        evidence = f"{len(lost)} of {len(texts)} of the rows' texts change on the way to tokens and back"
        yield Found("warn", f"{evidence}\n{lost[0][:60]!r} becomes {said}", numbers)
        return
    if split:
        return
    yield Found(
        "pass",
        f"all of {len(texts)} of the rows' texts, and {whole} of {len(PROBES)} probes in many scripts, come back as "
        "they were, and are the same ids to all",
        numbers,
    )


def _own_texts(case: Case) -> list[str]:
    texts = [prompt.text for prompt in case.prompts[:_TEXTS]]
    for row in case.rows[:_TEXTS]:
        texts += [value for key in ("prompt", "text", "completion") if isinstance(value := row.values.get(key), str)]
    return [text for text in texts if text][:_TEXTS]


def _encoded(text: ModelText, words: str) -> list[int] | None:
    """Token ids; None where the vocabulary has none for it."""
    try:
        ids = text.encode_completion(words)
    except Exception:  # tokenizers raises nothing narrower for a word that a closed vocabulary does not have
        return None
    unknown = text.tokenizer.unk_token_id
    return None if unknown is not None and unknown in ids else ids


def _comes_back(text: ModelText, words: str) -> bool:
    """Up to blanks, which some tokenizers tidy."""
    ids = _encoded(text, words)
    return ids is not None and "".join(text.tokenizer.decode(ids).split()) == "".join(words.split())


def _length(ids: Sequence[int] | None) -> str:
    return "unknown" if ids is None else f"{len(ids)} tokens"


def _shown(text: ModelText, ids: Sequence[int] | None) -> str:
    return "no tokens for it" if ids is None else shown(text.tokens(ids), most=12)


def ends(case: Case) -> Iterator[Found]:
    """What ends a completion, and who can write it."""
    stop_ids = case.stop_ids
    configured = case.config.sampling.stop_token_ids is not None
    sources = {role: end_sources(text) for role, text in case.texts.items()}
    listed = "\n".join(f"{role}: {_sources(case.texts[role], own)}" for role, own in sources.items())
    numbers = {
        "stop_ids": sorted(stop_ids),
        "ends": {role: {name: sorted(ids) for name, ids in own.items()} for role, own in sources.items()},
    }
    said = f"a completion ends with {_named(case.student, stop_ids)}"
    for role, text in case.texts.items():
        own = text.tokenizer.eos_token_id
        if not configured and own is not None and own not in text.end_ids:
            evidence = f"{said}, but the tokenizer of {role} ends texts with {_named(text, frozenset([own]))}\n{listed}"
            yield Found("warn", evidence, numbers, f"sampling.stop_token_ids = {sorted(stop_ids | {own})}")
            return
        if role != "student" and not stop_ids & text.end_ids:
            evidence = f"{said}; {role} never ends a text so, but with {_named(text, text.end_ids)}\n{listed}"
            remedy = f"sampling.stop_token_ids = {sorted(stop_ids | text.end_ids)}" if text.end_ids else _NO_END
            yield Found("warn", evidence, numbers, remedy)
            return
    yield Found("pass", f"{said}\n{listed}", numbers)


def end_sources(text: ModelText) -> _Ends:
    """The end tokens by who names them: tokenizer, config, generation_config."""
    from transformers import GenerationConfig

    folder = Path(text.name)
    base = None if (folder / "config.json").exists() else adapter_base(folder)
    config = text.config.get_text_config()
    try:
        generation = GenerationConfig.from_pretrained(base or text.name).eos_token_id
    except OSError:  # no generation_config.json
        generation = None
    named = {
        "tokenizer": text.tokenizer.eos_token_id,
        "config": config.eos_token_id,
        "generation_config": generation,
    }
    return {name: _as_set(ids) for name, ids in named.items()}


def _as_set(ids: int | Sequence[int] | None) -> frozenset[int]:
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def _sources(text: ModelText, own: _Ends) -> str:
    return "; ".join(f"{name} {_named(text, ids)}" for name, ids in own.items())


def _named(text: ModelText, ids: frozenset[int]) -> str:
    return ", ".join(f"{i} {text.tokens([i])[0]!r}" for i in sorted(ids)) or "none"


def special(case: Case) -> Iterator[Found]:
    """End tokens that a grader would read as text."""
    student = case.student
    known = frozenset(student.tokenizer.all_special_ids)
    plain = {i for i in case.stop_ids - known if student.tokens([i])[0].strip()}
    numbers = {"special": len(known), "plain_ends": sorted(plain)}
    if plain:
        evidence = f"{_named(student, frozenset(plain))} ends completions and is no special token of the student"
        yield Found("warn", f"{evidence}: graders and pages read it as part of the answer", numbers)
        return
    named = _named(student, known if len(known) <= 6 else frozenset(sorted(known)[:6]))
    yield Found("pass", f"{len(known)} special tokens, those that end completions among them: {named}", numbers)


def padding(case: Case) -> Iterator[Found]:
    """Padding tokens among those that end a completion."""
    pads = {role: text.tokenizer.pad_token_id for role, text in case.texts.items()}
    trapped = {role: pad for role, pad in pads.items() if pad in case.stop_ids and pad not in case.texts[role].end_ids}
    numbers = {"pads": pads}
    if trapped:
        role, pad = next(iter(trapped.items()))
        text = case.texts[role]
        evidence = (
            f"{_named(text, frozenset([pad]))} ends completions and is only padding to {role}, which ends texts with "
            f"{_named(text, text.end_ids)}"
        )
        trap = set(trapped.values())
        better = sorted(case.stop_ids - trap or text.end_ids - trap)
        yield Found("warn", evidence, numbers, f"sampling.stop_token_ids = {better}" if better else None)
        return
    same = sorted(role for role, pad in pads.items() if pad in case.stop_ids)
    listed = ", ".join(f"{role} {_named(case.texts[role], _as_set(pad))}" for role, pad in pads.items())
    note = (
        f"; the end token of {' and '.join(same)} too, which is harmless here: masks come from lengths" if same else ""
    )
    yield Found("pass", f"padding: {listed}{note}", numbers)


def begins(case: Case) -> Iterator[Found]:
    """Begin tokens that stand twice, or not at all."""
    for role, text in case.texts.items():
        bos = text.tokenizer.bos_token_id
        if bos is None:
            yield Found("pass", f"{role} has no begin token", {"role": role})
            continue
        read = _read(case, role)
        doubled = [ids for ids in read if list(ids[:2]) == [bos, bos]]
        adds = list(text.tokenizer("")["input_ids"])[:1] == [bos]
        bare = [ids for ids in read if adds and ids[0] != bos]
        numbers = {"role": role, "rows": len(read), "doubled": len(doubled), "missing": len(bare)}
        named = _named(text, frozenset([bos]))
        if doubled:
            evidence = f"{len(doubled)} of {len(read)} rows begin with {named} twice for {role}"
            remedy = "take the begin token out of the rows or of the chat template: the tokenizer adds it"
            yield Found("warn", f"{evidence}\n{shown(text.tokens(doubled[0]))}", numbers, remedy)
        elif bare:
            evidence = f"{len(bare)} of {len(read)} rows lack {named}, which the tokenizer of {role} begins texts with"
            remedy = 'write the begin token into the chat template, or into the rows\' "teacher_prompt"'
            yield Found("warn", f"{evidence}\n{shown(text.tokens(bare[0]))}", numbers, remedy)
        else:
            yield Found("pass", f"{len(read)} rows, none with {named} twice for {role}", numbers)


def _read(case: Case, role: str) -> list[Sequence[int]]:
    """What a role reads of the rows."""
    if not case.on_policy:
        return [example.prompt_ids if len(example.prompt_ids) > 1 else _joined(example) for example in case.examples]
    if role == "student":
        return [prompt.prompt_ids for prompt in case.prompts]
    name = role.partition(" ")[2]
    return [
        prompt.prompt_ids if prompt.teacher_prompt_ids is None else prompt.teacher_prompt_ids
        for prompt in case.prompts
        if prompt.teacher == name
    ]


def _joined(example: TrainingExample) -> Sequence[int]:
    """Of a document the first token alone is a prompt."""
    return [*example.prompt_ids, *example.completion_ids]


CHECKS = (
    Check(
        "tokens.map",
        token_map,
        "fails when an id means another token, or another text, to the teacher or the reference",
        "the teacher marks the student's token ids: where they mean something else, its marks are of another text",
        "use a teacher of the student's model family; or train the student on its text with `understudy sft`",
        fast=True,
    ),
    Check(
        "tokens.widths",
        widths,
        "warns when the tokenizer knows ids that a model has no embedding for",
        "embeddings are padded to round sizes; what lies beyond the tokenizer's ids means nothing and is cut, what "
        "lies beyond the embedding cannot be read",
        "resize the embeddings, or use the tokenizer that belongs to the model",
        fast=True,
    ),
    Check(
        "tokens.round_trips",
        round_trips,
        "warns when a probe text is other ids to another role, or one of the rows' first texts does not come back",
        "one map of tokens may be used by two ways of splitting text: the teacher then marks splits it never saw",
        "save the student's tokenizer beside the teacher's weights: tokenizer.save_pretrained(\"teacher\")",
        fast=True,
    ),
    Check(
        "tokens.ends",
        ends,
        "fails when roles end texts with different tokens; warns when a tokenizer ends texts with another token than "
        "its generation_config, or the teacher never ends a text with one of sampling.stop_token_ids",
        "a student is rewarded for its end token only where the teacher ends texts so: else answers grow without end",
        "sampling.stop_token_ids = [...], the teacher's end tokens",
        fast=True,
    ),
    Check(
        "tokens.special",
        special,
        "warns when an end token is no special token of the student's tokenizer",
        "special tokens are left out of what graders read; others stay in the answer",
        'tokenizer.add_special_tokens({"additional_special_tokens": [...]}), and save the tokenizer again',
        fast=True,
    ),
    Check(
        "tokens.padding",
        padding,
        "warns when a stop token is a role's padding and not one of its end tokens",
        "what a model only knows as padding it never writes, and its marks there are noise",
        "sampling.stop_token_ids = [...], tokens with which every role ends its texts, without the padding token",
        fast=True,
    ),
    Check(
        "tokens.begins",
        begins,
        "warns when a row begins with a begin token twice, or lacks one that the role's tokenizer writes",
        "a model that reads a begin token twice, or none, reads what it was not trained on",
        "take the begin token out of rows that are text, or write rows as messages",
        fast=True,
    ),
)

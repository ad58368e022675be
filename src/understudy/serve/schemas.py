"""Requests and replies of the server, as pydantic models: what is checked, and what the OpenAPI document says."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# Wide enough for every vocabulary; the model's own width is checked later.
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# fail_fast: of a long list of the wrong kind one error is enough.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopText = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Request(BaseModel):
    """JSON types are taken as they are, and unknown fields are refused: a misspelt one must not be ignored."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    model: str | None = None
    """The served model's name; may be left out."""


class NotOffered(BaseModel):
    """Fields of vLLM's that change what is written or said; taken only with the value that changes nothing."""

    stream: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=0)] | None = None
    allowed_token_ids: Annotated[list[int], Field(max_length=0)] | None = None
    bad_words: Annotated[list[str], Field(max_length=0)] | None = None
    truncate_prompt_tokens: None = None


class CompletionRequest(Request, NotOffered):
    """``POST /v1/completions``."""

    prompt: Annotated[
        Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
        | TokenIds
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | str,
        Field(union_mode="left_to_right"),
    ]
    """Text, several texts, token ids, or several lists of them."""
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = 16
    """0: write nothing; for echo and prompt_logprobs."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    """0: the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = 0
    """0 or -1: off."""
    seed: Seed | None = None
    """The same seed, the same completions. Absent: drawn anew."""
    n: Annotated[int, Field(ge=1, lt=2**31)] | None = 1
    """Completions per prompt."""
    stop: StopText | list[StopText] | None = None
    """Texts that end a completion; not part of its text."""
    stop_token_ids: list[TokenId] | None = None
    """Token ids that end a completion, beside the model's own."""
    ignore_eos: bool | None = False
    """Write on after the model's end token."""
    logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Log-probabilities at temperature 1 of every token written, and of so many alternatives."""
    prompt_logprobs: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """The same for the prompt's tokens, with ranks; -1: the whole vocabulary."""
    echo: bool | None = False
    """Repeat the prompt in the text and, with logprobs, in these."""
    return_token_ids: bool | None = False
    """Add token_ids and prompt_token_ids."""
    add_special_tokens: bool | None = True
    """Whether text prompts get the tokenizer's begin token."""
    skip_special_tokens: bool | None = True
    """Leave special tokens out of the text."""
    user: str | None = None
    """Ignored."""


class ScoredSequence(BaseModel):
    """A prompt and the completion to score."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt_ids: TokenIds
    completion_ids: TokenIds


ChosenIds = Annotated[
    list[Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]], Field(min_length=1, fail_fast=True)
]


class ScoreRequest(Request):
    """``POST /v1/score``."""

    sequences: Annotated[list[ScoredSequence], Field(min_length=1, fail_fast=True)]
    kind: Literal["sampled", "topk", "chosen", "hidden"] = "sampled"
    """sampled: each completion token's log-probability; topk: the likeliest alternatives too; chosen: those of ids;
    hidden: the states that the tokens are predicted from, as a safetensors file."""
    topk: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Alternatives per position; for kind topk."""
    ids: ChosenIds | None = None
    """Token ids [sequence][position][k]; for kind chosen."""


class TokenizeRequest(Request):
    """``POST /tokenize``."""

    prompt: str
    add_special_tokens: bool | None = True


class DetokenizeRequest(Request):
    """``POST /detokenize``."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's form."""

    error: ErrorBody


class HealthReply(BaseModel):
    status: str


class VersionReply(BaseModel):
    version: str


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int
    fingerprint: str
    max_logprobs: int
    vocab_size: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelEntry]


class TokenizeReply(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeReply(BaseModel):
    prompt: str


class Score(BaseModel):
    digest: str
    logprobs: list[float]
    ids: list[list[int]] | None = None
    topk_logprobs: list[list[float]] | None = None


class ScoreReply(BaseModel):
    model: str
    fingerprint: str
    scores: list[Score]


class PromptLogprob(BaseModel):
    logprob: float
    rank: int
    decoded_token: str


class Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    logprobs: Logprobs | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionReply(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage

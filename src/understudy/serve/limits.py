"""What one request may ask, given the model and the settings."""

from __future__ import annotations

from collections.abc import Sequence

from understudy.serve.engine import Engine
from understudy.serve.replies import ApiError, bad_request
from understudy.serve.settings import REPLY_NUMBERS, REQUEST_TOKENS, ServeSettings


class Limits:
    """Each check raises ApiError."""

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        self.context = engine.context
        self.vocab_size = engine.vocab_size
        self.max_logprobs = engine.vocab_size if settings.max_logprobs == -1 else settings.max_logprobs
        # A context that the model does not bound (2**31) is no reason to take requests of any length.
        longest = engine.context if engine.context < 2**31 else 0
        self.max_tokens = settings.max_request_tokens or max(REQUEST_TOKENS, longest)
        self.max_sequences = settings.max_request_sequences

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Ids of the vocabulary."""
        if ids and max(ids) >= self.vocab_size:
            raise bad_request(
                f"{param}: got token id {max(ids)}; expected 0 to {self.vocab_size - 1}, the model's vocabulary",
                param=param,
                code="token_out_of_vocabulary",
            )

    def check_length(self, prompt: int, completion: int) -> None:
        """Prompt and completion fit the context."""
        if prompt + completion > self.context:
            raise bad_request(
                f"this model's maximum context length is {self.context} tokens; got {prompt} of prompt and "
                f"{completion} of completion; shorten one of them",
                code="context_length_exceeded",
            )

    def check_alternatives(self, k: int, param: str) -> None:
        """Alternatives per position."""
        if k > self.max_logprobs:
            raise bad_request(
                f"{param}: got {k}; this server gives {self.max_logprobs} alternatives at most (--max-logprobs)",
                param=param,
                code="too_many_logprobs",
            )

    def check_size(self, sequences: int, tokens: int, numbers: int) -> None:
        """Sequences, tokens and numbers (``numbers`` per token) of a request and its reply; 413."""
        reason = None
        if sequences > self.max_sequences:
            reason = f"got {sequences} sequences; at most {self.max_sequences} (--max-request-sequences)"
        elif tokens > self.max_tokens:
            reason = f"got {tokens} tokens; at most {self.max_tokens} (--max-request-tokens)"
        elif tokens * numbers > REPLY_NUMBERS:
            reason = f"got {tokens} tokens with {numbers} numbers each; at most {REPLY_NUMBERS} numbers in a reply"
        if reason is not None:
            raise ApiError(413, f"{reason}; send several smaller requests", code="request_too_large")

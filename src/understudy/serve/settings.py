"""What the server allows."""

from __future__ import annotations

from pydantic import Field

from understudy.config_base import Section

# A request may hold so many tokens where --max-request-tokens says nothing, or the model's context if that is longer.
REQUEST_TOKENS = 65536
# Numbers in a JSON reply: about 20 bytes each.
REPLY_NUMBERS = 2**22
# How long a client may take to send a request's body.
BODY_SECONDS = 60.0


class ServeSettings(Section):
    """Limits, and what is logged."""

    max_logprobs: int = Field(default=128, ge=-1)
    """Alternatives per position at most, in every route; -1: the whole vocabulary."""
    max_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens, padding included, that go through the model at once. Absent: 2048 on a CPU, 16384 elsewhere."""
    max_batch_sequences: int = Field(default=256, ge=1)
    """Sequences that are scored together. 1: each alone, so that no reply depends on its neighbours."""
    max_request_sequences: int = Field(default=1024, ge=1)
    """Sequences, or prompts times n, in one request; more are refused (413)."""
    max_request_tokens: int | None = Field(default=None, ge=1)
    """Tokens in one request, those to be written included; more are refused (413). Absent: 65536, or the context."""
    max_body_bytes: int = Field(default=2**26, ge=1)
    """A request's body; a longer one is refused (413)."""
    max_queued_sequences: int = Field(default=8192, ge=1)
    """Sequences that may wait; a request beyond them is refused (429), unless nothing else waits."""
    request_seconds: float = Field(default=600.0, gt=0)
    """After this long a request is given up (503)."""
    grace_seconds: float = Field(default=30.0, ge=0)
    """How long requests may go on after SIGTERM or Ctrl-C."""
    log_prompts: bool = False
    """Write what was asked, text or token ids, to the log."""

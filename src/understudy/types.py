"""The data that travels through a step: one frozen dataclass per hop.

Per-token sequences cover **completion tokens only**: entry ``t`` belongs to ``completion_ids[t]``. The end-of-text
token is a completion token and trains; nothing exists after it. Log-probabilities are natural logarithms (nats),
float32.

    Prompt -> Rollout -> ScoredRollout -> TrainingExample -> Batch -> LossOutput
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length"]
ScoreKind = Literal["sampled", "topk", "chosen", "hidden"]


@dataclass(frozen=True)
class Prompt:
    """A question, tokenised as the student reads it.

    ``index`` is the row's identity in its source; a rollout's randomness derives from it. ``teacher`` names the teacher
    that marks the answer. ``teacher_prompt_ids`` is what that teacher reads instead of ``prompt_ids`` (another
    template, privileged context); ``None`` means the same tokens.
    """

    index: int
    prompt_ids: Sequence[int]
    text: str
    task: str = "default"
    answer: str | None = None
    teacher: str = "default"
    teacher_prompt_ids: Sequence[int] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and a completion, the thing a teacher is asked to score."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]


@dataclass(frozen=True)
class Rollout:
    """One answer sampled by the student, with the log-probability it had for every token when it wrote it.

    ``finish_reason`` is ``"stop"`` (the last token is an end token) or ``"length"`` (cut at the cap; no end token is
    invented). ``sampler_logprobs[t]`` is taken at the sampling temperature, before any top-p or top-k truncation.
    """

    prompt: Prompt
    completion_ids: Sequence[int]
    sampler_logprobs: Sequence[float]
    finish_reason: FinishReason
    policy_version_start: int
    policy_version_end: int

    def __post_init__(self) -> None:
        if len(self.completion_ids) != len(self.sampler_logprobs):
            raise ValueError(
                f"rollout of prompt {self.prompt.index}: got {len(self.sampler_logprobs)} sampler_logprobs for "
                f"{len(self.completion_ids)} completion tokens; expected one per token"
            )


@dataclass(frozen=True)
class SampledScores:
    """The teacher's log-probability of every token the student wrote: ``teacher_logprobs`` [T]."""

    teacher_logprobs: Sequence[float]


@dataclass(frozen=True)
class TopkScores:
    """``SampledScores`` plus alternatives per position: ``ids`` [T, k] and their ``logprobs`` [T, k], best first."""

    teacher_logprobs: Sequence[float]
    ids: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]


@dataclass(frozen=True)
class HiddenScores:
    """``SampledScores`` plus the teacher's last hidden states [T, H], from which its LM head gives every token's logit.

    Enough for full-vocabulary objectives at H instead of V numbers per token. Kept on the CPU: a step's worth of them
    would fill a device.
    """

    teacher_logprobs: Sequence[float]
    teacher_hidden: Tensor


Scores = SampledScores | TopkScores | HiddenScores


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with the teacher's marks (``None``: no teacher, as in outcome-reward RL), its reward (``None``:
    ungraded) and the reference model's marks (``None``: no reference)."""

    rollout: Rollout
    scores: Scores | None
    reward: float | None
    reference: Scores | None = None


@dataclass(frozen=True)
class TrainingExample:
    """What one sequence teaches. ``None`` means the objective has no such signal.

    ``sampler_logprobs`` and ``advantages`` [T] feed a policy loss; ``teacher_hidden`` [T, H] feeds a full-vocabulary
    divergence against ``teacher``'s head, ``reference_hidden`` one against the reference's; ``topk_ids`` and
    ``topk_logprobs`` [T, K] are the teacher's. With none of them, the example is supervised (cross-entropy on its
    completion). ``weights`` [T] multiply each token's loss.
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    loss_mask: Sequence[bool]
    sampler_logprobs: Sequence[float] | None = None
    advantages: Sequence[float] | None = None
    teacher_hidden: Tensor | None = None
    teacher: str = "default"
    reference_hidden: Tensor | None = None
    topk_ids: Sequence[Sequence[int]] | None = None
    topk_logprobs: Sequence[Sequence[float]] | None = None
    weights: Sequence[float] | None = None


@dataclass(frozen=True)
class Continuation:
    """Completions of like length that continue prompts which have been through the model: ``input_ids`` [B, L], padded
    on the right, and for each the number of its prompt: ``rows`` [B]."""

    input_ids: Tensor
    rows: Tensor


@dataclass(frozen=True)
class SharedPrompts:
    """Several completions to a prompt, which goes through the model once. The batch's rows are prompts padded on the
    left: ``attention_mask`` [G, P]."""

    attention_mask: Tensor
    continuations: Sequence[Continuation]


@dataclass(frozen=True)
class Batch:
    """A micro-batch. ``input_ids`` [B, L] goes through the model; the rest is flat over its N completion tokens.

    ``token_index`` [N] points into the flattened [B * L] hidden states: entry n is the position that *predicts*
    ``target_ids[n]``. With ``shared`` prompts, the rows are prompts alone, and ``token_index`` points into their hidden
    states followed by those of each continuation, flattened. ``position_ids``
    [1, L] is given for packed rows (several sequences in one row) only. ``sequence_tokens`` counts prompts and
    completions, padding left out; ``num_sequences`` counts completions with a token that trains. ``teacher_hidden`` and
    ``reference_hidden`` [N, H] wait on the CPU; the trainer moves them to its own device with the micro-batch they
    belong to.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    token_index: Tensor
    target_ids: Tensor
    loss_mask: Tensor
    sampler_logprobs: Tensor | None
    advantages: Tensor | None
    teacher_hidden: Tensor | None
    teacher: str
    sequence_tokens: int
    num_sequences: int
    reference_hidden: Tensor | None = None
    topk_ids: Tensor | None = None
    topk_logprobs: Tensor | None = None
    weights: Tensor | None = None
    shared: SharedPrompts | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that train."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class LossOutput:
    """``loss``: scalar, a masked sum over tokens unless its reduction says otherwise. ``metrics``: detached masked sums
    (``*_max`` keys: maxima), so that micro-batches add up."""

    loss: Tensor
    metrics: Mapping[str, float]

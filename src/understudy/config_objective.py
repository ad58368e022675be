"""[objective]: what the student learns from. docs/estimators.md compares the choices."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from understudy.config_base import Section


class TokensConfig(Section):
    """Which tokens of a completion train, and how much each counts."""

    first: int | float | None = Field(default=None, gt=0)
    """Train on the first tokens only: so many, or, below 1, this fraction of sampling.max_completion_tokens. Sampling
    stops there too, except with rewards, which grade whole completions."""
    span: tuple[float, float] = (0.0, 1.0)
    """Train on this part of each completion, as fractions of its own length: [0.0, 0.3] is its first 30%."""
    half_life: float | None = Field(default=None, gt=0)
    """Weigh token t (from 0) with 2**(-t / half_life). Absent: all tokens alike."""
    mask_special: bool = False
    """Leave out the tokenizer's special tokens, but not those that end a completion."""


class ObjectiveConfig(Section):
    """What the student learns from. advantages = -kl_coef * reverse_kl + reward_coef * group-centred reward."""

    estimator: Literal["auto", "sampled", "full", "topk"] = "auto"
    """sampled: the reverse KL of the written token, as advantage. full: a divergence over the whole vocabulary; for
    reverse_kl the same expected gradient, less variance. topk: reverse KL on the most likely tokens. auto: full where
    every teacher gives hidden states and nothing asks for sampled (discount, signal_clip, baseline, control, another
    loss, a policy lag);
    else sampled."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "entropy_gated"] = (
        "reverse_kl"
    )
    """Of the full estimator. entropy_gated: reverse KL, plus forward KL where the teacher is unsure."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Of jsd: 0 is the forward KL, 1 the reverse KL (rescaled, so that neither end vanishes)."""
    skew: float = Field(default=0.1, ge=0, lt=1)
    """Of skewed_kl and skewed_reverse_kl: the share of the first distribution mixed into the second."""
    entropy_threshold: float = Field(default=1.0, ge=0)
    """Of entropy_gated: the teacher's entropy in nats above which the forward KL counts too."""
    topk: int = Field(default=32, ge=1)
    """Tokens per position of the topk estimator."""
    topk_set: Literal["teacher", "student", "union"] = "teacher"
    """Whose most likely tokens; student and union need teachers in this process, or behind `understudy serve
    teacher`."""
    tail: Literal["bucket", "renormalize", "stop_gradient"] = "bucket"
    """The mass outside the top k: one more class; divided out; or left out, with the log-ratio a constant."""
    baseline: bool = False
    """Subtract the exact KL(p || q) of each position from the sampled reverse_kl: same expectation, and less variance
    with a vocabulary of some size. Needs teachers that give hidden states. `sampled` only."""
    kl_coef: float = Field(default=1.0, ge=0)
    """Weight of the teacher's signal."""
    discount: float = Field(default=0.0, ge=0, le=1)
    """Credit a token with later tokens' signal too: sum over k >= t of discount**(k - t). `sampled` only."""
    signal_clip: float | None = Field(default=None, gt=0)
    """Clip each token's signal to +-this many nats. Biased; reverse_kl/clipped_share says how often. `sampled` only."""
    extrapolation: float = Field(default=1.0, gt=0)
    """lambda: the target is q**lambda * r**(1 - lambda) instead of q, with r the [reference]; above 1 it goes beyond
    the teacher. Reverse KL only."""
    anchor_coef: float = Field(default=0.0, ge=0)
    """Weight of KL(p || r), which holds the student near the [reference]."""
    reward_coef: float | None = Field(default=None, ge=0)
    """Weight of group-centred task rewards. Absent: 1 without a teacher, 0 with one."""
    normalize_rewards: bool = False
    """Divide group-centred rewards by the group's standard deviation (GRPO). Never applied to the teacher's signal."""
    control: Literal["none", "fixed_negative", "shuffled_teacher"] = "none"
    """A signal to compare with, instead of the teacher's. fixed_negative: -kl_coef for tokens below control_threshold,
    no teacher needed. shuffled_teacher: each completion gets the marks of another one. `sampled` only."""
    control_threshold: float = Field(default=0.1, gt=0, le=1)
    """Probability below which fixed_negative finds fault with a token."""
    loss: Literal["importance_sampling", "ppo", "cispo"] = "importance_sampling"
    """How advantages become a loss."""
    clip_low: float = Field(default=0.2, gt=0, le=1)
    """ppo and cispo clip importance ratios below 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """ppo and cispo clip importance ratios above 1 + clip_high."""
    max_importance_ratio: float | None = Field(default=None, gt=0)
    """Truncate importance ratios here (TIS). `importance_sampling` only."""
    importance_band: tuple[float, float] | None = None
    """[low, high]: tokens with an importance ratio outside are left out. `importance_sampling` only."""
    reduction: Literal["token_mean", "sum", "sequence_mean"] = "token_mean"
    """token_mean: every trained token of the step weighs the same. sum: no division (Tinker's; gradients grow with the
    batch: mind optim.grad_clip). sequence_mean: every completion weighs the same."""
    tokens: TokensConfig = TokensConfig()

    @property
    def asks_for_sampled(self) -> bool:
        """Whether something is set that only a signal on the written tokens has."""
        odd_loss = self.loss != "importance_sampling" or self.max_importance_ratio or self.importance_band
        return bool(self.discount or self.signal_clip or self.baseline or self.control != "none" or odd_loss)

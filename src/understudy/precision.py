"""Which precision a model computes in where the configuration says "auto": bfloat16 where it pays and errs little."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import fast_bfloat16, load_model, meta_shape, pick_device
from understudy.backends.local import LocalTeacher
from understudy.backends.protocols import Sampler, Trainer
from understudy.config import RunConfig, StudentConfig, TeacherConfig
from understudy.errors import ConfigError
from understudy.preflight import Checked
from understudy.rollouts import step_seed
from understudy.teacher_scores import score_rollouts
from understudy.types import Prompt, Rollout, TokenSequence

log = logging.getLogger("understudy")

# Below this size a forward pass on a CPU is not dominated by matrix products, and bfloat16 gains nothing.
_BF16_MIN_PARAMETERS = 2_000_000
# Nats per token by which sampler and trainer may differ on average: what bfloat16 engines differ by.
_MAX_MISMATCH = 0.03
# "Far below the reverse KL": a lower-precision teacher may err by this share of the signal.
_BF16_MAX_ERROR_SHARE = 0.05


def compute_autocast(student: StudentConfig) -> torch.dtype | None:
    """What ``student.compute_dtype``, once resolved, asks of autocast."""
    return torch.bfloat16 if student.compute_dtype == "bfloat16" else None


def choose_compute_dtype(
    config: RunConfig,
    student: LanguageModel,
    prompts: Sequence[Prompt],
    in_precision: Callable[[torch.dtype | None], tuple[Sampler, Trainer]],
) -> tuple[Sampler, Trainer, str]:
    """Sampler and trainer in the precision that ``student.compute_dtype`` asks for, and its name. Raises as
    ``check_compute_dtype``."""
    check_compute_dtype(config.student, student)
    wanted = config.student.compute_dtype
    if student.dtype != torch.float32:
        return *in_precision(None), wanted
    pays = student.matmul_parameters()[0] >= _BF16_MIN_PARAMETERS and fast_bfloat16(student.device)
    if wanted == "float32" or (wanted == "auto" and not pays):
        return *in_precision(None), "float32"
    sampler, trainer = in_precision(torch.bfloat16)
    if wanted == "bfloat16" or not prompts:
        return sampler, trainer, "bfloat16"
    mismatch = _mismatch(trainer, _trial(sampler, prompts, config))
    chosen = mismatch <= _MAX_MISMATCH
    log.info(
        "student.compute_dtype: %s: in bfloat16 sampler and trainer differ by %.4f nats a token",
        "bfloat16" if chosen else "float32",
        mismatch,
    )
    return (sampler, trainer, "bfloat16") if chosen else (*in_precision(None), "float32")


def check_compute_dtype(config: StudentConfig, student: LanguageModel) -> str:
    """What ``compute_dtype`` comes to where it cannot be tried: as asked for, and "auto" float32.

    Raises ConfigError for bfloat16 over weights that are not float32.
    """
    wanted = config.compute_dtype
    if wanted == "bfloat16" and student.dtype != torch.float32:
        raise ConfigError(
            "student.compute_dtype",
            got=f"bfloat16 over {student.dtype_name} weights",
            expected="float32 weights, of which a bfloat16 copy is made",
            remedy='drop it, or set student.dtype = "float32"',
        )
    return "float32" if wanted == "auto" and student.dtype == torch.float32 else wanted


def _trial(sampler: Sampler, prompts: Sequence[Prompt], config: RunConfig) -> list[Rollout]:
    """A few of the student's completions."""
    length = min(64, config.sampling.max_completion_tokens)
    sampling = config.sampling.model_copy(update={"group_size": 1, "max_completion_tokens": length})
    groups = sampler.sample(list(prompts[:16]), sampling, seed=step_seed(config.seed, 2**31))
    return [rollout for group in groups for rollout in group]


def _mismatch(trainer: Trainer, rollouts: Sequence[Rollout]) -> float:
    """Mean |difference| of sampler's and trainer's log-probabilities, nats per token."""
    marks = trainer.compute_logprobs([TokenSequence(r.prompt.prompt_ids, r.completion_ids) for r in rollouts])
    pairs = [zip(r.sampler_logprobs, own, strict=True) for r, own in zip(rollouts, marks, strict=True)]
    errors = [abs(p - q) for pair in pairs for p, q in pair]
    return sum(errors) / len(errors)


def load_teacher(
    teacher: TeacherConfig,
    config: RunConfig,
    checked: Checked,
    student: LanguageModel | None,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    *,
    role: str = "teacher",
) -> tuple[LocalTeacher, str]:
    """A frozen teacher and the name of the dtype it ended up in."""
    device = student.device if teacher.device == "auto" and student else pick_device(teacher.device)

    def load(dtype: torch.dtype, autocast: torch.dtype | None = None) -> LocalTeacher:
        trust = teacher.trust_remote_code
        model = load_model(teacher.model, role=role, dtype=dtype, device=device, trust_remote_code=trust)
        model.requires_grad_(False)
        return LocalTeacher(
            LanguageModel(model, vocab_size=checked.vocab_size),
            temperature=config.sampling.temperature,
            batch_tokens=config.optim.micro_batch_tokens,
            autocast=autocast,
        )

    if teacher.dtype != "auto":
        return load(getattr(torch, teacher.dtype)), teacher.dtype
    shape = meta_shape(teacher.model, role=role, trust_remote_code=teacher.trust_remote_code)
    if student is not None and shape == student.shape:
        log.info("%s %s has the student's shape: scored as the student is trained", role, teacher.model)
        return load(student.dtype, compute_autocast(config.student)), student.dtype_name
    if _too_large_to_compare(sum(shape), device):
        log.info("%s %s in bfloat16: two precisions of it do not fit in memory to be compared", role, teacher.model)
        return load(torch.bfloat16), "bfloat16"
    loaded = load(torch.float32)
    large = sum(shape) >= _BF16_MIN_PARAMETERS
    if not (large and fast_bfloat16(device) and prompts):
        return loaded, "float32"
    half = load(torch.bfloat16)
    error, signal = _precision_error(loaded, half, sampler, prompts, config)
    chosen = error <= _BF16_MAX_ERROR_SHARE * signal
    log.info(
        "%s %s in %s: bfloat16 errs by %.4f nats a token against a reverse KL of %.4f",
        role,
        teacher.model,
        "bfloat16" if chosen else "float32",
        error,
        signal,
    )
    return (half, "bfloat16") if chosen else (loaded, "float32")


def _too_large_to_compare(num_parameters: int, device: torch.device) -> bool:
    """Whether a float32 and a bfloat16 copy would not fit on this GPU (a CPU has the host's memory)."""
    if device.type != "cuda":
        return False
    return 6 * num_parameters > 0.8 * torch.cuda.mem_get_info(device)[0]


def _precision_error(
    exact: LocalTeacher, half: LocalTeacher, sampler: Sampler, prompts: Sequence[Prompt], config: RunConfig
) -> tuple[float, float]:
    """(mean |difference| of the two precisions, mean reverse KL), nats per token, on a few of the student's
    completions."""
    rollouts = _trial(sampler, prompts, config)
    names = {rollout.prompt.teacher for rollout in rollouts}
    exact_scores = score_rollouts(dict.fromkeys(names, exact), rollouts, "sampled")
    half_scores = score_rollouts(dict.fromkeys(names, half), rollouts, "sampled")
    errors, gaps = [], []
    for rollout, right, rough in zip(rollouts, exact_scores, half_scores, strict=True):
        errors += [abs(a - b) for a, b in zip(right.teacher_logprobs, rough.teacher_logprobs, strict=True)]
        gaps += [p - q for p, q in zip(rollout.sampler_logprobs, right.teacher_logprobs, strict=True)]
    return sum(errors) / len(errors), sum(gaps) / len(gaps)

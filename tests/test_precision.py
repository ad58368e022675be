"""In which precision a run samples and trains where the configuration leaves it open, and what bfloat16 changes."""

from __future__ import annotations

import logging
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import understudy
from tiny import EOS, gradient_of, prompt_of, relative_error, tiny_model
from understudy import ConfigError, precision
from understudy.assembly import Given, Parts, assemble
from understudy.backends.language_model import LanguageModel
from understudy.backends.local import LocalSampler, LocalTeacher, LocalTrainer
from understudy.batching import micro_batches
from understudy.config import OptimConfig, RunConfig, SamplingConfig
from understudy.costs import CostLedger, MeteredSampler, MeteredTrainer
from understudy.loop import sample, score
from understudy.objectives import CrossEntropy, FullDivergence
from understudy.precision import compute_autocast
from understudy.preflight import check_run
from understudy.types import TokenSequence, TrainingExample
from understudy.worlds.ledger_demo import ARMS, arm_config, prepare


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    prepare(folder)
    return folder


def config_of(world: Path, *, earlier_self: bool = False, **student: object) -> RunConfig:
    config = arm_config(world, ARMS[0])
    assert config.prompts is not None
    assert config.teacher is not None
    teacher = {"model": config.student.model} if earlier_self else {"dtype": "float32"}
    return config.model_copy(
        update={
            "student": config.student.model_copy(update=student),
            "teacher": config.teacher.model_copy(update=teacher),
            "prompts": config.prompts.model_copy(update={"limit": 16}),
            "sampling": config.sampling.model_copy(update={"groups_per_batch": 4, "max_completion_tokens": 12}),
            "evaluation": config.evaluation.model_copy(update={"tasks": ()}),
            "objective": config.objective.model_copy(update={"estimator": "full"}),
        }
    )


def parts_of(config: RunConfig) -> Parts:
    return assemble(config, check_run(config, "distill"), CostLedger(), checkpoint=None, given=Given())


def hardware(monkeypatch: pytest.MonkeyPatch, *, fast: bool = True, smallest: int = 0) -> None:
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: fast)
    monkeypatch.setattr(precision, "_BF16_MIN_PARAMETERS", smallest)


def backends(parts: Parts) -> tuple[LocalSampler, LocalTrainer]:
    """Behind the meters."""
    assert isinstance(parts.sampler, MeteredSampler)
    assert isinstance(parts.trainer, MeteredTrainer)
    sampler, trainer = parts.sampler._sampler, parts.trainer._trainer
    assert isinstance(sampler, LocalSampler)
    assert isinstance(trainer, LocalTrainer)
    return sampler, trainer


def precisions(parts: Parts) -> tuple[str, torch.dtype, torch.dtype | None]:
    """What the configuration says, what the sampler computes in, and the trainer's autocast."""
    sampler, trainer = backends(parts)
    assert trainer.model.dtype == torch.float32  # weights are the optimizer's, whatever products are made in
    return parts.config.student.compute_dtype, sampler._model.dtype, trainer._autocast


BFLOAT16 = ("bfloat16", torch.bfloat16, torch.bfloat16)
FLOAT32 = ("float32", torch.float32, None)


def test_auto_is_bfloat16_where_it_is_fast_and_sampler_and_trainer_agree(world, monkeypatch, caplog) -> None:
    hardware(monkeypatch)
    with caplog.at_level(logging.INFO, logger="understudy"):
        parts = parts_of(config_of(world))
    assert precisions(parts) == BFLOAT16
    [line] = [line for line in caplog.messages if line.startswith("student.compute_dtype")]
    assert line.startswith("student.compute_dtype: bfloat16: ")
    # Some bfloat16 roundings of a log-probability of about one: not nothing, and far from a different model.
    assert 1e-5 < float(line.split()[-4]) < precision._MAX_MISMATCH


def test_auto_is_float32_where_they_do_not_agree(world, monkeypatch, caplog) -> None:
    hardware(monkeypatch)
    monkeypatch.setattr(precision, "_MAX_MISMATCH", -1)
    with caplog.at_level(logging.INFO, logger="understudy"):
        parts = parts_of(config_of(world))
    assert precisions(parts) == FLOAT32
    assert [line for line in caplog.messages if line.startswith("student.compute_dtype: float32: ")]


@pytest.mark.parametrize("options", [{"fast": False}, {"smallest": 10**9}], ids=["slow hardware", "small model"])
def test_auto_is_float32_where_nothing_is_gained(world, monkeypatch, options) -> None:
    hardware(monkeypatch, **options)
    monkeypatch.setattr(precision, "_trial", lambda *a: pytest.fail("completions were sampled for nothing"))
    assert precisions(parts_of(config_of(world))) == FLOAT32


def test_what_is_asked_for_is_not_tried(world, monkeypatch) -> None:
    monkeypatch.setattr(precision, "_trial", lambda *a: pytest.fail("completions were sampled for nothing"))
    for fast in (True, False):
        hardware(monkeypatch, fast=fast)
        assert precisions(parts_of(config_of(world, compute_dtype="float32"))) == FLOAT32
        assert precisions(parts_of(config_of(world, compute_dtype="bfloat16"))) == BFLOAT16


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_bfloat16_products_need_float32_weights(world, monkeypatch, dtype) -> None:
    with pytest.raises(ConfigError, match=rf"student.compute_dtype[\s\S]*bfloat16 over {dtype} weights"):
        parts_of(config_of(world, dtype=dtype, compute_dtype="bfloat16"))
    hardware(monkeypatch)
    parts = parts_of(config_of(world, dtype=dtype))
    sampler, trainer = backends(parts)
    assert trainer._autocast is None
    assert sampler._model is trainer.model
    assert compute_autocast(parts.config.student) is None


def test_the_trial_measures_what_a_step_will_see(world, monkeypatch) -> None:
    """``_mismatch`` is the mean |log p(sampler) - log p(trainer)| over tokens."""
    hardware(monkeypatch)
    config = config_of(world)
    sampler, trainer = backends(parts := parts_of(config))
    rollouts = precision._trial(sampler, parts.prompts, config)
    assert len(rollouts) == 16
    assert max(len(r.completion_ids) for r in rollouts) <= 12
    marks = trainer.compute_logprobs([TokenSequence(r.prompt.prompt_ids, r.completion_ids) for r in rollouts])
    gaps = torch.tensor([list(chain(*(r.sampler_logprobs for r in rollouts))), list(chain(*marks))])
    mean = float((gaps[0] - gaps[1]).abs().mean())
    assert precision._mismatch(trainer, rollouts) == pytest.approx(mean, rel=1e-4)
    assert mean > 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_earlier_self_teaches_exactly_nothing(world, dtype) -> None:
    """In bfloat16 too: teacher and student see the same batches, in the same precision."""
    config = config_of(world, earlier_self=True, compute_dtype=dtype)
    sampling = config.sampling.model_copy(
        update={"group_size": 4, "max_completion_tokens": 48, "stop_token_ids": (0, 7)}
    )
    optim = config.optim.model_copy(update={"micro_batch_tokens": 400})
    parts = parts_of(config.model_copy(update={"sampling": sampling, "optim": optim}))
    scored, examples = score(parts, sample(parts, parts.prompts_at(0), seed=3))
    assert len({len(s.rollout.completion_ids) for s in scored}) > 1
    batches = micro_batches(examples, **parts.batching)
    assert len(batches) > 1
    assert any(batch.shared is not None for batch in batches)
    for batch in batches:
        output = parts.trainer.forward_backward(batch, parts.objective)
        assert float(output.loss) == 0.0
    gradient = gradient_of(backends(parts)[1])
    assert gradient.dtype == torch.float32
    # The gradient of a divergence is p (log p - log q), which is zero, and nothing else.
    assert torch.count_nonzero(gradient) == 0


def test_gradients_under_autocast_are_float32_and_close() -> None:
    completions = [[3, 1, EOS], [5, 5, 1, 2], [4, EOS]]
    examples = [TrainingExample([1, 2, 3], ids, [True] * len(ids)) for ids in completions]
    batches = micro_batches(examples, micro_batch_tokens=10**6, share_prompts=True)
    gradients = []
    for autocast in (None, torch.bfloat16):
        model = tiny_model(seed=5, dtype=torch.float32)
        trainer = LocalTrainer(LanguageModel(model), OptimConfig(), autocast=autocast)
        for batch in batches:
            trainer.forward_backward(batch, CrossEntropy())
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        gradients.append(gradient_of(trainer))
    assert 1e-4 < relative_error(gradients[1], gradients[0]) < 0.05


def test_scores_under_autocast_are_those_of_bfloat16_products() -> None:
    """Close to float32's and not equal; and the same whoever computes them."""
    model = LanguageModel(tiny_model(seed=5, dtype=torch.float32))
    sequences = [TokenSequence([1, 2, 3], [4, 5, EOS]), TokenSequence([4], [1, 2, 3, 4, 5, 1, 2])]
    exact = list(chain(*LocalTeacher(model).compute_logprobs(sequences)))
    rough = list(chain(*LocalTeacher(model, autocast=torch.bfloat16).compute_logprobs(sequences)))
    trainer = LocalTrainer(model, OptimConfig(), autocast=torch.bfloat16)
    assert list(chain(*trainer.compute_logprobs(sequences))) == rough
    assert rough != exact
    assert rough == pytest.approx(exact, abs=0.1)


def test_a_full_divergence_under_autocast() -> None:
    """Loss and gradient of another teacher are float32's up to bfloat16's roundings."""
    results: list[tuple[float, Any]] = []
    for autocast in (None, torch.bfloat16):
        student, teacher = (LanguageModel(tiny_model(seed=seed, dtype=torch.float32)) for seed in (5, 6))
        marks = LocalTeacher(teacher, autocast=autocast)
        pairs = [([1, 2, 3], [3, 1, EOS]), ([1, 2, 3], [5, 5, 1, 2]), ([4], [4, EOS])]
        scores = marks.score([TokenSequence(*pair) for pair in pairs], "hidden")
        examples = [
            TrainingExample(*pair, [True] * len(pair[1]), teacher_hidden=score.teacher_hidden)  # pyright: ignore
            for pair, score in zip(pairs, scores, strict=True)
        ]
        trainer = LocalTrainer(student, OptimConfig(), autocast=autocast)
        loss = 0.0
        for batch in micro_batches(examples, micro_batch_tokens=100, share_prompts=True):
            loss += float(trainer.forward_backward(batch, FullDivergence({"default": marks.head})).loss)
        results.append((loss, gradient_of(trainer)))
    assert results[1][0] == pytest.approx(results[0][0], rel=0.05)
    assert relative_error(results[1][1], results[0][1]) < 0.05


def test_samples_of_a_copy_are_marked_alike_by_the_trainer() -> None:
    """A bfloat16 copy and autocast over float32 weights are nearly one model."""
    source = LanguageModel(tiny_model(seed=5, dtype=torch.float32))
    sampler = LocalSampler(source, stop_ids=frozenset({EOS}), shadow=source.copy_in(torch.bfloat16))
    trainer = LocalTrainer(source, OptimConfig(), autocast=torch.bfloat16)
    groups = sampler.sample(
        [prompt_of([1, 2, 3]), prompt_of([4], 1)], SamplingConfig(group_size=8, max_completion_tokens=6), seed=1
    )
    for rollout in chain(*groups):
        [own] = trainer.compute_logprobs([TokenSequence(rollout.prompt.prompt_ids, rollout.completion_ids)])
        assert rollout.sampler_logprobs == pytest.approx(own, abs=0.15)


def test_a_run_goes_on_in_the_precision_it_began_in(world, monkeypatch, tmp_path) -> None:
    """Also on a machine that would have chosen otherwise; and resumed it is the uninterrupted run, bit for bit."""
    base = config_of(world)

    def distilled(name: str, steps: int, **options: Any) -> Path:
        optim = base.optim.model_copy(update={"num_steps": steps, "micro_batch_tokens": None})
        update = {"output_dir": str(tmp_path / name), "optim": optim}
        return understudy.distill(base.model_copy(update=update), quiet=True, **options).folder

    hardware(monkeypatch)
    whole = distilled("whole", 4)
    distilled("halved", 2)
    hardware(monkeypatch, fast=False)
    halved = distilled("halved", 4, resume=True)
    for folder in (whole, halved):
        stored = RunConfig.from_toml(folder / "config.toml")
        assert (stored.student.compute_dtype, stored.student.dtype) == ("bfloat16", "float32")
        assert stored.optim.micro_batch_tokens == 2048
    last = "checkpoints/step_000004/model.safetensors"
    assert (halved / last).read_bytes() == (whole / last).read_bytes()
    weights = load_file(whole / last)
    assert {w.dtype for w in weights.values()} == {torch.float32}
    start = load_file(Path(base.student.model) / "model.safetensors")
    assert any(not torch.equal(weights[name], start[name]) for name in weights)

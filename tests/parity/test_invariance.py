"""How a step is cut into tensors changes nothing: padding, neighbours, micro-batches, packing, order.

The reference is one plain transformers pass per sequence, with the objective written out on its logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny import ARCHITECTURES, EOS, gradient_of, prompt_of, relative_error, teacher_of, tiny_model, trainer_of
from understudy.backends.loading import load_student
from understudy.backends.local import LocalSampler, LocalTeacher, LocalTrainer
from understudy.batching import micro_batches
from understudy.config import OptimConfig, SamplingConfig, StudentConfig
from understudy.objectives import CrossEntropy, FullDivergence, Mixture, Objective, PolicyGradient
from understudy.optimizer_step import optimizer_step
from understudy.types import Batch, HiddenScores, TokenSequence, TrainingExample

TEMPERATURE = 0.8
# Prompts of 1 to 9 tokens (the padding id among them), completions of 1 to 7: some end with EOS, some are cut.
PAIRS: list[tuple[list[int], list[int]]] = [
    ([1, 2, 3], [4, 5, EOS]),
    ([4], [1, 2, 3, 4, 5, 1, 2]),
    ([5, 4, 3, 2, 1, 5, EOS, 3, 2], [EOS]),
    ([2, 2], [3, 1, 4, 1, 5, EOS]),
    ([EOS, 1], [5, 5]),
    ([3, 1, 4, 1, 5], [2, EOS]),
    ([1], [2]),
    ([4, 3], [2, 1, 2, 1, 3]),
]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative; some dozen roundings times a condition number


def examples_for(teacher: LocalTeacher, *, seed: int = 0) -> list[TrainingExample]:
    """Examples with every signal: arbitrary log-probabilities and advantages, some tokens masked, hidden states."""
    generator = torch.Generator().manual_seed(seed)
    scores = teacher.score([TokenSequence(*pair) for pair in PAIRS], "hidden")
    examples = []
    for (prompt, completion), score in zip(PAIRS, scores, strict=True):
        assert isinstance(score, HiddenScores)
        size = len(completion)
        examples.append(
            TrainingExample(
                prompt_ids=prompt,
                completion_ids=completion,
                loss_mask=[size < 4 or t % 3 != 1 for t in range(size)],
                sampler_logprobs=(-2 * torch.rand(size, generator=generator, dtype=torch.float64)).tolist(),
                advantages=torch.randn(size, generator=generator, dtype=torch.float64).tolist(),
                teacher_hidden=score.teacher_hidden,
            )
        )
    return examples


def objective_for(teacher: LocalTeacher) -> Objective:
    """Both estimators in one gradient."""
    return Mixture([FullDivergence({"default": teacher.head}, 0.7, TEMPERATURE), PolicyGradient(TEMPERATURE)])


def reference(student: Any, teacher: Any, examples: Sequence[TrainingExample]) -> tuple[float, Tensor]:
    """The loss and its gradient from one sequence at a time, full logits, no batch."""
    total = torch.zeros((), dtype=student.dtype)
    for e in examples:
        assert e.sampler_logprobs is not None
        assert e.advantages is not None
        ids = torch.tensor([[*e.prompt_ids, *e.completion_ids]])
        own = (student(input_ids=ids, use_cache=False).logits[0] / TEMPERATURE).log_softmax(-1)
        with torch.no_grad():
            other = (teacher(input_ids=ids, use_cache=False).logits[0] / TEMPERATURE).log_softmax(-1)
        for t, token in enumerate(e.completion_ids):
            if e.loss_mask[t]:
                p, q = own[len(e.prompt_ids) + t - 1], other[len(e.prompt_ids) + t - 1]
                ratio = (p[token] - e.sampler_logprobs[t]).exp()
                total = total + 0.7 * (p.exp() * (p - q)).sum() - ratio * e.advantages[t]
    total.backward()
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in student.parameters()])
    student.zero_grad(set_to_none=True)
    return float(total.detach()), gradient


def accumulated(trainer: Any, batches: Sequence[Batch], objective: Objective) -> tuple[float, Tensor]:
    loss = sum(float(trainer.forward_backward(batch, objective).loss) for batch in batches)
    return loss, gradient_of(trainer)


LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "one batch": {"micro_batch_tokens": 10**6},
    "a sequence each": {"micro_batch_tokens": 1},
    "some": {"micro_batch_tokens": 24},
    "one packed row": {"micro_batch_tokens": 10**6, "packing": True},
    "packed rows": {"micro_batch_tokens": 20, "packing": True},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layout_gives_the_gradient_of_lone_sequences(architecture: str, dtype: torch.dtype) -> None:
    student, teacher = (tiny_model(architecture, seed=seed, dtype=dtype) for seed in (1, 2))
    trainer, marks = trainer_of(student), teacher_of(teacher, temperature=TEMPERATURE)
    examples, objective = examples_for(marks), objective_for(marks)
    exact_loss, exact = reference(student, teacher, examples)
    tolerance = TOLERANCE[dtype]
    counts = set()
    for name, options in LAYOUTS.items():
        for order in (examples, examples[::-1], examples[3:] + examples[:3]):
            batches = micro_batches(order, dtype=dtype, **options)
            loss, gradient = accumulated(trainer, batches, objective)
            assert relative_error(gradient, exact) < tolerance, name
            assert loss == pytest.approx(exact_loss, rel=tolerance), name
        counts.add(len(batches))
    assert counts == {1, 3, 8}  # the layouts do differ


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("packing", [False, True])
def test_a_step_does_not_depend_on_its_micro_batches(split: int, packing: bool) -> None:
    """1 x 8 = 4 x 2: sums over micro-batches, one division by all tokens. Two steps: Adam's state counts too."""
    marks = teacher_of(tiny_model(seed=2), temperature=TEMPERATURE)
    examples, objective = examples_for(marks), objective_for(marks)
    weights, metrics = [], []
    for size in (8, split):
        student = tiny_model(seed=1)
        trainer = trainer_of(student, grad_clip=0.5)
        for _ in range(2):
            parts = [examples[i : i + size] for i in range(0, 8, size)]
            options: dict[str, Any] = {"micro_batch_tokens": 10**6, "dtype": torch.float64}
            batches = [b for part in parts for b in micro_batches(part, packing=packing and size != 8, **options)]
            assert len(batches) == 8 // size
            metrics.append(optimizer_step(trainer, batches, objective, learning_rate=1e-2))
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-9)
    for one, other in zip(metrics[:2], metrics[2:], strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-5), name  # metrics are float32 sums
    assert metrics[0]["grad_norm"] > 0.5  # clipping was at work


def test_masked_tokens_have_no_influence_whatever_they_hold() -> None:
    student, marks = tiny_model(seed=1), teacher_of(tiny_model(seed=2), temperature=TEMPERATURE)
    trainer, examples, objective = trainer_of(student), examples_for(marks), objective_for(marks)

    def run(examples: Sequence[TrainingExample]) -> tuple[float, Tensor]:
        return accumulated(trainer, micro_batches(examples, micro_batch_tokens=40, dtype=torch.float64), objective)

    def spoilt(example: TrainingExample, value: float) -> TrainingExample:
        def spoil(values: Sequence[float] | None) -> list[float]:
            return [v if keep else value for v, keep in zip(values or [], example.loss_mask, strict=True)]

        assert example.teacher_hidden is not None
        hidden = example.teacher_hidden.clone()
        hidden[~torch.tensor(example.loss_mask)] = value
        return replace(
            example,
            sampler_logprobs=spoil(example.sampler_logprobs),
            advantages=spoil(example.advantages),
            teacher_hidden=hidden,
        )

    loss, gradient = run(examples)
    for value in (-1e6, 0.0, float("-inf"), float("nan")):
        spoilt_loss, spoilt_gradient = run([spoilt(e, value) for e in examples])
        assert spoilt_loss == loss
        assert torch.equal(spoilt_gradient, gradient)
    assert sum(not keep for e in examples for keep in e.loss_mask) == 6


def test_a_sequence_is_blind_to_its_packed_neighbour() -> None:
    """Changing what stands before it in the row changes not a bit of its gradient."""
    for architecture in ("qwen3", "llama", "gemma3_text"):
        trainer = trainer_of(tiny_model(architecture, seed=1))
        gradients = []
        for neighbour in ([1, 2, 3, 4, 5, 1], [5, 5, EOS, 2, 1, 3]):
            silent = TrainingExample(neighbour[:3], neighbour[3:], loss_mask=[False] * 3)
            example = TrainingExample([2, 3, 1, 1], [4, 5, EOS], loss_mask=[True] * 3)
            [batch] = micro_batches([silent, example], micro_batch_tokens=100, packing=True)
            assert batch.input_ids.shape == (1, 13)
            trainer.forward_backward(batch, CrossEntropy())
            gradients.append(gradient_of(trainer))
        assert torch.equal(*gradients)


def test_the_end_token_trains_and_teaches_like_any_other() -> None:
    """Crediting the end token alone gives the gradient of its log-probability, at the position before it."""
    student = tiny_model(seed=1)
    trainer = trainer_of(student)
    prompt, completion = [1, 2, 3], [4, 5, EOS]
    example = TrainingExample(
        prompt, completion, [True] * 3, trainer_logprobs(student, prompt, completion), [0, 0, 1.0]
    )
    longer = TrainingExample(
        [4, 4, 4, 4], [1] * 6, [True] * 6, [-1.0] * 6, [0.0] * 6
    )  # so that the first one is padded
    [batch] = micro_batches([example, longer], micro_batch_tokens=100, dtype=torch.float64)
    trainer.forward_backward(batch, PolicyGradient())
    gradient = gradient_of(trainer)
    logits = student(input_ids=torch.tensor([[1, 2, 3, 4, 5]]), use_cache=False).logits[0, -1]
    exact = torch.autograd.grad(-logits.log_softmax(-1)[EOS], list(student.parameters()))
    assert relative_error(gradient, torch.cat([g.flatten() for g in exact])) < 1e-10


def trainer_logprobs(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    return teacher_of(model).compute_logprobs([TokenSequence(prompt, completion)])[0]


def test_gradient_checkpointing_saves_memory_and_changes_nothing(tmp_path: Path) -> None:
    tiny_model(seed=1, dtype=torch.float32).save_pretrained(tmp_path)
    marks = teacher_of(tiny_model(seed=2, dtype=torch.float32), temperature=TEMPERATURE)
    batches, objective = micro_batches(examples_for(marks), micro_batch_tokens=10**6), objective_for(marks)
    gradients, kept = [], []
    for recompute in (False, True):
        config = StudentConfig(model=str(tmp_path), device="cpu", gradient_checkpointing=recompute)
        model = load_student(config)
        saved: list[Tensor] = []

        def keep(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            gradients.append(accumulated(LocalTrainer(model, OptimConfig()), batches, objective)[1])
        kept.append(len(saved))
        assert not any(module.training for module in model.model.modules())
    assert torch.equal(*gradients)
    assert kept[1] < 0.5 * kept[0]
    sampler = LocalSampler(model, stop_ids=frozenset({EOS}))  # the cache works as ever
    [[rollout]] = sampler.sample([prompt_of([1, 2])], SamplingConfig(group_size=1, max_completion_tokens=6), seed=0)
    sequence = TokenSequence([1, 2], rollout.completion_ids)
    assert rollout.sampler_logprobs == pytest.approx(teacher_of(model.model).compute_logprobs([sequence])[0], abs=1e-5)

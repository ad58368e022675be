"""What only a CUDA device shows. Skipped, loudly, where there is none: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch

from tiny import tiny_model
from understudy.backends.language_model import LanguageModel
from understudy.backends.local import LocalTeacher, LocalTrainer
from understudy.batching import micro_batches
from understudy.config import OptimConfig
from understudy.objectives import FullDivergence
from understudy.types import TokenSequence, TrainingExample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SEQUENCES = [TokenSequence([1, 2, 3], [4, 2, 1]), TokenSequence([5], [3, 3])]


def gradient(teacher_device: str, student_device: str) -> torch.Tensor:
    """The full objective's gradient, on the host."""
    teacher = LocalTeacher(LanguageModel(tiny_model(seed=1, dtype=torch.float32).to(teacher_device)))
    trainer = LocalTrainer(LanguageModel(tiny_model(seed=2, dtype=torch.float32).to(student_device)), OptimConfig())
    examples = [
        TrainingExample(
            s.prompt_ids, s.completion_ids, [True] * len(s.completion_ids), teacher_hidden=score.teacher_hidden
        )
        for s, score in zip(SEQUENCES, teacher.score(SEQUENCES, "hidden"), strict=True)
    ]
    for batch in micro_batches(examples, micro_batch_tokens=64, device=student_device):
        trainer.forward_backward(batch, FullDivergence({"default": teacher.head}))
    return torch.cat([p.grad.flatten().cpu() for p in trainer.model.model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("teacher_device", "student_device"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_gradient_equals_the_cpus(teacher_device, student_device):
    expected = gradient("cpu", "cpu")
    torch.testing.assert_close(gradient(teacher_device, student_device), expected, rtol=1e-3, atol=1e-4)


def test_scores_equal_the_cpus():
    on_cpu = LocalTeacher(LanguageModel(tiny_model(seed=1, dtype=torch.float32))).compute_logprobs(SEQUENCES)
    on_gpu = LocalTeacher(LanguageModel(tiny_model(seed=1, dtype=torch.float32).to("cuda"))).compute_logprobs(SEQUENCES)
    for cpu_row, gpu_row in zip(on_cpu, on_gpu, strict=True):
        assert gpu_row == pytest.approx(cpu_row, abs=1e-3)

"""FLOPs, tokens and seconds, with numbers worked out by hand."""

import json
from pathlib import Path

import pytest
import torch

from tiny import prompt_of, sampler_of, teacher_of, tiny_model, trainer_of
from understudy import flops
from understudy.batching import micro_batches
from understudy.config import SamplingConfig
from understudy.costs import (
    CostLedger,
    CountedModel,
    MeteredSampler,
    MeteredTeacher,
    MeteredTrainer,
    forward_flops,
    training_flops,
)
from understudy.errors import ConfigError
from understudy.objectives import CrossEntropy
from understudy.teacher_scores import score_reference, score_rollouts
from understudy.types import TokenSequence, TrainingExample


def test_flops_per_token() -> None:
    assert forward_flops(1000, 7) == 14_000  # 2N
    assert training_flops(1000, 1000, 7) == 42_000  # 6N
    assert training_flops(1000, 50, 7) == 7 * (4000 + 100)  # 4N + 2r under adapters
    assert training_flops(7_000_000_000, 7_000_000_000, 10**12) == 4.2e22


def test_the_ledger_adds_up() -> None:
    costs = CostLedger()
    costs.add("student_sampling", tokens=10, flops=100.0, seconds=1.0, exact_flops=110.0)
    costs.add("student_sampling", tokens=5, flops=50.0, seconds=0.5)
    costs.add("teacher_scoring", tokens=15, flops=900.0, seconds=0.25)
    costs.add("evaluation", tokens=1000, flops=1e6, seconds=60.0)
    assert costs.roles["student_sampling"] == {"tokens": 15, "flops": 150.0, "exact_flops": 160.0, "seconds": 1.5}
    amounts = ("tokens", "flops", "exact_flops", "seconds")
    assert [costs.total(name) for name in amounts] == [30, 1050.0, 1060.0, 1.75]  # without evaluation
    assert costs.take_seconds() == {"student_sampling": 1.5, "teacher_scoring": 0.25, "evaluation": 60.0}
    assert costs.take_seconds() == {}
    content = json.loads(json.dumps(costs.to_json()))
    assert content["total_without_evaluation"] == {
        "tokens": 30,
        "flops": 1050.0,
        "exact_flops": 1060.0,
        "seconds": 1.75,
    }
    resumed = CostLedger.from_json(content)
    resumed.add("student_sampling", tokens=1, flops=2.0, seconds=0.5)
    assert resumed.roles["student_sampling"] == {"tokens": 16, "flops": 152.0, "exact_flops": 162.0, "seconds": 2.0}
    assert costs.roles["student_sampling"]["tokens"] == 15  # a copy


def test_files_without_an_exact_count_continue_with_the_convention() -> None:
    costs = CostLedger.from_json({"roles": {"student_training": {"tokens": 3, "flops": 60.0, "seconds": 1.0}}})
    costs.add("student_training", tokens=1, flops=20.0, seconds=1.0, exact_flops=15.0)
    assert costs.roles["student_training"] == {"tokens": 4, "flops": 80.0, "exact_flops": 75.0, "seconds": 2.0}


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"{", "Expecting property name"),
        (b"\xff", "can't decode byte 0xff"),
        (b"[]", "should be a valid dictionary"),
        (b'{"roles": {"evaluation": {"tokens": 1, "seconds": 1.0}}}', "roles.evaluation.flops: Field required"),
        (b'{"roles": {"evaluation": {"tokens": 1, "flops": "many", "seconds": 1.0}}}', "roles.evaluation.flops"),
        (b'{"roles": {"evaluation": {"tokens": 1, "flops": NaN, "seconds": 1.0}}}', "NaN, which is no JSON"),
    ],
)
def test_what_is_no_ledger_is_refused(content: bytes, got: str, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        CostLedger.read(path)
    assert refused.value.where == str(path)
    assert got in refused.value.got


def test_the_exact_count_is_beside_the_convention() -> None:
    """Sampling, scoring and training of one group, by the formulas of flops.py."""
    model, costs = tiny_model(seed=5), CostLedger()
    shape = flops.shape_of_config(model.config)
    assert shape is not None
    counted = CountedModel(shape, shares_prompts=True, samples_shared=True)
    prompt, sampling = prompt_of([1, 2, 3, 4, 5], 0), SamplingConfig(group_size=3, max_completion_tokens=4)
    sampler = MeteredSampler(sampler_of(model), costs, "student_sampling", 100, counted)
    [group] = sampler.sample([prompt], sampling, seed=0)
    lengths = [len(rollout.completion_ids) for rollout in group]
    written = flops.sampling(shape, 5, lengths).total
    assert costs.roles["student_sampling"]["exact_flops"] == written
    assert costs.roles["student_sampling"]["flops"] == 200 * (15 + sum(lengths))
    teacher = MeteredTeacher(teacher_of(model), costs, 1000, counted=counted)
    score_rollouts({"default": teacher}, group, "sampled")
    assert costs.roles["teacher_scoring"]["exact_flops"] == written
    trainer = MeteredTrainer(trainer_of(model), costs, (100, 100), counted)
    examples = [TrainingExample(r.prompt.prompt_ids, r.completion_ids, [True] * len(r.completion_ids)) for r in group]
    [batch] = micro_batches(examples, micro_batch_tokens=99, share_prompts=True)
    trainer.forward_backward(batch, CrossEntropy())
    assert costs.roles["student_training"]["exact_flops"] == 3 * written


def test_roles_are_metered_and_pass_everything_through() -> None:
    model, costs = tiny_model(seed=5), CostLedger()
    prompts = [prompt_of([1, 2, 3], 0), prompt_of([4], 1)]
    sampling = SamplingConfig(group_size=3, max_completion_tokens=4)
    plain = sampler_of(model)
    sampler = MeteredSampler(plain, costs, "student_sampling", 100)
    sampler.set_policy_version(3)
    groups = sampler.sample(prompts, sampling, seed=0)
    assert groups == plain.sample(prompts, sampling, seed=0)
    assert groups[0][0].policy_version_start == 3
    written = sum(len(r.completion_ids) for group in groups for r in group)
    tokens = written + 3 * 3 + 3 * 1  # the prompt is paid once per completion
    assert costs.roles["student_sampling"]["tokens"] == tokens
    assert costs.roles["student_sampling"]["flops"] == 200 * tokens

    sequences = [TokenSequence([1, 2], [3, 0]), TokenSequence([4], [5])]
    teacher = MeteredTeacher(teacher_of(model), costs, 1000)
    assert teacher.compute_logprobs(sequences) == teacher_of(model).compute_logprobs(sequences)
    assert costs.roles["teacher_scoring"]["tokens"] == 6
    assert costs.roles["teacher_scoring"]["flops"] == 6 * 2000
    assert teacher.kinds == {"sampled", "topk", "hidden"}
    reference = MeteredTeacher(teacher_of(model), costs, 10, "reference_scoring")
    assert score_reference(reference, groups[1], "sampled") == score_reference(teacher_of(model), groups[1], "sampled")
    marked = sum(1 + len(r.completion_ids) for r in groups[1])
    assert costs.roles["reference_scoring"]["tokens"] == marked
    assert costs.roles["reference_scoring"]["flops"] == 20 * marked
    assert costs.roles["teacher_scoring"]["tokens"] == 6  # nothing of it is the teacher's

    trainer = MeteredTrainer(trainer_of(model), costs, (100, 30))
    examples = [TrainingExample(s.prompt_ids, s.completion_ids, [True] * len(s.completion_ids)) for s in sequences]
    [batch] = micro_batches(examples, micro_batch_tokens=99)
    assert batch.input_ids.numel() == 8  # padding is not a token
    assert torch.isfinite(trainer.forward_backward(batch, CrossEntropy()).loss)
    assert trainer.optimizer_step(learning_rate=1e-3, divisor=3)["grad_norm"] > 0
    trainer.compute_logprobs(sequences)  # for pages: free
    assert costs.roles["student_training"]["tokens"] == 6
    assert costs.roles["student_training"]["flops"] == 6 * (400 + 60)
    assert all(entry["seconds"] > 0 for entry in costs.roles.values())
    assert costs.total("flops") == pytest.approx(200 * tokens + 12_000 + 20 * marked + 2760)


def test_every_role_waits_for_its_own_cuda_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after each phase, on the devices that hold something."""
    waited: list[int] = []
    model, costs = tiny_model(seed=5), CostLedger()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: [1, 0, 1][device])
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    sampler = MeteredSampler(sampler_of(model), costs, "evaluation", 1)
    teacher = MeteredTeacher(teacher_of(model), costs, 1)
    trainer = MeteredTrainer(trainer_of(model), costs, (1, 1))
    [batch] = micro_batches([TrainingExample([1], [2, 0], [True, True])], micro_batch_tokens=9)
    for work in (
        lambda: sampler.sample([prompt_of([1])], SamplingConfig(max_completion_tokens=2), seed=0),
        lambda: teacher.score([TokenSequence([1], [2, 0])], "sampled"),
        lambda: trainer.forward_backward(batch, CrossEntropy()),
        lambda: trainer.optimizer_step(learning_rate=1e-3, divisor=2),
    ):
        waited.clear()
        work()
        assert waited == [0, 2, 0, 2]

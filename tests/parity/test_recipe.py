"""The package is recipes/minimal.py: the same models, prompts and random numbers give the same everything.

The real loop runs next to the recipe's ``train_step``, in float64, over three updates. They share no code: the recipe
pads to one block, takes full logits, keeps finished rows in the batch and divides before backward.
"""

from __future__ import annotations

import copy
import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny import EOS, gradient_of, prompt_of, sampler_of, teacher_of, tiny_model, trainer_of
from understudy.advantages import CreditRules
from understudy.assembly import Parts
from understudy.backends.decoding import rollout_uniforms
from understudy.batching import micro_batches
from understudy.config import OptimConfig, RunConfig, SamplingConfig, StudentConfig
from understudy.loop import on_policy_loop
from understudy.objectives import FullDivergence, PolicyGradient
from understudy.rollouts import step_seed
from understudy.signals import Needs
from understudy.types import ScoredRollout, TrainingExample

PATH = Path(__file__).resolve().parents[2] / "recipes" / "minimal.py"
spec = importlib.util.spec_from_file_location("recipe_minimal_for_parity", PATH)
assert spec is not None
assert spec.loader is not None
minimal = importlib.util.module_from_spec(spec)
spec.loader.exec_module(minimal)

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, EOS, 2], [3, 3]]
STEPS, CAP, CLIP, LEARNING_RATE = 3, 6, 0.5, 1e-2
EXACT = 1e-9


class Witness:
    """In the recorder's place: keeps what passes by."""

    first_step = 0

    def __init__(self) -> None:
        self.rollouts: list[Sequence[ScoredRollout]] = []
        self.examples: list[Sequence[TrainingExample]] = []
        self.rows: list[dict[str, float]] = []

    def inspect(
        self, row: dict[str, float], scored: Sequence[ScoredRollout], examples: Sequence[TrainingExample]
    ) -> None:
        pass

    def keep_rollouts(self, step: int, scored: Sequence[ScoredRollout], examples: Sequence[TrainingExample]) -> None:
        self.rollouts.append(scored)
        self.examples.append(examples)

    def record(self, step: int, row: dict[str, float]) -> None:
        self.rows.append(row)

    def finish_step(self) -> str:
        return "continue"


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_the_loop_is_the_recipe(estimator: str, packing: bool) -> None:
    full = estimator == "full"
    student, teacher = tiny_model(seed=1, vocab_size=12), tiny_model(seed=2, vocab_size=12)
    other = copy.deepcopy(student)
    frozen = [p.clone() for p in teacher.parameters()]
    sampling = SamplingConfig(group_size=4, groups_per_batch=3, max_completion_tokens=CAP, max_batch_rows=5)
    optim = OptimConfig(learning_rate=LEARNING_RATE, num_steps=1, grad_clip=CLIP, betas=(0.9, 0.95), weight_decay=0.0)
    config = RunConfig(
        output_dir="unused", student=StudentConfig(model="unused"), sampling=sampling, optim=optim, seed=7
    )
    marks = teacher_of(teacher, batch_tokens=50)
    trainer = trainer_of(student, **optim.model_dump())
    sampler = sampler_of(student)
    batching: dict[str, Any] = {"micro_batch_tokens": 40, "packing": packing, "dtype": torch.float64}
    objective = FullDivergence({"default": marks.head}) if full else PolicyGradient()
    optimizer = torch.optim.AdamW(other.parameters(), LEARNING_RATE, (0.9, 0.95), weight_decay=0.0)
    witness = Witness()
    completed_early = 0
    for step in range(STEPS):
        parts = Parts(
            config=config.model_copy(update={"optim": optim.model_copy(update={"num_steps": step + 1})}),
            sampler=sampler,
            teachers={"default": marks},
            page_teachers={},
            page_reference=None,
            reference=None,
            trainer=trainer,
            evaluator=sampler,
            objective=objective,
            needs=Needs(teacher="hidden" if full else "sampled", reference="sampled", topk=0),
            grader=None,
            prompts=[prompt_of(ids, i) for i, ids in enumerate(PROMPTS)],
            tasks=[],
            decode=str,
            batching=batching,
            credit=CreditRules(estimator="full" if full else "sampled"),
        )
        witness.first_step = step
        on_policy_loop(parts, witness)  # pyright: ignore[reportArgumentType]

        prompts = parts.prompts_at(step)
        seed = step_seed(config.seed, step)
        seen: Counter[int] = Counter()  # a step that spans two epochs may hold a prompt twice: samples 4 to 7
        draws = []
        for index in (p.index for p in prompts for _ in range(4)):
            draws.append(rollout_uniforms(seed, index, seen[index], CAP))
            seen[index] += 1
        uniforms = np.stack(draws)
        options: dict[str, Any] = {"stop_ids": {EOS}, "max_completion_tokens": CAP, "uniforms": torch.tensor(uniforms)}
        prompt_ids = [list(p.prompt_ids) for p in prompts]
        rows = [ids for ids in prompt_ids for _ in range(4)]

        # 1. the same completions, with the same log-probabilities
        rollouts = [scored.rollout for scored in witness.rollouts[step]]
        expected = minimal.sample(other, rows, **options)
        assert [list(r.prompt.prompt_ids) for r in rollouts] == rows
        assert [list(r.completion_ids) for r in rollouts] == [ids for ids, _ in expected]
        for rollout, (ids, logprobs) in zip(rollouts, expected, strict=True):
            assert rollout.sampler_logprobs == pytest.approx(logprobs, abs=EXACT)
            assert rollout.finish_reason == ("stop" if ids[-1] == EOS else "length")
            completed_early += ids[-1] == EOS

        # 2. the same marks
        completions = [ids for ids, _ in expected]
        with torch.no_grad():
            tables = minimal.completion_logprobs(teacher, rows, completions)
        for scored, table in zip(witness.rollouts[step], tables, strict=True):
            assert scored.scores is not None
            marked = table.gather(1, torch.tensor(scored.rollout.completion_ids)[:, None])[:, 0].tolist()
            assert scored.scores.teacher_logprobs == pytest.approx(marked, abs=EXACT)

        # 3. the same gradient, from a trainer that holds the recipe's weights before its step
        before = trainer_of(copy.deepcopy(other))
        for batch in micro_batches(witness.examples[step], **batching):
            before.forward_backward(batch, objective)
        gradient = gradient_of(before) / sum(map(len, completions))
        metrics = minimal.train_step(
            other, teacher, optimizer, prompt_ids, group_size=4, **options, estimator=estimator, grad_clip=CLIP
        )
        clipped = torch.cat([p.grad.flatten() for p in other.parameters()])
        norm = float(gradient.norm())
        torch.testing.assert_close(gradient * min(1, CLIP / (norm + 1e-6)), clipped, rtol=0, atol=EXACT)

        # 4. the same numbers, and the same weights after the step
        row = witness.rows[step]
        assert row["optim/grad_norm"] == pytest.approx(metrics["optim/grad_norm"], rel=EXACT)
        assert row["reverse_kl/mean"] == pytest.approx(metrics["reverse_kl/mean"], abs=EXACT)
        assert row["completion_length/mean"] == metrics["completion_length/mean"]
        if full:
            assert row["reverse_kl/full"] == pytest.approx(metrics["reverse_kl/full"], rel=1e-5)  # a float32 metric
            assert row["optim/loss"] == pytest.approx(metrics["reverse_kl/full"], rel=EXACT)
        else:
            assert row["ratio/max"] == pytest.approx(metrics["ratio/max"], rel=EXACT)
            assert row["optim/loss"] == pytest.approx(metrics["reverse_kl/mean"], abs=EXACT)
        for mine, theirs in zip(student.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=EXACT)
    assert 0 < completed_early < 12 * STEPS  # both kinds of completion occurred
    assert all(map(torch.equal, frozen, teacher.parameters()))

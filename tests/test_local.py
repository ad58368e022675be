"""The local backend's roles. Their gradients and scores are judged in tests/parity."""

import re
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import EOS, gradient_of, prompt_of, sampler_of, teacher_of, tiny_model, tiny_tokenizer, trainer_of
from understudy import head_kernels
from understudy.backends import local
from understudy.backends.language_model import LanguageModel
from understudy.backends.loading import load_model, load_student
from understudy.backends.local import LocalSampler, LocalTrainer
from understudy.batching import micro_batches
from understudy.config import LoraConfig, OptimConfig, SamplingConfig, StudentConfig
from understudy.errors import ConfigError, RunError
from understudy.lm_head import LMHead
from understudy.objectives import CrossEntropy
from understudy.tokenization import ModelText
from understudy.types import Batch, HiddenScores, LossOutput, Rollout, TokenSequence, TopkScores, TrainingExample

PROMPTS = [prompt_of(ids, i) for i, ids in enumerate([[1, 2, 3], [4], [5, 4, 3, 2, 1, 5, 3], [2, 2]])]
SAMPLING = SamplingConfig(group_size=4, max_completion_tokens=6)


def written(groups: list[list[Rollout]]) -> list[list[list[int]]]:
    return [[list(r.completion_ids) for r in group] for group in groups]


def test_groups_belong_to_their_prompts_in_order() -> None:
    groups = sampler_of(tiny_model(seed=5)).sample(PROMPTS, SAMPLING, seed=1)
    assert [[r.prompt for r in group] for group in groups] == [[prompt] * 4 for prompt in PROMPTS]
    assert len({tuple(ids) for ids in written(groups)[1]}) > 1  # a group is not one answer four times


def test_a_rollout_does_not_depend_on_its_neighbours() -> None:
    sampler = sampler_of(tiny_model(seed=5))
    together = sampler.sample(PROMPTS, SAMPLING, seed=1)
    for prompt, group in zip(PROMPTS, together, strict=True):
        [lone] = sampler.sample([prompt], SAMPLING, seed=1)
        [first] = sampler.sample([prompt], SAMPLING.model_copy(update={"group_size": 1}), seed=1)
        assert written([lone]) == written([group])
        assert written([first]) == written([group[:1]])
        for one, other in zip(lone, group, strict=True):
            assert one.sampler_logprobs == pytest.approx(other.sampler_logprobs, abs=1e-12)
    assert written(sampler.sample(PROMPTS[::-1], SAMPLING, seed=1)) == written(together)[::-1]
    assert written(sampler.sample(PROMPTS, SAMPLING, seed=2)) != written(together)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_rows_decoded_at_once_change_nothing(rows: int) -> None:
    sampler = sampler_of(tiny_model(seed=5))
    limited = sampler.sample(PROMPTS, SAMPLING.model_copy(update={"max_batch_rows": rows}), seed=1)
    for group, expected in zip(limited, sampler.sample(PROMPTS, SAMPLING, seed=1), strict=True):
        assert written([group]) == written([expected])
        for one, other in zip(group, expected, strict=True):
            assert one.sampler_logprobs == pytest.approx(other.sampler_logprobs, abs=1e-12)


def test_a_prompt_asked_twice_gets_further_samples() -> None:
    sampler = sampler_of(tiny_model(seed=5))
    first, second = sampler.sample([PROMPTS[0], PROMPTS[0]], SAMPLING, seed=1)
    [eight] = sampler.sample([PROMPTS[0]], SAMPLING.model_copy(update={"group_size": 8}), seed=1)
    assert written([first + second]) == written([eight])
    assert written([first]) != written([second])


def test_finish_reasons_and_versions() -> None:
    sampler = sampler_of(tiny_model(seed=5))
    sampler.set_policy_version(7)
    rollouts = [r for group in sampler.sample(PROMPTS, SAMPLING, seed=1) for r in group]
    for r in rollouts:
        assert EOS not in r.completion_ids[:-1]
        assert r.finish_reason == ("stop" if r.completion_ids[-1] == EOS else "length")
        assert r.finish_reason == "stop" or len(r.completion_ids) == 6
        assert (r.policy_version_start, r.policy_version_end) == (7, 7)
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}


def test_without_stop_ids_everything_is_cut() -> None:
    [group] = sampler_of(tiny_model(seed=5), stop_ids=frozenset()).sample(PROMPTS[:1], SAMPLING, seed=1)
    assert [(len(r.completion_ids), r.finish_reason) for r in group] == [(6, "length")] * 4


def test_sampler_and_trainer_share_their_weights() -> None:
    """Nothing is copied: an update shows in the next rollout's log-probabilities."""
    model = LanguageModel(tiny_model(seed=5))
    sampler, trainer = sampler_of(model.model), trainer_of(model.model)
    [batch] = micro_batches([TrainingExample([1, 2], [3, EOS], [True, True])], micro_batch_tokens=99)
    trainer.forward_backward(batch, CrossEntropy())
    trainer.optimizer_step(learning_rate=0.05, divisor=2)
    for r in (r for group in sampler.sample(PROMPTS, SAMPLING, seed=1) for r in group):
        [logprobs] = trainer.compute_logprobs([TokenSequence(r.prompt.prompt_ids, r.completion_ids)])
        assert r.sampler_logprobs == pytest.approx(logprobs, abs=1e-11)


def examples() -> list[TrainingExample]:
    return [TrainingExample([1, 2], [3, EOS], [True, True]), TrainingExample([4], [5, 5, 1], [True, False, True])]


def test_the_trainer_adds_gradients_up_and_divides_once() -> None:
    """Against torch.optim.AdamW on gradients put together by hand."""
    model, other = tiny_model(seed=5), tiny_model(seed=5)
    trainer = trainer_of(model, grad_clip=0.1, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6)
    for batch in micro_batches(examples(), micro_batch_tokens=1):
        trainer.forward_backward(batch, CrossEntropy())
    norm = trainer.optimizer_step(learning_rate=1e-2, divisor=4)["grad_norm"]
    assert all(p.grad is None for p in model.parameters())
    terms = []
    for prompt, completion, kept in (([1, 2], [3, EOS], [0, 1]), ([4], [5, 5, 1], [0, 2])):
        table = other(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        terms += [-table[len(prompt) - 1 + t, completion[t]] / 4 for t in kept]
    torch.stack(terms).sum().backward()
    expected = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
    torch.optim.AdamW(other.parameters(), 1e-2, (0.8, 0.9), 1e-6, 0.3).step()
    assert norm == pytest.approx(float(expected), rel=1e-12)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_a_gradient_that_is_not_finite_stops_the_run_and_spares_the_weights() -> None:
    model = tiny_model(seed=5)
    before = [p.clone() for p in model.parameters()]
    trainer = trainer_of(model)
    next(iter(model.parameters())).grad = torch.full_like(next(iter(model.parameters())), float("inf"))
    with pytest.raises(RunError, match="gradient's norm is"):
        trainer.optimizer_step(learning_rate=1e-2, divisor=1)
    assert all(map(torch.equal, before, model.parameters()))
    assert torch.count_nonzero(gradient_of(trainer)) == 0


def test_saved_state_continues_exactly(tmp_path: Path) -> None:
    """Two steps in one go = one step, save, load, one step."""

    def step(trainer) -> None:
        for batch in micro_batches(examples(), micro_batch_tokens=99):
            trainer.forward_backward(batch, CrossEntropy())
        trainer.optimizer_step(learning_rate=1e-2, divisor=4)

    whole = trainer_of(tiny_model(seed=5, dtype=torch.float32))
    step(whole)
    whole.save_pretrained(tmp_path)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    step(whole)
    loaded = load_model(str(tmp_path), role="student", dtype=torch.float32, device=torch.device("cpu"))
    resumed = trainer_of(loaded)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    step(resumed)
    for mine, theirs in zip(loaded.parameters(), whole.model.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("spoil", [lambda own: own.pop("exp_avg"), lambda own: own.update(exp_avg=torch.zeros(3))])
def test_a_state_of_other_weights_is_refused(spoil: Callable[[dict[str, Any]], object]) -> None:
    trainer = trainer_of(tiny_model(seed=5, dtype=torch.float32))
    for batch in micro_batches(examples(), micro_batch_tokens=99):
        trainer.forward_backward(batch, CrossEntropy())
    trainer.optimizer_step(learning_rate=1e-2, divisor=4)
    state = trainer.state_dict()
    shape = tuple(state["optimizer"]["state"][1]["exp_avg"].shape)
    spoil(state["optimizer"]["state"][1])
    with pytest.raises(ValueError, match=re.escape("optimizer state 1 of shapes {'step': ()")) as refused:
        trainer_of(tiny_model(seed=5, dtype=torch.float32)).load_state_dict(state)
    assert str(refused.value).endswith(f"; the weights have {shape}")


def test_dropout_is_off_in_every_role() -> None:
    model = tiny_model("llama", seed=5)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.9
    model.train()
    trainer, teacher = trainer_of(model), teacher_of(model)
    sequence = [TokenSequence([1, 2, 3], [4, 5, EOS])]
    assert not any(module.training for module in model.modules())
    assert trainer.compute_logprobs(sequence) == teacher.compute_logprobs(sequence)
    gradients = []
    for _ in range(2):
        [batch] = micro_batches([TrainingExample([1, 2, 3], [4, 5, EOS], [True] * 3)], micro_batch_tokens=99)
        trainer.forward_backward(batch, CrossEntropy())
        gradients.append(gradient_of(trainer))
    assert torch.equal(*gradients)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers the old way
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "gradient checkpointing"])
def test_adapters_train_alone(tmp_path: Path, recompute: bool) -> None:
    """LoRA: at the start every score is the base's; a step moves the adapters and nothing else."""
    tiny_model("llama", seed=5, dtype=torch.float32).save_pretrained(tmp_path)
    config = StudentConfig(
        model=str(tmp_path), device="cpu", dtype="float64", lora=LoraConfig(rank=2), gradient_checkpointing=recompute
    )
    model = load_student(config)
    trainer = LocalTrainer(model, OptimConfig())
    plain = teacher_of(load_model(str(tmp_path), role="teacher", dtype=torch.float64, device=torch.device("cpu")))
    sequences = [TokenSequence(e.prompt_ids, e.completion_ids) for e in examples()]
    base = plain.compute_logprobs(sequences)
    assert trainer.compute_logprobs(sequences) == [pytest.approx(row, abs=1e-6) for row in base]
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    trained = {name for name, p in model.model.named_parameters() if p.requires_grad}
    assert trained == {name for name in before if "lora_" in name}
    assert len(trained) == 2 * 2 * 7  # A and B of seven matrices in two layers
    for _ in range(2):  # B starts at zero, so A moves from the second step on
        for batch in micro_batches(examples(), micro_batch_tokens=99):
            trainer.forward_backward(batch, CrossEntropy())
        trainer.optimizer_step(learning_rate=1e-2, divisor=4)
    for name, parameter in model.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
    sizes = [p.numel() for name, p in model.model.named_parameters() if name in trained]
    assert model.matmul_parameters()[1] == sum(sizes)
    likelier = zip(examples(), trainer.compute_logprobs(sequences), base, strict=True)
    gains = [(new, old) for e, *rows in likelier for keep, new, old in zip(e.loss_mask, *rows, strict=True) if keep]
    assert sum(new for new, _ in gains) > sum(old for _, old in gains) + 0.05


@pytest.mark.parametrize("kind", ["granite", "cohere", "gemma2"])
def test_heads_know_scales_and_softcaps(kind: str) -> None:
    model = tiny_model(kind, seed=5)
    wrapped = LanguageModel(model)
    ids = torch.tensor([[1, 2, 3, 4]])
    ours = wrapped.head.logits(wrapped.hidden(ids).last_hidden_state[0])
    torch.testing.assert_close(ours, model(input_ids=ids).logits[0], rtol=0, atol=1e-12)
    head = wrapped.head
    assert (head.scale, head.softcap) == {"granite": (2.0, None), "cohere": (0.25, None), "gemma2": (1.0, 3.0)}[kind]


def test_an_unknown_head_is_refused() -> None:
    model = tiny_model("granite", seed=5)
    forward = model.forward

    def shifted(**inputs):
        output = forward(**inputs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output

    model.forward = shifted
    with pytest.raises(ConfigError, match="differ by 5"):
        LanguageModel(model)


def test_matmul_parameters_by_hand() -> None:
    """Per layer of the tiny Llama: q 16*16, k and v 16*8, o 16*16, three of 16*24; the head 6*16; look-ups are free."""
    model = tiny_model("llama", seed=5)
    per_layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
    assert LanguageModel(model).matmul_parameters() == (2 * per_layer + 96, 2 * per_layer + 96)
    tied = tiny_model("gemma3_text", seed=5)
    everything, trainable = LanguageModel(tied).matmul_parameters()
    assert everything == sum(p.numel() for p in tied.parameters() if p.dim() > 1)  # the one matrix is used as head too
    assert trainable == everything
    model.requires_grad_(False)
    assert LanguageModel(model).matmul_parameters() == (2 * per_layer + 96, 0)


def out_of_memory(*arguments: Any, **keywords: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def assert_same_rollouts(groups: list[list[Rollout]], expected: list[list[Rollout]]) -> None:
    assert written(groups) == written(expected)
    for one, other in zip(chain(*groups), chain(*expected), strict=True):
        assert one.prompt is other.prompt
        assert one.finish_reason == other.finish_reason
        assert one.sampler_logprobs == pytest.approx(other.sampler_logprobs, abs=1e-12)


NO_ROOM = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
)


class Decodes:
    """How many rows are decoded at once; more than ``most`` do not fit in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = 10**6, error: Exception = NO_ROOM[0]) -> None:
        self.rows: list[int] = []
        self.failed: list[int] = []
        self.most, self.decode, self.error = most, local.decode, error
        monkeypatch.setattr(local, "decode", self)

    def __call__(self, model: LanguageModel, prompts: Sequence[Sequence[int]], *arguments: Any, **options: Any) -> Any:
        if len(prompts) > self.most:
            self.failed.append(len(prompts))
            raise self.error
        self.rows.append(len(prompts))
        return self.decode(model, prompts, *arguments, **options)


@pytest.mark.parametrize("fitting", [1, 3, 5, 16])
def test_no_more_rows_are_decoded_than_memory_holds(fitting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_of(tiny_model(seed=5))
    expected = sampler.sample(PROMPTS, SAMPLING, seed=1)
    # The longest prompt has 7 tokens, and 6 are written.
    row = LanguageModel(tiny_model(seed=5)).decoding_bytes(13)
    monkeypatch.setattr(local, "memory_budget", lambda device: fitting * row + row // 2)
    decodes = Decodes(monkeypatch)
    assert_same_rollouts(sampler.sample(PROMPTS, SAMPLING, seed=1), expected)
    assert decodes.rows == [fitting] * (16 // fitting) + [16 % fitting] * (16 % fitting > 0)
    decodes.rows.clear()
    sampler.sample(PROMPTS, SAMPLING.model_copy(update={"max_batch_rows": 2}), seed=1)
    assert decodes.rows == [min(2, fitting)] * (16 // min(2, fitting))


def test_a_row_is_decoded_however_little_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_of(tiny_model(seed=5))
    monkeypatch.setattr(local, "memory_budget", lambda device: 0)
    decodes = Decodes(monkeypatch)
    sampler.sample(PROMPTS, SAMPLING, seed=1)
    assert decodes.rows == [1] * 16


@pytest.mark.parametrize("error", NO_ROOM, ids=["gpu", "cpu", "python"])
def test_batches_that_do_not_fit_are_halved(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = sampler_of(tiny_model(seed=5))
    sampling = SAMPLING.model_copy(update={"max_batch_rows": 14})
    expected = sampler.sample(PROMPTS, sampling, seed=1)
    decodes = Decodes(monkeypatch, most=3, error=error)
    assert_same_rollouts(sampler.sample(PROMPTS, sampling, seed=1), expected)
    assert decodes.failed == [14, 7, 4, 7, 4]
    assert decodes.rows == [3, 2, 2, 3, 2, 2, 2]
    assert [line for line in caplog.messages if "halves" in line] == [
        f"out of memory with {rows} completions at once: decoding them in two halves" for rows in decodes.failed
    ]


@pytest.mark.parametrize("error", NO_ROOM, ids=["gpu", "cpu", "python"])
def test_a_single_row_that_does_not_fit_ends_the_run(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_of(tiny_model(seed=5))
    decodes = Decodes(monkeypatch, most=0, error=error)
    with pytest.raises(RunError, match=r"single completion; lower sampling.max_completion_tokens \(now 6\)"):
        sampler.sample(PROMPTS, SAMPLING, seed=1)
    assert decodes.failed == [16, 8, 4, 2, 1]


def test_other_failures_of_decoding_are_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Decodes(monkeypatch, most=0, error=RuntimeError("sizes do not match"))
    with pytest.raises(RuntimeError, match="sizes do not match"):
        sampler_of(tiny_model(seed=5)).sample(PROMPTS, SAMPLING, seed=1)
    assert decodes.failed == [16]


def test_only_caches_that_cannot_choose_rows_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    for architecture in ("qwen3", "gemma2", "gemma3_text"):
        sampler_of(tiny_model(architecture))
    assert caplog.messages == []
    sampler_of(tiny_model("lfm2"))
    [message] = [record.message for record in caplog.records if record.name == "understudy"]
    assert message.startswith("Lfm2ForCausalLM keeps states that rows cannot be chosen from")


WORDS = ("<end>", "a", "b", "c", "d", "e")


def test_stop_strings_end_completions() -> None:
    """The token that completes one is the last; the rest is as if there had been none."""
    tokenizer = tiny_tokenizer(WORDS)
    text = ModelText("student", tokenizer, tokenizer.get_vocab(), 6, frozenset({EOS}), 64)
    model = LanguageModel(tiny_model(seed=5))
    sampling = SAMPLING.model_copy(update={"group_size": 16})
    free = LocalSampler(model, stop_ids=frozenset({EOS})).sample(PROMPTS, sampling, seed=1)
    stops = ("b c", "d d", "e a")
    sampler = LocalSampler(model, stop_ids=frozenset({EOS}), ends=text.stop_test(stops))
    ended = sampler.sample(PROMPTS, sampling, seed=1)
    reasons: set[tuple[bool, str]] = set()
    for rollout, whole in zip(chain(*ended), chain(*free), strict=True):
        ids = list(whole.completion_ids)
        words = [WORDS[token] for token in ids]
        found = [n for n in range(2, len(ids) + 1) if " ".join(words[n - 2 : n]) in stops]
        length = found[0] if found else len(ids)
        assert list(rollout.completion_ids) == ids[:length]
        assert rollout.sampler_logprobs == pytest.approx(whole.sampler_logprobs[:length], abs=1e-12)
        assert rollout.finish_reason == ("stop" if found or ids[-1] == EOS else "length")
        reasons.add((bool(found), rollout.finish_reason))
    assert reasons == {(True, "stop"), (False, "stop"), (False, "length")}


def test_out_of_memory_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(seed=5)
    sampler, teacher, trainer = sampler_of(model), teacher_of(model, batch_tokens=55), trainer_of(model)
    [batch] = micro_batches(examples(), micro_batch_tokens=99)
    trainer.forward_backward(batch, CrossEntropy())
    sampler.sample(PROMPTS, SAMPLING, seed=1)
    monkeypatch.setattr(LanguageModel, "hidden", out_of_memory)
    monkeypatch.setattr(torch.optim.AdamW, "step", out_of_memory)
    with pytest.raises(RunError, match=r"single completion; lower sampling.max_completion_tokens \(now 6\)"):
        sampler.sample(PROMPTS, SAMPLING, seed=1)
    with pytest.raises(RunError, match=r"scoring a single completion; lower sampling.max_completion_tokens"):
        teacher.compute_logprobs([TokenSequence([1], [2])])
    with pytest.raises(torch.OutOfMemoryError):  # for whoever can make the batch smaller
        trainer.forward_backward(batch, CrossEntropy())
    with pytest.raises(RunError, match=r"updating the weights; train adapters \(\[student.lora\]\)"):
        trainer.optimizer_step(learning_rate=1e-2, divisor=4)


def test_alternatives_need_no_more_logits_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of(tiny_model(seed=5, dtype=torch.float32))
    sequences = [TokenSequence([1, 2], [3, 1, 4, 5, 2, EOS]), TokenSequence([4], [5])]
    expected = teacher.score(sequences, "topk", topk=3)
    held: list[int] = []
    logits = head_kernels.Projection.logits

    def counted(
        projection: head_kernels.Projection, hidden: torch.Tensor, low: int, high: int, out: torch.Tensor
    ) -> torch.Tensor:
        held.append(out.numel())
        return logits(projection, hidden, low, high, out)

    monkeypatch.setattr(head_kernels, "TILE_ROWS", 2)
    monkeypatch.setattr(head_kernels, "TILE_WIDTH", 4)  # of six: the best of one tile compete with the next one's
    monkeypatch.setattr(head_kernels.Projection, "logits", counted)
    for score, whole in zip(teacher.score(sequences, "topk", topk=3), expected, strict=True):
        assert isinstance(score, TopkScores)
        assert isinstance(whole, TopkScores)
        assert score.ids == whole.ids
        assert all(type(token) is int for row in score.ids for token in row)
        torch.testing.assert_close(torch.tensor(score.logprobs), torch.tensor(whole.logprobs))
    assert max(held) <= 8


def test_hidden_states_are_on_a_device_for_one_micro_batch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher hands them over on the CPU, once per pass; the trainer moves what a micro-batch needs."""
    moved: list[tuple[int, ...]] = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (moved.append(tuple(self.shape)), cpu(self))[1])
    model = tiny_model(seed=5)
    [score] = teacher_of(model).score([TokenSequence([1, 2], [3, EOS])], "hidden")
    assert moved == [(2, 16)]
    assert isinstance(score, HiddenScores)
    [batch] = micro_batches(
        [TrainingExample([1, 2], [3, EOS], [True, True], teacher_hidden=score.teacher_hidden)], micro_batch_tokens=99
    )
    trainer = trainer_of(model)
    trainer.model.device = torch.device("meta")
    seen: list[str] = []

    def objective(batch: Batch, hidden: torch.Tensor, head: LMHead) -> LossOutput:
        assert batch.teacher_hidden is not None
        seen.append(batch.teacher_hidden.device.type)
        return LossOutput(hidden.sum(), {})

    trainer.forward_backward(batch, objective)
    assert seen == ["meta"]
    assert batch.teacher_hidden is not None
    assert batch.teacher_hidden.device.type == "cpu"

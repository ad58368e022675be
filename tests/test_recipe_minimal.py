"""recipes/minimal.py, the executable specification: exact where it must be, and it learns."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PATH = Path(__file__).resolve().parents[1] / "recipes" / "minimal.py"
spec = importlib.util.spec_from_file_location("recipe_minimal", PATH)
assert spec is not None
assert spec.loader is not None
minimal = importlib.util.module_from_spec(spec)
spec.loader.exec_module(minimal)

WORDS = ["<eos>", *"abcdefghijk"]  # 12 tokens; 0 ends a completion, and is also what rows are padded with
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
CAP = 6


def tiny_model(seed: int, sharpness: float = 1.0) -> Qwen3ForCausalLM:
    """A random Qwen3 of a few thousand weights. ``sharpness`` scales its head, away from uniform."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.25 * sharpness)
    return model


def uniforms(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, CAP, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sample(model: Qwen3ForCausalLM, prompts: list[list[int]], draws: torch.Tensor) -> list:
    return minimal.sample(model, prompts, stop_ids={0}, max_completion_tokens=CAP, uniforms=draws)


def test_stays_under_200_lines() -> None:
    assert len(PATH.read_text().splitlines()) < 200


def test_sampling_matches_one_row_at_a_time_without_a_cache() -> None:
    """Padding, positions and cache change nothing: a token follows from its prefix and its uniform alone."""
    model, prompts, draws = tiny_model(0, sharpness=4), PROMPTS * 4, uniforms(12)
    rollouts = sample(model, prompts, draws)
    for prompt, row, (completion_ids, sampler_logprobs) in zip(prompts, draws, rollouts, strict=True):
        for t, token in enumerate(completion_ids):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + completion_ids[:t]])).logits[0, -1].double()
            cumulative = logits.softmax(0).cumsum(0)
            assert token == int((cumulative > row[t] * cumulative[-1]).nonzero()[0])
            assert sampler_logprobs[t] == pytest.approx(float(logits.log_softmax(0)[token]), abs=1e-5)
    lengths = {len(ids) for ids, _ in rollouts}
    assert len(lengths) > 1  # the seed gives both kinds: finished and cut
    for completion_ids, _ in rollouts:
        assert 0 not in completion_ids[:-1]
        assert completion_ids[-1] == 0 or len(completion_ids) == CAP


def test_completion_logprobs_match_one_row_at_a_time() -> None:
    model, completions = tiny_model(1, sharpness=4), [[3, 0], [1, 2, 3, 4], [0]]
    batched = minimal.completion_logprobs(model, PROMPTS, completions)
    for prompt, completion, logprobs in zip(PROMPTS, completions, batched, strict=True):
        assert logprobs.shape == (len(completion), len(WORDS))
        for t in range(len(completion)):
            alone = model(torch.tensor([prompt + completion[:t]])).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(logprobs[t], alone, atol=1e-5, rtol=0)


def test_sampled_loss_by_hand() -> None:
    trainer = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = minimal.sampled_loss(trainer, torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -0.5]))
    loss.backward()
    # advantages are -0.5 and +1.5 and ratios 1; minimising raises the second token and lowers the first
    assert loss.item() == pytest.approx(-1.0)
    assert trainer.grad is not None
    assert trainer.grad.tolist() == pytest.approx([0.5, -1.5])


def test_full_loss_by_hand() -> None:
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert minimal.full_loss(student, teacher).item() == pytest.approx(0.1438410362)  # .5 ln 2 + .5 ln (2/3)


def test_sampled_gradient_is_the_full_one_on_average() -> None:
    """Weighted by their probabilities, the sampled gradients of all tokens add up to the exact one."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher = torch.randn(5, dtype=torch.float64, generator=generator).log_softmax(0)
    logprobs = logits.log_softmax(0)
    expected = sum(
        logprobs[v].exp().detach()
        * minimal.sampled_loss(logprobs[v : v + 1], logprobs[v : v + 1].detach(), teacher[v : v + 1])
        for v in range(5)
    )
    [sampled] = torch.autograd.grad(expected, logits, retain_graph=True)
    [full] = torch.autograd.grad(minimal.full_loss(logprobs[None], teacher[None]), logits)
    torch.testing.assert_close(sampled, full)


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_teacher_equal_to_student_teaches_nothing(estimator: str) -> None:
    student, teacher = (tiny_model(2, sharpness=4).double() for _ in range(2))
    metrics = minimal.train_step(
        student,
        teacher,
        torch.optim.SGD(student.parameters(), lr=1.0),
        PROMPTS,
        group_size=4,
        stop_ids={0},
        max_completion_tokens=CAP,
        uniforms=uniforms(12),
        estimator=estimator,
    )
    # In float64, where a cached decode and a full pass round alike to within this.
    assert metrics["reverse_kl/mean"] == pytest.approx(0, abs=1e-12)
    assert metrics["reverse_kl/full"] == 0
    assert metrics["optim/grad_norm"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_a_few_steps_lower_the_exact_kl(estimator: str) -> None:
    student, teacher = tiny_model(3), tiny_model(4, sharpness=4)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    held_out, draws = [[2, 4, 6], [9, 1]] * 32, uniforms(64, seed=99)

    def exact_kl() -> float:
        completions = [ids for ids, _ in sample(student, held_out, draws)]
        with torch.no_grad():
            own, other = (torch.cat(minimal.completion_logprobs(m, held_out, completions)) for m in (student, teacher))
        return float(minimal.full_loss(own, other)) / len(own)

    start = exact_kl()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(30):
        minimal.train_step(
            student,
            teacher,
            optimizer,
            PROMPTS,
            group_size=16,
            stop_ids={0},
            max_completion_tokens=CAP,
            uniforms=uniforms(48, seed=step),
            estimator=estimator,
        )
    assert exact_kl() < 0.5 * start
    assert all(torch.equal(before[name], weight) for name, weight in teacher.state_dict().items())


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    for role, seed in (("student", 5), ("teacher", 6)):
        tiny_model(seed).save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a b c"}\n{"prompt": "d"}\n\n')
    arguments = "--student student --teacher teacher --prompts prompts.jsonl --output out --steps 2 --group-size 2"
    more = "--groups-per-batch 2 --max-completion-tokens 4 --learning-rate 1e-2 --estimator full --seed 1"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minimal.py", *arguments.split(), *more.split()])
    minimal.main()
    steps = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [step["step"] for step in steps] == [0, 1]
    assert not torch.equal(
        Qwen3ForCausalLM.from_pretrained("out").lm_head.weight,
        Qwen3ForCausalLM.from_pretrained("student").lm_head.weight,
    )

"""On-policy distillation in one file: the student writes, the teacher marks every token, the student learns.

The executable specification of understudy: it needs torch and transformers only, reads from top to bottom,
and the package is tested against it.

    python recipes/minimal.py --student S --teacher T --prompts prompts.jsonl --output distilled

S and T are folders (or hub ids) of causal language models with one vocabulary; each line of prompts.jsonl is
{"prompt": "..."}. Shapes: B sequences of L tokens, T completion tokens in one, N in a step, V vocabulary.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def pad(rows: list[list[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, both [B, L]. Token 0 fills the columns that the mask hides."""
    pairs = [(row, [0] * (max(map(len, rows)) - len(row))) for row in rows]
    input_ids = [gap + row if left else row + gap for row, gap in pairs]
    mask = [gap + [1] * len(row) if left else [1] * len(row) + gap for row, gap in pairs]
    return torch.tensor(input_ids, device=device), torch.tensor(mask, device=device)


def log_softmax(logits: Tensor) -> Tensor:
    """[..., V] -> [..., V], in float32 at least: bfloat16 log-probabilities are too coarse to subtract."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


@torch.no_grad()
def sample(
    model, prompt_ids: list[list[int]], *, stop_ids: set[int], max_completion_tokens: int, uniforms: Tensor
) -> list[tuple[list[int], list[float]]]:
    """One completion per prompt at temperature 1: (completion_ids, sampler_logprobs), T of each.

    ``uniforms`` [B, max_completion_tokens], float64 in [0, 1), is all the randomness: one per row and token.
    A completion ends with its first stop token, which belongs to it and trains, or at the cap. Nothing is
    appended then: the student wrote no stop token.
    """
    # Padded on the left: every row's last prompt token is in the last column, so all rows decode in step.
    input_ids, attention_mask = pad(prompt_ids, model.device, left=True)
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # a row's first real token is at 0
    completions: list[tuple[list[int], list[float]]] = [([], []) for _ in prompt_ids]
    running = set(range(len(prompt_ids)))
    cache = None
    for t in range(max_completion_tokens):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = output.past_key_values, output.logits[:, -1]  # [B, V]
        # Inverse CDF: the first token whose cumulative probability exceeds u. In float64, so that rounding
        # favours no token; u is scaled by the total, which is 1 only up to rounding.
        cumulative = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)  # [B, V]
        threshold = uniforms[:, t : t + 1].to(cumulative) * cumulative[:, -1:]  # [B, 1]
        next_ids = torch.searchsorted(cumulative, threshold, right=True)  # [B, 1]
        next_logprobs = log_softmax(logits).gather(1, next_ids)  # [B, 1]
        for row in sorted(running):
            completion_ids, sampler_logprobs = completions[row]
            completion_ids.append(int(next_ids[row]))
            sampler_logprobs.append(float(next_logprobs[row]))
            if completion_ids[-1] in stop_ids:
                running.remove(row)
        if not running:
            break
        # Finished rows run along unread. That changes nothing for the others: rows never look at each other.
        input_ids, position_ids = next_ids, position_ids[:, -1:] + 1
        attention_mask = torch.cat([attention_mask, torch.ones_like(next_ids)], dim=1)
    return completions


def completion_logprobs(model, prompt_ids: list[list[int]], completion_ids_list: list[list[int]]) -> list[Tensor]:
    """The model's log-probabilities at each sequence's completion positions: one [T, V] tensor per sequence.

    One forward pass for all of it. Entry t is the distribution that ``completion_ids[t]`` was drawn from.
    """
    pairs = list(zip(prompt_ids, completion_ids_list, strict=True))
    # Padded on the right: attention is causal, so no real token ever sees the padding.
    input_ids, attention_mask = pad([p + c for p, c in pairs], model.device, left=False)
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits  # [B, L, V]
    # The only shift: position i predicts token i + 1, so the last prompt token predicts completion token 0.
    return [log_softmax(logits[b, len(p) - 1 : len(p) - 1 + len(c)]) for b, (p, c) in enumerate(pairs)]


def sampled_loss(trainer_logprobs: Tensor, sampler_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Three [T] tensors -> scalar sum: policy gradient on the reverse KL of the tokens the student wrote.

    ``reverse_kl`` estimates KL(student || teacher) at each position from one token. Its negative is that
    token's credit: positive where the teacher finds it likelier. It is a constant, as the gradient of
    log p - log q itself averages to zero. The importance ratio carries the gradient: its value is 1, up to
    rounding, while the live weights are those that sampled; its derivative is the score function.
    """
    reverse_kl = (sampler_logprobs - teacher_logprobs).detach()
    advantages = -reverse_kl  # discount 0: a token answers for itself, not for what came after it
    importance_ratio = torch.exp(trainer_logprobs - sampler_logprobs)
    return -(importance_ratio * advantages).sum()


def full_loss(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Two [T, V] tensors -> scalar sum: exact KL(student || teacher) at the positions the student reached.

    The expected gradient of ``sampled_loss`` with less variance: the whole vocabulary speaks, not one draw.
    """
    gap = (student_logprobs - teacher_logprobs).detach()  # its own gradient sums to the gradient of sum(p) = 1: nothing
    return (student_logprobs.exp() * gap).sum()


def train_step(
    student,
    teacher,
    optimizer: torch.optim.Optimizer,
    prompt_ids: list[list[int]],
    *,
    group_size: int,
    stop_ids: set[int],
    max_completion_tokens: int,
    uniforms: Tensor,  # [len(prompt_ids) * group_size, max_completion_tokens]
    estimator: str = "sampled",
    grad_clip: float = 1.0,
) -> dict[str, float]:
    """Rollouts, the teacher's marks, loss, update."""
    student.eval()  # no dropout, here or below: the policy that trains is the one that sampled
    teacher.eval()
    # 1. The student answers every prompt group_size times. Rows: the first prompt's group, the second's, ...
    prompt_ids = [ids for ids in prompt_ids for _ in range(group_size)]
    limits = {"stop_ids": stop_ids, "max_completion_tokens": max_completion_tokens}
    rollouts = sample(student, prompt_ids, **limits, uniforms=uniforms)
    completions = [completion_ids for completion_ids, _ in rollouts]
    # 2. The teacher marks what was written; it writes nothing itself.
    with torch.no_grad():
        teacher_full = torch.cat(completion_logprobs(teacher, prompt_ids, completions))  # [N, V]
    # 3. The same tokens under the student's weights, now with gradient.
    trainer_full = torch.cat(completion_logprobs(student, prompt_ids, completions))  # [N, V]
    sampler_logprobs = trainer_full.new_tensor([x for _, logprobs in rollouts for x in logprobs])  # [N]
    written = torch.tensor([i for ids in completions for i in ids], device=student.device)[:, None]  # [N, 1]
    trainer_logprobs = trainer_full.gather(1, written).squeeze(1)  # [N]
    teacher_logprobs = teacher_full.gather(1, written).squeeze(1)  # [N]
    if estimator == "sampled":
        loss = sampled_loss(trainer_logprobs, sampler_logprobs, teacher_logprobs)
    else:
        loss = full_loss(trainer_full, teacher_full)
    # 4. A sum, divided once by the step's tokens: every token weighs the same, however long its rollout is.
    optimizer.zero_grad()
    (loss / len(written)).backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), grad_clip)
    optimizer.step()  # 5. The next step samples with the new weights: they are the same object.
    return {
        # The same quantity twice: from the sampled tokens (may be negative), over the vocabulary (cannot be).
        "reverse_kl/mean": float((sampler_logprobs - teacher_logprobs).mean()),
        "reverse_kl/full": float(full_loss(trainer_full.detach(), teacher_full)) / len(written),
        "ratio/max": float((trainer_logprobs.detach() - sampler_logprobs).exp().max()),
        "optim/grad_norm": float(grad_norm),
        "completion_length/mean": len(written) / len(rollouts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="On-policy distillation, the smallest complete version.")
    for name in ("--student", "--teacher", "--prompts", "--output"):
        parser.add_argument(name, required=True)
    counts = {"steps": 100, "group-size": 4, "groups-per-batch": 16, "max-completion-tokens": 128, "seed": 0}
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--estimator", choices=["sampled", "full"], default="sampled")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32).to(device)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    if tokenizer.get_vocab() != AutoTokenizer.from_pretrained(args.teacher).get_vocab():
        raise SystemExit("the teacher numbers its tokens differently: it would mark words nobody wrote")
    eos = student.generation_config.eos_token_id  # one id, several, or none
    stop_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
    prompts = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines if line.strip()]

    optimizer = torch.optim.AdamW(student.parameters(), args.learning_rate, (0.9, 0.95), weight_decay=0.0)
    choose, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    limits = {"stop_ids": stop_ids, "max_completion_tokens": args.max_completion_tokens}
    shape = (args.groups_per_batch * args.group_size, args.max_completion_tokens)
    for step in range(args.steps):
        batch = choose.choices(prompts, k=args.groups_per_batch)
        uniforms = torch.rand(shape, dtype=torch.float64, generator=generator)
        options = {"group_size": args.group_size, "uniforms": uniforms, "estimator": args.estimator}
        metrics = train_step(student, teacher, optimizer, batch, **limits, **options)
        print(json.dumps({"step": step, **{name: round(x, 5) for name, x in metrics.items()}}), flush=True)
    student.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()

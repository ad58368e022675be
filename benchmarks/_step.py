"""What step.py measures: its workloads, the clock, and one measurement of understudy in this process."""

from __future__ import annotations

import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lm_head import memory_mb, start_memory

PAD, EOS = 0, 1
LEARNING_RATE = 1e-4
# Hidden size, layers, heads, key-value heads, feed-forward size.
SHAPES = {"student": (256, 4, 4, 2, 1024), "teacher": (512, 8, 8, 4, 1536)}


@dataclass(frozen=True)
class Workload:
    """One optimizer step: ``prompts`` times ``samples`` rows. ``natural``: rows end where a seeded draw says, else at
    ``max_tokens``."""

    vocab: int
    prompts: int
    samples: int
    prompt_tokens: int
    max_tokens: int
    natural: bool = False
    warmup: int = 1
    steps: int = 2

    @property
    def rows(self) -> int:
        return self.prompts * self.samples

    @property
    def lengths(self) -> list[int]:
        """Completion tokens per row, the same on both sides."""
        draw = random.Random(0)
        return [draw.randint(16, self.max_tokens) if self.natural else self.max_tokens for _ in range(self.rows)]

    @property
    def title(self) -> str:
        lengths = f"16 to {self.max_tokens}" if self.natural else str(self.max_tokens)
        shape = f"{self.prompts} prompts x {self.samples} samples, {self.prompt_tokens} + {lengths} tokens"
        return f"{shape}, vocabulary {self.vocab:,}"


WORKLOADS = {
    "a": Workload(512, 16, 4, 32, 128),
    # Minutes per step: a warm-up costs more than it tells.
    "b": Workload(151_936, 16, 4, 32, 128, warmup=0, steps=1),
    "c": Workload(512, 16, 4, 32, 128, natural=True),
    "d": Workload(32_768, 8, 8, 512, 64, warmup=0, steps=1),
}


class Meter:
    """CPU seconds per phase. What a phase calls in another one is charged to that other one alone, so that phases add
    up to the step."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open = ["other"]
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def enter(self, phase: str) -> None:
        self._charge()
        self._open.append(phase)

    def leave(self) -> None:
        self._charge()
        self._open.pop()

    def wrap(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            self.enter(phase)
            try:
                return function(*arguments, **keywords)
            finally:
                self.leave()

        return timed

    def lap(self) -> dict[str, Any]:
        """One step's record; the next one begins."""
        self._charge()
        wall = time.perf_counter()
        phases = {phase: round(seconds, 4) for phase, seconds in self._seconds.items()}
        row = {
            "cpu_s": round(sum(self._seconds.values()), 4),
            "wall_s": round(wall - self._wall, 4),
            "phases": phases,
            **self.counts,
        }
        self._seconds.clear()
        self.counts.clear()
        self._wall = wall
        return row

    def _charge(self) -> None:
        now = time.process_time()
        self._seconds[self._open[-1]] += now - self._cpu
        self._cpu = now


def record(workload: Workload, laps: Sequence[dict[str, Any]], base_mb: float) -> dict[str, Any]:
    """A measurement's row, warm-up left out. Exits where a step did other work than the workload says."""
    expected = sum(workload.lengths)
    for lap in laps:
        if (lap["generated"], lap["trained"]) != (expected, expected):
            raise SystemExit(f"{lap['generated']} tokens generated, {lap['trained']} trained; expected {expected}")
    timed = laps[workload.warmup :]
    return {
        "cpu_s": [lap["cpu_s"] for lap in timed],
        "wall_s": [lap["wall_s"] for lap in timed],
        "phases": [lap["phases"] for lap in timed],
        "generated": expected,
        "trained": expected,
        "micro_batches": timed[0]["micro_batches"],
        "rss_base_mb": round(base_mb, 1),
        "rss_peak_mb": round(memory_mb("VmHWM"), 1),
    }


def prepare(workload: Workload, folder: Path) -> None:
    """Student, teacher, their tokenizer and the prompts, as a user has them on disk."""
    if (folder / "prompts.jsonl").exists():  # written last
        return
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer()
    for seed, (role, (hidden, layers, heads, kv_heads, feed_forward)) in enumerate(SHAPES.items()):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=workload.vocab,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=64,
            intermediate_size=feed_forward,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        Qwen3ForCausalLM(config).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    rows = [json.dumps({"prompt": text}) for text in make_prompts(tokenizer, workload)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")


def make_tokenizer() -> Any:
    """A byte-level BPE of at most 512 entries; larger vocabularies are the models' alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((question(i, j) for i in range(60) for j in range(60)), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    # Messages are their contents and nothing else, so that a message is as long as its text.
    wrapped.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return wrapped


def question(first: int, second: int) -> str:
    return f"what is {first} plus {second} ? the answer is {first + second} . "


def make_prompts(tokenizer: Any, workload: Workload) -> list[str]:
    """Texts of exactly ``prompt_tokens`` tokens each."""
    draw = random.Random(0)
    texts: list[str] = []
    while len(texts) < workload.prompts:
        text = "".join(question(draw.randrange(60), draw.randrange(60)) for _ in range(workload.prompt_tokens // 4))
        text = tokenizer.decode(tokenizer(text)["input_ids"][: workload.prompt_tokens])
        # Cut in the middle of a word, a text may encode to other tokens.
        if len(tokenizer(text)["input_ids"]) == workload.prompt_tokens:
            texts.append(text)
    return texts


def measure_understudy(workload: Workload, folder: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Steps of the loop in ``understudy.loop``, its recorder left out: TRL's side saves and logs nothing either."""
    from understudy.assembly import Given, assemble
    from understudy.batching import micro_batches
    from understudy.config import RunConfig
    from understudy.config_base import set_dotted
    from understudy.costs import CostLedger
    from understudy.loop import sample, score
    from understudy.metrics import rollout_metrics, update_metrics
    from understudy.optimizer_step import learning_rate_at, optimizer_step
    from understudy.preflight import check_run
    from understudy.rollouts import step_seed
    from understudy.weight_sync import sync_weights

    tree: dict[str, Any] = {}
    keys = {
        "output_dir": str(folder / "run"),
        "num_threads": torch.get_num_threads(),
        "student.model": str(folder / "student"),
        "teacher.model": str(folder / "teacher"),
        "prompts.path": str(folder / "prompts.jsonl"),
        "prompts.shuffle": False,
        "sampling.group_size": workload.samples,
        "sampling.groups_per_batch": workload.prompts,
        "sampling.max_completion_tokens": workload.max_tokens,
        "sampling.stop_token_ids": [EOS],
        "optim.learning_rate": LEARNING_RATE,
        "optim.num_steps": workload.warmup + workload.steps,
        **overrides,
    }
    for key, value in keys.items():
        set_dotted(tree, key, value)
    config = RunConfig.model_validate(tree)
    parts = assemble(config, check_run(config, "distill"), CostLedger(), checkpoint=None, given=Given())
    config = parts.config
    # After assembly: "auto" may sample a little to compare precisions.
    force_lengths(workload.lengths)
    meter = Meter()
    torch.Tensor.backward = meter.wrap("backward", torch.Tensor.backward)
    for part, method, phase in [
        (parts.sampler, "sample", "generate"),
        *((teacher, "score", "teacher") for teacher in parts.teachers.values()),
        (parts.trainer, "forward_backward", "forward"),
    ]:
        setattr(part, method, meter.wrap(phase, getattr(part, method)))
    base_mb, laps = start_memory(torch.device("cpu")), []
    meter.lap()
    for step in range(config.optim.num_steps):
        scored, examples = score(parts, sample(parts, parts.prompts_at(step), seed=step_seed(config.seed, step)))
        batches = micro_batches(examples, **parts.batching)
        learning_rate = learning_rate_at(config.optim, step)
        update = optimizer_step(
            parts.trainer, batches, parts.objective, learning_rate=learning_rate, reduction=config.objective.reduction
        )
        sync_weights(parts.sampler, policy_version=step + 1)
        rollout_metrics(scored, config.objective)
        update_metrics(update)
        meter.counts["generated"] = sum(len(row.rollout.completion_ids) for row in scored)
        meter.counts["trained"] = int(update["tokens"])
        meter.counts["micro_batches"] = len(batches)
        laps.append(meter.lap())
    return record(workload, laps, base_mb)


def force_lengths(lengths: Sequence[int]) -> None:
    """Make the local sampler end its rows after ``lengths`` tokens, neither sooner nor later. Rows come in the order
    of prompts and samples, all prompts being of one length."""
    from understudy.backends import local

    plain, done = local.decode, 0

    def decode(model: Any, prompts: Sequence[Any], uniforms: Any, **options: Any) -> Any:
        nonlocal done
        own = list(lengths[done : done + len(prompts)])
        done = (done + len(prompts)) % len(lengths)
        return plain(model, prompts, uniforms, **{**options, "stop_ids": frozenset(), "max_tokens": own})

    local.decode = decode

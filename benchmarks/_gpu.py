"""What gpu.py measures, each job in a process of its own: rows as JSON on standard output."""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _step import EOS, PAD, Workload, make_prompts, make_tokenizer
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEASURED, OUT_OF_MEMORY = "measured", "out of memory"


@dataclass(frozen=True)
class Setting:
    """``shapes``: hidden size, layers, heads, key-value heads, feed-forward size. ``decoding``: two lengths, the time
    between which is that of decoding steps alone. ``warm``: tokens generated before the clock runs."""

    step: Workload
    head_dim: int
    shapes: Mapping[str, tuple[int, int, int, int, int]]
    decoding: tuple[int, int]
    warm: int
    matmul: int


# Qwen3-0.6B and Qwen3-4B.
SHAPES = {"student": (1024, 28, 16, 8, 3072), "teacher": (2560, 36, 32, 8, 9728)}
FULL = Setting(Workload(151_936, 64, 4, 256, 1024), 128, SHAPES, (8, 72), 8, 8192)
TINY_SHAPES = {"student": (64, 2, 4, 2, 128), "teacher": (96, 3, 4, 2, 160)}
TINY = Setting(Workload(1000, 8, 4, 16, 16), 16, TINY_SHAPES, (2, 6), 2, 256)


def trl_name(kind: str, rows: int, checkpointing: bool) -> str:
    return f"TRL {kind}, {rows} rows" + (", gradient checkpointing" if checkpointing else "")


def sync() -> float:
    """The time when all that was asked for is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def free_memory() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float | None:
    return round(torch.cuda.max_memory_allocated() / 1e9, 1) if DEVICE.type == "cuda" else None


def is_out_of_memory(error: BaseException) -> bool:
    """understudy raises an error of its own from torch's, and libraries under torch have theirs."""
    chain = (error, error.__cause__, error.__context__)
    return any(isinstance(e, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(e) for e in chain)


def emit(name: str, work: Callable[[], dict[str, Any]]) -> None:
    """Print a row. An error is one too, and the next measurement goes on."""
    free_memory()
    try:
        row = {"status": MEASURED, **work()}
    except Exception as error:
        traceback.print_exc()
        what = f"failed: {type(error).__name__}: {str(error)[:200]}"
        row = {"status": OUT_OF_MEMORY if is_out_of_memory(error) else what}
    print(json.dumps({"row": name, **row, "peak_gb": peak_gb()}), flush=True)


def make_model(s: Setting, role: str, dtype: torch.dtype) -> Any:
    """Random weights, drawn where they stay."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    options = {"max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    options |= {"vocab_size": s.step.vocab, "head_dim": s.head_dim, "tie_word_embeddings": True}
    config = Qwen3Config(**dict(zip(names, s.shapes[role], strict=True)), **options)
    torch.manual_seed(0)
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def make_prompt_ids(s: Setting) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(2, s.step.vocab, (s.step.prompts, s.step.prompt_tokens), generator=draw).tolist()


def measure_matmul(s: Setting) -> dict[str, Any]:
    """On random numbers: on zeros a GPU draws less power and runs faster."""
    size = (s.matmul, s.matmul)
    left, right = (torch.randn(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    for _ in range(3):
        torch.mm(left, right)
    start = sync()
    for _ in range(20):
        torch.mm(left, right)
    seconds = (sync() - start) / 20
    return {"seconds": seconds, "tflops": 2 * s.matmul**3 / seconds / 1e12}


def measure_understudy(s: Setting, *, flash: bool = False) -> None:
    """Scoring and training on random completions, so that they do not wait for the slowest phase, then sampling."""
    from understudy.backends.language_model import LanguageModel
    from understudy.backends.loading import default_micro_batch_tokens
    from understudy.backends.local import LocalSampler, LocalTeacher, LocalTrainer
    from understudy.batching import micro_batches
    from understudy.config import OptimConfig, SamplingConfig
    from understudy.objectives import FullDivergence, PolicyGradient
    from understudy.optimizer_step import optimizer_step
    from understudy.types import Prompt, TokenSequence, TrainingExample
    from understudy.weight_sync import sync_weights

    if not flash:
        emit("matmul", lambda: measure_matmul(s))
    student = LanguageModel(make_model(s, "student", torch.float32))
    teacher = LanguageModel(make_model(s, "teacher", torch.bfloat16).requires_grad_(False))
    sampler = LocalSampler(student, stop_ids=frozenset(), shadow=student.copy_in(torch.bfloat16))
    trainer = LocalTrainer(student, OptimConfig(), autocast=torch.bfloat16)
    prompts = [Prompt(i, ids, "") for i, ids in enumerate(make_prompt_ids(s))]
    length = s.step.max_tokens
    draw = torch.Generator().manual_seed(1)
    written = torch.randint(2, s.step.vocab, (s.step.rows, length), generator=draw).tolist()
    sequences = [TokenSequence(prompts[i // s.step.samples].prompt_ids, ids) for i, ids in enumerate(written)]
    # A student with random weights is close to uniform.
    logprobs = [-math.log(s.step.vocab)] * length
    scores: dict[str, Sequence[Any]] = {}

    def fitting(work: Callable[[int, int], Any]) -> dict[str, Any]:
        """``work`` (tokens per batch, rows), in smaller batches where memory asks for it. 16 rows warm up."""
        largest, failed = default_micro_batch_tokens(DEVICE), []
        for size in (largest, largest // 2, largest // 4):
            try:
                work(size, 16)
                start = sync()
                work(size, s.step.rows)
                return {"seconds": sync() - start, "micro_batch_tokens": size, "out_of_memory_at": failed}
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler, which keeps the failed attempt's tensors alive.
            failed.append(size)
            student.model.zero_grad(set_to_none=True)
            free_memory()
        raise torch.OutOfMemoryError(f"at {failed} tokens")

    def score(kind: str, size: int, rows: int) -> None:
        wanted = "hidden" if kind == "full" else "sampled"
        marks = LocalTeacher(teacher, batch_tokens=size).score(sequences[:rows], wanted)
        if rows == len(sequences):
            scores[kind] = marks

    def example(own: TokenSequence, marks: Any) -> TrainingExample:
        advantages = [q - p for p, q in zip(logprobs, marks.teacher_logprobs, strict=True)]
        hidden = getattr(marks, "teacher_hidden", None)
        return TrainingExample(own.prompt_ids, own.completion_ids, [True] * length, logprobs, advantages, hidden)

    def train(kind: str, size: int, rows: int) -> None:
        examples = list(map(example, sequences[:rows], scores[kind]))
        batches = micro_batches(examples, micro_batch_tokens=size, share_prompts=student.shares_prompts, device=DEVICE)
        objective = FullDivergence({"default": teacher.head}) if kind == "full" else PolicyGradient()
        optimizer_step(trainer, batches, objective, learning_rate=1e-6)
        sync_weights(sampler, policy_version=1)

    def sample() -> dict[str, Any]:
        options = SamplingConfig(group_size=s.step.samples, max_completion_tokens=length)
        sampler.sample(prompts, options.model_copy(update={"max_completion_tokens": s.warm}), seed=0)
        start = sync()
        groups = sampler.sample(prompts, options, seed=1)
        if {len(r.completion_ids) for group in groups for r in group} != {length}:
            raise RuntimeError(f"completions of other lengths than {length}")
        return {"seconds": sync() - start}

    def both(kind: str) -> None:
        emit(f"scoring, {kind}", lambda: fitting(lambda *size: score(kind, *size)))
        emit(f"training, {kind}", lambda: fitting(lambda *size: train(kind, *size)))
        scores.clear()

    if flash:
        # Only now: understudy's checks of a model run in its own float32, which flash attention refuses.
        for model in (student, teacher):
            model.model.set_attn_implementation("flash_attention_2")
        both("flash")
        return
    both("sampled")
    both("full")
    for model in (student, teacher):
        model.shares_prompts = False
    both("padded")
    emit("sampling", sample)


def measure_decoding(s: Setting) -> None:
    """Decoding steps in bfloat16: ours, transformers' eager ones, and compiled ones over a static cache."""
    from transformers import GenerationConfig, StaticCache

    from understudy.backends.language_model import LanguageModel
    from understudy.backends.local import LocalSampler
    from understudy.config import SamplingConfig
    from understudy.types import Prompt

    model = make_model(s, "student", torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(make_prompt_ids(s), device=DEVICE).repeat_interleave(s.step.samples, 0)
    sampler = LocalSampler(LanguageModel(model), stop_ids=frozenset())
    prompts = [Prompt(i, own, "") for i, own in enumerate(make_prompt_ids(s))]
    # As long as in a real step: a static cache is read to its end by every token.
    cache = StaticCache(config=model.config, max_cache_len=s.step.prompt_tokens + s.step.max_tokens)

    def ours(length: int) -> None:
        sampler.sample(prompts, SamplingConfig(group_size=s.step.samples, max_completion_tokens=length), seed=0)

    def generate(length: int, **options: Any) -> None:
        wanted = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=length, pad_token_id=PAD)
        written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=wanted, **options)
        if written.shape[1] != ids.shape[1] + length:
            raise RuntimeError(f"{written.shape[1] - ids.shape[1]} tokens generated; expected {length}")

    def compiled(length: int) -> None:
        """transformers compiles by itself what runs over a static cache on a GPU (mode "reduce-overhead")."""
        cache.reset()
        generate(length, past_key_values=cache)

    def steps(work: Callable[[int], None]) -> dict[str, Any]:
        short, long = s.decoding
        work(short)
        start = sync()
        work(short)
        middle = sync()
        work(long)
        return {"seconds": max((sync() - middle) - (middle - start), 1e-9), "steps": long - short}

    for name, work in (("understudy", ours), ("generate", generate), ("generate compiled", compiled)):
        emit(f"decoding, {name}", lambda work=work: steps(work))


def measure_trl(s: Setting, kind: str, micro: int, checkpointing: bool) -> None:
    emit(trl_name(kind, micro, checkpointing), lambda: trl_step(s, kind, min(micro, s.step.rows), checkpointing))


def trl_step(s: Setting, kind: str, micro: int, checkpointing: bool) -> dict[str, Any]:
    """The second of two steps; the first writes a few tokens and fills up with random ones. DistillationTrainer writes
    a whole step's completions at once. IW-OPD's writes each micro-batch by itself: one of them is measured."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback

    student, teacher = make_model(s, "student", torch.float32), make_model(s, "teacher", torch.bfloat16).eval()
    tokenizer, length = make_tokenizer(), s.step.max_tokens
    texts = make_prompts(tokenizer, s.step)
    rows = s.step.rows if kind == "distillation" else micro
    options: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": rows // micro,
        "bf16": True,
        "gradient_checkpointing": checkpointing,
        "max_completion_length": length,
        "temperature": 1.0,
        "use_cpu": DEVICE.type == "cpu",
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
    }
    if kind == "distillation":
        from trl import DistillationConfig as Config  # pyright: ignore[reportMissingImports]
        from trl import DistillationTrainer as Trainer  # pyright: ignore[reportMissingImports]

        data: dict[str, Any] = {"prompt": [text for text in texts for _ in range(s.step.samples)]}
        options |= {"beta": 1.0, "top_k": 0}
    else:
        from trl.experimental.iw_opd import IWOPDConfig as Config  # pyright: ignore[reportMissingImports]
        from trl.experimental.iw_opd import IWOPDTrainer as Trainer  # pyright: ignore[reportMissingImports]

        # It asks for an answer, and never trains on it.
        data = {"messages": [[{"role": "user", "content": t}, {"role": "assistant", "content": " ."}] for t in texts]}
        options |= {"max_length": s.step.prompt_tokens + length, "top_p": 1.0, "iw_opd_gamma": 0.0}
        options["num_generations"] = s.step.samples
    laps: list[float] = []
    generation: list[float] = []
    trained: list[int] = []
    never = torch.tensor([PAD, EOS], device=DEVICE)

    class Never(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.index_fill_(1, never, -torch.inf)

    plain = student.generate

    def generate(*arguments: Any, **keywords: Any) -> Any:
        warming = len(laps) < 2
        short = {"max_new_tokens": s.warm} if warming else {}
        start = sync()
        output = plain(*arguments, logits_processor=LogitsProcessorList([Never()]), **keywords, **short)
        generation.append(0.0 if warming else sync() - start)
        ids = output if isinstance(output, Tensor) else output.sequences
        missing = len(ids), keywords["input_ids"].shape[1] + length - ids.shape[1]
        ids = torch.cat([ids, torch.randint(2, s.step.vocab, missing, device=DEVICE)], dim=1)
        if isinstance(output, Tensor):
            return ids
        output.sequences = ids
        return output

    student.generate = generate

    class Laps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            laps.append(sync())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            laps.append(sync())

    with tempfile.TemporaryDirectory() as folder:
        # IW-OPD's trainer reads the teacher's tokenizer from where the teacher came from.
        for part in (tokenizer, teacher.config):
            part.save_pretrained(folder)
        teacher.config._name_or_path = folder
        trainer = Trainer(
            model=student,
            teacher_model=teacher,
            args=Config(output_dir=folder, **options),
            train_dataset=Dataset.from_dict(data),
            processing_class=tokenizer,
        )
        trainer.add_callback(Laps())
        loss = trainer.compute_loss

        def counted(model: Any, inputs: Mapping[str, Tensor], *arguments: Any, **keywords: Any) -> Any:
            mask = inputs["completion_mask"] if "completion_mask" in inputs else inputs["labels"][:, 1:] != -100
            trained.append(int(mask.sum()))
            return loss(model, inputs, *arguments, **keywords)

        trainer.compute_loss = counted
        trainer.train()
    if sum(trained) != 2 * rows * length:
        raise RuntimeError(f"{sum(trained)} tokens trained; expected {2 * rows * length}")
    return {"seconds": laps[2] - laps[1], "rows": rows, "generation_s": sum(generation)}

"""One measurement of a TRL trainer in this process, for step.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from _step import EOS, LEARNING_RATE, PAD, SHAPES, Meter, Workload, record
from lm_head import start_memory
from torch import Tensor


def measure_trl(workload: Workload, folder: Path, setting: Mapping[str, Any]) -> dict[str, Any]:
    """Steps of one TRL trainer. ``setting``: trainer, autocast (bf16=True), student and teacher dtypes, micro (rows
    per micro-batch)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.trainer_utils import set_seed

    set_seed(0)
    models: dict[str, Any] = {
        role: AutoModelForCausalLM.from_pretrained(folder / role, dtype=getattr(torch, setting[role]))
        for role in SHAPES
    }
    student, teacher = models["student"], models["teacher"].eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    texts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    trainer = make_trainer(workload, folder, setting, student, teacher, tokenizer, texts)
    meter, laps, base = Meter(), [], []
    torch.Tensor.backward = meter.wrap("backward", torch.Tensor.backward)
    student.generate = _generating(workload, meter, student.generate)
    # DistillationTrainer calls the body and applies the head in its loss, the others call the whole model.
    marked = teacher.model if setting["trainer"] == "distillation" else teacher
    marked.register_forward_pre_hook(lambda *_: meter.enter("teacher"))
    marked.register_forward_hook(lambda *_: meter.leave())
    compute_loss = meter.wrap("forward", trainer.compute_loss)

    def counted(model: Any, inputs: Mapping[str, Tensor], *arguments: Any, **keywords: Any) -> Any:
        trained = inputs["completion_mask"] if "completion_mask" in inputs else inputs["labels"][:, 1:] != -100
        meter.counts["trained"] += int(trained.sum())
        meter.counts["micro_batches"] += 1
        return compute_loss(model, inputs, *arguments, **keywords)

    trainer.compute_loss = counted

    class Laps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            base.append(start_memory(torch.device("cpu")))
            meter.lap()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            laps.append(meter.lap())

    trainer.add_callback(Laps())
    trainer.train()
    return record(workload, laps, base[0])


def make_trainer(
    workload: Workload,
    folder: Path,
    setting: Mapping[str, Any],
    student: Any,
    teacher: Any,
    tokenizer: Any,
    texts: Sequence[str],
) -> Any:
    """A trainer set to pure on-policy distillation with the reverse KL at temperature 1. Its data set is one step's
    prompts, so that every step reads the same ones."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]

    width = workload.prompt_tokens + workload.max_tokens
    options: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "max_steps": workload.warmup + workload.steps,
        "per_device_train_batch_size": setting["micro"],
        "gradient_accumulation_steps": workload.rows // setting["micro"],
        "bf16": setting["autocast"],
        # On by default; GKD then even generates without a cache.
        "gradient_checkpointing": False,
        "learning_rate": LEARNING_RATE,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
    }
    # These count the tokens of the data set's answer, so there must be one; with lmbda = 1 it is never trained on.
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": " the answer is 1 ."}] for text in texts
    ]
    kind = setting["trainer"]
    if kind == "distillation":
        from trl import DistillationConfig as Config  # pyright: ignore[reportMissingImports]
        from trl import DistillationTrainer as Trainer  # pyright: ignore[reportMissingImports]

        # One completion per row: several samples are several rows.
        rows = {"prompt": [text for text in texts for _ in range(workload.samples)]}
        options |= {"max_completion_length": workload.max_tokens, "shuffle_dataset": False, "beta": 1.0, "top_k": 0}
    elif kind == "gkd":
        from trl.experimental.gkd import GKDConfig as Config  # pyright: ignore[reportMissingImports]
        from trl.experimental.gkd import GKDTrainer as Trainer  # pyright: ignore[reportMissingImports]

        rows = {"messages": [chat for chat in chats for _ in range(workload.samples)]}
        options |= {"max_new_tokens": workload.max_tokens, "max_length": width, "lmbda": 1.0, "beta": 1.0}
    else:
        if kind == "iw_opd":
            from trl.experimental.iw_opd import IWOPDConfig as Config  # pyright: ignore[reportMissingImports]
            from trl.experimental.iw_opd import IWOPDTrainer as Trainer  # pyright: ignore[reportMissingImports]

            options |= {"iw_opd_gamma": 0.0}
        else:
            from trl.experimental.gold import GOLDConfig as Config  # pyright: ignore[reportMissingImports]
            from trl.experimental.gold import GOLDTrainer as Trainer  # pyright: ignore[reportMissingImports]

            options |= {"beta": 1.0, "top_k": 0, "lmbda": 1.0}
        rows = {"messages": chats}
        options |= {
            "max_completion_length": workload.max_tokens,
            "max_length": width,
            "num_generations": workload.samples,
            "top_p": 1.0,
        }
    return Trainer(
        model=student,
        teacher_model=teacher,
        args=Config(temperature=1.0, **options),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )


def _generating(workload: Workload, meter: Meter, generate: Callable[..., Any]) -> Callable[..., Any]:
    """``generate`` with every row ending at its length: by EOS where lengths are natural, else at the cap."""
    from transformers import LogitsProcessor, LogitsProcessorList

    done = 0

    class Ends(LogitsProcessor):
        """Changes a column in place, and whole rows only where they end: what it costs cannot be seen."""

        def __init__(self, lengths: Tensor) -> None:
            self.lengths = lengths

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores[:, [PAD, EOS]] = -torch.inf
            if workload.natural:
                end = self.lengths == input_ids.shape[1] - workload.prompt_tokens + 1
                scores[end] = -torch.inf
                scores[end, EOS] = 0.0
            return scores

    @wraps(generate)
    def generating(*arguments: Any, **keywords: Any) -> Any:
        nonlocal done
        rows, width = keywords["input_ids"].shape
        if width != workload.prompt_tokens:
            raise SystemExit(f"prompts of {width} tokens, expected {workload.prompt_tokens}")
        ends = Ends(torch.tensor(workload.lengths[done : done + rows]))
        done = (done + rows) % workload.rows
        output = generate(*arguments, logits_processor=LogitsProcessorList([ends]), **keywords)
        ids = output if isinstance(output, Tensor) else output.sequences
        meter.counts["generated"] += int((ids[:, width:] != PAD).sum())
        return output

    return meter.wrap("generate", generating)

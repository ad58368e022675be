"""How the ledger world's two models were made: ``build(folder, role="teacher")`` and ``role="start"``."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from understudy.worlds.ledger import START_SLIP, TEACHER_CORRUPTION, Ledger, Role
from understudy.worlds.models import build_qwen3, save_folder
from understudy.worlds.pretrain import pretrain


@dataclass(frozen=True)
class Recipe:
    """Model size and training schedule of one role; ``batch_size`` counts texts per step."""

    hidden_size: int
    steps: int
    learning_rate: float
    corpus: str
    num_layers: int = 2
    num_heads: int = 4
    batch_size: int = 64
    warmup: int = 50
    final_fraction: float = 0.02
    weight_decay: float = 0.01


RECIPES: dict[Role, Recipe] = {
    "teacher": Recipe(
        hidden_size=96,
        steps=1000,
        learning_rate=3e-3,
        corpus=f"uniform operations; {TEACHER_CORRUPTION:.0%} of the values are random and carry no loss; "
        "the text goes on from the random value and gives the true one at the next statement",
    ),
    # The size and the steps leave the start model imperfect: its errors are what there is to learn from.
    "start": Recipe(
        hidden_size=32,
        steps=1100,
        learning_rate=5e-3,
        corpus=f"Zipf operations; {START_SLIP:.0%} of the values slip, with loss on them; a statement that "
        f"contradicts the running value is followed with p = {{world.start_correction}}, else that value is repeated",
    ),
}


def build(
    folder: str | Path,
    *,
    role: Role,
    world: Ledger | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    log: Callable[[str], object] = print,
) -> None:
    """Train one role's model on freshly generated text and save it as a Hugging Face folder.

    ``world`` and ``recipe``: absent, those of the shipped models, which take 2 (start) to 5 (teacher) minutes on one
    CPU core.
    """
    import torch

    # One thread: sums come out in one order, and the shipped weights come out again.
    torch.set_num_threads(1)
    world, recipe = world or Ledger(), recipe or RECIPES[role]
    tokenizer = world.tokenizer()
    model = build_qwen3(
        tokenizer,
        hidden_size=recipe.hidden_size,
        num_layers=recipe.num_layers,
        num_heads=recipe.num_heads,
        seed=seed,
    )
    log(f"{role}: {model.num_parameters():,} parameters, {recipe.steps} steps of {recipe.batch_size} texts")
    seconds = pretrain(
        model,
        world.corpus(seed, recipe.batch_size, role),
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        warmup=recipe.warmup,
        final_fraction=recipe.final_fraction,
        weight_decay=recipe.weight_decay,
        log=log,
    )
    card = model_card(role, world, recipe, seed=seed, seconds=seconds, num_parameters=model.num_parameters())
    save_folder(model, tokenizer, folder, card)


def model_card(role: Role, world: Ledger, recipe: Recipe, *, seed: int, seconds: float, num_parameters: int) -> str:
    """The folder's README: what the model is and how to make it again."""
    import numpy
    import torch
    import transformers

    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, numpy {numpy.__version__}"
    )
    made_by = "" if world == Ledger() else f"world={world!r}, "
    return f"""---
license: apache-2.0
library_name: transformers
tags: [understudy, toy]
---

# Ledger world, {role} model

A {num_parameters:,}-parameter Qwen3 (width {recipe.hidden_size}, {recipe.num_layers} layers, \
{recipe.num_heads} heads, tied embeddings, float32) for the ledger world of `understudy`. \
Trained from nothing on generated text; no other data.

    prompt      4 | a op17 b op3 c @7 ... r op2 =>
    solution    a op17 9 b op3 7 c @ 7 ... r op2 5 <eos>

| | |
|---|---|
| made by | `understudy.worlds.ledger_build.build(folder, role="{role}", {made_by}seed={seed})` |
| corpus | {recipe.corpus.format(world=world)}; never repeated |
| training | {recipe.steps} steps of {recipe.batch_size} texts, AdamW (0.9, 0.98), \
learning rate {recipe.learning_rate:g}, warm-up {recipe.warmup}, \
linear decay to {recipe.final_fraction:.0%}, weight decay {recipe.weight_decay}, gradient clip 1.0 |
| loss | next token, solution only |
| seconds | {seconds:.0f} on one CPU thread |
| versions | {versions} |
"""

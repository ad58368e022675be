"""The routes world: sums modulo 10 that may be written from the left or from the right.

    prompt    3 7 2 9 1 4 | 4 1 9 2 7 3 =>
    left      L 3 0 2 1 2 6 <eos>
    right     R 4 5 4 6 3 6 <eos>

The prompt has six digits, and again in reverse, so that either route finds its next digit at a fixed distance. Both
write running sums and end in the total. The first word decides which one it is; nothing in the prompt speaks for
either. The teacher's text is right and goes left in three of five cases. The start model's text goes either
way equally often and slips, more often from the right, so that it knows one route better than the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from understudy.tasks.grade import Grade
from understudy.worlds.models import build_qwen3, save_folder, word_tokenizer
from understudy.worlds.pretrain import pretrain

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from understudy.types import FinishReason, Prompt

Role = Literal["teacher", "start"]
Route = Literal["L", "R"]
Array = np.ndarray[Any, np.dtype[Any]]

NUM_DIGITS = 6
EOS, PAD = "<eos>", "<pad>"
TOKENS = (*(str(digit) for digit in range(10)), "L", "R", "|", "=>", EOS, PAD)
"""The vocabulary in id order."""
PROMPT_LENGTH = 2 * NUM_DIGITS + 2
"""Tokens of a prompt."""
COMPLETION_LENGTH = NUM_DIGITS + 2
"""Tokens of a solution: the route, the sums, the end token."""
SHARE_LEFT: dict[Role, float] = {"teacher": 0.6, "start": 0.5}
"""Share of a role's texts that go left."""
SLIPS: dict[Route, float] = {"L": 0.03, "R": 0.10}
"""Share of the start model's sums that are random digits."""
CORRUPTION = 0.08
"""The same of the teacher's, which carry no loss: it learns to go on from a wrong sum, not to write one."""


@dataclass(frozen=True)
class Recipe:
    """Model size and training schedule of one role; ``batch_size`` counts texts per step."""

    hidden_size: int
    num_layers: int
    steps: int
    num_heads: int = 2
    learning_rate: float = 5e-3
    batch_size: int = 64


RECIPES: dict[Role, Recipe] = {
    "teacher": Recipe(hidden_size=64, num_layers=2, steps=600),
    # Narrow and shallow: the route with more slips is known badly.
    "start": Recipe(hidden_size=24, num_layers=1, steps=1200),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    return word_tokenizer(TOKENS, eos=EOS, pad=PAD)


def prompt_rows(n: int, seed: int) -> list[dict[str, str]]:
    """``n`` problems as ``{"prompt", "answer", "task"}``; the answer is the total. Equal arguments give equal rows."""
    digits = np.random.RandomState([seed, 0]).randint(10, size=(n, NUM_DIGITS))
    return [
        {
            "prompt": " ".join([*map(str, row), "|", *map(str, row[::-1]), "=>"]),
            "answer": str(row.sum() % 10),
            "task": "routes",
        }
        for row in digits
    ]


def solution(prompt_text: str, route: Route) -> str:
    """The right text along ``route``, without the end token."""
    words = prompt_text.split()
    if len(words) != PROMPT_LENGTH or words[NUM_DIGITS] != "|" or words[-1] != "=>":
        raise ValueError(f"got {prompt_text!r}; expected {NUM_DIGITS} digits, '|', the digits in reverse, '=>'")
    sums = accumulate(map(int, words[:NUM_DIGITS] if route == "L" else words[NUM_DIGITS + 1 : -1]))
    return " ".join([route, *(str(total % 10) for total in sums)])


def grade(prompt: Prompt, completion: str, finish_reason: FinishReason) -> Grade:
    """1 for a finished completion that is right along its own route, sum by sum. Details: the share of completions
    that go left (``left``), and how many of each route are right (``right_left``, ``right_right``)."""
    words = completion.split()
    route = words[0] if words else ""
    right = finish_reason == "stop" and route in ("L", "R") and " ".join(words) == solution(prompt.text, route)
    details = {"left": float(route == "L")}
    for name, own in (("right_left", "L"), ("right_right", "R")):
        details |= {name: float(right and route == own), f"{name}_count": float(route == own)}
    return Grade(float(right), has_answer=route in ("L", "R"), details=details)


def corpus(seed: int, n: int, role: Role) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Endless fresh batches of ``n`` texts: ``input_ids`` [n, L], the prompt's length P, ``loss_mask`` [n, L - P]."""
    import torch

    generator = np.random.RandomState([seed, 1 if role == "teacher" else 2])
    while True:
        input_ids, loss_mask = _texts(generator, n, role)
        yield torch.from_numpy(input_ids), PROMPT_LENGTH, torch.from_numpy(loss_mask)


def _texts(generator: np.random.RandomState, n: int, role: Role) -> tuple[Array, Array]:
    """Wrong sums are gone on from."""
    digits = generator.randint(10, size=(n, NUM_DIGITS))
    left = generator.random_sample(n) < SHARE_LEFT[role]
    terms = np.where(left[:, None], digits, digits[:, ::-1])
    rates = np.where(left, SLIPS["L"], SLIPS["R"]) if role == "start" else np.full(n, CORRUPTION)
    slipped = generator.random_sample(digits.shape) < rates[:, None]
    random_sums = generator.randint(10, size=digits.shape)
    sums, total = np.empty_like(digits), np.zeros(n, dtype=digits.dtype)
    for i in range(NUM_DIGITS):
        total = np.where(slipped[:, i], random_sums[:, i], (total + terms[:, i]) % 10)
        sums[:, i] = total

    def column(ids: Any) -> Array:
        return np.broadcast_to(ids, n)[:, None]

    routes = np.where(left, TOKENS.index("L"), TOKENS.index("R"))
    bar, go, end = (column(TOKENS.index(token)) for token in ("|", "=>", EOS))
    parts = [digits, bar, digits[:, ::-1], go, column(routes), sums, end]
    loss_mask = np.ones((n, COMPLETION_LENGTH), dtype=bool)
    if role == "teacher":
        loss_mask[:, 1:-1] = ~slipped
    return np.concatenate(parts, axis=1), loss_mask


def build(
    folder: str | Path, *, role: Role, recipe: Recipe | None = None, seed: int = 0, log: Callable[[str], object] = print
) -> None:
    """Train one role's model on freshly generated text and save it as a Hugging Face folder (seconds on one core)."""
    import torch

    # One thread: sums come out in one order, and equal seeds give equal weights.
    torch.set_num_threads(1)
    recipe = recipe or RECIPES[role]
    model = build_qwen3(
        tokenizer(),
        hidden_size=recipe.hidden_size,
        num_layers=recipe.num_layers,
        num_heads=recipe.num_heads,
        seed=seed,
    )
    pretrain(
        model,
        corpus(seed, recipe.batch_size, role),
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        log=log,
    )
    card = f"# Routes world, {role} model\n\n`understudy.worlds.routes.build(folder, role={role!r}, seed={seed})`\n"
    save_folder(model, tokenizer(), folder, card)

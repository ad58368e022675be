"""What tests and measurements of pages share: Chromium, waiting, rollouts with numbers easy to follow."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@contextmanager
def chromium() -> Iterator[Any]:
    """The Chromium of this machine, headless, as playwright's browser."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "no Chromium on the path: install one, e.g. apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def rollout(number: int, tokens: list[str], **changes: Any) -> dict[str, Any]:
    """The student is sure of everything; the teacher likes token t by half a nat less for each step of t."""
    length = len(tokens)
    made: dict[str, Any] = {
        "step": 0,
        "prompt_index": number,
        "sample_index": 0,
        "task": "sums",
        "prompt_text": f"Question {number}?",
        "answer": "4",
        "completion_text": "".join(tokens),
        "completion_ids": list(range(100, 100 + length)),
        "completion_tokens": tokens,
        "finish_reason": "stop",
        "reward": 1.0,
        "sampler_logprobs": [-0.25] * length,
        "trainer_logprobs": [-0.5] * length,
        "teacher_logprobs": [-0.25 - 0.5 * t for t in range(length)],
        "advantages": [-0.5 * t for t in range(length)],
        "loss_mask": [True] * length,
        "student_entropy": [0.125] * length,
        "teacher_topk": {
            "ids": [[7, 8]] * length,
            "tokens": [["yes", " no"]] * length,
            "logprobs": [[-0.5, -1.5]] * length,
        },
        "student_topk": {"ids": [[9]] * length, "tokens": [["own"]] * length, "logprobs": [[-0.25]] * length},
    }
    return made | changes


def until(page: Any, expression: str, *, seconds: float = 20) -> None:
    """Wait for an expression to hold. The pages' policy forbids eval, which playwright's own waiting uses."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(50)

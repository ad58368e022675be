"""Files of runs whose every text tries to become markup or a program on their page. Shared by the tests of pages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from understudy.report import Arm, RolloutPair, write_comparison, write_run_report
from understudy.report.credit_page import CreditUnit, write_credit_page
from understudy.report.pipeline_report import write_pipeline_report
from understudy.report.run_comparison import write_run_comparison

OWN = "document.title='owned';document.documentElement.setAttribute('data-owned','1')"
TEXTS = (
    f"</script><script>{OWN}</script>",
    f'"><img src=x onerror="{OWN}">',
    f"'><img src=x onerror='{OWN.replace(chr(39), chr(34))}'>",
    f"' onmouseover={OWN} tabindex=0 x='",
    f"<svg/onload={OWN}>",
    f"<details open ontoggle={OWN}>",
    f"javascript:{OWN}",
    f"${{{OWN}}}`",
    f'"}}];{OWN}//',
    "{{ 7 * 7 }}{% raw %}{{ self }}",
    "<!-- ",
    " -->",
    "]]>",
    "</style><style>*{display:none}</style>",
    f"</title><script>{OWN}</script>",
    f'</b></p><iframe srcdoc="<script>parent.{OWN.partition(";")[0]}</script>">',
    "<base href='http://127.0.0.1:9/'>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>",
    "<form action=http://127.0.0.1:9/><button id=tip>",
    "&lt;script&gt;&#60;script&#62;&quot;",
    "a\u2028b\u2029c",
    "\u202eright to left\u202c\u2066",
    "nul\0nul",
    "half \ud800 of a pair",
    "\ufeff\x1b[31m\x07\x7f\x85",
    "+ADw-script+AD4-",
    "\uff1cscript\uff1e",
)


def rollout(step: int, prompt_index: int) -> dict[str, Any]:
    """A stored rollout of these texts; step and prompt only tell them apart."""
    tokens = [*TEXTS, "plain", " ", "\n", ""]
    length = len(tokens)
    return {
        "schema_version": 1,
        "step": step,
        "prompt_index": prompt_index,
        "sample_index": 0,
        "task": TEXTS[1],
        "teacher": TEXTS[0],
        "prompt_text": "\n".join(TEXTS),
        "prompt_ids": [1, 2],
        "teacher_prompt_ids": None,
        "answer": TEXTS[0] + TEXTS[2],
        "completion_text": "".join(tokens),
        "completion_ids": list(range(length)),
        "completion_tokens": tokens,
        "finish_reason": "length",
        "reward": 0.5,
        "policy_version_start": 0,
        "policy_version_end": 0,
        "sampler_logprobs": [-0.25] * length,
        "trainer_logprobs": None,
        "teacher_logprobs": [-0.5 * (i % 7) for i in range(length)],
        "advantages": None,
        "loss_mask": [i % 3 > 0 for i in range(length)],
        "teacher_topk": {
            "ids": [[1, 2]] * length,
            "tokens": [[TEXTS[i % len(TEXTS)], TEXTS[(i + 1) % len(TEXTS)]] for i in range(length)],
            "logprobs": [[-0.3, -1.5]] * length,
        },
        "metadata": {TEXTS[0]: TEXTS[1]},
    }


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_page(folder: Path) -> Path:
    """The report of a run of these texts."""
    folder = folder / "<img src=x onerror=alert(1)>"
    names = [text for text in TEXTS if "/" not in text]
    rows = [
        {"step": step, "reverse_kl/mean": 1.0 - step / 4, f"eval/{TEXTS[1]}/greedy": 0.5, "cost/flops": 1e9}
        | {name: float(step) for name in TEXTS}
        | {f"time/{name}": 1.0 for name in names}
        for step in range(3)
    ]
    lines(folder / "metrics.jsonl", rows)
    places = [{"prompt_index": text, "file": text, "index": text} for text in TEXTS]
    alarms = [
        {"step": step, "guard": text, "action": text, "words": text, "causes": text, "rollouts": places}
        for step, text in enumerate(TEXTS)
    ]
    lines(folder / "guards.jsonl", alarms)
    writable = [text for text in TEXTS if text.isprintable() or "\n" in text]
    config: dict[str, Any] = {"seed": 0, "student": {"model": TEXTS[0]}, "teacher": {"model": TEXTS[1]}}
    config["prompts"] = {text: text for text in writable}
    (folder / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    costs = {text: {"tokens": 3, "flops": 1e9, "seconds": 2.0} for text in TEXTS}
    (folder / "costs.json").write_text(json.dumps({"schema_version": 1, "roles": costs}), encoding="utf-8")
    everything = " ".join(TEXTS)
    places = [{"file": "rollouts/step_000002.jsonl", "index": 1, "prompt_index": TEXTS[0]}]
    places += [{"file": TEXTS[6], "index": 0, "prompt_index": 1}]
    alarm = {"step": 1, "guard": TEXTS[0], "action": TEXTS[1], "words": everything, "causes": everything}
    lines(folder / "guards.jsonl", [alarm | {"rollouts": places}])
    check = {"step": 0, "check": TEXTS[2], "level": "warn", "evidence": everything, "remedy": everything}
    lines(folder / "doctor.jsonl", [check])
    lines(
        folder / "environment.jsonl",
        [{"step": 0, "packages": dict(zip(TEXTS, TEXTS, strict=True)), **dict.fromkeys(TEXTS, 1)}],
    )
    for step in (0, 2):
        lines(folder / "rollouts" / f"step_{step:06d}.jsonl", [rollout(step, index) for index in range(2)])
    return write_run_report(folder)


def comparison_page(folder: Path) -> Path:
    """Several arms, and commands to copy."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, f"eval/{TEXTS[0]}/t1": 0.1 * step, "cost/flops": 1e9 * step} for step in range(3)]
    arms = [Arm(name, rows, description=name) for name in TEXTS]
    notes = dict(enumerate(TEXTS))
    pair = RolloutPair(rollout(0, 0), rollout(2, 0), notes, notes, TEXTS[0], TEXTS[1])
    text = "\n\n".join(TEXTS)
    return write_comparison(
        arms,
        folder / "comparison.html",
        title=TEXTS[14] + TEXTS[0],
        intro=text,
        table=[{name: name for name in TEXTS}],
        verdict=text,
        commands=[(name, name) for name in TEXTS],
        before_after=[pair],
        footnotes=TEXTS,
    )


def pipeline_page(folder: Path) -> Path:
    """A pipeline whose phases are called like that, one with a page of its own."""
    metric = f"eval/{TEXTS[9]}/greedy"
    gate = {"after": [], "metric": TEXTS[0], "against": TEXTS[1], "max_drop": 0.1}
    phases = []
    for number, name in enumerate(TEXTS, 1):
        own = "javascript:document.title='owned'" if number == 1 else f"{number:02d}-phase"
        phases.append(
            {
                "name": name,
                "cycle": 1,
                "method": "distill",
                "folder": own,
                "began_with": name,
                "output": name,
                "steps": 3,
                "flops": 1e9,
                "seconds": 2.0,
                "start": {metric: 0.25},
                "final": {metric: 0.5, TEXTS[0]: 0.5},
                "gates": [{"gate": gate, "value": 0.5, "reference": 0.5, "passed": True}],
                "outcome": "kept",
            }
        )
        if number < 3:
            (folder / own).mkdir(parents=True, exist_ok=True)
            (folder / own / "report.html").write_text("a phase's page", encoding="utf-8")
    plan = {"start": TEXTS[0], "cycles": 2, "phases": [{"name": name} for name in TEXTS]}
    (folder / "pipeline.json").write_text(json.dumps({"plan": plan, "phases": phases}), encoding="utf-8")
    return write_pipeline_report(folder)


def credit_page(folder: Path) -> Path:
    """Token credit of one rollout, and of a pair."""
    folder.mkdir(parents=True, exist_ok=True)
    notes = dict(enumerate(TEXTS))
    both = {"student_topk": rollout(0, 0)["teacher_topk"], "finish_reason": TEXTS[4]}
    alone = CreditUnit((rollout(0, 0) | both,))
    pair = CreditUnit((rollout(0, 1) | both, rollout(2, 1) | both), (TEXTS[0], TEXTS[14]), (notes, notes))
    return write_credit_page([alone, pair], folder / "credit.html", title=TEXTS[14] + TEXTS[0], facts=TEXTS)


def runs_page(folder: Path) -> Path:
    """Two runs of these texts side by side."""
    runs = [run_page(folder / name).parent for name in ("javascript:", "b")]
    return write_run_comparison(runs, folder / "runs.html")


PAGES = {
    "run": run_page,
    "runs": runs_page,
    "comparison": comparison_page,
    "pipeline": pipeline_page,
    "credit": credit_page,
}

"""A hash of the code that results come from: what changes no number, comments and docstrings, leaves it as it is."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from understudy.experiments.cache import digest

PACKAGE = Path(__file__).resolve().parent.parent

# What decides the numbers of a run. Telemetry, checks, reports and the way a run is put together (configuration and its
# defaults, loading, the counting of FLOPs) are not among them: who changes a result there deletes the cache.
OF_RUNS = (
    "advantages",
    "backends/attention",
    "backends/cache",
    "backends/decoding",
    "backends/language_model",
    "backends/local",
    "batching",
    "divergence_kernel",
    "divergences",
    "evaluation",
    "head_kernels",
    "lm_head",
    "loop",
    "losses",
    "objectives",
    "optimizer_step",
    "prompts",
    "rewards",
    "rollouts",
    "sampling_kernel",
    "signals",
    "supervised",
    "teacher_scores",
    "weight_sync",
    "worlds/assistant",
    "worlds/ledger",
)
OF_EXPERIMENTS = (
    "experiments/assistant_bench",
    "experiments/bench",
    "experiments/lab",
    "experiments/search",
    "experiments/solutions",
    "experiments/worlds",
    "worlds/routes",
)


@cache
def code_hash(modules: tuple[str, ...]) -> str:
    """Of modules by their path in the package, without ".py"."""
    return digest({module: _statements((PACKAGE / f"{module}.py").read_text(encoding="utf-8")) for module in modules})


@cache
def claim_hash(module: str) -> str:
    """Of what a claim's results come from: its module as far as ``analyse``, which reads results and makes none."""
    source = (PACKAGE / f"experiments/claims/{module}.py").read_text(encoding="utf-8")
    return digest([code_hash((*OF_RUNS, *OF_EXPERIMENTS)), _statements(source, until="analyse")])


def _statements(source: str, until: str = "") -> list[str]:
    """The module's statements in one spelling, without docstrings; those from the function ``until`` on are left
    out."""
    tree = ast.parse(source)
    names = [getattr(node, "name", "") for node in tree.body]
    tree.body = tree.body[: names.index(until)] if until else tree.body
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            # Texts that stand alone: docstrings, and attributes' docstrings.
            node.body = [s for s in node.body if not _is_text(s)] or [ast.Pass()]
    return [ast.unparse(node) for node in tree.body]


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )

"""All results on one page: `python benchmarks/collect.py` writes RESULTS.md from results/*.md."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
PARTS = {
    "step": "One step, against TRL",
    "levers": "What each lever pays",
    "tried": "Pieces done in another way",
    "profiled": "What the time goes into",
    "scaling": "How the step grows",
    "lm_head": "The loss at the LM head",
    "served": "Roles on servers",
    "guards": "What the guards notice",
    "report": "Pages of token credit",
    "chart_libraries": "Charts in a page of one file",
    "gpu": "One data-centre GPU",
}
MISSING = {"gpu": "Not measured: no GPU was at hand."}


def page() -> str:
    """RESULTS.md's text."""
    lines = ["# Results", "", "Put together by `benchmarks/collect.py`; see README.md for what each script measures."]
    for name, title in PARTS.items():
        result = HERE / "results" / f"{name}.md"
        # One heading level down: results are pages of their own too.
        text = (
            result.read_text().replace("\n## ", "\n### ") if result.exists() else MISSING.get(name, "Not measured yet.")
        )
        lines += ["", f"## {title}", "", f"`{name}.py`", "", text.strip().replace("](", "](results/")]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (HERE / "RESULTS.md").write_text(page())

"""Reports: a run, or several side by side, as one self-contained HTML file, with credit shown by token."""

from __future__ import annotations

from understudy.report.charts import Series, line_chart
from understudy.report.comparison import Arm, RolloutPair, write_comparison
from understudy.report.run_report import write_run_report
from understudy.report.tokens import token_legend, token_spans

__all__ = [
    "Arm",
    "RolloutPair",
    "Series",
    "line_chart",
    "token_legend",
    "token_spans",
    "write_comparison",
    "write_run_report",
]

"""Reports: a run's records as a verdict line, a terminal summary and one self-contained HTML page. Nothing is computed
twice here.
"""

from __future__ import annotations

from toolkit.report.curve import comparison_html, comparison_line, comparison_text, sweep_html, sweep_line, sweep_text
from toolkit.report.page import html
from toolkit.report.terminal import benchmark_text, gate_line, summary_text, verdict_line

__all__ = [
    "benchmark_text",
    "comparison_html",
    "comparison_line",
    "comparison_text",
    "gate_line",
    "html",
    "summary_text",
    "sweep_html",
    "sweep_line",
    "sweep_text",
    "verdict_line",
]

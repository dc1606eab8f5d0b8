"""The report of a training run: one self-contained HTML page and one JSON summary.

``python -m rredcot_verl.report RUN --out report.html --summary summary.json``, or from Python::

    run = load_run("runs/rredcot")
    baseline = load_run("runs/grpo", with_traces=False)
    summary = summarise(run, baseline, check_lines)
    page = render(run, baseline, check_lines)

Standard library and numpy only, so that a run can be read where verl is not installed.
"""

from rredcot_verl.report.data import ReportError, Run, Segment, Trace, load_line_checker, load_run
from rredcot_verl.report.page import render
from rredcot_verl.report.summary import summarise

__all__ = ["ReportError", "Run", "Segment", "Trace", "load_line_checker", "load_run", "render", "summarise"]

"""The report of a training run: one self-contained HTML page and one JSON summary.

``python -m rredcot_verl.report RUN --out report.html --summary summary.json``, or from Python::

    run = load_run("runs/rredcot")
    baseline = load_run("runs/grpo", with_traces=False)
    summary = summarise(run, baseline, check_lines)
    page = render(run, baseline, check_lines)

It takes what a run has: metrics, credited traces, verl's own dumps. Standard library, numpy and
Jinja2 only, so that a run can be read where verl is not installed; writing prompts to parquet needs pyarrow.
"""

from rredcot_verl.report.data import Run, load_run
from rredcot_verl.report.files import ReportError
from rredcot_verl.report.line_checker import load_line_checker
from rredcot_verl.report.page import render
from rredcot_verl.report.prompts import Prompt, prompts_of
from rredcot_verl.report.summary import summarise
from rredcot_verl.report.thresholds import Thresholds
from rredcot_verl.report.trace import Segment, Trace

__all__ = [
    "Prompt",
    "ReportError",
    "Run",
    "Segment",
    "Thresholds",
    "Trace",
    "load_line_checker",
    "load_run",
    "prompts_of",
    "render",
    "summarise",
]

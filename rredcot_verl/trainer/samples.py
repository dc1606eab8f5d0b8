"""Credited responses for the trackers of `trainer.logger`, every `algorithm.rredcot.traces.samples_freq` steps.

A few responses of a step, chosen because they tell something (`report.selection`), with every segment and its credit.
Each tracker gets the form it shows best, through its public calls on the objects verl's `Tracking` holds:

| tracker | what it gets |
|---|---|
| wandb | `wandb.Html` (coloured) and `wandb.Table`, a row a segment |
| vemlp_wandb | the table |
| tensorboard | text, in Markdown |
| mlflow | an HTML artifact a step |
| swanlab | `swanlab.Html`, older releases `swanlab.Text`, and a table |
| trackio | `trackio.Markdown` and `trackio.Table` |
| clearml | an HTML debug sample and a table |
| file | `<name of the metrics file>_samples/<step>.html` beside it |
| console | plain text |

The number of responses and their length are bounded, so what a step sends does not grow with the batch. A
tracker that fails is no reason to stop a training: it is reported, and left alone after three failures in a row.
"""

import io
import logging
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rredcot_verl.report.files import ReportError
from rredcot_verl.report.sample_formats import COLUMNS, Samples, choose_samples
from rredcot_verl.report.trace import Trace, read_trace

logger = logging.getLogger(__name__)

HTML_KEY, TABLE_KEY = "rredcot/samples", "rredcot/segments"
MOST_FAILURES = 3
"""Failures of a tracker in a row after which it gets no more samples."""


def log_samples(
    loggers: str | Iterable[str], tracking: Any, step: int, rows: list[dict[str, Any]], *, num_samples: int = 4
) -> None:
    """Send credited responses of a step to every tracker that can show them.

    Args:
        loggers: `trainer.logger`.
        tracking: verl's `Tracking`, which holds the trackers.
        step: Training step.
        rows: Responses as `traces.trace_lines` makes them, best those of `traces.informative_rows`.
        num_samples: Most responses sent.
    """
    names = [loggers] if isinstance(loggers, str) else list(loggers)
    state = _STATES.setdefault(tracking, _State())
    samples = choose_samples(step, _traces(rows), num_samples)
    if samples is None:
        return
    for name in dict.fromkeys("wandb" if name == "tracking" else name for name in names):
        # verl goes on without a tracker that did not start, and says so.
        backend = tracking.logger.get(name)
        if backend is None or state.num_failures[name] >= MOST_FAILURES:
            continue
        send = _SENDERS.get(name)
        if send is None:
            state.report_once(name, "rredcot: %s takes numbers only, so it gets no samples of credited responses", name)
            continue
        try:
            send(backend, samples)
        except Exception as error:  # noqa: BLE001 - trackers raise what they like, and none may end a training
            state.failed(name, error)
        else:
            state.num_failures[name] = 0


class _State:
    """What went wrong with the trackers of one run."""

    def __init__(self) -> None:
        self.num_failures: Counter[str] = Counter()
        self._reported: set[str] = set()

    def report_once(self, name: str, message: str, *arguments: Any) -> None:
        if name not in self._reported:
            self._reported.add(name)
            logger.warning(message, *arguments)

    def failed(self, name: str, error: Exception) -> None:
        self.num_failures[name] += 1
        self.report_once(name, "rredcot: samples could not be sent to %s: %s: %s", name, type(error).__name__, error)
        if self.num_failures[name] == MOST_FAILURES:
            logger.warning("rredcot: %s failed %d times in a row and gets no more samples", name, MOST_FAILURES)


# verl has one Tracking a run; in a process with several runs each has its own memory of failures.
_STATES: weakref.WeakKeyDictionary[Any, _State] = weakref.WeakKeyDictionary()


def _traces(rows: list[dict[str, Any]]) -> list[Trace]:
    traces = []
    for place, row in enumerate(rows):
        try:
            traces.append(read_trace(row, f"sample {place}"))
        except ReportError as error:
            # A response whose numbers are not finite cannot be shown; the metrics tell of it.
            logger.warning("rredcot: a credited response is left out of the samples: %s", error)
    return traces


def _wandb(wandb: Any, samples: Samples) -> None:
    # A table of its own each time: one that grows would be sent whole again and again.
    table = wandb.Table(columns=list(COLUMNS), data=samples.rows())
    wandb.log({HTML_KEY: wandb.Html(samples.html()), TABLE_KEY: table}, step=samples.step)


def _vemlp_wandb(wandb: Any, samples: Samples) -> None:
    wandb.log({TABLE_KEY: wandb.Table(columns=list(COLUMNS), data=samples.rows())}, step=samples.step)


def _tensorboard(adapter: Any, samples: Samples) -> None:
    adapter.writer.add_text(HTML_KEY, samples.markdown(), samples.step)


def _mlflow(adapter: Any, samples: Samples) -> None:
    import mlflow

    mlflow.log_text(samples.html(), f"rredcot_samples/step_{samples.step:06d}.html")


def _swanlab(swanlab: Any, samples: Samples) -> None:
    table = swanlab.echarts.Table()
    table.add(headers=list(COLUMNS), rows=samples.rows())
    html = getattr(swanlab, "Html", None)
    shown = html(samples.html()) if html is not None else swanlab.Text(samples.text())
    swanlab.log({HTML_KEY: shown, TABLE_KEY: table}, step=samples.step)


def _trackio(adapter: Any, samples: Samples) -> None:
    trackio = adapter.trackio
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in samples.rows()]
    table = trackio.Table(dataframe=_frame(rows))
    trackio.log({HTML_KEY: trackio.Markdown(samples.markdown()), TABLE_KEY: table}, step=samples.step)


def _clearml(adapter: Any, samples: Samples) -> None:
    import clearml

    task = clearml.Task.current_task()
    if task is None:
        raise RuntimeError("clearml has no current task")
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in samples.rows()]
    report = task.get_logger()
    report.report_table(title="rredcot", series="segments", iteration=samples.step, table_plot=_frame(rows))
    report.report_media(
        title="rredcot",
        series="samples",
        iteration=samples.step,
        stream=io.BytesIO(samples.html().encode()),
        file_extension=".html",
    )


def _file(adapter: Any, samples: Samples) -> None:
    metrics = Path(adapter.filepath)
    folder = metrics.with_name(f"{metrics.stem}_samples")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{samples.step}.html").write_text(samples.html(), encoding="utf-8")


def _console(adapter: Any, samples: Samples) -> None:
    sys.stdout.write(samples.text())
    sys.stdout.flush()


def _frame(rows: list[dict[str, Any]]) -> Any:
    # verl brings it; the trackers that need it import it themselves anyway.
    import pandas

    return pandas.DataFrame.from_records(rows)


_SENDERS: dict[str, Callable[[Any, Samples], None]] = {
    "wandb": _wandb,
    "vemlp_wandb": _vemlp_wandb,
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "swanlab": _swanlab,
    "trackio": _trackio,
    "clearml": _clearml,
    "file": _file,
    "console": _console,
}

"""A few credited responses in the forms that trackers take: an HTML page, Markdown, plain text, rows of a table.

Everything is bounded: the number of responses by the caller, their length here. A segment that is too long keeps its
first and its last characters, and says how many are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rredcot_verl.pages import html
from rredcot_verl.pages.text import line
from rredcot_verl.report.selection import KINDS, describe, extreme_traces
from rredcot_verl.report.shown_traces import ShownTrace
from rredcot_verl.report.trace import Segment, Trace

# Characters shown of a prompt (its end: the question comes last) and of a response, shared out among its segments.
MOST_PROMPT_CHARACTERS = 1000
MOST_RESPONSE_CHARACTERS = 6000
COLUMNS = (
    "step", "sample", "chosen as", "uid", "reward", "expected", "segment", "text", "tokens", "weight", "advantage",
    "credit", "self-value after",
)  # fmt: skip


@dataclass(frozen=True)
class Samples:
    """The responses chosen from a step, shortened to what is shown of them.

    Attributes:
        step: Training step.
        traces: The responses.
        kinds: Index of the reason of each in ``selection.KINDS``.
    """

    step: int
    traces: tuple[Trace, ...]
    kinds: tuple[int, ...]

    @property
    def origin(self) -> str:
        """Where the values come from, in words."""
        origins = dict.fromkeys(f"{trace.source}, read by {trace.engine}" for trace in self.traces)
        return "; ".join(origins)

    def html(self) -> str:
        """A self-contained page: loads nothing, runs nothing, everything of the model escaped."""
        traces = [ShownTrace(trace, reason) for trace, reason in self._described()]
        title = f"Credited responses of step {self.step}"
        return html.render("samples.html", title=title, origin=self.origin, traces=traces)

    def markdown(self) -> str:
        """A heading and a table for each response."""
        return html.render("samples.md", samples=self, described=self._described())

    def text(self) -> str:
        """The same for a terminal."""
        return html.render("samples.txt", samples=self, described=self._described())

    def _described(self) -> list[tuple[Trace, str]]:
        return [(trace, describe(trace, kind)) for trace, kind in zip(self.traces, self.kinds, strict=True)]

    def rows(self) -> list[list[str | int | float]]:
        """A row a segment, with the columns ``COLUMNS``."""
        return [
            [
                self.step,
                number,
                KINDS[kind],
                trace.uid,
                trace.reward,
                line(trace.ground_truth or ""),
                k + 1,
                line(trace.text_of(k)),
                segment.num_tokens,
                round(segment.weight, 4),
                round(segment.advantage, 4),
                round(segment.segment_reward, 4),
                round(segment.value, 4),
            ]
            for number, (trace, kind) in enumerate(zip(self.traces, self.kinds, strict=True), start=1)
            for k, segment in enumerate(trace.segments)
        ]


def choose_samples(step: int, traces: Sequence[Trace], count: int) -> Samples | None:
    """Chooses at most ``count`` responses of a step and shortens them; none where none has two segments with credit."""
    chosen = extreme_traces(traces, count)
    if not chosen:
        return None
    return Samples(step, tuple(shorten(trace) for trace, _ in chosen), tuple(kind for _, kind in chosen))


def shorten(trace: Trace) -> Trace:
    """Bounds the text of a scored trace; its numbers stay.

    Returns:
        The trace with at most ``MOST_PROMPT_CHARACTERS`` of the prompt's end and about ``MOST_RESPONSE_CHARACTERS`` of
        the response, segments and offsets of the shortened text; text outside the segments is left out.
    """
    share = max(MOST_RESPONSE_CHARACTERS // len(trace.segments), 80)
    parts: list[str] = []
    segments: list[Segment] = []
    start = 0
    for k, segment in enumerate(trace.segments):
        parts.append(_shortened(trace.text_of(k), share))
        segments.append(replace(segment, start=start, end=start + len(parts[-1])))
        start = segments[-1].end
    return replace(
        trace,
        prompt=_tail(trace.prompt.strip(), MOST_PROMPT_CHARACTERS),
        ground_truth=None if trace.ground_truth is None else _shortened(trace.ground_truth, 200),
        response="".join(parts),
        segments=tuple(segments),
    )


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} … [{len(text) - 2 * half:,} characters left out] … {text[-half:]}"


def _tail(text: str, most: int) -> str:
    return text if len(text) <= most else f"[{len(text) - most:,} characters left out] … {text[-most:]}"

"""The traces shown on the page: which ones, and how each is laid out."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rredcot_verl.report.blame import Blame, blame_of, last_visible_character
from rredcot_verl.report.data import CheckedLine, LineChecker, Response, Run, Trace, check_lines

# Characters that would end the document early or that browsers do not show; the line break and the tab stay.
_HIDDEN = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(9), *range(11, 32), 127)}
# Marks that turn the reading direction would reorder the text of the page around them.
_HIDDEN |= {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


@dataclass(frozen=True)
class Pick:
    """A trace chosen for the page.

    Attributes:
        trace: The trace.
        reason: Why it was chosen, in words.
        lines: Its judged lines; empty without a line checker.
        blame: Where its credit puts the blame; ``None`` where that question does not arise.
    """

    trace: Trace
    reason: str
    lines: Sequence[CheckedLine]
    blame: Blame | None


def safe(text: str) -> str:
    """Makes any text safe inside the page.

    Args:
        text: Text of a model or of a user.

    Returns:
        HTML without markup, without characters that a browser hides, and without lone surrogates, which UTF-8 lacks.
    """
    return escape(printable(text))


def printable(text: str) -> str:
    """Replaces what a reader cannot see: control characters, marks that turn the reading direction, lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8").translate(_HIDDEN)


def signed(value: float, num_digits: int = 2) -> str:
    """Writes a number with its sign, and a rounded zero without one.

    Args:
        value: The number.
        num_digits: Digits after the point.

    Returns:
        For example ``+0.25``, ``−0.50`` (with a true minus sign) or ``0.00``.
    """
    text = f"{value:+.{num_digits}f}"
    return text[1:] if float(text) == 0.0 else text.replace("-", "−")


def choose(run: Run, line_checker: LineChecker | None, seed: int) -> list[Pick]:
    """Draws the traces for the page: failed and solved ones of the whole run, then its last and its first step.

    Args:
        run: The run.
        line_checker: With one, the failed traces are drawn by whether the blame was located, and misses are shown too.
        seed: The same seed draws the same traces.

    Returns:
        At most nine traces, none twice.
    """
    rng = random.Random(seed)
    shown = [trace for trace in run.traces if trace.is_scored and trace.response.strip()]
    if not shown:
        return []
    # Only the traces drawn are judged again: a checker may be slow and a run has thousands of traces.
    order = rng.sample(shown, len(shown))
    # Without at least two segments there is no credit to look at; such traces come last.
    order.sort(key=lambda trace: len(trace.segments) < 2)
    picks: list[Pick] = []
    failed = [trace for trace in order if trace.is_failed]
    for located, count, reason in (
        (True, 2, "Failed: the blame falls on the first wrong line"),
        (False, 1, "Failed: the blame falls elsewhere"),
    ):
        picks += _draw_blamed(failed, picks, line_checker, located, count, reason)
    if line_checker is None:
        picks += _draw(failed, picks, None, 3, "Failed")
    picks += _draw([trace for trace in order if not trace.is_failed], picks, line_checker, 2, "Solved")
    steps = [trace.step for trace in shown]
    for step, which in ((max(steps), "last"), (min(steps), "first")):
        members = [trace for trace in order if trace.step == step]
        picks += _draw(members, picks, line_checker, 2, f"Drawn from the {which} step")
    return picks


def judged(trace: Trace, reason: str, line_checker: LineChecker | None) -> Pick:
    """A trace for the page, with its lines judged.

    Args:
        trace: The trace.
        reason: Why it was chosen, in words.
        line_checker: Judges its lines, if there is one.
    """
    lines = [] if line_checker is None else check_lines(line_checker, trace)
    return Pick(trace, reason, lines, blame_of(trace, lines))


def response_card(response: Response) -> str:
    """Lays out a response that has no segments.

    Args:
        response: A response of a dump.

    Returns:
        An ``<article>`` element.
    """
    outcome = "failed" if response.is_failed else "solved"
    expected = "unknown" if response.ground_truth is None else safe(response.ground_truth)
    return f"""<article class="card trace"><header><h3>{outcome.capitalize()}, without segments</h3><div class="facts">
<span>step <b>{response.step}</b></span><span>reward <b>{response.reward:.2f}</b></span>
<span>answer expected <b>{expected}</b></span></div></header>
<div class="prompt"><span class="soft">Prompt</span>
<div class="text" tabindex="0">{safe(response.prompt.strip())}</div></div>
<div class="prompt"><span class="soft">Response</span>
<div class="text" tabindex="0">{safe(response.response.strip())}</div></div></article>"""


def trace_card(pick: Pick) -> str:
    """Lays out one trace: a row per segment with its text, its credit and the self-value after it.

    Args:
        pick: The trace, with its judged lines.

    Returns:
        An ``<article>`` element.
    """
    trace = pick.trace
    outcome = "failed" if trace.is_failed else "solved"
    expected = "unknown" if trace.ground_truth is None else safe(trace.ground_truth)
    rows = "".join(_segment_row(pick, index) for index in range(len(trace.segments))) + _rest_row(pick)
    return f"""<article class="card trace"><header><h3>{safe(pick.reason)}</h3><div class="facts">
<span>step <b>{trace.step}</b></span><span>reward <b>{trace.reward:.2f}</b> ({outcome})</span>
<span>answer expected <b>{expected}</b></span>
<span>GRPO advantage <b>{signed(trace.grpo_advantage)}</b></span></div></header>
<div class="prompt"><span class="soft">Prompt</span>
<div class="text" tabindex="0">{safe(trace.prompt.strip())}</div></div>
<div class="rows" tabindex="0"><table><thead><tr><th class="what">segments of the response</th>
<th>tokens</th><th>weight</th><th>advantage</th><th>credit</th><th>self-value after</th></tr></thead><tbody>
<tr><td class="what"><div class="piece"><span></span><span class="soft">before the first token</span></div></td>
<td></td><td></td><td></td><td></td><td>{_value(trace.start_value)}</td></tr>{rows}</tbody></table></div></article>"""


def credit_colour(credit: float, css_class: str = "") -> str:
    """The class and style attributes that colour an element by its credit.

    Args:
        credit: A segment reward; 1 and above is the strongest colour.
        css_class: A further class name.

    Returns:
        HTML attributes.
    """
    # The square root keeps a credit of 0.05 visible beside one of 1.
    strength = 0.62 * min(1.0, abs(credit)) ** 0.5
    sign = "gain" if credit >= 0 else "loss"
    return f'class="{sign} {css_class}" style="--c:{strength:.3f}"'


def _draw(
    order: Sequence[Trace],
    taken: Sequence[Pick],
    checker: LineChecker | None,
    count: int,
    why: str,
) -> list[Pick]:
    used = {id(pick.trace) for pick in taken}
    return [judged(trace, why, checker) for trace in [trace for trace in order if id(trace) not in used][:count]]


def _draw_blamed(
    failed: Sequence[Trace],
    taken: Sequence[Pick],
    checker: LineChecker | None,
    located: bool,
    count: int,
    why: str,
) -> list[Pick]:
    picks: list[Pick] = []
    for trace in failed if checker is not None else ():
        if len(picks) == count:
            break
        pick = judged(trace, why, checker)
        if pick.blame is not None and pick.blame.is_located == located:
            picks.append(pick)
    return picks


def _segment_row(pick: Pick, index: int) -> str:
    segment = pick.trace.segments[index]
    start = pick.trace.segments[index - 1].end if index else 0
    tag = ""
    if pick.blame is not None and pick.blame.blamed == index:
        name = "most negative credit" if segment.segment_reward < 0 else "smallest credit"
        tag = f'<span class="tag whole">{name}</span>'
    return (
        f"<tr><td {credit_colour(segment.segment_reward, 'what')}>{tag}{_pieces(pick, start, segment.end)}</td>"
        f"<td>{segment.num_tokens}</td><td>{segment.weight:.2f}</td><td>{signed(segment.advantage)}</td>"
        f"<td {credit_colour(segment.segment_reward, 'credit')}>{signed(segment.segment_reward)}</td>"
        f"<td>{_value(segment.value)}</td></tr>"
    )


def _rest_row(pick: Pick) -> str:
    """A row for text after the last segment, so that nothing of a response is left out."""
    trace = pick.trace
    end = trace.segments[-1].end
    if not trace.response[end:].strip():
        return ""
    return f'<tr><td class="what">{_pieces(pick, end, len(trace.response))}</td>{"<td></td>" * 5}</tr>'


def _pieces(pick: Pick, start: int, end: int) -> str:
    """A part of the response, a row per line, with the checker's marks in the margin."""
    text = pick.trace.response[start:end]
    if not text.strip():
        return _piece("", safe(text.replace("\n", "⏎")) or "(no text)", "")
    spans = []
    for line in text.split("\n"):
        spans.append((start, start + len(line)))
        start += len(line) + 1
    # The line break between two segments belongs to either; shown, it would be an empty row.
    visible = [k for k, (low, high) in enumerate(spans) if pick.trace.response[low:high].strip()]
    return "".join(_line(pick, low, high) for low, high in spans[visible[0] : visible[-1] + 1])


def _line(pick: Pick, start: int, end: int) -> str:
    text = pick.trace.response[start:end]
    judged = next(
        (line for line in pick.lines if start <= last_visible_character(pick.trace, line) < max(end, start + 1)), None
    )
    if judged is None:
        return _piece("", safe(text), "")
    is_first_wrong = pick.blame is not None and pick.blame.line is judged
    tag = '<span class="tag">first wrong line</span>' if is_first_wrong else ""
    return _piece("ok" if judged.ok else "bad", safe(text), tag)


def _piece(verdict: str, text: str, tag: str) -> str:
    mark = {
        "ok": '<span class="mark ok" role="img" aria-label="correct line">✓</span>',
        "bad": '<span class="mark bad" role="img" aria-label="wrong line">✗</span>',
        "": "<span></span>",
    }[verdict]
    return f'<div class="piece {verdict}">{mark}<span><span class="text">{text}</span>{tag}</span></div>'


def _value(value: float) -> str:
    width = 100 * min(max(value, 0.0), 1.0)
    return f'{value:.2f}<span class="meter" aria-hidden="true"><i style="width:{width:.0f}%"></i></span>'

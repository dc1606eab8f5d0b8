"""Prompts chosen by a rule, as a parquet file: rows of the training data as they are, or prompts with figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rredcot_verl.report.files import ReportError
from rredcot_verl.report.frame import NO_FRAME, learn_frame, without_frame
from rredcot_verl.report.prompts import Prompt
from rredcot_verl.report.rules import Rule, UnknownFigureError, figures
from rredcot_verl.report.thresholds import Thresholds


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        num_rows: Rows of the file.
        unmatched: Text of the prompts that are not in the data.
    """

    num_rows: int
    unmatched: tuple[str, ...] = ()


def choose_prompts(prompts: Sequence[Prompt], rule: Rule, thresholds: Thresholds) -> tuple[list[Prompt], int]:
    """The prompts that a rule keeps, and how many are left out because they lack a figure that it names.

    The thresholds are those of the lists that a rule may name.
    """
    kept: list[Prompt] = []
    num_unknown = 0
    for prompt in prompts:
        try:
            if rule(figures(prompt, thresholds)):
                kept.append(prompt)
        except UnknownFigureError:
            num_unknown += 1
    return kept, num_unknown


def export(
    file: Path, prompts: Sequence[Prompt], thresholds: Thresholds, data: Path | None = None, *, by: str = "prompt"
) -> Exported:
    """Writes prompts to a parquet file.

    Args:
        file: The file to write.
        prompts: The prompts chosen.
        thresholds: Those of the lists that stand in the file without data.
        data: verl's training data: its rows are written unchanged, in its order, so that the file can be trained on.
        by: How rows are found: ``prompt``, by the text of the last user message, or ``index``, by ``extra_info.index``.

    Returns:
        What was written.

    Raises:
        ReportError: pyarrow is not installed, the data cannot be read, or nothing would be written.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ReportError("--export-filtered needs pyarrow: pip install pyarrow") from error
    if not prompts:
        raise ReportError(f"{file}: not written: the rule keeps no prompt")
    missing: list[str] = []
    if data is None:
        table = pyarrow.Table.from_pylist([_row(prompt, thresholds) for prompt in prompts])
    else:
        try:
            source = parquet.read_table(data)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise ReportError(f"{data}: cannot be read as parquet: {error}") from error
        if by == "index" and all(prompt.index is None for prompt in prompts):
            raise ReportError(f"{file}: not written: the run's traces hold no index; match by prompt")
        rows, missing = _match(prompts, _keys(data, source, by), by)
        if not rows:
            raise ReportError(
                f"{file}: not written: none of the {len(prompts):,} prompts is in {data} (matched by {by}; the first: "
                f"{prompts[0].text[-120:]!r})"
            )
        table = source.take(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, file)
    return Exported(table.num_rows, tuple(missing))


def _match(prompts: Sequence[Prompt], keys: Sequence[str | None], by: str) -> tuple[list[int], list[str]]:
    """The rows of the data that belong to the prompts, and the prompts that have none."""
    places: dict[str | None, list[int]] = {}
    for row, key in enumerate(keys):
        places.setdefault(key, []).append(row)
    places.pop(None, None)
    frame = (
        learn_frame([prompt.text for prompt in prompts], [key for key in keys if key]) if by == "prompt" else NO_FRAME
    )
    rows: set[int] = set()
    missing: list[str] = []
    for prompt in prompts:
        tried = [prompt.index] if by == "index" else [prompt.text.strip(), without_frame(prompt.text, frame)]
        found = next((places[key] for key in tried if key in places), [])
        rows.update(found)
        if not found:
            missing.append(prompt.text)
    return sorted(rows), missing


def _keys(data: Path, table: Any, by: str) -> list[str | None]:
    """What each row of the data is known by."""
    if by == "index":
        if "extra_info" not in table.column_names:
            raise ReportError(f"{data}: no column 'extra_info', so its rows have no index to be matched by")
        infos = (info if isinstance(info, dict) else {} for info in table.column("extra_info").to_pylist())
        return [None if info.get("index") is None else str(info["index"]) for info in infos]
    if "prompt" not in table.column_names:
        raise ReportError(f"{data}: no column 'prompt'; it has {', '.join(table.column_names)}")
    return [_question(prompt) for prompt in table.column("prompt").to_pylist()]


def _question(prompt: Any) -> str | None:
    """What the user asks last, as the traces hold it."""
    if isinstance(prompt, str):
        return prompt.strip()
    messages = [message for message in prompt or [] if isinstance(message, dict) and message.get("role") == "user"]
    content = messages[-1].get("content") if messages else None
    return content.strip() if isinstance(content, str) else None


def _row(prompt: Prompt, thresholds: Thresholds) -> dict[str, Any]:
    blame = prompt.shared_blame
    return {
        "prompt": prompt.text,
        "uids": list(prompt.uids),
        "index": prompt.index,
        **figures(prompt, thresholds),
        "blamed_segment": None if blame is None else f"{blame.how}: {blame.what}",
    }

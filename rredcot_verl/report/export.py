"""Prompts chosen by a rule, as a parquet file: rows of the training data as they are, or prompts with figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rredcot_verl.report.files import ReportError
from rredcot_verl.report.frame import learn_frame, without_frame
from rredcot_verl.report.prompts import Prompt
from rredcot_verl.report.rules import Rule, UnknownFigureError, figures
from rredcot_verl.report.thresholds import Thresholds


@dataclass(frozen=True)
class Chosen:
    """The prompts a rule keeps.

    Attributes:
        prompts: They.
        num_unknown: Prompts left out because they lack a figure that the rule names.
    """

    prompts: tuple[Prompt, ...]
    num_unknown: int


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        num_rows: Rows of the file.
        num_matched: Prompts found in the data; all of them without data.
        num_unmatched: Prompts not found there.
        unmatched: Some of those.
    """

    num_rows: int
    num_matched: int
    num_unmatched: int
    unmatched: tuple[str, ...] = ()


def choose_prompts(prompts: Sequence[Prompt], rule: Rule, thresholds: Thresholds) -> Chosen:
    """Applies a rule.

    Args:
        prompts: The run's prompts.
        rule: The rule.
        thresholds: Those of the lists that a rule may name.
    """
    kept: list[Prompt] = []
    num_unknown = 0
    for prompt in prompts:
        try:
            if rule.holds(figures(prompt, thresholds)):
                kept.append(prompt)
        except UnknownFigureError:
            num_unknown += 1
    return Chosen(tuple(kept), num_unknown)


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
    parquet = _pyarrow()
    if not prompts:
        raise ReportError(f"{file}: not written: the rule keeps no prompt")
    if data is None:
        table = parquet.table([_row(prompt, thresholds) for prompt in prompts])
        result = Exported(len(prompts), len(prompts), 0)
    else:
        source = parquet.read(data)
        if by == "index" and all(prompt.index is None for prompt in prompts):
            raise ReportError(f"{file}: not written: the run's traces hold no index; match by prompt")
        keys = _indices(data, source) if by == "index" else _questions(data, source)
        rows, missing = _match(prompts, keys, by)
        if not rows:
            raise ReportError(
                f"{file}: not written: none of the {len(prompts):,} prompts is in {data} (matched by {by}; the first: "
                f"{prompts[0].text[-120:]!r})"
            )
        table = source.take(rows)
        result = Exported(len(rows), len(prompts) - len(missing), len(missing), tuple(missing[:3]))
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write(table, file)
    return result


def _match(prompts: Sequence[Prompt], keys: Sequence[str | None], by: str) -> tuple[list[int], list[str]]:
    places: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        if key is not None:
            places.setdefault(key, []).append(row)
    frame = learn_frame([prompt.text for prompt in prompts], places) if by == "prompt" else ("", "")
    rows: set[int] = set()
    missing: list[str] = []
    for prompt in prompts:
        key = prompt.index if by == "index" else prompt.text
        found = places.get(key or "", []) if by == "index" else _rows_of(prompt.text, places, frame)
        rows.update(found)
        if not found:
            missing.append(prompt.text)
    return sorted(rows), missing


def _rows_of(text: str, places: Mapping[str, list[int]], frame: tuple[str, str]) -> list[int]:
    return places.get(text.strip()) or places.get(without_frame(text, frame), [])


def _questions(data: Path, table: Any) -> list[str | None]:
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


def _indices(data: Path, table: Any) -> list[str | None]:
    if "extra_info" not in table.column_names:
        raise ReportError(f"{data}: no column 'extra_info', so its rows have no index to be matched by")
    infos = table.column("extra_info").to_pylist()
    return [str(info["index"]) if isinstance(info, dict) and info.get("index") is not None else None for info in infos]


def _row(prompt: Prompt, thresholds: Thresholds) -> dict[str, Any]:
    blame = prompt.shared_blame
    return {
        "prompt": prompt.text,
        "uids": list(prompt.uids),
        "index": prompt.index,
        **figures(prompt, thresholds),
        "blamed_segment": None if blame is None else f"{blame.how}: {blame.what}",
    }


class _pyarrow:
    """The few calls of pyarrow, which verl brings but the report alone does not need."""

    def __init__(self) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ReportError("--export-filtered needs pyarrow: pip install pyarrow") from error
        self._pyarrow = pyarrow

    def table(self, rows: Sequence[dict[str, Any]]) -> Any:
        return self._pyarrow.Table.from_pylist(list(rows))

    def read(self, file: Path) -> Any:
        try:
            return self._pyarrow.parquet.read_table(file)
        except (OSError, self._pyarrow.ArrowInvalid) as error:
            raise ReportError(f"{file}: cannot be read as parquet: {error}") from error

    def write(self, table: Any, file: Path) -> None:
        self._pyarrow.parquet.write_table(table, file)

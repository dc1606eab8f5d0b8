"""What the checks of a run find, of its config, its data and its estimates, and how it is shown."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from rredcot_verl.data.tally import Tally
from rredcot_verl.preflight.table import bullets

Severity = Literal["note", "unchecked", "warning", "fault"]
_TITLES: dict[Severity, str] = {
    "note": "Looked at",
    "unchecked": "Not checked on this machine",
    "warning": "Worth a look",
    "fault": "Faults ({number})",
}


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        severity: `fault`: the run would fail, or train on something else than its author thinks; `warning`: worth a
            look, the run starts; `unchecked`: what could not be checked on this machine; `note`: what was looked at.
        message: What it is; of rows, the kind of fault, e.g. `missing_ground_truth`, after the key of their files.
        way_out: What was expected instead, and what to do.
        count: Rows that have it; 0 where it is not about rows.
        examples: The first few rows, and what they have.
    """

    severity: Severity
    message: str
    way_out: str = ""
    count: int = 0
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A few lines for people."""
        times = f" ({self.count} row{'s' if self.count != 1 else ''})" if self.count else ""
        first = self.message + times + (f": {self.way_out}" if self.way_out else "")
        return "\n".join([first, *(f"    {example}" for example in self.examples)])


@dataclass
class Findings:
    """Collected while the checks run.

    Attributes:
        found: All of them, in the order in which they were found, each once.
        place: Stands before every message that is added here.
    """

    found: list[Finding] = field(default_factory=list)
    place: str = ""

    def at(self, place: str) -> "Findings":
        """The same collection, to which a place adds its findings."""
        return Findings(self.found, f"{place}: ")

    def add(self, severity: Severity, message: str, way_out: str = "", rows: Tally | None = None) -> None:
        """Add a finding, with the rows that have it; nothing where there are no such rows."""
        count, examples = (0, ()) if rows is None else (rows.count, tuple(rows.lines()))
        finding = Finding(severity, self.place + message, way_out, count, examples)
        if finding not in self.found and (rows is None or count or examples):
            self.found.append(finding)

    def fault(self, message: str, way_out: str = "", rows: Tally | None = None) -> None:
        """Add a fault."""
        self.add("fault", message, way_out, rows)

    def warn(self, message: str, way_out: str = "", rows: Tally | None = None) -> None:
        """Add a warning."""
        self.add("warning", message, way_out, rows)

    def skip(self, message: str) -> None:
        """Add what was not checked, and why."""
        self.add("unchecked", message)

    def of(self, severity: Severity) -> list[Finding]:
        """The findings of one severity."""
        return [finding for finding in self.found if finding.severity == severity]

    @property
    def faults(self) -> list[Finding]:
        """What a run should not start with."""
        return self.of("fault")

    @property
    def warnings(self) -> list[Finding]:
        """What to know about."""
        return self.of("warning")

    @property
    def unchecked(self) -> list[Finding]:
        """What was not looked at."""
        return self.of("unchecked")

    def text(self, severities: Iterable[Severity] = tuple(_TITLES)) -> str:
        """Lists for people, the faults last; "" where there is nothing."""
        lists = ((_TITLES[severity], [str(finding) for finding in self.of(severity)]) for severity in severities)
        return "\n\n".join(bullets(title.format(number=len(found)), found) for title, found in lists if found)

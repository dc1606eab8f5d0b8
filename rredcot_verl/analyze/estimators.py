"""All that the bench knows of estimators and methods by name: what is measured for each, how its values are made of
it, and in which parts of the results it is shown."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from rredcot_verl.analyze.method_values import (
    Evidence,
    Method,
    attributed,
    changes_of_probe,
    monte_carlo,
    new_highs_of_probe,
    probed,
)

PROBES, HIDDEN = "probes", "hidden"


@dataclass(frozen=True)
class Estimator:
    """One `algorithm.adv_estimator` as the bench sees it.

    Attributes:
        name: Its name; `hidden` for the readout of hidden states.
        needs: What has to be measured for it besides continuations.
        methods: Makes its values from the measurements, none where they are missing; None for `hidden`, whose values
            are fitted (see `regressions`).
        knows_outcome: Whether its values are made with the outcome of the trace.
    """

    name: str
    needs: tuple[str, ...]
    methods: Callable[[Evidence], list[Method]] | None
    knows_outcome: bool = False


def _weighing(name: str, method: str) -> Estimator:
    return Estimator(name, (method,), lambda evidence: attributed(evidence, method), knows_outcome=True)


_ROWS = (
    Estimator("rredcot", (PROBES,), probed),
    Estimator("vps", (PROBES,), changes_of_probe),
    Estimator("mig", (PROBES,), new_highs_of_probe),
    Estimator("vineppo", (), monte_carlo),
    _weighing("attention_attribution", "attention_attribution"),
    _weighing("gradient_attribution", "input_x_gradient"),
    _weighing("leave_one_out", "leave_one_out"),
    Estimator("hidden", (HIDDEN,), None),
)
ESTIMATORS = {row.name: row for row in _ROWS}
"""By name, `hidden` for the readout; continuations are measured always, as all are compared with them."""

FORECASTS = tuple(row.name for row in _ROWS if not row.knows_outcome)
"""Those whose values do not know the outcome of the trace."""

REFERENCE = "joint:reference"
"""What differences are taken to: the probes as they are."""
READ = ("hidden:", "both:")
"""How the names of methods begin that read hidden states; the layer follows."""

CALIBRATED = (REFERENCE, "geometric:reference", "normalized:union")
"""Probes that are calibrated."""
ACROSS_CUTTINGS = (*CALIBRATED, "vps", "mig", "monte_carlo", "position", "calibrated", "calibrated+position")
"""Methods that are compared across cuttings, with those that `READ`."""
CREDITED = ("oracle", REFERENCE, "calibrated", "calibrated+position", "monte_carlo")
"""Methods whose credit is judged by the policy's gradient."""
IN_EXAMPLES = (
    "oracle",
    REFERENCE,
    "geometric:reference",
    "calibrated+position",
    "monte_carlo",
    "attention_attribution",
)
"""Methods shown beside example traces, with those that `READ`."""


def methods_from(evidence: Evidence, *needs: str) -> list[Method]:
    """The methods of all estimators that need these measurements; of those that need continuations alone for none."""
    wanted = set(needs)
    rows = [row for row in _ROWS if (wanted & set(row.needs) if wanted else not row.needs)]
    return [replace(method, estimator=row.name) for row in rows if row.methods for method in row.methods(evidence)]


def weighed(evidence: Evidence) -> list[Method]:
    """The methods of the estimators that weigh segments."""
    return methods_from(evidence, *(need for row in _ROWS for need in row.needs if need not in (PROBES, HIDDEN)))

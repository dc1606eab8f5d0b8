"""All that the bench knows of estimators and methods by name: what is measured for each, how its values are made of
it, and in which parts of the results it is shown."""

import numpy as np

from rredcot_verl.analyze.method_values import (
    Estimator,
    Evidence,
    Method,
    attributed,
    changes_of_probe,
    monte_carlo,
    new_highs_of_probe,
    probed,
)
from rredcot_verl.analyze.trace_table import TraceTable

PROBES, HIDDEN = "probes", "hidden"

_ROWS = (
    Estimator("rredcot", (PROBES,), probed),
    Estimator("vps", (PROBES,), changes_of_probe),
    Estimator("mig", (PROBES,), new_highs_of_probe),
    Estimator("vineppo", (), monte_carlo),
    Estimator("attention_attribution", ("attention_attribution",), attributed),
    Estimator("gradient_attribution", ("input_x_gradient", "integrated_gradients"), attributed),
    Estimator("leave_one_out", ("leave_one_out",), attributed),
    Estimator("hidden", (HIDDEN,), None),
)
ESTIMATORS = {row.name: row for row in _ROWS}
"""By name, `hidden` for the readout; continuations are measured always, as all are compared with them."""

REFERENCE = "joint:reference"
"""What differences are taken to: the plugin's default."""
ALL_ROLLOUTS = "monte_carlo_gold"
"""Monte Carlo from all continuations: what the others are compared with."""
READ = ("hidden:", "both:")
"""How the names of methods begin that read hidden states; the layer follows."""

CALIBRATED = (REFERENCE, "geometric:reference", "normalized:union")
"""Probes that are calibrated, and those of the ablation over temperatures."""
SMOOTHED = (REFERENCE, "calibrated", "monte_carlo")
"""Methods that are smoothed too."""
ACROSS_CUTTINGS = (*CALIBRATED, "vps", "mig", "monte_carlo", "position", "calibrated")
"""Methods of the ablation over cuttings, with those that `READ`."""
CREDITED = (REFERENCE, "geometric:reference", "vps", "mig", "calibrated")
"""Methods of the ablation over credit, with those that `READ`."""
IN_EXAMPLES = (REFERENCE, "geometric:reference", "calibrated", "monte_carlo", "attention_attribution")
"""Methods shown beside example traces, with those that `READ`."""


def methods_from(evidence: Evidence, *needs: str) -> list[Method]:
    """The methods of all estimators that need these measurements; of those that need continuations alone for none."""
    wanted = set(needs)
    rows = [row for row in _ROWS if (wanted & set(row.needs) if wanted else not row.needs)]
    return [method for row in rows if row.methods for method in row.methods(row, evidence)]


def weighed(evidence: Evidence) -> list[Method]:
    """The methods of the estimators that weigh segments."""
    return methods_from(evidence, *(need for row in _ROWS for need in row.needs if need not in (PROBES, HIDDEN)))


def from_all_rollouts(table: TraceTable) -> Method:
    """The Monte Carlo reference as a method: what credit from all continuations would do."""
    values = np.where(table.is_state, table.monte_carlo.values, np.nan)
    most = np.where(table.is_state, table.monte_carlo.num_rollouts, 0).sum(axis=1) / np.maximum(table.num_segments, 1)
    about = "all continuations of the gold: what Monte Carlo credit can do at this noise"
    return Method(
        ALL_ROLLOUTS,
        "monte_carlo",
        about,
        values,
        estimator="vineppo",
        seconds=table.seconds * most,
        num_tokens=table.num_tokens * most,
    )

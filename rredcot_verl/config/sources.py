"""Names of the sources of segment values: RREDCoT and its peers."""

PROBED = ("rredcot", "vps", "mig")
"""Sources whose values are made of probes."""

ATTENTION_ATTRIBUTION = "attention_attribution"
GRADIENT_ATTRIBUTION = "gradient_attribution"
LEAVE_ONE_OUT = "leave_one_out"
ATTRIBUTIONS = (ATTENTION_ATTRIBUTION, GRADIENT_ATTRIBUTION, LEAVE_ONE_OUT)
"""Sources that weigh segments for the answer."""

MONTE_CARLO = "vineppo"

SOURCES = (*PROBED, MONTE_CARLO, *ATTRIBUTIONS)
"""Where segment values come from; each is an `algorithm.adv_estimator`."""


def source_of(estimator: str) -> str:
    """Where a run's segment values come from: its estimator, or RREDCoT for a foreign one with `enable=true`."""
    return estimator if estimator in SOURCES else "rredcot"

"""Names on which trainer and training engine agree for attribution; see `actor_protocol`."""

ATTENTION = "attention"
"""`PASS`: weigh segments by attention; `OPTIONS` are `(layers,)`."""

GRADIENT = "gradient"
"""`PASS`: weigh segments by gradient; `OPTIONS` are `(method, num_steps)`."""

OPTIONS = "rredcot_attribution_options"
"""Settings of such a pass, see there."""

PLANS = "rredcot_attribution_plans"
"""Field of a row: what its segments are weighed for, see `encode_plan`; `NO_PLAN` for nothing."""

WEIGHTS = "rredcot_attribution_weights"
"""Field of a row that such a pass gives: a weight a segment of its plan; a single 0 for none."""

"""Names on which the trainer and the training engine agree."""

MODEL_TYPE = "rredcot_language_model"
"""`actor_rollout_ref.model.model_type` of runs whose training engine shares prefixes; verl's is `language_model`."""

PROBES = "rredcot_probes"
"""Field of a row: its probes, encoded."""

PROBE_LOG_PROBS = "rredcot_probe_log_probs"
"""Field of a row that a pass gives: see `read_probes`; a single 0 for a row without probes."""

PASS = "rredcot_pass"
"""Asks a log-probability pass for the probes: `FUSED` or `PROBES_ONLY`; without it the pass is verl's own."""

FUSED = "fused"
"""The traces' own log-probabilities and entropies too."""

PROBES_ONLY = "probes_only"
"""Nothing but the probes."""

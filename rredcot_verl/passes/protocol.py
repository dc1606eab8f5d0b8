"""Names on which the trainer and the training engine agree."""

MODEL_TYPE = "rredcot_language_model"
"""`actor_rollout_ref.model.model_type` of runs whose training engine reads probes or hidden states; verl's is
`language_model`."""

PROBES = "rredcot_probes"
"""Field of a row: its probes, encoded."""

PROBE_LOG_PROBS = "rredcot_probe_log_probs"
"""Field of a row that a pass gives: see `read_probes`; a single 0 for a row without probes."""

PASS = "rredcot_pass"
"""What a log-probability pass is for: `FUSED`, `PROBES_ONLY` or `HIDDEN_ONLY`; without it the pass is verl's own."""

FUSED = "fused"
"""The traces' own log-probabilities and entropies too."""

PROBES_ONLY = "probes_only"
"""Nothing but the probes."""

HIDDEN_ONLY = "hidden_only"
"""Nothing but the hidden states that `READOUT` asks for."""

READOUT = "rredcot_readout"
"""Asks a log-probability pass, with or without probes, for hidden states: `(layer, dim, seed)`, see `hidden_states`."""

HIDDEN_POSITIONS = "rredcot_hidden_positions"
"""Field of a row: the indices in its `input_ids` of the tokens whose states are wanted; a single -1 for none."""

HIDDEN_STATES = "rredcot_hidden_states"
"""Field of a row that a pass gives: its states, one after the other, `dim` floats each; a single 0 for none."""

"""Names on which the trainer and the training engine agree."""

from dataclasses import dataclass

MODEL_TYPE = "rredcot_language_model"
"""`actor_rollout_ref.model.model_type` of runs whose training engine reads probes, hidden states or attributions;
verl's is `language_model`."""

PASSES = "rredcot_passes"
"""Entry of a batch, in its `extra_info`: what a call of `compute_log_prob` reads besides, as a tuple of pairs of a name
and its options. Without it the pass is verl's own.

    ("probes", ()), ("hidden", (layer, dim, seed)): one of them or both;
    ("attention", ()) or ("gradient", ()): by itself, and `ALONE`.
"""

ALONE = "rredcot_alone"
"""Entry of a batch, bool: True to compute nothing but these; False for the rows' own log-probabilities and entropies
too."""


@dataclass(frozen=True)
class PassFields:
    """Fields of a row.

    Attributes:
        payload: What a pass is given, int32; `NOTHING` for a row that wants nothing.
        result: What it gives, float32; a single 0 for such a row.
    """

    payload: str
    result: str


FIELDS = {
    "probes": PassFields("rredcot_probes", "rredcot_probe_log_probs"),
    "hidden": PassFields("rredcot_hidden_positions", "rredcot_hidden_states"),
    "attention": PassFields("rredcot_attention_plans", "rredcot_attention_weights"),
    "gradient": PassFields("rredcot_gradient_plans", "rredcot_gradient_weights"),
}
"""By name of a pass. Probes: `encode`d, and what `read_probes` gives. Hidden states: the indices in the row's
`input_ids` of the tokens whose states are wanted, and those states, one after the other, `dim` floats each. Attention
and gradient: `encode_plan`, and a weight a segment."""

NOTHING = (-1,)
"""Payload of a row that wants nothing, whatever the pass."""

"""Names on which the trainer and the training engine agree."""

from dataclasses import dataclass

MODEL_TYPE = "rredcot_language_model"
"""`actor_rollout_ref.model.model_type` of runs whose training engine reads something for us; verl's is
`language_model`."""

PASSES = "rredcot_passes"
"""Entry of a batch: what a call of `compute_log_prob` reads besides; a tuple of `(name, options)` pairs, each name a
key of `FIELDS`. Without it the call is verl's own."""

ALONE = "rredcot_alone"
"""Entry of a batch: True: nothing but these is computed; False: the rows' own log-probabilities and entropies too."""


@dataclass(frozen=True)
class PassFields:
    """Row fields of a pass.

    Attributes:
        payload: What it is given: jagged int32; a row that wants nothing holds `NOTHING`.
        result: What it gives: jagged float32; a row that wanted nothing holds a single 0.
    """

    payload: str
    result: str


FIELDS = {
    "probes": PassFields("rredcot_probes", "rredcot_probe_log_probs"),
    "hidden": PassFields("rredcot_hidden_positions", "rredcot_hidden_states"),
    "attention": PassFields("rredcot_attention_plans", "rredcot_attention_weights"),
    "gradient": PassFields("rredcot_gradient_plans", "rredcot_gradient_weights"),
}
"""By pass. Options: `probes` (); `hidden` (layer, dim, seed); `attention` (layers,); `gradient` (method, num_steps)."""

NOTHING = (-1,)
"""Payload of a row that wants nothing, for every pass."""

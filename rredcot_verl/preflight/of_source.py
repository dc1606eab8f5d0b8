"""What a run's source of segment values is in words, what it costs, and what it needs of the rows."""

from dataclasses import dataclass

from omegaconf import DictConfig

from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.config.sources import ATTRIBUTIONS, MONTE_CARLO
from rredcot_verl.run.settings import run_source


@dataclass(frozen=True)
class SourceInWords:
    """A run's source of segment values.

    Attributes:
        values: Where the values come from.
        reference_key: Dotted path of the rows' reference answers; None where none are read.
        reads_probes: Whether its cost is that of probes.
        continuation_tokens: Most tokens that are generated for a response beside its own; 0 for none.
    """

    values: str
    reference_key: str | None
    reads_probes: bool
    continuation_tokens: int


def describe(config: DictConfig, settings: RREDCoTConfig) -> SourceInWords:
    """Say what a run's source is, and what it costs beside verl's own work."""
    source, value = run_source(config), settings.self_value
    continuation_tokens = 0
    if source == MONTE_CARLO:
        values = f"Monte Carlo, {settings.monte_carlo.num_rollouts} continuations from every boundary: dear"
        continuation_tokens = _continuation_tokens(settings, config.data.max_response_length)
    elif source in ATTRIBUTIONS:
        values = f"{source} of the {settings.attribution.target} answer"
    elif value.form == "hidden":
        values = f"regression on the hidden state of layer {settings.readout.layer}, no probes"
    else:
        calibrated = "" if value.calibration == "none" else f", {value.calibration} calibration"
        values = (
            f"probes: {value.proposals}, at most {value.max_proposals} answers of {value.max_answer_tokens} tokens; "
            f"{value.form} value{calibrated}; format {settings.elicitation.format}"
        )
    key = value.reference_key if settings.reads_references(source) else None
    return SourceInWords(values, key, settings.reads_probes(source), continuation_tokens)


def required_reference(config: DictConfig, settings: RREDCoTConfig | None) -> str | None:
    """Dotted path at which every row must have a reference answer; None where a row does without."""
    if settings is None or not settings.needs_references(run_source(config)):
        return None
    return settings.self_value.reference_key


def _continuation_tokens(settings: RREDCoTConfig, max_response_length: int) -> int:
    """As if all boundaries were at the start of a response of full length, in tokens."""
    samples, num_boundaries = settings.monte_carlo, settings.segmentation.num_segments
    bounds = [samples.num_rollouts * num_boundaries * max_response_length]
    if samples.max_tokens is not None:
        bounds.append(samples.num_rollouts * num_boundaries * samples.max_tokens)
    if samples.max_total_tokens is not None:
        bounds.append(samples.max_total_tokens)
    return int(min(bounds))

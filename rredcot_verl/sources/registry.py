"""Names of the sources: `algorithm.adv_estimator` to the class that answers to it."""

import importlib
from typing import TYPE_CHECKING, Any

from rredcot_verl.config.blocks import Block
from rredcot_verl.config.schema import PREFIX, RREDCoTConfig

if TYPE_CHECKING:
    # verl's module of estimators is being loaded when the names are asked for.
    from rredcot_verl.sources.base import Source

SOURCES: dict[str, str] = {
    "rredcot": "rredcot_verl.sources.probes:Probes",
    "vps": "rredcot_verl.sources.probes:ReferenceProgress",
    "mig": "rredcot_verl.sources.probes:NewHighs",
    "vineppo": "rredcot_verl.sources.monte_carlo:MonteCarlo",
    "attention_attribution": "rredcot_verl.sources.attribution:AttentionAttribution",
    "gradient_attribution": "rredcot_verl.sources.attribution:GradientAttribution",
    "leave_one_out": "rredcot_verl.sources.attribution:LeaveOneOut",
}
"""Advantage estimators of ours, and the class of each; a new source is a file and a line here."""
DEFAULT = "rredcot"
HIDDEN = "rredcot_verl.sources.hidden:HiddenStates"
"""The source of `self_value.form=hidden`, under the estimator `rredcot`."""

SPECIFIC = (
    *("source_options", "monte_carlo", "readout", "readout.layer", "readout.dim"),
    *("self_value.engine", "self_value.share_prefix", "self_value.fuse", "self_value.form", "self_value.calibration"),
    *("self_value.proposals", "self_value.reference_key", "self_value.max_proposals"),
    *("self_value.max_answer_tokens", "self_value.max_closing_tokens", "self_value.score_opening"),
    *("self_value.timeout_s", "self_value.max_concurrency"),
)
"""Keys under `algorithm.rredcot` that not every source reads: each says in `reads` which of them it does."""


def source_class(estimator: str) -> "type[Source]":
    """The class that answers to a name of `SOURCES`."""
    found: type[Source] = _load(SOURCES[estimator])
    return found


def make_source(settings: RREDCoTConfig, estimator: str) -> "Source":
    """The source of a run.

    Args:
        settings: The `algorithm.rredcot` block.
        estimator: `algorithm.adv_estimator`; a foreign one (with `enable=true`) gets RREDCoT's own source.

    Returns:
        Source: See `sources.base`.

    Raises:
        ValueError: `algorithm.rredcot.source` is no importable subclass of `Source`, stands beside another estimator
            than `rredcot`, or its options are not what it takes.
    """
    name = estimator if estimator in SOURCES else DEFAULT
    if settings.source is None:
        hidden = name == DEFAULT and settings.self_value.form == "hidden"
        own: type[Source] = _load(HIDDEN) if hidden else source_class(name)
        return own(settings, name)
    if name != DEFAULT:
        raise ValueError(
            f"{PREFIX}.source={settings.source!r} with algorithm.adv_estimator={estimator}, which has its own source; "
            f"use algorithm.adv_estimator={DEFAULT}"
        )
    try:
        found = _load(settings.source)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{PREFIX}.source={settings.source!r} cannot be imported ({error}); expected 'package.module:Class'"
        ) from error
    from rredcot_verl.sources import base

    if not (isinstance(found, type) and issubclass(found, base.Source)):
        raise ValueError(
            f"{PREFIX}.source={settings.source!r} is no subclass of rredcot_verl.sources.base.Source, but {found!r}"
        )
    missing = [name for name in ("plan", "values") if getattr(found, name) is getattr(base.Source, name)]
    if missing or not issubclass(found.Options, Block):
        fault = f"has no {' and no '.join(missing)}" if missing else "has Options that are no config.blocks.Block"
        raise ValueError(f"{PREFIX}.source={settings.source!r} {fault}; see rredcot_verl.sources.base.Source")
    return found(settings, settings.source)


def _load(path: str) -> Any:
    module_name, _, class_name = path.partition(":")
    if not class_name:
        raise ValueError("it names no class")
    return getattr(importlib.import_module(module_name), class_name)

"""Schema of the `algorithm.rredcot` block: its parts (`blocks.py`), and what they say together.

`rredcot/default.yaml` is generated from it: `python -m rredcot_verl.config.overlay --write`.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from rredcot_verl.config.blocks import (
    GROUND_TRUTH,
    Block,
    CreditConfig,
    ElicitationConfig,
    MonteCarloConfig,
    ReadoutConfig,
    SegmentationConfig,
    SelfValueConfig,
    TracesConfig,
)

PREFIX = "algorithm.rredcot"
T = TypeVar("T", bound=BaseModel)


class RREDCoTConfig(Block):
    """The whole `algorithm.rredcot` block. The defaults are the method, but for the credit, which is ours."""

    enable: bool | None = Field(
        None,
        description="null: on exactly when algorithm.adv_estimator is rredcot or one of its peers; true: redistribute "
        "the token-level rewards for the estimator named there too; false is refused with them.",
    )
    check_data: bool = Field(
        True,
        description="Check the data files before any worker is started: columns, prompts, ground truths, references.",
    )
    live_every_s: float | None = Field(
        30.0, gt=0, description="Seconds between lines that say what the run is doing; null: none."
    )
    source: str | None = Field(
        None,
        min_length=1,
        description="`package.module:Class`: a source of segment values of your own, with adv_estimator=rredcot; null: "
        "the one that algorithm.adv_estimator names.",
    )
    source_options: dict[str, Any] = Field({}, description="Options of that source, checked by its class.")
    segmentation: SegmentationConfig = SegmentationConfig()
    elicitation: ElicitationConfig = ElicitationConfig()
    self_value: SelfValueConfig = SelfValueConfig()
    readout: ReadoutConfig = ReadoutConfig()
    monte_carlo: MonteCarloConfig = MonteCarloConfig()
    credit: CreditConfig = CreditConfig()
    traces: TracesConfig = TracesConfig()

    @property
    def measures_uniform_groups(self) -> bool:
        """Whether groups whose rewards are all alike are measured too."""
        return self.self_value.probe_uniform_groups or self.credit.form == "critic"

    @model_validator(mode="after")
    def _readout(self) -> "RREDCoTConfig":
        readout, hidden = self.readout, self.self_value.form == "hidden"
        if not (hidden or (readout.use_probe or readout.use_position or readout.use_hidden)):
            raise ValueError(
                "readout.use_probe, readout.use_position and readout.use_hidden are all false: nothing is left to "
                "regress on"
            )
        return self

    @model_validator(mode="after")
    def _programs(self) -> "RREDCoTConfig":
        value = self.self_value
        if self.elicitation.format != "code":
            return self
        if value.proposals != "group" and value.reference_key == GROUND_TRUTH:
            raise ValueError(
                f"elicitation.format=code with self_value.proposals={value.proposals}: {GROUND_TRUTH} holds tests, "
                "not a program; set self_value.reference_key to the rows' reference solutions (scripts/prepare_code.py "
                "writes them to extra_info.solutions), or self_value.proposals=group"
            )
        return self


def parse(block: Mapping[str, Any] | None) -> RREDCoTConfig:
    """Validate the `algorithm.rredcot` block.

    Args:
        block: Plain containers (no OmegaConf nodes); None or empty for the defaults.

    Returns:
        RREDCoTConfig: The frozen settings.

    Raises:
        ValueError: An unknown or ill-typed key, an impossible combination or a number out of range. The message has one
            line per fault with the full key, the value and what is allowed.
    """
    return validate(RREDCoTConfig, block or {}, PREFIX)


def validate(model: type[T], block: Mapping[str, Any], prefix: str) -> T:
    """Validate a block of settings by its model; errors as in `parse`, with `prefix` before each key."""
    try:
        return model.model_validate(dict(block))
    except ValidationError as error:
        raise ValueError("\n".join(_describe(model, fault, prefix) for fault in error.errors())) from None


def _describe(model: type[BaseModel], fault: Any, prefix: str) -> str:
    key = ".".join([prefix, *(str(part) for part in fault["loc"])])
    if fault["type"] == "extra_forbidden":
        return f"{key}={fault['input']!r}: unknown key; {_siblings(model, fault['loc'])}"
    if fault["type"] == "value_error":
        return f"{prefix}: {fault['ctx']['error']}"
    if fault["type"] == "missing":
        return f"{key} is missing; it must be set"
    return f"{key}={fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _siblings(model: type[BaseModel], loc: tuple[Any, ...]) -> str:
    for part in loc[:-1]:
        annotation = model.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return "known keys: " + ", ".join(model.model_fields)

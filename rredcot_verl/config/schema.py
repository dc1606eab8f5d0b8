"""Schema of the `algorithm.rredcot` block: its parts (`blocks.py`), and what they say together.

`rredcot_trainer.yaml` repeats the defaults for people who read YAML; a test keeps the two equal.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from rredcot_verl.config.blocks import (
    GROUND_TRUTH,
    AttributionConfig,
    Block,
    CreditConfig,
    ElicitationConfig,
    MonteCarloConfig,
    ReadoutConfig,
    SegmentationConfig,
    SelfValueConfig,
    TracesConfig,
)
from rredcot_verl.config.sources import ATTRIBUTIONS, PROBED

PREFIX = "algorithm.rredcot"


class RREDCoTConfig(Block):
    """The whole `algorithm.rredcot` block. The defaults are the method."""

    enable: bool | None = Field(
        None,
        description="null: on exactly when algorithm.adv_estimator is rredcot or one of its peers; true: redistribute "
        "the token-level rewards for the estimator named there too; false is refused with them.",
    )
    check_data: bool = Field(
        True,
        description="Check the data files before any worker is started: columns, prompts, ground truths, references.",
    )
    segmentation: SegmentationConfig = SegmentationConfig()
    elicitation: ElicitationConfig = ElicitationConfig()
    self_value: SelfValueConfig = SelfValueConfig()
    readout: ReadoutConfig = ReadoutConfig()
    monte_carlo: MonteCarloConfig = MonteCarloConfig()
    attribution: AttributionConfig = AttributionConfig()
    credit: CreditConfig = CreditConfig()
    traces: TracesConfig = TracesConfig()

    def reads_probes(self, source: str) -> bool:
        """Whether a run with this source forces known answers."""
        return source in PROBED and self.self_value.form != "hidden"

    def reads_references(self, source: str) -> bool:
        """Whether the rows' reference answers are used."""
        if self.reads_probes(source):
            return self.self_value.proposals != "group"
        return source in ATTRIBUTIONS and self.attribution.target == "reference"

    def needs_references(self, source: str) -> bool:
        """Whether a row without a reference answer can have no segment values."""
        others = self.reads_probes(source) and self.self_value.proposals != "reference"
        return self.reads_references(source) and not others

    def regresses(self) -> bool:
        """Whether values are fitted to the outcomes, starting from the mean of the prompt's other rollouts."""
        return self.self_value.form == "hidden" or self.self_value.calibration != "none"

    def reads_hidden_states(self) -> bool:
        """Whether the training engine reads the policy's hidden states."""
        return self.self_value.form == "hidden" or (self.regresses() and self.readout.use_hidden)

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
    try:
        return RREDCoTConfig.model_validate(dict(block or {}))
    except ValidationError as error:
        raise ValueError("\n".join(_describe(fault) for fault in error.errors())) from None


def _describe(fault: Any) -> str:
    key = ".".join([PREFIX, *(str(part) for part in fault["loc"])])
    if fault["type"] == "extra_forbidden":
        return f"{key}={fault['input']!r}: unknown key; {_siblings(fault['loc'])}"
    if fault["type"] == "value_error":
        return f"{PREFIX}: {fault['ctx']['error']}"
    return f"{key}={fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _siblings(loc: tuple[Any, ...]) -> str:
    model: type[BaseModel] = RREDCoTConfig
    for part in loc[:-1]:
        annotation = model.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return "known keys: " + ", ".join(model.model_fields)

"""What a source of segment values is: one object that answers for itself everywhere, so that nobody asks its name.

The same class is made in three places from the same settings: by the trainer before anything starts (what it needs, who
measures), by every agent loop worker (what it leaves of a response), and by the trainer in its step (values).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import DictConfig

from rredcot_verl.config.blocks import Block
from rredcot_verl.config.schema import PREFIX, RREDCoTConfig, validate
from rredcot_verl.sources.engines import EngineChoice
from rredcot_verl.sources.group import Group
from rredcot_verl.sources.queue import RecordedBatch, Rows
from rredcot_verl.sources.record import Plan, Record
from rredcot_verl.sources.response import AgentTools, Response


@dataclass(frozen=True)
class PassRequest:
    """What the training engine shall read in a log-probability pass.

    Attributes:
        name, options: See `passes.protocol.FIELDS`.
        fuses: Whether it can join the pass that computes `old_log_prob`.
    """

    name: str
    options: tuple[Any, ...] = ()
    fuses: bool = True


@dataclass(frozen=True)
class Workers:
    """The training workers, for a source that measures by calls of its own.

    Attributes:
        group: verl's actor workers.
        num_ranks: Data-parallel ranks; a call's sequences are a multiple of it.
        temperature: Of the rollout.
        max_tokens: Tokens of one rank's pass.
    """

    group: Any
    num_ranks: int
    temperature: float
    max_tokens: int


class Source:
    """Where the values v_0 .. v_{K-1} of a response's segments come from.

    A subclass needs `plan` and `values`; everything else has a default. It is registered under a name of
    `algorithm.adv_estimator` in `sources.registry`, or named by a user with `algorithm.rredcot.source`.

    Args:
        settings: The `algorithm.rredcot` block.
        name: Its name in traces and messages.
    """

    Options: ClassVar[type[Block]] = Block
    """Model of `algorithm.rredcot.source_options`; strict: what it does not know is refused."""
    weighs: ClassVar[bool] = False
    """Whether it shares R - b out by weights."""
    forecasts: ClassVar[bool] = True
    """Whether a value is meant to tell the reward to come; not where it is made of R, or a probability by the token."""
    estimates_reward: bool = False
    """Whether v_k is an estimate of E[R | s_k] on the reward's own scale; `credit.form=critic` needs one."""
    reads_probes: ClassVar[bool] = False
    """Whether its cost is that of probes."""
    needs_all: bool = False
    """Whether all rollouts of a prompt must be there, or two with different rewards are enough."""
    payload_fields: tuple[str, ...] = ()
    """Row fields that `plan` leaves for the training engine."""
    result_fields: tuple[str, ...] = ()
    """Row fields that `measure` writes, besides those of `passes.protocol.FIELDS`."""

    def __init__(self, settings: RREDCoTConfig, name: str) -> None:
        self.settings = settings
        self.name = name
        self.options = validate(self.Options, settings.source_options, f"{PREFIX}.source_options")

    # Before anything starts

    def reads(self) -> frozenset[str]:
        """Keys under `algorithm.rredcot` that not every source reads and this one does; see `registry.SPECIFIC`."""
        return frozenset({"source_options"})

    def reads_references(self) -> bool:
        """Whether the rows' reference answers are used."""
        return False

    def needs_references(self) -> bool:
        """Whether a row without a reference answer can have no segment values."""
        return self.reads_references()

    def check(self, config: DictConfig) -> str | None:
        """Why a run cannot use it, with the way out; None where it can. Before Ray: without the model's config."""
        del config
        return why_not_regressed(self.settings, self.name)

    def choose_engine(self, config: DictConfig) -> EngineChoice:
        """Who measures, in the trainer's process before any worker is started.

        Raises:
            ValueError: What it needs of the run's engines they cannot do.
        """
        del config
        return EngineChoice("source", False, "by the source itself", self.name)

    def describe(self) -> str:
        """What is measured, in words, for the dry run."""
        return self.name

    def most_generated_tokens(self, max_response_length: int) -> int:
        """Most tokens that are generated for a response beside its own."""
        del max_response_length
        return 0

    def way_out(self) -> str:
        """What to look at where no response of a step could be measured."""
        return f"check the data that {self.name} reads"

    # In an agent loop worker

    def start(self, tools: AgentTools) -> None:
        """Keep what is needed to measure responses."""
        self.tools = tools

    async def plan(self, response: Response, group: Group, boundaries: list[int]) -> Plan:
        """What is measured of a response, or is left for the trainer to measure.

        Args:
            response: The response; at least one of its tokens is the policy's.
            group: Its group, decided, unless groups of one reward are measured too.
            boundaries: Its segment boundaries, `num_segments + 1` offsets.
        """
        raise NotImplementedError

    # In the trainer's step

    def measure(self, recorded: RecordedBatch, workers: Workers) -> None:
        """Measure by calls of its own, before verl computes `old_log_prob`."""
        del recorded, workers

    def passes(self, recorded: RecordedBatch) -> tuple[PassRequest, ...]:
        """What the training engine shall read for this batch."""
        del recorded
        return ()

    def values(self, rows: Rows) -> list[list[float]]:
        """For each row v_0 .. v_{K-1} in units of reward; nothing for a row without values."""
        raise NotImplementedError

    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        """Scalars of a step for the tracker, after `values`."""
        del records
        return {}

    def save(self, folder: str) -> None:
        """Write its state into a checkpoint's folder."""

    def load(self, folder: str) -> None:
        """Restore its state from a checkpoint's folder."""


NOTHING_REGRESSED = (
    f"{PREFIX}.readout.use_hidden=True with self_value.calibration=none: nothing is regressed; set "
    "self_value.calibration=logistic or self_value.form=hidden"
)


def why_not_regressed(settings: RREDCoTConfig, name: str) -> str | None:
    """What the settings ask of a source whose values are not regressed on the outcome; None where that is nothing."""
    value = settings.self_value
    asked = f"calibration={value.calibration}" if value.calibration == "logistic" else None
    if asked is None and value.form == "hidden":
        asked = "form=hidden"
    if asked is not None:
        return (
            f"{PREFIX}.self_value.{asked} with algorithm.adv_estimator={name}: only rredcot's values are regressed on "
            "the outcome; use algorithm.adv_estimator=rredcot or leave it out"
        )
    return NOTHING_REGRESSED if settings.readout.use_hidden else None

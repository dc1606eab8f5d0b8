"""No probes: states valued by the policy's own hidden states (`algorithm.rredcot.self_value.form=hidden`, ours)."""

import logging
from collections.abc import Sequence

from omegaconf import DictConfig

from rredcot_verl.config.schema import PREFIX, RREDCoTConfig
from rredcot_verl.sources.base import PassRequest, Source
from rredcot_verl.sources.engines import EngineChoice, check_layer, why_no_hidden
from rredcot_verl.sources.group import Group
from rredcot_verl.sources.queue import RecordedBatch, Rows
from rredcot_verl.sources.record import Plan, Record, Status
from rredcot_verl.sources.regression import HIDDEN_FIELD, Regression, hidden_positions, hidden_request
from rredcot_verl.sources.response import Response

logger = logging.getLogger(__name__)


class HiddenStates(Source):
    """v_k fitted to the verified outcomes from the hidden state before boundary k; see `sources.regression`."""

    estimates_reward = True
    payload_fields = (HIDDEN_FIELD,)

    def __init__(self, settings: RREDCoTConfig, name: str) -> None:
        super().__init__(settings, name)
        self._regression = Regression(settings, None, hidden=True)

    def reads(self) -> frozenset[str]:
        """See `Source`."""
        regression = {"self_value.form", "self_value.calibration", "readout", "readout.layer", "readout.dim"}
        return super().reads() | regression

    def check(self, config: DictConfig) -> str | None:
        """See `Source`."""
        return None

    def choose_engine(self, config: DictConfig) -> EngineChoice:
        """See `Source`."""
        obstacle = why_no_hidden(config)
        if obstacle is not None:
            raise ValueError(f"{PREFIX}.self_value.form=hidden: the training engine gives no hidden states: {obstacle}")
        check_layer(config, self.settings.readout)
        choice = EngineChoice("actor", True, "in the pass that computes old_log_prob", "hidden states")
        logger.warning("rredcot: %s: %s, by %s; %s", self.name, choice.what, choice.engine, choice.reason)
        return choice

    def describe(self) -> str:
        """See `Source`."""
        return f"regression on the hidden state of layer {self.settings.readout.layer}, no probes"

    async def plan(self, response: Response, group: Group, boundaries: list[int]) -> Plan:
        """See `Source`."""
        record = Record(Status.SCORED, segment_boundaries=boundaries)
        return Plan(record, {HIDDEN_FIELD: hidden_positions(response, boundaries)})

    def passes(self, recorded: RecordedBatch) -> tuple[PassRequest, ...]:
        """See `Source`."""
        return (hidden_request(self.settings.readout),)

    def values(self, rows: Rows) -> list[list[float]]:
        """See `Source`."""
        return self._regression.fitted(rows, [])

    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        """See `Source`."""
        return self._regression.metrics()

    def save(self, folder: str) -> None:
        """See `Source`."""
        self._regression.save(folder)

    def load(self, folder: str) -> None:
        """See `Source`."""
        self._regression.load(folder)

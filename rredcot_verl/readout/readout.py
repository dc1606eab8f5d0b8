"""Earlier steps of a training run: a bounded buffer of rows that later batches are fitted to as well, and its state."""

import logging
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rredcot_verl.readout.forecast import forecast
from rredcot_verl.readout.model import Rows, digest, shuffled_places

logger = logging.getLogger(__name__)


class ReadoutSettings(Protocol):
    """What is read of `algorithm.rredcot.readout`."""

    @property
    def seed(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def half_life(self) -> float | None: ...
    @property
    def max_rows(self) -> int: ...


@dataclass(frozen=True)
class States:
    """The measured states of a batch of responses: s_0 .. s_{K-1} of each.

    Attributes:
        features: `(num_states, num_features)`, finite; see `features.build_features`.
        group_means: `(num_states,)` in [0, 1], mean outcome of the prompt's other rollouts; NaN where there is none.
        outcomes: `(num_states,)` in [0, 1], R of the state's response.
        groups: Prompt of each state. It names the prompt itself, the same in a later epoch: a label made anew each
            step would put a prompt into several folds. Compared by its text.
        rows: `(num_states,)` int64, number of the response in the batch.
        counts: `(num_states,)` bool, whether the state is fitted to; not where its response was measured because of
            its own outcome, see `features.others_differ`.
        blocks: `(num_features,)` int64, columns that share a prior; None: all.
        num_others: `(num_states,)`, how many rollouts `group_means` is the mean of; None: counted in `rows`.

    Raises:
        ValueError: Shapes that do not fit, numbers that are not finite or out of range.
    """

    features: Tensor
    group_means: Tensor
    outcomes: Tensor
    groups: Sequence[Hashable]
    rows: Tensor
    counts: Tensor
    blocks: Tensor | None = None
    num_others: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.groups)
        if self.features.ndim != 2 or self.features.size(0) != count:
            raise ValueError(f"features {tuple(self.features.shape)}: expected ({count}, num_features)")
        for name in ("group_means", "outcomes", "rows", "counts", "num_others"):
            values = getattr(self, name)
            if values is not None and values.shape != (count,):
                raise ValueError(f"{name} {tuple(values.shape)}: expected ({count},)")
        if self.blocks is not None and self.blocks.shape != self.features.shape[1:]:
            raise ValueError(f"blocks {tuple(self.blocks.shape)}: expected ({self.features.size(1)},)")
        if not bool(self.features.isfinite().all()):
            bad = (~self.features.isfinite()).any(dim=0).nonzero().flatten().tolist()
            raise ValueError(
                f"features hold NaN or infinity in columns {bad[:10]}: a missing value would be wrong credit"
            )
        known = self.group_means[~self.group_means.isnan()]
        for name, values in (("outcomes", self.outcomes), ("group_means", known)):
            if not bool(((values >= 0) & (values <= 1)).all()):
                raise ValueError(f"{name} must lie in [0, 1], got {values.min().item()} to {values.max().item()}")


class Readout:
    """Values states by a regression on outcomes: of earlier steps.

    Deterministic: the values depend on the settings, the states handed in so far and nothing else; the order of rows
    changes them by rounding only. Drift is met by `window` (older steps are forgotten) and `half_life` (they count
    less).

    Args:
        settings: `algorithm.rredcot.readout`.
        tag: What else the meaning of the columns depends on (the layer, the value form). A saved state with another
            tag is not used.
    """

    def __init__(self, settings: ReadoutSettings, tag: str = "") -> None:
        self._settings = settings
        self._tag = tag
        self._buffer: Rows | None = None
        self.report: dict[str, float] = {}
        """Scalars of the last fit, named for verl's aggregation; empty before the first."""

    def fit_predict(self, states: States, step: int) -> Tensor:
        """Value the states of one batch, then keep them for the fits of later batches.

        A value is a function of its own state and of the mean of its prompt's other rollouts, and that function was
        fixed before this batch was seen. The same prompt's outcomes in earlier steps are fitted to: given the policy,
        what it does now does not depend on them.

        Args:
            states: The batch. It is as much evidence as it has responses, shared evenly by all their states, whatever
                response they are of: how many more will follow is known at its end only, and goes with its outcome.
            step: The trainer's step.

        Returns:
            `(num_states,)` float64 in [0, 1]. Where the features know nothing, or there is too little to fit to, the
            mean outcome of the prompt's other rollouts exactly (without any, the mean of what was fitted to).
        """
        started = time.perf_counter()
        if not len(states.groups):
            self.report = {}
            return torch.zeros(0, dtype=torch.float64)
        batch, half_life = self._rows(states, step), self._settings.half_life
        blocks = torch.zeros(batch.features.size(1)) if states.blocks is None else states.blocks
        earlier = self._earlier(batch, step)
        decay = 1.0 if half_life is None else 0.5 ** ((step - 1 - earlier.steps).clamp(min=0) / half_life)
        train = earlier._replace(weights=earlier.weights * decay)
        fitted = forecast(batch, train, blocks, self._settings.seed)
        joined = Rows(*map(torch.cat, zip(batch.take(batch.weights > 0), earlier, strict=True)))
        self._buffer = self._newest(self._window(joined, step + 1))
        used = fitted.deviations > 0
        self.report = {
            "readout_rows/mean": float(len(train.steps)),
            "readout_prompts/mean": float(len(torch.unique(train.prompts))),
            "readout_gain/mean": fitted.gain,
            "readout_group_mean_kept/mean": float(not used.any()),
            "readout_seconds/mean": time.perf_counter() - started,
        }
        if bool(used.any()):
            # A ridge is 1 / variance of the prior.
            self.report["readout_log10_ridge/mean"] = float(-2.0 * fitted.deviations[used].log10().mean())
        return fitted.values

    def state_dict(self) -> dict[str, Any]:
        """The buffer, as plain tensors: at most `max_rows` rows or one prompt, float32 features."""
        rows = {} if self._buffer is None else {name: rows.clone() for name, rows in self._buffer._asdict().items()}
        return {"tag": self._tag, "seed": self._settings.seed, "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; the values that follow are those of the run that was not interrupted, bit for bit.

        A state whose tag or seed is not this readout's holds columns of another meaning: it is left, with a warning.
        """
        self._buffer = None
        if (state["tag"], state["seed"]) != (self._tag, self._settings.seed):
            logger.warning(
                "rredcot: the saved readout was made with other features (%s, seed %s); starting with an empty buffer",
                state["tag"],
                state["seed"],
            )
        elif state["rows"]:
            self._buffer = Rows(**{name: tensor.clone() for name, tensor in state["rows"].items()})

    def _rows(self, states: States, step: int) -> Rows:
        _, num_states = torch.unique(states.rows, return_counts=True)
        prompts = digest(states.groups)
        means, others = states.group_means.double(), states.num_others
        if others is None:
            responses = torch.unique(torch.stack([prompts, states.rows.long()], dim=1), dim=0)
            distinct, sizes = torch.unique(responses[:, 0], return_counts=True)
            # A mean was taken over at least one rollout, even if that one has no states here.
            others = (sizes[torch.searchsorted(distinct, prompts)] - 1).clamp(min=1)
        return Rows(
            # float32 in the checkpoint; what it cannot hold is clipped by the standardisation anyway.
            features=states.features.double().clamp(-1e30, 1e30).float(),
            group_means=means,
            num_others=others.double() * ~means.isnan(),
            outcomes=states.outcomes.double(),
            weights=states.counts.double() / num_states.double().mean(),
            prompts=prompts,
            steps=torch.full_like(prompts, step),
        )

    def _earlier(self, batch: Rows, step: int) -> Rows:
        """What the buffer holds for a fit at this step; no rows where there is none."""
        nothing = batch.take(batch.steps < step)
        if self._buffer is None:
            return nothing
        columns, earlier_columns = batch.features.size(1), self._buffer.features.size(1)
        if columns != earlier_columns:
            logger.warning(
                "rredcot: the readout's features are now %s columns, the earlier steps' %s; they are left out",
                columns,
                earlier_columns,
            )
            return nothing
        return self._window(self._buffer, step)

    def _window(self, rows: Rows, step: int) -> Rows:
        """The rows that a fit at this step may see."""
        return rows.take(rows.steps >= step - self._settings.window)

    def _newest(self, rows: Rows) -> Rows:
        """The newest rows that there is room for; of the step that does not fit, whole prompts, and one at least."""
        if len(rows.steps) <= self._settings.max_rows:
            return rows
        distinct, prompt = torch.unique(rows.prompts, return_inverse=True)
        places = shuffled_places(distinct, self._settings.seed)
        newest_first = (rows.steps.max() - rows.steps) * len(distinct) + places[prompt]
        _, block, sizes = torch.unique(newest_first, return_inverse=True, return_counts=True)
        fits = sizes.cumsum(0) <= self._settings.max_rows
        fits[0] = True
        return rows.take(fits[block])

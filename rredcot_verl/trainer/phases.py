"""Tells the live line what verl's trainer is doing."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from rredcot_verl.live import LiveLine

PHASES = {
    "_setup": "loading models and servers",
    "_validate": "validating",
    "_compute_reward_colocate": "verifying with a reward model",
    "_compute_old_log_prob": "computing old log-probabilities and values",
    "_compute_ref_log_prob": "computing the reference's log-probabilities",
    "_compute_values": "computing the critic's values",
    "_compute_advantage": "giving credit",
    "_update_critic": "updating the critic",
    "_update_actor": "updating the policy",
    "_save_checkpoint": "saving a checkpoint",
    "on_step_end": "bringing weights to the servers",
}
"""verl's methods, and what the line says while they run."""


class PhasesMixin(PPOTrainer):
    """Stands before verl's trainer; without a live line it is verl's trainer."""

    live: LiveLine | None = None

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, Any]) -> KVBatchMeta:
        """See `PPOTrainer.step`."""
        if self.live is None:
            return super().step(metrics, timing_raw)
        self.live.begin_step(self.global_steps)
        batch = super().step(metrics, timing_raw)
        metrics.update(self.live.metrics())
        return batch

    def _in(self, phase: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self.live is None else self.live.phase(phase)


def _telling(name: str, phase: str) -> Callable[..., Any]:
    def method(self: PhasesMixin, *args: Any, **kwargs: Any) -> Any:
        with self._in(phase):
            return getattr(super(PhasesMixin, self), name)(*args, **kwargs)

    return method


for _name, _phase in PHASES.items():
    setattr(PhasesMixin, _name, _telling(_name, _phase))

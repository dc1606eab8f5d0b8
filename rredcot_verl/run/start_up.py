"""Checks that run before Ray starts, for runs composed with the `rredcot_trainer` overlay."""

import os
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from rredcot_verl.cpu import ROLLOUT_NAME, check_rollout
from rredcot_verl.run.settings import active_settings


class CheckSettings(Callback):
    """Hydra callback of the overlay: a faulty config ends the job with a message instead of starting Ray.

    It also makes `trainer.device=cpu` known to verl's platform layer, which asks the environment. Nothing else ever
    selects the CPU backend.
    """

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the composed config.

        Raises:
            SystemExit: The config is faulty. Hydra turns any ordinary exception of a callback into a warning.
        """
        try:
            active_settings(config)
            if config.actor_rollout_ref.rollout.name == ROLLOUT_NAME:
                check_rollout(config.actor_rollout_ref.rollout)
        except ValueError as error:
            raise SystemExit(f"rredcot: {error}") from None
        if config.trainer.device == "cpu":
            select_cpu_platform()


def select_cpu_platform() -> None:
    """Make the embedded CPU backend verl's platform, in this process and in those it starts."""
    from verl.plugin.platform import set_platform

    from rredcot_verl.cpu.platform import PlatformCPU

    os.environ["VERL_PLATFORM"] = "cpu"
    # Importing verl's entry point has already looked for an accelerator.
    set_platform(PlatformCPU())

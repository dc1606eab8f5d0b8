"""verl's own replay buffer with a short poll interval, for `trainer.v1.sampler.custom_sampler`.

verl polls the TransferQueue every 2 s, which is most of a step when a step takes half a second. The interval is a
constructor argument that no configuration key reaches; a custom sampler does.
"""

from collections.abc import Mapping
from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

DEFAULT_POLL_INTERVAL = 0.1
"""Seconds between two looks at the TransferQueue."""


def fast_polling_replay_buffer(
    trainer_mode: str, sampler_kwargs: Mapping[str, Any], **kwargs: Any
) -> ReplayBuffer | ReplayBufferAsync:
    """Builds the replay buffer verl would have chosen, polling every `sampler_kwargs.poll_interval` seconds.

    Args:
        trainer_mode: `trainer.v1.trainer_mode`.
        sampler_kwargs: `trainer.v1.sampler.sampler_kwargs`: `poll_interval` (seconds), and copies of the two settings
            below, which verl withholds from custom samplers.
        **kwargs: The rest of what verl's trainer passes to a replay buffer.

    Raises:
        ValueError: `algorithm.filter_groups.enable` or `trainer.v1.sampler.sync_refill_failed_groups` is set.
    """
    for name in ("filter_groups", "sync_refill_failed_groups"):
        if sampler_kwargs.get(name, False):
            raise ValueError(
                f"{name} is not passed on to custom samplers by verl; to use it, give up the short poll interval: "
                "trainer.v1.sampler.custom_sampler.path=null"
            )
    buffer_cls = ReplayBuffer if trainer_mode == "sync" else ReplayBufferAsync
    return buffer_cls(
        trainer_mode=trainer_mode,
        sampler_kwargs=sampler_kwargs,
        poll_interval=sampler_kwargs.get("poll_interval", DEFAULT_POLL_INTERVAL),
        **kwargs,
    )

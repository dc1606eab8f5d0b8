"""An adapter that never sends the actor's weights: what weight sync looks like when it is broken."""

from verl.workers.rollout.utils import ensure_async_iterator

from rredcot_verl.cpu.rollout import CPUServerAdapter


class CutOffAdapter(CPUServerAdapter):
    async def update_weights(self, weights, global_steps=None, **kwargs):
        # The weights are gathered all the same: the collectives must run on every rank.
        async for _ in ensure_async_iterator(weights):
            pass
        await self.server.set_global_steps.remote(global_steps or 0)

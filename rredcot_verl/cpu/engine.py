"""verl's FSDP2 language-model engine on CPU."""

import dataclasses

from torch import nn
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from rredcot_verl.passes.engine import RREDCoTEngine


class CPUFSDPEngineWithLMHead(FSDPEngineWithLMHead):
    """FSDP2 engine without an offload policy.

    verl wraps a forward-only (reference) model with `CPUOffloadPolicy(pin_memory=True)`. Pinning needs an accelerator,
    and on CPU there is nowhere to offload to.
    """

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        engine_config = self.engine_config
        if engine_config.offload_policy:
            raise ValueError("fsdp_config.offload_policy=true needs an accelerator to offload from; set it to false")
        self.engine_config = dataclasses.replace(engine_config, forward_only=False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config = engine_config


class CPURREDCoTEngine(RREDCoTEngine, CPUFSDPEngineWithLMHead):
    """The same with our passes."""

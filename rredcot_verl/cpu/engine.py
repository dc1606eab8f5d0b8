"""verl's FSDP2 language-model engine on CPU."""

import dataclasses

from torch import nn
from transformers import PreTrainedConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from rredcot_verl.passes.engine import RREDCoTEngine

_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""What models of transformers name what they do to the head's output; the fused kernels leave it out without a word."""


def check_fused(config: PreTrainedConfig) -> None:
    """Refuses verl's fused kernels, which the CPU backend turns on, for a model whose logits are not the head's alone.

    Raises:
        ValueError: It is such a model.
    """
    text = config.get_text_config(decoder=True)
    for name in _CHANGES_LOGITS:
        # Some configs have the name and a neutral number.
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"the model's config has {name}={getattr(text, name)}, which verl's fused kernels ignore; set "
                "actor_rollout_ref.model.use_fused_kernels=false"
            )


class CPUFSDPEngineWithLMHead(FSDPEngineWithLMHead):
    """FSDP2 engine without an offload policy.

    verl wraps a forward-only (reference) model with `CPUOffloadPolicy(pin_memory=True)`. Pinning needs an accelerator,
    and on CPU there is nowhere to offload to.
    """

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        engine_config = self.engine_config
        if self.model_config.use_fused_kernels:
            check_fused(self.model_config.hf_config)
        if engine_config.offload_policy:
            raise ValueError("fsdp_config.offload_policy=true needs an accelerator to offload from; set it to false")
        self.engine_config = dataclasses.replace(engine_config, forward_only=False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config = engine_config


class CPURREDCoTEngine(RREDCoTEngine, CPUFSDPEngineWithLMHead):
    """The same with our passes."""

"""What a model's config says about its size. No weights are read: the model is built on the meta device."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a causal language model.

    Attributes:
        num_parameters: All of them, tied ones once.
        num_expert_parameters: Those of a mixture's experts, of all of them.
        num_trainable_parameters: The adapters' with LoRA, otherwise all.
        largest_layer: Parameters of the largest decoder layer.
        num_embedding_parameters: Embeddings and head, tied ones once.
        vocab_size, hidden_size, num_layers, num_kv_heads, head_dim: As in the config.
        intermediate_size: Width of the feed-forward part that one token uses.
        max_length: Longest sequence in tokens, None where the config does not say.
    """

    num_parameters: int
    num_expert_parameters: int
    num_trainable_parameters: int
    largest_layer: int
    num_embedding_parameters: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_length: int | None

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the key-value cache of one token in bfloat16, on all GPUs of a server together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * 2


def why_no_model(path: str) -> str | None:
    """Why a model path cannot be a model, as far as the file system tells; None for a good folder or a hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        missing = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
        return f"the folder has no {' and no '.join(missing)}" if missing else None
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        return "no such folder"
    return None


def read_facts(model: DictConfig) -> ModelFacts:
    """Sizes of the model of `actor_rollout_ref.model`.

    Raises:
        OSError: Its config cannot be loaded.
        ValueError: transformers does not know it, or not as a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    hf_config = AutoConfig.from_pretrained(
        model.get("hf_config_path") or model.path, trust_remote_code=bool(model.trust_remote_code)
    )
    with torch.device("meta"):
        module: torch.nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            hf_config, trust_remote_code=bool(model.trust_remote_code)
        )
    text = hf_config.get_text_config(decoder=True)
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    experts = sum(parameter.numel() for name, parameter in module.named_parameters() if ".experts." in name)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in _decoder_layers(module, text.num_hidden_layers)]
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    experts_per_token = getattr(text, "num_experts_per_tok", None) if experts else None
    width = text.moe_intermediate_size * experts_per_token if experts_per_token else text.intermediate_size
    embeddings = {id(weight): weight.numel() for weight in _embedding_weights(module)}
    return ModelFacts(
        num_parameters=num_parameters,
        num_expert_parameters=experts,
        num_trainable_parameters=_num_adapter_parameters(module, model) or num_parameters,
        largest_layer=max(layers, default=0),
        num_embedding_parameters=sum(embeddings.values()),
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_kv_heads=heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        intermediate_size=width,
        max_length=getattr(text, "max_position_embeddings", None),
    )


def lora_rank(model: DictConfig) -> int:
    """Rank of LoRA adapters, 0 for none; Megatron's key goes first, as in verl."""
    return int(model.get("lora", {}).get("rank", 0) or model.get("lora_rank", 0))


def _decoder_layers(module: nn.Module, num_layers: int) -> list[nn.Module]:
    for child in module.modules():
        if isinstance(child, nn.ModuleList) and len(child) == num_layers:
            return list(child)
    return []


def _embedding_weights(module: Any) -> list[nn.Parameter]:
    ends = (module.get_input_embeddings(), module.get_output_embeddings())
    return [end.weight for end in ends if end is not None]


def _num_adapter_parameters(module: nn.Module, model: DictConfig) -> int:
    """rank * (in + out) for every linear layer that gets an adapter; 0 without LoRA.

    Megatron's fused layers have other names than transformers', so there it is as for all linear layers.
    """
    rank = lora_rank(model)
    fsdp = not model.get("lora", {}).get("rank", 0)
    targets = model.get("target_modules") if fsdp else "all-linear"
    total = 0
    for name, child in module.named_modules():
        if not isinstance(child, nn.Linear) or name.endswith("lm_head"):
            continue
        if isinstance(targets, str) or targets is None or name.split(".")[-1] in targets:
            total += rank * (child.in_features + child.out_features)
    return total

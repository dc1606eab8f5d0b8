"""Our vLLM server on a real engine in this process, without Ray, HTTP and verl's workers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl.workers.config import RolloutConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from rredcot_verl.servers.vllm import ProbingVLLMHttpServer
from tests.tiny_model import make_tokenizer


def make_model(folder: Path, max_position_embeddings: int = 512, seed: int = 0) -> Qwen3ForCausalLM:
    """Writes a 2-layer model with random weights and its tokenizer; vLLM on CPU takes heads of 64 and no smaller."""
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).float().eval()
        torch.nn.init.normal_(model.model.embed_tokens.weight.data[config.pad_token_id], std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


class LocalServer(ProbingVLLMHttpServer):
    """The server's request handling; what verl's constructor and `launch_server` set up is given.

    Args:
        engine: A running engine.
        config: verl's rollout configuration.
    """

    def __init__(self, engine: AsyncLLM, config: RolloutConfig) -> None:
        self.engine, self.config = engine, config
        self.model_config = SimpleNamespace(processor=None, lora_rank=0, lora={})
        self.replica_rank, self.node_rank, self.global_steps = 0, 0, 7
        self._disaggregation_role, self._pd_decode_peers = "null", []
        self._submission_paused, self._rejecting, self._admitting = False, False, 0
        self._resume_event = asyncio.Event()
        self._resume_event.set()
        self._prepare()


@contextlib.asynccontextmanager
async def serve(folder: Path, **settings: Any) -> AsyncIterator[LocalServer]:
    """Runs an engine with the arguments that verl's server gives it, on CPU.

    Args:
        folder: The model.
        **settings: Engine arguments beside or instead of those below.
    """
    arguments = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 512,
        "block_size": 16,
        "enable_prefix_caching": True,
        "enforce_eager": True,
        "logprobs_mode": "processed_logprobs",
        "gpu_memory_utilization": 0.1,
        "num_gpu_blocks_override": 512,
        "disable_log_stats": True,
        **settings,
    }
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folder), **arguments))
    config = RolloutConfig(
        name="vllm",
        max_model_len=arguments["max_model_len"],
        max_num_seqs=arguments["max_num_seqs"],
        scheduling_policy=arguments.get("scheduling_policy", "fcfs"),
        prompt_length=256,
        response_length=256,
    )
    try:
        yield LocalServer(engine, config)
    finally:
        engine.shutdown()

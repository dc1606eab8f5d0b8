"""Peaks of the CPU allocator in passes of verl's FSDP2 engine: `python -m tests.preflight.peaks FOLDER`.

One rank in bfloat16, a model whose logits weigh what they do in real ones; writes `peaks.json`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rredcot_verl.passes.probe_pack import ProbePack, count_probe_tokens
from rredcot_verl.passes.protocol import ALONE, MODEL_TYPE, PASSES
from rredcot_verl.probes.probe import Probe
from tests.passes.cases import PLAIN, Rows
from tests.passes.ranks import build_engine, make_batch
from tests.peak_memory import peak_bytes

VOCAB_SIZE = 16384
CHUNK_SIZE = 512
LENGTHS = (700, 500, 300)
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": False,
}


def make_rows(num_boundaries: int, num_tokens: int) -> Rows:
    """Traces with one long answer at each boundary."""
    generator = torch.Generator().manual_seed(0)

    def draw(size: int) -> list[int]:
        return torch.randint(VOCAB_SIZE, (size,), generator=generator).tolist()

    probes = [
        [
            Probe(state, 0, 1 + state * (length // num_boundaries), tuple(draw(num_tokens)), 8, 8, (1, 2))
            for state in range(num_boundaries)
        ]
        for length in LENGTHS
    ]
    none: list[Any] = [None] * len(LENGTHS)
    return Rows([draw(length) for length in LENGTHS], probes, [[]] * len(LENGTHS), none)


CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "plain": (1, 9, {"use_remove_padding": True}),
    "plain chunked": (1, 9, {"use_remove_padding": True}),
    "fused": (8, 12, {PASSES: (("probes", ()),), ALONE: False}),
    "fused code": (8, 60, {PASSES: (("probes", ()),), ALONE: False}),
    "alone": (8, 12, {PASSES: (("probes", ()),), ALONE: True, "calculate_entropy": False}),
    "alone code": (8, 60, {PASSES: (("probes", ()),), ALONE: True, "calculate_entropy": False}),
    "fused kernels": (8, 60, {PASSES: (("probes", ()),), ALONE: False, "use_fused_kernels": True}),
    "fused kernels alone": (8, 60, {PASSES: (("probes", ()),), ALONE: True, "use_fused_kernels": True}),
}
"""Boundaries, tokens of an answer and settings of the pass; the kernels last: verl gives them to the model's class."""


def main(folder: Path) -> None:
    """Measure all cases, at the rollout temperature 0.7 and at 1."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    for tied in (False, True):
        shape = SHAPE | {"tie_word_embeddings": tied}
        Qwen3ForCausalLM(Qwen3Config(**shape)).save_pretrained(folder / ("tied" if tied else "model"))
    model = {"path": str(folder / "model")}
    chunks = {"entropy_from_logits_with_chunking": True, "entropy_from_logits_chunk_size": CHUNK_SIZE}
    # With FSDP2, verl's kernels in torch work with a tied head only.
    kernels = {
        "path": str(folder / "tied"),
        "use_fused_kernels": True,
        "fused_kernel_options": {"impl_backend": "torch"},
    }
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "plain": (model, {}),
        "plain chunked": (model, chunks),
        "kernels": (kernels, {}),
    }
    engines: dict[str, Any] = {}
    peaks = []
    for name, (num_boundaries, num_tokens, settings) in CASES.items():
        rows = make_rows(num_boundaries, num_tokens)
        pack = ProbePack.build([len(trace) for trace in rows.traces], rows.probes)
        asked, alone = PASSES in settings, settings.get(ALONE, False)
        seen = sum(max(probe.position for probe in own) for own in rows.probes)
        kind = name if name in kinds else "kernels" if "kernels" in name else "plain"
        if kind not in engines:
            of_model, options = kinds[kind]
            engines[kind] = build_engine(MODEL_TYPE, of_model, "bf16", **options)
        engine = engines[kind]
        for temperature in (0.7, 1.0):
            data = make_batch(rows, PLAIN | settings | {"temperature": temperature})
            with engine.eval_mode():
                engine.infer_batch(make_batch(rows, PLAIN | settings))
                peak = peak_bytes(lambda: engine.infer_batch(data))  # noqa: B023
            peaks.append(
                {
                    "name": name,
                    "temperature": temperature,
                    "bytes": peak,
                    "pass": {
                        "num_own": 0 if alone else sum(LENGTHS),
                        "num_others": seen if alone else 0,
                        "num_probe_tokens": sum(map(count_probe_tokens, rows.probes)) if asked else 0,
                        "num_read": len(pack.rows(all_trace_rows=False)) if asked else 0,
                    },
                }
            )
    (folder / "peaks.json").write_text(json.dumps(peaks))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

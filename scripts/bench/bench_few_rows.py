"""Decoding on a CPU: `rredcot_verl/cpu/few_rows.py` against torch's products and transformers' attention.

Owner: the core maintainers. Makes tables of docs/results/bench.md. Last run: 2026-11-30.

    PYTHONPATH=. python scripts/bench/bench_few_rows.py [--repeats 7 --threads 2 --tokens 60]

Milliseconds, medians of `repeats` in turns after one of each that is not counted, for layers of a model of half a
billion parameters, of one of 135 million, and of smaller ones; ours also beyond the rows for which it is taken. Then
seconds in which a model of 135 million parameters (SmolLM2's shape, random weights) writes `tokens` after 16 prompts of
60 to 72 tokens, and the memory faults meanwhile, with either attention, twice in turns: in a thread of its own, as the
server does; its environment has MALLOC_MMAP_THRESHOLD_=1048576 besides.
"""

import json
import resource
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from plumbing import machine, parser, save
from torch import nn
from torch.nn.functional import linear
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from rredcot_verl.cpu import few_rows
from rredcot_verl.cpu.generation import generate_batch
from rredcot_verl.cpu.sampling import SamplingParams

SHAPES = ((896, 151_936), (896, 4864), (4864, 896), (576, 49_152), (576, 1536), (512, 512), (256, 256))
"""Numbers in and out."""
ROWS = (1, 4, 16, 32, 64, 128, 256)


def milliseconds(layer: nn.Linear, rows: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Of torch's product, and of ours."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for times, product in zip(found, (lambda: linear(rows, layer.weight), lambda: layer(rows)), strict=True):
            started = time.perf_counter()
            product()
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(found[0][1:]), statistics.median(found[1][1:])


def decoding(num_tokens: int) -> list[dict[str, Any]]:
    """Seconds and memory faults of a batch with transformers' attention and with ours, twice each in turns."""
    shape = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=49_152, hidden_size=576, intermediate_size=1536, **shape)
    model = LlamaForCausalLM(config).eval()
    few_rows.use_few_rows(model)
    model.generation_config = GenerationConfig()
    ours = model.config._attn_implementation
    prompts = [list(range(60 + 4 * (row % 4))) for row in range(16)]
    params = [SamplingParams(max_tokens=num_tokens, ignore_eos=True)] * len(prompts)
    lines = []
    with ThreadPoolExecutor(1) as thread:
        for attention in ("sdpa", ours, "sdpa", ours):
            model.set_attn_implementation(attention)
            before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            thread.submit(generate_batch, model, prompts, params, (), threading.Event()).result()
            seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
            faults = after.ru_minflt - before.ru_minflt
            lines.append({"attention": attention, "tokens": num_tokens, "seconds": seconds, "faults": faults})
    return lines


def main() -> None:
    """Read the arguments, run, and write the results."""
    args = parser(__doc__, repeats=7, threads=torch.get_num_threads(), tokens=60).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    few_rows.MOST_ROWS = max(ROWS)
    lines = [{"machine": machine(), "torch": torch.__version__, "threads": args.threads}]
    with torch.inference_mode():
        for num_in, num_out in SHAPES:
            layer = few_rows.FewRowsLinear(num_in, num_out, bias=False)
            for num_rows in ROWS:
                plain, ours = milliseconds(layer, torch.randn(num_rows, num_in), args.repeats)
                lines.append({"in": num_in, "out": num_out, "rows": num_rows, "torch": plain, "ours": ours})
                line = {**lines[-1], "ratio": round(ours / plain, 2)}
                sys.stdout.write(json.dumps(line) + "\n")
    for line in decoding(args.tokens):
        sys.stdout.write(json.dumps(line) + "\n")
        lines.append(line)
    save(args.json, lines)


if __name__ == "__main__":
    main()

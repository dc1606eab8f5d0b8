"""A linear layer times few rows on a CPU: torch's product against that of `rredcot_verl/cpu/few_rows.py`.

Owner: the core maintainers. Makes a table of docs/results/bench.md. Last run: 2026-11-29.

    PYTHONPATH=. python scripts/bench/bench_few_rows.py [--repeats 7 --threads 2]

Milliseconds, medians of `repeats` in turns after one of each that is not counted, for layers of a model of half a
billion parameters, of one of 135 million, and of smaller ones; ours also beyond the rows for which it is taken.
"""

import json
import statistics
import sys
import time

import torch
from plumbing import machine, parser, save
from torch import nn
from torch.nn.functional import linear

from rredcot_verl.cpu import few_rows

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


def main() -> None:
    """Read the arguments, run, and write the results."""
    args = parser(__doc__, repeats=7, threads=torch.get_num_threads()).parse_args()
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
    save(args.json, lines)


if __name__ == "__main__":
    main()

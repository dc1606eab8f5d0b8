"""Shows how a training run gets on: `python -m recipes.quickstart.progress RUN_DIR PID` until that process ends."""

import json
import os
import sys
import time
from pathlib import Path


def _describe(line: str) -> str:
    record = json.loads(line)
    data = record["data"]
    parts = [f"step {record['step']:3d}"]
    accuracy = [value for key, value in data.items() if key.startswith("val-core/") and "mean@" in key]
    if "critic/score/mean" in data:
        parts.append(f"training reward {data['critic/score/mean']:.2f}")
    if accuracy:
        parts.append(f"validation accuracy {accuracy[0]:.3f}")
    if "timing_s/step" in data:
        parts.append(f"{data['timing_s/step']:.1f} s")
    return "  ".join(parts)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main(run_dir: str, pid: int) -> None:
    """Print one line for every logged step, and a sign of life until the first."""
    name = Path(run_dir).name
    path, shown, started = Path(run_dir) / "metrics.jsonl", 0, time.time()
    while _alive(pid):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        complete = [line for line in lines if line.endswith("\n")]
        for line in complete[shown:]:
            sys.stdout.write(f"   {name:8s} " + _describe(line) + "\n")
        if not complete and int(time.time() - started) % 15 == 0:
            sys.stdout.write(f"   {name:8s} starting verl and Ray ... {time.time() - started:.0f} s\n")
        sys.stdout.flush()
        shown = len(complete)
        time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""Shows how a training run gets on: `python -m recipes.quickstart.progress RUN_DIR PID` until that process ends.

A line for every step, and between them what the run's log says it is doing, see `rredcot_verl.live`.
"""

import json
import os
import sys
import time
from pathlib import Path

LIVE = "rredcot: step "


def _describe(line: str) -> str:
    record = json.loads(line)
    data = record["data"]
    parts = [f"step {record['step']:3d}"]
    accuracy = [value for key, value in data.items() if key.startswith("val-core/") and "mean@" in key]
    if "critic/score/mean" in data:
        parts.append(f"training reward {round(data['critic/score/mean'], 2) + 0.0:.2f}")
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


def _doing(log: Path) -> str:
    """The newest live line of a log; "" before the first."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return next((line[line.index(LIVE) :] for line in reversed(lines) if LIVE in line), "")


def main(run_dir: str, pid: int) -> None:
    """Print one line for every logged step, what is done in between, and a sign of life until that is known."""
    name = Path(run_dir).name
    path, shown, started, said = Path(run_dir) / "metrics.jsonl", 0, time.time(), ""
    while _alive(pid):
        doing = _doing(Path(run_dir) / "train.log")
        if doing != said:
            sys.stdout.write(f"   {name:8s} {doing.removeprefix('rredcot: ')}\n")
            said = doing
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        complete = [line for line in lines if line.endswith("\n")]
        for line in complete[shown:]:
            sys.stdout.write(f"   {name:8s} " + _describe(line) + "\n")
        if not (complete or doing) and int(time.time() - started) % 15 == 0:
            sys.stdout.write(f"   {name:8s} starting verl and Ray ... {time.time() - started:.0f} s\n")
        sys.stdout.flush()
        shown = len(complete)
        time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

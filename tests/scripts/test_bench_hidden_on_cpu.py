"""The benchmark of hidden states at a tiny size: what it reports, not how long things take."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_variants_agree_and_are_reported(tmp_path):
    options = "--model tiny --lengths 48 80 --segments 4 --dim 8 --num-traces 2 --repeats 2".split()
    command = [
        sys.executable,
        str(ROOT / "scripts" / "bench_hidden.py"),
        *options,
        "--json",
        str(tmp_path / "out.json"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["options"]["dim"] == 8
    assert [each["length"] for each in report["results"]] == [48, 80]
    for each in report["results"]:
        assert each["same_log_probs"] and each["largest_difference_of_states"] < 1e-4
        # Four states of eight floats of four bytes.
        assert each["bytes_a_trace"] == 4 * 8 * 4
        # The hook is part of what it is compared with.
        assert 0 < each["hook_to_plain"][0] < each["hidden_to_plain"][2]

"""The hub path: the real `datasets.load_dataset` against a hub on this machine."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from tests import PATIENCE_S
from tests.data.fake_hub import serve

ROOT = Path(__file__).parents[2]

README = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
---
"""


def _parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pd.DataFrame(rows).to_parquet(buffer)
    return buffer.getvalue()


def _gsm8k(names: list[str]) -> list[dict]:
    return [
        {
            "question": f"{name} has {k + 3} apples and buys {k + 5} more in the shop. How many apples has {name} now?",
            "answer": f"{name} has {k + 3} + {k + 5} = <<{k + 3}+{k + 5}={2 * k + 8}>>{2 * k + 8}.\n#### {2 * k + 8}",
        }
        for k, name in enumerate(names)
    ]


GSM8K = {
    "README.md": README.encode(),
    "main/train-00000-of-00001.parquet": _parquet(_gsm8k(["Ann", "Bob", "Cem", "Dee", "Eli"])),
    "main/test-00000-of-00001.parquet": _parquet(_gsm8k(["Ann"])),
    "socratic/train-00000-of-00001.parquet": _parquet(_gsm8k(["Wrong"])),
}
APPS_ROW = {
    "id": 7,
    "question": "Read two integers, one a line, and print their sum.",
    "solutions": json.dumps(["print(int(input()) + int(input()))"]),
    "input_output": json.dumps({"inputs": ["1\n2\n", "5\n-5\n"], "outputs": ["3\n", "0\n"]}),
    "difficulty": "introductory",
    "url": "",
    "starter_code": "",
}
# A loading script stands beside the files, as in the real repository.
APPS = {"apps.py": b"raise SystemExit('never run')", "train.jsonl": json.dumps(APPS_ROW).encode() + b"\n"}


@pytest.fixture(scope="module")
def hub():
    with serve({"openai/gsm8k": GSM8K, "codeparrot/apps": APPS}) as running:
        yield running


def _prepare(hub, folder: Path, task: str, *arguments: str) -> subprocess.CompletedProcess:
    # datasets reads these variables when it is imported.
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, str(ROOT / f"scripts/prepare_{task}.py"), "--out", str(folder / "out"), *arguments],
        env=environment | {"no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_a_known_name_is_loaded_by_its_hub_id_configuration_and_split(hub, tmp_path):
    hub.requests.clear()
    done = _prepare(hub, tmp_path, "math", "--source", "gsm8k", "--test", "gsm8k:test")
    assert done.returncode == 0, done.stderr
    assert any("/datasets/openai/gsm8k/resolve/" in request for request in hub.requests)
    assert not any("socratic/train" in request and "GET" in request for request in hub.requests)
    train = pq.read_table(tmp_path / "out/train.parquet").to_pylist()
    # Ann's problem is in the test split.
    assert [row["reward_model"]["ground_truth"] for row in train] == ["10", "12", "14", "16"]
    assert train[0]["data_source"] == "openai/gsm8k"
    assert "<<" not in train[0]["extra_info"]["solution"]
    assert len(pq.read_table(tmp_path / "out/test_gsm8k_test.parquet")) == 1
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    given = {key: manifest["inputs"][0][key] for key in ("used_for", "hub_id", "config", "split", "num_rows")}
    assert given == {
        "used_for": "test_gsm8k_test",
        "hub_id": "openai/gsm8k",
        "config": "main",
        "split": "test",
        "num_rows": 1,
    }


def test_files_of_a_repository_with_a_loading_script(hub, tmp_path):
    done = _prepare(hub, tmp_path, "code", "--source", "apps", "--no-verify")
    assert done.returncode == 0, done.stderr
    (row,) = pq.read_table(tmp_path / "out/train.parquet").to_pylist()
    tests = json.loads(row["reward_model"]["ground_truth"])
    assert tests == {"kind": "stdin", "inputs": ["1\n2\n", "5\n-5\n"], "outputs": ["3\n", "0\n"]}
    assert row["extra_info"]["solutions"] == ["print(int(input()) + int(input()))"]


def test_a_limit_streams_the_start_of_any_hub_id(hub, tmp_path):
    done = _prepare(
        hub, tmp_path, "math", "--source", "openai/gsm8k:test", "--config", "main", "--limit", "3", "--no-verify"
    )
    assert done.returncode == 0, done.stderr
    assert len(pq.read_table(tmp_path / "out/train.parquet")) == 1


def test_what_the_hub_does_not_have_is_named(hub, tmp_path):
    done = _prepare(hub, tmp_path, "math", "--source", "nobody/nothing")
    assert done.returncode == 2
    assert "hub data set 'nobody/nothing'" in done.stderr and "--as" in done.stderr
    assert "Traceback" not in done.stderr

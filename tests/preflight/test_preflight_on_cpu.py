"""`python -m rredcot_verl.preflight`: composes as main_ppo does, finds what is wrong, and starts nothing."""

import importlib.util
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import ray
from omegaconf import OmegaConf

from rredcot_verl.preflight.composition import compose_as_main_ppo
from rredcot_verl.preflight.file_checks import sample_references
from rredcot_verl.preflight.inspection import inspect, page
from tests.preflight.material import make_code_data, make_math_data, make_model_folder
from tests.recipes.launcher import REPOSITORY

RUN_4B = REPOSITORY / "recipes/math/run_qwen3_4b_fsdp.sh"
RUN_8B = REPOSITORY / "recipes/code/run_qwen3_8b_megatron.sh"

OPENS = "{% for m in messages %}{{ m.content }}{% endfor %}<think>"
"""A chat template that leaves a thinking block open."""


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    return {
        "model": make_model_folder(folder / "model"),
        "math": make_math_data(folder / "math"),
        "code": make_code_data(folder / "code"),
    }


def _arguments(material, *overrides: str, task: str = "math", config: str = "qwen3_4b_fsdp") -> list[str]:
    files = [f"data.{split}_files={material[task]}/{split}.parquet" for split in ("train", "val")]
    model = f"actor_rollout_ref.model.path={material['model']}"
    return ["--config-path", f"pkg://recipes.{task}", "--config-name", config, model, *files, *overrides]


def test_a_good_run_is_explained_and_nothing_is_started(material):
    found = inspect(_arguments(material))
    text = page(found)
    assert found.findings.faults == found.findings.warnings == []
    assert found.choice is not None and found.choice.label == "actor, shared prefix"
    for words in (
        "25,000 response",
        "actor, shared prefix: the training engine can share prefixes",
        "rredcot_verl.rewards.math:compute_score",
        "128 prompts x 8 responses",
        "(160 rows)",
        "no GPU was measured",
        "preflight: ok, nothing was started",
    ):
        assert words in " ".join(text.split()), words
    assert not ray.is_initialized()


def test_without_rredcot_there_are_no_probes(material):
    found = inspect(_arguments(material, "credit=grpo"))
    assert found.findings.faults == [] and found.settings is None
    text = " ".join(page(found).split())
    assert "verl's own" in text and "probes" not in text and "in the largest pass that makes no gradient" in text


def test_peers_are_explained_with_what_they_cost(material):
    found = inspect(_arguments(material, "algorithm.adv_estimator=vineppo", "algorithm.rredcot.readout.dim=8"))
    text = " ".join(page(found).split())
    assert found.findings.faults == []
    assert "Monte Carlo, 9 continuations from every boundary" in text and "continuations, at most" in text
    assert "probes, at most" not in text
    assert (
        "algorithm.rredcot.readout: algorithm.adv_estimator=vineppo with credit.form=reweight does not read it" in text
    )


def test_references_are_sampled_from_json_lines_too(material, tmp_path):
    config = inspect(_arguments(material)).config
    from_parquet = sample_references(config, "reward_model.ground_truth")
    rows = pd.read_parquet(config.data.train_files).to_json(orient="records", lines=True)
    (tmp_path / "train.jsonl").write_text(rows)
    config.data.train_files = str(tmp_path / "train.jsonl")
    assert sample_references(config, "reward_model.ground_truth") == from_parquet
    assert len(from_parquet) == 160 and from_parquet[0] == "1"
    config.data.train_files = "hdfs://host/train.parquet"
    assert sample_references(config, "reward_model.ground_truth") == []


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_megatron_shares_prefixes_or_says_what_separate_sequences_cost(material, monkeypatch, mode):
    found_here = importlib.util.find_spec
    absent = ("megatron",)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name not in absent and found_here(name, *rest) or None
    )
    config = {"task": "code", "config": "qwen3_8b_megatron"}
    found = inspect(_arguments(material, f"mode={mode}", **config))
    assert found.findings.faults == [] and found.choice.label == "actor, shared prefix"
    assert any("megatron is not installed" in note.message for note in found.findings.unchecked)
    assert found.findings.warnings == []
    assert "a pass of their own: 1 more forward pass over every trace" in page(found)
    changes = ("actor_rollout_ref.actor.megatron.context_parallel_size=2", "algorithm.rredcot.self_value.engine=actor")
    (fault,) = inspect(_arguments(material, f"mode={mode}", *changes, **config)).findings.faults
    assert "every probe would be a sequence of its own" in fault.message and "share prefixes (FSDP" in fault.message
    fewer = ("algorithm.rredcot.segmentation.num_segments=1", "algorithm.rredcot.self_value.max_closing_tokens=1")
    found = inspect(_arguments(material, f"mode={mode}", *changes, *fewer, **config))
    assert found.choice.label == "actor, separate sequences"
    (warning,) = [note.message for note in found.findings.warnings if "sequences of their own" in note.message]
    assert "the training engine cannot share prefixes: actor_rollout_ref.actor.megatron.context_parallel" in warning


def test_all_faults_are_told_at_once(material, monkeypatch):
    monkeypatch.delenv("VERL_LOGGING_LEVEL", raising=False)
    found = inspect(
        _arguments(
            material,
            "mode=separate_async",
            "trainer.n_gpus_per_node=3",
            "actor_rollout_ref.rollout.nnodes=0",
            "actor_rollout_ref.rollout.checkpoint_engine.backend=naive",
            "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
            "actor_rollout_ref.hybrid_engine=false",
            "actor_rollout_ref.model.lora_rank=8",
            "data.train_batch_size=100",
            "data.max_response_length=42000",
            "data.val_files=/nowhere/val.parquet",
            "algorithm.rredcot.credit.beta=-1",
            "algorithm.rredcot.segmentation.num_segments=many",
            "actor_rollout_ref.actor.loss_agg_mode=median",
            "reward.custom_reward_function.name=no_such",
        )
    )
    text = " ".join(page(found).split())
    for words in (
        "trainer.nnodes * trainer.n_gpus_per_node=3 is no multiple",
        "data-parallel ranks",
        "actor_rollout_ref.rollout.nnodes=0",
        "backend=naive",
        "hybrid_engine=False",
        "lora.merge=False",
        "data.train_batch_size=100",
        "43024 is longer than the model's 40960",
        "ppo_max_token_len_per_gpu=27648",
        "max_model_len=27048",
        "algorithm.rredcot.credit.beta=-1",
        "num_segments='many'",
        "median",
        "no_such",
        "preflight: not ready",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.val_files=/nowhere/val.parquet"], "/nowhere/val.parquet"),
        (["actor_rollout_ref.model.path=/nowhere/model"], "no such folder"),
        (["+actor_rollout_ref.model.no_such_key=1"], "no_such_key"),
        (["+actor_rollout_ref.rollout.no_such_key=1"], "no_such_key"),
        (["actor_rollout_ref.rollout.name=???"], "actor_rollout_ref.rollout.name is not set"),
        (["trainer.default_local_dir=${no.such.key}"], "no.such.key"),
        (["trainer.n_gpus_per_node=3"], "256 responses are no multiple of the 3 data-parallel ranks"),
        (
            ["actor_rollout_ref.actor.ulysses_sequence_parallel_size=3"],
            "no multiple of ulysses_sequence_parallel_size=3",
        ),
        (["data.train_batch_size=16"], "not one update a step"),
        (["data.max_prompt_length=many"], "data.max_prompt_length='many': expected a positive whole number"),
        (["actor_rollout_ref.rollout.tensor_model_parallel_size=0"], "tensor_model_parallel_size=0"),
        (["actor_rollout_ref.actor.optim.lr=small"], "optim.lr='small': expected a number"),
        (["data.max_prompt_length=8"], "0 training rows are left"),
        (["algorithm.use_kl_in_reward=true"], "use_kl_in_reward"),
        (
            ["actor_rollout_ref.rollout.name=rredcot_cpu", "actor_rollout_ref.rollout.dtype=float16"],
            "rollout.dtype of float32, bfloat16, got float16",
        ),
        (["actor_rollout_ref.rollout.max_model_len=50000"], "max_model_len=50000 is longer than the model's 40960"),
        (["algorithm.adv_estimator=rredcott"], "adv_estimator=rredcott is not registered; did you mean rredcot?"),
        (["algorithm.adv_estimator=GRPO"], "did you mean grpo?"),
        (["algorithm.adv_estimator=mine"], "known are attention_attribution, gae, "),
        (["custom_reward_function.path=mine.py"], "custom_reward_function.path is not read by verl's V1 trainer"),
        (
            ["reward_model.rollout.name=vllm"],
            "reward_model.rollout.name is not read by verl's V1 trainer; set it under",
        ),
        ([f"actor_rollout_ref.model.custom_chat_template='{OPENS}'"], "prompt_opens_thinking=true"),
        (["++reward.custom_reward_function.reward_kwargs.prompt_opens_thinking=true"], "no prompt ends with <think>"),
    ],
)
def test_a_fault_is_named(material, overrides, words):
    found = inspect(_arguments(material, *overrides))
    assert any(words in str(fault) for fault in found.findings.faults), found.findings.faults
    assert "not ready" in page(found)


def test_a_chat_template_of_the_users_own(material):
    """It is written into the tokenizer, of which a model's config read for its sizes has none."""
    opens = f"actor_rollout_ref.model.custom_chat_template='{OPENS}'"
    key = "++reward.custom_reward_function.reward_kwargs.prompt_opens_thinking=true"
    found = inspect(_arguments(material, opens, key))
    assert found.findings.faults == [] and found.choice.label == "actor, shared prefix"


def test_an_estimator_with_nothing_to_compare_is_warned_about(material):
    arguments = ("credit=grpo", "actor_rollout_ref.rollout.n=1")
    assert any(
        "rollout.n=1 with algorithm.adv_estimator=grpo" in str(w)
        for w in inspect(_arguments(material, *arguments)).findings.warnings
    )


def test_ulysses_shares_prefixes_and_a_pass_over_its_ranks(material):
    keys = ("actor.ppo_max_token_len_per_gpu", "rollout.log_prob_max_token_len_per_gpu")
    small = [f"actor_rollout_ref.{key}=14000" for key in keys]
    assert len(inspect(_arguments(material, *small)).findings.faults) == 2
    split = "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2"
    found = inspect(_arguments(material, *small, split))
    assert found.findings.faults == [] and found.choice.label == "actor, shared prefix"


def test_a_model_folder_without_a_tokenizer_is_told(material, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    found = inspect(_arguments(material, f"actor_rollout_ref.model.path={tmp_path}"))
    assert any("the folder has no tokenizer_config.json" in fault.message for fault in found.findings.faults)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config-name", "no_such_config"], "no_such_config"),
        (["--config-path", "no/such/folder"], "no such folder"),
        (["--config-path", "pkg://recipes.no_such"], "no_such"),
        (["--multirun"], "--multirun"),
        (["data.no_such_key=1"], "no_such_key"),
        (["data.seed"], "data.seed"),
    ],
)
def test_what_does_not_compose_is_told_in_hydras_words(arguments, words):
    with pytest.raises(ValueError) as raised:
        compose_as_main_ppo(arguments)
    assert words in str(raised.value)


def test_it_composes_what_main_ppo_composes(material):
    arguments = _arguments(material, "mode=separate_async", "~trainer.v1.sync", "++data.seed=3")
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *arguments, "--cfg", "job"],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert OmegaConf.create(done.stdout[done.stdout.index("model_engine:") :]) == compose_as_main_ppo(arguments)


def _dry_run(script, material, task: str, **environment: str) -> subprocess.CompletedProcess[str]:
    toggles = {"DRY_RUN": "1", "PYTHON": sys.executable, "COLUMNS": "110", "MODEL_PATH": str(material["model"])}
    toggles |= {"DATA_DIR": str(material[task])} | environment
    return subprocess.run([str(script)], env={**os.environ, **toggles}, capture_output=True, text=True, check=False)


def test_dry_run_of_a_script_ends_well(material, tmp_path):
    done = _dry_run(RUN_4B, material, "math", OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Faults" not in done.stdout and done.stdout.rstrip().endswith("preflight: ok, nothing was started")
    assert max(map(len, done.stdout.splitlines())) <= 110
    # Not even the folder of the run is made.
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_a_script_ends_badly_with_every_fault(material):
    done = _dry_run(RUN_8B, material, "code", DATA_DIR="/nowhere", MODEL_PATH="/nowhere", GPU_MEMORY_GIB="80")
    assert done.returncode == 1
    assert done.stdout.count("/nowhere/train.parquet") >= 1 and "no such folder" in done.stdout
    assert "/nowhere/val.parquet" in done.stdout and "Faults (3)" in done.stdout

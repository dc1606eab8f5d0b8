"""The estimate of passes for log-probabilities and probes, against what verl's engine allocates in them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from rredcot_verl.passes.probe_pack import ProbePack
from rredcot_verl.passes.shared_attention import shared_prefix
from rredcot_verl.preflight.composition import compose_as_main_ppo
from rredcot_verl.preflight.log_prob_memory import largest_passes, log_prob_memory
from rredcot_verl.preflight.memory import training_memory
from rredcot_verl.preflight.model_size import read_facts
from rredcot_verl.preflight.pass_memory import LogProbPass, pass_bytes
from tests import PATIENCE_S
from tests.peak_memory import peak_bytes
from tests.preflight.material import make_model_folder
from tests.preflight.peaks import CHUNK_SIZE

REPOSITORY = Path(__file__).parents[2]


def config_of(model: Path, *arguments: str):
    recipe = ["--config-path=pkg://recipes.math", "--config-name=qwen3_4b_fsdp"]
    return compose_as_main_ppo([*recipe, f"actor_rollout_ref.model.path={model}", *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peaks")
    environment = os.environ | {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.preflight.peaks", str(folder)]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, text=True, capture_output=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return folder


def test_the_estimate_is_within_a_fifth_of_what_is_allocated(folder):
    """Where logits are the most of it, as in real models; gathered weights are gone by then."""
    config = config_of(folder / "model")
    # The engine of the tests compiles nothing.
    engine = config.actor_rollout_ref.actor.fsdp_config
    engine.use_torch_compile, engine.entropy_from_logits_chunk_size = False, CHUNK_SIZE
    facts = read_facts(config.actor_rollout_ref.model)
    measured = json.loads((folder / "peaks.json").read_text())
    assert len(measured) == 16
    for found in measured:
        engine.entropy_from_logits_with_chunking = "chunked" in found["name"]
        config.actor_rollout_ref.model.use_fused_kernels = "kernels" in found["name"]
        config.actor_rollout_ref.rollout.temperature = found["temperature"]
        estimate = max(pass_bytes(config, facts, LogProbPass(**found["pass"])))
        assert estimate == pytest.approx(found["bytes"], rel=0.2), found


@pytest.mark.parametrize("sizes", [(256, 768), (256, 1536), (512, 1536)])
def test_activations_are_within_a_fifth_of_what_is_allocated(tmp_path, sizes):
    hidden_size, intermediate_size = sizes
    shape = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "head_dim": hidden_size // 4}
    config = config_of(make_model_folder(tmp_path, vocab_size=512, **shape))
    facts, model_config = read_facts(config.actor_rollout_ref.model), AutoConfig.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16).eval()
    pack = ProbePack.build([800], [[]])

    @torch.no_grad()
    def call():
        with shared_prefix(model.config, pack):
            ids, one = torch.zeros(1, 800, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
            model(input_ids=ids, position_ids=pack.positions[None], use_cache=False, logits_to_keep=one)

    activations, _ = pass_bytes(config, facts, LogProbPass(0, 800))
    assert activations == pytest.approx(peak_bytes(call), rel=0.2)


@pytest.fixture
def fsdp(tmp_path):
    return config_of(make_model_folder(tmp_path), "trainer.nnodes=1")


def test_the_largest_passes(fsdp):
    budget, longest = 36864, 26024
    rollout = fsdp.actor_rollout_ref.rollout
    assert rollout.log_prob_max_token_len_per_gpu == budget
    assert fsdp.data.max_prompt_length + fsdp.data.max_response_length == longest
    assert largest_passes(fsdp, 0, False) == [LogProbPass(budget)]
    # What fits keeps to the budget, of which probes have their share.
    (fused,) = largest_passes(fsdp, 3000, True)
    assert fused.num_tokens == budget and fused.num_read == fused.num_probe_tokens == round(budget * 3000 / 29024)
    own, alone = largest_passes(fsdp, 3000, False)
    assert own == LogProbPass(budget) and (alone.num_own, alone.num_tokens) == (0, budget)
    # A trace that fills the budget has a quarter of it for its probes, in several passes if need be.
    rollout.log_prob_max_token_len_per_gpu = longest
    (fused,) = largest_passes(fsdp, 10**6, True)
    assert fused.num_tokens == longest + longest // 4


def test_the_largest_passes_of_split_sequences_are_shares_of_whole_ones(fsdp):
    """verl gives each rank its share of a sequence, and a pass the budget of all of them."""
    fsdp.actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size = 4
    fsdp.actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu = 7000
    assert largest_passes(fsdp, 0, False) == [LogProbPass(7000)]
    (fused,) = largest_passes(fsdp, 10**6, True)
    assert fused.num_tokens == pytest.approx(7000 + (26024 - 28000 + 7000) / 4, abs=2)
    assert fused.num_own / fused.num_tokens == pytest.approx(26024 / (26024 + 10**6), rel=0.01)


def test_the_largest_passes_of_so_many_rows(fsdp):
    rollout = fsdp.actor_rollout_ref.rollout
    rollout.log_prob_use_dynamic_bsz, rollout.log_prob_micro_batch_size_per_gpu = False, 3
    assert largest_passes(fsdp, 0, False) == [LogProbPass(3 * 26024)]
    assert largest_passes(fsdp, 1000, True) == [LogProbPass(3 * 26024, 0, 3000, 3000)]


def test_verls_own_pass_does_not_count_where_verl_makes_none(fsdp):
    OmegaConf.update(fsdp, "algorithm.rollout_correction.bypass_mode", True, force_add=True)
    facts = read_facts(fsdp.actor_rollout_ref.model)
    (alone,) = largest_passes(fsdp, 3000, False)
    assert alone.num_own == 0 and alone.num_read > 0
    assert log_prob_memory(fsdp, facts, training_memory(fsdp, facts), 0, False) is None


def test_the_figure_is_that_of_the_larger_pass(fsdp):
    facts = read_facts(fsdp.actor_rollout_ref.model)
    training = training_memory(fsdp, facts)
    states = training.weights + training.working + training.optimizer
    plain = log_prob_memory(fsdp, facts, training, 0, False)
    assert plain.states == pytest.approx(states) and plain.total == states + max(plain.activations, plain.logits)
    apart, fused = (log_prob_memory(fsdp, facts, training, 20000, fuse) for fuse in (False, True))
    assert apart.logits == plain.logits < fused.logits
    fsdp.actor_rollout_ref.actor.fsdp_config.optimizer_offload = True
    assert log_prob_memory(fsdp, facts, training, 0, False).states == pytest.approx(training.weights + training.working)

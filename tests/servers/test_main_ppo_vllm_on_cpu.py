"""Training through verl's own entry point with vLLM as the rollout server, which reads the probes.

Needs the extra `vllm-cpu`; `scripts/test_vllm.sh` makes an environment and runs it.
"""

import pytest

from rredcot_verl.servers.vllm_forced import PROCESSOR
from tests.runs import main_ppo

pytest.importorskip("vllm")

pytestmark = pytest.mark.run

ROLLOUT = "actor_rollout_ref.rollout"
SETTINGS = (
    "algorithm.adv_estimator=rredcot",
    "+algorithm.rredcot.self_value.engine=rollout",
    # The tiny model writes 16 random letters: only their number ends a segment.
    "+algorithm.rredcot.segmentation.method=fixed",
    "+algorithm.rredcot.segmentation.min_tokens=2",
    # Far too high to learn with, high enough that a step moves the policy well away from the initial one.
    "actor_rollout_ref.actor.optim.lr=0.05",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
    f"{ROLLOUT}.name=vllm",
    f"{ROLLOUT}.temperature=0.8",
    f"{ROLLOUT}.max_model_len=128",
    f"{ROLLOUT}.max_num_batched_tokens=512",
    f"{ROLLOUT}.enforce_eager=true",
    # Of the machine's memory.
    f"{ROLLOUT}.gpu_memory_utilization=0.1",
    # Nothing to sleep on: there is no device memory to give back.
    f"{ROLLOUT}.free_cache_engine=false",
    f"+{ROLLOUT}.enable_sleep_mode=false",
    f"+{ROLLOUT}.engine_kwargs.vllm.block_size=16",
)
ENVIRONMENT = {
    "VERL_USE_EXTERNAL_MODULES": "tests.servers.vllm_cpu_plugin",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.mark.parametrize(
    "overrides",
    [(), (f"+{ROLLOUT}.engine_kwargs.vllm.logits_processors=['{PROCESSOR}']",)],
    ids=["tree", "forced"],
)
def test_training_with_vllm(tmp_path, ray_folder, overrides):
    from tests.servers.vllm_server import make_model

    model = tmp_path / "vllm_model"
    make_model(model)
    run = main_ppo(
        tmp_path,
        ray_folder,
        *SETTINGS,
        f"actor_rollout_ref.model.path={model}",
        *overrides,
        environment=ENVIRONMENT,
    )
    assert run.returncode == 0, run.output[-8000:]
    assert "ProbingVLLMHttpServer" in run.output
    assert len(run.steps) == 2
    # Random letters may give a step whose groups are all uniform.
    assert sum(step["rredcot/probes/sum"] for step in run.steps) > 0
    assert sum(step["rredcot/rows_scored/mean"] for step in run.steps) > 0
    for step in run.steps:
        # The second step's rollouts and probes are those of updated weights.
        assert step["training/rollout_actor_probs_pearson_corr"] > 0.999
        assert step["rredcot/return_error/max"] < 1e-6
        assert step["actor/grad_norm"] > 0

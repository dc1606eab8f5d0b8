"""The same responses, scored by the training engine in every way it has and by the rollout server: the same values."""

import importlib.util
import json

import pytest

from tests.runs import main_ppo

VALUE = "+algorithm.rredcot.self_value"
# Greedy rollouts in groups of one can be repeated; nobody else is needed for a probe of the ground truth.
REPEATABLE = (
    "actor_rollout_ref.rollout.n=1",
    "actor_rollout_ref.rollout.top_k=1",
    "actor_rollout_ref.rollout.temperature=0.7",
    "actor_rollout_ref.rollout.max_model_len=128",
    "trainer.total_training_steps=1",
)
RREDCOT = (
    "algorithm.adv_estimator=rredcot",
    "+algorithm.rredcot.segmentation.method=fixed",
    "+algorithm.rredcot.segmentation.min_tokens=2",
    f"{VALUE}.probe_uniform_groups=true",
    # What the engines give, and no regression on it.
    f"{VALUE}.calibration=none",
    "+algorithm.rredcot.credit.form=reweight",
    # Every closing token, as the others sum them.
    f"{VALUE}.max_closing_tokens=64",
)
TWO_STEPS = ("trainer.total_training_steps=2",)
TWO_RANKS = ("trainer.n_gpus_per_node=2",)
ENGINES = {
    "actor": (f"{VALUE}.engine=actor",),
    "apart": (f"{VALUE}.engine=actor", f"{VALUE}.fuse=false"),
    "separate sequences": (f"{VALUE}.engine=actor", f"{VALUE}.share_prefix=false", *TWO_RANKS),
    "rollout": (f"{VALUE}.engine=rollout",),
    # No pass of verl's that the probes could join.
    "bypass": (f"{VALUE}.engine=auto", "++algorithm.rollout_correction.bypass_mode=true", *TWO_RANKS),
}
# Megatron's layers, schedule and optimiser (not the distributed one) on CPU: see `tests.passes.megatron_cpu`.
MEGATRON = (
    "model_engine=megatron",
    *(f"~actor_rollout_ref.{role}.{key}" for role in ("actor", "ref") for key in ("fsdp_config", "use_torch_compile")),
    *(f"actor_rollout_ref.{role}.strategy=megatron" for role in ("actor", "ref")),
    "actor_rollout_ref.actor.megatron.use_distributed_optimizer=false",
    "actor_rollout_ref.actor.megatron.vanilla_mbridge=true",
    # Clipping looks for CUDA's tensors.
    "actor_rollout_ref.actor.optim.clip_grad=0",
    "actor_rollout_ref.model.use_remove_padding=true",
    "actor_rollout_ref.model.external_lib=tests.trainer.megatron_worker",
)
if importlib.util.find_spec("megatron") is not None:
    ENGINES["megatron"] = (f"{VALUE}.engine=auto", *MEGATRON, *TWO_RANKS)

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, ray_folder_of_module):
    """Metrics of the step, and the credited traces by prompt and response."""
    results = {}
    for number, (name, settings) in enumerate(ENGINES.items()):
        folder = tmp_path_factory.mktemp("run")
        traces = f"+algorithm.rredcot.traces.dir={folder / 'traces'}"
        run = main_ppo(folder, f"{ray_folder_of_module}/{number}", *REPEATABLE, *RREDCOT, *settings, traces)
        assert run.returncode == 0, run.output[-8000:]
        lines = [json.loads(line) for line in (folder / "traces" / "1.jsonl").read_text().splitlines()]
        results[name] = run, {(line["prompt"], line["response"]): line for line in lines}
    return results


def values(line) -> list[float]:
    return [line["start_value"], *(segment["value"] for segment in line["segments"])]


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "actor"])
def test_the_self_values_are_the_same(runs, name):
    (_, expected), (_, found) = runs["actor"], runs[name]
    assert len(expected) == 4 and found.keys() == expected.keys()
    for key, line in expected.items():
        assert line["status"] == found[key]["status"] == "scored"
        # Tiny as they are: an answer's probability under a random model.
        assert values(found[key]) == pytest.approx(values(line), rel=1e-3, abs=1e-15)
        assert all(0 < value < 1 for value in values(line)[:-1])
    assert sum(len(line["segments"]) > 2 for line in expected.values()) >= 2


def test_who_scored_is_told(runs):
    labels = {
        "separate sequences": "actor, separate sequences",
        "rollout": "rollout",
    }
    for name, (run, lines) in runs.items():
        label = labels.get(name, "actor, shared prefix")
        assert {line["engine"] for line in lines.values()} == {label}
        assert run.output.count(f"probes are read by {label}") == 1
        assert run.steps[0]["rredcot/scored_by_actor/mean"] == float(label != "rollout")
        assert run.output.count("every probe is a sequence of its own") == (name == "separate sequences")


@pytest.fixture(scope="module")
def grpo(tmp_path_factory, ray_folder_of_module):
    """The same run without credit, and one step more."""
    run = main_ppo(tmp_path_factory.mktemp("grpo"), f"{ray_folder_of_module}/g", *REPEATABLE, *TWO_STEPS)
    assert run.returncode == 0, run.output[-8000:]
    return run


def test_with_another_estimator_the_plugin_changes_nothing(grpo, tmp_path, ray_folder):
    """Up to float32 rounding: which requests share a batch of the server depends on when they arrive."""
    without = {"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_USE_EXTERNAL_MODULES": "tests.cpu.backend_plugin"}
    alone = main_ppo(tmp_path, ray_folder, *REPEATABLE, *TWO_STEPS, environment=without)
    assert alone.returncode == 0, alone.output[-8000:]
    machine = ("timing", "perf/", "throughput")
    ours, theirs = (
        [{key: value for key, value in step.items() if not any(word in key for word in machine)} for step in run.steps]
        for run in (grpo, alone)
    )
    assert len(theirs) == 2 and any(step["actor/grad_norm"] > 0 for step in theirs)
    for step, same in zip(ours, theirs, strict=True):
        assert same["training/rollout_actor_probs_pearson_corr"] > 0.999
        # Differences of log-probabilities, as verl reports them, are rounding and nothing else.
        assert step == pytest.approx(same, rel=1e-4, abs=1e-4)


def test_the_batchs_own_fields_are_those_of_grpo(runs, grpo):
    """What verl makes of old log-probabilities and entropies, with probes in their pass and apart from it.

    Up to rounding: two runs' requests meet in other batches of the server.
    """
    names = [
        name
        for name in grpo.steps[0]
        if name == "actor/entropy" or name.startswith(("training/rollout_", "rollout_corr/", "response_length"))
    ]
    assert len(names) > 5
    for engine in {"actor", "apart", "megatron"} & runs.keys():
        step = runs[engine][0].steps[0]
        for name in names:
            assert step[name] == pytest.approx(grpo.steps[0][name], rel=1e-4, abs=2e-5), (engine, name)


def test_a_reference_model_inside_an_adapted_actor_is_not_probed(tmp_path, ray_folder):
    """verl's reference pass is the actor's own pass without its adapter; nothing of the one before sticks to it."""
    run = main_ppo(
        tmp_path,
        ray_folder,
        *RREDCOT,
        "actor_rollout_ref.model.lora_rank=4",
        "++actor_rollout_ref.model.lora.merge=true",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.actor.optim.lr=0.01",
        "actor_rollout_ref.rollout.temperature=0.8",
    )
    assert run.returncode == 0, run.output[-8000:]
    first, second = run.steps
    assert first["rredcot/rows_scored/mean"] > 0 and first["rredcot/scored_by_actor/mean"] == 1
    assert first["actor/kl_loss"] == pytest.approx(0.0, abs=1e-6)
    assert second["actor/kl_loss"] > 1e-6
    for step in run.steps:
        assert step["training/rollout_actor_probs_pearson_corr"] > 0.999

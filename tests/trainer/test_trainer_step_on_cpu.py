"""A step of verl's trainer with ours around it: from records to advantages, and what is reported of them."""

import dataclasses
import json

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from verl.trainer.ppo.v1 import PPOTrainer, trainer_base
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
from verl.trainer.ppo.v1.utils import MetricsAggregator

from rredcot_verl.config.schema import parse
from rredcot_verl.passes.protocol import MODEL_TYPE
from rredcot_verl.sources.engines import EngineChoice
from rredcot_verl.sources.record import KEY, Record, Status
from rredcot_verl.trainer import trainer as trainer_module
from rredcot_verl.trainer.trainer import RREDCoTTrainerMixin, checkpoint_folder
from tests.passes.architectures import build_model
from tests.probes.tiny_tokenizers import byte_level
from tests.sources.world import TEXT, World
from tests.trainer.steps import NotingWorkers, make_step, make_trainer, pass_results, verls_old_log_prob

ACTOR = {"engine": "actor"}
READOUT = {"dim": 2}
RUNS = {
    "rredcot": ("rredcot", {"self_value": ACTOR}),
    "by the server": ("rredcot", {"self_value": {"engine": "rollout"}}),
    "sequences": ("rredcot", {"self_value": ACTOR | {"share_prefix": False}}),
    "calibrated": ("rredcot", {"self_value": ACTOR | {"calibration": "logistic"}, "readout": READOUT}),
    "both": ("rredcot", {"self_value": ACTOR | {"calibration": "logistic"}, "readout": READOUT | {"use_hidden": True}}),
    "hidden": ("rredcot", {"self_value": {"form": "hidden"}, "readout": READOUT}),
    "vps": ("vps", {"self_value": ACTOR}),
    "mig": ("mig", {"self_value": ACTOR}),
    "attention_attribution": ("attention_attribution", {}),
    "gradient_attribution": ("gradient_attribution", {}),
    "leave_one_out": ("leave_one_out", {}),
}


@pytest.fixture(autouse=True)
def base(monkeypatch):
    verls_old_log_prob(monkeypatch)


def make_run(monkeypatch, run="rredcot", estimator=None, **step):
    name, block = RUNS[run]
    block = block | {part: step.pop(part) for part in ("credit", "traces") if part in step}
    world, _ = make_step(monkeypatch, name, **step, **block)
    world.queue.stand_in(monkeypatch, trainer_base)
    workers = NotingWorkers(results=pass_results(world, READOUT["dim"]))
    return world, make_trainer(estimator=estimator or name, workers=workers, **block)


def advantages_of(
    world, trainer, between=lambda batch: batch
) -> tuple[list[list[float]], dict[str, float], KVBatchMeta]:
    metrics: dict[str, float] = {}
    batch = between(trainer._compute_old_log_prob(world.batch, metrics))
    left = trainer._compute_advantage(batch, metrics)
    return world.column("advantages"), metrics, left


@pytest.mark.parametrize("run", RUNS)
def test_from_records_to_advantages(monkeypatch, run):
    world, trainer = make_run(monkeypatch, run)
    advantages, metrics, left = advantages_of(world, trainer)
    # Redistributed, and the return is kept.
    rewards = world.column("rm_scores")
    assert [sum(own) for own in rewards] == pytest.approx([1.0, 0.0, 0.0], abs=1e-5)
    assert metrics["rredcot/return_error/max"] < 1e-5
    assert metrics["rredcot/rows_scored/mean"] == 1.0 and metrics["rredcot/segments_per_response/mean"] > 1
    # Two rows are nothing to regress on: the values stay the other rollout's reward.
    told = run not in ("calibrated", "both", "hidden")
    assert (sum(reward != 0 for reward in rewards[0]) > 1) == told
    # Weights of mean 1: the mean over tokens is GRPO's advantage, and tokens differ.
    grpo, _ = compute_grpo_outcome_advantage(torch.tensor([[1.0], [0.0]]), torch.ones(2, 1), ["a", "a"])
    for own, expected in zip(advantages, grpo[:, 0].tolist(), strict=False):
        assert sum(own) / len(own) == pytest.approx(expected, abs=1e-5)
    assert len(set(advantages[0])) > 1 or not told
    assert advantages[2] == [0.0]
    # Records are read once a step, and nothing of ours is left to fetch.
    assert sum("extra_fields" in fields for fields in world.queue.reads) == 1
    assert not any(name.startswith("rredcot_") for name in left.fields) and "advantages" in left.fields


@pytest.mark.parametrize("run", ["rredcot", "both", "leave_one_out"])
def test_a_batch_in_another_order_gives_every_row_its_own(monkeypatch, run):
    expected, before, _ = advantages_of(*make_run(monkeypatch, run))

    def reorder(batch):
        order = [2, 0, 1]
        keys, tags = [batch.keys[row] for row in order], [batch.tags[row] for row in order]
        return KVBatchMeta(keys=keys, tags=tags, partition_id="train", extra_info=batch.extra_info)

    found, after, _ = advantages_of(*make_run(monkeypatch, run), reorder)
    for own, theirs in zip(found, expected, strict=True):
        assert own == pytest.approx(theirs, abs=1e-6)
    timed = {name for name in before if "seconds" in name or "timing" in name}
    assert {name: after[name] for name in after if name not in timed} == pytest.approx(
        {name: before[name] for name in before if name not in timed}, abs=1e-6
    )
    with pytest.raises(RuntimeError, match="rows of a step changed"):
        others = KVBatchMeta(keys=["b_0_0"], tags=[{}], partition_id="train")
        advantages_of(*make_run(monkeypatch, run), lambda batch: others)


def test_an_estimator_of_verls_reads_the_redistributed_rewards(monkeypatch):
    """What ours would have given is shown all the same."""
    ours, expected, _ = advantages_of(*make_run(monkeypatch))
    advantages, metrics, _ = advantages_of(*make_run(monkeypatch, estimator="reinforce_plus_plus"))
    assert advantages[:2] != ours[:2]
    credit = {name for name in expected if "segment_weight" in name or "value" in name} - {"timing_s/self_value"}
    assert len(credit) > 3
    assert {name: metrics[name] for name in credit} == pytest.approx({name: expected[name] for name in credit})


def test_a_run_without_redistribution_is_verls_own(monkeypatch):
    world, trainer = make_run(monkeypatch)
    trainer.rredcot = trainer._source = None
    with open_dict(trainer.config):
        trainer.config.algorithm.adv_estimator = "grpo"
    before = world.column("rm_scores")
    advantages, metrics, _ = advantages_of(world, trainer)
    assert metrics == {} and world.column("rm_scores") == before and len(set(advantages[0])) == 1


def test_td_starts_from_the_others_mean_where_values_are_regressed(monkeypatch):
    """A group of two: the one's baseline is the other's reward, whatever the values say later."""
    for run in ("rredcot", "calibrated"):
        world, trainer = make_run(monkeypatch, run, credit={"form": "td"})
        (first, *_), _, _ = advantages_of(world, trainer)
        # gamma = lam = 1: the first segment has GRPO's advantage either way.
        assert first[0] == pytest.approx(0.5 / (0.5**0.5 + 1e-6), abs=1e-5)


def test_the_default_form_blames_in_a_group_that_failed_as_a_whole(monkeypatch):
    world, trainer = make_run(monkeypatch, credit={"form": "critic"}, rewards=(0.0, 0.0))
    advantages, metrics, _ = advantages_of(world, trainer)
    assert metrics["rredcot/rows_scored/mean"] == 1.0 and metrics["rredcot/rows_uniform_group/mean"] == 0.0
    for own, rewards in zip(advantages[:2], world.column("rm_scores"), strict=False):
        # lam = 1: -v_{k-1} on every token of segment k. What is paid before a token sums to it, with v_0 on the first.
        values = [sum(rewards[: max(token, 1)]) for token in range(len(rewards))]
        # In a group of two no prompt counts as likelier or less likely than that.
        start = min(max(rewards[0], 0.25), 0.75)
        assert own == pytest.approx([-value / (start * (1 - start)) ** 0.5 for value in values], abs=1e-5)
        assert len(set(own)) > 1 and max(own) < 0


# --- reports ----------------------------------------------------------------------------------------------------------


def test_what_was_measured_and_what_it_cost(monkeypatch):
    scored = Record(Status.SCORED, num_probes=3, num_probe_tokens=30, ready_time=1.0, recorded_time=3.5)
    scored = dataclasses.replace(scored, measuring_seconds=2.0, waiting_seconds=1.5)
    scored = dataclasses.replace(scored, num_recomputed_tokens=48, lost_closing_mass=0.01)
    other = Record(Status.NO_PROPOSAL, truncated=True, num_dropped_answers=2, ready_time=2.0, recorded_time=2.0)
    world = World(monkeypatch, [scored, other, None], lengths=[10, 19, 1])
    trainer = make_trainer(engine=EngineChoice("rollout", False, ""))
    shares = {f"rredcot/rows_{status.value}/mean": 0.0 for status in Status if status is not Status.FAILED}
    assert trainer._cost_metrics(world.rows(), own_seconds=0.25) == pytest.approx(
        shares
        | {
            "rredcot/rows_scored/mean": 0.5,
            "rredcot/rows_no_proposal/mean": 0.5,
            "rredcot/rows_truncated/mean": 0.5,
            "rredcot/probes/sum": 3.0,
            "rredcot/probe_tokens/sum": 30.0,
            "rredcot/probe_tokens_per_response_token/mean": 1.0,
            "rredcot/recomputed_tokens/sum": 48.0,
            "rredcot/recomputed_prefixes/sum": 1.0,
            "rredcot/waiting_seconds/mean": 0.75,
            "rredcot/waiting_seconds/max": 1.5,
            "rredcot/lost_closing_mass/max": 0.01,
            "rredcot/dropped_answers/sum": 2.0,
            "rredcot/dropped_boundaries/sum": 0.0,
            "rredcot/scored_by_actor/mean": 0.0,
            "rredcot/scoring_seconds/sum": 2.0,
            # What was measured after the last response was there, and the trainer's own part.
            "timing_s/self_value": 1.5 + 0.25,
        }
    )
    padding = World(monkeypatch, [None, None])
    assert trainer._cost_metrics(padding.rows(), own_seconds=0.25) == {}


def test_verl_reduces_every_metric_as_its_name_says(monkeypatch):
    rules = {"mean": "weighted_avg", "max": "max", "sum": "sum", "self_value": "time_sum"}
    payload = {"values": [0.5], "standard_errors": [0.1], "num_cut_short": 1, "num_weight_versions": 1}
    names = set(
        make_trainer(estimator="vineppo")._source.metrics([Record(Status.SCORED, payload=payload, num_probes=2)])
    )
    assert len(names) == 3
    for run in RUNS:
        names |= set(advantages_of(*make_run(monkeypatch, run))[1])
    names -= {name for name in names if not name.startswith(("rredcot/", "timing_s/self_value"))}
    assert len(names) > 25 and "rredcot/readout_rows/mean" in names
    aggregator = MetricsAggregator()
    found = {name: aggregator._get_aggregation_type(name) for name in names}
    assert found == {name: rules[name.rsplit("/", 1)[1]] for name in names}
    # The rule is by substring: this is what the names must avoid.
    assert aggregator._get_aggregation_type("rredcot/terminal_value/mean") == "min"


@pytest.mark.parametrize(
    "run, way_out",
    [
        ("rredcot", "check algorithm.rredcot.self_value.reference_key=reward_model.ground_truth, or set algorithm."),
        ("leave_one_out", "check algorithm.rredcot.elicitation.format"),
    ],
)
def test_a_step_in_which_nothing_could_be_measured_is_said_once(monkeypatch, caplog, run, way_out):
    world, trainer = make_run(monkeypatch, run)
    for row in world.queue.rows.values():
        row["extra_fields"] = {KEY: Record(Status.NO_PROPOSAL).to_dict()}
    for _ in range(2):
        advantages, _, _ = advantages_of(world, trainer)
    (said,) = [record.getMessage() for record in caplog.records if "no response of this step" in record.getMessage()]
    assert f"each is one segment; {way_out}" in said
    assert len(set(advantages[0])) == 1


@pytest.mark.parametrize("step, local, traces, samples", [(1, 0, 0, 0), (2, 0, 1, 0), (3, 0, 0, 1), (6, 1, 0, 0)])
def test_traces_and_samples_are_shown_when_they_are_due(monkeypatch, tmp_path, step, local, traces, samples):
    settings = {"dir": str(tmp_path), "freq": 2, "samples_freq": 3, "num_samples": 1}
    world, trainer = make_run(monkeypatch, traces=settings)
    sent = []
    monkeypatch.setattr(trainer_module, "log_samples", lambda *args, **kwargs: sent.append(args[3]))
    trainer.global_steps, trainer.local_trigger_step = step, local
    advantages_of(world, trainer) if local == 0 else advantages_of(world, _in_a_cycle(trainer))
    written = list(tmp_path.iterdir())
    assert (len(written), len(sent)) == (traces, samples)
    for line in [json.loads(line) for file in written for line in file.read_text().splitlines()]:
        assert line["step"] == step and line["source"] == "rredcot" and line["engine"] == "actor, shared prefix"
        assert line["response"] in (TEXT, "Hmm, but so.\n\nThen it is \\boxed{16}.\n") and len(line["segments"]) > 1
    assert all(len(lines) == 1 for lines in sent)


def _in_a_cycle(trainer):
    """A later local update of a cycle."""
    trainer.actor_rollout_wg.kept[0] = "now"
    return trainer


def test_outcomes_outside_the_range_are_named(monkeypatch):
    def check(rewards, padding=False, penalty=0.0, shaping=0.0, **value):
        records = [*([Record(Status.EMPTY, shaping=shaping)] * (len(rewards) - padding)), *[None] * padding]
        reward_range = parse({"self_value": value}).self_value.reward_range
        World(monkeypatch, records, rewards=rewards).rows().check_outcomes(reward_range, penalty)

    check([0.0, 1.0, 0.5, 1.0 + 1e-7])
    for bad, said in ((-1.0, "-1.0"), (1.25, "1.25"), (float("nan"), "nan")):
        with pytest.raises(ValueError, match=rf"reward {said} of response a_1_0 .*reward_range=\[0.0, 1.0\]"):
            check([0.0, bad])
    check([-1.0, 1.0], reward_range=[-1, 1])
    # verl's synthetic rows have reward 0, whatever the verifier's range; its own penalty widens the range.
    check([1.0, 0.0], padding=True, reward_range=[0.5, 1])
    check([-1.0, 0.0], penalty=1.0, shaping=-1.0)
    # A penalty that is possible does not excuse scores outside.
    with pytest.raises(ValueError, match="reward -1.0 of response a_0_0"):
        check([-1.0, 1.0], penalty=1.0)


# --- before and after the steps ---------------------------------------------------------------------------------------


def test_who_measures_is_settled_with_the_tokenizer(monkeypatch, tmp_path, caplog):
    """In the config, where the workers read it, and in the trainer's own source."""
    build_model("qwen3-untied").save_pretrained(tmp_path)
    model = ("actor_rollout_ref.rollout.name=vllm", f"actor_rollout_ref.model.path={tmp_path}")
    # The live line would start Ray.
    switches = ("algorithm.rredcot.check_data=False", "algorithm.rredcot.live_every_s=null")
    with initialize_config_module("rredcot_verl.config", version_base=None):
        config = compose("rredcot_trainer", overrides=[*model, *switches])

    def init(self, config):
        self.config = config
        self._init_tokenizer()

    monkeypatch.setattr(PPOTrainer, "__init__", init)
    monkeypatch.setattr(PPOTrainer, "_init_tokenizer", lambda self: setattr(self, "tokenizer", byte_level()))
    trainer = TRAINER_REGISTRY["sync"](config)
    assert (trainer._engine.engine, trainer._engine.share_prefix, trainer._engine.fuse) == ("actor", True, False)
    assert trainer._source.settings.self_value.engine == config.algorithm.rredcot.self_value.engine == "actor"
    assert trainer._source.settings.self_value.fuse is False
    assert config.actor_rollout_ref.model.model_type == MODEL_TYPE
    assert "credit.form=critic (lambda 1.0, gamma 1.0) on values with self_value.calibration=logistic" in caplog.text
    config.algorithm.adv_estimator = "grpo"
    assert TRAINER_REGISTRY["sync"](config)._source is None


def test_the_regressions_state_is_in_the_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setattr(PPOTrainer, "_save_checkpoint", lambda self: None)
    monkeypatch.setattr(PPOTrainer, "_load_checkpoint", lambda self: None)
    world, trainer = make_run(monkeypatch, "calibrated")
    advantages_of(world, trainer)
    trainer.config.trainer.default_local_dir = str(tmp_path)
    trainer._save_checkpoint()
    assert [file.name for file in (tmp_path / "global_step_1").iterdir()] == ["rredcot_readout.pt"]
    loaded = []
    trainer._source.load = loaded.append
    for trainer.global_steps in (0, 1):
        trainer._load_checkpoint()
    assert loaded == [str(tmp_path / "global_step_1")]


def test_the_checkpoint_of_another_run_is_found():
    config = OmegaConf.create({"resume_mode": "auto", "default_local_dir": "checkpoints/run"})
    for resumes in (False, True):
        assert checkpoint_folder(config, 7, resumes=resumes) == "checkpoints/run/global_step_7"
    config.update({"resume_mode": "resume_path", "resume_from_path": "elsewhere/global_step_7"})
    assert checkpoint_folder(config, 7, resumes=True) == "elsewhere/global_step_7"
    assert checkpoint_folder(config, 7) == "checkpoints/run/global_step_7"


def test_ours_stands_under_verls_own_names():
    assert all(issubclass(trainer, RREDCoTTrainerMixin) for trainer in TRAINER_REGISTRY.values())

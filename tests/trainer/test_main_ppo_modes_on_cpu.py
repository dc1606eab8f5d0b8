"""The asynchronous trainer modes, checkpoints, validation and generation dumps, through verl's own entry point."""

import json
import math

import pytest
import torch

from tests.runs import main_ppo

RREDCOT = (
    "algorithm.adv_estimator=rredcot",
    "+algorithm.rredcot.segmentation.method=fixed",
    "+algorithm.rredcot.segmentation.min_tokens=2",
    # A probe after a full response needs room for the answer.
    "actor_rollout_ref.rollout.max_model_len=128",
)
COLOCATED = (
    "trainer.v1.trainer_mode=colocate_async",
    # Twelve prompts in the first step, of which four are trained on: the others get old.
    "trainer.v1.colocate_async.num_warmup_batches=2",
    "trainer.v1.sampler.max_off_policy_threshold=2",
    "trainer.v1.sampler.max_off_policy_strategy=drop",
    # Slow enough that some responses are half written when the weights change; validation waits for them.
    "actor_rollout_ref.rollout.max_num_seqs=2",
    "data.max_response_length=32",
    # Steps differ in it, so a run that goes on must know where it was.
    "actor_rollout_ref.actor.optim.lr=0.01",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=10",
    "trainer.save_freq=2",
    "trainer.test_freq=2",
    # What the calibration has seen goes into the checkpoints.
    "+algorithm.rredcot.readout.use_hidden=true",
    "+algorithm.rredcot.readout.dim=8",
    "+algorithm.rredcot.traces.samples_freq=1",
)
SEPARATE = (
    "trainer.v1.trainer_mode=separate_async",
    "trainer.v1.separate_async.parameter_sync_step=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.rollout.nnodes=1",
    "ray_kwargs.ray_init.num_gpus=2",
)
STALENESS = "training/off_policy/trajectory_staleness_worst/max"
SPANS = "training/off_policy/trajectory_spans/max"
EVICTED = "training/off_policy/evicted_samples"
FITTED = "rredcot/readout_prompts/mean"
ACCURACY = "val-core/openai/gsm8k/acc/mean@1"

pytestmark = pytest.mark.run


def assert_credit_is_right(steps):
    """Every step has credited responses, and their redistributed rewards sum to the verifier's."""
    for step in steps:
        assert step["rredcot/rows_scored/mean"] > 0
        assert step["rredcot/return_error/max"] < 1e-6
        assert step["rredcot/probes/sum"] > 0
        assert step["rredcot/scored_by_actor/mean"] == 1
        statuses = [
            value for name, value in step.items() if name.startswith("rredcot/rows_") and "truncated" not in name
        ]
        assert sum(statuses) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def colocated(tmp_path_factory, ray_folder_of_module):
    """Four steps, checkpoints and validation after the second and the last."""
    folder = tmp_path_factory.mktemp("colocated")
    run = main_ppo(
        folder,
        f"{ray_folder_of_module}/a",
        *RREDCOT,
        *COLOCATED,
        "trainer.total_training_steps=4",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        f"trainer.rollout_data_dir={folder / 'rollouts'}",
        f"trainer.validation_data_dir={folder / 'validation'}",
        f"+algorithm.rredcot.traces.dir={folder / 'traces'}",
    )
    assert run.returncode == 0, run.output[-8000:]
    return run, folder


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_got_too_old_is_dropped_and_the_rest_is_credited(colocated):
    run, _ = colocated
    assert [step["training/global_step"] for step in run.steps] == [1, 2, 3, 4]
    assert_credit_is_right(run.steps)
    assert sum(step.get(EVICTED, 0) for step in run.steps) > 0
    # The threshold counts a response's first version too.
    assert max(step[STALENESS] for step in run.steps) <= 1
    # Fitted to are earlier steps, of four prompts each; in the data's second round one may come again.
    fitted = [step[FITTED] for step in run.steps]
    assert fitted[:3] == [0, 4, 8] and 8 <= fitted[3] <= 12
    # Where a response was written in pieces, two versions of the policy wrote it.
    assert max(step[SPANS] for step in run.steps) <= 2


def test_segments_cover_responses_written_in_pieces(colocated):
    _, folder = colocated
    for number in (1, 2, 3, 4):
        lines = read_lines(folder / "traces" / f"{number}.jsonl")
        assert len(lines) == 8
        for line in lines:
            assert line["segments"][0]["start"] == 0 and line["segments"][-1]["end"] == len(line["response"])
            assert sum(segment["num_tokens"] for segment in line["segments"]) <= 32
            total = line["start_value"] + sum(segment["segment_reward"] for segment in line["segments"])
            assert total == pytest.approx(line["reward"], abs=1e-6)
            # The default with lambda 1: each segment has R - v_{k-1}, on one scale.
            advantages = [part["advantage"] for part in line["segments"]]
            left = [line["reward"] - value for value in (line["start_value"], *(p["value"] for p in line["segments"]))]
            for advantage, rest in zip(advantages, left, strict=False):
                assert advantage * left[0] == pytest.approx(advantages[0] * rest, abs=1e-4)
                assert advantage * rest >= 0
        assert max(len(line["segments"]) for line in lines) > 2
        assert any(part["advantage"] != 0 for line in lines for part in line["segments"])


def test_samples_are_sent_to_the_trackers(colocated):
    """An HTML file beside the metrics."""
    _, folder = colocated
    assert "segment" in (folder / "metrics_samples" / "2.html").read_text()


def test_validation_runs_between_steps_and_is_not_credited(colocated):
    run, folder = colocated
    assert [ACCURACY in step for step in run.steps] == [False, True, False, True]
    assert sorted(path.name for path in (folder / "validation").iterdir()) == ["2.jsonl", "4.jsonl"]
    for number, step in zip((2, 4), run.steps[1::2], strict=True):
        lines = read_lines(folder / "validation" / f"{number}.jsonl")
        assert len(lines) == 16 and {line["step"] for line in lines} == {number}
        assert step[ACCURACY] == pytest.approx(sum(line["acc"] for line in lines) / len(lines))


def test_dumped_rollouts_hold_the_rewards_of_the_verifier(colocated):
    """Redistribution has rewritten the token-level rewards; a response's sum is what the verifier gave."""
    run, folder = colocated
    for number, step in enumerate(run.steps, start=1):
        lines = read_lines(folder / "rollouts" / f"{number}.jsonl")
        assert len(lines) == 8 and {line["step"] for line in lines} == {number}
        assert step["critic/score/mean"] == pytest.approx(sum(line["score"] for line in lines) / 8, abs=1e-6)
        traces = {line["response"]: line["reward"] for line in read_lines(folder / "traces" / f"{number}.jsonl")}
        for line in lines:
            assert line["gts"].isdigit() and "<|im_start|>" not in line["input"]
            assert line["score"] == pytest.approx(traces[line["output"]], abs=1e-6)


def num_optimizer_steps(checkpoint) -> int:
    state = torch.load(checkpoint / "actor" / "optim_world_size_1_rank_0.pt", weights_only=False)["state"]
    (count,) = {int(entry["step"]) for entry in state.values()}
    return count


def test_a_run_goes_on_from_its_checkpoint(colocated, tmp_path, ray_folder):
    """In the mode that also brings back responses which were generated, or half generated, but not trained on.

    So do the rows that the values are fitted to.
    """
    first, folder = colocated
    checkpoint = folder / "checkpoints" / "global_step_2"
    assert num_optimizer_steps(checkpoint) == 2
    run = main_ppo(
        tmp_path,
        ray_folder,
        *RREDCOT,
        *COLOCATED,
        "trainer.total_training_steps=4",
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={checkpoint}",
        f"trainer.default_local_dir={tmp_path / 'checkpoints'}",
        "trainer.test_freq=-1",
        "trainer.val_before_train=true",
        f"trainer.validation_data_dir={tmp_path / 'validation'}",
    )
    assert run.returncode == 0, run.output[-8000:]
    before, *steps = run.steps
    # Greedy, by the weights that the servers were given: those of the second step. Rounding tips an answer where two
    # tokens are as likely as each other.
    answers = [
        sorted((line["input"], line["output"]) for line in read_lines(path / "validation" / "2.jsonl"))
        for path in (folder, tmp_path)
    ]
    assert len(answers[0]) == 16 and len(set(answers[0]) & set(answers[1])) >= 14
    assert ACCURACY in before
    assert [step["training/global_step"] for step in steps] == [3, 4]
    assert_credit_is_right(steps)
    learning_rates = [step["actor/lr"] for step in (*first.steps[:2], *steps)]
    assert learning_rates == sorted(set(learning_rates))
    assert steps[0]["actor/lr"] == first.steps[2]["actor/lr"]
    assert num_optimizer_steps(tmp_path / "checkpoints" / "global_step_4") == 4
    assert steps[0][FITTED] == 8 and 8 <= steps[1][FITTED] <= 12


def test_a_trainer_and_servers_of_their_own(tmp_path, ray_folder):
    """Two local updates a step, both measured against the weights of the last synchronisation."""
    run = main_ppo(
        tmp_path,
        ray_folder,
        *RREDCOT,
        *SEPARATE,
        # Nothing is generated ahead: the servers' weights are those of the last synchronisation.
        "trainer.v1.separate_async.num_warmup_batches=0",
        # Far too high to learn with, high enough that one update moves the policy well away.
        "actor_rollout_ref.actor.optim.lr=0.05",
        "trainer.total_training_steps=3",
        # Validation lends the training engine's own servers out.
        "trainer.test_freq=2",
    )
    assert run.returncode == 0, run.output[-8000:]
    assert [step["training/global_step"] for step in run.steps] == [1, 2, 3]
    assert_credit_is_right(run.steps)
    for step in run.steps:
        assert step[STALENESS] == 0
        assert step["training/rollout_actor_probs_pearson_corr"] > 0.999
        assert step["training/rollout_probs_diff_max"] < 1e-4
        assert step["actor/grad_norm"] > 0 and math.isfinite(step["timing_s/self_value"])
    assert [ACCURACY in step for step in run.steps] == [False, True, True]

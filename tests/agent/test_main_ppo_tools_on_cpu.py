"""verl's own entry point with a tool in the loop: what it says is paid by verl's managers, and by ours in no run."""

import json

import pytest

from tests.agent.tool_loop import WORD
from tests.runs import main_ppo

pytestmark = pytest.mark.run


@pytest.mark.parametrize("estimator, manager", [("grpo", "rredcot"), ("rredcot", "naive")])
def test_a_tools_words_are_not_paid(tmp_path, ray_folder, estimator, manager):
    loops = tmp_path / "loops.yaml"
    loops.write_text("- name: tooled\n  _target_: tests.agent.tool_loop.Tooled\n")
    run = main_ppo(
        tmp_path,
        ray_folder,
        f"algorithm.adv_estimator={estimator}",
        f"reward.reward_manager.name={manager}",
        "reward.custom_reward_function.path=pkg://tests.agent.tool_loop",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={loops}",
        "actor_rollout_ref.rollout.agent.default_agent_loop=tooled",
        "trainer.total_training_steps=1",
        f"trainer.rollout_data_dir={tmp_path / 'rollouts'}",
    )
    assert run.returncode == 0, run.output[-8000:]
    lines = [json.loads(line) for line in (tmp_path / "rollouts" / "1.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and all(WORD in line["output"] for line in lines)
    assert [step["critic/score/mean"] for step in run.steps] == [0.5]
    assert "does not say which tokens the model wrote" not in run.output

"""The tiny code recipe's config fits its task. That the twins differ in the estimator alone: tests/contract."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from rredcot_verl.run.settings import active_settings

FOLDER = Path(__file__).parents[2] / "recipes/code/tiny"


@pytest.fixture(autouse=True)
def _folders(monkeypatch, tmp_path):
    monkeypatch.setenv("TINY_CODE_RUN", str(tmp_path))
    monkeypatch.setenv("TINY_CODE_DATA", str(tmp_path))


def _compose(name: str):
    with initialize_config_dir(str(FOLDER), version_base=None):
        return compose(name)


def test_programs_are_probed_with_reference_and_group():
    settings = active_settings(_compose("rredcot"))
    assert settings.elicitation.format == "code"
    assert (settings.self_value.proposals, settings.self_value.reference_key) == ("union", "extra_info.solutions")
    assert _compose("rredcot").reward.custom_reward_function.reward_kwargs.reward == "fraction"


def test_the_budgets_hold_the_longest_problem():
    """A right response and a program probed after its last boundary fit; no right program is too long to probe."""
    from recipes.code.tiny import language, task
    from recipes.code.tiny.tokens import build_tokenizer

    config, tokenizer = _compose("rredcot"), build_tokenizer()
    operations = [language.Operation("odd", "take", 9, 8)] * task.Difficulty().max_operations
    problem = task.Problem(tuple(operations))
    # The longest writing of every line.
    styles = range(language.NUM_STYLES**2)
    style = max(styles, key=lambda style: len(tokenizer.encode(problem.operations[0].effect.line(style))))
    effects = [operation.effect for operation in operations]
    program = "".join(language.program_lines(effects, [style] * len(effects)))
    num_program = len(tokenizer.encode(program))
    num_response = len(tokenizer.encode(task.solve(problem).replace(problem.solution, program))) + 1
    num_prompt = len(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.expression}], add_generation_prompt=True, return_dict=False
        )
    )
    assert num_prompt <= config.data.max_prompt_length
    assert num_response <= config.data.max_response_length
    assert num_program <= config.algorithm.rredcot.self_value.max_answer_tokens
    opening = len(tokenizer.encode("```\n\n```python\n"))
    assert num_prompt + num_response + opening + num_program + 2 <= config.actor_rollout_ref.rollout.max_model_len

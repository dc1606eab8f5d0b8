"""Data that cannot be trained on ends the job where the trainer starts, before any worker."""

import logging

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from rredcot_verl.run.settings import active_settings, run_source
from rredcot_verl.trainer.trainer import TRAINER_REGISTRY
from tests.runs import REPOSITORY
from tests.tiny_model import make_tiny_data, make_tiny_model


class Trainer(TRAINER_REGISTRY["sync"]):
    """The trainer up to its tokenizer."""

    def __init__(self, config):
        self.config = config
        self.rredcot = active_settings(config)
        self._source = None if self.rredcot is None else run_source(config, self.rredcot)
        self._init_tokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def start(tmp_path, model, change=None, *overrides: str) -> Trainer:
    train, val = make_tiny_data(tmp_path)
    if change is not None:
        rows = pd.read_parquet(train)
        change(rows)
        rows.to_parquet(train)
    with initialize_config_dir(str(REPOSITORY / "rredcot_verl/config"), version_base=None):
        config = compose(
            "rredcot_trainer",
            overrides=[
                "+backend=cpu",
                f"actor_rollout_ref.model.path={model}",
                f"data.train_files={train}",
                f"data.val_files={val}",
                "data.train_batch_size=4",
                *overrides,
            ],
        )
    return Trainer(config)


def lose_ground_truths(rows: pd.DataFrame) -> None:
    rows["reward_model"] = [{"style": "rule", "ground_truth": "" if index > 2 else "1"} for index in range(len(rows))]


def test_good_data_passes(tmp_path, model):
    assert start(tmp_path, model).tokenizer is not None


def test_a_missing_ground_truth_stops_with_counts_and_examples(tmp_path, model):
    with pytest.raises(ValueError) as error:
        start(tmp_path, model, lose_ground_truths)
    for words in ("data.train_files", "ground_truth", "(13 rows)", "row 3", "check_data=False"):
        assert words in str(error.value)


@pytest.mark.parametrize("override", ["algorithm.rredcot.check_data=false", "algorithm.adv_estimator=grpo"])
def test_the_check_can_be_left_out_and_grpo_runs_are_verls_own(tmp_path, model, override):
    start(tmp_path, model, lose_ground_truths, override)


def test_what_is_only_odd_is_logged(tmp_path, model, caplog):
    with caplog.at_level(logging.WARNING):
        start(tmp_path, model)
    # Both files hold the same sums.
    assert "train_val_overlap (16 rows)" in caplog.text

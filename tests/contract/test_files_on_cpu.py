"""Every YAML composes, every script parses, and the recipes differ in what they say they differ in."""

import re
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rredcot_verl.config.schema import RREDCoTConfig
from rredcot_verl.integration.settings import active_settings, parse_block

ROOT = Path(__file__).parents[2]
PRIMARY = [
    ROOT / "rredcot_verl/config/rredcot_trainer.yaml",
    ROOT / "recipes/quickstart/rredcot.yaml",
    ROOT / "recipes/quickstart/grpo.yaml",
]
YAMLS = sorted([*(ROOT / "rredcot_verl").rglob("*.yaml"), *(ROOT / "recipes").rglob("*.yaml")])
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), *(ROOT / "recipes").rglob("*.sh"), ROOT / ".ci/run"])


@pytest.fixture(autouse=True)
def _quickstart_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("QUICKSTART_RUN", str(tmp_path))
    monkeypatch.setenv("QUICKSTART_DATA", str(tmp_path))


def _compose(path: Path, *overrides: str):
    with initialize_config_dir(str(path.parent), version_base=None):
        return compose(path.stem, overrides=["actor_rollout_ref.rollout.name=vllm", *overrides])


@pytest.mark.parametrize("path", PRIMARY, ids=lambda path: path.stem)
def test_composes_and_passes_its_own_checks(path):
    config = _compose(path)
    OmegaConf.to_container(config, resolve=True)
    settings = active_settings(config)
    assert (settings is None) == (config.algorithm.adv_estimator == "grpo")


def test_every_primary_config_is_listed():
    with_searchpath = {path for path in YAMLS if "searchpath:" in path.read_text()}
    assert with_searchpath == set(PRIMARY)


def test_overlay_declares_the_defaults_of_the_schema():
    config = _compose(PRIMARY[0])
    assert parse_block(config) == RREDCoTConfig()
    assert config.trainer.v1.trainer_mode == "sync"


def test_the_quickstart_twins_differ_in_the_estimator_alone():
    ours, theirs = (OmegaConf.to_container(_compose(path)) for path in PRIMARY[1:])
    assert ours["algorithm"].pop("adv_estimator") == "rredcot"
    assert theirs["algorithm"].pop("adv_estimator") == "grpo"
    assert ours == theirs


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_follows_verls_format(path):
    """A comment or a blank line above each field, and no comment after one."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\s*[\w.@]+:", line):
            above = lines[number - 1].strip() if number else ""
            assert above == "" or above.startswith("#"), f"{path}:{number + 1} has no comment or blank line above"
            assert not re.search(r"\s#", line), f"{path}:{number + 1} has a comment after a field"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_is_strict(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert re.search(r"^set -[a-z]*euo? ?", path.read_text(), re.MULTILINE), f"{path} does not stop at an error"

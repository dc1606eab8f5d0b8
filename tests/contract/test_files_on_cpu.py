"""Every YAML composes, every script parses, and the recipes differ in what they say they differ in."""

import re
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rredcot_verl.config.schema import RREDCoTConfig, parse
from rredcot_verl.run.settings import active_settings

ROOT = Path(__file__).parents[2]
YAMLS = sorted([*(ROOT / "rredcot_verl").rglob("*.yaml"), *(ROOT / "recipes").rglob("*.yaml")])
# Hydra reads searchpath from the file named on the command line only, so a config that can be named has it.
PRIMARY = [path for path in YAMLS if "searchpath:" in path.read_text(encoding="utf-8")]
TRAINER = ROOT / "rredcot_verl/config/rredcot_trainer.yaml"
# Composed by tests/recipes with what their scripts add.
GPU_RECIPES = [path for path in PRIMARY if path.stem.startswith("qwen3_")]
TWINS = sorted({path.parent for path in PRIMARY if (path.parent / "grpo.yaml") in PRIMARY})
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), *(ROOT / "recipes").rglob("*.sh"), ROOT / ".ci/run"])


@pytest.fixture(autouse=True)
def _folders(monkeypatch, tmp_path):
    for path in YAMLS:
        for name in re.findall(r"oc\.env:(\w+)", path.read_text(encoding="utf-8")):
            monkeypatch.setenv(name, str(tmp_path))


def _compose(path: Path, *overrides: str):
    with initialize_config_dir(str(path.parent), version_base=None):
        return compose(path.stem, overrides=["actor_rollout_ref.rollout.name=vllm", *overrides])


def _where(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [path for path in PRIMARY if path not in GPU_RECIPES], ids=_where)
def test_composes_and_passes_its_own_checks(path):
    config = _compose(path)
    OmegaConf.to_container(config, resolve=True)
    settings = active_settings(config)
    assert (settings is None) == (config.algorithm.adv_estimator == "grpo")


def test_the_configs_that_can_be_named_are_found():
    assert TRAINER in PRIMARY and TRAINER.with_name("rredcot_megatron_trainer.yaml") in PRIMARY
    assert ROOT / "recipes/quickstart" in TWINS and len(GPU_RECIPES) == 10


def test_overlay_declares_the_defaults_of_the_schema():
    config = _compose(TRAINER)
    declared = OmegaConf.to_container(config.algorithm.rredcot)
    assert parse(declared) == RREDCoTConfig()
    assert config.trainer.v1.trainer_mode == "sync"


def test_the_megatron_overlay_is_the_same_with_another_engine():
    ours = _compose(TRAINER.with_name("rredcot_megatron_trainer.yaml"))
    assert ours.actor_rollout_ref.actor.strategy == ours.actor_rollout_ref.ref.strategy == "megatron"
    assert ours.algorithm == _compose(TRAINER).algorithm


@pytest.mark.parametrize("folder", TWINS, ids=_where)
def test_twins_differ_in_the_estimator_alone(folder):
    ours, theirs = (OmegaConf.to_container(_compose(folder / name)) for name in ("rredcot.yaml", "grpo.yaml"))
    assert ours["algorithm"].pop("adv_estimator") == "rredcot"
    assert theirs["algorithm"].pop("adv_estimator") == "grpo"
    assert ours == theirs


@pytest.mark.parametrize("path", YAMLS, ids=_where)
def test_yaml_follows_verls_format(path):
    """A comment or a blank line above each field, and no comment after one."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\s*[\w.@]+:", line):
            above = lines[number - 1].strip() if number else ""
            assert above == "" or above.startswith("#"), f"{path}:{number + 1} has no comment or blank line above"
            assert not re.search(r"\s#", line), f"{path}:{number + 1} has a comment after a field"


@pytest.mark.parametrize("path", SCRIPTS, ids=_where)
def test_script_parses_and_is_strict(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert re.search(r"^set -[a-z]*euo? ?", path.read_text(), re.MULTILINE), f"{path} does not stop at an error"

"""The `algorithm.rredcot` block: its defaults, its YAML, and what every kind of bad input is told."""

from importlib.resources import files

import pytest
import yaml

from rredcot_verl.config.blocks import DEFAULT_KEYWORDS
from rredcot_verl.config.overlay import FILE, main
from rredcot_verl.config.schema import parse


def as_plain(value):
    if isinstance(value, dict):
        return {key: as_plain(entry) for key, entry in value.items()}
    return [as_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def test_the_defaults_are_the_method():
    assert parse(None).model_dump() == {
        "enable": None,
        "check_data": True,
        "live_every_s": 30.0,
        "source": None,
        "source_options": {},
        "segmentation": {
            "method": "keyword_entropy",
            "num_segments": 64,
            "min_tokens": 32,
            "max_tokens": None,
            "keywords": DEFAULT_KEYWORDS,
        },
        "elicitation": {
            "format": "auto",
            "opening": None,
            "pattern": None,
            "closing": (),
            "think_open": "<think>",
            "think_close": "</think>",
            "think_exit": None,
            "think_skip": None,
        },
        "self_value": {
            "engine": "auto",
            "share_prefix": True,
            "fuse": "auto",
            "form": "auto",
            "calibration": "auto",
            "proposals": "reference",
            "reference_key": "reward_model.ground_truth",
            "max_proposals": 4,
            "max_answer_tokens": 64,
            "max_closing_tokens": 4,
            "score_opening": False,
            "probe_uniform_groups": False,
            "reward_range": (0.0, 1.0),
            "timeout_s": 600.0,
            "max_concurrency": 64,
        },
        "readout": {
            "use_probe": True,
            "use_position": True,
            "use_hidden": False,
            "layer": -2,
            "dim": 64,
            "seed": 0,
            "window": 8,
            "half_life": None,
            "max_rows": 16384,
        },
        "monte_carlo": {"num_rollouts": 9, "max_tokens": None, "max_concurrency": 64},
        "credit": {"form": "auto", "lam": None, "beta": 1.0, "pinned": True, "control": "none"},
        "traces": {"dir": None, "freq": 1, "num_traces": 64, "samples_freq": None, "num_samples": 4},
    }


def test_the_yaml_is_made_from_the_schema(capsys, monkeypatch):
    text = files("rredcot_verl.config").joinpath(FILE).read_text(encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["overlay"])
    main()
    assert capsys.readouterr().out == text
    block = yaml.safe_load(text)
    assert block == as_plain(parse(None).model_dump())
    assert parse(block) == parse(None) == parse({})


@pytest.mark.parametrize(
    "block, words",
    [
        ({"sed": 1}, ["algorithm.rredcot.sed=1", "unknown key", "segmentation", "self_value"]),
        ({"credit": {"bta": 2}}, ["algorithm.rredcot.credit.bta=2", "unknown key", "form, lam"]),
        ({"credit": {"beta": "1"}}, ["algorithm.rredcot.credit.beta='1'", "number"]),
        ({"credit": {"beta": -1}}, ["algorithm.rredcot.credit.beta=-1", "greater than or equal to 0"]),
        ({"credit": {"beta": 21}}, ["algorithm.rredcot.credit.beta=21", "less than or equal to 20"]),
        ({"credit": {"beta": float("nan")}}, ["algorithm.rredcot.credit.beta=nan", "finite"]),
        ({"credit": {"lam": 2}}, ["algorithm.rredcot.credit.lam=2", "less than or equal to 1"]),
        ({"self_value": {"calibration": "isotonic"}}, ["calibration='isotonic'", "'auto', 'none' or 'logistic'"]),
        ({"self_value": {"form": "hidden", "engine": "rollout"}}, ["form=hidden", "engine=actor or auto"]),
        ({"readout": {"use_probe": False, "use_position": False}}, ["nothing is left to regress on"]),
        ({"monte_carlo": {"num_rollouts": 0}}, ["monte_carlo.num_rollouts=0", "greater than or equal to 1"]),
        (
            {"credit": {"form": "gae"}},
            ["algorithm.rredcot.credit.form='gae'", "'auto', 'critic', 'td' or 'reweight'"],
        ),
        ({"credit": None}, ["algorithm.rredcot.credit=None", "dictionary"]),
        ({"enable": "yes"}, ["algorithm.rredcot.enable='yes'", "boolean"]),
        ({"segmentation": {"num_segments": 0}}, ["segmentation.num_segments=0", "greater than or equal to 1"]),
        ({"segmentation": {"num_segments": 257}}, ["segmentation.num_segments=257", "less than or equal to 256"]),
        ({"segmentation": {"num_segments": 8.0}}, ["segmentation.num_segments=8.0", "integer"]),
        ({"segmentation": {"num_segments": True}}, ["segmentation.num_segments=True", "integer"]),
        ({"segmentation": {"min_tokens": None}}, ["segmentation.min_tokens=None", "integer"]),
        ({"segmentation": {"keywords": ["so", 3]}}, ["segmentation.keywords.1=3", "string"]),
        ({"segmentation": {"keywords": ["so", " "]}}, ["segmentation.keywords=['so', ' ']", "empty word"]),
        ({"segmentation": {"max_tokens": 31}}, ["segmentation.max_tokens=31", "at least", "min_tokens=32"]),
        ({"segmentation": {"method": ""}}, ["segmentation.method=''", "at least 1"]),
        ({"elicitation": {"format": "latex"}}, ["elicitation.format='latex'", "'boxed'", "'custom'"]),
        ({"elicitation": {"format": "custom"}}, ["elicitation.format=custom", "opening", "pattern"]),
        ({"elicitation": {"opening": "x"}}, ["elicitation.opening", "format=auto", "format=custom"]),
        ({"elicitation": {"closing": [";"]}}, ["elicitation.closing", "format=auto", "format=custom"]),
        ({"self_value": {"engine": "trainer"}}, ["self_value.engine='trainer'", "'rollout'"]),
        ({"self_value": {"form": "normalized"}}, ["form=normalized", "proposals=reference", "group or union"]),
        (
            {"self_value": {"form": "normalized", "proposals": "group", "max_proposals": 1}},
            ["form=normalized", "max_proposals", "got 1"],
        ),
        ({"self_value": {"reward_range": [1, 0]}}, ["self_value.reward_range=[1.0, 0.0]", "lowest < highest"]),
        ({"self_value": {"reward_range": [0, 0]}}, ["self_value.reward_range=[0.0, 0.0]", "lowest < highest"]),
        ({"self_value": {"reward_range": [0]}}, ["self_value.reward_range"]),
        ({"self_value": {"reward_range": [0, float("inf")]}}, ["self_value.reward_range.1=inf", "finite"]),
        ({"self_value": {"timeout_s": 0}}, ["self_value.timeout_s=0", "greater than 0"]),
        ({"self_value": {"max_concurrency": 0}}, ["self_value.max_concurrency=0", "greater than or equal to 1"]),
        ({"source": ""}, ["algorithm.rredcot.source=''", "at least 1"]),
        ({"source_options": 3}, ["algorithm.rredcot.source_options=3", "dictionary"]),
        ({"traces": {"dir": ""}}, ["traces.dir=''", "at least 1"]),
    ],
)
def test_bad_input_is_told_key_value_and_what_is_allowed(block, words):
    with pytest.raises(ValueError) as caught:
        parse(block)
    message = str(caught.value)
    assert "algorithm.rredcot" in message and "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_every_fault_has_its_line():
    with pytest.raises(ValueError) as caught:
        parse({"credit": {"beta": -1}, "segmentation": {"num_segments": 0}, "nonsense": 1})
    assert len(str(caught.value).splitlines()) == 3


def test_numbers_as_yaml_writes_them():
    block = {"credit": {"beta": 2}, "self_value": {"reward_range": [-1, 1], "timeout_s": 5}}
    settings = parse(block)
    assert settings.credit.beta == 2.0 and settings.self_value.reward_range == (-1.0, 1.0)
    assert parse({"segmentation": {"max_tokens": 32}}).segmentation.max_tokens == 32
    with pytest.raises(ValueError, match="frozen"):
        settings.credit.beta = 3.0

"""The command line of the bench, as one typed object: what can be wrong with it is said before a model is loaded."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rredcot_verl.analyze.credit_forms import FORMS
from rredcot_verl.analyze.estimators import ESTIMATORS, FORECASTS
from rredcot_verl.analyze.labelled_sets import FORMATS
from rredcot_verl.analyze.segmentations import Rules, parse_segmentations
from rredcot_verl.analyze.timing import parse_duration
from rredcot_verl.config.schema import PREFIX, RREDCoTConfig, parse


def _flag(*names: str, default: Any = None, least: int | None = None, **argument: Any) -> Any:
    """A field of `Options` that a flag fills.

    Args:
        names: The flags; by default the field's name.
        default: Its value without the flag.
        least: Smallest number that is taken.
        argument: Passed on to argparse.
    """
    return dataclasses.field(metadata={"names": names, "least": least, "argument": {"default": default, **argument}})


MATH_VERIFIER = "pkg://rredcot_verl.rewards.math:compute_score"
"""What verifies the final answers of a labelled set that does not say if they are right."""
_NOT_OF_LABELS = {
    "gradients": "the policy's gradient is that of its own samples",
    "line_checker": "the labels say which step is wrong",
}
_WORDS: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}


@dataclass(frozen=True)
class Options:
    """What the user asked for, checked; the flags' help texts say what each is.

    Attributes:
        command: The command line.
        settings: The `algorithm.rredcot` block: `--config` with `--set` on top.
        cuttings: By name; the first one is the main one.
        reward_options, template_options: Keyword arguments of the verifier and of the chat template.
        budget_s: Wall time in seconds, None for any.
    """

    command: str
    model: str = _flag(required=True, metavar="FOLDER", help="HuggingFace folder of the policy")
    out: Path = _flag(required=True, type=Path, metavar="DIR", help="folder of measurements and results")
    prompts: str | None = _flag(metavar="FILE", help="parquet or JSON lines: verl's rows, or prompt, ground_truth")
    traces: list[str] | None = _flag(
        nargs="+",
        metavar="PATH",
        help="verl's rollout dumps, traces/<step>.jsonl of a run, or JSON lines with prompt, response, ground_truth; "
        "text is tokenised again, which may differ from what was sampled",
    )
    labels: str | None = _flag(
        metavar="SET",
        help="traces whose first wrong step is known: a file or folder, champ (the package champ-dataset), or "
        "OWNER/NAME:SPLIT on the hub",
    )
    labels_format: str = _flag(
        default="auto", choices=("auto", *FORMATS), help="columns of such a file (default: auto, by its first row)"
    )
    num_prompts: int = _flag(default=64, least=1, metavar="N", help="prompts sampled from (default: 64)")
    num_traces: int | None = _flag(
        least=1, metavar="N", help="with --traces or --labels: most traces (default: 512, and all)"
    )
    group_size: int = _flag(
        "-n", "--group-size", default=8, least=1, metavar="N", help="responses a prompt (default: 8)"
    )
    temperature: float = _flag(default=1.0, type=float, help="sampling temperature (default: 1)")
    max_response_tokens: int = _flag(least=1, metavar="N", help="longest response (default: 1024; with --labels 32768)")
    reward_function: str | None = _flag(
        metavar="NAME",
        help="verifier as verl names it: PATH[:FUNCTION] or pkg://MODULE[:FUNCTION]"
        "; plain or async; default: verl's own, by data_source; with --labels ours for math",
    )
    reward_options: dict[str, Any] = _flag(
        "--reward-set", **_WORDS, metavar="KEY=VALUE", help="keyword arguments of the verifier"
    )
    data_source: str = _flag(default="", help="with --traces: data_source where a row has none")
    template_options: dict[str, Any] = _flag(
        "--template-set", **_WORDS, metavar="KEY=VALUE", help="arguments of the chat template"
    )
    line_checker: str | None = _flag(
        metavar="MODULE:FUNCTION", help="judges the lines of a response, as in rredcot_verl.report"
    )
    config: Path | None = _flag(type=Path, metavar="FILE", help=f"YAML with the {PREFIX} block")
    settings: RREDCoTConfig = _flag(
        "--set", **_WORDS, metavar="KEY=VALUE", help=f"settings under {PREFIX}, e.g. segmentation.min_tokens=4"
    )
    methods: list[str] = _flag(
        nargs="+",
        metavar="METHOD",
        help=f"of: {', '.join(ESTIMATORS)} (default: all; with --labels those that do not know the outcome)",
    )
    cuttings: Rules = _flag(
        nargs="+",
        metavar="METHOD-N",
        help="ways to cut, the main one first, e.g. keyword_entropy-8 fixed-8 (default: the settings' own and others; "
        "with --labels these come after the steps of the labels)",
    )
    rollouts: int = _flag(
        least=0,
        metavar="N",
        help="continuations of a state; 0: none, nor a comparison with the truth (default: 16; with --labels 0)",
    )
    main_rollouts: int | None = _flag(
        least=0, metavar="N", help="the same for states of the main cutting (default: as others)"
    )
    rollout_prompts: int | None = _flag(
        least=0, metavar="N", help="prompts, from the first, whose states have continuations (default: all)"
    )
    true_values: str | None = _flag(
        metavar="MODULE:NAME",
        help="the task's own value of a state, f(prompt, response so far) -> expected reward or None: the gold in "
        "place of continuations, and a method, oracle",
    )
    layers: list[str] = _flag(
        nargs="+", default=["-2"], metavar="L", help="layers of hidden states, or all (default: -2)"
    )
    dim: int = _flag(default=64, least=1, help="dimensions kept of a hidden state (default: 64)")
    gradients: int = _flag(
        default=0, least=0, metavar="N", help="prompts whose gradients are taken under each form of credit (default: 0)"
    )
    forms: list[str] = _flag(
        nargs="+", default=list(FORMS), metavar="FORM", help=f"of: {'; '.join(FORMS)} (default: all)"
    )
    batch_prompts: int = _flag(
        default=16, least=1, metavar="N", help="prompts of an optimiser step, for what Adam makes of it (default: 16)"
    )
    device: str = _flag(default="cpu", help="e.g. cpu or cuda:0 (default: cpu)")
    dtype: str = _flag(default="auto", help="float32, bfloat16, float16 or auto: float32 on a CPU, else bfloat16")
    batch_tokens: int = _flag(default=65536, least=1, metavar="N", help="tokens of a sampling batch (default: 65536)")
    pack_tokens: int | None = _flag(
        least=1,
        metavar="N",
        help="tokens of a forward pass (default: 4096; on a GPU, where no method needs gradients, up to 32768 as its "
        "memory allows)",
    )
    seed: int = _flag(default=0, least=0, help="of sampling, projections and resampling (default: 0)")
    budget_s: float | None = _flag(
        "--budget", metavar="TIME", help="wall time of measuring, e.g. 30m or 2h (default: none)"
    )
    num_resamples: int = _flag(default=1000, least=1, metavar="N", help="of the bootstrap (default: 1000)")
    title: str | None = _flag(help="heading of the page (default: the model's folder)")

    @property
    def measured(self) -> tuple[str, ...]:
        """What is measured besides continuations."""
        return tuple(dict.fromkeys(what for name in self.methods for what in ESTIMATORS[name].needs))

    @property
    def num_rollouts(self) -> tuple[int, int]:
        """Continuations of a state of the main cutting, and of any other state."""
        return self.rollouts if self.main_rollouts is None else self.main_rollouts, self.rollouts

    def unread(self) -> list[str]:
        """Blocks that were changed and do not matter here: the bench has its own rows for what they say."""
        default = RREDCoTConfig()
        found = [
            name for name in ("credit", "readout", "traces") if getattr(self.settings, name) != getattr(default, name)
        ]
        names = ("engine", "share_prefix", "form", "calibration", "proposals", "max_proposals")
        value = self.settings.self_value
        return found + [
            f"self_value.{name}" for name in names if getattr(value, name) != getattr(default.self_value, name)
        ]

    def identity(self, model_fingerprint: str) -> dict[str, Any]:
        """What must be equal for two calls to go on with one measurement."""
        # Not the number of prompts: more of them may be added. A trace more would change what its group knows.
        names = (
            "prompts traces labels group_size temperature max_response_tokens reward_function "
            "data_source line_checker rollouts main_rollouts true_values layers dim dtype seed"
        ).split()
        return {
            "model": model_fingerprint,
            **{name: getattr(self, name) for name in names},
            "num_traces": self.num_traces if self.traces or self.labels else None,
            "labels_format": self.labels_format if self.labels else None,
            "settings": self.settings.model_dump(mode="json"),
            "cuttings": list(self.cuttings),
            "measured": list(self.measured),
            "reward_options": self.reward_options,
            "template_options": self.template_options,
        }


_FLAGS = {field.name: field.metadata for field in dataclasses.fields(Options) if field.metadata}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rredcot_verl.analyze",
        description="Compares ways to give credit to segments, offline, on a model and its traces: values and credit "
        "by every method, against Monte Carlo. Writes results.json, tables.md and report.html. The same command goes "
        "on where it stopped.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    for name, flag in _FLAGS.items():
        add = source.add_argument if name in ("prompts", "traces", "labels") else parser.add_argument
        names = flag["names"] or (f"--{name.replace('_', '-')}",)
        number: dict[str, Any] = {} if flag["least"] is None else {"type": int}
        add(*names, dest=name, **number, **flag["argument"])
    return parser


def read_options(arguments: Sequence[str] | None = None) -> Options:
    """Parse and check the command line.

    Raises:
        ValueError: Whatever can be found wrong without a model.
        SystemExit: argparse's own complaints, and `--help`.
    """
    given = vars(build_parser().parse_args(arguments))
    given |= {name: value for name, value in _defaults(bool(given["labels"])).items() if given[name] is None}
    _check(given)
    settings = _settings(given["config"], given["settings"])
    for flag, known in (("methods", ESTIMATORS), ("forms", FORMS)):
        unknown = [name for name in given[flag] if name not in known]
        if unknown:
            raise ValueError(f"--{flag} {shlex.join(unknown)}: unknown; known: {shlex.join(known)}")
        given[flag] = list(dict.fromkeys(given[flag]))
    read = {
        "command": "python -m rredcot_verl.analyze " + shlex.join(sys.argv[1:] if arguments is None else arguments),
        "settings": settings,
        "cuttings": parse_segmentations(given["cuttings"], settings, labelled=bool(given["labels"])),
        "reward_options": _pairs(given["reward_options"], "--reward-set"),
        "template_options": _pairs(given["template_options"], "--template-set"),
        "budget_s": None if given["budget_s"] is None else parse_duration(given["budget_s"]),
    }
    return Options(**{**given, **read})


def _defaults(labelled: bool) -> dict[str, Any]:
    """What is taken where a flag is not given, and depends on whether the traces are labelled."""
    if not labelled:
        return {"num_traces": 512, "max_response_tokens": 1024, "methods": list(ESTIMATORS), "rollouts": 16}
    return {
        "max_response_tokens": 32768,
        "methods": list(FORECASTS),
        "rollouts": 0,
        "reward_function": MATH_VERIFIER,
    }


def _check(given: dict[str, Any]) -> None:
    for name, flag in _FLAGS.items():
        if flag["least"] is not None and given[name] is not None and given[name] < flag["least"]:
            raise ValueError(f"--{name.replace('_', '-')} {given[name]}: expected at least {flag['least']}")
    if not given["temperature"] > 0:
        raise ValueError(f"--temperature {given['temperature']}: expected a number above 0")
    for name in ("rollouts", "main_rollouts"):
        if given[name] is not None and given[name] == 1 and not given["true_values"]:
            raise ValueError(
                f"--{name.replace('_', '-')} {given[name]}: expected 0 for none, at least 2, or --true-values beside it"
            )
    for name in ("gradients", "line_checker"):
        if given["labels"] and given[name]:
            raise ValueError(f"--{name.replace('_', '-')} {given[name]}: not with --labels: {_NOT_OF_LABELS[name]}")
    if given["forms"] != list(FORMS) and not given["gradients"]:
        raise ValueError(f"--forms {shlex.join(given['forms'])}: needs --gradients N, the prompts they are compared on")
    if given["dtype"] not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {given['dtype']}: expected auto, float32, bfloat16 or float16")
    if given["config"] is not None and not given["config"].is_file():
        raise ValueError(f"--config {given['config']}: no such file")


def _settings(file: Path | None, overrides: Sequence[str]) -> RREDCoTConfig:
    """The block of a YAML file with overrides on top, checked by the plugin's own schema."""
    try:
        block = OmegaConf.load(file) if file is not None else OmegaConf.create()
        # A whole config of a run has the block inside.
        for key in PREFIX.split("."):
            if isinstance(block, type(OmegaConf.create())) and key in block:
                block = block[key]
        plain = [each.removeprefix("+").removeprefix(f"{PREFIX}.") for each in overrides]
        for each in plain:
            if "=" not in each:
                raise ValueError(f"--set {each!r}: expected KEY=VALUE, e.g. segmentation.min_tokens=4")
        merged = OmegaConf.merge(block, OmegaConf.from_dotlist(plain))
        container = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"--config or --set: {error}") from error
    if not isinstance(container, dict):
        raise ValueError(f"--config {file}: expected a block of settings")
    return parse({str(key): value for key, value in container.items()})


def _pairs(entries: Sequence[str], name: str) -> dict[str, Any]:
    if any("=" not in entry for entry in entries):
        raise ValueError(f"{name} {' '.join(entries)}: expected KEY=VALUE")
    container = OmegaConf.to_container(OmegaConf.from_dotlist(list(entries)))
    return {str(key): value for key, value in container.items()} if isinstance(container, dict) else {}

"""The command line of the bench: everything that can be wrong with it is said before a model is loaded."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rredcot_verl.analyze.budget import parse_duration
from rredcot_verl.analyze.cuttings import Cutting, parse_cuttings
from rredcot_verl.config.schema import PREFIX, RREDCoTConfig, parse

PROBES, HIDDEN = "probes", "hidden"
METHODS: dict[str, tuple[str, ...]] = {
    "rredcot": (PROBES,),
    "vps": (PROBES,),
    "mig": (PROBES,),
    "vineppo": (),
    "attention_attribution": ("attention_attribution",),
    "gradient_attribution": ("input_x_gradient", "integrated_gradients"),
    "leave_one_out": ("leave_one_out",),
    "hidden": (HIDDEN,),
}
"""By estimator (or `hidden`, the readout), what has to be measured for it; continuations are, for the gold, always."""


@dataclass(frozen=True)
class Options:
    """What the user asked for, checked.

    Attributes:
        arguments: The command line as parsed.
        settings: The `algorithm.rredcot` block.
        cuttings: The first one is the main one.
        measured: What is measured besides continuations.
        reward_options: Keyword arguments of the verifier.
        template_options: Keyword arguments of the chat template.
        budget_s: Wall time in seconds, None for any.
    """

    arguments: argparse.Namespace
    settings: RREDCoTConfig
    cuttings: list[Cutting]
    measured: tuple[str, ...]
    reward_options: dict[str, Any]
    template_options: dict[str, Any]
    budget_s: float | None

    @property
    def num_rollouts(self) -> tuple[int, int]:
        """Continuations of a state of the main cutting, and of any other state."""
        main = self.arguments.main_rollouts
        return self.arguments.rollouts if main is None else main, self.arguments.rollouts

    def unread(self) -> list[str]:
        """Blocks that were changed and do not matter here: the bench has its own rows for what they say."""
        default = RREDCoTConfig()
        found = [
            name for name in ("credit", "readout", "traces") if getattr(self.settings, name) != getattr(default, name)
        ]
        names = ("engine", "share_prefix", "form", "calibration", "smoothing", "proposals", "max_proposals")
        value = self.settings.self_value
        return found + [
            f"self_value.{name}" for name in names if getattr(value, name) != getattr(default.self_value, name)
        ]

    def identity(self, model_fingerprint: str) -> dict[str, Any]:
        """What must be equal for two calls to go on with one measurement."""
        chosen = self.arguments
        # Not the number of prompts: more of them may be added. A trace more would change what its group knows.
        names = (
            "prompts traces group_size temperature max_response_tokens reward_function "
            "data_source line_checker temperatures rollouts main_rollouts layers dim dtype seed gradients"
        ).split()
        return {
            "model": model_fingerprint,
            **{name: getattr(chosen, name) for name in names},
            "num_traces": chosen.num_traces if chosen.traces else None,
            "settings": self.settings.model_dump(mode="json"),
            "cuttings": [cutting.name for cutting in self.cuttings],
            "measured": list(self.measured),
            "reward_options": self.reward_options,
            "template_options": self.template_options,
        }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rredcot_verl.analyze",
        description="Compares ways to give credit to segments, offline, on a model and its traces: values and credit "
        "by every method, against Monte Carlo. Writes results.json, tables.md and report.html. The same command goes "
        "on where it stopped.",
    )
    _add_inputs(parser)
    _add_measures(parser)
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="HuggingFace folder of the policy")
    add("--out", required=True, type=Path, metavar="DIR", help="folder of measurements and results")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", metavar="FILE", help="parquet or JSON lines: verl's rows, or prompt, ground_truth")
    source.add_argument(
        "--traces",
        nargs="+",
        metavar="PATH",
        help="verl's rollout dumps, traces/<step>.jsonl of a run, or JSON lines with prompt, response, ground_truth; "
        "text is tokenised again, which may differ from what was sampled",
    )
    add("--num-prompts", type=int, default=64, metavar="N", help="prompts sampled from (default: 64)")
    add("--num-traces", type=int, default=512, metavar="N", help="with --traces: most traces (default: 512)")
    add("-n", "--group-size", type=int, default=8, metavar="N", help="responses a prompt (default: 8)")
    add("--temperature", type=float, default=1.0, help="sampling temperature (default: 1)")
    add("--max-response-tokens", type=int, default=1024, metavar="N", help="longest response (default: 1024)")
    add(
        "--reward-function",
        metavar="NAME",
        help="verifier as verl names it: PATH[:FUNCTION] or pkg://MODULE[:FUNCTION]"
        "; plain or async; default: verl's own, by data_source",
    )
    add(
        "--reward-set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="keyword arguments of the verifier",
    )
    add("--data-source", default="", help="with --traces: data_source where a row has none")
    add(
        "--template-set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="arguments of the chat template",
    )
    add("--line-checker", metavar="MODULE:FUNCTION", help="judges the lines of a response, as in rredcot_verl.report")


def _add_measures(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help=f"YAML with the {PREFIX} block")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help=f"settings under {PREFIX}, e.g. segmentation.min_tokens=4",
    )
    add(
        "--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=f"of: {', '.join(METHODS)} (default: all)"
    )
    add(
        "--cuttings",
        nargs="+",
        metavar="METHOD-N",
        help="ways to cut, the main one first, e.g. keyword_entropy-8 fixed-8 (default: the settings' own and others)",
    )
    add(
        "--temperatures",
        nargs="+",
        type=float,
        metavar="T",
        help="of the probes, the main one first (default: the sampling temperature)",
    )
    add("--rollouts", type=int, default=16, metavar="N", help="continuations of a state (default: 16)")
    add("--main-rollouts", type=int, metavar="N", help="the same for states of the main cutting (default: as others)")
    add("--layers", nargs="+", default=["-2"], metavar="L", help="layers of hidden states, or all (default: -2)")
    add("--dim", type=int, default=64, help="dimensions kept of a hidden state (default: 64)")
    add("--gradients", type=int, default=0, metavar="N", help="traces whose gradients are sketched (default: 0)")
    add("--device", default="cpu", help="e.g. cpu or cuda:0 (default: cpu)")
    add("--dtype", default="auto", help="float32, bfloat16, float16 or auto: float32 on a CPU, else bfloat16")
    add("--batch-tokens", type=int, default=65536, metavar="N", help="tokens of a sampling batch (default: 65536)")
    add("--pack-tokens", type=int, default=4096, metavar="N", help="tokens of a forward pass (default: 4096)")
    add("--seed", type=int, default=0, help="of sampling, projections and resampling (default: 0)")
    add("--budget", metavar="TIME", help="wall time of measuring, e.g. 30m or 2h (default: none)")
    add("--num-resamples", type=int, default=1000, metavar="N", help="of the bootstrap (default: 1000)")
    add("--title", help="heading of the page (default: the model's folder)")


def read_options(arguments: Sequence[str] | None = None) -> Options:
    """Parse and check the command line.

    Raises:
        ValueError: Whatever can be found wrong without a model.
        SystemExit: argparse's own complaints, and `--help`.
    """
    chosen = build_parser().parse_args(arguments)
    chosen.command = "python -m rredcot_verl.analyze " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    _check_numbers(chosen)
    settings = _settings(chosen.config, chosen.overrides)
    unknown = [name for name in chosen.methods if name not in METHODS]
    if unknown:
        raise ValueError(f"--methods {' '.join(unknown)}: unknown; known: {', '.join(METHODS)}")
    if settings.attribution.target != "own":
        raise ValueError(
            f"--set attribution.target={settings.attribution.target}: the bench weighs the traces' own answers"
        )
    if chosen.temperatures is None:
        chosen.temperatures = [chosen.temperature]
    measured = tuple(dict.fromkeys(what for name in chosen.methods for what in METHODS[name]))
    return Options(
        chosen,
        settings,
        parse_cuttings(chosen.cuttings, settings),
        measured,
        _pairs(chosen.reward_set, "--reward-set"),
        _pairs(chosen.template_set, "--template-set"),
        None if chosen.budget is None else parse_duration(chosen.budget),
    )


_AT_LEAST_ONE = "num_prompts num_traces group_size max_response_tokens dim batch_tokens pack_tokens num_resamples"


def _check_numbers(chosen: argparse.Namespace) -> None:
    for name in _AT_LEAST_ONE.split():
        _check(name, getattr(chosen, name), 1)
    for name, least in (("rollouts", 2), ("main_rollouts", 2), ("gradients", 0), ("seed", 0)):
        _check(name, getattr(chosen, name), least)
    for temperature in (chosen.temperature, *(chosen.temperatures or ())):
        if not temperature > 0:
            raise ValueError(f"--temperature {temperature}: expected a number above 0")
    if chosen.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {chosen.dtype}: expected auto, float32, bfloat16 or float16")
    if chosen.config is not None and not chosen.config.is_file():
        raise ValueError(f"--config {chosen.config}: no such file")


def _check(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least {least}")


def _settings(file: Path | None, overrides: Sequence[str]) -> RREDCoTConfig:
    """The block of a YAML file with overrides on top, checked by the plugin's own schema."""
    try:
        block = OmegaConf.load(file) if file is not None else OmegaConf.create()
        # A whole config of a run has the block inside.
        for key in PREFIX.split("."):
            if isinstance(block, type(OmegaConf.create())) and key in block:
                block = block[key]
        prefixes = ("+", f"{PREFIX}.")
        plain = list(overrides)
        for prefix in prefixes:
            plain = [each.removeprefix(prefix) for each in plain]
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

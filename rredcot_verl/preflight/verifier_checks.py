"""Checks of a run's verifier: can it be loaded, does it judge a right response so, does it look where the probes do."""

import asyncio
import contextlib
import importlib
import io
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rredcot_verl.config.schema import PREFIX, RREDCoTConfig
from rredcot_verl.data.tally import Tally
from rredcot_verl.preflight.findings import Findings
from rredcot_verl.preflight.quiet import quiet

_KEY = "reward.custom_reward_function"
_OURS = re.compile(r"rredcot_verl[./]rewards[./](math|code)(?:\.py)?$")
_TRIALS = {
    "math": ("\\boxed{1}", "1"),
    "code": ("```python\nprint(1)\n```", '{"kind": "stdin", "inputs": [""], "outputs": ["1\\n"]}'),
}
"""A right response to each verifier, and its ground truth."""


def verifier_of(config: DictConfig) -> str | None:
    """Which of this package's verifiers a run uses: `math`, `code`, or None for another one."""
    found = _OURS.search(str(OmegaConf.select(config, f"{_KEY}.path") or ""))
    return found.group(1) if found else None


def plain_options(node: Any) -> dict[str, Any]:
    """A block of the config as a dictionary; an empty one where it is not set."""
    options = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node or {})
    assert isinstance(options, dict)
    return {str(name): option for name, option in options.items()}


def check_loads(config: DictConfig, findings: Findings) -> bool:
    """The custom verifier, if there is one, can be loaded; whether that is so."""
    from verl.utils.import_utils import load_extern_object

    chosen = config.reward.custom_reward_function
    if not chosen.path:
        return True
    with quiet():
        try:
            load_extern_object(chosen.path, chosen.name)
        except (ImportError, FileNotFoundError, AttributeError, RuntimeError, SyntaxError) as error:
            findings.fault(f"{_KEY}: {chosen.path}:{chosen.name} cannot be loaded: {error}")
            return False
    return True


def check_verifier(config: DictConfig, settings: RREDCoTConfig | None, findings: Findings) -> None:
    """Where it is one of this package's: its options, that it can run, and its format of answers beside the probes'."""
    verifier = verifier_of(config)
    if verifier is not None:
        _try(config, verifier, findings)
    if verifier == "math" and settings is not None:
        key = f"{_KEY}.reward_kwargs.answer_format"
        verified, probed = OmegaConf.select(config, key) or "auto", settings.elicitation.format
        if verified != probed:
            # `auto` finds what the other one looks for, unless a response has both.
            add = findings.warn if "auto" in (verified, probed) else findings.fault
            add("answer_format", f"{key}={verified} and {PREFIX}.elicitation.format={probed}: give both the same")


def _try(config: DictConfig, verifier: str, findings: Findings) -> None:
    """Judge one right response with the run's own options: a misspelt one, or no sandbox, shows here."""
    from rredcot_verl.rewards.sandbox.client import SandboxError

    options = plain_options(OmegaConf.select(config, f"{_KEY}.reward_kwargs"))
    # The response tried holds no thinking.
    kwargs = {name: option for name, option in options.items() if name != "prompt_opens_thinking"}
    compute_score = importlib.import_module(f"rredcot_verl.rewards.{verifier}").compute_score
    response, ground_truth = _TRIALS[verifier]
    try:
        # In a thread of its own, as the caller's may have an event loop.
        with ThreadPoolExecutor(1) as threads:
            judging = threads.submit(lambda: asyncio.run(compute_score("", response, ground_truth, None, **kwargs)))
            result = judging.result()
    except ValueError as error:
        findings.fault("verifier_options", f"{_KEY}: {error}")
    except SandboxError as error:
        findings.fault("verifier_cannot_run", f"programs cannot be run here: {error}")
    else:
        # Another format of answers than the box is no fault.
        if verifier == "code" and result["acc"] != 1.0:
            late = " in time" if result["timed_out"] else ""
            text = f"a program that prints 1 did not pass its test{late} with reward_kwargs={options}"
            findings.fault("verifier_cannot_run", text)


def check_prompt(config: DictConfig, prompt: str, findings: Findings) -> None:
    """Where the verifier is one of this package's: whether a thinking block is open where a response begins.

    Args:
        config: verl's whole config.
        prompt: A prompt as the chat template writes it.
        findings: Gets what was found.
    """
    if verifier_of(config) is None:
        return
    options = plain_options(OmegaConf.select(config, f"{_KEY}.reward_kwargs"))
    tag, says = options.get("think_open", "<think>"), bool(options.get("prompt_opens_thinking", False))
    opens, key = prompt.rstrip().endswith(tag), f"{_KEY}.reward_kwargs.prompt_opens_thinking"
    if opens and not says:
        text = (
            f"the chat template ends a prompt with {tag}, so set ++{key}=true: what a truncated response only thought"
        )
        findings.fault("prompt_opens_thinking", f"{text} would count as its answer")
    if says and not opens:
        text = f"{key}=true, but no prompt ends with {tag}: a response without thinking would have no answer; remove it"
        findings.fault("prompt_opens_thinking", text)


def check_data_sources(config: DictConfig, data_sources: Iterable[str], findings: Findings) -> None:
    """Without a reward function of the user's, verl chooses one by data source and knows few of them."""
    own = any(OmegaConf.select(config, key) for key in (f"{_KEY}.path", "reward.reward_model.enable"))
    own_manager = OmegaConf.select(config, "reward.reward_manager.source") not in (None, "register")
    if own or own_manager or not config.get("reward"):
        return
    from verl.utils.reward_score import default_compute_score

    unknown = Tally()
    for source in sorted(data_sources):
        # Some of its functions print their own tracebacks for a ground truth that is no test.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                default_compute_score(source, "", "")  # type: ignore[no-untyped-call]
            except NotImplementedError:
                unknown.add("data_source", source)
            except Exception:  # noqa: S110
                # It has a function for this source, which wants another ground truth.
                pass
    text = (
        f"verl has no reward function for these data sources; set {_KEY}.path=pkg://rredcot_verl.rewards.math (or "
        ".code) and name=compute_score"
    )
    findings.fault("unknown_data_source", text, Tally(0, unknown.examples))

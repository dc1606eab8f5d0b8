"""Measuring: the traces first, then block by block of traces everything that is asked of each."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rredcot_verl.analyze.attribution import Attributor
from rredcot_verl.analyze.budget import Budget, Stopwatch, describe_duration
from rredcot_verl.analyze.cuttings import cut
from rredcot_verl.analyze.gradients import GradientSketcher
from rredcot_verl.analyze.hidden import HiddenReader, parse_layers
from rredcot_verl.analyze.inputs import GivenTrace, Problem, read_prompts, read_traces
from rredcot_verl.analyze.model import check_folder, fingerprint, load_policy, require_packing
from rredcot_verl.analyze.monte_carlo import MonteCarlo
from rredcot_verl.analyze.options import HIDDEN, Options
from rredcot_verl.analyze.phases import Done, Instruments, Phases
from rredcot_verl.analyze.probes import Prober
from rredcot_verl.analyze.records import GRADIENTS_FOLDER, HIDDEN_FOLDER, CuttingRecord, Measurements, TraceRecord
from rredcot_verl.analyze.run_facts import describe_run
from rredcot_verl.analyze.sampling import Sampler
from rredcot_verl.analyze.store import Store, check_identity, only_traces
from rredcot_verl.analyze.traces import PromptEncoder, TraceMaker, claim
from rredcot_verl.analyze.verifier import Verifier, load_function
from rredcot_verl.answers.grammar import formats_of
from rredcot_verl.probes.elicitation import Elicitation
from rredcot_verl.probes.vocabulary import Vocabulary
from rredcot_verl.report.line_checker import LineChecker, load_line_checker

_SHARE_OF_TRACES = 0.5
"""Of the budget at most, for making the traces."""
_SHORT_BLOCK_S, _LONG_BLOCK_S, _LARGEST_BLOCK = 10.0, 60.0, 64
"""A block of traces that took less is followed by one twice as large, one that took more by one half as large."""
_GIVEN_AT_ONCE = 16


@dataclass(frozen=True)
class Inputs:
    """What could be checked without a model.

    Attributes:
        folder: The model's.
        fingerprint: Tells it from another.
        problems: Prompts, one a group, in order.
        given: Traces, where they are given.
        verifier, line_checker: The task's functions.
    """

    folder: Path
    fingerprint: str
    problems: list[Problem]
    given: list[GivenTrace]
    verifier: Verifier
    line_checker: LineChecker | None

    def num_traces(self, group_size: int) -> int:
        """Traces asked for."""
        return len(self.given) or len(self.problems) * group_size


def check_inputs(options: Options) -> Inputs:
    """Find out what is wrong with the inputs before a model is loaded.

    Raises:
        ValueError: What, and what is expected.
    """
    chosen = options.arguments
    folder = check_folder(chosen.model)
    formats_of(options.settings.elicitation)
    verifier = Verifier(load_function(chosen.reward_function), options.reward_options)
    line_checker = load_line_checker(chosen.line_checker) if chosen.line_checker else None
    given: list[GivenTrace] = []
    if chosen.prompts:
        problems = read_prompts(chosen.prompts, chosen.num_prompts)
    else:
        given = read_traces(chosen.traces, chosen.data_source, chosen.num_traces)
        problems = list({trace.problem.group: trace.problem for trace in given}.values())
    _try(verifier, problems[0])
    found = fingerprint(folder)
    check_identity(chosen.out, options.identity(found))
    return Inputs(folder, found, problems, given, verifier, line_checker)


def _try(verifier: Verifier, problem: Problem) -> None:
    """A verifier that does not fit the data says so before a model is loaded."""
    try:
        verifier.rewards([claim(problem, "")])
    except (NotImplementedError, ImportError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"--reward-function: the verifier failed on an empty response to the first prompt "
            f"(data_source={problem.data_source!r}): {type(error).__name__}: {error}"
        ) from error


class Bench:
    """Measures traces of a model.

    Args:
        options: What the user asked for.
        inputs: From `check_inputs`.

    Raises:
        ValueError: The model cannot be loaded or measured.
    """

    def __init__(self, options: Options, inputs: Inputs) -> None:
        chosen, settings = options.arguments, options.settings
        self._options, self._inputs = options, inputs
        self._budget = Budget(options.budget_s)
        self._policy = policy = load_policy(inputs.folder, chosen.device, chosen.dtype)
        require_packing(policy)
        layers = parse_layers(chosen.layers, policy.num_layers)
        self._watch = watch = Stopwatch(policy.device)
        self._elicitation = elicitation = Elicitation(
            Vocabulary(policy.tokenizer, settings.segmentation.keywords), settings
        )
        self._sampler = Sampler(
            policy.model, policy.eos_token_ids, chosen.temperature, chosen.seed, max_batch_tokens=chosen.batch_tokens
        )
        limit, size, temperature = chosen.max_response_tokens, chosen.pack_tokens, chosen.temperature
        encoder = PromptEncoder(policy.tokenizer, options.template_options)
        self._maker = TraceMaker(
            policy, elicitation, inputs.verifier, inputs.line_checker, encoder, temperature, limit, watch
        )
        most = settings.monte_carlo.max_tokens
        self._instruments = Instruments(
            MonteCarlo(self._sampler, elicitation.vocabulary, inputs.verifier, limit, most, watch),
            Prober(policy, elicitation, settings, chosen.temperatures, size, watch),
            Attributor(policy, elicitation, settings.attribution, temperature, size, watch),
            HiddenReader(policy, layers, chosen.dim, chosen.seed, size, watch),
            GradientSketcher(policy, temperature, chosen.seed, watch) if chosen.gradients else None,
        )
        run = describe_run(options, policy, inputs.folder, inputs.fingerprint, layers)
        run["clock"] = "processor time" if watch.counts_processor_time else "wall time"
        self._store = Store(chosen.out, run)

    def run(self) -> Measurements:
        """Measure until everything is done or the budget is spent.

        Returns:
            The records of the traces that are whole.
        """
        try:
            self._make_traces()
            traces, phases = self._prepare()
            self._measure(traces, phases)
        finally:
            run = self._store.run
            run["seconds"] = _sum(run["seconds"], {**self._watch.seconds, "all": self._budget.spent})
            run["sampling"] = _sum(run["sampling"], vars(self._sampler.count))
            self._store.write_run()
        return self._finish(traces, phases)

    def _make_traces(self) -> None:
        store, group_size = self._store, self._options.arguments.group_size
        if not self._inputs.given:
            sizes = Counter(record.group for record in store.records().traces)
            store.keep_traces(lambda record: sizes[record.group] == group_size)
        present = store.records().traces
        for record in present:
            self._maker.remember(record)
        total = self._inputs.num_traces(group_size)
        with tqdm(total=total, initial=len(present), desc="traces", unit="trace") as bar:
            for num_made in self._given(len(present)) if self._inputs.given else self._sampled(len(present)):
                bar.update(num_made)
                if self._budget.seconds is not None and self._budget.spent > _SHARE_OF_TRACES * self._budget.seconds:
                    break
        self._tell_about_traces()

    def _tell_about_traces(self) -> None:
        if self._maker.encoder.num_approximate:
            self._note(f"{self._maker.encoder.num_approximate} prompts were tokenised without a chat template")
        if self._inputs.given:
            self._note(
                "the responses were tokenised again from text, so their tokens may not be those that were sampled"
            )
        if self._maker.num_other_rewards:
            self._note(
                f"{self._maker.num_other_rewards} given traces have another reward than the verifier gives; the "
                "verifier's is used"
            )

    def _given(self, num_present: int) -> Iterator[int]:
        for first in range(num_present, len(self._inputs.given), _GIVEN_AT_ONCE):
            fresh = list(self._maker.given(self._inputs.given[first : first + _GIVEN_AT_ONCE], first))
            self._store.add(fresh)
            yield len(fresh)

    def _sampled(self, num_present: int) -> Iterator[int]:
        chosen = self._options.arguments
        size = max(1, chosen.batch_tokens // (chosen.group_size * chosen.max_response_tokens))
        for first in range(num_present // chosen.group_size, len(self._inputs.problems), size):
            problems = self._inputs.problems[first : first + size]
            made = list(self._maker.sample(self._sampler, problems, first, chosen.group_size))
            # In order of their numbers: batches go by length.
            made.sort(key=lambda pair: pair[0].trace)
            self._store.add([record for record, _ in made])
            self._store.add([cost for _, cost in made])
            yield len(made)

    def _prepare(self) -> tuple[list[TraceRecord], Phases]:
        """The traces with their boundaries, and what is left to be measured of them."""
        found = self._store.records()
        done = Done.of(found)
        problems = {problem.group: problem for problem in self._inputs.problems}
        # The folder may hold traces of more prompts than this call asks for.
        asked = [trace for trace in found.traces if trace.group in problems]
        traces = [trace for trace in asked if trace.response_ids]
        if len(traces) < len(asked):
            self._note(f"{len(asked) - len(traces)} empty responses are left out")
        decode = self._elicitation.vocabulary.decode
        for trace in traces:
            ids = trace.response_ids
            for cutting in self._options.cuttings:
                key = (trace.trace, cutting.name)
                if key not in done.cuttings:
                    places = cut(cutting, self._elicitation, ids, trace.log_probs, trace.answer_start)
                    characters = [len(decode(ids[:place])) for place in places]
                    self._store.add([CuttingRecord(*key, places, characters)])
                    done.cuttings[key] = places
        phases = Phases(
            self._options,
            self._store,
            self._instruments,
            done,
            traces,
            problems,
            self._maker.answers,
            self._policy.max_length,
        )
        return traces, phases

    def _measure(self, traces: list[TraceRecord], phases: Phases) -> None:
        waiting = [trace for trace in traces if not phases.is_whole(trace)]
        size, per_trace, num_blocks = 1, 0.0, 0
        with tqdm(total=len(traces), initial=len(traces) - len(waiting), desc="measuring", unit="trace") as bar:
            while waiting:
                while size > 1 and not self._budget.allows(per_trace * size):
                    size //= 2
                if not self._budget.allows(per_trace):
                    break
                block, waiting = waiting[:size], waiting[size:]
                seconds = _measure_block(block, phases, bar)
                spent = sum(seconds.values())
                per_trace, num_blocks = spent / len(block), num_blocks + 1
                # The first block also warms up.
                if waiting and num_blocks == (1 if spent > _SHORT_BLOCK_S else 2):
                    bar.write(_estimate(seconds, len(block), len(waiting), self._budget), file=sys.stdout)
                if spent < _SHORT_BLOCK_S:
                    size = min(2 * max(size, 2), _LARGEST_BLOCK)
                elif spent > _LONG_BLOCK_S:
                    size = max(1, size // 2)

    def _finish(self, traces: list[TraceRecord], phases: Phases) -> Measurements:
        store, options = self._store, self._options
        whole = [trace for trace in traces if phases.is_whole(trace)]
        if options.unread():
            self._note(f"not read here, where every form has a row of its own: {', '.join(options.unread())}")
        if HIDDEN in options.measured:
            for cutting in options.cuttings:
                parts = [phases.hidden_part(trace, cutting.name) for trace in whole]
                store.write_arrays(HIDDEN_FOLDER, cutting.name, parts)
        sketched = [trace.trace for trace in whole if store.has_arrays(GRADIENTS_FOLDER, trace.trace)]
        parts = [store.arrays(GRADIENTS_FOLDER, trace) for trace in sketched]
        store.write_arrays(GRADIENTS_FOLDER, options.cuttings[0].name, parts)
        asked = self._inputs.num_traces(options.arguments.group_size)
        store.run["num_traces"] = {"asked": asked, "made": len(traces), "whole": len(whole)}
        store.write_run()
        return only_traces(store.records(), {trace.trace for trace in whole})

    def _note(self, text: str) -> None:
        if text not in self._store.run["notes"]:
            self._store.run["notes"] = [*self._store.run["notes"], text]
            tqdm.write(f"note: {text}", file=sys.stdout)


def _sum(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    return {name: before.get(name, 0) + now.get(name, 0) for name in {**before, **now}}


def _measure_block(block: list[TraceRecord], phases: Phases, bar: Any) -> dict[str, float]:
    """Measure what some traces lack; returns the seconds of each phase."""
    seconds = {}
    for phase in phases.phases:
        bar.set_postfix_str(phase.name)
        started = time.perf_counter()
        missing = [trace for trace in block if not phase.has(trace)]
        if missing:
            phase.run(missing)
        seconds[phase.name] = time.perf_counter() - started
    bar.update(len(block))
    return seconds


def _estimate(seconds: dict[str, float], num_traces: int, num_waiting: int, budget: Budget) -> str:
    """What is left to do, from the traces just measured: too much where larger batches are faster."""
    lines = [f"estimate for the {num_waiting} traces left, from the last {num_traces}:"]
    for name, spent in {**seconds, "all": sum(seconds.values())}.items():
        per_trace = spent / num_traces
        lines.append(f"  {name:24}{1000 * per_trace:8.0f} ms a trace{describe_duration(per_trace * num_waiting):>14}")
    if budget.seconds is not None:
        lines.append(f"  the budget leaves {describe_duration(max(0.0, budget.seconds - budget.spent))}")
    return "\n".join(lines)


def measure(options: Options) -> Measurements:
    """Measure what the options ask for.

    Returns:
        The records of the traces that are whole.

    Raises:
        ValueError: The options, the inputs or the model cannot be measured.
    """
    return Bench(options, check_inputs(options)).run()

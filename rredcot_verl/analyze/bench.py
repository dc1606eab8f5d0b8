"""Measuring: the traces first, then block by block of traces everything that is asked of each."""

import sys
from collections import Counter
from typing import Any

from tqdm import tqdm

from rredcot_verl.analyze.command_line import Options
from rredcot_verl.analyze.estimators import HIDDEN, PROBES
from rredcot_verl.analyze.labelled_sets import read_labelled
from rredcot_verl.analyze.measured_costs import CostMeasurement
from rredcot_verl.analyze.measured_gradients import measure_gradients
from rredcot_verl.analyze.measured_hidden import HiddenStateMeasurement, parse_layers
from rredcot_verl.analyze.measured_probes import ProbeMeasurement
from rredcot_verl.analyze.measured_rollouts import RolloutMeasurement
from rredcot_verl.analyze.measured_truth import TruthMeasurement, load_true_values
from rredcot_verl.analyze.measured_weights import WeightMeasurement
from rredcot_verl.analyze.measuring import Context, Measurement, Segments, complete, is_whole, measure_in_blocks
from rredcot_verl.analyze.policy import (
    PACK_TOKENS,
    check_folder,
    default_pack_tokens,
    fingerprint,
    load_policy,
    require_packing,
)
from rredcot_verl.analyze.prefix_sampler import Sampler
from rredcot_verl.analyze.problems import GivenTrace, Problem, read_prompts, read_traces
from rredcot_verl.analyze.records import Measurements, TraceRecord
from rredcot_verl.analyze.run_facts import describe_run
from rredcot_verl.analyze.store import Store, check_identity
from rredcot_verl.analyze.timing import Budget, Stopwatch
from rredcot_verl.analyze.trace_maker import TraceMaker
from rredcot_verl.analyze.verifier import Verifier, load_function
from rredcot_verl.answers.grammar import formats_of
from rredcot_verl.probes.elicitation import Elicitation
from rredcot_verl.probes.vocabulary import Vocabulary
from rredcot_verl.report.line_checker import load_line_checker

_SHARE_OF_TRACES = 0.5
"""Of the budget at most, for making the traces."""


def _read_inputs(options: Options) -> tuple[list[Problem], list[GivenTrace]]:
    """Prompts, one a group, in order; and the traces, where they are given."""
    if options.prompts:
        return read_prompts(options.prompts, options.num_prompts), []
    if options.labels:
        given = read_labelled(options.labels, options.labels_format, options.num_traces)
    else:
        given = read_traces(options.traces or [], options.data_source, options.num_traces)
    return list({trace.problem.group: trace.problem for trace in given}.values()), given


def _try(verifier: Verifier, problem: Problem) -> None:
    """A verifier that does not fit the data says so before a model is loaded."""
    try:
        verifier.rewards([(problem, "")])
    except (NotImplementedError, ImportError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"--reward-function: the verifier failed on an empty response to the first prompt "
            f"(data_source={problem.data_source!r}): {type(error).__name__}: {error}"
        ) from error


class Bench:
    """Measures traces of a model.

    Args:
        options: What the user asked for.

    Raises:
        ValueError: The inputs are wrong, which is said before the model is loaded; or it cannot be loaded or measured.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        folder = check_folder(options.model)
        formats_of(options.settings.elicitation)
        self._verifier = Verifier(load_function(options.reward_function), options.reward_options)
        line_checker = load_line_checker(options.line_checker) if options.line_checker else None
        self._true_value = load_true_values(options.true_values) if options.true_values else None
        self._problems, self._given = _read_inputs(options)
        if any(options.num_rollouts) or not self._given or not all(given.is_decided for given in self._given):
            _try(self._verifier, self._problems[0])
        identity = options.identity(fingerprint(folder))
        check_identity(options.out, identity)
        self._num_asked = len(self._given) or len(self._problems) * options.group_size
        self._budget = Budget(options.budget_s)
        self._policy = policy = load_policy(folder, options.device, options.dtype)
        require_packing(policy)
        # What keeps gradients needs more room.
        reads_alone = set(options.measured) <= {PROBES, HIDDEN}
        self._pack_tokens = options.pack_tokens or (default_pack_tokens(policy) if reads_alone else PACK_TOKENS)
        self._layers = parse_layers(options.layers, policy.num_layers)
        self._watch = watch = Stopwatch(policy.device)
        vocabulary = Vocabulary(policy.tokenizer, options.settings.segmentation.keywords, policy.eos_token_ids)
        self._elicitation = elicitation = Elicitation(vocabulary, options.settings)
        self._sampler = Sampler(
            policy.model, policy.eos_token_ids, options.temperature, options.seed, max_batch_tokens=options.batch_tokens
        )
        self._maker = TraceMaker(options, policy, elicitation, self._verifier, line_checker, watch, self._pack_tokens)
        run = describe_run(options, policy, folder, self._layers, identity)
        run["clock"] = "processor time" if watch.counts_processor_time else "wall time"
        self._store = Store(options.out, run)

    def run(self) -> Measurements:
        """Measure until everything is done or the budget is spent.

        Returns:
            The records of the traces that are whole.
        """
        try:
            self._make_traces()
            traces = self._traces()
            options, known = self._options, self._store.records()
            segments = Segments(
                options.cuttings,
                self._elicitation,
                options.max_response_tokens,
                known.cuttings,
                {label.trace: label.boundaries for label in known.labels},
            )
            complete(self._store, segments, traces)
            measurements = self._measurements(segments, traces)
            measure_in_blocks(self._store, measurements, traces, self._budget)
        finally:
            run = self._store.run
            run["seconds"] = _sum(run["seconds"], {**self._watch.seconds, "all": self._budget.spent})
            run["sampling"] = _sum(run["sampling"], self._sampler.count)
            self._store.write_run()
        return self._finish(traces, measurements)

    def _make_traces(self) -> None:
        store, options, given = self._store, self._options, self._given
        if not given:
            sizes = Counter(record.group for record in store.records().traces)
            store.keep_traces(lambda record: sizes[record.group] == options.group_size)
        present = store.records().traces
        for record in present:
            self._maker.remember(record)
        made: Any = (
            self._maker.read_given(given, len(present))
            if given
            else self._maker.sample(self._sampler, self._problems, len(present))
        )
        with tqdm(total=self._num_asked, initial=len(present), desc="traces", unit="trace") as bar:
            for records, others in made:
                # A trace that is there is not made again, so what belongs to it comes first.
                store.add([*others, *records])
                bar.update(len(records))
                if self._budget.seconds is not None and self._budget.spent > _SHARE_OF_TRACES * self._budget.seconds:
                    break
        if self._maker.encoder.num_approximate:
            self._note(f"{self._maker.encoder.num_approximate} prompts were tokenised without a chat template")
        if given and not options.labels:
            self._note(
                "the responses were tokenised again from text, so their tokens may not be those that were sampled"
            )
        if self._maker.num_other_rewards:
            self._note(
                f"{self._maker.num_other_rewards} given traces have another reward than the verifier gives; the "
                "verifier's is used"
            )

    def _traces(self) -> list[TraceRecord]:
        """The traces that this call asks for; the folder may hold those of more prompts."""
        groups = {problem.group for problem in self._problems}
        asked = [trace for trace in self._store.records().traces if trace.group in groups]
        traces = [trace for trace in asked if trace.response_ids]
        num_empty = len(asked) - len(traces)
        if num_empty:
            self._num_asked -= num_empty
            limit = f"--max-response-tokens {self._options.max_response_tokens}"
            too_long = f"traces of more tokens than the model or {limit} takes"
            self._note(f"{num_empty} {too_long if self._options.labels else 'empty responses'} are left out")
        return traces

    def _measurements(self, segments: Segments, traces: list[TraceRecord]) -> list[Measurement]:
        """What is asked of each trace, in the order in which it is measured."""
        options = self._options
        context = Context(
            self._policy,
            self._elicitation,
            options.settings,
            segments,
            {problem.group: problem for problem in self._problems},
            self._maker.answers,
            options.temperature,
            self._pack_tokens,
            self._watch,
        )
        probes = None
        if PROBES in options.measured:
            probes = ProbeMeasurement(context, traces, leave_own_out=bool(options.labels))
        hidden = HiddenStateMeasurement(context, self._layers, options.dim, options.seed)
        weights = [name for name in options.measured if name not in (PROBES, HIDDEN)]
        found: list[Measurement | None] = [
            RolloutMeasurement(
                context,
                self._sampler,
                self._verifier,
                options.max_response_tokens,
                options.num_rollouts,
                {problem.group for problem in self._problems[: options.rollout_prompts]},
            ),
            TruthMeasurement(context, self._true_value, traces) if self._true_value else None,
            probes,
            *(WeightMeasurement(context, name) for name in weights),
            hidden if HIDDEN in options.measured else None,
            # Of traces of others nothing is generated that a cost could be compared with.
            None if options.labels else CostMeasurement(hidden, probes),
        ]
        return [measurement for measurement in found if measurement is not None]

    def _finish(self, traces: list[TraceRecord], measurements: list[Measurement]) -> Measurements:
        store, options = self._store, self._options
        whole = [trace for trace in traces if is_whole(store, measurements, trace)]
        if options.unread():
            self._note(f"not read here, where every form has a row of its own: {', '.join(options.unread())}")
        for measurement in measurements:
            measurement.lay_out(store, whole)
        store.run["num_traces"] = {"asked": self._num_asked, "made": len(traces), "whole": len(whole)}
        store.write_run()
        kept = {trace.trace for trace in whole}
        found = store.records().where(lambda record: record.trace in kept)
        if options.gradients and whole:
            measure_gradients(self._policy, found, options)
        return found

    def _note(self, text: str) -> None:
        if text not in self._store.run["notes"]:
            self._store.run["notes"] = [*self._store.run["notes"], text]
            tqdm.write(f"note: {text}", file=sys.stdout)


def _sum(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    return {name: before.get(name, 0) + now.get(name, 0) for name in {**before, **now}}


def measure(options: Options) -> Measurements:
    """Measure what the options ask for.

    Returns:
        The records of the traces that are whole.

    Raises:
        ValueError: The options, the inputs or the model cannot be measured.
    """
    return Bench(options).run()

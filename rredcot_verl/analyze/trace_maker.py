"""The traces that are measured: sampled from the policy, or given as text and tokenised again."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rredcot_verl.analyze.command_line import Options
from rredcot_verl.analyze.given_tokens import GivenTokens, encode_steps
from rredcot_verl.analyze.policy import Policy, run_pack
from rredcot_verl.analyze.prefix_sampler import Request, Sampler
from rredcot_verl.analyze.problems import GivenTrace, Label, Problem
from rredcot_verl.analyze.records import CostRecord, LabelRecord, TraceRecord
from rredcot_verl.analyze.timing import Stopwatch
from rredcot_verl.analyze.verifier import Verifier
from rredcot_verl.probes.elicitation import Elicitation, ReadAnswer
from rredcot_verl.report.line_checker import LineChecker

SAMPLE_STREAM = 0
"""First number of the random streams of traces; that of their continuations is another."""
_SENTINEL = "rredcot-question"


class PromptEncoder:
    """Tokens of prompts.

    Args:
        tokenizer: The policy's.
        options: Keyword arguments of its chat template, e.g. `enable_thinking`.
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self.has_template = bool(tokenizer.chat_template)
        self._frame = self._template_around() if self.has_template else None
        self.num_approximate = 0

    def encode(self, problem: Problem) -> list[int]:
        """Prompt tokens of a problem, ready for generation."""
        if problem.messages and self.has_template:
            return self._apply(problem.messages)
        # A dump of verl holds the prompt with its template but without special tokens: look inside the template.
        question = self._inside_template(problem)
        if question is not None:
            return self._apply([{"role": "user", "content": question}])
        self.num_approximate += 1
        return list(self._tokenizer.encode(problem.question, add_special_tokens=False))

    def question(self, problem: Problem) -> str:
        """What the user asked, also of a prompt given with its template."""
        inside = self._inside_template(problem)
        return problem.question if inside is None else inside

    def _inside_template(self, problem: Problem) -> str | None:
        """The question of a prompt that is given as text with its template around it; None if it is not."""
        if problem.messages or self._frame is None:
            return None
        before, after = self._frame
        text = problem.question
        fits = text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)
        return text[len(before) : len(text) - len(after)] if fits else None

    def _apply(self, messages: Sequence[Any]) -> list[int]:
        return list(
            self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_dict=False, **self._options
            )
        )

    def _template_around(self) -> tuple[str, str] | None:
        """Text before and after the question of a chat with nothing else in it, as a verl dump shows it."""
        ids = self._apply([{"role": "user", "content": _SENTINEL}])
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        before, found, after = text.partition(_SENTINEL)
        return (before, after) if found else None


@dataclass
class TraceMaker:
    """Makes trace records.

    Attributes:
        options: What the user asked for.
        policy: The model.
        elicitation: Finds answers; reads every response once, in order.
        verifier: Gives the rewards.
        line_checker: Judges lines; None where the task cannot.
        watch: Where seconds go.
        max_pack_tokens: Most tokens of a forward pass over given traces.
        encoder: Makes prompt tokens.
        num_other_rewards: Given traces whose reward was not what the verifier says.
        answers: What was read of each trace, by number.
    """

    options: Options
    policy: Policy
    elicitation: Elicitation
    verifier: Verifier
    line_checker: LineChecker | None
    watch: Stopwatch
    max_pack_tokens: int
    encoder: PromptEncoder = dataclasses.field(init=False)
    num_other_rewards: int = 0
    answers: dict[int, ReadAnswer | None] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.encoder = PromptEncoder(self.policy.tokenizer, self.options.template_options)

    def _read(self, trace: int, response_ids: list[int], prompt_ids: list[int]) -> ReadAnswer | None:
        self.answers[trace] = self.elicitation.read(response_ids, prompt_ids)
        self.elicitation.remember(self.answers[trace])
        return self.answers[trace]

    def remember(self, record: TraceRecord) -> None:
        """Read a trace of an earlier call, as it was read then."""
        self._read(record.trace, record.response_ids, record.prompt_ids)

    def sample(
        self, sampler: Sampler, problems: Sequence[Problem], num_present: int
    ) -> Iterator[tuple[list[TraceRecord], list[CostRecord]]]:
        """Sample and verify the groups of the prompts that have none.

        Args:
            sampler: Of the policy.
            problems: All prompts; the traces of prompt n are numbered from `n * group_size`.
            num_present: Traces that are there, of whole groups.

        Yields:
            Some traces in the order of their numbers, and what generating each cost.
        """
        group_size = self.options.group_size
        num_prompts = max(1, self.options.batch_tokens // (group_size * self.options.max_response_tokens))
        for first in range(num_present // group_size, len(problems), num_prompts):
            numbers = range(first, min(first + num_prompts, len(problems)))
            prompts = [self.encoder.encode(problems[number]) for number in numbers]
            requests = [
                Request(prompt, group_size, self._room(prompt), (SAMPLE_STREAM, number))
                for number, prompt in zip(numbers, prompts, strict=True)
            ]
            traces, costs = [], []
            for batch in sampler.batches(requests):
                with self.watch.measure("generate"):
                    groups = sampler.sample([requests[place] for place in batch])
                per_token = self.watch.last / max(1, sum(len(each.token_ids) for group in groups for each in group))
                for place, group in zip(batch, groups, strict=True):
                    number, ids = numbers[place], [each.token_ids for each in group]
                    log_probs = [each.log_probs for each in group]
                    records = self._records(problems[number], number * group_size, prompts[place], ids, log_probs)
                    traces += records
                    sizes = [(record.trace, len(record.response_ids)) for record in records]
                    costs += [CostRecord(trace, "generate", per_token * size, size) for trace, size in sizes]
            # Batches go by length.
            yield sorted(traces, key=lambda each: each.trace), sorted(costs, key=lambda each: each.trace)

    def _room(self, prompt: Sequence[int]) -> int:
        limit = self.policy.max_length
        room = self.options.max_response_tokens
        if limit is not None:
            room = min(room, limit - len(prompt))
        if room < 1:
            raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room in a model of {limit} positions")
        return room

    def read_given(
        self, given: Sequence[GivenTrace], num_present: int
    ) -> Iterator[tuple[list[TraceRecord], list[LabelRecord]]]:
        """Tokenise and verify given traces; their log-probabilities are computed, as a dump has none.

        Args:
            given: All traces.
            num_present: How many of them are there.

        Yields:
            Some traces, as many as fit a forward pass, and the labels of those that have one.
        """
        part: list[GivenTokens] = []
        for number in range(num_present, len(given)):
            tokens = self._tokens(given[number], number)
            if part and sum(map(len, part)) + len(tokens) > self.max_pack_tokens:
                yield self._read_given(part)
                part = []
            part.append(tokens)
        if part:
            yield self._read_given(part)

    def _tokens(self, given: GivenTrace, number: int) -> GivenTokens:
        tokenizer = self.policy.tokenizer
        prompt_ids = self.encoder.encode(given.problem)
        if given.label is not None:
            return self._labelled_tokens(given, given.label, number, prompt_ids)
        response_ids = list(tokenizer.encode(given.response, add_special_tokens=False))
        if len(response_ids) > self.options.max_response_tokens:
            raise ValueError(
                f"--max-response-tokens {self.options.max_response_tokens}: trace {number} has {len(response_ids)} "
                "tokens, and its continuations would have no room; give the budget of the run it comes from"
            )
        if given.truncated is not True and len(response_ids) < self.options.max_response_tokens:
            # Dumps leave it out, and the policy had to write it.
            response_ids.append(tokenizer.eos_token_id)
        return GivenTokens(number, given, prompt_ids, response_ids)

    def _labelled_tokens(self, given: GivenTrace, label: Label, number: int, prompt_ids: list[int]) -> GivenTokens:
        """Without tokens of the response where they are too many."""
        try:
            ids, ends = encode_steps(self.elicitation.vocabulary, given.response, label.ends)
        except ValueError as error:
            raise ValueError(f"--labels: trace {number}: {error}") from error
        limit = self.policy.max_length
        length = len(ids) + 1
        if length > self.options.max_response_tokens or (limit is not None and len(prompt_ids) + length > limit):
            return GivenTokens(number, given, prompt_ids, [])
        return GivenTokens(number, given, prompt_ids, [*ids, self.policy.tokenizer.eos_token_id], [0, *ends, length])

    def _read_given(self, part: Sequence[GivenTokens]) -> tuple[list[TraceRecord], list[LabelRecord]]:
        read = [tokens for tokens in part if tokens.response_ids]
        sequences = [tokens.prompt_ids + tokens.response_ids for tokens in read]
        log_probs: dict[int, list[float]] = {}
        labels = []
        if read:
            with self.watch.measure("read_traces"):
                done = run_pack(self.policy.model, sequences)
                found = done.log_probs(sequences, self.options.temperature)
                is_labelled = any(tokens.given.label for tokens in read)
                entropies = done.entropies(sequences, self.options.temperature) if is_labelled else found
            for tokens, own, entropy in zip(read, found, entropies, strict=True):
                first = len(tokens.prompt_ids) - 1
                log_probs[tokens.number] = own[first:].tolist()
                if tokens.given.label is not None:
                    labels.append(tokens.label_record(tokens.given.label, entropy[first:]))
        return [self._given_record(tokens, log_probs.get(tokens.number, [])) for tokens in part], labels

    def _given_record(self, tokens: GivenTokens, log_probs: list[float]) -> TraceRecord:
        given, label = tokens.given, tokens.given.label
        reward = None
        if label is not None and label.final_correct is not None:
            reward = self.elicitation.config.self_value.reward_range[int(label.final_correct)]
        elif not tokens.response_ids:
            # Left out, so it needs no verdict.
            reward = self.elicitation.config.self_value.reward_range[0]
        (record,) = self._records(
            given.problem, tokens.number, tokens.prompt_ids, [tokens.response_ids], [log_probs], reward
        )
        self.num_other_rewards += given.reward is not None and abs(given.reward - record.reward) > 1e-6
        if label is None or label.first_wrong is None or not tokens.boundaries:
            return record if label is None else dataclasses.replace(record, lines_checked=True)
        decode, wrong = self.elicitation.vocabulary.decode, label.first_wrong
        start, end = (len(decode(tokens.response_ids[: tokens.boundaries[k]])) for k in (wrong, wrong + 1))
        return dataclasses.replace(record, wrong_from=start, wrong_to=end, lines_checked=True)

    def _check_rewards(self, rewards: Sequence[float]) -> None:
        low, high = self.elicitation.config.self_value.reward_range
        outside = [reward for reward in rewards if not low - 1e-6 <= reward <= high + 1e-6]
        if outside:
            raise ValueError(
                f"reward {outside[0]} lies outside self_value.reward_range=[{low}, {high}]; set the range that the "
                "verifier gives, e.g. --set self_value.reward_range=[-1,1]"
            )

    def _records(
        self,
        problem: Problem,
        first: int,
        prompt_ids: list[int],
        responses: Sequence[list[int]],
        log_probs: Sequence[list[float]],
        reward: float | None = None,
    ) -> list[TraceRecord]:
        texts = [self.elicitation.vocabulary.decode(ids) for ids in responses]
        if reward is None:
            with self.watch.measure("verify"):
                rewards = self.verifier.rewards([(problem, text) for text in texts])
            self._check_rewards(rewards)
        else:
            rewards = [reward] * len(texts)
        question = self.encoder.question(problem)
        ground_truth = None if problem.ground_truth is None else str(problem.ground_truth)
        records = []
        for place, (ids, text, reward) in enumerate(zip(responses, texts, rewards, strict=True)):
            answer = self._read(first + place, ids, prompt_ids)
            record = TraceRecord(
                trace=first + place,
                group=problem.group,
                prompt=question,
                response=text,
                prompt_ids=prompt_ids,
                response_ids=ids,
                log_probs=log_probs[place],
                reward=reward,
                ground_truth=ground_truth,
                answer_start=answer.start if answer else None,
            )
            records.append(self._with_lines(record))
        return records

    def _with_lines(self, record: TraceRecord) -> TraceRecord:
        if self.line_checker is None:
            return record
        lines = sorted(self.line_checker(record.prompt, record.response), key=lambda line: line.start)
        for line in lines:
            if not 0 <= line.start <= line.end <= len(record.response):
                raise ValueError(
                    f"--line-checker: offsets {line.start}..{line.end} do not lie in a response of "
                    f"{len(record.response)} characters (trace {record.trace})"
                )
        wrong = next((line for line in lines if not line.ok), None)
        return dataclasses.replace(
            record,
            wrong_from=wrong.start if wrong else None,
            wrong_to=wrong.end if wrong else None,
            lines_checked=bool(lines),
        )

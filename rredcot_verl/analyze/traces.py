"""The traces that are measured: sampled from the policy, or given as text and tokenised again."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rredcot_verl.analyze.budget import Stopwatch
from rredcot_verl.analyze.inputs import GivenTrace, Problem
from rredcot_verl.analyze.model import Policy, run_pack
from rredcot_verl.analyze.records import CostRecord, TraceRecord
from rredcot_verl.analyze.sampling import Request, Sampler
from rredcot_verl.analyze.verifier import Claim, Verifier
from rredcot_verl.probes.elicitation import Elicitation, ReadAnswer
from rredcot_verl.report.line_checker import LineChecker

SAMPLE_STREAM, ROLLOUT_STREAM = 0, 1
"""First number of the random streams of traces and of their continuations."""
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
        if not problem.messages and self._frame is not None:
            # A dump of verl holds the prompt with its template but without special tokens: look inside the template.
            before, after = self._frame
            text = problem.question
            if text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after):
                question = text[len(before) : len(text) - len(after)]
                return self._apply([{"role": "user", "content": question}])
        self.num_approximate += 1
        return list(self._tokenizer.encode(problem.question, add_special_tokens=False))

    def question(self, problem: Problem) -> str:
        """What the user asked, also of a prompt given with its template."""
        if problem.messages or self._frame is None:
            return problem.question
        before, after = self._frame
        text = problem.question
        fits = text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)
        return text[len(before) : len(text) - len(after)] if fits else text

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
        policy: The model.
        elicitation: Finds answers; reads every response once, in order.
        verifier: Gives the rewards.
        line_checker: Judges lines; None where the task cannot.
        encoder: Makes prompt tokens.
        temperature: Sampling temperature.
        max_response_tokens: Longest response.
        watch: Where seconds go.
        num_other_rewards: Given traces whose reward was not what the verifier says.
        answers: What was read of each trace, by number.
    """

    policy: Policy
    elicitation: Elicitation
    verifier: Verifier
    line_checker: LineChecker | None
    encoder: PromptEncoder
    temperature: float
    max_response_tokens: int
    watch: Stopwatch
    num_other_rewards: int = 0
    answers: dict[int, ReadAnswer | None] = dataclasses.field(default_factory=dict)

    def remember(self, record: TraceRecord) -> None:
        """Read a trace of an earlier call, as it was read then."""
        self.answers[record.trace] = self.elicitation.read(record.response_ids, record.prompt_ids)

    def sample(
        self, sampler: Sampler, problems: Sequence[Problem], first: int, group_size: int
    ) -> Iterator[tuple[TraceRecord, CostRecord]]:
        """Sample and verify the groups of some prompts.

        Args:
            sampler: Of the policy.
            problems: The prompts.
            first: Number of the first prompt; its traces are numbered from `first * group_size`.
            group_size: Responses a prompt.
        """
        prompts = [self.encoder.encode(problem) for problem in problems]
        requests = [
            Request(prompt, group_size, self._room(prompt), (SAMPLE_STREAM, first + place))
            for place, prompt in enumerate(prompts)
        ]
        for batch in sampler.batches(requests):
            with self.watch.measure("generate"):
                groups = sampler.sample([requests[number] for number in batch])
            num_tokens = sum(len(each.token_ids) for group in groups for each in group)
            per_token = self.watch.last / max(1, num_tokens)
            for number, group in zip(batch, groups, strict=True):
                records = self._records(
                    problems[number],
                    (first + number) * group_size,
                    prompts[number],
                    [each.token_ids for each in group],
                    [each.log_probs for each in group],
                )
                for record in records:
                    size = len(record.response_ids)
                    yield record, CostRecord(record.trace, "generate", per_token * size, size)

    def _room(self, prompt: Sequence[int]) -> int:
        limit = self.policy.max_length
        room = self.max_response_tokens if limit is None else min(self.max_response_tokens, limit - len(prompt))
        if room < 1:
            raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room in a model of {limit} positions")
        return room

    def given(self, traces: Sequence[GivenTrace], first: int) -> Iterator[TraceRecord]:
        """Tokenise and verify given traces; their log-probabilities are computed, as a dump has none.

        Args:
            traces: The traces.
            first: Number of the first.
        """
        tokenizer = self.policy.tokenizer
        for place, trace in enumerate(traces):
            prompt_ids = self.encoder.encode(trace.problem)
            response_ids = list(tokenizer.encode(trace.response, add_special_tokens=False))
            if len(response_ids) > self.max_response_tokens:
                raise ValueError(
                    f"--max-response-tokens {self.max_response_tokens}: trace {first + place} has {len(response_ids)} "
                    "tokens, and its continuations would have no room; give the budget of the run it comes from"
                )
            if trace.truncated is not True and len(response_ids) < self.max_response_tokens:
                # Dumps leave it out, and the policy had to write it.
                response_ids.append(tokenizer.eos_token_id)
            sequence = prompt_ids + response_ids
            with self.watch.measure("read_traces"):
                (log_probs,) = run_pack(self.policy.model, [sequence]).log_probs([sequence], self.temperature)
            own = log_probs[len(prompt_ids) - 1 :].tolist()
            (record,) = self._records(trace.problem, first + place, prompt_ids, [response_ids], [own])
            self.num_other_rewards += trace.reward is not None and abs(trace.reward - record.reward) > 1e-6
            yield record

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
    ) -> list[TraceRecord]:
        texts = [self.elicitation.vocabulary.decode(ids) for ids in responses]
        with self.watch.measure("verify"):
            rewards = self.verifier.rewards([claim(problem, text) for text in texts])
        self._check_rewards(rewards)
        question = self.encoder.question(problem)
        ground_truth = problem.ground_truth
        records = []
        for place, (ids, text, reward) in enumerate(zip(responses, texts, rewards, strict=True)):
            answer = self.answers[first + place] = self.elicitation.read(ids, prompt_ids)
            record = TraceRecord(
                trace=first + place,
                group=problem.group,
                prompt=question,
                response=text,
                prompt_ids=prompt_ids,
                response_ids=ids,
                log_probs=log_probs[place],
                reward=reward,
                ground_truth=None if ground_truth is None else str(ground_truth),
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


def claim(problem: Problem, response: str) -> Claim:
    """What the verifier is asked about a response to a problem."""
    return Claim(response, problem.data_source, problem.ground_truth, problem.extra_info)

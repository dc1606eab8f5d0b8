"""Checks of rows in verl's schema: what would fail, or silently train on nothing, a while after the start."""

import heapq
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rredcot_verl.answers.grammar import look_up
from rredcot_verl.data.findings import CheckReport, Finding, Tally
from rredcot_verl.data.lengths import (
    NoChatTemplate,
    NotRenderable,
    TemplateOverhead,
    check_chat_template,
    count_tokens,
    render,
)
from rredcot_verl.data.verify import why_unusable

GROUND_TRUTH = "reward_model.ground_truth"
MAX_MEASURED = 512
"""Prompts measured where `max_rows` bounds the costly checks: the longest ones by their bytes."""
MAX_UNUSABLE_SHARE = 0.1
"""Share of the ground truths tried from which unusable ones stop a run; fewer are a warning. Ours."""

_NOT_RENDERABLE = "prompt_not_renderable"
_QUESTIONS = ("problem", "question", "query", "instruction", "text", "messages", "input")
_ANSWERS = ("answer", "ground_truth", "final_answer", "solution", "target", "label", "tests")


@dataclass
class RowFacts:
    """What a pass over the rows leaves for checks across files.

    Attributes:
        keys: Hash of each prompt's text, and the first row that had it.
        references: A sample of the rows' reference answers.
        num_overlong: Rows whose prompt is longer than allowed, as far as measured.
        sample_prompt: The first well-formed prompt that the chat template writes.
        data_sources: What the rows name as their data source.
    """

    keys: dict[int, int] = field(default_factory=dict)
    references: list[Any] = field(default_factory=list)
    num_overlong: int = 0
    sample_prompt: list[Any] | None = None
    data_sources: set[str] = field(default_factory=set)


class RowChecker:
    """One pass over rows; see `check_rows` for the arguments."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        verifier: str | None,
        max_prompt_length: int | None,
        prompt_key: str = "prompt",
        reference_key: str | None = None,
        max_rows: int | None = None,
        source_key: str = "data_source",
        filters_overlong: bool = False,
        truncates: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        self._tokenizer, self._verifier, self._limit = tokenizer, verifier, max_prompt_length
        self._prompt_key, self._reference_key, self._source_key = prompt_key, reference_key, source_key
        self._max_rows, self._columns = max_rows, columns
        self._filters_overlong, self._truncates = filters_overlong, truncates
        self._template_kwargs = dict(template_kwargs or {})
        self._tallies: dict[str, Tally] = {}
        self._longest: list[tuple[int, int, list[Any]]] = []
        self._truths: list[tuple[int, Any]] = []
        self._num_truths = self._num_rendered = 0
        self._sampler = random.Random(0)
        self._overhead: TemplateOverhead | None = None
        self.facts = RowFacts()
        self.report = CheckReport()

    def run(self, rows: Iterable[Mapping[str, Any]]) -> CheckReport:
        """Check rows; the report."""
        measures = self._can_measure()
        for number, row in enumerate(rows):
            if number == 0 and self._lacks_columns(row):
                return self.report
            self._check_row(number, row, measures)
            self.report.num_rows = number + 1
        if not self.report.num_rows:
            self.report.errors.append(Finding("no_rows", 0, (), "the data is empty; expected at least one row"))
            return self.report
        self._check_lengths()
        self._close_tallies()
        self._check_ground_truths()
        return self.report

    def _can_measure(self) -> bool:
        if self._tokenizer is None:
            self.report.unchecked.append("chat template and prompt lengths: no tokenizer given")
            return False
        try:
            check_chat_template(self._tokenizer)
        except NoChatTemplate as error:
            self.report.errors.append(Finding("no_chat_template", 0, (), str(error)))
            return False
        self._overhead = TemplateOverhead(self._tokenizer, self._template_kwargs)
        return self._limit is not None

    def _lacks_columns(self, row: Mapping[str, Any]) -> bool:
        found = sorted(self._columns if self._columns is not None else row)
        expected = [self._prompt_key, self._source_key, "reward_model"]
        missing = [column for column in expected if column not in found]
        if not missing:
            return False
        lower = {column.lower(): column for column in found}
        question = next((lower[name] for name in _QUESTIONS if name in lower), None)
        answer = next((lower[name] for name in _ANSWERS if name in lower), None)
        likely = [f"{self._prompt_key} from {question!r}"] if question and self._prompt_key in missing else []
        likely += [f"{GROUND_TRUTH} from {answer!r}"] if answer and "reward_model" in missing else []
        expected_text = f"the rows have the columns {found}, expected {expected}; missing: {missing}"
        if likely:
            expected_text += f"; likely {', '.join(likely)}: scripts/prepare_math.py or prepare_code.py writes them"
        if self._prompt_key in missing and "prompt" in found:
            expected_text += f"; data.prompt_key={self._prompt_key}, but there is a column 'prompt'"
        self.report.errors.append(Finding("missing_columns", 0, (), expected_text))
        return True

    def _tally(self, kind: str, number: int, value: Any) -> None:
        self._tallies.setdefault(kind, Tally()).add(f"row {number}", value)

    def _check_row(self, number: int, row: Mapping[str, Any], measures: bool) -> None:
        prompt = _plain(row.get(self._prompt_key))
        if fault := why_no_prompt(prompt):
            self._tally("prompt_not_messages", number, f"{fault}: {prompt!r}")
        else:
            self._check_prompt(number, prompt, measures)
        source = row.get(self._source_key)
        if isinstance(source, str) and source:
            self.facts.data_sources.add(source)
        else:
            self._tally("missing_data_source", number, source)
        model = row.get("reward_model")
        truth = _plain(look_up(row, GROUND_TRUTH))
        if _is_empty(truth):
            self._tally("missing_ground_truth", number, model)
        else:
            self._sample_truth(number, truth)
        style = model.get("style") if isinstance(model, Mapping) else None
        if style not in ("rule", "model"):
            self._tally("odd_style", number, style)
        if self._reference_key is not None:
            references = _plain(look_up(row, self._reference_key))
            if _is_empty(references):
                self._tally("missing_reference", number, references)
            elif len(self.facts.references) < MAX_MEASURED:
                self.facts.references.append(references)

    def _check_prompt(self, number: int, prompt: Any, measures: bool) -> None:
        if prompt[-1]["role"] == "assistant":
            self._tally("prompt_ends_with_assistant", number, prompt[-1])
        text = " ".join(" ".join(_said(message).split()) for message in prompt).lower()
        first = self.facts.keys.setdefault(hash(text), number)
        if first != number:
            self._tally("duplicated_rows", number, f"as row {first}: {text}")
        if not measures or self._overhead is None or self._limit is None:
            self.facts.sample_prompt = self.facts.sample_prompt or prompt
            return
        self._num_rendered += 1
        try:
            bound = self._overhead.bound(prompt)
        except NotRenderable as error:
            self._tally(_NOT_RENDERABLE, number, error)
            return
        self.facts.sample_prompt = self.facts.sample_prompt or prompt
        if bound <= self._limit:
            return
        entry = (bound, number, prompt)
        if self._max_rows is None or len(self._longest) < MAX_MEASURED:
            heapq.heappush(self._longest, entry)
        else:
            heapq.heappushpop(self._longest, entry)

    def _sample_truth(self, number: int, truth: Any) -> None:
        """Keep all, or a fair sample of `max_rows` (reservoir)."""
        self._num_truths += 1
        if self._max_rows is None or len(self._truths) < self._max_rows:
            self._truths.append((number, truth))
            return
        place = self._sampler.randrange(self._num_truths)
        if place < self._max_rows:
            self._truths[place] = (number, truth)

    def _close_tallies(self) -> None:
        for kind, (severity, expected) in _EXPECTED.items():
            if kind in self._tallies:
                if kind == "missing_ground_truth" and self._verifier is None:
                    # A reward model or another function may need none.
                    severity = "warnings"
                if kind == _NOT_RENDERABLE and self._tallies[kind].count < self._num_rendered:
                    severity = "warnings"
                finding = self._tallies[kind].finding(kind, expected.format(reference_key=self._reference_key))
                getattr(self.report, severity).append(finding)

    def _check_lengths(self) -> None:
        if not self._longest:
            return
        self._longest.sort(key=lambda entry: (-entry[0], entry[1]))
        texts: dict[int, str] = {}
        for _, number, prompt in self._longest:
            try:
                texts[number] = render(self._tokenizer, prompt, self._template_kwargs)
            except NotRenderable as error:
                self._tally(_NOT_RENDERABLE, number, error)
        lengths = count_tokens(self._tokenizer, texts.values())
        limit = self._limit or 0
        measured = sorted(zip(lengths, texts, strict=True), reverse=True)
        overlong = Tally()
        for length, number in measured:
            if length > limit:
                overlong.add(f"row {number}", f"{length} tokens")
        if not overlong.count:
            return
        self.facts.num_overlong = overlong.count
        bounded = overlong.count == MAX_MEASURED and self._max_rows is not None
        count = f"at least {overlong.count}" if bounded else str(overlong.count)
        text = f"{count} prompts are longer than data.max_prompt_length={limit} tokens, the longest {measured[0][0]}; "
        harmless = self._filters_overlong or self._truncates
        text += _overlong_advice(self._filters_overlong, self._truncates)
        finding = Finding("overlong_prompts", overlong.count, tuple(overlong.examples), text)
        (self.report.warnings if harmless else self.report.errors).append(finding)

    def _check_ground_truths(self) -> None:
        if self._verifier is None:
            self.report.unchecked.append("whether the verifier can use the ground truths: it is none of this package's")
            return
        check = why_unusable(self._verifier)
        unusable = Tally()
        for number, truth in sorted(self._truths, key=lambda entry: entry[0]):
            if reason := _why_of_another_task(self._verifier, truth) or check(truth):
                unusable.add(f"row {number}", f"{reason}: {truth!r}")
        tried = f"{len(self._truths)} of {self._num_truths} ground truths tried with the {self._verifier} verifier"
        self.report.notes.append(tried)
        if unusable.count:
            expected = f"the {self._verifier} verifier cannot use the ground truth ({tried})"
            # Tests that cannot be read end a run when their row comes up; an answer is only never right.
            few = self._verifier == "math" and unusable.count < MAX_UNUSABLE_SHARE * len(self._truths)
            findings = self.report.warnings if few else self.report.errors
            findings.append(unusable.finding("unusable_ground_truth", expected))


def check_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    verifier: str | None,
    max_prompt_length: int | None,
    prompt_key: str = "prompt",
    reference_key: str | None = None,
    max_rows: int | None = None,
    **options: Any,
) -> CheckReport:
    """Check rows in verl's schema.

    Args:
        rows: The rows.
        tokenizer: A transformers tokenizer; None: chat template and lengths are not checked.
        verifier: `math` or `code`: the verifier that must be able to use the ground truths; None: another one.
        max_prompt_length: Longest prompt, in tokens; None: any.
        prompt_key: Column of the prompt.
        reference_key: Dotted path at which every row must have reference answers; None: none are needed.
        max_rows: Ground truths tried, a fair sample, and a bound of the prompts measured (the longest); None: all.
        **options: `source_key`, `filters_overlong`, `truncates`, `template_kwargs`, `columns` of `RowChecker`.

    Returns:
        Findings with counts and first examples.
    """
    checker = RowChecker(
        tokenizer,
        verifier=verifier,
        max_prompt_length=max_prompt_length,
        prompt_key=prompt_key,
        reference_key=reference_key,
        max_rows=max_rows,
        **options,
    )
    return checker.run(rows)


def why_no_prompt(prompt: Any) -> str | None:
    """Why something is no prompt that a chat template can write; None where it is one."""
    if isinstance(prompt, str):
        return "a text"
    if not isinstance(prompt, list | tuple) or not prompt:
        return f"{type(prompt).__name__}, or empty"
    for message in prompt:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not message["role"]:
            return "a message without role"
        calls_tools = message["role"] == "assistant" and message.get("content") is None and message.get("tool_calls")
        if not calls_tools and not isinstance(message.get("content"), str | list):
            return "a message without content"
    return None


def _said(message: Mapping[str, Any]) -> str:
    """What makes a message another one: its content, and the tools it calls."""
    content = message.get("content")
    calls = message.get("tool_calls")
    return ("" if content is None else str(content)) + (str(calls) if calls else "")


def _why_of_another_task(verifier: str, truth: Any) -> str | None:
    """Tests of programs given to the verifier of answers, which would take them for an answer."""
    if verifier == "math" and isinstance(truth, str) and truth.lstrip().startswith('{"kind"'):
        return "tests of a program; set reward.custom_reward_function.path=pkg://rredcot_verl.rewards.code"
    return None


def _plain(entry: Any) -> Any:
    """Lists for the arrays that some readers give."""
    return entry.tolist() if hasattr(entry, "tolist") else entry


def _is_empty(entry: Any) -> bool:
    if entry is None or (isinstance(entry, float) and entry != entry):
        return True
    if isinstance(entry, str):
        return not entry.strip()
    if isinstance(entry, list | tuple):
        return all(_is_empty(part) for part in entry)
    return False


def _overlong_advice(filters: bool, truncates: bool) -> str:
    if filters:
        return "data.filter_overlong_prompts is on, so verl leaves them out"
    advice = "set data.filter_overlong_prompts=True, raise data.max_prompt_length, or prepare with --max-prompt-length"
    if truncates:
        return f"verl's agent loop cuts their start off; to drop them, {advice}"
    return f"verl's agent loop would cut their start off without an error, whatever data.truncation says; {advice}"


_EXPECTED = {
    "prompt_not_messages": (
        "errors",
        'expected a list of messages such as [{{"role": "user", "content": "..."}}]; scripts/prepare_math.py and '
        "prepare_code.py write it",
    ),
    _NOT_RENDERABLE: (
        "errors",
        "the tokenizer's chat template refuses these prompts, and verl would end there; change them, or set "
        "actor_rollout_ref.model.custom_chat_template",
    ),
    "missing_data_source": ("errors", "expected a text that names the data set: verl chooses and groups rewards by it"),
    "missing_ground_truth": (
        "errors",
        'expected {{"style": "rule", "ground_truth": "..."}} in reward_model: without it no response can be verified',
    ),
    "missing_reference": (
        "errors",
        "nothing under algorithm.rredcot.self_value.reference_key={reference_key}, so that the rows' responses "
        "cannot be probed; drop these rows, or use self_value.proposals=group or union",
    ),
    "odd_style": ("warnings", "reward_model.style is usually 'rule' (a verifier) or 'model'"),
    "prompt_ends_with_assistant": ("warnings", "the last message is the assistant's own; expected the user's"),
    "duplicated_rows": ("warnings", "the same prompt again; scripts/prepare_math.py and prepare_code.py drop these"),
}

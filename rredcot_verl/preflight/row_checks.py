"""Checks of rows in verl's schema: what would fail, or silently train on nothing, a while after the start."""

import heapq
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rredcot_verl.answers.grammar import look_up
from rredcot_verl.config.blocks import GROUND_TRUTH
from rredcot_verl.data.lengths import (
    NoChatTemplate,
    NotRenderable,
    TemplateOverhead,
    check_chat_template,
    count_tokens,
    render,
)
from rredcot_verl.data.tally import Tally
from rredcot_verl.data.verify import why_unusable
from rredcot_verl.preflight.findings import Findings

MAX_TRIED = 256
"""Ground truths tried, for each of training and validation data: a fair sample."""
MAX_MEASURED = 512
"""Prompts measured: the longest ones by their bytes."""
MAX_UNUSABLE_SHARE = 0.1
"""Share of the ground truths tried from which unusable ones stop a run; fewer are a warning. Ours."""

_QUESTIONS = ("problem", "question", "query", "instruction", "text", "messages", "input")
_ANSWERS = ("answer", "ground_truth", "final_answer", "solution", "target", "label", "tests")
_FAULTS = {
    "prompt_not_messages": 'expected a list of messages such as [{"role": "user", "content": "..."}]; '
    "scripts/prepare_math.py and prepare_code.py write it",
    "prompt_not_renderable": "the tokenizer's chat template refuses these prompts, and verl would end there; change "
    "them, or set actor_rollout_ref.model.custom_chat_template",
    "missing_data_source": "expected a text that names the data set: verl chooses and groups rewards by it",
    "missing_ground_truth": 'expected {"style": "rule", "ground_truth": "..."} in reward_model: without it no response '
    "can be verified",
    "missing_reference": "nothing under algorithm.rredcot.self_value.reference_key=REFERENCE_KEY, so that the rows' "
    "responses cannot be probed; drop these rows, or use self_value.proposals=group or union",
}
_WARNINGS = {
    "odd_style": "reward_model.style is usually 'rule' (a verifier) or 'model'",
    "prompt_ends_with_assistant": "the last message is the assistant's own; expected the user's",
    "duplicated_rows": "the same prompt again; scripts/prepare_math.py and prepare_code.py drop these",
}


@dataclass(frozen=True)
class RowRules:
    """What a run needs of its rows.

    Attributes:
        verifier: `math` or `code`: the verifier that must be able to use the ground truths; None: another one.
        max_prompt_length: Longest prompt, in tokens.
        prompt_key: Column of the prompt.
        source_key: Column that names the data set.
        reference_key: Dotted path at which every row must have reference answers; None: none are needed.
        filters_overlong: verl leaves longer prompts out.
        truncates: verl is told to cut them.
        template_kwargs: What else the chat template is given.
        max_tried: Ground truths tried.
        max_measured: Prompts measured.
    """

    verifier: str | None
    max_prompt_length: int
    prompt_key: str = "prompt"
    source_key: str = "data_source"
    reference_key: str | None = None
    filters_overlong: bool = False
    truncates: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_tried: int = MAX_TRIED
    max_measured: int = MAX_MEASURED

    @property
    def columns(self) -> list[str]:
        """Columns that are read; names may be dotted."""
        required = [self.prompt_key, self.source_key, "reward_model"]
        key = self.reference_key
        return required if key is None or key.partition(".")[0] in required else [*required, key]


@dataclass
class RowFacts:
    """What a pass over the rows leaves for checks across files.

    Attributes:
        num_rows: Rows read.
        keys: Hash of each prompt's text, and the first row that had it.
        references: A sample of the rows' reference answers.
        num_overlong: Rows whose prompt is longer than allowed, as far as measured.
        sample_prompt: The first well-formed prompt that the chat template writes.
        data_sources: What the rows name as their data source.
    """

    num_rows: int = 0
    keys: dict[int, int] = field(default_factory=dict)
    references: list[Any] = field(default_factory=list)
    num_overlong: int = 0
    sample_prompt: list[Any] | None = None
    data_sources: set[str] = field(default_factory=set)


def check_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    rules: RowRules,
    findings: Findings,
    columns: Sequence[str] | None = None,
) -> RowFacts:
    """Check rows in verl's schema, in one pass.

    Without a tokenizer neither chat template nor lengths are checked; without `columns` those of the first row count.
    """
    checker = _RowChecker(tokenizer, rules, findings)
    for number, row in enumerate(rows):
        if number == 0 and (missing := _why_columns_missing(sorted(row if columns is None else columns), rules)):
            findings.fault("missing_columns", missing)
            return checker.facts
        checker.look_at(number, row)
    if checker.facts.num_rows:
        checker.conclude()
    else:
        findings.fault("no_rows", "the data is empty; expected at least one row")
    return checker.facts


def _why_columns_missing(found: list[str], rules: RowRules) -> str:
    key = rules.prompt_key
    expected = [key, rules.source_key, "reward_model"]
    missing = [column for column in expected if column not in found]
    if not missing:
        return ""
    lower = {column.lower(): column for column in found}
    question = next((lower[name] for name in _QUESTIONS if name in lower), None)
    answer = next((lower[name] for name in _ANSWERS if name in lower), None)
    likely = [f"{key} from {question!r}"] if question and key in missing else []
    likely += [f"{GROUND_TRUTH} from {answer!r}"] if answer and "reward_model" in missing else []
    text = f"the rows have the columns {found}, expected {expected}; missing: {missing}"
    if likely:
        text += f"; likely {', '.join(likely)}: scripts/prepare_math.py or prepare_code.py writes them"
    if key in missing and "prompt" in found:
        text += f"; data.prompt_key={key}, but there is a column 'prompt'"
    return text


class _RowChecker:
    """One pass over rows: counts faults, and keeps the prompts and ground truths to be looked at closely."""

    def __init__(self, tokenizer: Any, rules: RowRules, findings: Findings) -> None:
        self.facts = RowFacts()
        self._tokenizer, self._rules, self._findings = tokenizer, rules, findings
        self._tallies: defaultdict[str, Tally] = defaultdict(Tally)
        self._longest: list[tuple[int, int, list[Any]]] = []
        self._truths: list[tuple[int, Any]] = []
        self._num_truths = self._num_rendered = 0
        self._sampler = random.Random(0)
        self._overhead: TemplateOverhead | None = None
        if tokenizer is None:
            findings.skip("chat template and prompt lengths: no tokenizer given")
            return
        try:
            check_chat_template(tokenizer)
            self._overhead = TemplateOverhead(tokenizer, rules.template_kwargs)
        except NoChatTemplate as error:
            findings.fault("no_chat_template", str(error))

    def look_at(self, number: int, row: Mapping[str, Any]) -> None:
        rules, facts, where = self._rules, self.facts, f"row {number}"
        facts.num_rows = number + 1
        prompt = _plain(row.get(rules.prompt_key))
        if fault := why_no_prompt(prompt):
            self._tallies["prompt_not_messages"].add(where, f"{fault}: {prompt!r}")
        else:
            self._look_at_prompt(number, prompt)
        source = row.get(rules.source_key)
        if isinstance(source, str) and source:
            facts.data_sources.add(source)
        else:
            self._tallies["missing_data_source"].add(where, source)
        model = row.get("reward_model")
        truth = _plain(look_up(row, GROUND_TRUTH))
        if _is_empty(truth):
            self._tallies["missing_ground_truth"].add(where, model)
        else:
            self._sample_truth(number, truth)
        style = model.get("style") if isinstance(model, Mapping) else None
        if style not in ("rule", "model"):
            self._tallies["odd_style"].add(where, style)
        if rules.reference_key is not None:
            references = _plain(look_up(row, rules.reference_key))
            if _is_empty(references):
                self._tallies["missing_reference"].add(where, references)
            elif len(facts.references) < MAX_MEASURED:
                facts.references.append(references)

    def _look_at_prompt(self, number: int, prompt: Any) -> None:
        where = f"row {number}"
        if prompt[-1]["role"] == "assistant":
            self._tallies["prompt_ends_with_assistant"].add(where, prompt[-1])
        text = " ".join(" ".join(_said(message).split()) for message in prompt).lower()
        first = self.facts.keys.setdefault(hash(text), number)
        if first != number:
            self._tallies["duplicated_rows"].add(where, f"as row {first}: {text}")
        if self._overhead is None:
            return
        self._num_rendered += 1
        try:
            bound = self._overhead.bound(prompt)
        except NotRenderable as error:
            self._tallies["prompt_not_renderable"].add(where, error)
            return
        self.facts.sample_prompt = self.facts.sample_prompt or prompt
        if bound > self._rules.max_prompt_length:
            heapq.heappush(self._longest, (bound, number, prompt))
            if len(self._longest) > self._rules.max_measured:
                heapq.heappop(self._longest)

    def _sample_truth(self, number: int, truth: Any) -> None:
        """Keep a fair sample (reservoir): tests of programs may hold megabytes."""
        self._num_truths += 1
        if len(self._truths) < self._rules.max_tried:
            self._truths.append((number, truth))
            return
        place = self._sampler.randrange(self._num_truths)
        if place < self._rules.max_tried:
            self._truths[place] = (number, truth)

    def conclude(self) -> None:
        """Measure and try what was kept, and report."""
        self._measure_prompts()
        for kind, expected in (_FAULTS | _WARNINGS).items():
            rows = self._tallies[kind]
            # A reward model or another function may need no ground truth.
            harmless = kind in _WARNINGS or (kind == "missing_ground_truth" and self._rules.verifier is None)
            harmless = harmless or (kind == "prompt_not_renderable" and rows.count < self._num_rendered)
            text = expected.replace("REFERENCE_KEY", str(self._rules.reference_key))
            self._findings.add("warning" if harmless else "fault", kind, text, rows)
        self._try_ground_truths()

    def _measure_prompts(self) -> None:
        rules = self._rules
        texts: dict[int, str] = {}
        for _, number, prompt in sorted(self._longest, key=lambda entry: (-entry[0], entry[1])):
            try:
                texts[number] = render(self._tokenizer, prompt, rules.template_kwargs)
            except NotRenderable as error:
                self._tallies["prompt_not_renderable"].add(f"row {number}", error)
        lengths = sorted(zip(count_tokens(self._tokenizer, texts.values()), texts, strict=True), reverse=True)
        overlong = Tally()
        for length, number in lengths:
            if length > rules.max_prompt_length:
                overlong.add(f"row {number}", f"{length} tokens")
        self.facts.num_overlong = overlong.count
        number_found = f"at least {overlong.count}" if overlong.count == rules.max_measured else f"{overlong.count}"
        text = (
            f"{number_found} prompts are longer than data.max_prompt_length={rules.max_prompt_length} tokens, the "
            f"longest {lengths[0][0] if lengths else 0}; {_overlong_advice(rules)}"
        )
        severe = not (rules.filters_overlong or rules.truncates)
        self._findings.add("fault" if severe else "warning", "overlong_prompts", text, overlong)

    def _try_ground_truths(self) -> None:
        verifier, num_tried = self._rules.verifier, len(self._truths)
        if verifier is None:
            self._findings.skip("whether the verifier can use the ground truths: it is none of this package's")
            return
        check = why_unusable(verifier)
        unusable = Tally()
        for number, truth in sorted(self._truths, key=lambda entry: entry[0]):
            if reason := _why_of_another_task(verifier, truth) or check(truth):
                unusable.add(f"row {number}", f"{reason}: {truth!r}")
        tried = f"{num_tried} of {self._num_truths} ground truths tried with the {verifier} verifier"
        self._findings.add("note", f"{self.facts.num_rows} rows, {tried}")
        # Tests that cannot be read end a run when their row comes up; an answer is only never right.
        few = verifier == "math" and unusable.count < MAX_UNUSABLE_SHARE * num_tried
        text = f"the {verifier} verifier cannot use the ground truth ({tried})"
        self._findings.add("warning" if few else "fault", "unusable_ground_truth", text, unusable)


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
    if isinstance(entry, list | tuple):
        return all(map(_is_empty, entry))
    if isinstance(entry, float):
        # NaN stands for nothing in columns that pandas wrote.
        return entry != entry
    return entry is None or (isinstance(entry, str) and not entry.strip())


def _overlong_advice(rules: RowRules) -> str:
    if rules.filters_overlong:
        return "data.filter_overlong_prompts is on, so verl leaves them out"
    advice = "set data.filter_overlong_prompts=True, raise data.max_prompt_length, or prepare with --max-prompt-length"
    if rules.truncates:
        return f"verl's agent loop cuts their start off; to drop them, {advice}"
    return f"verl's agent loop would cut their start off without an error, whatever data.truncation says; {advice}"

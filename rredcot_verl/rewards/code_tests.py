"""Tests of a program: what the ground truth of a code row holds."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from rredcot_verl.rewards.sandbox.literals import long_integers

_SHARED_KEYS = {"kind", "time_limit_s", "memory_limit_mb", "float_tolerance"}
_KEYS = {
    "stdin": _SHARED_KEYS | {"inputs", "outputs"},
    "call": _SHARED_KEYS | {"entry_point", "setup", "tests"},
}
OUTPUT_TOLERANCE = 1e-6
TOLERANCES = "a number from 0 to below 1, or null"


@dataclass(frozen=True)
class CodeTests:
    """The tests of one problem.

    Attributes:
        kind: `stdin`: the program is run once a test, its output is compared. `call`: each test is Python source that
            calls what the program defines.
        inputs: `stdin`: what each run reads.
        outputs: `stdin`: what each run must write.
        entry_point: `call`: name of the program's function or class; None where the tests name it themselves.
        setup: `call`: source run before each test, by the checker and not by the program.
        tests: `call`: one source a test; it passes when it ends without an exception.
        time_limit_s: Seconds a test may take; None leaves it to the verifier's option.
        memory_limit_mb: MiB the program may use; None leaves it to the verifier's option.
        float_tolerance: By how much, absolute or relative, a float of the program's may differ from the right one. A
            test that calls the program compares so with `==`, `!=` and `in`; members of sets, keys of dicts and what
            the test computes itself are compared exactly. None leaves it to the verifier's option.
    """

    kind: Literal["stdin", "call"]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    entry_point: str | None = None
    setup: str = ""
    tests: tuple[str, ...] = ()
    time_limit_s: float | None = None
    memory_limit_mb: int | None = None
    float_tolerance: float | None = None

    @property
    def tolerance(self) -> float:
        """`float_tolerance`, or what holds where nobody has chosen one."""
        if self.float_tolerance is not None:
            return self.float_tolerance
        return OUTPUT_TOLERANCE if self.kind == "stdin" else 0.0

    @property
    def num_tests(self) -> int:
        """How many tests there are."""
        return len(self.inputs) if self.kind == "stdin" else len(self.tests)

    def first(self, max_tests: int | None) -> "CodeTests":
        """The first `max_tests` tests; None: all."""
        return replace(
            self, inputs=self.inputs[:max_tests], outputs=self.outputs[:max_tests], tests=self.tests[:max_tests]
        )

    def to_json(self) -> str:
        """The ground truth that `parse_tests` reads."""
        fields: dict[str, Any] = {"kind": self.kind}
        if self.kind == "stdin":
            fields |= {"inputs": list(self.inputs), "outputs": list(self.outputs)}
        else:
            fields |= {"entry_point": self.entry_point, "setup": self.setup, "tests": list(self.tests)}
        own = {key: getattr(self, key) for key in ("time_limit_s", "memory_limit_mb", "float_tolerance")}
        fields |= {key: choice for key, choice in own.items() if choice is not None}
        return json.dumps(fields, ensure_ascii=False)


def parse_tests(ground_truth: str | Mapping[str, Any]) -> CodeTests:
    """Read the tests of a code row.

    Args:
        ground_truth: JSON text, or what it decodes to:
            `{"kind": "stdin", "inputs": ["1 2\\n"], "outputs": ["3\\n"]}` or
            `{"kind": "call", "entry_point": "add", "setup": "", "tests": ["assert add(1, 2) == 3"]}`, each with
            `time_limit_s`, `memory_limit_mb` and `float_tolerance` if the problem has its own.

    Raises:
        ValueError: It is none of these; the message says which key, what was found and what is allowed.
    """
    fields = _as_mapping(ground_truth)
    kind = fields.get("kind")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(f"tests: kind={_short(kind)} is not allowed; allowed: 'stdin', 'call'")
    unknown = sorted(str(key) for key in fields if key not in _KEYS[kind])
    if unknown:
        raise ValueError(f"tests of kind {kind!r}: unknown keys {unknown}; allowed: {sorted(_KEYS[kind])}")
    limits: dict[str, Any] = {
        "time_limit_s": _limit(fields, "time_limit_s"),
        "memory_limit_mb": _limit(fields, "memory_limit_mb"),
        "float_tolerance": fields.get("float_tolerance"),
    }
    if not is_tolerance(limits["float_tolerance"]):
        raise ValueError(f"tests: float_tolerance={_short(limits['float_tolerance'])}; allowed: {TOLERANCES}")
    if limits["memory_limit_mb"] is not None:
        limits["memory_limit_mb"] = math.ceil(limits["memory_limit_mb"])
    if kind == "call":
        return _call_tests(fields, limits)
    inputs, outputs = _texts(fields, "inputs"), _texts(fields, "outputs")
    if len(inputs) != len(outputs):
        raise ValueError(f"tests: {len(inputs)} inputs but {len(outputs)} outputs; one output an input is needed")
    return CodeTests(kind="stdin", inputs=inputs, outputs=outputs, **limits)


def _call_tests(fields: Mapping[str, Any], limits: dict[str, Any]) -> CodeTests:
    entry_point, setup = fields.get("entry_point"), fields.get("setup")
    if entry_point is not None and not (isinstance(entry_point, str) and entry_point.isidentifier()):
        raise ValueError(f"tests: entry_point={_short(entry_point)} is not a Python name; allowed: a name, or null")
    setup = "" if setup is None else setup
    if not isinstance(setup, str):
        raise ValueError(f"tests: setup={_short(setup)} is not a text; allowed: Python source")
    tests = _texts(fields, "tests")
    _compile("setup", setup)
    for number, test in enumerate(tests):
        _compile(f"tests[{number}]", test)
    return CodeTests(kind="call", entry_point=entry_point, setup=setup, tests=tests, **limits)


def _as_mapping(ground_truth: object) -> Mapping[str, Any]:
    if isinstance(ground_truth, str):
        try:
            ground_truth = json.loads(ground_truth)
        except ValueError as error:
            raise ValueError(f"tests: the ground truth is not JSON ({error}): {_short(ground_truth)}") from error
        except RecursionError as error:
            raise ValueError("tests: the ground truth is JSON nested too deeply") from error
    if not isinstance(ground_truth, Mapping):
        raise ValueError(f"tests: the ground truth is {_short(ground_truth)}; allowed: a JSON object with a 'kind'")
    return ground_truth


def _texts(fields: Mapping[str, Any], key: str) -> tuple[str, ...]:
    texts: Any = fields.get(key)
    if hasattr(texts, "tolist"):
        texts = texts.tolist()
    if not isinstance(texts, (list, tuple)) or not texts:
        raise ValueError(f"tests: {key}={_short(texts)}; allowed: a list of at least one text")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"tests: {key}[{number}]={_short(text)} is not a text")
    return tuple(texts)


def _limit(fields: Mapping[str, Any], key: str) -> float | None:
    limit: Any = fields.get(key)
    if limit is None:
        return None
    is_number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
    if not is_number or not math.isfinite(limit) or limit <= 0:
        raise ValueError(f"tests: {key}={_short(limit)}; allowed: a number above 0")
    return float(limit)


def is_tolerance(given: Any) -> bool:
    """Whether a value is one of `TOLERANCES`."""
    return given is None or (isinstance(given, (int, float)) and not isinstance(given, bool) and 0 <= given < 1)


def _compile(where: str, source: str) -> None:
    try:
        with long_integers():
            compile(source, where, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"tests: {where} is not Python source: {error}") from error


def _short(found: object, width: int = 80) -> str:
    text = repr(found)
    return text if len(text) <= width else text[: width - 3] + "..."

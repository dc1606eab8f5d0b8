"""math-verify's judgement of two answers, for a process of its own: sympy may hang here, and imports take a second."""

import contextlib
import logging
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Eq, Float, I, Integer, MatrixBase, Pow, Product, Rational, Sum, Symbol, sstr
from sympy.core.relational import Relational

from rredcot_verl.rewards.math_equivalence import Verdict, simplified
from rredcot_verl.rewards.quantities import DECIMAL_PLACES, RELATIVE_TOLERANCE, parse_quantity

_LATEX = LatexExtractionConfig(boxed_match_priority=-1)
# sympy evaluates 9^{9^9} digit by digit: no canonical form is worth that.
_MAX_EXPONENT = 100
_MAX_NODES = 60
_LAST_PLACE = Rational(1, 2 * 10**DECIMAL_PLACES)
# What remains of a difference that is none: sympy takes up to 100 digits for one that may be none.
_ROUNDING = Rational(1, 10**60)
# math-verify warns once a process that its own timeout, a signal, is off: the process itself is killed here.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def decide_with_library(golds: list[str], parts: list[str]) -> Verdict:
    """Compare answers that the exact rules do not decide.

    Args:
        golds: Ground truths; any of them is right.
        parts: The response's answer; several are one answer, the list of them.

    Returns:
        The verdict; not equal where either side cannot be read.
    """
    parsed = parse_answer(", ".join(simplified(part) for part in parts))
    if parsed is None:
        return Verdict(False, simplified(parts[0]))
    is_equal = any(_equal(gold, parsed) for gold in map(parse_answer, golds) if gold is not None)
    return Verdict(is_equal, canonical_text(parsed))


def parse_answer(answer: str) -> Basic | MatrixBase | None:
    """Parse an answer, None if the library cannot read it."""
    text = simplified(answer).replace("degrees", "").replace("$", "")
    text = text.rstrip(" %") if text.endswith("%") else text
    if not text.strip():
        return None
    found: list[Any] = parse(f"${text}$", [_LATEX], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found and isinstance(found[0], (Basic, MatrixBase)) else None


def _has_imaginary_unit(parsed: Any) -> bool:
    """Whether there is an i that does not count the terms of a sum: to the library it is a variable like another."""
    return any(symbol.name == "i" for symbol in parsed.free_symbols) and not parsed.has(Sum, Product)


def _as_complex(parsed: Any) -> Any:
    """With the number i, and variables that may be complex."""
    return _replaced(
        parsed, {symbol: I if symbol.name == "i" else Symbol(symbol.name) for symbol in parsed.free_symbols}
    )


def _replaced(parsed: Any, rules: dict[Any, Any]) -> Any:
    if not any(parsed.has(old) for old in rules):
        # Untouched: sympy keeps one object of each kind, on which the library notes the order that was written.
        return parsed
    if not parsed.has(Relational) and not hasattr(parsed, "_unsorted_args"):
        return parsed.xreplace(rules)
    # Not evaluated: of "e^{i\pi} = -1" the right side counts, not that it holds.
    options = {"evaluate": False} if isinstance(parsed, Relational) else {}
    parts = getattr(parsed, "_unsorted_args", parsed.args)
    return parsed.func(*(_replaced(part, rules) for part in parts), **options)


def _equal(gold: Any, answer: Any) -> bool:
    is_complex = _has_imaginary_unit(gold) or _has_imaginary_unit(answer)
    if is_complex:
        gold, answer = _as_complex(gold), _as_complex(answer)
    distance = _distance(gold, answer)
    if distance is not None:
        difference, scale = distance
        # math-verify rounds to six places, which takes 1/2^99 for 1/2^98 and 1e-7 for 2e-7.
        if difference > scale * Rational(RELATIVE_TOLERANCE):
            return False
        if is_complex:
            # It rounds real numbers only.
            is_decimal = gold.has(Float) or answer.has(Float)
            return bool(difference <= (_LAST_PLACE if is_decimal else scale * _ROUNDING))
    if is_complex:
        gold, answer = _exact(gold), _exact(answer)
    return bool(verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None))


def _distance(gold: Any, answer: Any) -> tuple[Any, Any] | None:
    """How far two numbers are apart, and the larger one's size; None where either is no number."""
    if not all(isinstance(side, Basic) and getattr(side, "is_number", False) for side in (gold, answer)):
        return None
    try:
        difference, scale = abs((gold - answer).evalf(30)), max(abs(gold.evalf(30)), abs(answer.evalf(30)))
    except (TypeError, ValueError, ArithmeticError):
        return None
    return (difference, scale) if difference.is_comparable and scale.is_comparable else None


def _exact(parsed: Any) -> Any:
    return _replaced(parsed, {number: Rational(str(number)) for number in parsed.atoms(Float)})


def canonical_text(parsed: Any) -> str:
    """The canonical text of a parsed answer: sympy's, evaluated where that is cheap; of "x = 5" it is "5"."""
    if isinstance(parsed, Eq) and isinstance(parsed.lhs, Symbol):
        parsed = parsed.rhs
    if _has_imaginary_unit(parsed):
        parsed = _as_complex(parsed)
    if isinstance(parsed, Basic) and _is_small(parsed):
        # Whatever sympy cannot evaluate is printed as it is.
        with contextlib.suppress(ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
            parsed = _exact(parsed).doit()
    # (1, 2) may be a point as well as an open interval.
    text: str = sstr(parsed).replace("Interval.open(", "(")
    quantity = parse_quantity(text)
    return quantity.text() if quantity is not None else text


def _is_small(parsed: Basic) -> bool:
    num_nodes = 0
    for node in _nodes(parsed):
        num_nodes += 1
        if num_nodes > _MAX_NODES or (isinstance(node, Integer) and abs(node.p) > 10**20):
            return False
        if isinstance(node, Pow):
            exponent = node.exp
            if isinstance(exponent, (Rational, Float)):
                if abs(exponent) > _MAX_EXPONENT:
                    return False
            elif exponent.is_number:
                return False
        elif type(node).__name__ in ("factorial", "Sum", "Product", "Integral", "Limit", "binomial"):
            return False
    return True


def _nodes(parsed: Basic) -> Any:
    yield parsed
    for argument in parsed.args:
        if isinstance(argument, Basic):
            yield from _nodes(argument)

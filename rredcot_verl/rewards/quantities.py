"""Plain numbers with a unit, compared exactly: no floating point, no symbolic algebra."""

import dataclasses
import re
from dataclasses import dataclass
from fractions import Fraction

from rredcot_verl.rewards.units import Unit, parse_unit

# Decimals are compared as math-verify does: rounded to this many places.
DECIMAL_PLACES = 6
# Below this relative difference rounding may hide a difference; above it two numbers are not the same.
RELATIVE_TOLERANCE = Fraction(1, 10**5)
_MAX_DIGITS = 400
_MAX_EXPONENT = 400

_UNSIGNED = r"(?:\d+(?:\.\d*)?|\.\d+)"
_SIGN = r"(?P<sign>[-+]?)\s*"
_POWER = r"(?:\\times|\\cdot|\*|x|X)\s*10\s*\^\s*(?:\{\s*(?P<braced>[-+]?\d+)\s*\}|(?P<bare>[-+]?\d+))"
_FORMS = (
    # 2\frac{1}{2} and 2 1/2: mixed numbers.
    re.compile(_SIGN + r"(?P<whole>\d+)\s*\\frac\s*\{\s*(?P<top>\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}"),
    re.compile(_SIGN + r"(?P<whole>\d+)(?: +and)? +(?P<top>\d+)\s*/\s*(?P<bottom>\d+)(?![\d.,])"),
    re.compile(
        _SIGN + rf"\\frac\s*\{{\s*(?P<inner>-?)\s*(?P<top>{_UNSIGNED})\s*\}}\s*\{{\s*(?P<bottom>{_UNSIGNED})\s*\}}"
    ),
    re.compile(_SIGN + rf"(?P<top>{_UNSIGNED})\s*/\s*(?P<bottom>{_UNSIGNED})"),
    re.compile(_SIGN + rf"(?P<number>{_UNSIGNED})\s*{_POWER}"),
    re.compile(_SIGN + rf"(?P<number>{_UNSIGNED})[eE](?P<bare>[-+]?\d+)(?![\d.])"),
    re.compile(_SIGN + r"10\s*\^\s*(?:\{\s*(?P<braced>[-+]?\d+)\s*\}|(?P<bare>\d+))"),
    re.compile(_SIGN + rf"(?P<number>{_UNSIGNED})"),
)
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+(?:[^\d,].*)?", re.DOTALL)
_CURRENCY = re.compile(r"(?P<sign>[-+]?)\s*(?P<symbol>[$€£¥])\s*")
_PERCENT = re.compile(r"\s*(?:%|percent(?:age)?(?:\s+points?)?|per\s+cent|pct)(?![A-Za-z])\s*", re.IGNORECASE)
_MULTIPLIERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MULTIPLIER = re.compile(rf"\s*(?P<word>{'|'.join(_MULTIPLIERS)}|dozen)(?![A-Za-z])\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Quantity:
    """A number, with a unit if it has one.

    Attributes:
        number: Its exact value; of "50%" it is 50.
        is_decimal: Whether it was written with a decimal point, so that it may be rounded.
        is_percent: Whether a percent sign follows.
        unit: Its unit, None without one or where the words after it are not a known unit.
    """

    number: Fraction
    is_decimal: bool = False
    is_percent: bool = False
    unit: Unit | None = None

    def text(self) -> str:
        """The canonical form: "1/2" for 0.5 and \\frac{1}{2}, "5 km" for 5 kilometres."""
        number = str(self.number)
        if self.is_percent:
            return f"{number}%"
        return f"{number} {self.unit.name}" if self.unit is not None else number


def with_decimal_point(text: str) -> str:
    """A number with a decimal comma written with a point: 2,74 is 2.74 where a list cannot be meant."""
    return re.sub(r"([-+]?\d+),(\d+)", r"\1.\2", text) if _DECIMAL_COMMA.fullmatch(text) else text


def parse_quantity(text: str) -> Quantity | None:
    """Read a plain number, and the percent sign or unit after it.

    Args:
        text: An answer as `plain_latex` gives it.

    Returns:
        None for anything that is more than one plain number: expressions, equations, lists, algebra such as "5x".
    """
    if len(text) > _MAX_DIGITS:
        return None
    currency = _CURRENCY.match(text)
    rest = text if currency is None else currency.group("sign") + text[currency.end() :]
    for form in _FORMS:
        match = form.match(rest)
        number = None if match is None else _number_of(match)
        if match is not None and number is not None:
            is_decimal = "." in match.group()
            quantity = _with_unit(number, is_decimal, rest[match.end() :])
            if quantity is None or currency is None:
                return quantity
            if quantity.unit or quantity.is_percent:
                return quantity
            return dataclasses.replace(quantity, unit=parse_unit(currency.group("symbol"), is_attached=False))
    return None


def quantities_equal(gold: Quantity, answer: Quantity) -> bool:
    """Whether two quantities are the same.

    A percentage equals the same number without the sign (the question asked for percent) and a hundredth of it; only
    the hundredth where the ground truth is a number below 1 without the sign. Units count where both sides have one:
    they must measure the same thing and are converted. Decimals may be rounded to six places.
    """
    if gold.is_percent != answer.is_percent:
        percent, other = (gold, answer) if gold.is_percent else (answer, gold)
        if other.unit is not None:
            return False
        hundredth = Quantity(percent.number / 100, percent.is_decimal)
        is_asked_for = gold.is_percent or abs(gold.number) >= 1
        return (is_asked_for and _numbers_equal(percent, other)) or _numbers_equal(hundredth, other)
    if gold.unit is not None and answer.unit is not None and gold.unit != answer.unit:
        if gold.unit.dimension != answer.unit.dimension:
            return False
        gold = Quantity(gold.number * gold.unit.factor, gold.is_decimal)
        answer = Quantity(answer.number * answer.unit.factor, answer.is_decimal)
    return _numbers_equal(gold, answer)


def _numbers_equal(one: Quantity, other: Quantity) -> bool:
    if one.number == other.number:
        return True
    if not (one.is_decimal or other.is_decimal):
        return False
    difference = abs(one.number - other.number)
    if difference > RELATIVE_TOLERANCE * max(abs(one.number), abs(other.number)):
        return False
    return round(one.number, DECIMAL_PLACES) == round(other.number, DECIMAL_PLACES)


def _number_of(match: re.Match[str]) -> Fraction | None:
    parts = match.groupdict()
    sign = -1 if parts["sign"] == "-" else 1
    exponent = int((parts.get("braced") or parts.get("bare") or "0")[:9])
    if abs(exponent) > _MAX_EXPONENT:
        return None
    if parts.get("bottom") is None:
        number = Fraction(parts["number"]) if parts.get("number") else Fraction(1)
        return sign * number * Fraction(10) ** exponent
    bottom = Fraction(parts["bottom"])
    if bottom == 0:
        return None
    ratio = Fraction(parts["top"]) / bottom
    whole = parts.get("whole")
    if whole is not None:
        # 2\frac{3}{2} is a product if anything.
        return sign * (int(whole) + ratio) if ratio < 1 else None
    return (-sign if parts.get("inner") else sign) * ratio


def _with_unit(number: Fraction, is_decimal: bool, rest: str) -> Quantity | None:
    percent = _PERCENT.match(rest)
    if percent is not None:
        return Quantity(number, is_decimal, True) if _is_prose(rest[percent.end() :]) else None
    multiplier = _MULTIPLIER.match(rest)
    if multiplier is not None:
        word = multiplier.group("word").lower()
        number *= 12 if word == "dozen" else 10 ** _MULTIPLIERS[word]
        rest = " " + rest[multiplier.end() :]
    if not rest.strip():
        return Quantity(number, is_decimal)
    unit = parse_unit(rest.strip(), is_attached=not rest[0].isspace())
    if unit is not None:
        return Quantity(number, is_decimal, unit=unit)
    return Quantity(number, is_decimal) if rest[0].isspace() and _is_prose(rest) else None


# Words that make more of a number than a number of things.
_NOT_A_UNIT = frozenset(
    "and or to not more less fewer than at least most if when mod modulo base plus minus times over divided between "
    "through but per sin cos tan cot sec csc sqrt log ln exp max min gcd lcm pi squared cubed factorial choose "
    "negative half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths "
    "eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths".split()
)


def _is_prose(rest: str) -> bool:
    """Whether what follows a number only says what is counted: "apples", "apples in all"."""
    if not rest.strip():
        return True
    words = re.fullmatch(r"\s*((?:(?:in|of) +)?[A-Za-z]{3,}(?:[ -]+[A-Za-z]+){0,7})\s*[.!]?\s*", rest)
    return words is not None and not _NOT_A_UNIT & set(re.split(r"[ -]+", words.group(1).lower()))

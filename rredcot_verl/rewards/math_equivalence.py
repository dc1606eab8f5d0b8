"""Whether two answers are the same: exact rules for plain numbers, text and choices; math-verify for the rest.

The exact rules (`decide_quickly`) cost microseconds, cannot hang and run anywhere. What they leave open
(`decide_with_library`) runs sympy, which can hang and is not thread-safe: only in a process of its own.
"""

import re
from dataclasses import dataclass

from rredcot_verl.rewards.plain_latex import plain_latex
from rredcot_verl.rewards.quantities import parse_quantity, quantities_equal, with_decimal_point
from rredcot_verl.rewards.units import Unit, parse_unit

# Longer answers are compared as text only: what the parser needs grows faster than the text.
MAX_ANSWER_CHARACTERS = 1000
_MAX_DEPTH = 40


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right.

    Attributes:
        is_equal: Whether it equals the ground truth.
        canonical: Its canonical text: equal answers usually have equal ones.
    """

    is_equal: bool
    canonical: str


# Ways to say a set or value in words.
_IN_WORDS = {
    "infinity": "\\infty",
    "positive infinity": "\\infty",
    "negative infinity": "-\\infty",
    "empty set": "\\emptyset",
    "no solution": "\\emptyset",
    "no solutions": "\\emptyset",
    "no real solution": "\\emptyset",
    "no real solutions": "\\emptyset",
    "\\varnothing": "\\emptyset",
    "\\{\\}": "\\emptyset",
    "all real numbers": "\\mathbb{R}",
    "all reals": "\\mathbb{R}",
    "dne": "does not exist",
}
_FUNCTION_NAMES = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt max min gcd lcm mod det deg "
    "and or".split()
)
# A letter, or a letter and what it stands for, but not "(A) 5, (B) 6", the ratio "A: B", or the difference "E - 5".
_WORDS_FOLLOW = r"(?=.*(?<![\\A-Za-z])[A-Za-z]{3})"
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?"
    rf"(?:\(\s*([A-J])\s*\)\s*[:.]?|([A-J])(?:[.)]|:(?!\s*[A-Za-z]$)|\s+(?:-\s|(?=\()){_WORDS_FOLLOW}|(?=$)))"
    r"\s*((?:(?!(?<![A-Za-z])[A-J]\s*[.:)]).)*)",
    re.IGNORECASE | re.DOTALL,
)
# Letters in a text command are a word, however short; without it they may be a product.
_TEXT = re.compile(r"\W*\\(?:text\w*|mbox|hbox)\s*\{\s*[A-Za-z]+\s*\}\W*")
_CLOCK = re.compile(r"0?(\d{1,2}):(\d{2})\s*(?:([ap])\.?\s*m\.?)?", re.IGNORECASE)
_YES_OR_NO = frozenset(("yes", "no", "true", "false"))
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{\w+\*?\}(?:\s*\{[lcr|\s]*\})?")


def decide_quickly(gold: str, answer: str) -> Verdict | None:
    """Compare two answers by exact rules.

    Args:
        gold: The ground truth.
        answer: The response's answer.

    Returns:
        None where the rules do not decide, and the library must.
    """
    is_word = bool(_TEXT.fullmatch(gold) or _TEXT.fullmatch(answer))
    gold, answer = simplified(gold), simplified(answer)
    if not gold or not answer:
        return Verdict(False, answer)
    if is_word and gold.isalpha() and answer.isalpha():
        return Verdict(gold.lower() == answer.lower(), answer)
    clock = _compare_times(gold, answer)
    if clock is not None:
        return clock
    quantity = parse_quantity(answer)
    canonical = quantity.text() if quantity else answer
    if gold == answer:
        return Verdict(True, canonical)
    gold_quantity = parse_quantity(gold)
    if quantity and gold_quantity:
        return Verdict(quantities_equal(gold_quantity, quantity), canonical)
    # Beside a single number a comma cannot be a list's.
    one = gold_quantity or parse_quantity(with_decimal_point(gold))
    other = quantity or parse_quantity(with_decimal_point(answer))
    if (quantity or gold_quantity) and one and other:
        is_same = quantities_equal(one, other)
        return Verdict(is_same, other.text() if is_same else canonical)
    letters = _compare_choices(gold, answer)
    if letters is not None:
        return letters
    is_equal = _decide_text(gold, answer)
    if is_equal is None and (_cannot_be_parsed(gold) or _cannot_be_parsed(answer)):
        is_equal = False
    if is_equal is None and (_differ_in_shape(gold, answer) or _differ_in_unit(gold, answer)):
        is_equal = False
    return None if is_equal is None else Verdict(is_equal, canonical)


def _compare_times(gold: str, answer: str) -> Verdict | None:
    """Times of day, where one says which half of the day it means: 12:30 am is neither 12:30 pm nor the ratio 2/5."""
    times = _CLOCK.fullmatch(gold), _CLOCK.fullmatch(answer)
    halves = [time[3].lower() for time in times if time and time[3]]
    if not halves:
        return None
    readings = {time and (time[1], time[2]) for time in times}
    return Verdict(len(readings) == 1 and len(set(halves)) == 1, answer)


def simplified(answer: str) -> str:
    """An answer without what does not change it; words for a set or value become its symbol."""
    # Bounded before any expression searches it.
    text = plain_latex(answer[: 4 * MAX_ANSWER_CHARACTERS])
    return _IN_WORDS.get(text.lower(), text)


def _compare_choices(gold: str, answer: str) -> Verdict | None:
    """Multiple choice: if the ground truth is a capital letter, letters are compared, in any case."""
    (gold_letter, gold_content), (letter, content) = _choice(gold), _choice(answer)
    if not gold_letter.isupper():
        # "12" against "(B) 12": what the letter stands for is compared.
        return decide_quickly(gold, content) if letter.isupper() and content else None
    if letter:
        return Verdict(gold_letter == letter.upper(), letter.upper())
    return decide_quickly(gold_content, answer) if gold_content else Verdict(False, answer)


def _choice(text: str) -> tuple[str, str]:
    """The letter of a choice and what it stands for, each "" where there is none."""
    match = _CHOICE.fullmatch(text)
    return ("", "") if match is None else (match.group(1) or match.group(2), match.group(3).strip())


def _decide_text(gold: str, answer: str) -> bool | None:
    """Words are compared as words: to the parser "even" is a product of four variables."""
    gold_words, words = _words(gold), _words(answer)
    if gold_words is not None and words is not None:
        return gold_words == words
    # A single short word may be algebra after all, "abc".
    certain = [side for side in (gold_words, words) if side and (max(map(len, side)) > 4 or _YES_OR_NO & set(side))]
    return False if certain else None


def _words(text: str) -> list[str] | None:
    """The words of a text in words only, None for anything that may be mathematics."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z ,.'’;&-]*[.!]?", text):
        return None
    words = [word for word in re.split(r"[^a-z]+", text.lower()) if word and word not in ("the", "a", "an", "and")]
    is_text = any((len(word) >= 3 and word not in _FUNCTION_NAMES) or word in _YES_OR_NO for word in words)
    return words if is_text else None


def _cannot_be_parsed(text: str) -> bool:
    """Whether the parser would read nonsense into a text, or take too long over it."""
    if len(text) > MAX_ANSWER_CHARACTERS:
        return True
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    if deepest > _MAX_DEPTH:
        return True
    # Words amid mathematics: prose, of which the parser would take each letter for a variable.
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", _TRAILING_WORDS.sub("", _ENVIRONMENT.sub("", text)))
    words = [word for word in words if word.lower() not in _FUNCTION_NAMES]
    return len(words) >= 2 or any(len(word) >= 5 for word in words)


_TRAILING_UNIT = re.compile(
    r"(?<=[\d})\sA-Za-z])\s+((?:(?:square|sq\.?|cubic)\s+)?[A-Za-z]+(?:/[A-Za-z]+|\^\{?[23]\}?)?)$"
)
_TRAILING_WORDS = re.compile(r"(?<=[\d})\s])\s*[A-Za-z]{2,}(?:[ -][A-Za-z]+)*\s*$")


def _shape(text: str) -> str:
    """The brackets around a list, "" without any."""
    for opening, closing in (("\\{", "\\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if text.startswith(opening) and text.endswith(closing) and "," in text:
            inner = text[len(opening) : -len(closing)]
            depth = 0
            for character in inner:
                depth += (character in "([{") - (character in ")]}")
                if depth < 0:
                    return ""
            return opening + closing
    return ""


def _differ_in_shape(gold: str, answer: str) -> bool:
    """Whether one is a set and the other a tuple or interval; math-verify takes {1,2} for (1,2)."""
    shapes = _shape(gold), _shape(answer)
    return "\\{\\}" in shapes and "" not in shapes and shapes[0] != shapes[1]


def _differ_in_unit(gold: str, answer: str) -> bool:
    """Whether both end in a known unit and these differ: nothing is converted here."""
    units = [_trailing_unit(text) for text in (gold, answer)]
    return units[0] is not None and units[1] is not None and units[0] != units[1]


def _trailing_unit(text: str) -> Unit | None:
    match = _TRAILING_UNIT.search(text)
    return None if match is None else parse_unit(match.group(1), is_attached=False)

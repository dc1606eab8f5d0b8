"""Thousands separators: 1,234 and 1{,}000\\pi are one number, (1,234) and [0,100] hold two."""

import re
from dataclasses import dataclass

# Typeset so that it can only be within a number.
_TYPESET = re.compile(r"(?<=\d)(?:\{,\}|,\\!\s*|\\,)(?=\d{3}(?!\d))")
_TOKEN = re.compile(r"(?<![\d.])\d+(?:,\d+)+|\\?[{}()\[\]]|\\.|,\s", re.DOTALL)


@dataclass
class _Bracket:
    """What encloses a number.

    Attributes:
        is_list: Whether a comma in it may separate entries: not in LaTeX's groups, nor outside of all brackets.
        is_spaced: Whether a comma in it is followed by a space.
    """

    is_list: bool
    is_spaced: bool = False


def join_thousands(text: str) -> str:
    """A text without the thousands separators in its numbers.

    A comma between digits separates thousands where three digits follow each, and it can be no other comma: outside of
    brackets, in brackets whose entries are separated by a comma and a space, and before a group that starts with 0,
    which no number does. Otherwise it separates the entries of a tuple, set or interval.
    """
    text = _TYPESET.sub("", text)
    if "," not in text:
        return text
    enclosing = [_Bracket(is_list=False)]
    runs: list[tuple[int, str, _Bracket]] = []
    for token in _TOKEN.finditer(text):
        found = token.group()
        if found[0].isdigit():
            runs.append((token.start(), found, enclosing[-1]))
        elif found[0] == ",":
            enclosing[-1].is_spaced = True
        elif found in ("{", "(", "[", "\\{"):
            enclosing.append(_Bracket(is_list=found != "{"))
        elif found in ("}", ")", "]", "\\}") and len(enclosing) > 1:
            enclosing.pop()
    pieces, end = [], 0
    for start, run, bracket in runs:
        may_be_list = (bracket.is_list and not bracket.is_spaced) or text[start - 1 : start] == ","
        pieces += [text[end:start], _joined(run.split(","), may_be_list)]
        end = start + len(run)
    return "".join([*pieces, text[end:]])


def _joined(groups: list[str], may_be_list: bool) -> str:
    is_number = not may_be_list and all(len(group) == 3 for group in groups[1:])
    numbers, is_joined = [groups[0]], False
    for group in groups[1:]:
        follows = is_joined or (len(numbers[-1]) <= 3 and numbers[-1] != "0" and (is_number or group[0] == "0"))
        is_joined = follows and len(group) == 3
        if is_joined:
            numbers[-1] += group
        else:
            numbers.append(group)
    return ",".join(numbers)

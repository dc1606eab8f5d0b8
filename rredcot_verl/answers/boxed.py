"""Answers in boxes: \\boxed{...}, \\fbox{...}, \\boxed 42, and several of them in a row."""

import re

_BOX = r"\\(?:boxed|fbox)\s*\{"
# TeX takes one token for the content of a box without braces; who writes so means the word. One of letters is prose
# about boxes.
_MARK = re.compile(rf"{_BOX}|\\(?:boxed|fbox)(?![A-Za-z])[ \t]*|\{{|\}}")
_WORD = re.compile(r"(?![^\w\\]?[A-Za-z]{2})(?:\\(?!boxed|fbox)[A-Za-z]+(?:\{[^{}]{0,200}\}){0,4}|[^\s\\$`{}]){1,64}")
# What may stand between two boxes of one answer, in or between math environments. Bounded: it is looked for between any
# two boxes.
_JOINT = r"(?:[\s,;$.&]|\\[()\[\]]|\\(?:quad|qquad|,|;|:|!)|\\text\{\s*(?:,|and|or)?\s*\}|\b(?:and|or)\b){0,24}"
_BETWEEN_BOXES = re.compile(_JOINT)
_INSIDE_AN_ANSWER = re.compile(r"\}" + _JOINT + _BOX)
_MAX_JOINT_CHARACTERS = 80
_MAX_BOXES = 16

Span = tuple[int, int, int]


def _boxes(text: str) -> list[Span]:
    """Complete and non-empty boxes, braces balanced, in the order in which they close; one pass."""
    found: list[Span] = []
    opened: list[re.Match[str]] = []
    for mark in _MARK.finditer(text):
        if mark.group()[-1] == "{":
            opened.append(mark)
        elif mark.group() != "}":
            word = _WORD.match(text, mark.end())
            if word and (content := word.group().rstrip(".,;:*")):
                found.append((mark.start(), word.start(), word.start() + len(content)))
        elif opened:
            opening = opened.pop()
            if opening.group() != "{" and text[opening.end() : mark.start()].strip(" \t\n."):
                found.append((opening.start(), opening.end(), mark.start()))
    return found


def find_box(text: str) -> Span | None:
    """The last box of a text, the innermost where boxes are nested: offsets of its opening, its content, its end."""
    return max(_boxes(text), default=None)


def find_boxes_in_a_row(text: str) -> Span | None:
    """The last box together with those in a row before it: from the first one's opening to the last one's end.

    Boxes in a row are joined only by commas, "and", "or", spacing and math delimiters. They are one answer, the list of
    them, so that naming two candidates does not earn the reward of one. Boxes with anything else between them, or
    without braces, are separate.
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    start, content, end = max(boxes)
    num_boxes = 1
    if text[content - 1] != "{":
        return start, content, end
    for before in sorted(boxes, key=lambda box: -box[2]):
        joint_from = before[2] + 1
        if joint_from > start or text[before[1] - 1] != "{":
            continue
        too_far = start - joint_from > _MAX_JOINT_CHARACTERS or num_boxes == _MAX_BOXES
        if too_far or not _BETWEEN_BOXES.fullmatch(text, joint_from, start):
            break
        start, content = before[:2]
        num_boxes += 1
    if len(boxes_in_a_row(text[content:end])) == 1:
        # One answer, said again: as if it stood there once.
        return next(box for box in boxes if box[0] == start)
    return start, content, end


def boxes_in_a_row(answer: str) -> list[str]:
    """The answers of boxes in a row, without repetition; one answer for anything else."""
    return list(dict.fromkeys(part.strip() for part in _INSIDE_AN_ANSWER.split(answer)))

"""Programs in fenced blocks: CommonMark's rules, and what models write beside them (ours).

As in CommonMark: three or more backticks or tildes open a block, at least as many of the same close it; what stands
after the opening is an info string; a block in a list is indented as a whole. Ours: a fence inside a Python string or
comment is the program's own; a block may start or end in the middle of a line; a named block inside another takes its
place.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

FENCE = "```"
# A run that another follows on its line is inline code. Lookarounds: a long run is tried once, a line twice at most.
_RUN = r"(?<!`)`{3,}(?!`)(?=[^`\n]*$)|(?<!~)~{3,}(?!~)(?=[^~\n]*$)"
_FENCE = re.compile(rf"(?P<fence>{_RUN})", re.MULTILINE)
_CODE = re.compile(
    r"(?P<quotes>\"{3}|'{3})|\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|\\.|#[^\n]*" + rf"|(?P<fence>{_RUN})",
    re.MULTILINE | re.DOTALL,
)
_STRING_END = {quotes: re.compile(rf"\\.|(?P<end>{quotes})", re.DOTALL) for quotes in ('"""', "'''")}
_BEFORE_A_BLOCK = re.compile(r"[ \t]*(?:(?:[-*+]|[0-9]{1,9}[.)])[ \t]+)*")
_LANGUAGE = re.compile(r"[ \t]*\{?[ \t]*\.?([^\s:,;{}=`]*)")
_PYTHON = re.compile(r"(?:\S*\.)?py(?:thon)?[0-9.]*")
_INDENT_OF_A_FENCE = 3
_STATEMENT = re.compile(
    r"^[ \t]*(?:(?:async[ ]+)?def |class |import |from \w|@\w|try:|(?:for|while|if|with) [^\n]*:|return\b"
    r"|[A-Za-z_][\w.]*(?:\[[^]\n]*\])?[ \t]*[-+*/%&|^]?=[^=]|[A-Za-z_][\w.]*\([^\n]*\)[ \t]*$)",
    re.MULTILINE,
)
_CODE_LINE = re.compile(r"^([ \t]*)[^\s#]", re.MULTILINE)


@dataclass(frozen=True)
class _Opening:
    """The line that opens a block.

    Attributes:
        start: Offset of its fence.
        fence: Its fence.
        indent: Characters before its fence.
        language: First word of its info string, in small letters; "" where it has none.
        content: Offset after its line.
    """

    start: int
    fence: str
    indent: int
    language: str
    content: int

    @property
    def is_python(self) -> bool:
        return _PYTHON.fullmatch(self.language) is not None

    @property
    def holds_code(self) -> bool:
        return self.is_python or not self.language


@dataclass(frozen=True)
class _Block:
    """A block, the offset where its content ends, None while it is open, and the offset after it."""

    opening: _Opening
    end: int | None
    after: int


def find_program(text: str) -> tuple[int, int, int] | None:
    """The program of a text: offsets of its opening, its first character, its end.

    The last complete and non-empty block of Python; where none is named so, the last one without a name that reads like
    statements, else the last one without a name. A block without a name after the program is sample output or a note.
    """
    blocks = list(_blocks(text))
    if blocks and blocks[-1].end is None:
        # Quotes that are never closed may have hidden the fence that closes it.
        blocks[-1:] = _blocks(text, blocks[-1].opening.start, knows_strings=False)
    found = [
        (block.opening.is_python, _STATEMENT.search(text, block.opening.content, block.end) is not None, block)
        for block in blocks
        if block.opening.holds_code and block.end is not None and text[block.opening.content : block.end].strip()
    ]
    if not found:
        return None
    *_, block = max(found, key=lambda entry: (entry[0], entry[0] or entry[1], entry[2].opening.start))
    assert block.end is not None
    return block.opening.start, block.opening.content, block.end


def open_fence(text: str, think_close: str) -> str:
    """The fence that closes the block in which a text ends, "" outside of any.

    A block that was left open while thinking ends with the thinking.
    """
    blocks = list(_blocks(text.rpartition(think_close)[2]))
    return blocks[-1].opening.fence if blocks and blocks[-1].end is None else ""


def without_margin(block: str) -> str:
    """A program without the indentation of its block: that of its first line of code, which no valid program has."""
    first = _CODE_LINE.search(block)
    if first is None or not first[1]:
        return block
    lines = block.split("\n")
    return "\n".join(line[len(os.path.commonprefix([first[1], line])) :] for line in lines)


def canonical_program(program: str) -> str:
    """A program as it stands in its block: no blanks at the ends of lines, one newline at its end, "" for an empty one.

    Indentation and inner blank lines stay: the text is forced as it is.
    """
    text = "\n".join(line.rstrip() for line in program.splitlines()).strip("\n")
    return text + "\n" if text.strip() else ""


def _blocks(text: str, start: int = 0, knows_strings: bool = True) -> Iterator[_Block]:
    """Blocks in order; only the last one can be open at the end, and only such a one can have been given up before."""
    while (opening := _next_opening(text, start)) is not None:
        block = _close(text, opening, knows_strings)
        yield block
        start = block.after


def _next_opening(text: str, start: int) -> _Opening | None:
    for run in _FENCE.finditer(text, start):
        opening = _opening_at(text, run)
        if opening is not None:
            return opening
    return None


def _opening_at(text: str, run: re.Match[str]) -> _Opening | None:
    """What a fence outside of blocks opens. In the middle of a line only a block of Python starts."""
    before, rest, line_end = _line_round(text, run)
    language = _language_of(rest)
    indent = len(before)
    if not _BEFORE_A_BLOCK.fullmatch(before):
        if run["fence"][0] == "~" or not _PYTHON.fullmatch(language):
            return None
        indent -= len(before.lstrip())
    return _Opening(run.start(), run["fence"], indent, language, line_end + 1)


def _language_of(rest: str) -> str:
    language = _LANGUAGE.match(rest)
    assert language is not None
    return language[1].lower()


def _line_round(text: str, run: re.Match[str]) -> tuple[str, str, int]:
    """What stands before and after a fence on its line, and where the line ends."""
    line_end = text.find("\n", run.end())
    line_end = len(text) if line_end < 0 else line_end
    return text[text.rfind("\n", 0, run.start()) + 1 : run.start()], text[run.end() : line_end], line_end


def _close(text: str, opening: _Opening, knows_strings: bool) -> _Block:
    """Where a block ends: at its closing fence, or where another takes its place."""
    knows_strings = knows_strings and opening.holds_code
    for run in _runs_in_code(text, opening.content) if knows_strings else _FENCE.finditer(text, opening.content):
        before, rest, line_end = _line_round(text, run)
        starts_line, is_bare = not before.strip(), not rest.strip()
        closes = run["fence"].startswith(opening.fence)
        language = _language_of(rest)
        is_python = _PYTHON.fullmatch(language) is not None
        is_named = is_python or (rest.strip() == language and language != "")
        if starts_line and is_named and (closes or not opening.holds_code):
            # No line of Python starts with a fence: another language's block has ended the program, too.
            ended = opening.holds_code and not is_python
            return _Block(opening, run.start() - len(before) if ended else None, run.start() - len(before))
        if not closes:
            continue
        if starts_line and (knows_strings or len(before) <= opening.indent + _INDENT_OF_A_FENCE):
            if is_bare or opening.holds_code:
                return _Block(opening, run.start() - len(before), line_end)
        elif knows_strings and is_bare:
            return _Block(opening, run.start(), line_end)
    return _Block(opening, None, len(text))


def _runs_in_code(text: str, start: int) -> Iterator[re.Match[str]]:
    """Fences outside of Python's strings and comments."""
    while (token := _CODE.search(text, start)) is not None:
        start = token.end()
        if token["fence"]:
            yield token
        elif token["quotes"]:
            ends = (part for part in _STRING_END[token["quotes"]].finditer(text, start) if part["end"])
            end = next(ends, None)
            if end is None:
                return
            start = end.end()

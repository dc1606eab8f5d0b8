"""Programs in fenced blocks, as people and models write them."""

import random
import time

import pytest

from rredcot_verl.answers.grammar import find_answer, formats_of
from rredcot_verl.answers.program import find_program, open_fence, without_margin
from rredcot_verl.config.blocks import ElicitationConfig

ONE = "def f(x):\n    return x + 1\n"
IN_A_DOCSTRING = (
    'def f(x):\n    """Adds.\n\n```\nf(1)\n```\n\n    ```python\n    f(2)\n    ```\n    """\n    return x\n'
)
IN_A_MODULE_DOCSTRING = "'''Says \\''' once.\n```python\nf(1)\n```\n'''\nx = 1\n"
IN_STRINGS = "fence = '```'\nquoted = \"it's ```\"  # that's\n# ```\n# f(1)\n# ```\nprint(f'''\n```\n{fence}\n```''')\n"
IN_A_CONTINUED_STRING = 'x = \'\\\n```\'\ny = "\\""\n'


def found(text: str) -> str | None:
    answer = find_answer(text, formats_of(ElicitationConfig(format="code")))
    assert answer is None or find_program(text) == (answer.start, answer.answer_start, answer.end)
    return answer and answer.text


def indented(text: str, margin: str) -> str:
    return "".join(margin + line for line in text.splitlines(keepends=True))


@pytest.mark.parametrize(
    "text",
    [
        # A block without a name after the program: its output, a call, a note.
        f"```python\n{ONE}```\nIt prints:\n\n```\n3\n```\n",
        f"```python\n{ONE}```\nUse it so:\n```\nprint(f(2))\n```\n",
        f"```\n{ONE}```\nOutput:\n```\n3\n```\n",
        f"```\n3 4\n```\nis the input.\n```\n{ONE}```\nOutput:\n```\n7\nYes, it is.\n```",
        f"```\nx = 2\n```\nbetter\n```\n{ONE}```\n",
        f"```python\n{ONE}```\n```python\n\n```\n",
        # In a list, by blanks or a tabulator, on the line of its mark or after it.
        "1. Code:\n\n" + indented(f"```python\n{ONE}```\n", "   "),
        "- Code:\n  - so:\n" + indented(f"```python\n{ONE}```\n", "      ") + "- Done.\n",
        "- " + indented(f"```python\n{ONE}```\n", "  ")[2:],
        "12) " + indented(f"```python\n{ONE}```\n", "    ")[4:],
        indented(f"```python\n{ONE}```\n", "\t"),
        # Longer fences, tildes, what stands after the name.
        f"````python\n{ONE}````\n",
        f"````python\n{ONE}`````\n",
        f"~~~python\n{ONE}~~~\n",
        f"~~~~\n{ONE}~~~~~\n",
        f"````markdown\n# Answer\n```python\n{ONE}```\n````\n",
        *[
            f"```{info}\n{ONE}```\n"
            for info in ("python:main.py", "python title='a'", "{python}", "{.python .x}", " py3")
        ],
        *[f"```{info}\n{ONE}```\n" for info in ("python3.11", "main.py", "Python \t", "PY")],
        f"```python\r\n{ONE}```\r\nand\r\n```\r\n3\r\n```\r\n",
        # Text before a block, or after it.
        f"Here it is: ```python\n{ONE}```\n",
        f"Here it is:```python\n{ONE}``` This adds one.\n",
        f"```python\n{ONE}```This adds one.\n\nIt prints\n```\n3\n```\n",
        f"```python\n{ONE}```Done.",
        # Another language's block ends the program that nothing has closed.
        f"```python\n{ONE}```text\n3\n```\n",
        # A stray fence closes nothing.
        f"see `x` and ``` there\n```python\n{ONE}```\n",
        # Named otherwise: none of ours.
        f"```python\n{ONE}```\n```pycon\n>>> f(1)\n2\n```\n```python-repl\n>>> f(1)\n```\n```c++\nint x;\n```\n",
    ],
)
def test_the_program_is_found_in_what_people_write_round_it(text):
    assert found(text) == ONE
    start, content, end = find_program(text)
    assert text[start] in "`~" and text[:start].rstrip("`~") == text[:start]
    assert text[end:].lstrip()[0] == text[start]


@pytest.mark.parametrize("program", [IN_A_DOCSTRING, IN_A_MODULE_DOCSTRING, IN_STRINGS, IN_A_CONTINUED_STRING])
@pytest.mark.parametrize("margin", ["", "   "])
def test_a_fence_in_a_string_or_comment_is_the_programs_own(program, margin):
    compile(program, "program.py", "exec")
    for opening in ("```python", "```"):
        text = indented(f"{opening}\n{program}```\n", margin) + "It prints\n```\n3\n```\n"
        block = find_program(text)
        assert without_margin(text[block[1] : block[2]]) == program == found(text)
        # At every line, the block is open until the line that closes it.
        lines = text.splitlines(keepends=True)
        fences = [open_fence("".join(lines[:k]), "</think>") for k in range(len(lines) + 1)]
        num_lines = len(program.splitlines()) + 2
        assert fences[1:num_lines] == ["```"] * (num_lines - 1) and fences[num_lines] == ""


def test_quotes_that_are_never_closed_hide_no_fence():
    broken = 'x = 1\nprint("""never closed)\n'
    assert found(f"```python\n{broken}```\nOh no.\n") == broken
    assert found(f"```python\n{broken}```\n```\n3\n```\n") == broken
    # While it is written nobody knows: the string may go on.
    assert open_fence(f"```python\n{broken}```\n", "</think>") == "```"


def test_a_program_that_ends_on_its_last_line_of_code_is_complete():
    assert found("```python\nprint(1)```") == "print(1)"
    assert found("```python\nprint('```')\n") is None


@pytest.mark.parametrize(
    "text",
    [
        "``python\nx = 1\n``",
        "````python\nx = 1\n```\n",
        "~~~python\nx = 1\n```\n",
        "```python\nx = 1\n~~~\n",
        "Say ```python x``` and ```y```.\n",
        "Use ~~~python\nx = 1\n~~~\n",
        "```javascript\nx = 1\n```\n",
        "```python-repl\n>>> 1\n```\n",
    ],
)
def test_what_is_no_complete_block_of_python(text):
    assert found(text) is None


@pytest.mark.parametrize(
    ("block", "program"),
    [
        ("  a\n    b\n", "a\n  b\n"),
        # A line that is less far in loses what it has; the text of a string keeps what is its own.
        ("    x = '''\n  a\n'''\n", "x = '''\na\n'''\n"),
        ("\n   # note\n  a\n\n  b\n", "\n # note\na\n\nb\n"),
        ("\ta\n\t\tb\n  c\n", "a\n\tb\n  c\n"),
        # A valid program starts at the margin: it stays as it is.
        ("   # note\na\n    b\n", "   # note\na\n    b\n"),
        ("  # only\n", "  # only\n"),
        ("", ""),
    ],
)
def test_without_margin(block, program):
    assert without_margin(block) == program
    assert without_margin(program) == program


def _document(rng: random.Random) -> str:
    """Prose, lists and closed blocks in which CommonMark and we should see the same."""
    parts = []
    for _ in range(rng.randint(1, 4)):
        mark = rng.choice("`~")
        length = rng.randint(3, 5)
        info = rng.choice(["python", "py", "", "text", "python:main.py", "python x=1", "Python"])
        lines = [rng.choice(["a = 1", "if a:", "    b", "", "print(a)", "~~", "``"]) for _ in range(rng.randint(0, 4))]
        if length > 3:
            lines.insert(rng.randint(0, len(lines)), mark * rng.randint(3, length - 1))
        lines = [mark * length + info, *lines, mark * rng.randint(length, 6) + rng.choice(["", "  "])]
        margin = rng.choice(["", " ", "   "])
        in_a_list = rng.choice(["", "- ", "1. "])
        if in_a_list:
            parts += [f"{in_a_list}item", "", *(" " * len(in_a_list) + margin + line for line in lines), "", "end", ""]
        else:
            parts += ["Some text.", "", *(margin + line for line in lines), ""]
    return "\n".join(parts)


def test_closed_blocks_are_commonmarks():
    """Python blocks as an independent parser finds them."""
    markdown = pytest.importorskip("markdown_it")
    rng = random.Random(0)
    num_found = 0
    for _ in range(1000):
        text = _document(rng)
        fences = [token for token in markdown.MarkdownIt("commonmark").parse(text) if token.type == "fence"]
        named = [t for t in fences if t.info.lower().startswith("py") and t.content.strip()]
        num_found += len(named) > 0
        if named:
            start, content, _ = find_program(text)
            assert without_margin(named[-1].content) == found(text), text
            first_line, _ = named[-1].map
            assert (text.count("\n", 0, start), text.count("\n", 0, content)) == (first_line, first_line + 1)
        assert not open_fence(text, "</think>")
    assert num_found > 500


def test_odd_texts_are_searched_quickly():
    rng = random.Random(0)
    pieces = ["```", "~~~", "python\n", "\n", " ", "'", '"', '"""', "'''", "#", "\\", "- ", "1. ", "x = 1\n", "`", "a"]
    texts = [piece * 10_000 for piece in pieces] + [f"```python\n{piece * 10_000}" for piece in pieces]
    texts += [
        a + b * 10_000 + c for a in ("```", "```python\n", "") for b in ('\\"', "- ", "~~~ ", "``` ") for c in "`\n"
    ]
    texts += [f"{piece}\n" * 10_000 for piece in ("```python", "```", "~~~", '```python\n"""\n```', "```python\n'''")]
    texts += ["".join(rng.choices(pieces, k=10_000)) for _ in range(5)]
    for text in texts:
        started = time.process_time()
        find_program(text), open_fence(text, "</think>")
        # Tens of milliseconds; quadratic search takes minutes.
        assert time.process_time() - started < 20, text[:40]

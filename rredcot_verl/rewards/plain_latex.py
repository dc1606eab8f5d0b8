"""Answers with what does not change them taken off: delimiters, sizes, spacing, text commands, introductions."""

import re
import unicodedata
from fractions import Fraction

from rredcot_verl.answers.separators import join_thousands

_TEXT_COMMAND = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|hbox|operatorname\*?)\s*\{")
_SPACING = re.compile(
    r"(?<!\\)\\(?:left|right|[bB]igg?|displaystyle|limits|hspace\{[^{}]*\})(?![A-Za-z])|(?<!\\)\\[,;:]|(?<!\\)\\!\s*|\{,\}"
)
_UNBRACED_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)|\\frac\s*(\d)\s*\{|(\\frac\s*\{[^{}]*\})\s*(\d)")
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°")
_INTRODUCTION = re.compile(
    r"(?:(?:so|thus|hence|therefore)\b[\s,]*)?"
    r"(?:(?:(?:the|our|my)\s+)?(?:final\s+)?(?:answer|result|solution|value)s?(?:\s+(?:is|are|equals)|\s*(?=:))|it\s+is|is|are|"
    r"approximately|approx\.?|about|roughly|\\approx(?![A-Za-z])|≈|=(?!=)|:)\s*:?\s*",
    re.IGNORECASE,
)
_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "÷": "/", "π": "\\pi ", "∞": "\\infty ", "∪": "\\cup ",
     "≤": "\\le ", "≥": "\\ge ", "±": "\\pm ", "∅": "\\emptyset ", "\u00a0": " ", "\u2009": " ", "\u202f": " "}
)  # fmt: skip
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d.,]|\s*/)")
# 0.1\overline{6}, 0.\dot{3}, 0.\dot{1}4285\dot{7}, 0.(3): a product would not be written after a point.
_RECURRING = re.compile(
    r"(?<![\d.])(?P<before>\d*\.\d*)(?:\\(?:overline|bar)\s*(?:\{\s*(?P<over>\d+)\s*\}|(?P<digit>\d))|"
    r"\\dot\s*\{?\s*(?P<first>\d)\s*\}?(?:(?P<between>\d*)\\dot\s*\{?\s*(?P<last>\d)\s*\}?)?|"
    r"(?<=\.)\((?P<round>\d+)\))"
)
_QUOTED = re.compile(r"\\?[\"“]\s*([^\"“”\\]*?)\.?\s*\\?[\"”]")
_SQUARE_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))")


def plain_latex(answer: str) -> str:
    """An answer in one way of writing: no math delimiters, sizes or text commands, \\frac{1}{2} for \\frac12 and ½.

    Args:
        answer: The answer as the response or the data set has it.

    Returns:
        LaTeX or text in which a dollar sign is money.
    """
    text = _unwrap_box(answer.strip())
    # A backslash before the dollar is money, a bare one opens or closes math; but "$5" alone is money too.
    bare = text.count("$") - text.count("\\$")
    if bare == 1 and re.match(r"-?\s*\$\s*[\d.]", text):
        text = text.replace("$", "\\$", 1)
    text = re.sub(r"(?<!\\)\$", " ", text).replace("\\$", "$")
    text = re.sub(r"\\[()\[\]]", " ", text)
    text = join_thousands(_unwrap_box(text.strip()))
    text = _SPACING.sub(lambda match: "," if match.group() == "{,}" else "", text)
    text = re.sub(r"(?<!\\)\\(?: |quad|qquad)|~", " ", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = text.replace("\\cfrac", "\\frac").replace("\\%", "%").strip("*` ").replace("**", "^")
    text = _plain_unicode(text)
    text = _DEGREES.sub(" degrees ", text)
    text = _unwrap_text_commands(text)
    text = _UNBRACED_FRACTION.sub(_brace, _UNBRACED_FRACTION.sub(_brace, text))
    text = _RECURRING.sub(_as_fraction, " ".join(text.split()))
    text = _SPACED_THOUSANDS.sub(lambda match: match.group().replace(" ", ""), text)
    text = _without_introduction(text).rstrip(".;,\\ ").strip()
    quoted = _QUOTED.fullmatch(text)
    return quoted[1] if quoted else text


def _unwrap_box(text: str) -> str:
    while match := re.match(r"\\(?:boxed|fbox)\s*\{", text):
        end = _closing(text, match.end())
        if end is None or text[end + 1 :].strip(" .$"):
            return text
        text = text[match.end() : end].strip()
    return text


def _unwrap_text_commands(text: str) -> str:
    """\\text{ cm} becomes " cm ": what text commands hold is text either way."""
    for _ in range(64):
        match = _TEXT_COMMAND.search(text)
        if match is None:
            return text
        end = _closing(text, match.end())
        if end is None:
            return text
        content = text[match.end() : end]
        # \\mathrm{e} is a symbol; longer texts are words, which must not merge with what stands beside them.
        space = "" if len(content) == 1 else " "
        text = f"{text[: match.start()]}{space}{content}{space}{text[end + 1 :]}"
    return text


def _closing(text: str, start: int) -> int | None:
    """Offset of the brace that closes the group whose content starts at `start`."""
    depth = 1
    for index in range(start, len(text)):
        if text[index] in "{}" and text[index - 1] != "\\":
            depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return index
    return None


def _brace(match: re.Match[str]) -> str:
    both, top, bottom, whole, after = match.groups()
    if both is not None:
        return f"\\frac{{{both}}}{{{top}}}"
    return f"\\frac{{{bottom}}}{{" if bottom is not None else f"{whole}{{{after}}}"


def _as_fraction(match: re.Match[str]) -> str:
    """A recurring decimal as a fraction: \\frac{1}{6} for 0.1\\overline{6}."""
    parts = match.groupdict(default="")
    before = parts["before"]
    period = "".join(parts[name] for name in ("over", "digit", "first", "between", "last", "round"))
    num_places = len(before) - before.index(".") - 1
    start = Fraction(before) if len(before) > 1 else Fraction(0)
    number = start + Fraction(int(period), 10**num_places * (10 ** len(period) - 1))
    return f"\\frac{{{number.numerator}}}{{{number.denominator}}}"


def _plain_unicode(text: str) -> str:
    if text.isascii():
        return text
    text = re.sub(r"(\d)([¼-¾⅐-⅞])", r"\1 \2", text.translate(_UNICODE))
    text = text.replace("²", "^2").replace("³", "^3")
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
    return _SQUARE_ROOT.sub(lambda match: f"\\sqrt{{{match.group(1) or match.group(2)}}}", text)


def _without_introduction(text: str) -> str:
    for _ in range(3):
        match = _INTRODUCTION.match(text)
        if match is None or match.end() == len(text):
            return text
        text = text[match.end() :]
    return text

"""Rules that choose prompts: ``guessing``, ``0.1 < mean_reward < 0.9``, ``learnable and start_value > 0.2``.

Comparisons of figures and numbers, names of lists, ``and``, ``or``, ``not`` and brackets, read by Python's own parser
and nothing of it is run. A figure that a prompt lacks (no self-values, say) leaves the prompt out.
"""

import ast
import operator
from collections.abc import Callable, Mapping

from rredcot_verl.report.files import ReportError
from rredcot_verl.report.prompts import Prompt, is_blind, is_guessing, is_learnable
from rredcot_verl.report.thresholds import Thresholds

Figures = Mapping[str, float | bool | None]
Rule = Callable[[Figures], float | bool]
"""Whether a prompt is kept, by its figures; an UnknownFigureError where one that the rule needs is none."""
_COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def figures(prompt: Prompt, thresholds: Thresholds) -> dict[str, float | bool | None]:
    """The figures and lists that a rule may name; the thresholds are those of ``guessing`` and ``blind``."""
    names = ("num_responses", "num_scored", "mean_reward", "solved", "entropy", "start_value", "mean_value", "spread")
    return {
        **{name: getattr(prompt, name) for name in names},
        "blame_share": 0.0 if prompt.shared_blame is None else prompt.shared_blame.share,
        "guessing": is_guessing(prompt, thresholds),
        "blind": is_blind(prompt, thresholds),
        "learnable": is_learnable(prompt),
        "shared_blame": prompt.shared_blame is not None,
    }


NAMES = tuple(figures(Prompt("", (), None, 0, 0, 0.0, 0.0, None, None, None), Thresholds()))


class UnknownFigureError(ValueError):
    """A prompt lacks a figure that the rule names."""


def parse_rule(text: str) -> Rule:
    """Reads a rule, for example ``0.1 < mean_reward < 0.9``.

    Raises:
        ReportError: It is no rule, or names a figure that does not exist.
    """
    try:
        # The depth of brackets is Python's to refuse.
        return _rule(ast.parse(text.strip(), mode="eval").body)
    except ReportError as error:
        raise ReportError(f"--keep {text!r}: {error}") from error
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise ReportError(f"--keep {text!r}: not a rule: {error}") from error


def _rule(node: ast.expr) -> Rule:
    if isinstance(node, ast.Name):
        return _figure(node.id)
    if isinstance(node, ast.Compare):
        return _comparison(node)
    if isinstance(node, ast.BoolOp):
        parts = [_rule(part) for part in node.values]
        join = all if isinstance(node.op, ast.And) else any
        return lambda values: join(part(values) for part in parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        change = operator.not_ if isinstance(node.op, ast.Not) else operator.neg
        operand = _rule(node.operand)
        return lambda values: change(operand(values))
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        number = node.value
        return lambda values: number
    raise ReportError(
        f"{ast.unparse(node)!r} is not allowed: a rule compares figures ({', '.join(NAMES)}) with numbers and joins "
        "comparisons with and, or, not"
    )


def _figure(name: str) -> Rule:
    if name not in NAMES:
        raise ReportError(f"unknown figure {name!r}; allowed: {', '.join(NAMES)}")

    def read(values: Figures) -> float | bool:
        value = values[name]
        if value is None:
            raise UnknownFigureError(name)
        return value

    return read


def _comparison(node: ast.Compare) -> Rule:
    if any(type(operation) not in _COMPARISONS for operation in node.ops):
        raise ReportError("only < <= > >= == != compare figures")
    compare = [_COMPARISONS[type(operation)] for operation in node.ops]
    operands = [_operand(part) for part in (node.left, *node.comparators)]

    def holds(values: Figures) -> bool:
        found = [operand(values) for operand in operands]
        return all(is_so(left, right) for is_so, left, right in zip(compare, found, found[1:], strict=False))

    return holds


def _operand(node: ast.expr) -> Rule:
    number = node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else node
    if not isinstance(number, ast.Constant) and not isinstance(node, ast.Name):
        raise ReportError(f"{ast.unparse(node)!r} is neither a figure nor a number")
    return _rule(node)

"""Rules that choose prompts: ``guessing``, ``0.1 < mean_reward < 0.9``, ``learnable and start_value > 0.2``.

Comparisons of figures and numbers, names of lists, ``and``, ``or``, ``not`` and brackets, read by Python's own parser
and nothing of it is run. A figure that a prompt lacks (no self-values, say) leaves the prompt out.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rredcot_verl.report.files import ReportError
from rredcot_verl.report.prompts import Prompt, is_blind, is_guessing, is_learnable
from rredcot_verl.report.thresholds import Thresholds

Figure = float | bool | None
_COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def figures(prompt: Prompt, thresholds: Thresholds) -> dict[str, Figure]:
    """The figures and lists that a rule may name.

    Args:
        prompt: The prompt.
        thresholds: Those of ``guessing`` and ``blind``.
    """
    blame = prompt.shared_blame
    return {
        "num_responses": prompt.num_responses,
        "num_scored": prompt.num_scored,
        "mean_reward": prompt.mean_reward,
        "solved": prompt.solved,
        "entropy": prompt.entropy,
        "start_value": prompt.start_value,
        "mean_value": prompt.mean_value,
        "spread": prompt.spread,
        "blame_share": 0.0 if blame is None else blame.share,
        "guessing": is_guessing(prompt, thresholds),
        "blind": is_blind(prompt, thresholds),
        "learnable": is_learnable(prompt),
        "shared_blame": blame is not None,
    }


NAMES = tuple(figures(Prompt("", (), None, 0, 0, 0.0, 0.0, None, None, None), Thresholds()))


class UnknownFigureError(ValueError):
    """A prompt lacks a figure that the rule names."""


@dataclass(frozen=True)
class Rule:
    """A rule, checked.

    Attributes:
        text: As the user wrote it.
        tree: Its syntax tree.
    """

    text: str
    tree: ast.expr

    def holds(self, values: Mapping[str, Figure]) -> bool:
        """Whether the rule holds for a prompt.

        Args:
            values: Its figures.

        Raises:
            UnknownFigureError: A figure that the rule needs is none.
        """
        return bool(_evaluate(self.tree, values))


def parse_rule(text: str) -> Rule:
    """Reads a rule.

    Args:
        text: For example ``0.1 < mean_reward < 0.9``.

    Raises:
        ReportError: It is no rule, or names a figure that does not exist.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        # The depth of brackets is Python's to refuse; what is left is tried with every figure known.
        _check(tree, text)
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        if isinstance(error, ReportError):
            raise
        raise ReportError(f"--keep {text!r}: not a rule: {error}") from error
    return Rule(text, tree)


def _check(node: ast.expr, text: str) -> None:
    if isinstance(node, ast.Name):
        if node.id not in NAMES:
            raise ReportError(f"--keep {text!r}: unknown figure {node.id!r}; allowed: {', '.join(NAMES)}")
    elif isinstance(node, ast.Compare):
        for operation in node.ops:
            if type(operation) not in _COMPARISONS:
                raise ReportError(f"--keep {text!r}: only < <= > >= == != compare figures")
        for part in (node.left, *node.comparators):
            if not isinstance(part, ast.Name | ast.Constant) and not _is_negative_number(part):
                raise ReportError(f"--keep {text!r}: {ast.unparse(part)!r} is neither a figure nor a number")
            _check(part, text)
    elif isinstance(node, ast.BoolOp):
        for part in node.values:
            _check(part, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        _check(node.operand, text)
    elif not (isinstance(node, ast.Constant) and isinstance(node.value, int | float)):
        raise ReportError(
            f"--keep {text!r}: {ast.unparse(node)!r} is not allowed: a rule compares figures ({', '.join(NAMES)}) with "
            "numbers and joins comparisons with and, or, not"
        )


def _is_negative_number(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant)


def _evaluate(node: ast.expr, values: Mapping[str, Figure]) -> float | bool:
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, int | float)
        return node.value
    if isinstance(node, ast.Name):
        value = values[node.id]
        if value is None:
            raise UnknownFigureError(node.id)
        return value
    if isinstance(node, ast.UnaryOp):
        value = _evaluate(node.operand, values)
        return -value if isinstance(node.op, ast.USub) else not value
    if isinstance(node, ast.BoolOp):
        parts = (bool(_evaluate(part, values)) for part in node.values)
        return all(parts) if isinstance(node.op, ast.And) else any(parts)
    assert isinstance(node, ast.Compare)
    operands = [_evaluate(part, values) for part in (node.left, *node.comparators)]
    pairs = zip(node.ops, operands, operands[1:], strict=False)
    return all(_COMPARISONS[type(operation)](left, right) for operation, left, right in pairs)

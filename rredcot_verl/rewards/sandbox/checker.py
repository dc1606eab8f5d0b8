"""What runs inside the checker's process: the tests, with the program's names standing for calls into its process."""

import ast
import builtins
import functools
import json
import os
from types import CodeType
from typing import Any, NoReturn

from rredcot_verl.rewards.sandbox.literals import (
    Channel,
    Encoder,
    NearFloat,
    NotPlainError,
    allow_long_integers,
    decode,
)

_MAX_DETAIL = 500


class ProgramError(Exception):
    """The program raised an exception that is not one of Python's own."""


class ProgramGoneError(BaseException):
    """The program's process has ended or answers nonsense. Not an Exception: no test is to catch it."""


class Peer:
    """The program, as the checker sees it.

    Args:
        channel: To the program's process.
        float_tolerance: By how much its floats may differ from what a test compares them with, see `NearFloat`.

    Attributes:
        gone: Whether it ended or broke the protocol; nothing it said in that test counts.
    """

    def __init__(self, channel: Channel, float_tolerance: float) -> None:
        self._channel = channel
        self._to_float = functools.partial(_near_float, float_tolerance) if float_tolerance else float.fromhex
        self.gone = False

    def wait_loaded(self) -> str | None:
        """Wait until the program's definitions are there; why they never will be, None if they are."""
        try:
            answer = self._receive()
        except ProgramGoneError as error:
            return str(error)
        return None if answer == ["loaded"] else _describe(answer)

    def ask(self, *request: Any) -> Any:
        """The value of a request.

        Raises:
            Exception: What the program raised, if it is one of Python's own; ProgramError for any other.
            ProgramGoneError: There is no answer.
        """
        if self.gone:
            raise ProgramGoneError("the program has ended")
        try:
            self._channel.send(list(request))
        except OSError as error:
            self.gone = True
            raise ProgramGoneError("the program has ended") from error
        answer = self._receive()
        try:
            if answer[0] == "value":
                return decode(answer[1], lambda number: RemoteObject(self, number), self._to_float)
            kind, message = str(answer[1]), str(answer[2])
        except (ValueError, TypeError, IndexError, KeyError) as error:
            self.gone = True
            raise ProgramGoneError(f"the program's answer is no value: {error}") from error
        raise _as_exception(kind, message)

    def _receive(self) -> Any:
        try:
            return self._channel.receive()
        except (EOFError, ValueError, OSError) as error:
            self.gone = True
            raise ProgramGoneError(f"the program has ended or answers nonsense: {error}") from error


def _near_float(tolerance: float, digits: str) -> float:
    return NearFloat(float.fromhex(digits), tolerance)


def _as_exception(kind: str, message: str) -> Exception:
    known = getattr(builtins, kind, None)
    for base in known.__mro__ if isinstance(known, type) and issubclass(known, Exception) else ():
        if issubclass(base, Exception):
            try:
                return base(message)
            except TypeError:  # One of the few that need more than a message: what they are derived from does not.
                pass
    return ProgramError(f"{kind}: {message}")


def _describe(answer: Any) -> str:
    parts = answer[1:] if isinstance(answer, list) else [answer]
    return ": ".join(str(part) for part in parts)[:_MAX_DETAIL]


def _refuse(self: object, *arguments: object) -> NoReturn:
    raise TypeError("an object of the program's that is not a plain value can be called or passed back, not compared")


class RemoteObject:
    """A function, class or other object that stays in the program's process. Only plain values can be compared."""

    def __init__(self, peer: Peer, number: int) -> None:
        self._peer = peer
        self._number = number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        encoder = Encoder(_number_of)
        encoded = [encoder.encode(argument) for argument in arguments]
        return self._peer.ask("call", self._number, encoded, {name: encoder.encode(v) for name, v in named.items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.ask("attribute", self._number, name)

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = __hash__ = _refuse
    __int__ = __float__ = __index__ = __str__ = __repr__ = __format__ = _refuse


def _number_of(value: Any) -> int:
    if type(value) is RemoteObject:
        return value._number
    raise NotPlainError(f"a value of type {type(value).__name__} cannot be passed to the program")


def _foreign_names(tree: ast.AST) -> set[str]:
    """Names that the tests use and neither they nor Python define."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    used = {name.id for name in names if isinstance(name.ctx, ast.Load)}
    return {name for name in used if not hasattr(builtins, name) and not name.startswith("__")}


class Checker:
    """Runs tests against a program.

    Args:
        peer: The program.
        entry_point: The name that is the program's even where Python has one like it.
        setup: Source run before each test.
    """

    def __init__(self, peer: Peer, entry_point: str | None, setup: str) -> None:
        self._peer = peer
        self._entry_point = entry_point
        self._setup = ast.parse(setup)
        self._setup_code = self._compiled(self._setup)
        # Python's own function of the entry point's name is not the program's: without it a test fails.
        self._builtins = {name: known for name, known in vars(builtins).items() if name != entry_point}

    @staticmethod
    def _compiled(tree: ast.Module) -> CodeType:
        return compile(tree, "tests.py", "exec", dont_inherit=True)

    def run(self, test: str) -> tuple[bool, str]:
        """Whether a test passes, and if not, why."""
        tree = ast.parse(test)
        names = _foreign_names(self._setup) | _foreign_names(tree)
        if self._entry_point is not None:
            names.add(self._entry_point)
        namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": self._builtins}
        try:
            for name in sorted(names):
                self._look_up(name, namespace)
            exec(self._setup_code, namespace)
            exec(self._compiled(tree), namespace)
        except BaseException as error:  # Whatever ends a test early fails it.
            return False, f"{type(error).__name__}: {error}"[:_MAX_DETAIL]
        # A test may catch everything; that the program has ended is not for it to forgive.
        return (False, "the program has ended") if self._peer.gone else (True, "")

    def _look_up(self, name: str, namespace: dict[str, Any]) -> None:
        try:
            namespace[name] = self._peer.ask("get", name)
        except NameError:  # The test itself may define it; if not, it says so when it comes to it.
            pass


def check(payload: dict[str, Any], reader: int, writer: int, report: int) -> None:
    """Run the tests and report on each, one JSON object a line.

    Args:
        payload: `entry_point`, `setup`, `tests`, `float_tolerance`, and `first`, the number of the first of the tests.
        reader: File descriptor of the program's answers.
        writer: File descriptor of the questions to it.
        report: File descriptor to the judge: `{"loaded": bool, "detail": text}`, then
            `{"test": number, "passed": bool, "gone": bool, "detail": text}` for each.
    """
    allow_long_integers()
    peer = Peer(Channel(reader, writer), payload["float_tolerance"])

    def tell(fields: dict[str, Any]) -> None:
        data = (json.dumps(fields) + "\n").encode()
        while data:
            data = data[os.write(report, data) :]

    why_not = peer.wait_loaded()
    tell({"loaded": why_not is None, "detail": why_not or ""})
    if why_not is not None:
        return
    checker = Checker(peer, payload["entry_point"], payload["setup"])
    for number, test in enumerate(payload["tests"], payload["first"]):
        passed, detail = checker.run(test)
        tell({"test": number, "passed": passed, "gone": peer.gone, "detail": detail})
        if peer.gone:
            return

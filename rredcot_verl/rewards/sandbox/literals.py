"""Plain values as text: what may pass between a program and its checker.

A value arrives as exactly the type it left as, or not at all: no class of the program's is ever made in the checker, so
no `__eq__` of the program's is ever asked. Objects that are not plain stay where they are and travel as a number.
"""

import json
import os
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

MAX_MESSAGE_BYTES = 16 * 2**20
_MAX_DEPTH = 200
_MAX_ITEMS = 10**6
_SMALL_INT = 2**53
_VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_COLLECTIONS = (list, tuple, set, frozenset, deque, *_VIEWS)
_BASES: tuple[Any, ...] = (int, float, complex, str, bytes, list, tuple, dict, set, frozenset, deque)


class NearFloat(float):
    """A float that equals a number within `tolerance` of it, absolute or relative.

    It stands for a program's result where tests are compared so; what is computed with it is a plain float.
    """

    tolerance: float

    def __new__(cls, value: float, tolerance: float) -> "NearFloat":
        near = super().__new__(cls, value)
        near.tolerance = tolerance
        return near

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return float.__eq__(self, other) or is_close(self, other, self.tolerance)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = float.__hash__


def is_close(actual: float, wanted: float, tolerance: float) -> bool:
    """Whether a number is within `tolerance` of the wanted one, absolute or relative to it."""
    try:
        return abs(float(actual) - float(wanted)) <= tolerance * max(1.0, abs(float(wanted)))
    except OverflowError:  # A whole number beyond all floats.
        return False


class NotPlainError(TypeError):
    """A value is not made of None, bool, int, float, complex, str, bytes and the built-in containers."""


class Encoder:
    """Python value to a JSON-able one.

    Args:
        of_object: Gives an object that is not plain its number; None refuses such objects.
        keep_subclasses: Whether an instance of a subclass (a named tuple, a Counter) is sent as its plain base. The
            program's side does so; the checker's does not need to.
    """

    def __init__(self, of_object: Callable[[Any], int] | None = None, keep_subclasses: bool = False) -> None:
        self._of_object = of_object
        self._keep_subclasses = keep_subclasses
        self._num_items = 0

    def encode(self, value: Any) -> Any:
        """The JSON-able form. Raises NotPlainError."""
        self._num_items = 0
        return self._encode(value, 0)

    def _encode(self, value: Any, depth: int) -> Any:
        self._num_items += 1
        if depth > _MAX_DEPTH or self._num_items > _MAX_ITEMS:
            raise NotPlainError("a value is nested too deeply, refers to itself or has too many items")
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if -_SMALL_INT < value < _SMALL_INT else ["int", hex(value)]
        if kind is float or kind is NearFloat:
            return ["float", value.hex()]
        if kind is complex:
            return ["complex", value.real.hex(), value.imag.hex()]
        if kind is bytes or kind is bytearray:
            return [kind.__name__, value.hex()]
        if kind in _COLLECTIONS:
            return [kind.__name__, [self._encode(item, depth + 1) for item in value]]
        if kind is dict:
            return ["dict", [[self._encode(k, depth + 1), self._encode(v, depth + 1)] for k, v in value.items()]]
        if kind is range:
            return ["range", [self._encode(part, depth + 1) for part in (value.start, value.stop, value.step)]]
        return self._encode_other(value, depth)

    def _encode_other(self, value: Any, depth: int) -> Any:
        if self._keep_subclasses:
            for base in _BASES:
                if isinstance(value, base):
                    return self._encode(base(value), depth + 1)
            for view in _VIEWS:
                # OrderedDict has views of its own.
                if isinstance(value, view):
                    return [view.__name__, [self._encode(item, depth + 1) for item in value]]
            if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
                return self._encode(value.item(), depth + 1)
            if isinstance(value, Iterator):
                return ["iterator", [self._encode(item, depth + 1) for item in value]]
        if self._of_object is None:
            raise NotPlainError(f"a value of type {type(value).__name__} cannot be passed to the program")
        return ["object", self._of_object(value)]


_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "iterator": iter,
    "dict_keys": lambda items: dict.fromkeys(items).keys(),
    "dict_values": lambda items: dict(enumerate(items)).values(),
    "dict_items": lambda items: dict(items).items(),
}


def decode(encoded: Any, to_object: Callable[[int], Any], to_float: Callable[[str], float] = float.fromhex) -> Any:
    """The value that `Encoder.encode` was given.

    Args:
        encoded: What json.loads gave.
        to_object: Number of an object that stayed on the other side to what stands for it here.
        to_float: Digits, as `float.hex` writes them, to what stands for a float here.

    Raises:
        ValueError: It is no encoded value (or holds a dictionary key or set member that cannot be hashed).
    """
    try:
        return _decode(encoded, to_object, to_float)
    except (TypeError, KeyError, IndexError, RecursionError, OverflowError) as error:
        raise ValueError(f"no encoded value: {error}") from error


def _decode(encoded: Any, to_object: Callable[[int], Any], to_float: Callable[[str], float]) -> Any:
    if not isinstance(encoded, list):
        if isinstance(encoded, (dict, float)):
            raise ValueError(f"no encoded value: {type(encoded).__name__}")
        return encoded
    tag = encoded[0]
    if tag == "dict":
        return {_decode(key, to_object, to_float): _decode(value, to_object, to_float) for key, value in encoded[1]}
    if tag == "range":
        return range(*[_decode(part, to_object, to_float) for part in encoded[1]])
    if tag in _CONTAINERS:
        return _CONTAINERS[tag]([_decode(item, to_object, to_float) for item in encoded[1]])
    if tag == "int":
        return int(encoded[1], 16)
    if tag == "float":
        return to_float(encoded[1])
    if tag == "complex":
        return complex(float.fromhex(encoded[1]), float.fromhex(encoded[2]))
    if tag == "bytes":
        return bytes.fromhex(encoded[1])
    if tag == "bytearray":
        return bytearray.fromhex(encoded[1])
    if tag == "object" and type(encoded[1]) is int:
        return to_object(encoded[1])
    raise ValueError(f"no encoded value: {tag!r}")


class Channel:
    """Messages over two pipes: a length, then JSON.

    Args:
        reader: File descriptor to receive from.
        writer: File descriptor to send to.
    """

    def __init__(self, reader: int, writer: int) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, message: Any) -> None:
        """Send one message. Raises ValueError if it is too long, OSError if the other side is gone."""
        data = json.dumps(message).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are sent")
        data = struct.pack("<I", len(data)) + data
        while data:
            data = data[os.write(self._writer, data) :]

    def receive(self) -> Any:
        """Receive one message. Raises ValueError if it is none, EOFError if the other side is gone."""
        (length,) = struct.unpack("<I", self._read(4))
        if length > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {length} bytes; at most {MAX_MESSAGE_BYTES} are read")
        try:
            return json.loads(self._read(length))
        except RecursionError as error:
            raise ValueError("a message nested too deeply") from error

    def _read(self, length: int) -> bytes:
        parts = []
        while length:
            part = os.read(self._reader, min(length, 2**20))
            if not part:
                raise EOFError("the other side is gone")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


def allow_long_integers() -> None:
    """Lift Python's limit on digits, where it has one: programs and tests write long numbers, and have a time limit."""
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)


_LIFTING = threading.Lock()
_num_lifted = 0
_limit: int | None = None


@contextmanager
def long_integers() -> Iterator[None]:
    """`allow_long_integers` for a while, in a process that is not a program's alone: until the last thread is done."""
    global _num_lifted, _limit
    with _LIFTING:
        if not _num_lifted and hasattr(sys, "get_int_max_str_digits"):
            _limit = sys.get_int_max_str_digits()
        _num_lifted += 1
        allow_long_integers()
    try:
        yield
    finally:
        with _LIFTING:
            _num_lifted -= 1
            if not _num_lifted and _limit is not None:
                sys.set_int_max_str_digits(_limit)

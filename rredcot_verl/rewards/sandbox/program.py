"""What runs inside a program's process: the program itself, and the answers to its checker's questions.

Nothing here is trusted: the program can read and change all of it. It holds no test and no expected value.
"""

import atexit
import os
import sys
import threading
import traceback
import types
from typing import Any

from rredcot_verl.rewards.sandbox.literals import Channel, Encoder, allow_long_integers, decode

_MAX_DETAIL = 500


def _new_module(name: str) -> dict[str, Any]:
    """A fresh module for the program, without a trace of this package in `sys.modules`."""
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == "rredcot_verl"]:
        del sys.modules[loaded]
    module = types.ModuleType(name)
    sys.modules[name] = module
    sys.argv = ["solution.py"]
    return module.__dict__


def run_main(source: str) -> int:
    """Run a program as Python runs a script; its exit status."""
    status = 0
    allow_long_integers()
    try:
        exec(compile(source, "solution.py", "exec", dont_inherit=True), _new_module("__main__"))
    except SystemExit as error:
        status = _exit_status(error.code)
    except BaseException:  # As Python itself: whatever it is, its trace goes to stderr and the status is 1.
        traceback.print_exc()
        status = 1
    # As at the end of a script: threads, exit handlers (output is often written by one), buffers.
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        status = status or 1
    return status


def _exit_status(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    sys.stderr.write(f"{code}\n")
    return 1


def serve(source: str, reader: int, writer: int) -> None:
    """Load a program, then answer the checker: look up a name, call an object, read an attribute of one."""
    allow_long_integers()
    channel = Channel(reader, writer)
    namespace = _new_module("solution")
    try:
        exec(compile(source, "solution.py", "exec", dont_inherit=True), namespace)
    except BaseException as error:
        channel.send(["raised", type(error).__name__, _message(error)])
        os._exit(1)
    channel.send(["loaded"])
    objects: list[Any] = []
    while True:
        try:
            request = channel.receive()
        except EOFError:
            return
        channel.send(_answer(request, namespace, objects))


def _answer(request: list[Any], namespace: dict[str, Any], objects: list[Any]) -> list[Any]:
    def number_of(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    try:
        if request[0] == "get":
            if request[1] not in namespace:
                raise NameError(f"name {request[1]!r} is not defined by the program")
            value = namespace[request[1]]
        elif request[0] == "attribute":
            value = getattr(objects[request[1]], request[2])
        else:
            arguments = [decode(argument, objects.__getitem__) for argument in request[2]]
            named = {name: decode(argument, objects.__getitem__) for name, argument in request[3].items()}
            value = objects[request[1]](*arguments, **named)
        return ["value", Encoder(number_of, keep_subclasses=True).encode(value)]
    except BaseException as error:
        return _raised(error)


def _raised(error: BaseException) -> list[Any]:
    # The checker knows Python's own exceptions only; `except ValueError` is to catch what is derived from it.
    name = next((known.__name__ for known in type(error).__mro__ if known.__module__ == "builtins"), "Exception")
    return ["raised", name, _message(error)]


def _message(error: BaseException) -> str:
    try:
        return str(error)[:_MAX_DETAIL]
    except BaseException:
        return ""

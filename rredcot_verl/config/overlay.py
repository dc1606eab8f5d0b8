"""The YAML of the `algorithm.rredcot` block, made from its schema: every default and every comment stands there once.

python -m rredcot_verl.config.overlay --write
"""

import inspect
import sys
import textwrap
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import yaml
from pydantic import BaseModel

from rredcot_verl.config.schema import RREDCoTConfig

FILE = "rredcot/default.yaml"
WIDTH = 110
HEADER = """\
# Format checks enforced by the tests, as in verl:
# 1. Comments must appear above each field.
# 2. There must be a blank line between each field.
# 3. Inline comments (after a field on the same line) are not allowed.

# Settings of RREDCoT, as they stand under algorithm.rredcot. The defaults are the method, but for
# the credit, which is ours (the paper's: credit.form=reweight).
# Generated from rredcot_verl/config/schema.py, which checks every value: python -m rredcot_verl.config.overlay --write
"""


def render() -> str:
    """The text of the file."""
    return HEADER + "\n" + "\n".join(_fields(RREDCoTConfig(), "")) + "\n"


def _fields(block: BaseModel, indent: str) -> Iterator[str]:
    first = True
    for name, field in type(block).model_fields.items():
        if not first:
            yield ""
        first = False
        value = getattr(block, name)
        if isinstance(value, BaseModel):
            yield from _comment(inspect.getdoc(type(value)) or "", indent)
            yield from (f"{indent}{name}:", "", *_fields(value, indent + "  "))
            continue
        yield from _comment(field.description or "", indent)
        if isinstance(value, tuple) and value and isinstance(value[0], str):
            yield from (f"{indent}{name}:", "", *(f"{indent}  - {_scalar(entry)}" for entry in value))
        else:
            yield f"{indent}{name}: {_scalar(list(value) if isinstance(value, tuple) else value)}"


def _comment(text: str, indent: str) -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(
        " ".join(text.split()), WIDTH, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False
    )


def _scalar(value: object) -> str:
    line: str = yaml.safe_dump(value, default_flow_style=True, width=10_000).splitlines()[0]
    return line


def main() -> None:
    """Print the YAML, or write it to its place."""
    if sys.argv[1:] == ["--write"]:
        (Path(str(files("rredcot_verl.config"))) / FILE).write_text(render(), encoding="utf-8")
    else:
        sys.stdout.write(render())


if __name__ == "__main__":
    main()

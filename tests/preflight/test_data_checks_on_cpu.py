"""Checks at start-up: each error people make is found, counted and shown, and sound data passes."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_module

from rredcot_verl.data.tally import NUM_EXAMPLES
from rredcot_verl.preflight.file_checks import check_files
from rredcot_verl.preflight.findings import Findings
from rredcot_verl.preflight.row_checks import RowRules, check_rows
from rredcot_verl.preflight.verifier_checks import verifier_of
from tests.tiny_model import make_tokenizer

MATH = "reward.custom_reward_function.path=pkg://rredcot_verl.rewards.math"
CODE = "reward.custom_reward_function.path=pkg://rredcot_verl.rewards.code"
KEY = "algorithm.rredcot.self_value.reference_key"
PROGRAMS = [
    "algorithm.rredcot.elicitation.format=code",
    f"{KEY}=extra_info.solutions",
]
BETA = "algorithm.rredcot.credit.beta=-1"
TESTS = json.dumps({"kind": "call", "entry_point": "f", "setup": "", "tests": ["assert f(1) == 2"]})


def _row(number: int, **changed) -> dict:
    row = {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": f"What is {number}+1?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
        "extra_info": {"index": number, "solutions": ["def f(x):\n    return x + 1\n"]},
    }
    return {key: value for key, value in (row | changed).items() if value is not ...}


def _rows(count: int = 8, start: int = 0) -> list[dict]:
    return [_row(number) for number in range(start, start + count)]


CODE_ROWS = [_row(n, reward_model={"style": "rule", "ground_truth": TESTS}) for n in range(9)]
CODE_DATA = {"train": CODE_ROWS, "val": CODE_ROWS[:2]}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def _in_both(kind: str) -> list[str]:
    return [f"data.{key}: {kind}" for key in ("train_files", "val_files")]


def _check(rows, tokenizer, **rules) -> Findings:
    findings = Findings()
    check_rows(rows, tokenizer, RowRules(**({"verifier": "math", "max_prompt_length": 200} | rules)), findings)
    return findings


def _check_files(config, tokenizer) -> Findings:
    findings = Findings()
    check_files(config, tokenizer, findings)
    return findings


def _kinds(findings) -> list[str]:
    return [finding.message for finding in findings]


def test_sound_rows_pass(tokenizer):
    report = _check(_rows(), tokenizer, reference_key="reward_model.ground_truth")
    assert _kinds(report.found) == ["8 rows, 8 of 8 ground truths tried with the math verifier"]


@pytest.mark.parametrize(
    "changed, kind, words",
    [
        ({"prompt": "What is 1+1?"}, "prompt_not_messages", "list of messages"),
        ({"prompt": []}, "prompt_not_messages", "list of messages"),
        ({"prompt": [{"content": "x"}]}, "prompt_not_messages", "message without role"),
        ({"prompt": [{"role": "user", "text": "x"}]}, "prompt_not_messages", "message without content"),
        ({"reward_model": {"style": "rule", "ground_truth": None}}, "missing_ground_truth", "ground_truth"),
        ({"reward_model": {"style": "rule", "ground_truth": " "}}, "missing_ground_truth", "ground_truth"),
        ({"reward_model": {"style": "rule"}}, "missing_ground_truth", "ground_truth"),
        ({"reward_model": "2"}, "missing_ground_truth", "ground_truth"),
        ({"data_source": None}, "missing_data_source", "names the data set"),
        ({"reward_model": {"style": "rule", "ground_truth": "proof"}}, "unusable_ground_truth", "math verifier"),
        ({"reward_model": {"style": "rule", "ground_truth": TESTS}}, "unusable_ground_truth", "rewards.code"),
    ],
)
def test_faulty_rows_are_counted_and_shown(tokenizer, changed, kind, words):
    rows = [*_rows(4), *(_row(number, **changed) for number in range(4, 9))]
    report = _check(rows, tokenizer)
    (finding,) = [finding for finding in report.faults if finding.message == kind]
    assert finding.count == 5
    assert [example.partition(":")[0] for example in finding.examples] == ["row 4", "row 5", "row 6"][:NUM_EXAMPLES]
    assert words in str(finding)


@pytest.mark.parametrize(
    "changed, kind",
    [
        ({"reward_model": {"style": "rule-based", "ground_truth": "1"}}, "odd_style"),
        ({"prompt": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}, "prompt_ends_with"),
        ({"prompt": [{"role": "user", "content": "what IS  0+1?"}]}, "duplicated_rows"),
    ],
)
def test_odd_rows_are_warned_of(tokenizer, changed, kind):
    report = _check([*_rows(4), _row(9, **changed)], tokenizer)
    assert not report.faults
    (finding,) = report.warnings
    assert finding.message.startswith(kind) and finding.count == 1 and finding.examples[0].startswith("row 4: ")


def test_missing_columns_are_named_with_those_there_and_the_likely_mapping(tokenizer):
    report = _check([{"question": "1+1", "answer": "2"}] * 3, tokenizer)
    (finding,) = report.faults
    assert finding.message == "missing_columns"
    for part in ("['answer', 'question']", "prompt from 'question'", "ground_truth from 'answer'", "prepare_math.py"):
        assert part in str(finding)
    (finding,) = _check(_rows(2), tokenizer, prompt_key="messages").faults
    assert "data.prompt_key=messages, but there is a column 'prompt'" in str(finding)


def test_no_rows(tokenizer):
    assert _kinds(_check([], tokenizer).faults) == ["no_rows"]


def test_references_that_the_probes_need(tokenizer):
    rows = [_row(1), _row(2, extra_info={"index": 1}), _row(3, extra_info={"index": 2, "solutions": [""]})]
    report = _check(rows, tokenizer, reference_key="extra_info.solutions")
    (finding,) = report.faults
    assert finding.message == "missing_reference" and finding.count == 2
    assert "reference_key=extra_info.solutions" in str(finding)


def test_code_tests_are_parsed_with_their_verifier(tokenizer):
    good = _row(1, reward_model={"style": "rule", "ground_truth": TESTS})
    bad = _row(2, reward_model={"style": "rule", "ground_truth": "assert f(1) == 2"})
    report = _check([good, bad], tokenizer, verifier="code")
    (finding,) = report.faults
    assert finding.message == "unusable_ground_truth" and finding.count == 1 and "not JSON" in str(finding)


def test_a_sample_of_ground_truths_is_fair_and_said_to_be_one(tokenizer):
    rows = [
        _row(n, reward_model={"style": "rule", "ground_truth": "proof"}) if n >= 200 else _row(n) for n in range(400)
    ]
    report = _check(rows, tokenizer, max_tried=40)
    (finding,) = report.faults
    assert 10 <= finding.count <= 30
    assert "40 of 400 ground truths tried" in str(finding)


def test_a_tokenizer_without_chat_template(tokenizer):
    bare = make_tokenizer()
    bare.chat_template = None
    (finding,) = _check(_rows(), bare).faults
    assert finding.message == "no_chat_template" and "custom_chat_template" in str(finding)
    assert _kinds(_check(_rows(), None).unchecked) == ["chat template and prompt lengths: no tokenizer given"]


def test_a_chat_template_of_the_config_counts(tmp_path):
    bare = make_tokenizer()
    template, bare.chat_template = bare.chat_template, None
    assert "data.train_files: no_chat_template" in _kinds(_check_files(_config(tmp_path), bare).faults)
    config = _config(tmp_path)
    config.actor_rollout_ref.model.custom_chat_template = template
    assert not _check_files(config, bare).faults
    assert bare.chat_template is None


@pytest.mark.parametrize("max_measured", [512, 4])
def test_long_prompts_are_measured_as_verl_does(tokenizer, max_measured):
    rows = _rows(20)
    rows[7]["prompt"][0]["content"] += "?" * 30
    rows[9]["prompt"][0]["content"] += "?" * 40
    lengths = [
        len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]) for row in rows
    ]
    limit = sorted(lengths)[-3]
    report = _check(rows, tokenizer, max_prompt_length=limit, max_measured=max_measured)
    (finding,) = report.faults
    assert finding.message == "overlong_prompts" and finding.count == 2
    assert f"the longest {max(lengths)}" in str(finding)
    assert finding.examples[0] == f"row 9: {max(lengths)} tokens"
    assert "filter_overlong_prompts=True" in str(finding)
    for option in ("filters_overlong", "truncates"):
        report = _check(rows, tokenizer, max_prompt_length=limit, max_measured=max_measured, **{option: True})
        assert not report.faults and _kinds(report.warnings) == ["overlong_prompts"]
    assert not _check(rows, tokenizer, max_prompt_length=max(lengths), max_measured=max_measured).faults


def _config(tmp_path: Path, *overrides: str, train=None, val=None):
    files = {}
    for name, rows in (("train", train or _rows(16)), ("val", val or _rows(4, 100))):
        files[name] = tmp_path / f"{name}.parquet"
        pd.DataFrame(rows).to_parquet(files[name])
    with initialize_config_module("rredcot_verl.config", version_base=None):
        return compose(
            "rredcot_trainer",
            overrides=[
                "actor_rollout_ref.rollout.name=vllm",
                "algorithm.adv_estimator=rredcot",
                f"data.train_files={files['train']}",
                f"data.val_files={files['val']}",
                "data.train_batch_size=8",
                MATH,
                *overrides,
            ],
        )


def test_sound_files_pass(tmp_path, tokenizer):
    report = _check_files(_config(tmp_path), tokenizer)
    assert (report.faults, report.warnings) == ([], [])
    notes = [note.message.partition(",")[0] for note in report.of("note")]
    assert notes == ["data.train_files: 16 rows", "data.val_files: 4 rows"]


def test_json_lines_are_read_as_verl_does(tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in _rows(9)))
    report = _check_files(_config(tmp_path, f"data.train_files=[{file}]"), tokenizer)
    assert not report.faults and "data.train_files: 9 rows" in report.text()


@pytest.mark.parametrize(
    "overrides, kinds, words",
    [
        (["data.train_files=/no/such.parquet"], ["data.train_files: missing_file"], "/no/such.parquet"),
        (["data.val_files=null"], ["data.val_files: no_files"], "data.val_files is not set"),
        (["data.train_files={text}"], ["data.train_files: unknown_kind"], "verl reads .parquet"),
        (["data.train_files={broken}"], ["data.train_files: unreadable_file"], "broken.parquet: not a readable"),
        (["data.train_batch_size=17"], ["fewer_rows_than_batch"], "16 training rows"),
        (["data.gen_batch_size=17"], ["fewer_rows_than_batch"], "16 training rows"),
        (["data.train_max_samples=5"], ["fewer_rows_than_batch"], "5 training rows"),
        (["data.max_response_length=6"], ["response_budget_too_short"], "no response could be right"),
        (["data.max_prompt_length=20"], _in_both("overlong_prompts"), ""),
        ([f"{KEY}=extra_info.answers"], _in_both("missing_reference"), "extra_info.answers"),
        (PROGRAMS, ["nothing_to_probe"], "max_answer_tokens"),
        (["algorithm.rredcot.credit.beta=-1"], [f"{BETA}: input should be greater than or equal to 0"], BETA),
        (["reward.custom_reward_function.path=null"], _in_both("unknown_data_source"), "sums"),
    ],
)
def test_what_does_not_fit_the_config(tmp_path, tokenizer, overrides, kinds, words):
    (tmp_path / "text.csv").write_text("a")
    (tmp_path / "broken.parquet").write_text("a")
    paths = {"text": tmp_path / "text.csv", "broken": tmp_path / "broken.parquet"}
    config = _config(tmp_path, *(override.format(**paths) for override in overrides))
    if "max_answer_tokens" in words:
        # A reference program of 27 characters, a token each.
        config.algorithm.rredcot.self_value.max_answer_tokens = 20
    report = _check_files(config, tokenizer)
    assert _kinds(report.faults) == kinds
    assert words in " ".join(report.text().split())


def test_a_code_run_reads_its_programs(tmp_path, tokenizer):
    report = _check_files(_config(tmp_path, CODE, *PROGRAMS, **CODE_DATA), tokenizer)
    assert not report.faults
    assert _kinds(report.warnings) == ["train_val_overlap"] and report.warnings[0].count == 2


def test_a_run_without_probes_needs_no_references_and_no_opening(tmp_path, tokenizer):
    config = _config(tmp_path, "algorithm.adv_estimator=grpo", "data.max_response_length=8")
    assert not _check_files(config, tokenizer).faults


def test_filtered_prompts_count_against_the_batch(tmp_path, tokenizer):
    rows = _rows(10)
    for row in rows[:5]:
        row["prompt"][0]["content"] += "?" * 100
    config = _config(tmp_path, "data.max_prompt_length=80", "data.filter_overlong_prompts=True", train=rows)
    report = _check_files(config, tokenizer)
    assert _kinds(report.faults) == ["fewer_rows_than_batch"] and "5 training rows" in report.text()


@pytest.mark.parametrize(
    "source, overrides", [("openai/gsm8k", []), ("apps", []), ("sums", ["reward.reward_manager.source=importlib"])]
)
def test_who_needs_no_reward_function(tmp_path, tokenizer, capfd, source, overrides):
    """verl knows the data source, or the user's own reward manager does; asking verl prints nothing."""
    rows = [_row(n, data_source=source) for n in range(12)]
    overrides = ["reward.custom_reward_function.path=null", *overrides]
    config = _config(tmp_path, *overrides, train=rows, val=rows[8:])
    capfd.readouterr()
    assert not _check_files(config, tokenizer).faults
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err + printed.out and "Error" not in printed.out


def test_files_elsewhere_and_own_data_sets_are_said_not_to_be_checked(tmp_path, tokenizer):
    report = _check_files(_config(tmp_path, "data.train_files=hdfs://host/train.parquet"), tokenizer)
    assert not report.faults and "hdfs://host/train.parquet is not on this machine" in report.text()
    report = _check_files(_config(tmp_path, "data.custom_cls.path=my.py", "data.custom_cls.name=My"), tokenizer)
    assert not report.faults and not report.of("note") and "data.custom_cls" in report.text()


@pytest.mark.parametrize(
    "path, verifier",
    [
        ("pkg://rredcot_verl.rewards.math", "math"),
        ("/x/rredcot_verl/rewards/code.py", "code"),
        ("/x/my_math.py", None),
        ("null", None),
    ],
)
def test_which_verifier(tmp_path, path, verifier):
    assert verifier_of(_config(tmp_path, f"reward.custom_reward_function.path={path}")) == verifier


def test_arrays_as_parquet_readers_give_them(tokenizer):
    row = _row(1, prompt=np.array([{"role": "user", "content": "1+1"}], dtype=object))
    assert not _check([row], tokenizer).faults


@pytest.mark.parametrize(
    "verifier, overrides, kind, words",
    [
        (CODE, ["+reward.custom_reward_function.reward_kwargs.time_limt_s=3"], "verifier_options", "time_limt_s"),
        (CODE, ["+reward.custom_reward_function.reward_kwargs.reward=al"], "verifier_options", "reward='al'"),
        (CODE, ["+reward.custom_reward_function.reward_kwargs.python=/no/such"], "verifier_cannot_run", "/no/such"),
        (CODE, ["+reward.custom_reward_function.reward_kwargs.prelude='1/0'"], "verifier_cannot_run", "prints 1"),
        (MATH, ["+reward.custom_reward_function.reward_kwargs.time_out_s=3"], "verifier_options", "time_out_s"),
        (MATH, ["+reward.custom_reward_function.reward_kwargs.timeout_s=0"], "verifier_options", "timeout_s=0"),
    ],
)
def test_the_verifier_is_tried_with_its_options(tmp_path, tokenizer, verifier, overrides, kind, words):
    data = CODE_DATA if verifier == CODE else {}
    report = _check_files(_config(tmp_path, verifier, *(PROGRAMS if data else []), *overrides, **data), tokenizer)
    (finding,) = report.faults
    assert finding.message == kind and words in str(finding)


@pytest.mark.parametrize(
    "verified, probed, where",
    [
        ("boxed", "boxed", None),
        ("hash", "boxed", "faults"),
        ("auto", "boxed", "warnings"),
        ("boxed", "auto", "warnings"),
    ],
)
def test_verifier_and_probes_look_for_the_same_answer(tmp_path, tokenizer, verified, probed, where):
    key = "reward.custom_reward_function.reward_kwargs.answer_format"
    config = _config(tmp_path, f"+{key}={verified}", f"algorithm.rredcot.elicitation.format={probed}")
    report = _check_files(config, tokenizer)
    found = {name for name in ("faults", "warnings") if "answer_format" in _kinds(getattr(report, name))}
    assert found == ({where} if where else set())


@pytest.mark.parametrize("verifier", [CODE, MATH])
def test_a_verifier_with_sound_options_passes_its_trial(tmp_path, tokenizer, verifier):
    data = CODE_DATA if verifier == CODE else {}
    # A response without a closed thinking block would be wrong.
    thinking = "+reward.custom_reward_function.reward_kwargs.prompt_opens_thinking=true"
    template = "actor_rollout_ref.model.custom_chat_template='{{ messages[-1].content }}<think>'"
    options = (*(PROGRAMS if data else []), thinking, template)
    report = _check_files(_config(tmp_path, verifier, *options, **data), tokenizer)
    assert not report.faults


def test_a_caller_with_an_event_loop(tmp_path, tokenizer):
    async def check():
        return _check_files(_config(tmp_path), tokenizer)

    assert not asyncio.run(check()).faults


def test_rows_elsewhere_may_fill_the_batch(tmp_path, tokenizer):
    files = f"data.train_files=[{tmp_path}/train.parquet,hdfs://host/train.parquet]"
    report = _check_files(_config(tmp_path, files, "data.train_batch_size=17"), tokenizer)
    assert not report.faults
    assert str(report.unchecked[0]) == "data.train_files: hdfs://host/train.parquet is not on this machine"


def test_a_verifier_of_ones_own_may_need_no_ground_truth(tokenizer):
    rows = [*_rows(4), *(_row(number, reward_model={"style": "model"}) for number in range(4, 9))]
    report = _check(rows, tokenizer, verifier=None)
    assert not report.faults
    assert _kinds(report.warnings) == ["missing_ground_truth"] and report.warnings[0].count == 5
    report = _check(rows, tokenizer, verifier=None, reference_key="reward_model.ground_truth")
    assert _kinds(report.faults) == ["missing_reference"]


def test_calls_of_tools_need_no_content(tokenizer):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    prompt = [*messages, {"role": "tool", "content": "2"}]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content or m.tool_calls | tojson }}{% endfor %}"
    report = _check([*_rows(4), _row(9, prompt=prompt)], tokenizer)
    assert (report.faults, report.warnings) == ([], [])
    # The call counts for the length.
    report = _check([*_rows(4), _row(9, prompt=prompt)], tokenizer, max_prompt_length=40)
    assert _kinds(report.faults) == ["overlong_prompts"] and report.faults[0].examples[0].startswith("row 4: ")


@pytest.mark.parametrize("num_unusable, severity", [(1, "warnings"), (19, "warnings"), (20, "faults")])
def test_few_unusable_ground_truths_are_a_warning(tokenizer, num_unusable, severity):
    proof = {"style": "rule", "ground_truth": "proof"}
    rows = [_row(n, reward_model=proof) if n < num_unusable else _row(n) for n in range(200)]
    report = _check(rows, tokenizer)
    (finding,) = getattr(report, severity)
    assert finding.message == "unusable_ground_truth" and finding.count == num_unusable
    assert len(report.faults) + len(report.warnings) == 1


def test_prompts_that_the_chat_template_refuses(tmp_path):
    tokenizer = make_tokenizer()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    system = [
        _row(n, prompt=[{"role": "system", "content": "Sum"}, {"role": "user", "content": str(n)}]) for n in range(16)
    ]
    report = _check_files(_config(tmp_path, train=system), tokenizer)
    assert _kinds(report.faults) == ["data.train_files: prompt_not_renderable"]
    assert report.faults[0].count == 16 and "no system role" in " ".join(report.text().split())
    report = _check_files(_config(tmp_path, train=[*system[:3], *_rows(8, 20)]), tokenizer)
    assert not report.faults
    assert _kinds(report.warnings) == ["data.train_files: prompt_not_renderable"] and report.warnings[0].count == 3


def test_a_refusal_that_depends_on_the_content():
    tokenizer = make_tokenizer()
    refusal = "{% if '5' in messages[0].content %}{{ raise_exception('no five') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    # Only prompts that may be too long are written out.
    (finding,) = [
        found for found in _check(_rows(8), tokenizer, max_prompt_length=10).warnings if "render" in found.message
    ]
    assert finding.count == 1 and finding.examples[0].startswith("row 5: ")

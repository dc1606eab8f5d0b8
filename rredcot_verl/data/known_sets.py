"""Known data sets, one entry each: where they are, what their columns mean. `docs/data.md` shows this table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rredcot_verl.data import code_columns, math_columns
from rredcot_verl.data.rows import Problem

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        name: Its name on the command line.
        task: `math` or `code`.
        hub_id: `owner/name` on the hub, by which `datasets.load_dataset` finds it.
        columns: Columns that `to_problem` reads and every row must have.
        to_problem: Makes a problem of a row; raises `rows.Unusable` with the reason where it cannot.
        splits: Splits of the data set, the default one first.
        config: Configuration (subset) on the hub, None for the only one.
        files: By split, the files to read as JSON lines; for repositories whose loading script `datasets` no longer
            runs. Empty: the hub's own configuration.
        data_source: `data_source` of the rows; verl groups validation metrics by it. "": the hub id.
        note: What a user should know.
    """

    name: str
    task: Literal["math", "code"]
    hub_id: str
    columns: tuple[str, ...]
    to_problem: Callable[[Row], Problem]
    splits: tuple[str, ...] = ("train",)
    config: str | None = None
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    data_source: str = ""
    note: str = ""

    @property
    def label(self) -> str:
        """`data_source` of the rows."""
        return self.data_source or self.hub_id


_LCB_FILES = tuple(f"test{part}.jsonl" for part in ("", 2, 3, 4, 5, 6))

_ENTRIES = [
    Source("gsm8k", "math", "openai/gsm8k", ("question", "answer"), math_columns.gsm8k, ("train", "test"), "main"),
    Source(
        "math",
        "math",
        "DigitalLearningGmbH/MATH-lighteval",
        ("problem", "solution"),
        math_columns.boxed_solution,
        ("train", "test"),
        "default",
        note="Its test split (5000) holds MATH-500.",
    ),
    Source("math500", "math", "HuggingFaceH4/MATH-500", ("problem", "answer"), math_columns.problem_answer, ("test",)),
    Source(
        "numina-cot",
        "math",
        "AI-MO/NuminaMath-CoT",
        ("problem", "solution"),
        math_columns.boxed_solution,
        ("train", "test"),
        note="860k rows; holds parts of MATH, GSM8K and AMC; proofs without a boxed answer are dropped and counted.",
    ),
    Source("open-rs", "math", "knoveleng/open-rs", ("problem", "answer"), math_columns.problem_answer),
    Source(
        "deepscaler",
        "math",
        "agentica-org/DeepScaleR-Preview-Dataset",
        ("problem", "answer"),
        math_columns.problem_answer,
        note="Holds AIME up to 2023 and AMC up to 2022.",
    ),
    Source(
        "dapo-17k",
        "math",
        "BytedTsinghua-SIA/DAPO-Math-17k",
        ("prompt", "reward_model"),
        math_columns.dapo,
        note="In verl's schema, every row some hundred times: 1.8M rows become 17k. Its prompt's own instruction is "
        "taken off and ours put on.",
    ),
    Source("aime24", "math", "HuggingFaceH4/aime_2024", ("problem", "answer"), math_columns.problem_answer),
    Source("aime25", "math", "math-ai/aime25", ("problem", "answer"), math_columns.problem_answer, ("test",)),
    Source(
        "humaneval",
        "code",
        "openai/openai_humaneval",
        ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
        code_columns.humaneval,
        ("test",),
    ),
    Source(
        "mbpp",
        "code",
        "google-research-datasets/mbpp",
        ("task_id", "text", "code", "test_list", "test_setup_code"),
        code_columns.mbpp,
        ("train", "validation", "test", "prompt"),
        "full",
    ),
    Source(
        "mbpp-sanitized",
        "code",
        "google-research-datasets/mbpp",
        ("task_id", "prompt", "code", "test_list", "test_imports"),
        code_columns.mbpp,
        ("train", "validation", "test", "prompt"),
        "sanitized",
    ),
    Source(
        "apps",
        "code",
        "codeparrot/apps",
        ("question", "solutions", "input_output", "starter_code"),
        code_columns.apps,
        ("train", "test"),
        files={"train": ("train.jsonl",), "test": ("test.jsonl",)},
    ),
    Source(
        "code-contests",
        "code",
        "deepmind/code_contests",
        ("name", "description", "public_tests", "private_tests", "generated_tests", "solutions"),
        code_columns.code_contests,
        ("train", "valid", "test"),
        note="Several GB. Problems with more than one right output have no checker here: --verify drops those that "
        "no Python solution passes.",
    ),
    Source(
        "livecodebench",
        "code",
        "livecodebench/code_generation_lite",
        ("question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata"),
        code_columns.livecodebench,
        ("release_v6", "v5", "v6"),
        files={"release_v6": _LCB_FILES, "v5": _LCB_FILES[4:5], "v6": _LCB_FILES[5:]},
        note="No reference solutions. v5 and v6 are the problems that those releases added.",
    ),
]

SOURCES: dict[str, Source] = {source.name: source for source in _ENTRIES}
"""The known data sets by name."""


def known_names(task: str | None = None) -> list[str]:
    """Names of the known data sets, of one task or all."""
    return [name for name, source in SOURCES.items() if task in (None, source.task)]


def by_hub_id(hub_id: str) -> Source | None:
    """The first known data set with a hub id, in any case; None for another one."""
    return next((source for source in SOURCES.values() if source.hub_id.lower() == hub_id.lower()), None)

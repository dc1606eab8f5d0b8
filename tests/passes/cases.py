"""Rows, engines and passes that the tests of the engine run on one rank and on two, see `ranks`.

A case is its name: its first word says what is read, the others what is different from the plain case.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rredcot_verl.passes.attribution_task import AttributionPlan, AttributionTask, encode_plan
from rredcot_verl.passes.probe_codec import encode
from rredcot_verl.passes.protocol import ALONE, FIELDS, MODEL_TYPE, NOTHING, PASSES
from rredcot_verl.probes.probe import Probe
from tests.passes.architectures import SHAPE, VOCAB_SIZE, build_model, random_probes, random_traces

NUM_ROWS = 6
BUDGET = 200
SMALL_BUDGET = 60
BUCKET = 64
TEMPERATURE = 0.7
TEMPERATURES = torch.tensor([0.5, 0.7, 1.0, 1.3, 2.0, 0.9])
READOUT = (1, 5, 11)
"""Layer, features, seed."""
SPLIT_TRACES = random_traces([21, 8])
SPLIT_PROBES = [random_probes(len(trace), 1, seed) for seed, trace in enumerate(SPLIT_TRACES)]
"""Of every architecture by itself."""
GARBAGE_ROW = 3
PLANS = [
    AttributionPlan((3, 9, 9, 20), 23, 28),
    AttributionPlan((2, 5, 8), 9, 11),
    None,
    AttributionPlan((1, 10, 20, 30, 39), 39, 40),
    None,
    AttributionPlan((4, 15), 15, 18),
]


@dataclass(frozen=True)
class Rows:
    """A rank's rows: of each the tokens, and what may be read of it; an empty entry or None for nothing."""

    traces: list[list[int]]
    probes: list[list[Probe]]
    positions: list[list[int]]
    plans: list[AttributionPlan | None]

    def fields(self) -> dict[str, list[torch.Tensor]]:
        """The rows as a worker gets them."""
        plans = [NOTHING if plan is None else encode_plan(plan) for plan in self.plans]
        payloads = {
            "probes": [encode(own) for own in self.probes],
            "hidden": [own or NOTHING for own in self.positions],
            "attention": plans,
            "gradient": plans,
        }
        fields = {
            FIELDS[name].payload: [torch.tensor(row, dtype=torch.int32) for row in rows]
            for name, rows in payloads.items()
        }
        return fields | {"input_ids": [torch.tensor(trace) for trace in self.traces]}

    def without_wishes(self) -> "Rows":
        """The same with nothing to read."""
        return Rows(self.traces, [[]] * NUM_ROWS, [[]] * NUM_ROWS, [None] * NUM_ROWS)

    def tasks(self) -> list[AttributionTask]:
        """What the plans weigh; of rows without any plan, one task that has nothing to weigh."""
        own = [plan.task(trace) for trace, plan in zip(self.traces, self.plans, strict=True) if plan is not None]
        return own or [AttributionTask(self.traces[0][:1], (), 1, 1)]


def make_rows(rank: int) -> Rows:
    """All that occurs: rows without probes, states or answers, and one of a single token, as verl pads batches with."""
    traces = random_traces([30 + 20 * rank, 12, 1, 40, 25 + 5 * rank, 18], seed=rank)
    probes = [random_probes(len(trace), 3, seed) for seed, trace in enumerate(traces)]
    probes[1] = probes[2] = []
    positions = []
    for seed, trace in enumerate(traces):
        middle = torch.randint(len(trace), (3,), generator=torch.Generator().manual_seed(seed)).tolist()
        positions.append(sorted({0, len(trace) - 1, *middle}))
    positions[4] = []
    return Rows(traces, probes, positions, PLANS)


def uneven_rows(rank: int) -> Rows:
    """Short traces with many probes, long ones without any, and a budget that holds one of the latter."""
    traces = random_traces([BUDGET - 10, 8] * (NUM_ROWS // 2), seed=rank)
    probes = [random_probes(8, 60, seed) if len(trace) == 8 else [] for seed, trace in enumerate(traces)]
    return Rows(traces, probes, [[]] * NUM_ROWS, [None] * NUM_ROWS)


def with_garbage(rows: Rows) -> Rows:
    """Other tokens in one row."""
    traces = [list(trace) for trace in rows.traces]
    traces[GARBAGE_ROW] = [(token + 17) % VOCAB_SIZE for token in traces[GARBAGE_ROW]]
    return dataclasses.replace(rows, traces=traces)


ROWS = [make_rows(rank) for rank in range(2)]
ROWS_BY_WORD = {
    "one-sided": [ROWS[0], ROWS[1].without_wishes()],
    "none": [rows.without_wishes() for rows in ROWS],
    "garbage": [with_garbage(rows) for rows in ROWS],
    "uneven": [uneven_rows(rank) for rank in range(2)],
}
PLAIN = {
    "calculate_entropy": True,
    "temperature": TEMPERATURE,
    "use_dynamic_bsz": True,
    "max_token_len_per_gpu": 10**6,
    "use_remove_padding": False,
    "pad_token_id": 0,
}
PACKED = {"use_remove_padding": True}
PROBES, HIDDEN = ("probes", ()), ("hidden", READOUT)
WEIGHING = {ALONE: True, "calculate_entropy": False}
SETTINGS_BY_WORD: dict[str, dict[str, Any]] = {
    "probes": {PASSES: (PROBES,), ALONE: False},
    "hidden": {PASSES: (HIDDEN,), ALONE: False},
    "both": {PASSES: (PROBES, HIDDEN), ALONE: False},
    "both-turned": {PASSES: (HIDDEN, PROBES), ALONE: False},
    "attention": {PASSES: (("attention", ()),), **WEIGHING},
    "gradient": {PASSES: (("gradient", ()),), **WEIGHING},
    "alone": WEIGHING,
    "packed": PACKED,
    "padded": PACKED,
    "halves": PACKED,
    "quarters": PACKED,
    "kernels": PACKED | {"use_fused_kernels": True},
    "small": {"max_token_len_per_gpu": SMALL_BUDGET},
    "smaller": {"max_token_len_per_gpu": SMALL_BUDGET // 2},
    "uneven": {"max_token_len_per_gpu": BUDGET},
    "fixed": {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2},
    "by-row": {"temperature": TEMPERATURES},
    "at-1": {"temperature": 1.0},
    "last-layer": {PASSES: (("hidden", (-1, *READOUT[1:])),)},
}
NUM_PARTS = {"halves": 2, "quarters": 4}
"""Ranks that split their rows' tokens among them."""
ENGINE_WORDS = (*NUM_PARTS, "padded", "half", "lora", "kernels", "checkpointed")
# Of each first word the others, the plain case first.
VARIANTS = {
    "verl": "| packed | small | fixed | by-row | at-1 | uneven | lora | half | padded | kernels",
    "plain": "",
    "probes": "| packed | small | fixed | by-row | at-1 | uneven | lora | half | padded | one-sided | none"
    "| small one-sided | alone | alone small | alone small one-sided | alone fixed | alone fixed one-sided"
    "| alone none | kernels | alone kernels",
    "hidden": "| packed | small | fixed | lora | half | padded | kernels | one-sided | none | last-layer | garbage"
    "| garbage packed | alone | alone packed | alone small | alone lora | alone kernels",
    "both": "| small | fixed | padded | lora | garbage | alone | alone small | kernels",
    "both-turned": "| alone",
    "attention": "| small | fixed | one-sided | none | lora | half | checkpointed",
    "gradient": "| small | fixed | by-row | one-sided | none | lora | half | checkpointed | checkpointed fixed",
    "plain-again": "",
    "gradient-again": "",
}
CASES = [f"{first} {words.strip()}".strip() for first, variants in VARIANTS.items() for words in variants.split("|")]
SPLIT_CASES = {
    1: [],
    2: [
        *("hidden halves", "hidden halves smaller", "hidden halves alone", "both halves", "both halves alone"),
        *("probes halves", "probes halves by-row", "probes halves smaller", "probes halves uneven"),
        *("probes halves padded", "probes halves none", "probes halves alone", "probes halves kernels"),
    ],
    # Four ranks that hold two pairs' rows, and the rows of one.
    4: [
        *("probes halves", "probes halves one-sided", "both halves smaller", "probes quarters", "both quarters"),
        *("both quarters alone", "both quarters kernels"),
    ],
}
"""By number of ranks."""


def select(*first_words: str, without: str = "half lora kernels last-layer by-row at-1") -> list[str]:
    """Names of the cases that begin so and have none of the other words."""
    words = {name: name.split() for name in CASES}
    return [name for name, own in words.items() if own[0] in first_words and not set(own) & set(without.split())]


def num_parts(name: str) -> int:
    """Ranks that split their rows' tokens in a case."""
    return next((NUM_PARTS[word] for word in name.split() if word in NUM_PARTS), 1)


def rows_of(name: str) -> list[Rows]:
    """The rows of each rank in a case; of each group of ranks, where they split their rows' tokens."""
    return next((ROWS_BY_WORD[word] for word in name.split() if word in ROWS_BY_WORD), ROWS)


def engine_of(name: str) -> str:
    """The engine that runs a case."""
    words = name.split()
    return " ".join(["verl" if words[0] == "verl" else "ours", *(word for word in words if word in ENGINE_WORDS)])


def settings_of(name: str) -> dict[str, Any]:
    """What a case says of its batch."""
    settings = dict(PLAIN)
    for word in name.split():
        settings |= SETTINGS_BY_WORD.get(word.removesuffix("-again"), {})
    return settings


def adapted_model() -> PeftModel:
    """A model with a tied head and an adapter that is not nothing."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(build_model("qwen2-tied"), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def kernel_model() -> LlamaForCausalLM:
    """For fused kernels: they replace a class's own forward, so this is a class that nobody else uses here.

    Its head is tied: with FSDP2, verl's kernels in torch work with no other.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "untied": lambda: build_model("qwen3-untied"),
    "tied": lambda: build_model("qwen2-tied"),
    "adapter": adapted_model,
    "kernels": kernel_model,
}


def engine_options(name: str, models: Path) -> dict[str, Any]:
    """Options of `build_engine`.

    Args:
        name: See `engine_of`.
        models: Folder with one of `MODELS` in each of its folders.
    """
    whose, *words = name.split()
    options: dict[str, Any] = {
        "model_type": MODEL_TYPE if whose == "ours" else "language_model",
        "model": {"path": str(models / "untied")},
    }
    kernels = {"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": "torch"}}
    by_word: dict[str, dict[str, Any]] = {
        "padded": {"pad_to_length": True, "pad_to_length_bucket": BUCKET},
        "half": {"param_dtype": "bf16"},
        "lora": {"model": {"path": str(models / "tied"), "lora_rank": 4, "lora_adapter_path": str(models / "adapter")}},
        "kernels": {"model": {"path": str(models / "kernels")} | PACKED | kernels},
        "checkpointed": {
            "model": options["model"] | {"enable_gradient_checkpointing": True},
            "max_token_len_per_gpu": SMALL_BUDGET,
            "micro_batch_size_per_gpu": 1,
        },
    }
    for word, parts in NUM_PARTS.items():
        by_word[word] = {"model": options["model"] | PACKED, "ulysses_sequence_parallel_size": parts}
    for word in words:
        options |= by_word[word]
    return options

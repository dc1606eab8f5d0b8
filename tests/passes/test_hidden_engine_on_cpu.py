"""verl's FSDP2 engine with hidden states, on one rank and on two: against transformers' own, one trace at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rredcot_verl.passes.protocol import (
    FUSED,
    HIDDEN_ONLY,
    HIDDEN_POSITIONS,
    HIDDEN_STATES,
    MODEL_TYPE,
    PASS,
    PROBE_LOG_PROBS,
    PROBES_ONLY,
    READOUT,
)
from tests.passes.architectures import SHAPE, build_model
from tests.passes.test_actor_engine_on_cpu import (
    BUCKET,
    FIXED,
    PLAIN,
    REPOSITORY,
    VERLS,
    adapted_model,
    as_fields,
    make_rows,
)
from tests.passes.test_hidden_on_cpu import expected

LAYER, DIM, SEED = 1, 5, 11
WANTED = {READOUT: (LAYER, DIM, SEED)}
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
GARBAGE_ROW = 3
KERNELS = {"use_remove_padding": True, "use_fused_kernels": True, "fused_kernel_options": {"impl_backend": "torch"}}


def positions_of(length: int, seed: int) -> list[int]:
    """Some tokens of a trace, its first and last among them."""
    middle = torch.randint(length, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted({0, length - 1, *middle})


def hidden_rows(rank: int, with_positions: bool = True):
    """A rank's rows, two of them with states wanted of a row without probes; one row has none to give."""
    traces, probes = make_rows(rank)
    positions = [positions_of(len(trace), seed) if with_positions else [] for seed, trace in enumerate(traces)]
    positions[4] = []
    return traces, probes, positions


def with_positions(traces, probes, positions):
    return as_fields(traces, probes) | {HIDDEN_POSITIONS: [torch.tensor(own or [-1]) for own in positions]}


def with_garbage(traces, probes, positions):
    """Other tokens in one row."""
    changed = [list(trace) for trace in traces]
    changed[GARBAGE_ROW] = [(token + 17) % 64 for token in changed[GARBAGE_ROW]]
    return changed, probes, positions


ROWS = [hidden_rows(rank) for rank in range(2)]
GARBAGE = [with_garbage(*rows) for rows in ROWS]
ONE_SIDED = [hidden_rows(0), hidden_rows(1, with_positions=False)]
NONE_AT_ALL = [hidden_rows(rank, with_positions=False) for rank in range(2)]


def passes(num_ranks: int) -> dict[str, tuple[str, list, dict]]:
    """Name -> engine, rows of each rank, settings."""
    packed, small = {"use_remove_padding": True}, {"max_token_len_per_gpu": 60}
    hidden, fused = PLAIN | WANTED, PLAIN | {PASS: FUSED}
    alone = PLAIN | WANTED | {PASS: HIDDEN_ONLY, "calculate_entropy": False}
    probes_only = PLAIN | {PASS: PROBES_ONLY, "calculate_entropy": False}
    plan = {
        "verl": ("verl", ROWS, PLAIN),
        "verl packed": ("verl", ROWS, PLAIN | packed),
        "verl small": ("verl", ROWS, PLAIN | small),
        "verl fixed": ("verl", ROWS, PLAIN | FIXED),
        "verl lora": ("verl lora", ROWS, PLAIN),
        "verl half": ("verl half", ROWS, PLAIN),
        "verl padded": ("verl padded", ROWS, PLAIN | packed),
        "fused": ("ours", ROWS, fused),
        "probes": ("ours", ROWS, probes_only),
        "hidden": ("ours", ROWS, hidden),
        "hidden packed": ("ours", ROWS, hidden | packed),
        "hidden small": ("ours", ROWS, hidden | small),
        "hidden fixed": ("ours", ROWS, hidden | FIXED),
        "hidden lora": ("ours lora", ROWS, hidden),
        "hidden half": ("ours half", ROWS, hidden),
        "hidden padded": ("ours padded", ROWS, hidden | packed),
        "hidden fused": ("ours", ROWS, fused | WANTED),
        "hidden fused small": ("ours", ROWS, fused | WANTED | small),
        "hidden fused fixed": ("ours", ROWS, fused | WANTED | FIXED),
        "hidden fused padded": ("ours padded", ROWS, fused | WANTED | packed),
        "hidden fused lora": ("ours lora", ROWS, fused | WANTED),
        "hidden and probes": ("ours", ROWS, probes_only | WANTED),
        "alone": ("ours", ROWS, alone),
        "alone packed": ("ours", ROWS, alone | packed),
        "alone small": ("ours", ROWS, alone | small),
        "alone lora": ("ours lora", ROWS, alone),
        "garbage": ("ours", GARBAGE, hidden),
        "garbage packed": ("ours", GARBAGE, hidden | packed),
        "garbage fused": ("ours", GARBAGE, fused | WANTED),
        "one-sided": ("ours", ONE_SIDED, hidden),
        "none at all": ("ours", NONE_AT_ALL, hidden),
        "verl kernels": ("verl kernels", ROWS, PLAIN | packed | {"use_fused_kernels": True}),
        "hidden kernels": ("ours kernels", ROWS, hidden | packed | {"use_fused_kernels": True}),
        "alone kernels": ("ours kernels", ROWS, alone | packed | {"use_fused_kernels": True}),
        "last layer": ("ours", ROWS, PLAIN | {READOUT: (-1, DIM, SEED)}),
        "plain again": ("ours", ROWS, PLAIN),
    }
    if num_ranks > 1:
        # Both ranks hold the same rows, and each computes half of their tokens.
        same = [ROWS[0], ROWS[0]]
        plan["split"] = ("split", same, hidden | packed)
        plan["split small"] = ("split", same, hidden | packed | {"max_token_len_per_gpu": 30})
        plan["split alone"] = ("split", same, alone | packed)
    return {
        name: (engine, [with_positions(*rows) for rows in ranks], how) for name, (engine, ranks, how) in plan.items()
    }


def kernel_model() -> LlamaForCausalLM:
    """For fused kernels: they replace a class's own forward, so this is a class that nobody else uses here.

    Its head is tied: with FSDP2, verl's kernels in torch work with no other.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).eval()


def engines(folder: Path, num_ranks: int) -> dict[str, dict]:
    """Name -> options of `build_engine`."""
    for name in ("qwen3-untied", "qwen2-tied"):
        build_model(name).save_pretrained(folder / name)
    adapted_model().save_pretrained(folder / "adapter")
    kernel_model().save_pretrained(folder / "llama")
    untied, tied, adapter = (str(folder / name) for name in ("qwen3-untied", "qwen2-tied", "adapter"))
    padded = {"path": untied, "pad_to_length": True, "pad_to_length_bucket": BUCKET}
    options = {}
    for name, model_type in (("verl", VERLS), ("ours", MODEL_TYPE)):
        options |= {
            name: {"model_type": model_type, "path": untied},
            f"{name} padded": {"model_type": model_type, **padded},
            f"{name} half": {"model_type": model_type, "path": untied, "param_dtype": "bf16"},
            f"{name} lora": {"model_type": model_type, "path": tied, "adapter": adapter},
            f"{name} kernels": {"model_type": model_type, "path": str(folder / "llama"), "model": KERNELS},
        }
    if num_ranks > 1:
        options["split"] = {
            "model_type": MODEL_TYPE,
            "path": untied,
            "ulysses_sequence_parallel_size": 2,
            "model": {"use_remove_padding": True},
        }
    return options


def start(folder: Path, num_ranks: int) -> list[dict]:
    """Results of all passes, rank by rank."""
    plan = {"engines": engines(folder, num_ranks), "passes": passes(num_ranks)}
    path = str(folder / "qwen3-untied")
    plan["fsdp1"] = [(path, traces[0], positions[0], WANTED[READOUT]) for traces, _, positions in ROWS]
    torch.save(plan, folder / "passes.pt")
    environment = os.environ | {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.passes.hidden_ranks", str(folder), str(rank), str(num_ranks)],
            env=environment | {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": "0"},
            cwd=REPOSITORY,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(num_ranks)
    ]
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * num_ranks, "\n".join(output[-4000:] for output in outputs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(num_ranks)]


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def results(request, tmp_path_factory):
    return start(tmp_path_factory.mktemp("engine"), request.param)


@pytest.fixture(scope="module")
def model():
    return build_model("qwen3-untied")


def assert_states(found, model, traces, positions, tolerance=TOLERANCE) -> None:
    for own, trace, wanted in zip(found, traces, positions, strict=True):
        assert own.dtype == torch.float32
        if not wanted:
            assert own.tolist() == [0.0]
            continue
        values = expected(model, trace, wanted, LAYER, DIM, SEED)
        torch.testing.assert_close(own.reshape(len(wanted), DIM), values, **tolerance)


READ = {
    "hidden": ROWS,
    "hidden packed": ROWS,
    "hidden small": ROWS,
    "hidden fixed": ROWS,
    "hidden padded": ROWS,
    "hidden fused": ROWS,
    "hidden fused small": ROWS,
    "hidden fused fixed": ROWS,
    "hidden fused padded": ROWS,
    "hidden and probes": ROWS,
    "alone": ROWS,
    "alone packed": ROWS,
    "alone small": ROWS,
    "garbage": GARBAGE,
    "garbage packed": GARBAGE,
    "garbage fused": GARBAGE,
    "one-sided": ONE_SIDED,
    "none at all": NONE_AT_ALL,
}


@pytest.mark.parametrize("name", READ)
def test_states_are_those_of_every_trace_by_itself(results, model, name):
    for rank, (traces, _, positions) in zip(results, READ[name], strict=False):
        assert_states(rank[name][HIDDEN_STATES], model, traces, positions)


@pytest.mark.parametrize("name", ["hidden lora", "hidden fused lora", "alone lora"])
def test_the_adapter_is_part_of_the_policy(results, name):
    adapted, without = adapted_model(), build_model("qwen2-tied")
    for rank, (traces, _, positions) in zip(results, ROWS, strict=False):
        assert_states(rank[name][HIDDEN_STATES], adapted, traces, positions)
        assert not torch.allclose(
            rank[name][HIDDEN_STATES][0],
            expected(without, traces[0], positions[0], LAYER, DIM, SEED).flatten(),
            atol=0.01,
        )


UNCHANGED = {
    "hidden": "verl",
    "hidden packed": "verl packed",
    "hidden small": "verl small",
    "hidden fixed": "verl fixed",
    "hidden lora": "verl lora",
    "hidden half": "verl half",
    "hidden padded": "verl padded",
    "hidden fused": "fused",
    "one-sided": "verl",
    "none at all": "verl",
    "last layer": "verl",
    "plain again": "verl",
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_log_probs_and_entropies_are_what_they_were_to_the_bit(results, name):
    for rank in results:
        ours, theirs = rank[name], rank[UNCHANGED[name]]
        assert set(ours) - {HIDDEN_STATES} == set(theirs) and ours["sizes"] == theirs["sizes"]
        assert (HIDDEN_STATES in ours) == (name != "plain again")
        assert ours["num_logits"] == theirs["num_logits"]
        for field in set(theirs) - {"sizes", "num_logits"}:
            for row, before in zip(ours[field], theirs[field], strict=True):
                assert torch.equal(row, before)


def test_probes_are_what_they_were_to_the_bit(results):
    for rank in results:
        for name, before in (("hidden fused", "fused"), ("hidden and probes", "probes")):
            for row, theirs in zip(rank[name][PROBE_LOG_PROBS], rank[before][PROBE_LOG_PROBS], strict=True):
                assert torch.equal(row, theirs)


def test_garbage_in_another_row_changes_nothing(results):
    for rank in results:
        for name, before in (
            ("garbage", "hidden"),
            ("garbage packed", "hidden packed"),
            ("garbage fused", "hidden fused"),
        ):
            pairs = list(zip(rank[name][HIDDEN_STATES], rank[before][HIDDEN_STATES], strict=True))
            changed = [number for number, (row, theirs) in enumerate(pairs) if not torch.equal(row, theirs)]
            assert changed == [GARBAGE_ROW]


def test_half_precision(results, model):
    """bfloat16 has 8 bits, in a random model of three layers; the projection itself is not rounded."""
    for rank, (traces, _, positions) in zip(results, ROWS, strict=False):
        rows = zip(rank["hidden half"][HIDDEN_STATES], traces, positions, strict=True)
        errors = [
            (own.reshape(-1, DIM) - expected(model, trace, wanted, LAYER, DIM, SEED)).abs().flatten()
            for own, trace, wanted in rows
            if wanted
        ]
        assert 0 < torch.cat(errors).mean() < 0.05
        values = torch.cat(rank["hidden half"][HIDDEN_STATES])
        assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())


@pytest.mark.parametrize("name", ["alone", "alone packed", "alone small", "alone lora"])
def test_a_pass_for_states_alone_gives_nothing_else_and_makes_one_logit(results, name):
    for rank in results:
        assert set(rank[name]) == {"sizes", "num_logits", HIDDEN_STATES}
        # Of each row of a padded pass, or of a packed one.
        assert set(rank[name]["num_logits"]) == {1}


def test_a_pass_for_probes_gives_the_states_beside_them(results):
    for rank in results:
        assert set(rank["hidden and probes"]) == {"sizes", "num_logits", PROBE_LOG_PROBS, HIDDEN_STATES}
        assert rank["hidden and probes"]["num_logits"] == rank["probes"]["num_logits"]


def test_ranks_make_the_same_number_of_passes(results):
    for name in results[0]:
        if "sizes" in results[0][name]:
            assert len({len(rank[name]["sizes"]) for rank in results}) == 1, name


def test_fused_kernels(results):
    """They make no logits; the states do not need any."""
    model = kernel_model()
    for rank, (traces, _, positions) in zip(results, ROWS, strict=False):
        for name in ("hidden kernels", "alone kernels"):
            assert_states(rank[name][HIDDEN_STATES], model, traces, positions)
        assert set(rank["alone kernels"]) == {HIDDEN_STATES}
        for field in ("log_probs", "entropy"):
            for row, theirs in zip(rank["hidden kernels"][field], rank["verl kernels"][field], strict=True):
                assert torch.equal(row, theirs)


def test_the_first_version_of_fsdp(results, model):
    for rank, (traces, _, positions) in zip(results, ROWS, strict=False):
        found = rank["fsdp1"][HIDDEN_STATES].flatten()
        assert_states([found], model, traces[:1], positions[:1])


def test_a_sequence_split_over_ranks(results, model):
    """verl's Ulysses: every rank has all states, of tokens it did not compute too."""
    if len(results) == 1:
        pytest.skip("needs two ranks")
    traces, _, positions = ROWS[0]
    for rank in results:
        for name in ("split", "split small", "split alone"):
            assert_states(rank[name][HIDDEN_STATES], model, traces, positions)
        for row, before in zip(rank["split"]["log_probs"], results[0]["verl"]["log_probs"], strict=True):
            torch.testing.assert_close(row[:-1], before[:-1], atol=2e-5, rtol=1e-4)
